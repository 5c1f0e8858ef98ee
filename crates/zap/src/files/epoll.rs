//! Epoll instances and what they watch.

use std::os::fd::{AsRawFd, OwnedFd};

use serde::{Deserialize, Serialize};

use super::{Descriptor, FileKind, decoded, reopen};
use crate::error::{CaptureError, Context, RebuildError};
use crate::ids::FileId;
use crate::image::encode;
use crate::look::Look;
use crate::rebuild::Rebuild;
use crate::sys::anonymous::{self, Watch};
use crate::sys::kcmp;

/// An epoll instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpollState {
    /// Status flags.
    pub flags: i32,
    /// What it watches.
    pub watches: Vec<WatchState>,
}

/// A registration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WatchState {
    /// The file.
    pub file: FileId,
    /// The number it was registered under, which need not lead to it any more.
    pub number: i32,
    /// Events and flags as `fdinfo` shows them: a one-shot that has fired has flags only.
    pub events: u32,
    /// The program's own.
    pub data: u64,
}

/// A line of `fdinfo`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Line {
    number: i32,
    events: u32,
    data: u64,
    inode: u64,
    device: u64,
}

/// Flags of a registration that are no events.
const FLAGS: u32 = (libc::EPOLLONESHOT | libc::EPOLLET | libc::EPOLLWAKEUP | libc::EPOLLEXCLUSIVE) as u32;
/// Events that a fresh file of nearly any kind has.
const ANY: u32 = (libc::EPOLLIN | libc::EPOLLOUT | libc::EPOLLPRI | libc::EPOLLRDHUP) as u32;

pub(super) struct Epoll;

impl FileKind for Epoll {
    fn name(&self) -> &'static str {
        "epoll"
    }

    fn recognizes(&self, descriptor: &Descriptor) -> bool {
        descriptor.link == b"anon_inode:[eventpoll]"
    }

    fn refers_to_others(&self) -> bool {
        true
    }

    fn capture(&self, look: &mut Look<'_>, descriptor: &Descriptor) -> Result<Vec<u8>, CaptureError> {
        let mut watches: Vec<WatchState> = Vec::new();
        for line in lines(descriptor.info()?) {
            let earlier = watches.iter().filter(|w| w.number == line.number).count() as u32;
            let file = target(look, descriptor, line, earlier)?;
            watches.push(WatchState { file, number: line.number, events: line.events, data: line.data });
        }
        Ok(encode(&EpollState { flags: descriptor.flags(), watches }))
    }

    fn open(&self, _rebuild: &mut Rebuild<'_>, id: FileId, state: &[u8]) -> Result<OwnedFd, RebuildError> {
        let state: EpollState = decoded(state)?;
        let file = anonymous::epoll().rebuilding("making the epoll", id)?;
        reopen::set_flags(&file, state.flags).rebuilding("setting the flags of", id)?;
        Ok(file)
    }

    fn connect(&self, rebuild: &mut Rebuild<'_>, id: FileId, state: &[u8]) -> Result<(), RebuildError> {
        let state: EpollState = decoded(state)?;
        let epoll = rebuild.file(id)?;
        // What is not open yet is opened late, and added then; signalfds are added by those whose signals they tell of.
        let is_ready = |w: &&WatchState| rebuild.file(w.file).is_ok_and(|file| !super::signalfd::is_one(file));
        let present = state.watches.iter().filter(is_ready);
        let (fired, waiting): (Vec<_>, Vec<_>) = present.partition(|w| has_fired(w));
        let watch = |w: &&WatchState, events| -> Result<Watch<'_>, RebuildError> {
            Ok(Watch { file: rebuild.file(w.file)?, number: w.number, events, data: w.data })
        };
        if !fired.is_empty() {
            // A one-shot is spent by firing: most files are ready for something.
            let watches = fired.iter().map(|w| watch(w, w.events | ANY)).collect::<Result<Vec<_>, _>>()?;
            anonymous::watch(epoll, &watches).rebuilding("adding to the epoll", id)?;
            anonymous::ready(epoll, watches.len()).rebuilding("spending the one-shots of the epoll", id)?;
        }
        let watches = waiting.iter().map(|w| watch(w, w.events)).collect::<Result<Vec<_>, _>>()?;
        anonymous::watch(epoll, &watches).rebuilding("adding to the epoll", id)
    }
}

fn has_fired(watch: &WatchState) -> bool {
    watch.events & libc::EPOLLONESHOT as u32 != 0 && watch.events & !FLAGS == 0
}

