//! Raw calls. This is a test program: it makes system calls whose results it writes down, most of which no safe wrapper
//! lets through as they are.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};

use super::board::Board;

/// The board, in memory that all processes share.
pub(crate) fn share_board() -> &'static Board {
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
    // SAFETY: a fresh mapping, zero-filled, never unmapped; zeros are a valid board, which consists of atomics only.
    unsafe {
        let at = libc::mmap(std::ptr::null_mut(), size_of::<Board>(), 3, flags, -1, 0);
        assert_ne!(at, libc::MAP_FAILED);
        &*at.cast::<Board>()
    }
}

/// Waits until somebody wakes, unless `word` is no longer `value`.
pub(crate) fn futex_wait(word: &AtomicU32, value: u32) {
    // SAFETY: the word is alive; the call reads it and keeps no reference.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, value, 0usize) };
}

/// Wakes everybody.
pub(crate) fn futex_wake(word: &AtomicU32) {
    // SAFETY: the word is alive; the call uses its address only.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
}

/// fork(2).
pub(crate) fn fork() -> i32 {
    // SAFETY: this process has one thread.
    unsafe { libc::fork() }
}

/// _exit(2).
pub(crate) fn exit(code: i32) -> ! {
    // SAFETY: takes any number.
    unsafe { libc::_exit(code) }
}

/// Maps `bytes` at `address`, which must be free; whether that worked.
pub(crate) fn map(address: usize, bytes: usize, shared: bool) -> bool {
    let kind = if shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
    let flags = kind | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: nothing that is in use can be replaced.
    unsafe { libc::mmap(address as *mut _, bytes, 3, flags, -1, 0) as usize == address }
}

/// Attaches the segment of `key`; its identifier.
pub(crate) fn segment(key: i32, address: usize, bytes: usize) -> i32 {
    // SAFETY: without SHM_REMAP nothing that is in use is replaced.
    unsafe {
        let id = libc::shmget(key, bytes, libc::IPC_CREAT | 0o600);
        if libc::shmat(id, address as *const _, 0) as usize == address { id } else { -1 }
    }
}

/// mprotect(2) of a region.
pub(crate) fn protect(address: usize, bytes: usize, protection: i32) -> i32 {
    // SAFETY: regions hold no Rust objects.
    unsafe { libc::mprotect(address as *mut _, bytes, protection) }
}

/// munmap(2) of a region.
pub(crate) fn unmap(address: usize, bytes: usize) -> i32 {
    // SAFETY: regions hold no Rust objects.
    unsafe { libc::munmap(address as *mut _, bytes) }
}

/// Fills memory of a region that is writable.
pub(crate) fn fill(address: usize, bytes: &[u8]) {
    // SAFETY: the caller saw that these bytes are mapped and writable; nothing else runs meanwhile.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), address as *mut u8, bytes.len()) }
}

/// Copies memory of a region that is readable.
pub(crate) fn peek(address: usize, bytes: usize) -> Vec<u8> {
    // SAFETY: the caller saw that these bytes are mapped and readable; nothing else runs meanwhile.
    unsafe { std::slice::from_raw_parts(address as *const u8, bytes) }.to_vec()
}

/// Signals that are played with.
pub(crate) const SIGNALS: [i32; 4] = [libc::SIGUSR1, libc::SIGUSR2, 40, 41];

/// What the handler has seen: number, sender, value; and how many of them.
pub(crate) static SEEN: [[AtomicI32; 3]; 256] = [const { [const { AtomicI32::new(0) }; 3] }; 256];
pub(crate) static SEEN_COUNT: AtomicU32 = AtomicU32::new(0);

extern "C" fn note(signal: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let entry = &SEEN[SEEN_COUNT.fetch_add(1, Ordering::SeqCst) as usize % SEEN.len()];
    // SAFETY: the kernel hands a valid siginfo of a queued signal, which has a sender and a value.
    let (pid, value) = unsafe { ((*info).si_pid(), (*info).si_value().sival_ptr as usize as i32) };
    for (cell, number) in entry.iter().zip([signal, pid, value]) {
        cell.store(number, Ordering::SeqCst);
    }
}

/// Catches all of [`SIGNALS`].
pub(crate) fn catch_signals() {
    for signal in SIGNALS {
        // SAFETY: the handler touches atomics only.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = note as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
            libc::sigaction(signal, &action, std::ptr::null_mut());
        }
    }
}

/// Queues a signal with a value.
pub(crate) fn send(pid: i32, signal: i32, value: i32) -> i32 {
    // SAFETY: plain numbers; the value is not a pointer to anybody.
    unsafe { libc::sigqueue(pid, signal, libc::sigval { sival_ptr: value as usize as *mut _ }) }
}

/// Blocks or unblocks a signal.
pub(crate) fn mask(how: i32, signal: i32) {
    // SAFETY: the set is initialised before it is used.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigaddset(&mut set, signal);
        libc::sigprocmask(how, &set, std::ptr::null_mut());
    }
}

/// Those of [`SIGNALS`] that are blocked, and those that are pending.
pub(crate) fn blocked_and_pending() -> (Vec<i32>, Vec<i32>) {
    // SAFETY: the calls fill in the sets.
    unsafe {
        let (mut blocked, mut pending): (libc::sigset_t, libc::sigset_t) = std::mem::zeroed();
        libc::sigprocmask(libc::SIG_BLOCK, std::ptr::null(), &mut blocked);
        libc::sigpending(&mut pending);
        let of = |set: &libc::sigset_t| (1..65).filter(|s| libc::sigismember(set, *s) == 1).collect();
        (of(&blocked), of(&pending))
    }
}

/// waitpid(2) without waiting: the child and its status, or 0, or -1.
pub(crate) fn bury() -> (i32, i32) {
    let mut status = 0;
    // SAFETY: the status is ours.
    let pid = unsafe { libc::waitpid(-1, &mut status, libc::WNOHANG) };
    (pid, status)
}
