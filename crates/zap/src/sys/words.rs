//! Words in a file in memory that several processes, one after the other, write to and read.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

/// The beginning of a file, mapped shared: what one process has written is there for the next, however the first ended.
pub struct SharedWords {
    start: NonNull<AtomicU64>,
    count: usize,
}

// SAFETY: it is memory that belongs to nobody else here, and all access is atomic.
unsafe impl Send for SharedWords {}

impl SharedWords {
    /// The first `count` words of a file in memory (`memfd_create(2)`), which is made as long as that if it is shorter.
    /// Nobody may shorten it later.
    pub fn map(file: &File, count: usize) -> io::Result<SharedWords> {
        let length = count.checked_mul(8).ok_or(io::ErrorKind::InvalidInput)?;
        if file.metadata()?.len() < length as u64 {
            file.set_len(length as u64)?;
        }
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice; nothing refers to it yet.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), length, protection, libc::MAP_SHARED, file.as_raw_fd(), 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(SharedWords { start, count })
    }

    /// All of them.
    pub fn all(&self) -> &[AtomicU64] {
        // SAFETY: so many words are mapped, aligned to a page, for as long as `self` lives, and any bits are a word.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.count) }
    }
}

impl Drop for SharedWords {
    fn drop(&mut self) {
        // SAFETY: the mapping that `map` made; what borrowed from it borrowed `self`.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.count * 8) };
    }
}
