//! The only room with `unsafe`: thin, documented wrappers over kernel interfaces. One file an interface.

pub mod anonymous;
pub mod bpf;
pub mod capability;
pub mod channel;
pub mod clone;
pub mod cpuid;
pub mod descriptor;
pub mod exec;
pub mod file;
pub mod heap;
pub mod ipc;
pub mod kcmp;
pub mod kernel;
pub mod lock;
pub mod mappings;
pub mod memory;
pub mod message;
pub mod mount;
pub mod mqueue;
pub mod namespace;
pub mod nsfs;
pub mod packet;
pub mod pagemap;
pub mod pidfd;
pub mod plain;
pub mod probe;
pub mod procmap;
pub mod ptrace;
pub mod ring;
pub mod sched;
pub mod seccomp;
pub mod seed;
pub mod socket;
pub mod tap;
pub mod tasks;
pub mod terminal;
#[cfg(test)]
pub(crate) mod testing;
pub mod tty;
pub mod userfault;
pub mod watch;
pub mod words;

use std::io;

/// The result of a raw system call as the standard library's error.
pub(crate) fn check(result: libc::c_long) -> io::Result<u64> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as u64) }
}
