//! `io_uring`: rings that are looked at, made, and counted up. Nothing is asked of them but requests that do nothing.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};

use super::check;

/// Offsets of `mmap(2)`: both queues but for the requests, and the requests.
pub const QUEUES: u64 = 0;
/// See [`QUEUES`].
pub const REQUESTS: u64 = 0x1000_0000;

/// Bytes of a request.
pub const REQUEST: usize = 64;
/// Bytes of an answer.
pub const ANSWER: usize = 16;

/// What `io_uring_setup(2)` is asked for and answers (`struct io_uring_params`).
const PARAMETERS: usize = 30;
const SETUP_CQSIZE: u32 = 1 << 3;
const REGISTER_EVENTFD: u32 = 4;

/// How a ring can have been set up so that nothing else of it is different: answers are polled for (`IORING_SETUP_IOPOLL`,
/// `…_HYBRID_IOPOLL`), it goes on behind a request that fails at once (`…_SUBMIT_ALL`), work is put off (`…_COOP_TASKRUN`) and
/// that is told (`…_TASKRUN_FLAG`).
pub const MANNERS: u32 = 1 | 1 << 7 | 1 << 8 | 1 << 9 | 1 << 17;
/// Requests or answers of twice the size: some (`IORING_SETUP_SQE_MIXED`, `…_CQE_MIXED`) or all (`…_SQE128`, `…_CQE32`).
pub const WIDE: u32 = 1 << 10 | 1 << 11 | 1 << 18 | 1 << 19;

/// Makes a ring with room for that many requests and answers; as many, or the kernel would round up. `manners` are some of
/// [`MANNERS`].
pub fn make((requests, answers): (u32, u32), manners: u32) -> io::Result<OwnedFd> {
    let mut parameters = [0u32; PARAMETERS];
    (parameters[1], parameters[2]) = (answers, SETUP_CQSIZE | manners);
    // SAFETY: the kernel reads and fills 120 bytes of ours.
    let number = check(unsafe { libc::syscall(libc::SYS_io_uring_setup, requests, parameters.as_mut_ptr()) })?;
    // SAFETY: the call made a new descriptor, which nobody else owns.
    let ring = unsafe { OwnedFd::from_raw_fd(number as i32) };
    match (parameters[0], parameters[1]) == (requests, answers) {
        true => Ok(ring),
        false => Err(io::Error::other("the kernel makes rings of other sizes")),
    }
}

/// Submits requests that lie in a ring (`io_uring_enter(2)`); how many were.
pub fn enter(ring: impl AsFd, requests: u32) -> io::Result<u64> {
    let number = ring.as_fd().as_raw_fd();
    // SAFETY: numbers only, and no signal mask.
    check(unsafe { libc::syscall(libc::SYS_io_uring_enter, number, requests, 0, 0, 0u64, 0u64) })
}

/// Whether an eventfd is told of the answers of a ring. Asked by registering none.
pub fn tells_an_eventfd(ring: impl AsFd) -> io::Result<bool> {
    let none = -1i32;
    match register(ring, REGISTER_EVENTFD, (&raw const none).cast()) {
        Err(e) if e.raw_os_error() == Some(libc::EBADF) => Ok(false),
        Err(e) if e.raw_os_error() == Some(libc::EBUSY) => Ok(true),
        Err(e) => Err(e),
        Ok(_) => Err(io::Error::other("no eventfd was taken for one")),
    }
}

/// One thing of that kind; the kernel may write where `argument` leads.
fn register(ring: impl AsFd, what: u32, argument: *const libc::c_void) -> io::Result<u64> {
    let number = ring.as_fd().as_raw_fd();
    // SAFETY: the callers pass memory of theirs that is as long as the kernel's structure for `what`.
    check(unsafe { libc::syscall(libc::SYS_io_uring_register, number, what, argument, 1) })
}

/// Memory that a ring shares with whoever maps it.
pub struct Area {
    start: *mut u8,
    length: usize,
}

impl Area {
    /// Whether a ring has so many bytes of it: some kernels let more be mapped, of which the rest is not there.
    pub fn is_as_long(ring: impl AsFd, offset: u64, length: usize) -> bool {
        const PAGE: usize = 4096;
        let Ok(area) = Area::map(ring, offset, length) else { return false };
        let mut is_there = 0u8;
        let last = length.saturating_sub(1) / PAGE * PAGE;
        // SAFETY: the page lies in the mapping; the kernel writes one byte of ours.
        let asked = unsafe { libc::mincore(area.start.add(last).cast(), PAGE, &raw mut is_there) };
        asked == 0 && is_there & 1 != 0
    }

    /// Maps it; EINVAL, perhaps, if it is not as long.
    pub fn map(ring: impl AsFd, offset: u64, length: usize) -> io::Result<Area> {
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        let number = ring.as_fd().as_raw_fd();
        // SAFETY: a new mapping at an address of the kernel's choice, to which nothing else refers.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), length, protection, flags, number, offset as i64) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Area { start: start.cast(), length })
    }

    /// A copy of what is there.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.length];
        // SAFETY: both are `length` bytes, and only one is shared; whoever writes meanwhile is the kernel or a process of
        // the pod, and a copy of what is half written is told by its counters.
        unsafe { std::ptr::copy_nonoverlapping(self.start, bytes.as_mut_ptr(), self.length) };
        bytes
    }

    /// Writes from its beginning on, as much as there is room for.
    pub fn write(&self, bytes: &[u8]) {
        let length = bytes.len().min(self.length);
        // SAFETY: both are at least `length` bytes; no reference leads into the mapping.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.start, length) };
    }

    /// A counter of the ring.
    pub fn counter(&self, at: usize) -> Option<&AtomicU32> {
        let fits = at.is_multiple_of(4) && at + 4 <= self.length;
        // SAFETY: it lies in the mapping, which lives as long as `self`, and is aligned; the kernel, too, changes it
        // atomically.
        fits.then(|| unsafe { AtomicU32::from_ptr(self.start.add(at).cast()) })
    }

    /// Sets a counter, after all that was written before.
    pub fn set(&self, at: usize, value: u32) {
        if let Some(counter) = self.counter(at) {
            counter.store(value, Ordering::Release);
        }
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: the mapping made above, to which nothing refers any more.
        unsafe { libc::munmap(self.start.cast(), self.length) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_ring_has_nothing() {
        let ring = make((8, 32), 0).unwrap();
        assert!(!tells_an_eventfd(&ring).unwrap());
        assert_eq!(enter(&ring, 0).unwrap(), 0);
        let area = Area::map(&ring, QUEUES, 4096).unwrap();
        assert_eq!(area.bytes()[..16], [0; 16]);
        assert!(Area::is_as_long(&ring, QUEUES, 4096) && !Area::is_as_long(&ring, QUEUES, 8192));
        assert!(Area::is_as_long(make((64, 256), 0).unwrap(), QUEUES, 8192));
        assert!(make((7, 32), 0).is_err());
    }
}
