//! What a process does between fork and exec.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use super::check;

/// `dup2`, by number: `to` is replaced, whatever it was, and stays open across an exec.
pub fn duplicate_to(from: RawFd, to: RawFd) -> io::Result<()> {
    // SAFETY: numbers only. Callers are between fork and exec, where no owner of `to` runs any more.
    check(unsafe { libc::dup2(from, to) }.into()).map(drop)
}

/// Closes every descriptor from `first` on. Only where no owner of such a descriptor runs any more: after a fork.
pub fn close_from(first: u32) -> io::Result<()> {
    // SAFETY: numbers only; see above for the owners.
    check(unsafe { libc::close_range(first, u32::MAX, 0) }.into()).map(drop)
}

/// Marks every descriptor from `first` on to be closed by an exec.
pub fn close_on_exec_from(first: u32) -> io::Result<()> {
    // SAFETY: numbers only; nothing is closed now.
    check(unsafe { libc::close_range(first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC as i32) }.into()).map(drop)
}

/// Takes a descriptor that was left to this process under an agreed number.
pub fn inherited(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_GETFD takes numbers only.
    check(unsafe { libc::fcntl(number, libc::F_GETFD) }.into())?;
    // SAFETY: it is open, and by agreement nobody else in this process owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Every signal back to its default action, and none blocked.
pub fn reset_signals() -> io::Result<()> {
    for signal in 1..=64 {
        if signal == libc::SIGKILL || signal == libc::SIGSTOP || (32..34).contains(&signal) {
            continue;
        }
        // SAFETY: SIG_DFL runs no code of ours.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    nix::sys::signal::SigSet::empty().thread_set_mask()?;
    Ok(())
}

/// A session keyring of its own, so that the keys of whoever called us stay out of reach.
pub fn new_session_keyring() -> io::Result<()> {
    const KEYCTL_JOIN_SESSION_KEYRING: i32 = 1;
    // SAFETY: a number and a null name, which asks for an anonymous keyring.
    check(unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, 0usize) }).map(drop)
}

/// Overwrites the calling process's command line (what `/proc/PID/cmdline` shows), as far as it fits.
///
/// `start` and `end` are from the process's own `/proc/self/stat`: the area that the kernel filled at exec.
pub fn rename_command_line(start: usize, end: usize, name: &[u8]) {
    if start == 0 || end <= start {
        return;
    }
    // SAFETY: the kernel says that the strings of argv are there: memory of ours, on the initial stack, writable. Nobody
    // keeps references into it: std copies arguments when they are asked for, and PID 1 asks for none.
    let area = unsafe { std::slice::from_raw_parts_mut(start as *mut u8, end - start) };
    area.fill(0);
    let fits = name.len().min(area.len() - 1);
    area[..fits].copy_from_slice(&name[..fits]);
}
