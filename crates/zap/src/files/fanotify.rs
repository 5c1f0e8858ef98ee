//! fanotify groups: what they mark. Inodes are kept by their path (see [`watched`](super::watched)), mounts and file systems by
//! where the pod has them mounted; unread events become one that says that events were lost, as when a queue is full.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use serde::{Deserialize, Serialize};

use super::watched::{self, Mark, Place, hexadecimal};
use super::{Descriptor, FileKind, decoded, inotify::Target, mounts, reopen};
use crate::error::{CaptureError, Context, RebuildError};
use crate::ids::{FileId, HostPid, PodPid};
use crate::image::encode;
use crate::look::Look;
use crate::process::proc_files::Status;
use crate::procfs;
use crate::rebuild::Rebuild;
use crate::sys::{capability, descriptor, mount, watch};

/// A fanotify group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FanotifyState {
    /// Flags of `fanotify_init(2)`: its class, what it reports, what it is not limited in.
    pub kind: u32,
    /// Flags of the descriptors that come with its events.
    pub event_flags: u32,
    /// Status flags.
    pub flags: i32,
    /// Whether it was made with `CAP_SYS_ADMIN`: the kernel tells others less.
    pub privileged: bool,
    /// What it marks.
    pub marks: Vec<MarkState>,
    /// Whether there were events that nobody had read.
    pub unread: bool,
}

/// A mark.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MarkState {
    /// `FAN_MARK_EVICTABLE`, and how what is ignored is meant (`FAN_MARK_IGNORE`, `FAN_MARK_IGNORED_SURV_MODIFY`).
    pub flags: u32,
    /// Events.
    pub mask: u64,
    /// Events that are not reported.
    pub ignored: u64,
    /// What is marked.
    pub object: Object,
}

