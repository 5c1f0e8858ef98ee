//! POSIX message queues: the files of the pod's `mqueue` file system.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use nix::sys::stat::{Mode, fchmod, futimens};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, fchown};
use serde::{Deserialize, Serialize};

use crate::error::{CaptureError, Context, RebuildError};
use crate::files::data_of;
use crate::ids::HostPid;
use crate::image::{DataRef, DataSink, ImageReader};
use crate::kernel;
use crate::look::Subject;
use crate::sys::file::fstat;
use crate::sys::mqueue::{self, Limits};

/// The file system's number.
const MAGIC: i64 = 0x1980_0202;

/// A queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PosixQueueState {
    /// Its name, without a slash; the last one it had if it has none.
    #[serde(with = "serde_bytes")]
    pub name: Vec<u8>,
    /// What it may hold.
    pub limits: Limits,
    /// Permissions.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last access: seconds, nanoseconds.
    pub accessed: (i64, i64),
    /// Last change.
    pub modified: (i64, i64),
    /// The messages, in the order in which they would be received: priority and bytes.
    pub messages: Vec<(u32, DataRef)>,
}

/// Whether a file is a queue.
pub fn is_queue(file: impl AsFd) -> bool {
    nix::sys::statfs::fstatfs(file).is_ok_and(|s| s.filesystem_type().0 == MAGIC)
}

/// Every queue that has a name, with the number of its inode.
pub fn capture_named(init: HostPid, data: &mut DataSink) -> Result<Vec<PosixQueueState>, CaptureError> {
    let subject = Subject { host: init, pod: crate::ids::PodPid(1), command: "init".into() };
    let path = init.proc("root/dev/mqueue");
    let top = File::open(&path).ok().filter(|top| is_queue(top));
    let entries = top.and_then(|_| fs::read_dir(&path).ok()).into_iter().flatten().flatten();
    let queue = |entry: fs::DirEntry| {
        let name = entry.file_name().into_vec();
        let file = File::options().read(true).write(true).open(entry.path());
        let file = OwnedFd::from(file.capturing("opening", shown(&name))?);
        capture(&subject, &name, &file, data)
    };
    entries.map(queue).collect()
}

fn shown(name: &[u8]) -> String {
    format!("the POSIX message queue /{}", String::from_utf8_lossy(name))
}

/// That somebody is told of the next message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Notice {
    /// `SIGEV_*`.
    pub mode: i32,
    /// The signal.
    pub signal: i32,
}

/// Whether somebody is told of the next message in a queue.
pub fn notice(name: &[u8], queue: impl AsFd) -> Result<Option<Notice>, CaptureError> {
    let mut text = [0; 256];
    // A queue reads as a line about itself, from the start of our own description of it.
    let length = nix::sys::uio::pread(queue, &mut text, 0).capturing("reading about", shown(name))?;
    let text = String::from_utf8_lossy(&text[..length]);
    let number = |label: &str| text.split_whitespace().find_map(|word| word.strip_prefix(label)?.parse().ok());
    let somebody = number("NOTIFY_PID:").is_some_and(|pid: i32| pid != 0);
    let notice = || Some(Notice { mode: number("NOTIFY:")?, signal: number("SIGNO:")? });
    Ok(somebody.then(notice).flatten())
}

/// Refuses a queue whose next message somebody is to be told of in a way that cannot be asked for again.
pub fn check(subject: &Subject, name: &[u8], queue: impl AsFd + Copy) -> Result<(), CaptureError> {
    let why = match notice(name, queue)? {
        // To look at its messages is to take them out and send them again, of which the process would be told.
        Some(_) if mqueue::facts(queue).capturing("looking at", shown(name))?.1 > 0 => {
            "has messages, and a process to notify of the next (mq_notify), which cannot be checkpointed yet"
        }
        Some(Notice { mode: libc::SIGEV_THREAD, .. }) => {
            "has a thread to be made in a process that is notified (mq_notify, SIGEV_THREAD), which cannot be \
             checkpointed yet"
        }
        Some(_) if kernel::reader().is_err() => {
            "has a process to notify (mq_notify), which the kernel does not show whole on this host"
        }
        _ => return Ok(()),
    };
    Err(subject.refuse(shown(name), why))
}

/// A queue through a description of our own, to read and write. Nobody uses it meanwhile.
pub fn capture(
    subject: &Subject,
    name: &[u8],
    queue: &OwnedFd,
    data: &mut DataSink,
) -> Result<PosixQueueState, CaptureError> {
    check(subject, name, queue)?;
    let stat = fstat(queue).capturing("looking at", shown(name))?;
    let (limits, count) = mqueue::facts(queue).capturing("looking at", shown(name))?;
    let messages = mqueue::peek(queue, count as usize, limits).capturing("reading", shown(name))?;
    let again = (stat.st_atime, stat.st_atime_nsec, stat.st_mtime, stat.st_mtime_nsec);
    set_times(queue, (again.0, again.1), (again.2, again.3)).capturing("setting the times of", shown(name))?;
    Ok(PosixQueueState {
        name: name.to_vec(),
        limits,
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        accessed: (stat.st_atime, stat.st_atime_nsec),
        modified: (stat.st_mtime, stat.st_mtime_nsec),
        messages: messages.into_iter().map(|(priority, bytes)| (priority, data.append(bytes))).collect(),
    })
}

fn set_times(queue: &OwnedFd, accessed: (i64, i64), modified: (i64, i64)) -> io::Result<()> {
    Ok(futimens(queue, &TimeSpec::new(accessed.0, accessed.1), &TimeSpec::new(modified.0, modified.1))?)
}

/// Makes a queue again; its name stays. Runs in the builder, in the pod's IPC namespace.
pub fn restart(image: &ImageReader, state: &PosixQueueState) -> Result<OwnedFd, RebuildError> {
    let make = || -> io::Result<OwnedFd> {
        let queue = mqueue::make(&state.name, state.limits)?;
        for (priority, place) in &state.messages {
            mqueue::send(&queue, *priority, &data_of(image, *place)?)?;
        }
        fchown(&queue, Some(Uid::from_raw(state.uid)), Some(Gid::from_raw(state.gid)))?;
        fchmod(&queue, Mode::from_bits_truncate(state.mode))?;
        set_times(&queue, state.accessed, state.modified)?;
        Ok(queue)
    };
    // A user's queues share one limit in all pods (mq_overview(7)): an error about files would tell nobody.
    let full = |error: io::Error| match error.raw_os_error() {
        Some(libc::EMFILE) => RebuildError::Lacks(format!(
            "room for {}: its user has as much as RLIMIT_MSGQUEUE allows",
            shown(&state.name)
        )),
        _ => RebuildError::Kernel { step: "making", object: shown(&state.name), source: error },
    };
    make().map_err(full)
}

/// The name of a queue from the link of a descriptor: `/name`, or a path below where its file system is mounted.
pub fn name_of(link: &[u8]) -> &[u8] {
    let link = link.strip_suffix(b" (deleted)").unwrap_or(link);
    Path::new(std::ffi::OsStr::from_bytes(link)).file_name().map_or(link, OsStrExt::as_bytes)
}
