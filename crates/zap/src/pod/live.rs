//! A pod that is alive, as its monitor holds it.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use crate::error::RebuildError;
use crate::fault;
use crate::ids::{HostPid, PodPid};
use crate::look::Console;
use crate::monitor::log::Log;
use crate::monitor::session::{self, Session};
use crate::pod::console::Ends;
use crate::pod::control::{self, Control};
use crate::pod::init::Command;
use crate::pod::journal::{Journal, Undo};
use crate::pod::limits::LimitGroups;
use crate::pod::namespaces::Shim;
use crate::pod::network::follow::{Here, Moved};
use crate::pod::network::former::FormerPlace;
use crate::pod::network::trail::Trail;
use crate::pod::network::{Network, NetworkError};
use crate::pod::registry::{Claim, PodState, ProcessId, Record, Residual};
use crate::pod::sysctls::Sysctls;
use crate::pod::{Cgroup, PodError, PodSpec, Store, birth, rootfs};
use crate::process::ahead::Layouts;
use crate::process::handles::Handles;
use crate::processor::Beginnings;
use crate::sys::pidfd::PidFd;
use crate::sys::tty::WindowSize;

/// How far a pod's clocks are from the host's, in nanoseconds: the pod's clock is the host's plus this.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClockOffsets {
    /// Of CLOCK_MONOTONIC.
    pub monotonic: i64,
    /// Of CLOCK_BOOTTIME.
    pub boottime: i64,
}

/// How a pod is born.
#[derive(Default)]
pub struct Birth<'a> {
    /// Its clocks; the host's own if absent.
    pub clocks: Option<ClockOffsets>,
    /// Whether its network starts out blocked (a restart lets it go last).
    pub network_blocked: bool,
    /// The outer address asked for, with the length of its prefix.
    pub address: Option<(std::net::Ipv4Addr, Option<u8>)>,
    /// The MAC address asked for.
    pub mac: Option<[u8; 6]>,
    /// The place that a forwarder keeps for it where it was.
    pub former: Option<&'a FormerPlace>,
    /// The hosts that it was on before, if it is followed from there.
    pub trail: Option<&'a Trail>,
    /// PIDs that nobody asks for by number come after this one.
    pub last_pid: Option<i32>,
    /// Makes its namespaces, if it was forked before; one is forked if it was not.
    pub shim: Option<&'a Shim>,
    /// Fills the upper layers, in the directory that it is given, before they are mounted.
    pub unpack: Option<Unpack<'a>>,
}

/// Fills the directory of a pod's upper layers.
pub type Unpack<'a> = &'a mut dyn FnMut(&Path) -> Result<(), RebuildError>;

/// A pod that is alive. Lives in its monitor.
pub struct LivePod {
    /// As it was asked for.
    pub spec: PodSpec,
    /// The host that it is on.
    pub store: Store,
    /// Its PID 1.
    pub init: HostPid,
    /// Its processes.
    pub cgroup: Cgroup,
    /// Its first command, whose end is the pod's.
    pub main: Option<PodPid>,
    /// Its connection, if it has one.
    pub network: Option<Network>,
    /// Its connection on the way out.
    pub(super) departing: Option<JoinHandle<Result<(), NetworkError>>>,
    /// What must be undone if this monitor dies.
    pub journal: Journal,
    /// What the memory of its processes is followed through.
    pub handles: Handles,
    /// How it looked at the last checkpoint.
    pub layouts: Layouts,
    /// On which processors its programs began, but for those that began here.
    pub beginnings: Beginnings,
    /// Whether settings of its networks have been changed.
    pub sysctls: Sysctls,
    pub(super) limits: LimitGroups,
    pub(super) control: Control,
    pub(super) session: Option<Session>,
    pub(super) hush: Option<session::Hush>,
    pub(super) created: String,
    pub(super) state: PodState,
    pub(super) in_doubt: bool,
    pub(super) residual: Option<Residual>,
    pub(crate) listener: Option<UnixListener>,
    pub(super) _claim: Claim,
}

