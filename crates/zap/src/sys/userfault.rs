//! `userfaultfd(2)` in asynchronous write-protect mode (Linux 6.7): the kernel notes writes, nobody waits.
//!
//! The descriptor is made by the process that is followed; its ioctls work from outside.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};

use super::check;

/// Flags for `userfaultfd(2)`: close-on-exec, and only faults of user mode, which needs no privilege. Writes by the kernel
/// are noted nevertheless: in asynchronous mode nobody is asked.
pub const FLAGS: i32 = libc::O_CLOEXEC | libc::O_NONBLOCK | 1;

const API: u64 = 0xaa;
const FEATURE_WP_ASYNC: u64 = 1 << 15;
const MODE_WP: u64 = 1 << 1;
/// `_IOWR(0xAA, 0x3F, struct uffdio_api)`
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
/// `_IOWR(0xAA, 0x00, struct uffdio_register)`
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;

/// Agrees with the kernel on asynchronous write protection.
pub fn begin(userfault: impl AsFd) -> io::Result<()> {
    // struct uffdio_api: api, features, ioctls
    let mut argument = [API, FEATURE_WP_ASYNC, 0];
    // SAFETY: the kernel reads and writes three words, which outlive the call.
    let result = unsafe { libc::ioctl(userfault.as_fd().as_raw_fd(), UFFDIO_API, argument.as_mut_ptr()) };
    check(result.into()).map(drop)
}

/// Follows writes to a range, which lies in one mapping.
pub fn register(userfault: impl AsFd, range: &Range<u64>) -> io::Result<()> {
    // struct uffdio_register: start, len, mode, ioctls
    let mut argument = [range.start, range.end - range.start, MODE_WP, 0];
    // SAFETY: the kernel reads and writes four words, which outlive the call; the addresses are the other process's.
    let result = unsafe { libc::ioctl(userfault.as_fd().as_raw_fd(), UFFDIO_REGISTER, argument.as_mut_ptr()) };
    check(result.into()).map(drop)
}
