//! Pipes: both ends, what is in them, and the console's, whose far ends are the monitor's.

use std::os::fd::{AsFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::{Gid, Uid, fchown, pipe2, read, write};
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

use super::{Descriptor, FileKind, decoded, reopen};
use crate::error::{CaptureError, Context, RebuildError};
use crate::ids::FileId;
use crate::image::encode;
use crate::look::{Console, Look};
use crate::rebuild::Rebuild;
use crate::sys::descriptor;

/// An end of a pipe.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PipeState {
    /// The pipe: its inode number when it was captured. Ends of one pipe have the same.
    pub pipe: u64,
    /// Access mode and status flags.
    pub flags: i32,
    /// Which of the console's pipes it is: 0 stdin, 1 stdout, 2 stderr.
    pub console: Option<u8>,
    /// What both ends share; with the end that was met first.
    pub shared: Option<SharedState>,
}

/// What the ends of a pipe share.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedState {
    /// Capacity in bytes.
    pub capacity: i32,
    /// Unread bytes: in one piece, or packet by packet.
    pub queue: Vec<ByteBuf>,
    /// Whether the pieces are packets.
    pub packets: bool,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// A pipe that is being rebuilt.
struct Rebuilt {
    /// Ends as `pipe2` made them, until a description takes them.
    ends: [Option<OwnedFd>; 2],
    /// Something to open further descriptions through.
    anchor: OwnedFd,
}

pub(super) struct Pipe;

impl FileKind for Pipe {
    fn name(&self) -> &'static str {
        "pipe"
    }

    fn recognizes(&self, descriptor: &Descriptor) -> bool {
        descriptor.stat.st_mode & libc::S_IFMT == libc::S_IFIFO && descriptor.link.starts_with(b"pipe:[")
    }

    fn capture(&self, look: &mut Look<'_>, descriptor: &Descriptor) -> Result<Vec<u8>, CaptureError> {
        let inode = descriptor.stat.st_ino;
        let console = match &look.console {
            Console::Pipes { inodes } => inodes.iter().zip(0u8..).find(|(i, _)| **i == inode).map(|(_, n)| n),
            _ => None,
        };
        let first = look.first_sight("pipe", descriptor.stat.st_dev, inode);
        let shared = first.then(|| shared(descriptor)).transpose()?;
        Ok(encode(&PipeState { pipe: inode, flags: descriptor.flags(), console, shared }))
    }

    fn open(&self, rebuild: &mut Rebuild<'_>, _id: FileId, state: &[u8]) -> Result<OwnedFd, RebuildError> {
        let state: PipeState = decoded(state)?;
        if rebuild.object::<Rebuilt>("pipe", state.pipe).is_none() {
            let made = make(rebuild, state.console).rebuilding("making", object(&state))?;
            rebuild.keep_object("pipe", state.pipe, made);
        }
        let Some(pipe) = rebuild.object::<Rebuilt>("pipe", state.pipe) else {
            return Err(RebuildError::Damaged(format!("{} is of two kinds", object(&state))));
        };
        if let Some(shared) = &state.shared {
            restore_shared(&pipe.anchor, shared).rebuilding("filling", object(&state))?;
        }
        end(pipe, state.flags).rebuilding("opening", object(&state))
    }
}

fn object(state: &PipeState) -> String {
    match state.console {
        Some(n) => format!("console pipe {n}"),
        None => format!("pipe:[{}]", state.pipe),
    }
}

pub(super) fn shared(descriptor: &Descriptor) -> Result<SharedState, CaptureError> {
    let capacity = fcntl(descriptor, FcntlArg::F_GETPIPE_SZ).capturing("reading the capacity", descriptor.object())?;
    let (queue, packets) =
        queue(descriptor.as_fd(), descriptor.flags(), capacity).capturing("reading", descriptor.object())?;
    let (uid, gid) = (descriptor.stat.st_uid, descriptor.stat.st_gid);
    Ok(SharedState { capacity, queue: queue.into_iter().map(ByteBuf::from).collect(), packets, uid, gid })
}

/// What is in a pipe or FIFO, without taking it out, and whether it is packets.
pub(super) fn queue(end: impl AsFd, flags: i32, capacity: i32) -> std::io::Result<(Vec<Vec<u8>>, bool)> {
    let total = descriptor::unread(&end)?;
    if total == 0 {
        return Ok((Vec::new(), false));
    }
    let reader = match flags & libc::O_ACCMODE {
        libc::O_WRONLY => Some(reopen::again(&end, libc::O_RDONLY | libc::O_NONBLOCK)?),
        _ => None,
    };
    let source = reader.as_ref().map_or(end.as_fd(), AsFd::as_fd);
    let (from, to) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
    fcntl(&to, FcntlArg::F_SETPIPE_SZ(capacity))?;
    copy(source, &to, total)?;
    let mut first = [0; 1];
    read(&from, &mut first)?;
    if descriptor::unread(&from)? == total - 1 {
        let mut bytes = first.to_vec();
        for piece in drain(&from)? {
            bytes.extend(piece);
        }
        return Ok((vec![bytes], false));
    }
    // The rest of the first packet went with its first byte: look again.
    drain(&from)?;
    copy(source, &to, total)?;
    Ok((drain(&from)?, true))
}

fn copy(source: impl AsFd, to: &OwnedFd, total: usize) -> std::io::Result<()> {
    let copied = descriptor::tee(source, to, total)?;
    if copied == total { Ok(()) } else { Err(std::io::Error::other(format!("only {copied} of {total} bytes came"))) }
}

