//! Locks and leases. `flock` and OFD locks and leases belong to an open file description; POSIX locks to a process.

use std::collections::HashSet;
use std::os::fd::BorrowedFd;

use serde::{Deserialize, Serialize};

use super::{Descriptor, DescriptorState};
use crate::error::{CaptureError, Context, RebuildError};
use crate::ids::FileId;
use crate::look::{Look, Subject};
use crate::sys::{descriptor, lock};
use crate::tracee::Batch;

/// A lock or lease of an open file description.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LockState {
    /// `flock(2)`.
    Whole {
        /// Whether nobody else may have one.
        exclusive: bool,
    },
    /// `F_OFD_SETLK`.
    Range(RangeState),
    /// `F_SETLEASE`.
    Lease {
        /// Whether it breaks when somebody opens for reading, too.
        write: bool,
    },
}

/// The range of a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RangeState {
    /// Whether it is a write lock.
    pub write: bool,
    /// The first byte.
    pub start: u64,
    /// How many bytes; 0 to the end of the file, however far that moves.
    pub length: u64,
}

/// A POSIX lock of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PosixLock {
    /// A descriptor of the process that leads to the file and is open for it.
    pub number: i32,
    /// The range.
    pub range: RangeState,
}

/// A `lock:` line of `fdinfo`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Line<'t> {
    class: &'t str,
    mode: &'t str,
    inode: &'t str,
    range: RangeState,
}

/// The locks and leases of the description behind `descriptor`.
pub(super) fn capture(descriptor: &Descriptor) -> Result<Vec<LockState>, CaptureError> {
    let state = |line: Line<'_>| match (line.class, line.mode) {
        ("FLOCK", _) => Ok(Some(LockState::Whole { exclusive: line.range.write })),
        ("OFDLCK", _) => Ok(Some(LockState::Range(line.range))),
        ("LEASE", "ACTIVE") => Ok(Some(LockState::Lease { write: line.range.write })),
        // POSIX locks here are those of the process that reads, which has none.
        ("POSIX", _) => Ok(None),
        (class, mode) => Err(descriptor.refuse(format!("has a lock ({class} {mode}) that cannot be checkpointed yet"))),
    };
    let text = String::from_utf8_lossy(descriptor.info()?);
    lines(&text).map(state).filter_map(Result::transpose).collect()
}

/// Takes the locks of a description again. Every file of the pod is open.
pub(super) fn connect(file: BorrowedFd<'_>, locks: &[LockState]) -> std::io::Result<()> {
    for state in locks {
        match *state {
            LockState::Whole { exclusive } => lock::flock(file, exclusive)?,
            LockState::Range(range) => lock::lock_range(file, range.write, range.start, range.length)?,
            LockState::Lease { write } => lock::lease(file, if write { libc::F_WRLCK } else { libc::F_RDLCK })?,
        }
    }
    Ok(())
}

/// The files among those that were met on which somebody holds a lock of a range: most pods have none. (Not by
/// `/proc/locks`, whose first reader waits some 10 ms for the kernel.)
pub fn locked(look: &Look<'_>) -> HashSet<FileId> {
    look.files.all().filter(|(_, file)| lock::is_locked(file)).map(|(id, _)| id).collect()
}

/// The POSIX locks of a process; `locked` are the files that anybody has [`locked`].
pub fn posix_locks(
    look: &Look<'_>,
    subject: &Subject,
    descriptors: &[DescriptorState],
    locked: &HashSet<FileId>,
) -> Result<Vec<PosixLock>, CaptureError> {
    let mut seen = HashSet::new();
    let mut locks = Vec::new();
    for descriptor in descriptors.iter().filter(|d| locked.contains(&d.file)) {
        let path = subject.host.proc(&format!("fdinfo/{}", descriptor.number));
        let text = crate::procfs::read_record_text(&path).capturing("reading", path.display())?;
        for line in lines(&text).filter(|l| l.class == "POSIX") {
            if may_take(look, descriptor, line.range.write) && seen.insert((line.inode.to_owned(), line.range)) {
                locks.push(PosixLock { number: descriptor.number, range: line.range });
            }
        }
    }
    Ok(locks)
}

