//! What the kernel lets nobody read back, or lets nobody have twice: each is refused by its name, and works on.

use crate::stage::*;

pub(crate) const KINDS: &[crate::stage::Kind] = &[
    ("userfaultfd", userfaultfd),
    ("performance-counter", performance_counter),
    ("bpf-map", bpf_map),
    ("seccomp-listener", seccomp_listener),
];

/// A program that sees to its own page faults.
fn userfaultfd() -> Checked {
    let watcher = call("userfaultfd", libc::SYS_userfaultfd, [libc::O_CLOEXEC as u64])? as i32;
    let mut api = [0xaau64, 0, 0];
    done("UFFDIO_API", unsafe { libc::ioctl(watcher, 0xc018_aa3f, api.as_mut_ptr()) })?;
    hold_loosely()?;
    done("fcntl", unsafe { libc::fcntl(watcher, libc::F_GETFD) }).map(drop)
}

/// The kernel counts something for this program.
fn performance_counter() -> Checked {
    // struct perf_event_attr: a software event, the time on the processor.
    let mut attributes = [0u64; 16];
    attributes[0] = 1 | (128 << 32);
    let args = [attributes.as_ptr() as u64, 0, u64::MAX, u64::MAX, 0];
    let counter = call("perf_event_open", libc::SYS_perf_event_open, args)? as i32;
    hold_loosely()?;
    let mut count = 0u64;
    let read = unsafe { libc::read(counter, (&raw mut count).cast(), 8) };
    equal("bytes of a counter", done("read", read as i64)?, 8)
}

/// An array of the kernel's programs.
fn bpf_map() -> Checked {
    // union bpf_attr: an array, its keys of 4 bytes, its values of 8, one of them.
    let mut attributes = [0u32; 32];
    attributes[..4].copy_from_slice(&[2, 4, 8, 1]);
    let map = call("bpf", libc::SYS_bpf, [0, attributes.as_ptr() as u64, 128])? as i32;
    hold_loosely()?;
    done("fcntl", unsafe { libc::fcntl(map, libc::F_GETFD) }).map(drop)
}

/// A child whose calls this program answers.
fn seccomp_listener() -> Checked {
    // Everything is allowed: the listener has nothing to answer.
    let allow = [libc::sock_filter { code: 6, jt: 0, jf: 0, k: 0x7fff_0000 }];
    let program = libc::sock_fprog { len: 1, filter: allow.as_ptr().cast_mut() };
    done("prctl", unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1u64, 0u64, 0u64, 0u64) })?;
    const NEW_LISTENER: u64 = 1 << 3;
    let listener = call("seccomp", libc::SYS_seccomp, [1, NEW_LISTENER, (&raw const program) as u64])? as i32;
    hold_loosely()?;
    done("fcntl", unsafe { libc::fcntl(listener, libc::F_GETFD) }).map(drop)
}
