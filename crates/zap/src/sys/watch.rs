//! inotify and fanotify, and the file handles by which its `fdinfo` names what is watched.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::check;

/// `inotify_init1(2)`, non-blocking.
pub fn inotify() -> io::Result<OwnedFd> {
    // SAFETY: numbers only.
    let number = check(unsafe { libc::inotify_init1(libc::IN_CLOEXEC | libc::IN_NONBLOCK) } as libc::c_long)?;
    // SAFETY: a new descriptor, which nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(number as i32) })
}

/// `inotify_add_watch(2)`: the number of the watch.
pub fn add_watch(inotify: impl AsFd, path: &Path, mask: u32) -> io::Result<i32> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let fd = inotify.as_fd().as_raw_fd();
    // SAFETY: the path ends with a NUL and outlives the call.
    check(unsafe { libc::inotify_add_watch(fd, path.as_ptr(), mask) } as libc::c_long).map(|wd| wd as i32)
}

/// `inotify_rm_watch(2)`.
pub fn remove_watch(inotify: impl AsFd, watch: i32) -> io::Result<()> {
    // SAFETY: numbers only.
    check(unsafe { libc::inotify_rm_watch(inotify.as_fd().as_raw_fd(), watch) } as libc::c_long).map(drop)
}

/// The number that the next watch gets, if it is free (`INOTIFY_IOC_SETNEXTWD`).
pub fn set_next_watch(inotify: impl AsFd, number: i32) -> io::Result<()> {
    /// `_IOW('I', 0, __s32)`.
    const INOTIFY_IOC_SETNEXTWD: libc::c_ulong = 0x4004_4900;
    let fd = inotify.as_fd().as_raw_fd();
    // SAFETY: the kernel takes the number itself, not an address.
    check(unsafe { libc::ioctl(fd, INOTIFY_IOC_SETNEXTWD, libc::c_ulong::from(number as u32)) } as libc::c_long)
        .map(drop)
}

/// `fanotify_init(2)`, non-blocking.
pub fn fanotify(kind: u32, event_flags: u32) -> io::Result<OwnedFd> {
    let kind = kind | libc::FAN_CLOEXEC | libc::FAN_NONBLOCK;
    // SAFETY: numbers only.
    let number = check(unsafe { libc::fanotify_init(kind, event_flags) } as libc::c_long)?;
    // SAFETY: a new descriptor, which nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(number as i32) })
}

/// `fanotify_mark(2)`.
pub fn mark(group: impl AsFd, flags: u32, mask: u64, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let fd = group.as_fd().as_raw_fd();
    // SAFETY: the path ends with a NUL and outlives the call.
    let marked = unsafe { libc::fanotify_mark(fd, flags, mask, libc::AT_FDCWD, path.as_ptr()) };
    check(marked as libc::c_long).map(drop)
}

/// Reads events of a fanotify group into `room` bytes and throws them away, with the descriptors in them: how many there were.
pub fn drop_events(group: impl AsFd, room: usize) -> io::Result<usize> {
    /// `FAN_EVENT_INFO_TYPE_PIDFD`
    const PIDFD: u8 = 4;
    let mut buffer = vec![0; room];
    let read = match nix::unistd::read(group.as_fd(), &mut buffer) {
        Ok(read) => read,
        Err(error @ (nix::Error::EINVAL | nix::Error::EAGAIN)) => return Err(error.into()),
        // The file of one event cannot be opened that way: the event is gone all the same.
        Err(_) => return Ok(1),
    };
    let number =
        |at: usize| buffer.get(at..at + 4).and_then(|four| four.try_into().ok()).map_or(-1, i32::from_ne_bytes);
    let close = |number: i32| {
        if number >= 0 {
            // SAFETY: the kernel has just made it for this reader, and nobody else knows of it.
            drop(unsafe { OwnedFd::from_raw_fd(number) });
        }
    };
    let (mut at, mut events) = (0, 0);
    while at + 24 <= read {
        let length = number(at).max(24) as usize;
        close(number(at + 16));
        let mut info = at + 24;
        while info + 4 <= (at + length).min(read) {
            if buffer[info] == PIDFD {
                close(number(info + 4));
            }
            info += usize::from(u16::from_ne_bytes([buffer[info + 2], buffer[info + 3]])).max(4);
        }
        at += length;
        events += 1;
    }
    Ok(events)
}

/// A handle on a file (`name_to_handle_at(2)`): its type, and its bytes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Handle {
    /// The file system's word for what the bytes are.
    pub kind: i32,
    /// What they are.
    pub bytes: Vec<u8>,
}

/// Opens (`O_PATH`) the file of a handle, on the file system of `mount`.
pub fn open_by_handle(mount: impl AsFd, handle: &Handle) -> io::Result<OwnedFd> {
    // struct file_handle: the length, the type, and the bytes behind them.
    let head = [(handle.bytes.len() as u32).to_ne_bytes(), handle.kind.to_ne_bytes()].concat();
    let bytes = [head, handle.bytes.clone()].concat();
    let mut words = vec![0u32; bytes.len().div_ceil(4)];
    for (word, chunk) in words.iter_mut().zip(bytes.chunks(4)) {
        let mut four = [0; 4];
        four[..chunk.len()].copy_from_slice(chunk);
        *word = u32::from_ne_bytes(four);
    }
    let fd = mount.as_fd().as_raw_fd();
    let flags = libc::O_PATH | libc::O_CLOEXEC;
    // SAFETY: the kernel reads as many bytes as the first word says, which are there, aligned as the struct is.
    let number = check(unsafe { libc::syscall(libc::SYS_open_by_handle_at, fd, words.as_ptr(), flags) })?;
    // SAFETY: a new descriptor, which nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(number as i32) })
}
