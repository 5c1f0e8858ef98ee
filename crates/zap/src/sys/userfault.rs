//! `userfaultfd(2)`, in two modes: asynchronous write protection (Linux 6.7), in which the kernel notes writes and nobody
//! waits, and missing pages, in which whoever touches one waits until it has come.
//!
//! The descriptor is made by the process whose memory it is about; its ioctls work from outside.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use super::check;

/// Flags for `userfaultfd(2)`: close-on-exec, and only faults of user mode, which needs no privilege. Writes by the kernel
/// are noted nevertheless: in asynchronous mode nobody is asked.
pub const FLAGS: i32 = libc::O_CLOEXEC | libc::O_NONBLOCK | 1;

/// Flags for `userfaultfd(2)` where missing pages are filled: the kernel, too, must wait for them. Needs CAP_SYS_PTRACE.
pub const FILLING: i32 = libc::O_CLOEXEC | libc::O_NONBLOCK;

const API: u64 = 0xaa;
const FEATURE_WP_ASYNC: u64 = 1 << 15;
const MODE_WP: u64 = 1 << 1;
/// UFFD_FEATURE_EVENT_FORK, _REMAP, _REMOVE, _UNMAP.
const FEATURES_OF_FILLING: u64 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6;
const MODE_MISSING: u64 = 1 << 0;
/// `_IOWR(0xAA, 0x03, struct uffdio_copy)`
const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;
/// `_IOWR(0xAA, 0x04, struct uffdio_zeropage)`
const UFFDIO_ZEROPAGE: libc::c_ulong = 0xc020_aa04;
/// `_IOR(0xAA, 0x01, struct uffdio_range)`
const UFFDIO_UNREGISTER: libc::c_ulong = 0x8010_aa01;
/// `_IOR(0xAA, 0x02, struct uffdio_range)`
const UFFDIO_WAKE: libc::c_ulong = 0x8010_aa02;
/// `_IOWR(0xAA, 0x3F, struct uffdio_api)`
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
/// `_IOWR(0xAA, 0x00, struct uffdio_register)`
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;