/// The file behind a line: the `earlier`-th registration of its number.
fn target(look: &Look<'_>, descriptor: &Descriptor, line: Line, earlier: u32) -> Result<FileId, CaptureError> {
    let (ours, epoll) = (std::process::id() as i32, descriptor.file.as_raw_fd());
    let is = |file: &OwnedFd| {
        kcmp::epoll_target_is(ours, file.as_raw_fd(), ours, epoll, line.number, earlier)
            .capturing("comparing what is watched by", descriptor.object())
    };
    // Nearly always the number still leads to the file in the process through which the epoll was met.
    let likely = look.files.numbered(descriptor.subject.host, line.number);
    for (id, file) in likely.into_iter().chain(look.files.of_inode(line.device, line.inode)) {
        if is(&file)? {
            return Ok(id);
        }
    }
    Err(descriptor
        .refuse(format!("watches number {}, a file that no process of the pod has open any more", line.number)))
}

fn lines(info: &[u8]) -> impl Iterator<Item = Line> {
    info.split(|b| *b == b'\n').filter_map(|l| line(std::str::from_utf8(l).ok()?))
}

/// `tfd:        5 events:       19 data:     7ffd00000005  pos:0 ino:408 sdev:f`
fn line(line: &str) -> Option<Line> {
    let after = |label: &str| {
        let (_, rest) = line.split_once(label)?;
        rest.split_whitespace().next()
    };
    let hexadecimal = |label| u64::from_str_radix(after(label)?, 16).ok();
    // The kernel's own encoding of a device number: twelve bits and twenty.
    let device = hexadecimal("sdev:")?;
    Some(Line {
        number: after("tfd:")?.parse().ok()?,
        events: hexadecimal("events:")? as u32,
        data: hexadecimal("data:")?,
        inode: hexadecimal("ino:")?,
        device: libc::makedev((device >> 20) as u32, (device & 0xf_ffff) as u32),
    })
}

/// Reads some bytes as an epoll instance's fdinfo.
pub(super) fn try_info(bytes: &[u8]) {
    lines(bytes).for_each(drop);
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use nix::unistd::pipe;

    use super::*;
    use crate::files::describe;
    use crate::files::testing::{round_trip, subject};
    use crate::look::Console;

    fn epoll(watches: &[(&OwnedFd, i32, i32, u64)]) -> OwnedFd {
        let epoll = anonymous::epoll().unwrap();
        let watches: Vec<Watch<'_>> = watches
            .iter()
            .map(|(file, number, events, data)| Watch {
                file: file.as_fd(),
                number: *number,
                events: *events as u32,
                data: *data,
            })
            .collect();
        anonymous::watch(epoll.as_fd(), &watches).unwrap();
        epoll
    }

    fn shown(file: &OwnedFd) -> Vec<(i32, u32, u64)> {
        let descriptor = describe(&subject(), 0, file.try_clone().unwrap()).unwrap();
        let info = descriptor.info().unwrap();
        lines(info).map(|l| (l.number, l.events, l.data)).collect()
    }

    #[test]
    fn parses_fdinfo() {
        let text =
            b"pos:\t0\nflags:\t02\ntfd:        5 events:       19 data:     7ffd00000005  pos:0 ino:408 sdev:f\n";
        let expected = Line { number: 5, events: 0x19, data: 0x7ffd_0000_0005, inode: 0x408, device: 15 };
        assert_eq!(lines(text).collect::<Vec<_>>(), [expected]);
    }

    #[test]
    fn watches_come_back_under_their_numbers() {
        let (from, to) = pipe().unwrap();
        let counter = anonymous::eventfd(false).unwrap();
        // Two files under one number, none of which is theirs here any more.
        let inner = epoll(&[(&from, 900, libc::EPOLLIN, 1), (&counter, 900, libc::EPOLLIN | libc::EPOLLET, u64::MAX)]);
        let outer = epoll(&[(&inner, 3, libc::EPOLLIN, 2), (&to, 901, libc::EPOLLOUT | libc::EPOLLONESHOT, 3)]);
        let spent = anonymous::ready(outer.as_fd(), 9).unwrap();
        assert_eq!(spent, [(libc::EPOLLOUT as u32, 3)]);
        let (_, _, again) = round_trip(&[&outer, &inner, &from, &to, &counter], Console::None);
        let sorted = |file| {
            let mut shown = shown(file);
            shown.sort_unstable();
            shown
        };
        assert_eq!(sorted(&again[0]), sorted(&outer));
        assert_eq!(sorted(&again[1]), sorted(&inner));
        nix::unistd::write(&again[3], b"x").unwrap();
        assert_eq!(anonymous::ready(again[0].as_fd(), 9).unwrap(), [(libc::EPOLLIN as u32, 2)]);
        assert_eq!(anonymous::ready(again[1].as_fd(), 9).unwrap(), [(libc::EPOLLIN as u32, 1)]);
    }
}