/// What a mark is on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Object {
    /// One file or directory.
    Inode(Target),
    /// The mount at this path of the pod.
    Mount(#[serde(with = "serde_bytes")] Vec<u8>),
    /// The file system that is mounted there.
    FileSystem(#[serde(with = "serde_bytes")] Vec<u8>),
}

/// `FAN_CLASS_CONTENT` and `FAN_CLASS_PRE_CONTENT`.
const CLASS: u32 = libc::FAN_CLASS_CONTENT | libc::FAN_CLASS_PRE_CONTENT;
/// Reports handles on files rather than descriptors: what those may use who are not privileged.
const REPORTS_HANDLES: u32 = libc::FAN_REPORT_FID | libc::FAN_REPORT_DIR_FID;
/// Events for whose answer others wait: `FAN_OPEN_PERM`, `FAN_ACCESS_PERM`, `FAN_OPEN_EXEC_PERM`, `FAN_PRE_ACCESS`.
const ASKS: u64 = 0x17_0000;
const SYS_ADMIN: u32 = 21;
/// The least that an event takes (`struct fanotify_event_metadata`).
const EVENT: usize = 24;
const MOST_READ: usize = 1 << 16;

pub(super) struct Fanotify;

impl FileKind for Fanotify {
    fn name(&self) -> &'static str {
        "fanotify"
    }

    fn recognizes(&self, descriptor: &Descriptor) -> bool {
        descriptor.link == b"anon_inode:[fanotify]"
    }

    fn refers_to_others(&self) -> bool {
        true
    }

    fn check(&self, descriptor: &Descriptor) -> Result<(), CaptureError> {
        Group::of(descriptor)?.check(descriptor)
    }

    fn look_ahead(&self, look: &mut Look<'_>, descriptor: &Descriptor) -> Result<(), CaptureError> {
        watched::find(look, descriptor, &Group::of(descriptor)?.inodes()).map(drop)
    }

    fn capture(&self, look: &mut Look<'_>, descriptor: &Descriptor) -> Result<Vec<u8>, CaptureError> {
        let group = Group::of(descriptor)?;
        group.check(descriptor)?;
        let mut places = watched::find(look, descriptor, &group.inodes())?.into_iter();
        let mounted = procfs::read(look.init.proc("mountinfo")).capturing("reading", "the mounts of the pod")?;
        let mounted: Vec<mounts::Mount> = mounts::parse(&mounted).collect();
        let mut marks = Vec::with_capacity(group.lines.len());
        for Line { flags, mask, ignored, on } in group.lines {
            let at = |found: Option<&mounts::Mount>, what: String| match found {
                Some(mount) => Ok(mount.point.as_os_str().as_encoded_bytes().to_vec()),
                None => Err(descriptor.refuse(format!("marks {what}, which the pod does not have"))),
            };
            let object = match on {
                On::Inode(mark) => {
                    let place = places.next().unwrap_or_else(|| Place::Unknown(format!("inode {}", mark.inode)));
                    let unknown = |what| descriptor.refuse(format!("marks {what}, to which no path leads"));
                    Object::Inode(Target::of(place).map_err(unknown)?)
                }
                On::Mount(id) => Object::Mount(at(mounted.iter().find(|m| m.id == id), format!("mount {id}"))?),
                On::FileSystem(device) => {
                    let of_device = mounted.iter().filter(|m| m.device == device);
                    let whole = of_device.min_by_key(|m| (m.root.as_os_str().len(), m.id));
                    Object::FileSystem(at(whole, "a file system".into())?)
                }
                On::Other => return Err(descriptor.refuse("marks a mount namespace, which cannot be checkpointed yet")),
            };
            marks.push(MarkState { flags, mask, ignored, object });
        }
        let unread = descriptor::unread(&descriptor.file).capturing("counting the events of", descriptor.object())? > 0;
        let privileged = group.kind & REPORTS_HANDLES == 0 || is_privileged(descriptor.subject.host);
        Ok(encode(&FanotifyState {
            kind: group.kind,
            event_flags: group.event_flags,
            flags: descriptor.flags(),
            privileged,
            marks,
            unread,
        }))
    }

    fn open(&self, rebuild: &mut Rebuild<'_>, id: FileId, state: &[u8]) -> Result<OwnedFd, RebuildError> {
        let state: FanotifyState = decoded(state)?;
        let marks_more = state.marks.iter().any(|mark| !matches!(mark.object, Object::Inode(_)));
        let needs = state.privileged || marks_more || state.kind & CLASS != 0;
        if needs && !rebuild.spec.capabilities.contains(&SYS_ADMIN) {
            return Err(RebuildError::Lacks("CAP_SYS_ADMIN for a fanotify group; restart it with --cap-add".into()));
        }
        let make = || watch::fanotify(state.kind, state.event_flags);
        let made = if state.privileged { make() } else { capability::without(SYS_ADMIN, make).and_then(|made| made) };
        let file = made.map_err(|source| match source.raw_os_error() {
            Some(libc::EMFILE) => {
                RebuildError::Lacks("room for a fanotify group; raise the sysctl fs.fanotify.max_user_groups".into())
            }
            Some(libc::EINVAL | libc::ENOSYS) => {
                RebuildError::Lacks("a kernel with this kind of fanotify group".into())
            }
            _ => RebuildError::Kernel { step: "making the fanotify group", object: id.to_string(), source },
        })?;
        reopen::set_flags(&file, state.flags).rebuilding("setting the flags of", id)?;
        Ok(file)
    }

    fn connect(&self, rebuild: &mut Rebuild<'_>, id: FileId, state: &[u8]) -> Result<(), RebuildError> {
        let state: FanotifyState = decoded(state)?;
        let file = rebuild.file(id)?;
        state.marks.iter().try_for_each(|mark| add(rebuild, file, mark))
    }

    fn needs_settling(&self, _state: &[u8]) -> bool {
        true
    }

    /// Fills the queue of a group that had events, as inotify's.
    fn prepare(&self, file: BorrowedFd<'_>, state: &[u8]) -> Result<(), RebuildError> {
        let state: FanotifyState = decoded(state)?;
        let filled = if state.unread { drop_all(file).and_then(|()| fill_queue(file)) } else { Ok(()) };
        filled.rebuilding("filling the queue of", "a fanotify group")
    }

    /// What was opened since for the restart has made events: they go, but for the one that says that events were lost.
    fn settle(
        &self,
        file: BorrowedFd<'_>,
        state: &[u8],
        _host_pid: &dyn Fn(PodPid) -> Option<HostPid>,
    ) -> Result<(), RebuildError> {
        let state: FanotifyState = decoded(state)?;
        let dropped = if state.unread { most_events().and_then(|most| drop_some(file, most)) } else { drop_all(file) };
        dropped.rebuilding("settling", "a fanotify group")
    }
}

/// Whether a process has `CAP_SYS_ADMIN` on the host, as the kernel asks.
fn is_privileged(process: HostPid) -> bool {
    let users = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/user")).ok();
    let status = procfs::read(process.proc("status")).map(Status::new);
    let has = status.is_ok_and(|status| status.mask("CapEff:") & (1 << SYS_ADMIN) != 0);
    has && users(&process.to_string()) == users("self")
}