/// One for memory of our own.
pub fn own() -> io::Result<OwnedFd> {
    // SAFETY: numbers only.
    let number = check(unsafe { libc::syscall(libc::SYS_userfaultfd, FLAGS) })? as i32;
    // SAFETY: the kernel has only just made it for us, and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Agrees with the kernel on asynchronous write protection.
pub fn begin(userfault: impl AsFd) -> io::Result<()> {
    agree(userfault, FEATURE_WP_ASYNC)
}

/// Agrees with the kernel on filling missing pages, and on hearing of what the process does to its address space.
pub fn begin_filling(userfault: impl AsFd) -> io::Result<()> {
    agree(userfault, FEATURES_OF_FILLING)
}

fn agree(userfault: impl AsFd, features: u64) -> io::Result<()> {
    // struct uffdio_api: api, features, ioctls
    let mut argument = [API, features, 0];
    // SAFETY: the kernel reads and writes three words, which outlive the call.
    let result = unsafe { libc::ioctl(userfault.as_fd().as_raw_fd(), UFFDIO_API, argument.as_mut_ptr()) };
    check(result.into()).map(drop)
}

/// Follows writes to a range, which lies in one mapping.
pub fn register(userfault: impl AsFd, range: &Range<u64>) -> io::Result<()> {
    register_for(userfault, range, MODE_WP)
}

/// Ends what was registered of a range, whatever has become of it meanwhile. The descriptor can be used again.
pub fn unregister(userfault: impl AsFd, range: &Range<u64>) -> io::Result<()> {
    of_range(userfault, UFFDIO_UNREGISTER, range)
}

/// Whoever touches a page of this range that is not there waits from now on.
pub fn register_missing(userfault: impl AsFd, range: &Range<u64>) -> io::Result<()> {
    register_for(userfault, range, MODE_MISSING)
}

fn register_for(userfault: impl AsFd, range: &Range<u64>, mode: u64) -> io::Result<()> {
    // struct uffdio_register: start, len, mode, ioctls
    let mut argument = [range.start, range.end - range.start, mode, 0];
    // SAFETY: the kernel reads and writes four words, which outlive the call; the addresses are the other process's.
    let result = unsafe { libc::ioctl(userfault.as_fd().as_raw_fd(), UFFDIO_REGISTER, argument.as_mut_ptr()) };
    check(result.into()).map(drop)
}

/// Puts whole pages where none are, and wakes whoever waits for them. Returns how many bytes were put before the first
/// that could not be, and why that was: EEXIST, a page is there; EAGAIN, the address space is changing, and what is to be
/// read comes first; ENOENT, nothing of ours is mapped there; ESRCH, the address space is gone.
pub fn copy(userfault: impl AsFd, to: u64, pages: &[u8]) -> (u64, io::Result<()>) {
    let mut done = 0;
    while done < pages.len() as u64 {
        let from = pages.as_ptr() as u64 + done;
        // struct uffdio_copy: dst, src, len, mode, copy
        let mut argument = [to + done, from, pages.len() as u64 - done, 0, 0];
        // SAFETY: the kernel reads and writes five words, and reads `len` bytes from `src`: what is left of `pages`. The other
        // address is the other process's.
        let result = unsafe { libc::ioctl(userfault.as_fd().as_raw_fd(), UFFDIO_COPY, argument.as_mut_ptr()) };
        let copied = argument[4] as i64;
        done += copied.max(0) as u64;
        match check(result.into()) {
            Ok(_) => {}
            // Some were put: the next attempt says why no more were.
            Err(_) if copied > 0 => {}
            Err(error) => return (done, Err(error)),
        }
    }
    (done, Ok(()))
}

/// Has a page that is not there be zeros, and wakes whoever waits for it. Errors as [`copy`].
pub fn zero(userfault: impl AsFd, page: u64) -> io::Result<()> {
    // struct uffdio_zeropage: start, len, mode, zeropage
    let mut argument = [page, 4096, 0, 0];
    // SAFETY: the kernel reads and writes four words, which outlive the call.
    let result = unsafe { libc::ioctl(userfault.as_fd().as_raw_fd(), UFFDIO_ZEROPAGE, argument.as_mut_ptr()) };
    check(result.into()).map(drop)
}

/// Wakes whoever waits for a page.
pub fn wake(userfault: impl AsFd, page: u64) -> io::Result<()> {
    wake_all(userfault, &(page..page + 4096))
}

/// Wakes whoever waits for a page of this range: it tries again, and is heard of again if it still has to wait.
pub fn wake_all(userfault: impl AsFd, range: &Range<u64>) -> io::Result<()> {
    of_range(userfault, UFFDIO_WAKE, range)
}

fn of_range(userfault: impl AsFd, request: libc::c_ulong, range: &Range<u64>) -> io::Result<()> {
    // struct uffdio_range: start, len
    let mut argument = [range.start, range.end - range.start];
    // SAFETY: the kernel reads two words, which outlive the call; the addresses are the other process's.
    let result = unsafe { libc::ioctl(userfault.as_fd().as_raw_fd(), request, argument.as_mut_ptr()) };
    check(result.into()).map(drop)
}

/// What a process does to an address space that is being filled.
#[derive(Debug)]
pub enum Event {
    /// Somebody waits for the page at this address.
    Fault(u64),
    /// It forked: the child's address space, as it was at that moment, is heard of and filled through this.
    Fork(OwnedFd),
    /// `mremap(2)`: so many bytes were moved from one address to another.
    Remap {
        /// Where they were.
        from: u64,
        /// Where they are.
        to: u64,
        /// How many.
        length: u64,
    },
    /// What was in the range is gone (`MADV_DONTNEED` and its like): zeros from now on.
    Remove(Range<u64>),
    /// The range is mapped no more.
    Unmap(Range<u64>),
}

/// `struct uffd_msg`: an event, and three words.
pub type Message = [AtomicU64; 4];

/// Reads the next event, if there is one, into `message`, which must be zeros. The kernel lets whoever it is about go on as
/// soon as it is read: in memory that outlives us it is not lost with us.
pub fn read_event(userfault: impl AsFd, message: &Message) -> io::Result<Option<Event>> {
    let descriptor = userfault.as_fd().as_raw_fd();
    loop {
        // SAFETY: the kernel writes at most the 32 bytes of `message`, whose words may change at any time.
        let read = check(unsafe { libc::read(descriptor, message.as_ptr() as *mut _, 32) } as libc::c_long);
        match read {
            Ok(32) => {}
            Ok(_) => return Ok(None),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        }
        let words = message.each_ref().map(|word| word.load(Ordering::Relaxed));
        // SAFETY: with this event the kernel gives us a new descriptor, whose number it writes; nobody else has it.
        let fork = (words[0] as u8 == FORK).then(|| unsafe { OwnedFd::from_raw_fd(words[1] as u32 as i32) });
        match (fork, change(words)) {
            (Some(userfault), _) => return Ok(Some(Event::Fork(userfault))),
            (None, Some(event)) => return Ok(Some(event)),
            (None, None) => {}
        }
    }
}

/// `UFFD_EVENT_FORK`.
pub const FORK: u8 = 0x13;

/// What a message says; none if it is of a fork, or not known.
pub fn change([kind, a, b, c]: [u64; 4]) -> Option<Event> {
    match kind as u8 {
        0x12 => Some(Event::Fault(b & !4095)),
        0x14 => Some(Event::Remap { from: a, to: b, length: c }),
        0x15 => Some(Event::Remove(a..b)),
        0x16 => Some(Event::Unmap(a..b)),
        _ => None,
    }
}
