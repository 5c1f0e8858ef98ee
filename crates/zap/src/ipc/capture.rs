//! Kernel → state.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use nix::sched::{CloneFlags, setns};

use super::{IpcState, QueueState, SegmentState, SemaphoresState, posix};
use crate::error::{CaptureError, Context};
use crate::files::Contents;
use crate::ids::HostPid;
use crate::image::DataSink;
use crate::look::Look;
use crate::sys::ipc::{self, Attached};

/// The IPC objects of the pod whose PID 1 is `init`. The pod is held.
///
/// A thread enters the IPC namespace, and does the rest if the lists of objects there are not empty.
pub fn capture(look: &mut Look<'_>, init: HostPid) -> Result<IpcState, CaptureError> {
    let namespace = File::open(init.proc("ns/ipc")).capturing("opening the IPC namespace", "the pod")?;
    let mut state = capture_in(&namespace, look.data).capturing("reading the System V objects", "the pod")?;
    state.posix = posix::capture_named(init, look.data)?;
    Ok(state)
}

/// The System V objects of a namespace.
pub(crate) fn capture_in(namespace: impl AsFd + Sync, data: &mut DataSink) -> io::Result<IpcState> {
    crate::sys::clone::in_thread(|| {
        setns(namespace.as_fd(), CloneFlags::CLONE_NEWIPC)?;
        capture_here(data)
    })
}

fn capture_here(data: &mut DataSink) -> io::Result<IpcState> {
    let mut state = IpcState::default();
    for id in ids("shm")? {
        state.segments.push(segment(id, data)?);
    }
    for id in ids("sem")? {
        let (values, permissions) = ipc::semaphore_values(id)?;
        state.semaphores.push(SemaphoresState { id, permissions, values });
    }
    for id in ids("msg")? {
        state.queues.push(queue(id, data)?);
    }
    Ok(state)
}

/// The ids of all objects of a kind; the file is that of the namespace of whoever opens it.
fn ids(kind: &str) -> io::Result<Vec<i32>> {
    let table = std::fs::read_to_string(format!("/proc/sysvipc/{kind}"))?;
    parse_ids(&table).ok_or_else(|| io::Error::other(format!("/proc/sysvipc/{kind} is not understood")))
}

/// The second column, below the headings.
fn parse_ids(table: &str) -> Option<Vec<i32>> {
    table.lines().skip(1).map(|line| line.split_whitespace().nth(1)?.parse().ok()).collect()
}

fn segment(id: i32, data: &mut DataSink) -> io::Result<SegmentState> {
    let (size, permissions) = ipc::segment_facts(id)?;
    let attached = Attached::new(id, size, false)?;
    let contents = Contents::take(&file_of(&attached, false)?, size, data)?;
    Ok(SegmentState { id, permissions, contents })
}

/// The file behind an attached segment: it has holes where nothing was ever written.
pub(super) fn file_of(attached: &Attached, writable: bool) -> io::Result<File> {
    let range = attached.range();
    let path = format!("/proc/self/map_files/{:x}-{:x}", range.start, range.end);
    match std::fs::OpenOptions::new().read(true).write(writable).open(path) {
        // It ends elsewhere than at the next small page.
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            Err(io::Error::new(io::ErrorKind::Unsupported, "a segment in huge pages cannot be checkpointed yet"))
        }
        other => other,
    }
}

fn queue(id: i32, data: &mut DataSink) -> io::Result<QueueState> {
    let (room, count, bytes, permissions) = ipc::queue_facts(id)?;
    let message = |index| ipc::peek_message(id, index, bytes).map(|(kind, bytes)| (kind, data.append(bytes)));
    let messages = (0..count).map(message).collect::<io::Result<_>>()?;
    Ok(QueueState { id, permissions, room, messages })
}

/// Reads a text as a table of System V objects.
pub(super) fn try_table(text: &str) {
    drop(parse_ids(text));
}

#[cfg(test)]
mod tests {
    use super::parse_ids;

    #[test]
    fn ids_are_in_the_second_column() {
        let table =
            "       key      semid perms      nsems\n         0      32768   600          1\n        77  5  600  2\n";
        assert_eq!(parse_ids(table), Some(vec![32768, 5]));
        assert_eq!(parse_ids("key shmid\n"), Some(vec![]));
        assert_eq!(parse_ids("key shmid\n1 x\n"), None);
    }
}
