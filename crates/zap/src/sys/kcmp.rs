//! `kcmp(2)`: whether two processes share a kernel object, and an order among such objects.

use std::cmp::Ordering;
use std::io;

use super::check;

/// What two tasks may share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Shared {
    /// Address space.
    Memory = 1,
    /// File descriptor table.
    Files = 2,
    /// Root, working directory and umask.
    Fs = 3,
    /// Signal handlers.
    Handlers = 4,
    /// I/O context.
    Io = 5,
    /// System V semaphore undo list.
    SemUndo = 6,
}

fn kcmp(a: i32, b: i32, kind: i32, x: u64, y: u64) -> io::Result<Ordering> {
    // SAFETY: kcmp takes numbers only and touches no memory of ours for these kinds.
    let result = check(unsafe { libc::syscall(libc::SYS_kcmp, a, b, kind, x, y) })?;
    match result {
        0 => Ok(Ordering::Equal),
        1 => Ok(Ordering::Less),
        2 => Ok(Ordering::Greater),
        _ => Err(io::Error::other("kcmp cannot order these objects")),
    }
}

/// Compares the open file descriptions behind two descriptors: equal means the same one.
pub fn compare_files(pid_a: i32, fd_a: i32, pid_b: i32, fd_b: i32) -> io::Result<Ordering> {
    kcmp(pid_a, pid_b, 0, fd_a as u64, fd_b as u64)
}

/// Whether two tasks (host TIDs) share a thing.
pub fn shares(a: i32, b: i32, what: Shared) -> io::Result<bool> {
    Ok(kcmp(a, b, what as i32, 0, 0)? == Ordering::Equal)
}

/// An order among tasks (host TIDs) in which those that share a thing are equal.
pub fn compare(a: i32, b: i32, what: Shared) -> io::Result<Ordering> {
    kcmp(a, b, what as i32, 0, 0)
}

#[repr(C)]
struct EpollSlot {
    epoll: u32,
    target: u32,
    offset: u32,
}

/// Whether the `offset`-th registration of number `target` in the epoll at `epoll_fd` of `pid_b` is the file `fd_a` of `pid_a`.
pub fn epoll_target_is(pid_a: i32, fd_a: i32, pid_b: i32, epoll_fd: i32, target: i32, offset: u32) -> io::Result<bool> {
    let slot = EpollSlot { epoll: epoll_fd as u32, target: target as u32, offset };
    // SAFETY: the kernel reads one EpollSlot (struct kcmp_epoll_slot) at the address, which outlives the call.
    let result = check(unsafe { libc::syscall(libc::SYS_kcmp, pid_a, pid_b, 7, fd_a as u64, &raw const slot) })?;
    Ok(result == 0)
}
