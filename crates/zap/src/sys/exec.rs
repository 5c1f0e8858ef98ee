//! What a process does between fork and exec.

use std::ffi::CString;
use std::io;
use std::ops::Range;
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

/// A pipe that was closed, and a file that is too large (`RLIMIT_FSIZE`), are errors of the write, not the end of the process.
pub fn ignore_failed_writes() {
    // SAFETY: SIG_IGN runs no code of ours.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_IGN);
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
    }
}

/// Makes the calling process look as if it had been started with these arguments and this environment, to itself too.
/// Only for a single-threaded caller that has taken what it needs of its own.
pub fn disguise(args: &[CString], env: &[CString]) -> io::Result<()> {
    // SAFETY: the caller has no other thread that could be reading the environment.
    check(unsafe { libc::clearenv() }.into())?;
    for entry in env {
        let bytes = entry.to_bytes();
        let split = bytes.iter().position(|b| *b == b'=').unwrap_or(bytes.len());
        let (key, value) = (CString::new(&bytes[..split])?, CString::new(&bytes[(split + 1).min(bytes.len())..])?);
        // SAFETY: two strings that end with a zero, which are copied; nobody else uses the environment, as above.
        check(unsafe { libc::setenv(key.as_ptr(), value.as_ptr(), 1) }.into())?;
    }
    let joined = |strings: &[CString]| strings.iter().flat_map(|s| s.to_bytes_with_nul()).copied().collect::<Vec<u8>>();
    let [args_start, args_end, env_start, env_end] = initial_strings();
    overwrite(args_start..args_end, &joined(args));
    overwrite(env_start..env_end, &joined(env));
    Ok(())
}

/// Has `/proc/PID/cmdline` show another command line, as far as it fits.
pub fn rename_command_line(name: &[u8]) {
    let [start, end, ..] = initial_strings();
    overwrite(start..end, name);
}

/// Where the strings of the arguments and of the environment begin and end (fields 48 to 51 of proc_pid_stat(5)): the areas
/// that the kernel filled at exec. Zeros if they cannot be told.
fn initial_strings() -> [usize; 4] {
    let Ok(stat) = std::fs::read_to_string("/proc/self/stat") else { return [0; 4] };
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or("").split(' ').collect();
    [48, 49, 50, 51].map(|field| fields.get(field - 3).and_then(|f| f.trim_end().parse().ok()).unwrap_or(0))
}

/// Fills an area of [`initial_strings`] with other strings.
fn overwrite(area: Range<usize>, strings: &[u8]) {
    if area.start == 0 || area.end <= area.start {
        return;
    }
    // SAFETY: the kernel says that strings of ours are there: memory on the initial stack, writable. Nobody keeps references
    // into it: std copies arguments and variables when they are asked for, and who is asked here asks for neither of the old.
    let area = unsafe { std::slice::from_raw_parts_mut(area.start as *mut u8, area.end - area.start) };
    area.fill(0);
    let fits = strings.len().min(area.len() - 1);
    area[..fits].copy_from_slice(&strings[..fits]);
}
