//! The monitor's side of what it says to PID 1.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::ids::{HostPid, PodPid};
use crate::pod::PodError;
pub(crate) use crate::pod::init::HOARD;
use crate::pod::init::{Command, MESSAGE_LENGTH, Order, Report, SpawnFailure};
use crate::sys::channel;
use crate::sys::pidfd::PidFd;

/// The line to PID 1 of a pod. Copies are the same line.
#[derive(Clone)]
pub(crate) struct Control(Arc<Shared>);

struct Shared {
    pod: String,
    socket: OwnedFd,
    heard: Mutex<Heard>,
    news: Condvar,
}

#[derive(Default)]
struct Heard {
    next: u32,
    answers: HashMap<u32, Report>,
    /// Wait statuses of children whose end nobody has asked for yet.
    exits: HashMap<PodPid, i32>,
    gone: bool,
}

/// The main command, as PID 1 knows it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MainStatus {
    pub(crate) pid: Option<PodPid>,
    pub(crate) status: Option<i32>,
}

impl Control {
    /// Waits for the first report of a PID 1 that has just been started. Nothing listens yet.
    pub(crate) fn await_ready(pod: &str, socket: &OwnedFd, init: &PidFd) -> Result<(), PodError> {
        let kernel = |step: String, source| PodError::Kernel { pod: pod.to_owned(), step, source };
        match next_report(socket, init) {
            Ok(Some(Report::Ready)) => Ok(()),
            Ok(Some(Report::Failed { step, errno })) => Err(kernel(step, io::Error::from_raw_os_error(errno))),
            Ok(_) => Err(PodError::Ended(pod.to_owned())),
            Err(e) => Err(kernel("hearing from PID 1".to_owned(), e)),
        }
    }

    /// Begins to listen to what PID 1 reports, in a thread of its own.
    pub(crate) fn listen(pod: &str, socket: OwnedFd, init: PidFd) -> Result<Control, PodError> {
        let shared = Shared { pod: pod.to_owned(), socket, heard: Mutex::default(), news: Condvar::new() };
        let control = Control(Arc::new(shared));
        let listener = control.clone();
        std::thread::Builder::new()
            .name("listener".to_owned())
            .spawn(move || listener.hear_all(&init))
            .map_err(|e| control.failed("starting a thread", e))?;
        Ok(control)
    }

    fn hear_all(&self, init: &PidFd) {
        // An error of the socket, too, means that nothing more will be heard.
        while let Ok(Some(report)) = next_report(&self.0.socket, init) {
            let mut heard = self.heard();
            match report {
                Report::Exit { pid, status } => drop(heard.exits.insert(PodPid(pid), status)),
                Report::Started { id, .. } | Report::Status { id, .. } => drop(heard.answers.insert(id, report)),
                Report::Ready | Report::Failed { .. } => {}
            }
            self.0.news.notify_all();
        }
        self.heard().gone = true;
        self.0.news.notify_all();
    }

