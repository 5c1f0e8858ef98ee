//! Files that can be opened only when every process exists: each holder opens its own. (Holders that shared one
//! description no longer share it: of these files that is only the offset.) And what an epoll watches of them; likewise of
//! signalfds, which tell an epoll of the signals of whoever added them there (`signalfd_poll` of the kernel).

use std::collections::{HashMap, HashSet};
use std::os::fd::OwnedFd;

use super::directory::DirectoryState;
use super::directory_notice::ChangesState;
use super::epoll::{EpollState, WatchState};
use super::locks::LockState;
use super::mqueue::MqueueState;
use super::mqueue_notice::NoticeState;
use super::{DescriptorState, FileState, decoded, kind, reopen};
use crate::error::{Context, RebuildError};
use crate::ids::{FileId, HostPid, PodPid};
use crate::ipc::posix;
use crate::rebuild::Rebuild;
use crate::sys::pidfd::PidFd;
use crate::tracee::{Arg, Batch, Call};

/// How a holder opens a file once every process exists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Late {
    /// By path.
    Path {
        /// The path in the pod.
        path: Vec<u8>,
        /// Access mode and status flags.
        flags: i32,
        /// The offset.
        position: u64,
        /// Whether the path leads there in the holder's own mount namespace alone.
        nested: bool,
    },
    /// By `pidfd_open(2)`.
    Process {
        /// The process, or thread.
        pid: PodPid,
        /// Its flags.
        flags: i32,
    },
}

/// The name of a message queue, and its inode if it has none any more.
type QueueName = (Vec<u8>, Option<u64>);

/// The late files of an image, and the epolls that watch them.
#[derive(Debug, Default)]
pub struct LateFiles {
    files: HashMap<FileId, Late>,
    /// Directories of processes that have ended, by path: only who was there while the process lived is there.
    nowhere: HashMap<FileId, Vec<u8>>,
    /// What epolls watch, by the file that is watched, until a holder of both adds it.
    watches: HashMap<FileId, Vec<(FileId, WatchState)>>,
    /// Message queues of which somebody is told, and what tells one from the other.
    notices: HashMap<FileId, (NoticeState, QueueName)>,
    /// Directories of whose changes a process is told.
    changes: HashMap<FileId, (PodPid, ChangesState)>,
    /// Files of which somebody is told by a signal, with the leases on them.
    telling: HashMap<FileId, Telling>,
}

/// How somebody is told of a file by a signal, which says by what number the file was known to whoever asked for it.
#[derive(Clone, Copy, Debug, Default)]
struct Telling {
    /// Whether it is told that the file is ready (`O_ASYNC`).
    asynchronous: bool,
    /// The lease (`F_RDLCK`, `F_WRLCK`).
    lease: Option<i32>,
}

impl Telling {
    fn of(state: &FileState) -> Option<Telling> {
        let asynchronous = state.owner.is_some_and(|owner| owner.asynchronous && owner.id.is_some());
        let lease = state.locks.iter().find_map(|lock| match lock {
            LockState::Lease { write } => Some(if *write { libc::F_WRLCK } else { libc::F_RDLCK }),
            _ => None,
        });
        (asynchronous || lease.is_some()).then_some(Telling { asynchronous, lease })
    }

    /// The calls by which it is asked for through a descriptor. What is there is taken again, which changes the number alone.
    fn ask(self, descriptor: &DescriptorState, batch: &mut Batch) {
        let number = Arg::from(descriptor.number);
        if self.asynchronous {
            for on in [0i32, 1] {
                let on = batch.bytes(&on.to_ne_bytes());
                batch.attempt(libc::SYS_ioctl, [number, libc::FIOASYNC.into(), on]);
            }
        }
        if let Some(lease) = self.lease {
            // Who has no right to it any more goes without the number.
            batch.attempt(libc::SYS_fcntl, [number, libc::F_SETLEASE.into(), lease.into()]);
        }
    }
}

