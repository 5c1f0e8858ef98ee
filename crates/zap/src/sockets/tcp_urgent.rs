//! Urgent data that was written to a TCP connection and not acknowledged. The kernel shows nobody up to where it is urgent, but
//! by its memory.

use std::io;
use std::os::fd::BorrowedFd;

use crate::kernel;
use crate::sys::socket;

/// Where it is in the kernel's record of a connection (`struct tcp_sock`).
const UNTIL: &str = "tcp_sock.snd_up";

/// Has what takes time done ahead of the hold, if anything is in the send queue.
pub(super) fn prepare(fd: BorrowedFd<'_>) {
    if socket::ioctl_int(fd, libc::TIOCOUTQ).unwrap_or(0) > 0 {
        drop(kernel::reader());
    }
}

/// How many of the `length` bytes of the send queue, which begins with sequence number `from`, are urgent: the last of them is
/// what is received out of band. None, too, where the kernel's memory cannot be read.
pub(super) fn written(fd: BorrowedFd<'_>, from: u32, length: u32) -> io::Result<Option<u32>> {
    if length == 0 {
        return Ok(None);
    }
    let Ok(mut kernel) = kernel::reader() else { return Ok(None) };
    if !kernel.has(UNTIL) {
        return Ok(None);
    }
    let connection = kernel.socket(fd)?;
    let urgent = kernel.word(connection, UNTIL)?.wrapping_sub(from);
    // Where nothing is, it is the first byte that is not acknowledged, or one before it.
    Ok((1..=length).contains(&urgent).then_some(urgent))
}

/// Writes the last byte of urgent data into the send queue. In repair mode that is selected.
pub(super) fn write(fd: BorrowedFd<'_>, byte: &[u8]) -> io::Result<()> {
    socket::send(fd, byte, libc::MSG_OOB | libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL).map(drop)
}
