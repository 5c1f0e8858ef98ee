//! inotify instances: what they watch, under which numbers. What is watched is kept by its path (see
//! [`watched`](super::watched)); unread events become one that says that events were lost, as when a queue is full.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use serde::{Deserialize, Serialize};

use super::watched::{self, Mark, Place};
use super::{Descriptor, FileKind, decoded, reopen};
use crate::error::{CaptureError, Context, RebuildError};
use crate::ids::{FileId, HostPid, PodPid};
use crate::image::encode;
use crate::look::Look;
use crate::rebuild::Rebuild;
use crate::sys::{descriptor, mount, watch};

/// An inotify instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InotifyState {
    /// Status flags.
    pub flags: i32,
    /// What it watches, in the order of the numbers.
    pub watches: Vec<WatchState>,
    /// Whether there were events that nobody had read.
    pub unread: bool,
}

/// A watch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WatchState {
    /// Its number, the program's word for it.
    pub number: i32,
    /// Events, and `IN_ONESHOT` and `IN_EXCL_UNLINK`.
    pub mask: u32,
    /// What is watched.
    pub target: Target,
}

/// What a watch is on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Target {
    /// What is there under this path of the pod.
    Path(#[serde(with = "serde_bytes")] Vec<u8>),
    /// The file of a description that has no path.
    Open(FileId),
    /// Nothing that anybody can reach: it never reports anything.
    Gone,
}

impl Target {
    /// What is at a place; what it is, for a message, if nobody knows where.
    pub(super) fn of(place: Place) -> Result<Target, String> {
        match place {
            Place::Path(path) => Ok(Target::Path(path)),
            Place::Open(file) => Ok(Target::Open(file)),
            Place::Gone => Ok(Target::Gone),
            Place::Unknown(what) => Err(what),
        }
    }
}

/// Bytes of an event without a name.
const EVENT: usize = 16;

pub(super) struct Inotify;

impl FileKind for Inotify {
    fn name(&self) -> &'static str {
        "inotify"
    }

    fn recognizes(&self, descriptor: &Descriptor) -> bool {
        descriptor.link == b"anon_inode:inotify"
    }

    fn refers_to_others(&self) -> bool {
        true
    }

    fn look_ahead(&self, look: &mut Look<'_>, descriptor: &Descriptor) -> Result<(), CaptureError> {
        let marks: Vec<Mark> = lines(descriptor.info()?).map(|line| line.mark).collect();
        watched::find(look, descriptor, &marks).map(drop)
    }

    fn capture(&self, look: &mut Look<'_>, descriptor: &Descriptor) -> Result<Vec<u8>, CaptureError> {
        let mut lines: Vec<Line> = lines(descriptor.info()?).collect();
        lines.sort_unstable_by_key(|line| line.number);
        let marks: Vec<Mark> = lines.iter().map(|line| line.mark.clone()).collect();
        let places = watched::find(look, descriptor, &marks)?;
        let mut watches = Vec::with_capacity(lines.len());
        for (line, place) in lines.into_iter().zip(places) {
            let target = Target::of(place).map_err(|what| {
                descriptor.refuse(format!("watches {what} (watch {}), to which no path leads", line.number))
            })?;
            watches.push(WatchState { number: line.number, mask: line.mask, target });
        }
        let unread = descriptor::unread(&descriptor.file).capturing("counting the events of", descriptor.object())? > 0;
        Ok(encode(&InotifyState { flags: descriptor.flags(), watches, unread }))
    }

    fn open(&self, _rebuild: &mut Rebuild<'_>, id: FileId, state: &[u8]) -> Result<OwnedFd, RebuildError> {
        let state: InotifyState = decoded(state)?;
        let file = watch::inotify().map_err(|source| match source.raw_os_error() {
            Some(libc::EMFILE) => RebuildError::Lacks(
                "room for an inotify instance; raise the sysctl \
                fs.inotify.max_user_instances"
                    .into(),
            ),
            _ => RebuildError::Kernel { step: "making the inotify instance", object: id.to_string(), source },
        })?;
        reopen::set_flags(&file, state.flags).rebuilding("setting the flags of", id)?;
        Ok(file)
    }

    fn connect(&self, rebuild: &mut Rebuild<'_>, id: FileId, state: &[u8]) -> Result<(), RebuildError> {
        let state: InotifyState = decoded(state)?;
        let file = rebuild.file(id)?;
        for watch in &state.watches {
            add(rebuild, file, watch)?;
        }
        Ok(())
    }

    fn needs_settling(&self, _state: &[u8]) -> bool {
        true
    }

    /// Leaves one event in the queue of an instance that had some: that events were lost. The kernel adds it when the queue
    /// is full, so that is what it is made; what filled it is read out again when everything else is done.
    fn prepare(&self, file: BorrowedFd<'_>, state: &[u8]) -> Result<(), RebuildError> {
        let state: InotifyState = decoded(state)?;
        let filled = if state.unread { fill_queue(file) } else { Ok(()) };
        filled.rebuilding("filling the queue of", "an inotify instance")
    }

    /// What was opened since for the restart has made events: they go, but for the one that says that events were lost.
    fn settle(
        &self,
        file: BorrowedFd<'_>,
        state: &[u8],
        _host_pid: &dyn Fn(PodPid) -> Option<HostPid>,
    ) -> Result<(), RebuildError> {
        let state: InotifyState = decoded(state)?;
        drop_events(file, if state.unread { EVENT } else { 0 }).rebuilding("settling", "an inotify instance")?;
        if state.unread {
            let next = state.watches.last().map_or(0, |watch| watch.number) + 1;
            watch::set_next_watch(file, next).rebuilding("numbering the watches of", "an inotify instance")?;
        }
        Ok(())
    }
}

