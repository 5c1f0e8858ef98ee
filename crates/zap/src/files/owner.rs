//! Who is told by a signal that a file is ready: of any kind of file.

use std::os::fd::BorrowedFd;

use serde::{Deserialize, Serialize};

use super::Descriptor;
use crate::error::{CaptureError, Context, RebuildError};
use crate::ids::{HostPid, PodPid};
use crate::sys::{descriptor, lock};

/// The owner of a file (`F_SETOWN_EX`), its signal (`F_SETSIG`), and whether signals are on (`O_ASYNC`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnerState {
    /// 0 thread, 1 process, 2 process group.
    pub kind: i32,
    /// Its ID, if it lives.
    pub id: Option<PodPid>,
    /// The signal in place of SIGIO, or 0.
    pub signal: i32,
    /// Whether signals are on.
    pub asynchronous: bool,
}

/// The owner of `descriptor`, if anything about it is not as it is born; `depth` is how many PID namespaces lie around the
/// pod's.
pub(super) fn capture(descriptor: &Descriptor, depth: usize) -> Result<Option<OwnerState>, CaptureError> {
    if descriptor.flags() & libc::O_PATH != 0 {
        return Ok(None);
    }
    let object = || descriptor.object();
    let (kind, id) = lock::owner(descriptor).capturing("reading the owner", object())?;
    let signal = lock::signal(descriptor).capturing("reading the signal", object())?;
    let asynchronous = descriptor.flags() & libc::O_ASYNC != 0;
    if id == 0 && signal == 0 && !asynchronous {
        return Ok(None);
    }
    // An owner that is gone gets no signals, nor will it.
    let id = if id == 0 { None } else { in_pod(HostPid(id), kind, depth) };
    Ok(Some(OwnerState { kind, id, signal, asynchronous }))
}

/// The ID in the pod of a thread, process or process group.
fn in_pod(host: HostPid, kind: i32, depth: usize) -> Option<PodPid> {
    let pod_number = |numbers: Vec<i32>| numbers.get(depth).copied().map(PodPid);
    match numbers(host, if kind == 2 { "NSpgid:" } else { "NSpid:" }) {
        // Of a group whose leader has left, any member knows.
        None if kind == 2 => {
            let processes = std::fs::read_dir("/proc").ok()?.flatten();
            let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok().map(HostPid));
            let mut groups = pids.filter_map(|pid| numbers(pid, "NSpgid:"));
            pod_number(groups.find(|group| group.first() == Some(&host.0))?)
        }
        found => pod_number(found?),
    }
}

/// What a line of `/proc/PID/status` says, from our PID namespace inwards.
fn numbers(process: HostPid, label: &str) -> Option<Vec<i32>> {
    let status = crate::procfs::read_record_text(process.proc("status")).ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix(label))?;
    Some(line.split_whitespace().filter_map(|number| number.parse().ok()).collect())
}

/// The host's number of the process group that a process is in.
pub fn group_of(process: HostPid) -> Option<HostPid> {
    numbers(process, "NSpgid:")?.first().copied().map(HostPid)
}

/// Sets the owner again. In the monitor, when every process of the pod exists.
pub(super) fn settle(
    file: BorrowedFd<'_>,
    owner: &OwnerState,
    host_pid: &dyn Fn(PodPid) -> Option<HostPid>,
) -> Result<(), RebuildError> {
    if let Some(pid) = owner.id.and_then(host_pid) {
        lock::set_owner(file, owner.kind, pid.0).rebuilding("setting the owner", "an open file")?;
    }
    lock::set_signal(file, owner.signal).rebuilding("setting the signal", "an open file")?;
    if owner.asynchronous {
        let flags = descriptor::flags(file).rebuilding("reading the flags", "an open file")?;
        descriptor::set_flags(file, flags | libc::O_ASYNC).rebuilding("turning signals on", "an open file")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::files::testing::{round_trip, subject};
    use crate::files::{describe, reopen};
    use crate::look::Console;

    #[test]
    fn owner_and_signal_come_back() {
        let (from, _to) = nix::unistd::pipe().unwrap();
        let pid = std::process::id() as i32;
        lock::set_owner(&from, 1, pid).unwrap();
        // Not O_ASYNC as well: SIGIO would end the test.
        lock::set_signal(&from, libc::SIGURG).unwrap();
        reopen::set_flags(&from, libc::O_NONBLOCK).unwrap();
        let (_, states, again) = round_trip(&[&from], Console::None);
        let captured = states[0].owner.unwrap();
        assert_eq!((captured.kind, captured.signal, captured.asynchronous), (1, libc::SIGURG, false));
        settle(again[0].as_fd(), &captured, &|_| Some(HostPid(pid))).unwrap();
        let again = describe(&subject(), 0, again[0].try_clone().unwrap()).unwrap();
        assert_eq!(capture(&again, 0).unwrap(), Some(captured));
    }
}
