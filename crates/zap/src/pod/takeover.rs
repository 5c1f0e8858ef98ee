//! What a new monitor does with a pod whose monitor has died.

use std::os::fd::{AsFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::fetch::{Fetching, Filling, Whose};
use crate::ids::PodPid;
use crate::monitor::log::Log;
use crate::monitor::session::End;
use crate::pod::console::Ends;
use crate::pod::control::Control;
use crate::pod::host_config::HostConfig;
use crate::pod::init::{KEPT, MONITOR_END};
use crate::pod::journal::{Journal, Undo};
use crate::pod::live::LivePod;
use crate::pod::network::follow::Here;
use crate::pod::network::{self, Network};
use crate::pod::registry::{Claim, PodState, ProcessId, Record};
use crate::pod::sysctls::Sysctls;
use crate::pod::{NetworkMode, PodError, Store, rootfs};
use crate::process::handles::Handles;
use crate::sys::pidfd::PidFd;

/// A pod that was taken over: alive, or tidied because it had ended.
pub enum Found {
    /// It lives, and has not lost its first command (or has, with this wait status). How the rest of its memory comes.
    Alive(Box<LivePod>, Option<i32>, Option<Fetching>),
    /// It has ended; what was left of it is gone.
    Ended,
}

/// Becomes the monitor of a pod: undoes what the last one left half done, or tidies up after a pod that has ended.
pub fn take_over(store: Store, name: &str, claim: Claim) -> Result<Found, PodError> {
    let record = store.load(name)?;
    match record.init {
        _ if record.state == PodState::Stopped => Ok(Found::Ended),
        Some(init) if init.lives() && half_of_it_is_lost(&store, name) => {
            // Its PID 1 ends with it.
            record.cgroup.kill()?;
            await_end(init);
            tidy(&store, record)?;
            Ok(Found::Ended)
        }
        Some(init) if init.lives() => match adopt(store.clone(), record, claim) {
            // It has ended meanwhile.
            Err(_) if !init.lives() => {
                let Some(_claim) = store.claim(name)? else { return Ok(Found::Ended) };
                tidy(&store, store.load(name)?)?;
                Ok(Found::Ended)
            }
            adopted => adopted,
        },
        _ => {
            tidy(&store, record)?;
            Ok(Found::Ended)
        }
    }
}

fn await_end(init: ProcessId) {
    if let Some(process) = init.handle() {
        let _ = poll(&mut [PollFd::new(process.as_fd(), PollFlags::POLLIN)], PollTimeout::from(10_000u16));
    }
}

/// Goes on putting its memory in place, if that was not done.
fn go_on_filling(pod: &LivePod, pending: &[Undo]) -> std::io::Result<Option<Fetching>> {
    if !pending.contains(&Undo::Filling) {
        return Ok(None);
    }
    let init = PidFd::open(pod.init)?;
    let fetching = Filling::left_undone(&init)?.begin(Whose::of(pod))?;
    fetching.settle();
    Ok(Some(fetching))
}

/// Whether the rest of its memory was to come through the monitor that has died.
fn half_of_it_is_lost(store: &Store, name: &str) -> bool {
    Journal::at(store.pod_dir(name).join("journal")).pending().contains(&Undo::Fetching)
}

/// Removes what is left of a pod whose PID 1 has ended.
fn tidy(store: &Store, mut record: Record) -> Result<(), PodError> {
    let name = record.spec.name.clone();
    if record.cgroup.exists() {
        record.cgroup.kill()?;
    }
    let failed = |source| PodError::Network { pod: name.clone(), source };
    match read_network(&record)? {
        Some(connection) => {
            if Journal::at(store.pod_dir(&name).join("journal")).pending().contains(&Undo::Newcomers) {
                connection.admit_newcomers().map_err(failed)?;
            }
            connection.detach().map_err(failed)?;
        }
        // The link of a pod whose making was cut off went with its network namespace; its rules and the bridge did not.
        None if record.spec.network == NetworkMode::Bridge => {
            let config = HostConfig::load(store.state())
                .map_err(|e| PodError::Request { pod: name.clone(), what: e.to_string() })?;
            network::tidy(&config).map_err(failed)?;
        }
        None => {}
    }
    record.limits.remove();
    record.cgroup.remove()?;
    rootfs::remove_layers(&store.storage_dir(&name))?;
    // A pod without a first command is one whose making was cut off.
    if record.spec.remove || record.main.is_none() {
        return store.forget(&name);
    }
    record.state = PodState::Stopped;
    record.init = None;
    record.exit_code = record.exit_code.or(Some(128 + libc::SIGKILL));
    store.save(&record)
}

fn read_network(record: &Record) -> Result<Option<Network>, PodError> {
    let read = |value: &serde_json::Value| {
        serde_json::from_value(value.clone()).map_err(|e| PodError::Request {
            pod: record.spec.name.clone(),
            what: format!("its connection cannot be read back: {e}"),
        })
    };
    record.network.as_ref().map(read).transpose()
}

fn adopt(store: Store, record: Record, claim: Claim) -> Result<Found, PodError> {
    let name = record.spec.name.clone();
    let failed = |step: &str| {
        let (pod, step) = (name.clone(), step.to_owned());
        move |source| PodError::Kernel { pod, step, source }
    };
    let init = record.init.ok_or_else(|| PodError::Ended(name.clone()))?.pid;
    let process = PidFd::open(init).map_err(failed("opening PID 1"))?;
    let socket = process.get(MONITOR_END).map_err(failed("fetching the control socket"))?;
    let ends = fetch_console(&process, &record).map_err(failed("fetching the console"))?;
    // Frozen for a checkpoint that will not go on: PID 1 cannot answer before it is thawed.
    let mut journal = Journal::at(store.pod_dir(&name).join("journal"));
    let pending = journal.pending();
    if record.state != PodState::Suspended {
        record.cgroup.thaw()?;
        journal.done(&Undo::Thaw)?;
    }
    record.cgroup.thaw_inside();
    for undo in &pending {
        if let Undo::Image(path) = undo {
            crate::image::remove_partials(path);
            journal.done(undo)?;
        }
        if let Undo::Store(path) = undo {
            let _ = std::fs::remove_file(path);
            journal.done(undo)?;
        }
        if let Undo::Deferring(listener) = undo {
            listener.resume().map_err(failed("putting a listener right"))?;
            journal.done(undo)?;
        }
    }
    if pending.contains(&Undo::Sockets) {
        crate::sockets::recover_all(&record.cgroup.pids()?);
    }
    journal.done(&Undo::Sockets)?;
    let mut network = read_network(&record)?;
    if let Some(network) = &mut network {
        let failed = |source| PodError::Network { pod: name.clone(), source };
        network.resume(init).map_err(failed)?;
        if pending.contains(&Undo::Unblock) && !record.in_doubt {
            network.unblock().map_err(failed)?;
            network.forget_unanswered().map_err(failed)?;
        }
        if pending.contains(&Undo::Newcomers) {
            network.admit_newcomers().map_err(failed)?;
        }
    }
    if !record.in_doubt {
        journal.done(&Undo::Unblock)?;
        for undo in &pending {
            if let Undo::Following(moved) = undo {
                let failed = |source| PodError::Network { pod: name.clone(), source };
                Here::of(&store).and_then(|here| here.follow(&moved.back())).map_err(failed)?;
                journal.done(undo)?;
            }
        }
    }
    journal.done(&Undo::Newcomers)?;
    let listener = Some(store.listen(&name)?);
    let control = Control::listen(&name, socket, process)?;
    let mut pod = LivePod {
        spec: record.spec,
        store,
        init,
        cgroup: record.cgroup,
        main: record.main,
        network,
        departing: None,
        journal,
        limits: record.limits,
        control,
        session: None,
        hush: None,
        created: record.created,
        state: record.state,
        handles: Handles::default(),
        layouts: Default::default(),
        in_doubt: record.in_doubt,
        residual: record.residual,
        beginnings: record.beginnings,
        sysctls: Sysctls::default(),
        listener,
        _claim: claim,
    };
    // A pod without a first command is one whose making was cut off.
    let Some(main) = pod.main else {
        pod.destroy(End::Exited(128 + libc::SIGKILL))?;
        return Ok(Found::Ended);
    };
    end_torn_frame(&pod, &ends);
    pod.start_session(ends)?;
    pod.open_console();
    let status = known_status(&pod, main)?;
    pod.set_main(main)?;
    let fetching = match go_on_filling(&pod, &pending) {
        Ok(fetching) => fetching,
        Err(error) => {
            if let Some(console) = pod.session() {
                console.say(&format!("zap: pod {name} is lost: its memory cannot be filled: {error}\n"));
            }
            // Nobody may read zeros where its memory was.
            pod.cgroup.kill()?;
            match pod.spec.remove {
                true => pod.destroy(End::Exited(128 + libc::SIGKILL))?,
                false => pod.stop(128 + libc::SIGKILL)?,
            }
            return Ok(Found::Ended);
        }
    };
    Ok(Found::Alive(Box::new(pod), status, fetching))
}

/// How the first command ended, if it has. A suspended pod cannot answer, and nothing in it can have ended.
fn known_status(pod: &LivePod, main: PodPid) -> Result<Option<i32>, PodError> {
    if pod.state == PodState::Suspended {
        return Ok(None);
    }
    let status = pod.control.status()?;
    Ok(if status.pid == Some(main) { None } else { status.status })
}

/// The far ends of the console, of which PID 1 has copies. A stdin that was closed is the null device there.
fn fetch_console(process: &PidFd, record: &Record) -> std::io::Result<Ends> {
    let slot = |n: i32| process.get(KEPT + n);
    if record.spec.tty {
        return Ends::of_master(slot(0)?);
    }
    let is_pipe =
        |file: &OwnedFd| crate::sys::file::fstat(file).is_ok_and(|s| s.st_mode & libc::S_IFMT == libc::S_IFIFO);
    Ends::of_pipes(Some(slot(0)?).filter(is_pipe), slot(1)?, slot(2)?)
}

/// The monitor before may have been killed while it moved output into the log.
fn end_torn_frame(pod: &LivePod, ends: &Ends) {
    let path = pod.store.log_file(&pod.spec.name);
    let mended = Log::open(&path).and_then(|mut log| log.mend(|kind| ends.output(kind)));
    if let Err(error) = mended {
        // A log is no reason to give a pod up.
        tracing::warn!("{}: {error}", path.display());
    }
}
