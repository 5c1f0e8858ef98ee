//! Small calls on files that no safe library covers the way they are needed here.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use super::check;

/// `fstat(2)`, whole.
pub fn fstat(file: impl AsFd) -> io::Result<libc::stat> {
    let mut stat = std::mem::MaybeUninit::<libc::stat>::zeroed();
    // SAFETY: the kernel fills the struct that we give it; all-zero is a valid value of it in any case.
    check(unsafe { libc::fstat(file.as_fd().as_raw_fd(), stat.as_mut_ptr()) } as libc::c_long)?;
    // SAFETY: zeroed, then filled.
    Ok(unsafe { stat.assume_init() })
}

/// Has reads and writes of a file (and of its duplicates) return rather than wait.
pub fn set_nonblocking(file: impl AsFd) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL)?);
    fcntl(&file, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

/// Opens a place without reading or writing it (`O_PATH`); follows the last link.
pub fn open_path(path: &std::path::Path) -> io::Result<OwnedFd> {
    let file = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_CLOEXEC).open(path)?;
    Ok(file.into())
}
