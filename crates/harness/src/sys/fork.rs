//! `fork(2)`.

use std::io;

use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, fork};

/// Forks a child that exits at once, and waits for it.
pub fn fork_and_exit() -> io::Result<()> {
    // SAFETY: the child makes one call, `_exit`, which is async-signal-safe, so it does not matter which locks other
    // threads held.
    match unsafe { fork() }? {
        // SAFETY: `_exit` takes any number, never returns, and touches no state of this process.
        ForkResult::Child => unsafe { libc::_exit(0) },
        ForkResult::Parent { child } => {
            waitpid(child, None)?;
            Ok(())
        }
    }
}

/// Forks a child that sleeps until a signal ends it.
pub fn fork_and_sleep() -> io::Result<()> {
    // SAFETY: the child calls `pause`, which is async-signal-safe, and nothing else.
    if let ForkResult::Child = unsafe { fork() }? {
        loop {
            nix::unistd::pause();
        }
    }
    Ok(())
}
