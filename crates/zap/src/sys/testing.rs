//! What tests do to their own memory.

use std::io;

use super::check;

/// `mmap(2)`; anonymous without a file.
pub(crate) fn map(length: usize, protection: i32, flags: i32, file: Option<i32>) -> u64 {
    let anonymous = if file.is_none() { libc::MAP_ANONYMOUS } else { 0 };
    let file = file.unwrap_or(-1);
    // SAFETY: a new mapping at an address of the kernel's choice; nothing refers to it.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), length, protection, flags | anonymous, file, 0) };
    assert_ne!(start, libc::MAP_FAILED, "{}", io::Error::last_os_error());
    start as u64
}

/// Writes a byte to the start of a page made by [`map`].
pub(crate) fn poke(address: u64, byte: u8) {
    // SAFETY: the tests write to mappings of their own only, made by `map` and writable.
    unsafe { (address as *mut u8).write_volatile(byte) }
}

/// A call with three arguments on memory made by [`map`]: `madvise`, `mprotect`, `munmap`, `mlock2`.
pub(crate) fn over(number: libc::c_long, address: u64, length: usize, argument: i32) {
    // SAFETY: the memory is the test's own and nothing refers to it.
    check(unsafe { libc::syscall(number, address, length, argument) }).unwrap();
}

/// `fork(2)`; the child does system calls only.
pub(crate) fn fork() -> i32 {
    // SAFETY: the child touches its own memory and makes plain system calls until it ends.
    unsafe { libc::fork() }
}

/// Ends a forked child at once.
pub(crate) fn exit() -> ! {
    // SAFETY: ends the process without running anything.
    unsafe { libc::_exit(0) }
}

/// The alternate stack of this thread: address, flags, size.
pub(crate) fn alternate_stack() -> [u64; 3] {
    // SAFETY: nothing is set, and the kernel fills in a structure that is ours; zeros are valid.
    let stack = unsafe {
        let mut stack: libc::stack_t = std::mem::zeroed();
        check(libc::sigaltstack(std::ptr::null(), &raw mut stack).into()).unwrap();
        stack
    };
    [stack.ss_sp as u64, stack.ss_flags as u64, stack.ss_size as u64]
}

/// What this thread has the kernel clear when it ends (`set_tid_address(2)`).
pub(crate) fn clear_tid() -> u64 {
    const PR_GET_TID_ADDRESS: i32 = 40;
    let mut address = 0u64;
    // SAFETY: the kernel writes one word, which is ours.
    check(unsafe { libc::prctl(PR_GET_TID_ADDRESS, &raw mut address, 0u64, 0u64, 0u64) }.into()).unwrap();
    address
}