impl LivePod {
    /// Makes a pod: namespaces, root, network, PID 1. No command runs in it. On failure nothing is left. Without a shim the
    /// caller must be its process's only thread.
    pub fn create(store: Store, spec: PodSpec, birth: Birth<'_>) -> Result<LivePod, PodError> {
        birth::create(store, spec, birth)
    }

    fn failed(&self, step: &str) -> impl FnOnce(io::Error) -> PodError + use<> {
        let (pod, step) = (self.spec.name.clone(), step.to_owned());
        move |source| PodError::Kernel { pod, step, source }
    }

    /// Starts the first command, with a console of its own, which nobody reads until [`LivePod::open_console`]; its window
    /// has this size from the first moment on.
    pub fn start_main(&mut self, window: Option<WindowSize>) -> Result<(), PodError> {
        let made = if self.spec.tty { Ends::pty(self.init) } else { Ends::pipes(self.spec.interactive) };
        let (ends, stdio) = made.map_err(self.failed("making the console"))?;
        self.keep_console(&ends)?;
        self.start_session(ends)?;
        if let (Some(session), Some(window)) = (&self.session, window) {
            session.resize(window);
        }
        let command = Command {
            argv: self.spec.command.clone(),
            environment: self.spec.environment.clone(),
            user: self.spec.user.clone(),
            workdir: self.spec.workdir.clone(),
            capabilities: self.spec.capabilities.clone(),
            seccomp: self.spec.seccomp.clone(),
        };
        let pid = self.control.spawn(&command, &stdio, self.spec.tty, true)?;
        fault::fallible("run-spawned").map_err(self.failed(fault::OBJECT))?;
        self.set_main(pid)
    }

    /// Has PID 1 keep copies of the far ends, so that the pod survives a monitor that dies.
    fn keep_console(&self, ends: &Ends) -> Result<(), PodError> {
        ends.kept().into_iter().try_for_each(|(slot, file)| self.control.keep(slot, &[file]))
    }

    pub(super) fn start_session(&mut self, ends: Ends) -> Result<(), PodError> {
        let log = Log::open(&self.store.log_file(&self.spec.name)).map_err(self.failed("opening the log"))?;
        let control = self.control.clone();
        let stdin_closed = Box::new(move || drop(control.drop_kept(0)));
        let plan = session::Plan { log: Some(log), stdin_closed: Some(stdin_closed) };
        let session = Session::start(ends, plan).map_err(self.failed("starting the console"))?;
        self.hush = Some(session.hush());
        self.session = Some(session);
        Ok(())
    }

    pub(super) fn set_main(&mut self, pid: PodPid) -> Result<(), PodError> {
        self.main = Some(pid);
        if let (Some(session), Some(host)) = (&self.session, self.host_pid(pid)) {
            // If it is gone already there is nobody to signal.
            if let Ok(process) = PidFd::open(host) {
                session.set_target(process);
            }
        }
        self.save()
    }

    /// Has PID 1 clone a child with this PID that runs [`crate::restart::builder`] with these files (numbered from 3
    /// on, in this order; nothing else but the null device as stdio is open in it).
    pub fn build(&self, pid: PodPid, files: Vec<OwnedFd>) -> Result<HostPid, PodError> {
        let pid = self.control.build(pid, &files)?;
        self.host_pid(pid).ok_or_else(|| PodError::Ended(self.spec.name.clone()))
    }

    /// The far ends of the console, for a checkpoint.
    pub fn console(&self) -> Result<Console, PodError> {
        match &self.session {
            Some(session) => session.ends().look().map_err(self.failed("looking at the console")),
            None => Ok(Console::None),
        }
    }

    /// Leaves the console alone until the guard is dropped, so that what is in the pipes is in the image, and not in the
    /// log as well.
    pub fn hush_console(&self) -> session::Hush {
        self.session.as_ref().map_or_else(session::Hush::of_nothing, Session::hush)
    }

    /// For a restart: makes a new console of pipes and returns the pod's ends: stdin, stdout, stderr.
    pub fn new_console_pipes(&mut self) -> Result<[OwnedFd; 3], PodError> {
        let (ends, stdio) = Ends::pipes(self.spec.interactive).map_err(self.failed("making the console"))?;
        self.keep_console(&ends)?;
        self.start_session(ends)?;
        Ok(stdio)
    }