impl LateFiles {
    /// Finds them among the files of an image.
    pub fn of(states: &[FileState]) -> Result<LateFiles, RebuildError> {
        let mut found = LateFiles::default();
        for state in states {
            let late = kind(&state.kind).map(|k| k.late(&state.state)).transpose()?.flatten();
            found.files.extend(late.map(|l| (state.id, l)));
            found.nowhere.extend(super::proc::nowhere(state)?.map(|path| (state.id, path)));
        }
        for state in states.iter().filter(|s| s.kind == "mqueue") {
            let queue: MqueueState = decoded(&state.state)?;
            let name = (posix::name_of(&queue.link).to_vec(), queue.nameless);
            found.notices.extend(queue.notice.map(|notice| (state.id, (notice, name))));
        }
        for state in states.iter().filter(|s| s.kind == "directory") {
            let Some(owner) = state.owner.and_then(|owner| owner.id) else { continue };
            let directory: DirectoryState = decoded(&state.state)?;
            found.changes.extend(directory.changes.map(|changes| (state.id, (owner, changes))));
        }
        let signals: HashSet<FileId> = states.iter().filter(|s| s.kind == "signalfd").map(|s| s.id).collect();
        found.telling = states.iter().filter_map(|state| Some((state.id, Telling::of(state)?))).collect();
        if found.files.is_empty() && signals.is_empty() {
            return Ok(found);
        }
        for state in states.iter().filter(|s| s.kind == "epoll") {
            let epoll: EpollState = decoded(&state.state)?;
            let is_late = |w: &WatchState| found.files.contains_key(&w.file) || signals.contains(&w.file);
            for watch in epoll.watches.into_iter().filter(is_late) {
                found.watches.entry(watch.file).or_default().push((state.id, watch));
            }
        }
        Ok(found)
    }

    /// Opens a late file in the builder, when every process exists: one that is on its way in a socket, and that nobody needs
    /// to hold.
    fn open_here(&self, id: FileId) -> Option<Result<OwnedFd, RebuildError>> {
        let opened = match self.files.get(&id)? {
            // The builder is in the pod's PID namespace.
            Late::Process { pid, flags } => PidFd::open_as(HostPid(pid.0), *flags),
            Late::Path { path, flags, position, .. } => reopen::path_at(reopen::as_path(path), *flags, *position),
        };
        Some(opened.rebuilding("opening", id))
    }

    /// Opens those that are on their way in these files.
    pub(super) fn open_carried(&self, rebuild: &mut Rebuild<'_>, by: &[&FileState]) -> Result<(), RebuildError> {
        for carrier in by {
            for id in carried(carrier)? {
                if rebuild.file(id).is_err()
                    && let Some(opened) = self.open_here(id)
                {
                    rebuild.keep_file(id, opened?)?;
                }
            }
        }
        Ok(())
    }

