//! What the builder does to itself so that its seeds are ready to be used.

use std::io;
use std::ops::Range;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use super::check;

fn map(range: &Range<u64>) -> io::Result<()> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    let (start, length) = (range.start as *mut libc::c_void, (range.end - range.start) as usize);
    // SAFETY: MAP_FIXED_NOREPLACE replaces nothing; nobody has a reference into the new range.
    let got = unsafe { libc::mmap(start, length, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    match got {
        libc::MAP_FAILED => Err(io::Error::last_os_error()),
        got if got == start => Ok(()),
        _ => Err(io::Error::from_raw_os_error(libc::EEXIST)),
    }
}

/// Maps stub and scratch at addresses that nothing uses, and makes the stub executable.
pub fn prepare(code: &Range<u64>, scratch: &Range<u64>, stub: &[u8]) -> io::Result<()> {
    if stub.len() as u64 > code.end - code.start {
        return Err(io::Error::other("the stub does not fit"));
    }
    map(code)?;
    map(scratch)?;
    // SAFETY: the range was mapped readable and writable just now, is long enough, and nothing else refers to it.
    unsafe { std::ptr::copy_nonoverlapping(stub.as_ptr(), code.start as *mut u8, stub.len()) };
    let length = (code.end - code.start) as usize;
    // SAFETY: as above; no Rust value lives there.
    check(unsafe { libc::mprotect(code.start as *mut libc::c_void, length, libc::PROT_READ | libc::PROT_EXEC) }
        as libc::c_long)
    .map(drop)
}

/// Takes possession of a descriptor that the kernel has just given to us.
pub fn own(file: RawFd) -> OwnedFd {
    // SAFETY: the callers pass a number that they got from SCM_RIGHTS and that nobody else owns.
    unsafe { OwnedFd::from_raw_fd(file) }
}