fn add(rebuild: &Rebuild<'_>, file: BorrowedFd<'_>, state: &MarkState) -> Result<(), RebuildError> {
    let (kind, path, shown) = match &state.object {
        // It reports nothing, and nobody can name it to remove it.
        Object::Inode(Target::Gone) => return Ok(()),
        Object::Inode(Target::Open(open)) => {
            let number = rebuild.file(*open)?.as_raw_fd();
            (0, PathBuf::from(format!("/proc/self/fd/{number}")), "a file without a name".to_owned())
        }
        Object::Inode(Target::Path(path)) => (libc::FAN_MARK_DONT_FOLLOW, reopen::as_path(path).into(), lossy(path)),
        Object::Mount(path) => (libc::FAN_MARK_MOUNT, reopen::as_path(path).into(), lossy(path)),
        Object::FileSystem(path) => (libc::FAN_MARK_FILESYSTEM, reopen::as_path(path).into(), lossy(path)),
    };
    let mark = |flags: u32, mask: u64| {
        if mask == 0 { Ok(()) } else { watch::mark(file, libc::FAN_MARK_ADD | kind | flags, mask, &path) }
    };
    let evictable = state.flags & libc::FAN_MARK_EVICTABLE;
    let how = state.flags & (libc::FAN_MARK_IGNORE | libc::FAN_MARK_IGNORED_SURV_MODIFY);
    // Without FAN_MARK_IGNORE the kernel adds to what is ignored which objects it means, and lets nobody say so.
    let (how, ignored) = if how & libc::FAN_MARK_IGNORE == 0 {
        (how | libc::FAN_MARK_IGNORED_MASK, state.ignored & !(libc::FAN_ONDIR | libc::FAN_EVENT_ON_CHILD))
    } else {
        (how, state.ignored)
    };
    let marked = mark(evictable, state.mask).and_then(|()| mark(evictable | how, ignored));
    marked.map_err(|source| match source.raw_os_error() {
        Some(libc::ENOENT) => RebuildError::Changed { path: shown, what: "it is gone, and was marked".into() },
        Some(libc::ENOSPC) => {
            RebuildError::Lacks("room for fanotify marks; raise the sysctl fs.fanotify.max_user_marks".into())
        }
        _ => RebuildError::Kernel { step: "marking", object: shown, source },
    })
}

fn lossy(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}

/// How many events a queue holds, beside the one that says that others were lost.
fn most_events() -> io::Result<usize> {
    let text = std::fs::read_to_string("/proc/sys/fs/fanotify/max_queued_events")?;
    text.trim().parse().map_err(io::Error::other)
}

/// Reads everything.
fn drop_all(file: BorrowedFd<'_>) -> io::Result<()> {
    while descriptor::unread(file)? > 0 {
        watch::drop_events(file, MOST_READ)?;
    }
    Ok(())
}

/// Reads so many events.
fn drop_some(file: BorrowedFd<'_>, mut left: usize) -> io::Result<()> {
    while left > 0 {
        // There is room for no more than are to be read; where that is too little for one, for one.
        let mut room = MOST_READ.min(left * EVENT);
        left -= loop {
            match watch::drop_events(file, room) {
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) && room < MOST_READ => room += 8,
                other => break other?.min(left),
            }
        };
    }
    Ok(())
}

/// Makes events until there is room for none but the last, which says that events were lost: each of a file of its own, as
/// those of one file become one.
fn fill_queue(file: BorrowedFd<'_>) -> io::Result<()> {
    let place = mount::new_mount(c"tmpfs", &[], 0)?;
    let path = PathBuf::from(format!("/proc/self/fd/{}", place.as_raw_fd()));
    let mask = libc::FAN_OPEN | libc::FAN_EVENT_ON_CHILD;
    watch::mark(file, libc::FAN_MARK_ADD, mask, &path)?;
    let flags = OFlag::O_RDONLY | OFlag::O_CREAT | OFlag::O_CLOEXEC;
    for number in 0..=most_events()? {
        drop(File::from(nix::fcntl::openat(place.as_fd(), number.to_string().as_str(), flags, Mode::S_IRUSR)?));
    }
    watch::mark(file, libc::FAN_MARK_REMOVE, mask, &path)
}

/// A group as `fdinfo` tells of it.
struct Group {
    kind: u32,
    event_flags: u32,
    lines: Vec<Line>,
}

/// A line of `fdinfo`: a mark.
#[derive(Debug, PartialEq, Eq)]
struct Line {
    flags: u32,
    mask: u64,
    ignored: u64,
    on: On,
}

#[derive(Debug, PartialEq, Eq)]
enum On {
    Inode(Mark),
    Mount(u64),
    FileSystem(u64),
    Other,
}

impl Group {
    fn of(descriptor: &Descriptor) -> Result<Group, CaptureError> {
        let info = descriptor.info()?;
        let strange = || CaptureError::Unexpected { object: descriptor.object(), what: "fdinfo of fanotify".into() };
        Group::parse(info).ok_or_else(strange)
    }