    fn heard(&self) -> MutexGuard<'_, Heard> {
        self.0.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self, step: &str, source: io::Error) -> PodError {
        PodError::Kernel { pod: self.0.pod.clone(), step: step.to_owned(), source }
    }

    fn tell(&self, order: &Order, files: &[BorrowedFd<'_>]) -> Result<(), PodError> {
        let bytes = crate::image::encode(order);
        channel::send(&self.0.socket, &bytes, files, true).map_err(|e| self.failed("telling PID 1", e))
    }

    fn ask(&self, order: impl FnOnce(u32) -> Order, files: &[BorrowedFd<'_>]) -> Result<Report, PodError> {
        let id = {
            let mut heard = self.heard();
            heard.next += 1;
            // A monitor that died may have asked under low numbers; its answers must not be taken for ours.
            std::process::id().wrapping_shl(12).wrapping_add(heard.next)
        };
        self.tell(&order(id), files)?;
        let mut heard = self.heard();
        loop {
            if let Some(answer) = heard.answers.remove(&id) {
                return Ok(answer);
            }
            if heard.gone {
                return Err(PodError::Ended(self.0.pod.clone()));
            }
            heard = self.0.news.wait(heard).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn ask_start(
        &self,
        order: impl FnOnce(u32) -> Order,
        files: &[BorrowedFd<'_>],
        step: &str,
    ) -> Result<PodPid, PodError> {
        match self.ask(order, files)? {
            Report::Started { result: Ok(pid), .. } => Ok(PodPid(pid)),
            Report::Started { result: Err(errno), .. } => Err(self.failed(step, io::Error::from_raw_os_error(errno))),
            _ => Err(self.failed(step, io::ErrorKind::InvalidData.into())),
        }
    }

    /// Starts a command, and returns when its program runs, or cannot.
    pub(crate) fn spawn(
        &self,
        command: &Command,
        stdio: &[OwnedFd],
        terminal: bool,
        main: bool,
    ) -> Result<PodPid, PodError> {
        let at = |step| move |e: io::Error| self.failed(step, e);
        let memory = memfd_create(c"command", MFdFlags::MFD_CLOEXEC);
        let mut request: File = memory.map_err(|e| self.failed("making a memory file", e.into()))?.into();
        request.write_all(&crate::image::encode(command)).map_err(at("writing the command"))?;
        let (mut failure, reporter) = io::pipe().map_err(at("making a pipe"))?;
        let mut files = vec![request.as_fd(), reporter.as_fd()];
        files.extend(stdio.iter().map(AsFd::as_fd));
        let pid = self.ask_start(|id| Order::Spawn { id, terminal, main }, &files, "starting the command")?;
        drop(reporter);
        let mut bytes = Vec::new();
        failure.read_to_end(&mut bytes).map_err(at("waiting for the command"))?;
        if bytes.is_empty() {
            return Ok(pid);
        }
        // It ends now, and nobody will ask how.
        let _ = self.wait_exit(pid);
        let pod = self.0.pod.clone();
        Err(match crate::image::decode(&bytes) {
            Ok(SpawnFailure::Exec(errno)) => PodError::Exec {
                pod,
                command: command.argv.first().cloned().unwrap_or_default(),
                source: io::Error::from_raw_os_error(errno),
            },
            Ok(SpawnFailure::Before(what)) => PodError::Request { pod, what },
            Err(what) => PodError::Request { pod, what },
        })
    }

    /// Clones the builder of a restart.
    pub(crate) fn build(&self, pid: PodPid, files: &[OwnedFd]) -> Result<PodPid, PodError> {
        let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        self.ask_start(|id| Order::Build { id, pid: pid.0 }, &files, "cloning the builder")
    }

    /// Has PID 1 keep copies of these files from that slot on.
    pub(crate) fn keep(&self, slot: i32, files: &[BorrowedFd<'_>]) -> Result<(), PodError> {
        self.tell(&Order::Keep { slot }, files)
    }

    /// Has PID 1 close what it keeps in that slot.
    pub(crate) fn drop_kept(&self, slot: i32) -> Result<(), PodError> {
        self.tell(&Order::Drop { slot }, &[])
    }

    /// Has PID 1 keep copies of these files too, until [`Control::drop_hoard`].
    pub(crate) fn hoard(&self, files: &[BorrowedFd<'_>]) -> Result<(), PodError> {
        self.tell(&Order::Hoard, files)
    }

    /// Has PID 1 close all that it was given to hoard.
    pub(crate) fn drop_hoard(&self) -> Result<(), PodError> {
        self.tell(&Order::DropHoard, &[])
    }

    /// The end of this process is the pod's.
    pub(crate) fn watch(&self, pid: PodPid) -> Result<(), PodError> {
        self.tell(&Order::Watch { pid: pid.0 }, &[])
    }

    /// What became of the main command.
    pub(crate) fn status(&self) -> Result<MainStatus, PodError> {
        match self.ask(|id| Order::Status { id }, &[])? {
            Report::Status { main, status, .. } => Ok(MainStatus { pid: main.map(PodPid), status }),
            _ => Err(self.failed("asking PID 1", io::ErrorKind::InvalidData.into())),
        }
    }

    /// Waits for the end of a command that was started or is watched: its wait status; `None` if PID 1 ended first.
    pub(crate) fn wait_exit(&self, pid: PodPid) -> Option<i32> {
        let mut heard = self.heard();
        loop {
            if let Some(status) = heard.exits.remove(&pid) {
                return Some(status);
            }
            if heard.gone {
                return None;
            }
            heard = self.0.news.wait(heard).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// The next report, or `None` when PID 1 has ended. It keeps a copy of our end, so the socket itself never ends.
fn next_report(socket: &OwnedFd, init: &PidFd) -> io::Result<Option<Report>> {
    loop {
        let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN), PollFd::new(init.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::NONE) {
            Err(nix::Error::EINTR) => continue,
            other => other?,
        };
        if !fds[0].any().unwrap_or(false) {
            return Ok(None);
        }
        let mut buffer = [0; MESSAGE_LENGTH];
        let (length, _) = channel::receive(socket, &mut buffer)?;
        if length == 0 {
            return Ok(None);
        }
        match crate::image::decode(&buffer[..length]) {
            Ok(report) => return Ok(Some(report)),
            Err(_) => continue,
        }
    }
}

/// The exit code that a wait status stands for: the command's own, or 128 and the signal.
pub fn exit_code(status: i32) -> i32 {
    if libc::WIFSIGNALED(status) { 128 + libc::WTERMSIG(status) } else { libc::WEXITSTATUS(status) }
}

/// The host's PID of a process among `processes` that has the PID `pod` in its own namespace.
pub(crate) fn host_pid(processes: &[HostPid], pod: PodPid) -> Option<HostPid> {
    processes.iter().copied().find(|p| pod_pid(*p) == Some(pod))
}

/// The PID in its own namespace of a process of the host.
pub fn pod_pid(host: HostPid) -> Option<PodPid> {
    let status = std::fs::read_to_string(host.proc("status")).ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("NSpid:"))?;
    // The pod's own namespace is the second: a sandbox inside the pod adds more behind it.
    let numbers: Vec<i32> = line.split_ascii_whitespace().filter_map(|n| n.parse().ok()).collect();
    numbers.get(1).copied().map(PodPid)
}