    /// Which files carry late ones, and cannot be connected before those are open.
    pub(super) fn carriers<'s>(&self, states: &'s [FileState]) -> Result<Vec<&'s FileState>, RebuildError> {
        let mut found = Vec::new();
        for state in states.iter().filter(|_| !self.files.is_empty()) {
            if carried(state)?.iter().any(|id| self.contains(*id)) {
                found.push(state);
            }
        }
        Ok(found)
    }

    /// Whether a file is opened late.
    pub fn contains(&self, id: FileId) -> bool {
        self.files.contains_key(&id)
    }

    /// The path of a directory of a process that has ended.
    pub fn nowhere(&self, id: FileId) -> Option<&[u8]> {
        self.nowhere.get(&id).map(Vec::as_slice)
    }

    /// The call by which a process goes to a working directory that is late.
    pub fn change_to(&self, directory: FileId) -> Option<Batch> {
        let Some(Late::Path { path, .. }) = self.files.get(&directory) else { return None };
        let mut batch = Batch::new();
        let name = batch.bytes(&[path, &b"\0"[..]].concat());
        batch.call(libc::SYS_chdir, [name], format!("changing directory to {}", String::from_utf8_lossy(path)));
        Some(batch)
    }

    /// A late file that can be opened once every process exists, though not every thread: path and flags.
    fn path_of_process(&self, id: FileId) -> Option<(&[u8], i32)> {
        match self.files.get(&id)? {
            Late::Path { path, flags, nested: false, .. } if !path.windows(6).any(|part| part == b"/task/") => {
                Some((path, *flags))
            }
            _ => None,
        }
    }

    /// Opens such a file under that number; says whether it is one.
    pub fn open_early(&self, id: FileId, number: i32, batch: &mut Batch) -> bool {
        let Some((path, flags)) = self.path_of_process(id) else { return false };
        let opened = Arg::ResultOf(open_path(batch, path, flags));
        let what = format!("giving descriptor {number} ({id})");
        batch.call(libc::SYS_dup3, [opened, number.into(), libc::O_CLOEXEC.into()], what);
        batch.call(libc::SYS_close, [opened], "closing the descriptor that was moved");
        true
    }

    /// The calls by which a process, which is who it was by now, sets the offsets of its late files. The kernel makes a text of
    /// `/proc` when its offset is set: at the opening it would tell of zap.
    pub fn seek_in(&self, descriptors: &[DescriptorState]) -> Option<Batch> {
        let mut batch = Batch::new();
        for descriptor in descriptors {
            let Some(Late::Path { position: position @ 1.., .. }) = self.files.get(&descriptor.file) else { continue };
            batch.attempt(libc::SYS_lseek, [descriptor.number.into(), (*position).into(), libc::SEEK_SET.into()]);
        }
        (!batch.is_empty()).then_some(batch)
    }

    /// The calls by which a process asks to be told of messages and changes again.
    pub fn ask_in(&self, process: PodPid, descriptors: &[DescriptorState]) -> Option<Batch> {
        if self.notices.is_empty() && self.changes.is_empty() && self.telling.is_empty() {
            return None;
        }
        let mut asked = HashSet::new();
        let mut told = HashSet::new();
        let mut batch = Batch::new();
        for descriptor in descriptors {
            if let Some(telling) = self.telling.get(&descriptor.file).filter(|_| told.insert(descriptor.file)) {
                telling.ask(descriptor, &mut batch);
            }
            if let Some((owner, changes)) = self.changes.get(&descriptor.file)
                && *owner == process
            {
                changes.ask(descriptor, &mut batch);
            }
            let Some((notice, queue)) = self.notices.get(&descriptor.file) else { continue };
            if notice.process == process && asked.insert(queue) {
                notice.ask(descriptor, &mut batch);
            }
        }
        Some(batch)
    }

    /// The processes on which a holder of these descriptors opens a handle.
    pub fn processes(&self, descriptors: &[DescriptorState]) -> Vec<PodPid> {
        let late = descriptors.iter().filter_map(|descriptor| self.files.get(&descriptor.file));
        let of = |late: &Late| if let Late::Process { pid, .. } = late { Some(*pid) } else { None };
        late.filter_map(of).collect()
    }

    /// The calls by which a process, which has its other descriptors, opens those of its own that are late. To be asked
    /// once for each descriptor table, and run when every process and thread exists; `seen` says what the process calls
    /// others, and `early` that it has opened some already.
    pub fn open_in(
        &mut self,
        descriptors: &[DescriptorState],
        seen: &dyn Fn(PodPid) -> i32,
        early: bool,
    ) -> Option<Batch> {
        let mut batch = Batch::new();
        for descriptor in descriptors {
            let opened = early && self.path_of_process(descriptor.file).is_some();
            if let (Some(late), false) = (self.files.get(&descriptor.file), opened) {
                open(&mut batch, descriptor, late, seen);
            }
        }
        for descriptor in descriptors {
            let Some(watches) = self.watches.get_mut(&descriptor.file) else { continue };
            let here = |id| descriptors.iter().find(|d| d.file == id).map(|d| d.number);
            let is_own = |watch: &WatchState| watch.number == descriptor.number;
            watches.retain(|(epoll, watch)| match here(*epoll).filter(|_| is_own(watch)) {
                Some(epoll) => {
                    add(&mut batch, epoll, watch);
                    false
                }
                None => true,
            });
        }
        (!batch.is_empty()).then_some(batch)
    }
}

