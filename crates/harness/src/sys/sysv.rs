//! System V objects, made and removed; and a question to a file.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;

const PRIVATE_MODE: i32 = 0o600;

nix::ioctl_read_bad!(bytes_ready, libc::FIONREAD, libc::c_int);

/// How many bytes can be read from `file` (`FIONREAD`).
pub fn readable_bytes(file: impl AsFd) -> io::Result<i32> {
    let mut bytes = 0;
    // SAFETY: the kernel writes one int to where `bytes` is.
    unsafe { bytes_ready(file.as_fd().as_raw_fd(), &raw mut bytes) }?;
    Ok(bytes)
}

/// Makes a segment of shared memory of a page, and removes it.
pub fn segment_and_gone() -> io::Result<()> {
    // SAFETY: it takes three numbers.
    let id = Errno::result(unsafe { libc::shmget(libc::IPC_PRIVATE, 4096, libc::IPC_CREAT | PRIVATE_MODE) })?;
    // SAFETY: a removal reads nothing through the pointer, which is null.
    Errno::result(unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) })?;
    Ok(())
}

/// Makes a set of one semaphore, and removes it.
pub fn semaphore_and_gone() -> io::Result<()> {
    // SAFETY: it takes three numbers.
    let id = Errno::result(unsafe { libc::semget(libc::IPC_PRIVATE, 1, libc::IPC_CREAT | PRIVATE_MODE) })?;
    // SAFETY: a removal takes no fourth argument.
    Errno::result(unsafe { libc::semctl(id, 0, libc::IPC_RMID) })?;
    Ok(())
}
