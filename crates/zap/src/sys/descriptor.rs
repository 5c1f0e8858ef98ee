//! `ioctl(2)` and `fcntl(2)` on open files, where no safe library has the call.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use nix::fcntl::{FcntlArg, fcntl};

use super::check;

/// How many bytes can be read at once (`FIONREAD`).
pub fn unread(file: impl AsFd) -> io::Result<usize> {
    let mut count: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int to the address, which is that of an int of ours.
    check(unsafe { libc::ioctl(file.as_fd().as_raw_fd(), libc::FIONREAD, &raw mut count) } as libc::c_long)?;
    Ok(count.max(0) as usize)
}

/// Status flags and access mode (`F_GETFL`).
pub fn flags(file: impl AsFd) -> io::Result<i32> {
    // SAFETY: numbers only.
    check(unsafe { libc::fcntl(file.as_fd().as_raw_fd(), libc::F_GETFL) } as libc::c_long).map(|f| f as i32)
}

/// Sets the status flags that `F_SETFL` can set; the others are ignored by the kernel.
pub fn set_flags(file: impl AsFd, flags: i32) -> io::Result<()> {
    // SAFETY: numbers only.
    check(unsafe { libc::fcntl(file.as_fd().as_raw_fd(), libc::F_SETFL, flags) } as libc::c_long).map(drop)
}

/// Copies up to `length` bytes from one pipe to another without taking them out (`tee(2)`); never waits.
pub fn tee(from: impl AsFd, to: impl AsFd, length: usize) -> io::Result<usize> {
    let (from, to) = (from.as_fd().as_raw_fd(), to.as_fd().as_raw_fd());
    // SAFETY: numbers only.
    check(unsafe { libc::tee(from, to, length, libc::SPLICE_F_NONBLOCK) } as libc::c_long).map(|n| n as usize)
}

/// Lets a process (0: this one) have `count` descriptors, or as many as the kernel gives anybody.
pub fn allow(process: i32, count: u64) -> io::Result<()> {
    let most = std::fs::read_to_string("/proc/sys/fs/nr_open")?.trim().parse().unwrap_or(count);
    let wanted = count.min(most);
    let limit = limit(process)?;
    if limit.rlim_cur >= wanted {
        return Ok(());
    }
    // Without CAP_SYS_RESOURCE, what the limit may be at most is all there is.
    let raised = set_limit(process, libc::rlimit { rlim_cur: wanted, rlim_max: limit.rlim_max.max(wanted) });
    raised.or_else(|_| set_limit(process, libc::rlimit { rlim_cur: limit.rlim_max.min(wanted), ..limit }))
}

/// Has the kernel make room for `count` descriptors of this process, or as many as the limit can be. Each time that the table
/// of a process *with threads* doubles by itself, the kernel waits until no processor looks at the old one any more
/// (`expand_fdtable`): 5 to 30 ms.
pub fn make_room(count: u64) -> io::Result<()> {
    let before = limit(0)?;
    allow(0, count)?;
    let last = limit(0)?.rlim_cur.min(count).saturating_sub(1).min(i32::MAX as u64) as i32;
    let made = std::fs::File::open("/dev/null").and_then(|null| Ok(fcntl(null, FcntlArg::F_DUPFD_CLOEXEC(last))?));
    // What this process starts has the limits that it was given.
    set_limit(0, before)?;
    // SAFETY: a descriptor that was made for us just now.
    made.map(|far| drop(unsafe { OwnedFd::from_raw_fd(far) }))
}

/// How many descriptors this process may have.
pub fn most() -> io::Result<u64> {
    Ok(limit(0)?.rlim_cur)
}

fn limit(process: i32) -> io::Result<libc::rlimit> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel fills the struct; null changes nothing.
    check(unsafe { libc::prlimit(process, libc::RLIMIT_NOFILE, std::ptr::null(), &raw mut limit) }.into())?;
    Ok(limit)
}

fn set_limit(process: i32, limit: libc::rlimit) -> io::Result<()> {
    // SAFETY: the kernel reads the struct; null asks for nothing.
    check(unsafe { libc::prlimit(process, libc::RLIMIT_NOFILE, &raw const limit, std::ptr::null_mut()) }.into())
        .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_made_and_nothing_else_changes() {
        let size = || {
            let status = std::fs::read_to_string("/proc/self/status").unwrap();
            let line = status.lines().find_map(|line| line.strip_prefix("FDSize:")).unwrap().trim().to_owned();
            line.parse::<u64>().unwrap()
        };
        let limits = || limit(0).map(|limit| (limit.rlim_cur, limit.rlim_max)).unwrap();
        let before = limits();
        make_room(before.0 + 1).unwrap();
        assert_eq!(limits(), before);
        assert!(size() >= before.0.min(1024));
    }
}