fn add(rebuild: &Rebuild<'_>, file: BorrowedFd<'_>, state: &WatchState) -> Result<(), RebuildError> {
    let shown = || match &state.target {
        Target::Path(path) => String::from_utf8_lossy(path).into_owned(),
        _ => "a file without a name".to_owned(),
    };
    let of_descriptor = |fd: BorrowedFd<'_>| PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    watch::set_next_watch(file, state.number).rebuilding("numbering the watch of", shown())?;
    let added = match &state.target {
        Target::Path(path) => watch::add_watch(file, reopen::as_path(path), state.mask | libc::IN_DONT_FOLLOW),
        Target::Open(open) => watch::add_watch(file, &of_descriptor(rebuild.file(*open)?), state.mask),
        // The inode of a pipe stays when its ends are closed, for as long as it is watched.
        Target::Gone => nix::unistd::pipe()
            .map_err(io::Error::from)
            .and_then(|(end, _)| watch::add_watch(file, &of_descriptor(end.as_fd()), state.mask)),
    };
    let number = added.map_err(|source| match source.raw_os_error() {
        Some(libc::ENOENT) => RebuildError::Changed { path: shown(), what: "it is gone, and was watched".into() },
        Some(libc::ENOSPC) => {
            RebuildError::Lacks("room for inotify watches; raise the sysctl fs.inotify.max_user_watches".into())
        }
        _ => RebuildError::Kernel { step: "watching", object: shown(), source },
    })?;
    if number != state.number {
        return Err(RebuildError::Damaged(format!(
            "the watch of {} has number {number}, not {}",
            shown(),
            state.number
        )));
    }
    Ok(())
}

/// Reads events until no more than `rest` bytes of them are left.
fn drop_events(file: BorrowedFd<'_>, rest: usize) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 16];
    loop {
        let more = descriptor::unread(file)?.saturating_sub(rest);
        if more == 0 {
            return Ok(());
        }
        let most = more.min(buffer.len());
        nix::unistd::read(file, &mut buffer[..most])?;
    }
}

/// Makes events until there is room for none but the last, which says that events were lost.
fn fill_queue(file: BorrowedFd<'_>) -> io::Result<()> {
    let place = mount::new_mount(c"tmpfs", &[], 0)?;
    let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_CLOEXEC;
    let scrap = File::from(nix::fcntl::openat(&place, "scrap", flags, Mode::S_IRUSR)?);
    scrap.write_at(b"x", 0)?;
    // Two events a read: one of the file, one of its directory. Two that are alike, one after the other, would become one.
    let path = |fd: &dyn AsRawFd| PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    let watches = [
        watch::add_watch(file, &path(&place), libc::IN_ACCESS)?,
        watch::add_watch(file, &path(&scrap), libc::IN_ACCESS)?,
    ];
    let mut before = 0;
    loop {
        for _ in 0..1024 {
            scrap.read_at(&mut [0], 0)?;
        }
        let unread = descriptor::unread(file)?;
        if unread == before {
            break;
        }
        before = unread;
    }
    // There is no room for the events that tell of this.
    watches.into_iter().try_for_each(|number| watch::remove_watch(file, number))
}

/// A line of `fdinfo`.
struct Line {
    number: i32,
    mask: u32,
    mark: Mark,
}

fn lines(info: &[u8]) -> impl Iterator<Item = Line> {
    info.split(|b| *b == b'\n').filter_map(|l| line(std::str::from_utf8(l).ok()?))
}

/// `inotify wd:7 ino:98c152 sdev:27 mask:fff ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:52c198006d1b8269`
fn line(line: &str) -> Option<Line> {
    let rest = line.strip_prefix("inotify ")?;
    let number = watched::hexadecimal(rest, "wd:")? as i32;
    Some(Line { number, mask: watched::hexadecimal(rest, " mask:")? as u32, mark: Mark::parse(rest)? })
}

/// Reads some bytes as an inotify instance's fdinfo.
pub(super) fn try_info(bytes: &[u8]) {
    lines(bytes).for_each(drop);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_fdinfo() {
        let text = b"pos:\t0\ninotify wd:7 ino:98c152 sdev:800027 mask:80000fff ignored_mask:0 fhandle-bytes:8 \
            fhandle-type:1 f_handle:52c198006d1b8269\ninotify wd:a ino:1 sdev:1b mask:100 ignored_mask:0\n";
        let found: Vec<_> = lines(text).map(|l| (l.number, l.mask, l.mark)).collect();
        let handle = watch::Handle { kind: 1, bytes: vec![0x52, 0xc1, 0x98, 0, 0x6d, 0x1b, 0x82, 0x69] };
        let first = Mark { device: libc::makedev(8, 0x27), inode: 0x98_c152, handle: Some(handle) };
        let second = Mark { device: libc::makedev(0, 0x1b), inode: 1, handle: None };
        assert_eq!(found, [(7, 0x8000_0fff, first), (10, 0x100, second)]);
    }

    #[test]
    fn a_queue_that_lost_events_says_so_once() {
        let file = watch::inotify().unwrap();
        fill_queue(file.as_fd()).unwrap();
        drop_events(file.as_fd(), EVENT).unwrap();
        assert_eq!(descriptor::unread(&file).unwrap(), EVENT);
        let mut event = [0; EVENT];
        assert_eq!(nix::unistd::read(&file, &mut event).unwrap(), EVENT);
        assert_eq!(event[..4], (-1i32).to_ne_bytes());
        assert_eq!(event[4..8], libc::IN_Q_OVERFLOW.to_ne_bytes());
    }
}
