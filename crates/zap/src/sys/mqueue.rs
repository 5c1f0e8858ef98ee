//! POSIX message queues, in the IPC namespace of the calling thread.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use super::check;

/// What a queue may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Limits {
    /// Messages.
    pub messages: u64,
    /// Bytes of a message.
    pub bytes: u64,
}

fn c_name(name: &[u8]) -> io::Result<CString> {
    Ok(CString::new(name)?)
}

/// Opens the queue of that name, which has no slash. The kernel keeps all of `flags` as the description's, `O_CLOEXEC` too;
/// the descriptor is closed by exec in any case.
pub fn open(name: &[u8], flags: i32) -> io::Result<OwnedFd> {
    let name = c_name(name)?;
    // SAFETY: the name ends with a NUL and outlives the call.
    let number = check(unsafe { libc::syscall(libc::SYS_mq_open, name.as_ptr(), flags, 0, 0) })?;
    // SAFETY: a new descriptor, which nobody else owns.
    let queue = unsafe { OwnedFd::from_raw_fd(number as i32) };
    nix::fcntl::fcntl(&queue, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))?;
    Ok(queue)
}

/// Makes a queue of that name, to read and write.
pub fn make(name: &[u8], limits: Limits) -> io::Result<OwnedFd> {
    let name = c_name(name)?;
    let flags = libc::O_CREAT | libc::O_EXCL | libc::O_RDWR | libc::O_CLOEXEC;
    // struct mq_attr: flags, messages, bytes, messages now, and four that are reserved.
    let attributes = [0, limits.messages, limits.bytes, 0, 0, 0, 0, 0];
    // SAFETY: name and attributes outlive the call; the kernel reads eight words.
    let number = check(unsafe { libc::syscall(libc::SYS_mq_open, name.as_ptr(), flags, 0o600, attributes.as_ptr()) })?;
    // SAFETY: a new descriptor, which nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(number as i32) })
}

/// Takes a name away.
pub fn unlink(name: &[u8]) -> io::Result<()> {
    let name = c_name(name)?;
    // SAFETY: the name ends with a NUL and outlives the call.
    check(unsafe { libc::syscall(libc::SYS_mq_unlink, name.as_ptr()) }).map(drop)
}

/// What a queue may hold, and how many messages it holds.
pub fn facts(queue: impl AsFd) -> io::Result<(Limits, u64)> {
    let mut attributes = [0u64; 8];
    let fd = queue.as_fd().as_raw_fd();
    // SAFETY: the kernel writes eight words, which the array has.
    check(unsafe { libc::syscall(libc::SYS_mq_getsetattr, fd, 0, attributes.as_mut_ptr()) })?;
    Ok((Limits { messages: attributes[1], bytes: attributes[2] }, attributes[3]))
}

/// A message: priority and bytes.
pub type Message = (u32, Vec<u8>);

/// Sends a message, if there is room.
pub fn send(queue: impl AsFd, priority: u32, bytes: &[u8]) -> io::Result<()> {
    let fd = queue.as_fd().as_raw_fd();
    let at_once = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    let (address, length) = (bytes.as_ptr(), bytes.len());
    // SAFETY: the kernel reads as many bytes as there are, and a timespec.
    check(unsafe { libc::syscall(libc::SYS_mq_timedsend, fd, address, length, priority, &raw const at_once) }).map(drop)
}

/// What is in a queue that holds `count` messages and that nobody else uses meanwhile.
///
/// The kernel lets nobody look without taking. It is taken and sent again at once, by a child that goes on with that even if
/// the caller is killed.
pub fn peek(queue: impl AsFd, count: usize, limits: Limits) -> io::Result<Vec<Message>> {
    if count == 0 {
        return Ok(Vec::new());
    }
    let most = limits.bytes as usize;
    // Priority and length, then the bytes.
    let slot = HEAD + most.next_multiple_of(8);
    let shared = Shared::new(slot * count)?;
    let fd = queue.as_fd().as_raw_fd();
    // SAFETY: without CLONE_VM the child has memory of its own, as after fork; it makes system calls only.
    let child = check(unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) })? as i32;
    if child == 0 {
        // SAFETY: the mapping has `count` slots, and is the child's alone until it ends; then the child ends.
        unsafe { libc::_exit(take_and_put_back(fd, shared.start, slot, count, most)) }
    }
    let mut status = 0;
    // SAFETY: the child is ours; the kernel writes one int.
    check(unsafe { libc::waitpid(child, &raw mut status, 0) }.into())?;
    match libc::WEXITSTATUS(status) {
        0 if libc::WIFEXITED(status) => {}
        errno if libc::WIFEXITED(status) => return Err(io::Error::from_raw_os_error(errno)),
        _ => return Err(io::Error::other("the child that reads the queue died")),
    }
    // SAFETY: the mapping is that long, the child has ended, and nobody writes to it any more.
    let bytes = unsafe { std::slice::from_raw_parts(shared.start.cast_const(), slot * count) };
    let word = |slot: &[u8], at| slot[at..at + 4].iter().rev().fold(0u32, |sum, byte| sum << 8 | u32::from(*byte));
    let message = |slot: &[u8]| (word(slot, 0), slot[HEAD..HEAD + (word(slot, 4) as usize).min(most)].to_vec());
    Ok(bytes.chunks(slot).map(message).collect())
}

const HEAD: usize = 8;

/// The work of the child: system calls only. Zero, or an error number.
///
/// # Safety
///
/// `start` is that of `count` slots of `slot` bytes, aligned to words, that nobody else uses.
unsafe fn take_and_put_back(fd: i32, start: *mut u8, slot: usize, count: usize, most: usize) -> i32 {
    let at_once = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    let at = &raw const at_once;
    // SAFETY: errno is this process's own.
    let errno = || unsafe { *libc::__errno_location() };
    let (mut taken, mut failed) = (0, 0);
    while taken < count && failed == 0 {
        // SAFETY: as the caller promises; the kernel writes a word and at most `most` bytes.
        unsafe {
            let head = start.add(taken * slot);
            let length = libc::syscall(libc::SYS_mq_timedreceive, fd, head.add(HEAD), most, head.cast::<u32>(), at);
            match length {
                ..0 => failed = errno(),
                length => {
                    head.cast::<u32>().add(1).write(length as u32);
                    taken += 1;
                }
            }
        }
    }
    for number in 0..taken {
        // SAFETY: as above; the slot was filled.
        unsafe {
            let head = start.add(number * slot);
            let (priority, length) = (head.cast::<u32>().read(), head.cast::<u32>().add(1).read());
            if libc::syscall(libc::SYS_mq_timedsend, fd, head.add(HEAD), length as usize, priority, at) < 0 {
                failed = errno();
            }
        }
    }
    failed
}

/// Memory that a child writes to.
struct Shared {
    start: *mut u8,
    length: usize,
}

impl Shared {
    fn new(length: usize) -> io::Result<Shared> {
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping wherever there is room.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), length, protection, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            Err(io::Error::last_os_error())
        } else {
            Ok(Shared { start: start.cast(), length })
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nobody refers to it any more.
        unsafe { libc::munmap(self.start.cast(), self.length) };
    }
}