    /// For a restart: the console is this pty.
    pub fn adopt_console_master(&mut self, master: OwnedFd) -> Result<(), PodError> {
        let ends = Ends::of_master(master).map_err(self.failed("adopting the console"))?;
        self.keep_console(&ends)?;
        self.start_session(ends)
    }

    /// For a restart: the end of this process is the end of the pod.
    pub fn watch_main(&mut self, pid: PodPid) -> Result<(), PodError> {
        self.control.watch(pid)?;
        self.set_main(pid)
    }

    /// Begins to carry the console's output to the log and to whoever is attached by now.
    pub fn open_console(&mut self) {
        self.hush = None;
    }

    /// Reads all that is in the console into the log.
    pub fn drain_console(&self) {
        if let Some(session) = &self.session {
            session.drain();
        }
    }

    /// Its console.
    pub fn session(&self) -> Option<&Session> {
        self.session.as_ref()
    }

    /// The line to its PID 1.
    pub(crate) fn control(&self) -> &Control {
        &self.control
    }

    /// The host's PID of a process of the pod.
    pub fn host_pid(&self, pid: PodPid) -> Option<HostPid> {
        control::host_pid(&self.cgroup.pids().ok()?, pid)
    }

    /// Where it is written down which mounts it was born with.
    pub fn mounts_file(&self) -> PathBuf {
        self.store.mounts_file(&self.spec.name)
    }

    /// The directory of its upper layers: one directory for each overlay, the root's is `root`.
    pub fn upper(&self) -> PathBuf {
        rootfs::upper_dir(&self.store, &self.spec.name)
    }

    /// A path as the pod sees it, as the host reaches it.
    pub fn path(&self, path: &str) -> PathBuf {
        self.init.proc("root").join(path.trim_start_matches('/'))
    }

    /// What the pod does.
    pub fn state(&self) -> PodState {
        self.state
    }

    /// Holds every process still until [`LivePod::resume`].
    pub fn suspend(&mut self) -> Result<(), PodError> {
        self.cgroup.freeze()?;
        self.state = PodState::Suspended;
        self.save()
    }

    /// Lets every process go on.
    pub fn resume(&mut self) -> Result<(), PodError> {
        self.cgroup.thaw()?;
        self.state = PodState::Running;
        self.save()
    }

    /// Gives the pod up to another host, durably: from now on it stands still whatever becomes of this monitor, until
    /// [`LivePod::take_back`]. Its processes are held already.
    pub fn give_up(&mut self) -> Result<(), PodError> {
        self.cgroup.freeze()?;
        (self.state, self.in_doubt) = (PodState::Suspended, true);
        self.save()
    }

    /// The pod is this host's again, for certain. Held processes stay held; the caller lets them go.
    pub fn take_back(&mut self, was_suspended: bool) -> Result<(), PodError> {
        (self.in_doubt, self.residual) = (false, None);
        if !was_suspended {
            self.state = PodState::Running;
            self.cgroup.thaw()?;
        }
        self.save()
    }

    /// It runs at another host, for which something of it is kept here.
    pub fn keep_for(&mut self, residual: Residual) -> Result<(), PodError> {
        self.residual = Some(residual);
        self.save()
    }

    /// Whether another host may be running it.
    pub fn is_in_doubt(&self) -> bool {
        self.in_doubt
    }

    /// Decides that the pod lives here: lets its packets through and its processes go on.
    pub fn keep(&mut self) -> Result<(), PodError> {
        if let Some(network) = &self.network {
            let pod = self.spec.name.clone();
            network.unblock().map_err(|source| PodError::Network { pod, source })?;
        }
        self.journal.done(&Undo::Unblock)?;
        self.take_back(false)?;
        self.follow_no_more()
    }