/// Whether a descriptor is open for what a lock of that sort asks.
fn may_take(look: &Look<'_>, of: &DescriptorState, write: bool) -> bool {
    let flags = look.files.file(of.file).and_then(|f| descriptor::flags(f).ok()).unwrap_or(0);
    match flags & libc::O_ACCMODE {
        libc::O_RDONLY => !write,
        libc::O_WRONLY => write,
        _ => true,
    }
}

/// Adds to `batch` the calls by which a process takes its POSIX locks. It has its descriptors, and will close no more:
/// closing any descriptor of a file gives up all locks on it.
pub fn take_posix_locks(batch: &mut Batch, locks: &[PosixLock]) {
    for posix in locks {
        let range = lock::range(posix.range.write, posix.range.start, posix.range.length);
        let range = batch.bytes(&lock::bytes(&range));
        let what = format!("locking a range of descriptor {}", posix.number);
        batch.call(libc::SYS_fcntl, [posix.number.into(), libc::F_SETLK.into(), range], what);
    }
}

fn lines(text: &str) -> impl Iterator<Item = Line<'_>> {
    text.lines().filter_map(|l| line(l.strip_prefix("lock:")?))
}

/// `1: FLOCK  ADVISORY  WRITE 2331 fe:00:131 0 EOF`
fn line(text: &str) -> Option<Line<'_>> {
    let fields: Vec<&str> = text.split_whitespace().collect();
    let [_, class, mode, access, _, inode, start, end] = fields[..] else { return None };
    let start = start.parse().ok()?;
    let length = match end {
        "EOF" => 0,
        last => last.parse::<u64>().ok()?.checked_sub(start)?.checked_add(1)?,
    };
    Some(Line { class, mode, inode, range: RangeState { write: access == "WRITE", start, length } })
}

/// The error of a lock that cannot be taken again.
pub(super) fn failed(id: crate::ids::FileId) -> impl FnOnce(std::io::Error) -> RebuildError {
    move |source| RebuildError::Kernel { step: "taking the locks", object: id.to_string(), source }
}

/// Reads a text as the fdinfo of a file with locks.
pub(super) fn try_info(text: &str) {
    lines(text).for_each(drop);
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use super::*;
    use crate::files::describe;
    use crate::files::testing::{round_trip, subject};
    use crate::look::Console;

    #[test]
    fn parses_lines() {
        let text = "flags:\t0100002\nlock:\t1: POSIX  ADVISORY  READ 77 00:1a:5 10 19\nlock:\t2: FLOCK  ADVISORY  WRITE 77 00:1a:5 0 EOF\n";
        let found: Vec<_> = lines(text).map(|l| (l.class, l.range)).collect();
        let range = |write, start, length| RangeState { write, start, length };
        assert_eq!(found, [("POSIX", range(false, 10, 10)), ("FLOCK", range(true, 0, 0))]);
    }

    #[test]
    fn locks_of_descriptions_come_back() {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let paths = [directory.path().join("a"), directory.path().join("b")];
        let open = |path: &std::path::Path| {
            let options =
                |o: &mut std::fs::OpenOptions| o.create(true).truncate(false).read(true).write(true).open(path);
            OwnedFd::from(options(&mut std::fs::File::options()).unwrap())
        };
        let files = [open(&paths[0]), open(&paths[1])];
        lock::flock(&files[0], false).unwrap();
        lock::lock_range(&files[0], true, 5, 10).unwrap();
        lock::lock_range(&files[0], false, 100, 0).unwrap();
        // Deleted, so that the new file is another and the old lock is not in the way.
        paths.iter().for_each(|p| std::fs::remove_file(p).unwrap());
        let (_, states, again) = round_trip(&[&files[0], &files[1]], Console::None);
        assert_eq!((states[0].locks.len(), states[1].locks.len()), (3, 0));
        let again = describe(&subject(), 0, again[0].try_clone().unwrap()).unwrap();
        assert_eq!(capture(&again).unwrap(), states[0].locks);
        assert!(lock::flock(again.as_fd(), true).is_ok());
    }
}
