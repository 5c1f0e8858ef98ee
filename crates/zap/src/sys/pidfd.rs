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
        // SAFETY: numbers only; on success the result is a fresh descriptor that nobody else owns.
        let open = |flags: i32| check(unsafe { libc::syscall(libc::SYS_pidfd_open, pid.0, flags) });
        // Kernels say ENOENT, or EINVAL, of a thread that is not its process's first (PIDFD_THREAD is O_EXCL).
        let fd = match open(0) {
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::EINVAL)) => open(libc::O_EXCL)?,
            other => other?,
        };
        // SAFETY: as above.
        Ok(PidFd(unsafe { OwnedFd::from_raw_fd(fd as i32) }))
    }

    /// Opens a handle on a thread (Linux 6.9).
    pub fn of_thread(thread: HostPid) -> io::Result<PidFd> {
        // SAFETY: numbers only (PIDFD_THREAD is O_EXCL); on success the result is a fresh descriptor that nobody else owns.
        let fd = check(unsafe { libc::syscall(libc::SYS_pidfd_open, thread.0, libc::O_EXCL) })?;
        // SAFETY: as above.
        Ok(PidFd(unsafe { OwnedFd::from_raw_fd(fd as i32) }))
    }

    /// Who it is at the moment (Linux 6.13); fails once it has ended.
    pub fn identities(&self) -> io::Result<Identities> {
        const PIDFD_INFO_CREDS: u64 = 1 << 1;
        let info = info(self, PIDFD_INFO_CREDS)?;
        if info[0] & PIDFD_INFO_CREDS == 0 {
            return Err(io::ErrorKind::Unsupported.into());
        }
        // Behind mask and cgroup: three numbers, then user and group of each sort.
        let half = |at: usize| (info[2 + at / 2] >> (32 * (at % 2))) as u32;
        let pair = |at: usize| (half(at), half(at + 1));
        Ok(Identities { real: pair(3), effective: pair(5), saved: pair(7), file: pair(9) })
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

/// User and group of a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identities {
    /// The real ones.
    pub real: (u32, u32),
    /// The effective ones.
    pub effective: (u32, u32),
    /// The saved ones.
    pub saved: (u32, u32),
    /// Those for the file system.
    pub file: (u32, u32),
}

/// `struct pidfd_info` of its first version, for which `mask` asks.
fn info(handle: impl AsFd, mask: u64) -> io::Result<[u64; 8]> {
    /// `_IOWR(0xff, 11, struct pidfd_info)`: eight words.
    const PIDFD_GET_INFO: libc::c_ulong = 0xc040_ff0b;
    let mut info = [0u64; 8];
    info[0] = mask;
    let fd = handle.as_fd().as_raw_fd();
    // SAFETY: the kernel fills as many bytes as the number of the call says, which the array has.
    check(unsafe { libc::ioctl(fd, PIDFD_GET_INFO, info.as_mut_ptr()) } as libc::c_long)?;
    Ok(info)
}

/// How the process of a handle ended, as `wait` tells it, once it is reaped; kernels before 6.15 do not say.
pub fn exit_status(handle: impl AsFd) -> Option<i32> {
    const PIDFD_INFO_EXIT: u64 = 1 << 3;
    let info = info(handle, PIDFD_INFO_EXIT).ok()?;
    // The mask comes first; the last four bytes are the status.
    (info[0] & PIDFD_INFO_EXIT != 0).then_some((info[7] >> 32) as i32)
}

impl std::os::fd::AsFd for PidFd {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}