    /// This host follows the pod to where it is about to go, if anybody here is connected with it.
    pub fn follow(&mut self, moved: &Moved) -> Result<(), PodError> {
        self.journal.record(Undo::Following(moved.clone()))?;
        let failed = |source| PodError::Network { pod: self.spec.name.clone(), source };
        Here::of(&self.store).and_then(|here| here.follow(moved)).map_err(failed)
    }

    /// The pod has not gone where this host was to follow it.
    pub fn follow_no_more(&mut self) -> Result<(), PodError> {
        for undo in self.journal.pending() {
            if let Undo::Following(moved) = &undo {
                let failed = |source| PodError::Network { pod: self.spec.name.clone(), source };
                Here::of(&self.store).and_then(|here| here.follow(&moved.back())).map_err(failed)?;
                self.journal.done(&undo)?;
            }
        }
        Ok(())
    }

    /// Writes down in the registry how the pod is now.
    pub fn save(&self) -> Result<(), PodError> {
        self.store.save(&self.record(None))
    }

    fn record(&self, ended: Option<i32>) -> Record {
        let living = ended.is_none();
        Record {
            spec: self.spec.clone(),
            state: if living { self.state } else { PodState::Stopped },
            init: living.then(|| ProcessId::of(self.init)).flatten(),
            monitor: ProcessId::of(HostPid(std::process::id() as i32)),
            main: self.main,
            exit_code: ended,
            created: self.created.clone(),
            cgroup: self.cgroup.clone(),
            network: self.network.as_ref().and_then(|n| serde_json::to_value(n).ok()),
            limits: self.limits.clone(),
            in_doubt: living && self.in_doubt,
            residual: self.residual.clone().filter(|_| living),
            beginnings: self.beginnings.clone(),
        }
    }

    /// Kills every process, PID 1 too; the monitor then notices the end.
    pub fn end_all(&self) -> Result<(), PodError> {
        self.cgroup.kill()
    }

    /// Kills every process of a pod that is here no more, PID 1 too: none does anything more. Its packets are blocked, so nobody
    /// hears of it; its link is removed beside everything else that has to go, for the kernel takes longest over
    /// that, and begun before the kernel removes the pod's network namespace, which would keep it waiting.
    pub fn begin_end(&mut self) -> Result<(), PodError> {
        if let Some(network) = self.network.take() {
            self.departing = Some(std::thread::spawn(move || network.depart()));
        }
        self.cgroup.begin_kill()
    }

    /// Ends every process and takes everything away but the record and the log, which then say `stopped`.
    pub fn stop(&mut self, exit_code: i32) -> Result<(), PodError> {
        self.take_down()?;
        self.store.save(&self.record(Some(exit_code)))
    }

    fn take_down(&mut self) -> Result<(), PodError> {
        if self.cgroup.exists() {
            self.cgroup.kill()?;
        }
        // PID 1 is a child of ours unless an earlier monitor made it.
        let _ = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(self.init.0), None);
        self.drain_console();
        let pod = self.spec.name.clone();
        if let Some(network) = self.network.take() {
            network.detach().map_err(|source| PodError::Network { pod: pod.clone(), source })?;
        }
        self.limits.remove();
        let removed = self.cgroup.remove().and_then(|()| rootfs::remove_layers(&self.store.storage_dir(&pod)));
        if let Some(departing) = self.departing.take() {
            let panicked = || NetworkError::Kernel {
                step: "removing",
                object: "its link".into(),
                source: io::ErrorKind::Other.into(),
            };
            let gone = departing.join().unwrap_or_else(|_| Err(panicked()));
            gone.map_err(|source| PodError::Network { pod, source })?;
        }
        removed
    }

    /// Ends it and removes all of it from the host, its record included. Whoever is attached hears `end`.
    pub fn destroy(mut self, end: session::End) -> Result<(), PodError> {
        let gone = self.take_down().and_then(|()| self.store.forget(&self.spec.name));
        if let Some(session) = self.session.take() {
            session.end(end);
        }
        gone
    }

    /// Ends it and removes all of it, because it could not be finished: that is the error to tell.
    pub(crate) fn abandon(self) {
        if let Err(second) = self.destroy(session::End::Exited(1)) {
            tracing::error!("{second}");
        }
    }
}