/// Reads a pipe of ours until it is empty; one piece a read.
fn drain(from: &OwnedFd) -> nix::Result<Vec<Vec<u8>>> {
    let mut pieces = Vec::new();
    while let left @ 1.. = descriptor::unread(from).map_err(|_| nix::Error::EIO)? {
        let mut piece = vec![0; left];
        let length = read(from, &mut piece)?;
        piece.truncate(length);
        pieces.push(piece);
    }
    Ok(pieces)
}

fn make(rebuild: &mut Rebuild<'_>, console: Option<u8>) -> std::io::Result<Rebuilt> {
    if let Some(end) = console.and_then(|n| rebuild.console.get(usize::from(n))) {
        let (end, anchor) = (end.try_clone()?, end.try_clone()?);
        let ends = if console == Some(0) { [Some(end), None] } else { [None, Some(end)] };
        return Ok(Rebuilt { ends, anchor });
    }
    let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
    let anchor = read.try_clone()?;
    Ok(Rebuilt { ends: [Some(read), Some(write)], anchor })
}

/// Capacity, owner and contents of a pipe or FIFO.
pub(super) fn restore_shared(anchor: &OwnedFd, shared: &SharedState) -> nix::Result<()> {
    if fcntl(anchor, FcntlArg::F_GETPIPE_SZ)? != shared.capacity {
        fcntl(anchor, FcntlArg::F_SETPIPE_SZ(shared.capacity))?;
    }
    fchown(anchor, Some(Uid::from_raw(shared.uid)), Some(Gid::from_raw(shared.gid)))?;
    if shared.queue.is_empty() {
        return Ok(());
    }
    let writer = reopen::again(anchor, libc::O_WRONLY)?;
    reopen::set_flags(&writer, libc::O_NONBLOCK | if shared.packets { libc::O_DIRECT } else { 0 })?;
    for piece in &shared.queue {
        if write(&writer, piece)? != piece.len() {
            return Err(nix::Error::ENOSPC);
        }
    }
    Ok(())
}

/// An end with these flags: one of the two that the pipe was born with, if it is like them, else a new description.
fn end(pipe: &mut Rebuilt, flags: i32) -> nix::Result<OwnedFd> {
    let born = match flags & (libc::O_ACCMODE | LARGE_FILE) {
        libc::O_RDONLY => pipe.ends[0].take(),
        libc::O_WRONLY => pipe.ends[1].take(),
        _ => None,
    };
    // O_DIRECT (packets) can be set on a pipe, not asked for when it is opened.
    let file = born.map_or_else(|| reopen::again(&pipe.anchor, flags & !libc::O_DIRECT), Ok)?;
    reopen::set_flags(&file, flags)?;
    Ok(file)
}

/// `O_LARGEFILE` as the kernel shows it: every file that was opened by a path has it, a born end of a pipe has not.
pub(super) const LARGE_FILE: i32 = 0o100000;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::testing::round_trip;

    fn all(from: &OwnedFd) -> Vec<Vec<u8>> {
        drain(from).unwrap()
    }

    #[test]
    fn contents_stay_in_the_old_pipe_and_come_back_in_the_new() {
        let (from, to) = pipe2(OFlag::O_NONBLOCK).unwrap();
        fcntl(&to, FcntlArg::F_SETPIPE_SZ(1 << 17)).unwrap();
        write(&to, &[7; 100_000]).unwrap();
        let (_, _, again) = round_trip(&[&to, &from], Console::None);
        for (end, other) in [(&from, &to), (&again[1], &again[0])] {
            assert_eq!(all(end).concat(), vec![7; 100_000]);
            assert_eq!(descriptor::flags(end).unwrap(), libc::O_NONBLOCK);
            assert_eq!(descriptor::flags(other).unwrap(), libc::O_WRONLY | libc::O_NONBLOCK);
            assert_eq!(fcntl(end, FcntlArg::F_GETPIPE_SZ).unwrap(), 1 << 17);
        }
        write(&again[0], b"on").unwrap();
        assert_eq!(all(&again[1]), [b"on"]);
    }

    #[test]
    fn packets_stay_packets() {
        let (from, to) = pipe2(OFlag::O_NONBLOCK | OFlag::O_DIRECT).unwrap();
        for piece in [&b"one"[..], b"three"] {
            write(&to, piece).unwrap();
        }
        let (_, _, again) = round_trip(&[&from, &to], Console::None);
        assert_eq!(all(&from), [&b"one"[..], b"three"]);
        assert_eq!(all(&again[0]), [&b"one"[..], b"three"]);
        assert_eq!(descriptor::flags(&again[1]).unwrap(), libc::O_WRONLY | libc::O_NONBLOCK | libc::O_DIRECT);
    }

    #[test]
    fn a_pipe_whose_writers_are_gone_is_at_its_end() {
        let (from, to) = pipe2(OFlag::empty()).unwrap();
        write(&to, b"last").unwrap();
        drop(to);
        let (_, _, again) = round_trip(&[&from], Console::None);
        let mut buffer = [0; 9];
        assert_eq!(read(&again[0], &mut buffer).unwrap(), 4);
        crate::files::testing::wait_for_hangup(&again[0]);
        assert_eq!(read(&again[0], &mut buffer).unwrap(), 0);
    }

    #[test]
    fn descriptions_are_shared_as_they_were() {
        let (from, to) = pipe2(OFlag::empty()).unwrap();
        let second = reopen::again(&to, libc::O_WRONLY).unwrap();
        let (ids, states, again) = round_trip(&[&from, &from, &to, &second], Console::None);
        assert_eq!(ids[0], ids[1]);
        assert_ne!(ids[2], ids[3]);
        assert_eq!(states.len(), 3);
        assert_eq!(descriptor::flags(&again[3]).unwrap(), descriptor::flags(&second).unwrap());
    }
}