    fn parse(info: &[u8]) -> Option<Group> {
        let text = std::str::from_utf8(info).ok()?;
        let mut lines = text.lines().filter_map(|line| line.strip_prefix("fanotify "));
        let head = lines.next()?;
        // How it is read belongs to the description, and how long it is kept to the number.
        let kind = hexadecimal(head, "flags:")? as u32 & !(libc::FAN_CLOEXEC | libc::FAN_NONBLOCK);
        let event_flags = hexadecimal(head, "event-flags:")? as u32;
        Some(Group { kind, event_flags, lines: lines.map(line).collect::<Option<_>>()? })
    }

    /// Refuses one that would be in the way of a checkpoint, or whose events nobody can make again.
    fn check(&self, descriptor: &Descriptor) -> Result<(), CaptureError> {
        // Whoever opens a file for zap would wait for a program that is held.
        if self.lines.iter().any(|line| (line.mask | line.ignored) & ASKS != 0) {
            return Err(descriptor.refuse("is asked before files are opened; remove its marks for a checkpoint"));
        }
        let endless = self.kind & libc::FAN_UNLIMITED_QUEUE != 0;
        if endless && descriptor::unread(&descriptor.file).unwrap_or(0) > 0 {
            return Err(
                descriptor.refuse("has events that were not read, and a queue that loses none; read them first")
            );
        }
        Ok(())
    }

    fn inodes(&self) -> Vec<Mark> {
        let inode = |line: &Line| if let On::Inode(mark) = &line.on { Some(mark.clone()) } else { None };
        self.lines.iter().filter_map(inode).collect()
    }
}

/// `ino:4f969 sdev:800013 mflags:0 mask:3b ignored_mask:40000000 fhandle-bytes:8 fhandle-type:1 f_handle:69f90400c275b5b4`, or
/// `mnt_id:12 mflags:40 mask:38 ignored_mask:40000003`, or `sdev:2d mflags:…`
fn line(line: &str) -> Option<Line> {
    let on = if line.starts_with("ino:") {
        On::Inode(Mark::parse(line)?)
    } else if line.starts_with("sdev:") {
        On::FileSystem(watched::device(line)?)
    } else if line.starts_with("mnt_id:") {
        On::Mount(hexadecimal(line, "mnt_id:")?)
    } else {
        On::Other
    };
    let number = |label| hexadecimal(line, label);
    Some(Line { flags: number("mflags:")? as u32, mask: number(" mask:")?, ignored: number("ignored_mask:")?, on })
}

/// Reads some bytes as a fanotify group's fdinfo.
pub(super) fn try_info(bytes: &[u8]) {
    drop(Group::parse(bytes));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_fdinfo() {
        let text = b"pos:\t0\nflags:\t02\nfanotify flags:12 event-flags:8000\nfanotify mnt_id:12 mflags:40 mask:38 \
            ignored_mask:40000003\nfanotify ino:4f969 sdev:800013 mflags:0 mask:800003b ignored_mask:40000000\n\
            fanotify sdev:2d mflags:0 mask:20 ignored_mask:0\n";
        let group = Group::parse(text).unwrap();
        assert_eq!((group.kind, group.event_flags), (libc::FAN_UNLIMITED_QUEUE, 0x8000));
        let inode = Mark { device: libc::makedev(8, 0x13), inode: 0x4f969, handle: None };
        let line = |flags, mask, ignored, on| Line { flags, mask, ignored, on };
        assert_eq!(
            group.lines,
            [
                line(0x40, 0x38, 0x4000_0003, On::Mount(0x12)),
                line(0, 0x800_003b, 0x4000_0000, On::Inode(inode)),
                line(0, 0x20, 0, On::FileSystem(libc::makedev(0, 0x2d))),
            ]
        );
    }

    #[test]
    fn a_queue_that_lost_events_says_so_once() {
        for kind in [0, REPORTS_HANDLES | libc::FAN_REPORT_NAME, libc::FAN_REPORT_FID] {
            let file = watch::fanotify(kind, 0).unwrap();
            fill_queue(file.as_fd()).unwrap();
            drop_some(file.as_fd(), most_events().unwrap()).unwrap();
            let mut event = [0; 256];
            let length = nix::unistd::read(&file, &mut event).unwrap();
            assert_eq!(length, u32::from_ne_bytes(event[..4].try_into().unwrap()) as usize, "{kind:#x}: one event");
            assert_eq!(event[8..16], libc::FAN_Q_OVERFLOW.to_ne_bytes(), "{kind:#x}");
            assert_eq!(descriptor::unread(&file).unwrap(), 0);
        }
    }
}