/// Whether a file is opened late, in the mount namespace of whoever holds it.
pub fn is_late_elsewhere(file: &FileState) -> bool {
    let late = kind(&file.kind).and_then(|kind| kind.late(&file.state).ok().flatten());
    matches!(late, Some(Late::Path { nested: true, .. }))
}

/// The files that are on their way in one.
fn carried(state: &FileState) -> Result<Vec<FileId>, RebuildError> {
    kind(&state.kind).map_or_else(|| Ok(Vec::new()), |kind| kind.carries(&state.state))
}

fn open(batch: &mut Batch, descriptor: &DescriptorState, late: &Late, seen: &dyn Fn(PodPid) -> i32) {
    let opened = match late {
        Late::Path { path, flags, .. } => open_path(batch, path, *flags),
        Late::Process { pid, flags } => {
            let what = format!("opening a handle on process {pid}");
            batch.call(libc::SYS_pidfd_open, [seen(*pid).into(), (*flags).into()], what)
        }
    };
    // Out of the way first: the number that the kernel chose may be the very one, or not.
    let above = Arg::from(descriptor.number + 1);
    let duplicate = [Arg::ResultOf(opened), libc::F_DUPFD_CLOEXEC.into(), above];
    let lifted = batch.call(libc::SYS_fcntl, duplicate, "moving a descriptor out of the way");
    batch.call(libc::SYS_close, [Arg::ResultOf(opened)], "closing the descriptor that was moved");
    let flags = if descriptor.close_on_exec { libc::O_CLOEXEC } else { 0 };
    let what = format!("giving descriptor {} ({})", descriptor.number, descriptor.file);
    batch.call(libc::SYS_dup3, [Arg::ResultOf(lifted), descriptor.number.into(), flags.into()], what);
    batch.call(libc::SYS_close, [Arg::ResultOf(lifted)], "closing the descriptor that was moved");
}

/// Opens it at its beginning; [`LateFiles::seek_in`] comes later.
fn open_path(batch: &mut Batch, path: &[u8], flags: i32) -> Call {
    let name = batch.bytes(&[path, &b"\0"[..]].concat());
    let what = format!("opening {}", String::from_utf8_lossy(path));
    let flags = flags & !libc::O_ASYNC | libc::O_CLOEXEC;
    batch.call(libc::SYS_openat, [libc::AT_FDCWD.into(), name, flags.into()], what)
}

fn add(batch: &mut Batch, epoll: i32, watch: &WatchState) {
    // struct epoll_event is packed on this architecture: events, then data.
    let event = batch.bytes(&[&watch.events.to_ne_bytes()[..], &watch.data.to_ne_bytes()[..]].concat());
    let add = [epoll.into(), libc::EPOLL_CTL_ADD.into(), watch.number.into(), event];
    batch.call(libc::SYS_epoll_ctl, add, format!("watching descriptor {}", watch.number));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::pidfd::PidfdState;
    use crate::image::encode;

    fn descriptor(number: i32, file: u32) -> DescriptorState {
        DescriptorState { number, file: FileId(file), close_on_exec: true }
    }

    #[test]
    fn holders_open_their_own_and_one_of_them_adds_the_watch() {
        let pidfd = FileState::new(FileId(0), "pidfd", encode(&PidfdState { pid: PodPid(7), flags: 0, status: 0 }));
        let watch = WatchState { file: FileId(0), number: 5, events: 1, data: 2 };
        let epoll = FileState::new(FileId(1), "epoll", encode(&EpollState { flags: 2, watches: vec![watch] }));
        let mut late = LateFiles::of(&[pidfd, epoll]).unwrap();
        assert!(late.contains(FileId(0)) && !late.contains(FileId(1)));
        let table = [descriptor(5, 0), descriptor(6, 1)];
        assert_eq!(late.open_in(&table, &|pid| pid.0, false).unwrap().len(), 6);
        assert_eq!(late.open_in(&table, &|pid| pid.0, false).unwrap().len(), 5);
        assert!(late.open_in(&[descriptor(6, 1)], &|pid| pid.0, false).is_none());
    }
}
