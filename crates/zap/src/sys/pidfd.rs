//! Process file descriptors: a handle on a process, and copies of its files.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::check;
use crate::ids::HostPid;

/// A handle on a process, and a way to copy its files.
#[derive(Debug)]
pub struct PidFd(OwnedFd);

impl PidFd {
    /// Opens a handle on the process `pid`.
    pub fn open(pid: HostPid) -> io::Result<PidFd> {
        // SAFETY: numbers only; on success the result is a fresh descriptor that nobody else owns.
        let fd = check(unsafe { libc::syscall(libc::SYS_pidfd_open, pid.0, 0) })?;
        // SAFETY: as above.
        Ok(PidFd(unsafe { OwnedFd::from_raw_fd(fd as i32) }))
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

impl std::os::fd::AsFd for PidFd {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}
