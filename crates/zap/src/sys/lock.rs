//! Locks and owners of open files.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use super::check;

/// `flock(2)`, never waiting.
pub fn flock(file: impl AsFd, exclusive: bool) -> io::Result<()> {
    let operation = libc::LOCK_NB | if exclusive { libc::LOCK_EX } else { libc::LOCK_SH };
    // SAFETY: numbers only.
    check(unsafe { libc::flock(file.as_fd().as_raw_fd(), operation) } as libc::c_long).map(drop)
}

/// A lock of a range as `fcntl(2)` takes it; a length of 0 reaches to the end of the file.
pub fn range(write: bool, start: u64, length: u64) -> libc::flock {
    libc::flock {
        l_type: if write { libc::F_WRLCK } else { libc::F_RDLCK } as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start as i64,
        l_len: length as i64,
        l_pid: 0,
    }
}

/// A lock of a range that belongs to the open file description (`F_OFD_SETLK`).
pub fn lock_range(file: impl AsFd, write: bool, start: u64, length: u64) -> io::Result<()> {
    let lock = range(write, start, length);
    let fd = file.as_fd().as_raw_fd();
    // SAFETY: the kernel reads one struct flock that outlives the call.
    check(unsafe { libc::fcntl(fd, libc::F_OFD_SETLK, &raw const lock) } as libc::c_long).map(drop)
}

/// Whether anybody else has locked a range of a file, whichever: asked on behalf of a lock that is not taken.
pub fn is_locked(file: impl AsFd) -> bool {
    let mut lock = range(true, 0, 0);
    // SAFETY: the kernel reads and writes one struct flock that outlives the call.
    let asked = unsafe { libc::fcntl(file.as_fd().as_raw_fd(), libc::F_GETLK, &raw mut lock) };
    asked == 0 && lock.l_type != libc::F_UNLCK as libc::c_short
}

/// Takes a lease (`F_SETLEASE`): `F_RDLCK` or `F_WRLCK`.
pub fn lease(file: impl AsFd, kind: i32) -> io::Result<()> {
    // SAFETY: numbers only.
    check(unsafe { libc::fcntl(file.as_fd().as_raw_fd(), libc::F_SETLEASE, kind) } as libc::c_long).map(drop)
}

/// `struct f_owner_ex`.
#[repr(C)]
struct OwnerEx {
    kind: libc::c_int,
    pid: libc::pid_t,
}

const F_SETOWN_EX: i32 = 15;
const F_GETOWN_EX: i32 = 16;

/// Who gets the signals of a file: (0 thread, 1 process, 2 process group; its ID as the caller sees it, or 0).
pub fn owner(file: impl AsFd) -> io::Result<(i32, i32)> {
    let mut owner = OwnerEx { kind: 0, pid: 0 };
    // SAFETY: the kernel fills one struct f_owner_ex of ours.
    check(unsafe { libc::fcntl(file.as_fd().as_raw_fd(), F_GETOWN_EX, &raw mut owner) } as libc::c_long)?;
    Ok((owner.kind, owner.pid))
}

/// Sets who gets the signals of a file.
pub fn set_owner(file: impl AsFd, kind: i32, pid: i32) -> io::Result<()> {
    let owner = OwnerEx { kind, pid };
    // SAFETY: the kernel reads one struct f_owner_ex that outlives the call.
    check(unsafe { libc::fcntl(file.as_fd().as_raw_fd(), F_SETOWN_EX, &raw const owner) } as libc::c_long).map(drop)
}

const F_SETSIG: i32 = 10;
const F_GETSIG: i32 = 11;

/// The signal that a file sends in place of SIGIO, or 0.
pub fn signal(file: impl AsFd) -> io::Result<i32> {
    // SAFETY: numbers only.
    check(unsafe { libc::fcntl(file.as_fd().as_raw_fd(), F_GETSIG) } as libc::c_long).map(|s| s as i32)
}

/// Sets the signal that a file sends in place of SIGIO.
pub fn set_signal(file: impl AsFd, signal: i32) -> io::Result<()> {
    // SAFETY: numbers only.
    check(unsafe { libc::fcntl(file.as_fd().as_raw_fd(), F_SETSIG, signal) } as libc::c_long).map(drop)
}

/// A lock as the bytes that the kernel reads.
pub fn bytes(lock: &libc::flock) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(size_of::<libc::flock>());
    bytes.extend(lock.l_type.to_ne_bytes());
    bytes.extend(lock.l_whence.to_ne_bytes());
    bytes.resize(std::mem::offset_of!(libc::flock, l_start), 0);
    bytes.extend(lock.l_start.to_ne_bytes());
    bytes.extend(lock.l_len.to_ne_bytes());
    bytes.extend(lock.l_pid.to_ne_bytes());
    bytes.resize(size_of::<libc::flock>(), 0);
    bytes
}
