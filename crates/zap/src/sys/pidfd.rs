//! Process file descriptors: a handle on a process, and copies of its files.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use super::check;
use crate::ids::HostPid;

/// A handle on a process, and a way to copy its files.
#[derive(Debug)]
pub struct PidFd(OwnedFd);

impl PidFd {
    /// Opens a handle on the process `pid`, or on a thread that stands for its process.
    pub fn open(pid: HostPid) -> io::Result<PidFd> {
        // Kernels say ENOENT, or EINVAL, of a thread that is not its process's first (PIDFD_THREAD is O_EXCL).
        match PidFd::open_as(pid, 0) {
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::EINVAL)) => {
                PidFd::open_as(pid, libc::O_EXCL).map(PidFd)
            }
            other => other.map(PidFd),
        }
    }

    /// Opens a handle with these flags of `pidfd_open(2)`.
    pub fn open_as(pid: HostPid, flags: i32) -> io::Result<OwnedFd> {
        // SAFETY: numbers only; on success the result is a fresh descriptor that nobody else owns.
        let fd = check(unsafe { libc::syscall(libc::SYS_pidfd_open, pid.0, flags) })?;
        // SAFETY: as above.
        Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
    }

    /// A copy of its descriptor `number`: the same open file description (offset and flags are shared).
    pub fn get(&self, number: i32) -> io::Result<OwnedFd> {
        // SAFETY: numbers only; the result is a fresh descriptor (close-on-exec) that nobody else owns.
        let fd = check(unsafe { libc::syscall(libc::SYS_pidfd_getfd, self.0.as_raw_fd(), number, 0) })?;
        // SAFETY: as above.
        Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
    }

    /// Sends a signal.
    pub fn signal(&self, signal: i32) -> io::Result<()> {
        // SAFETY: numbers and a null siginfo, which asks for the default one.
        check(unsafe { libc::syscall(libc::SYS_pidfd_send_signal, self.0.as_raw_fd(), signal, 0, 0) }).map(drop)
    }
}

impl AsRawFd for PidFd {
    fn as_raw_fd(&self) -> i32 {
        self.0.as_raw_fd()
    }
}

impl From<OwnedFd> for PidFd {
    /// A handle that somebody else has opened.
    fn from(handle: OwnedFd) -> PidFd {
        PidFd(handle)
    }
}

/// How the process of a handle ended, as `wait` tells it, once it is reaped; kernels before 6.15 do not say.
pub fn exit_status(handle: impl AsFd) -> Option<i32> {
    /// `_IOWR(0xff, 11, struct pidfd_info)` of its first version: eight words.
    const PIDFD_GET_INFO: libc::c_ulong = 0xc040_ff0b;
    const PIDFD_INFO_EXIT: u64 = 1 << 3;
    // The mask comes first; the last four bytes are the status.
    let mut info = [0u64; 8];
    info[0] = PIDFD_INFO_EXIT;
    let fd = handle.as_fd().as_raw_fd();
    // SAFETY: the kernel fills as many bytes as the number of the call says, which the array has.
    check(unsafe { libc::ioctl(fd, PIDFD_GET_INFO, info.as_mut_ptr()) } as libc::c_long).ok()?;
    (info[0] & PIDFD_INFO_EXIT != 0).then_some((info[7] >> 32) as i32)
}

impl std::os::fd::AsFd for PidFd {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}
