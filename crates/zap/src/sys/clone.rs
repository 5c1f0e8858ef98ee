//! `clone3(2)`.

use std::io;

use super::check;
use crate::ids::PodPid;

/// `struct clone_args` of the kernel, as far as it is used.
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// Clones a seed: a sibling of the caller (`CLONE_PARENT`) with that PID, which only waits for its tracer.
///
/// The caller must have one thread.
pub fn spawn_seed(pid: PodPid) -> io::Result<()> {
    let number = pid.0;
    let args = CloneArgs {
        flags: libc::CLONE_PARENT as u64,
        set_tid: &raw const number as u64,
        set_tid_size: 1,
        ..CloneArgs::default()
    };
    // SAFETY: without CLONE_VM the child has memory of its own, and this process has no other thread that could hold a
    // lock; the structure and the number outlive the call.
    let result = check(unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()) })?;
    if result == 0 {
        loop {
            // SAFETY: touches no memory.
            unsafe { libc::syscall(libc::SYS_pause) };
        }
    }
    Ok(())
}
