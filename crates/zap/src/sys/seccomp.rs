//! `seccomp(2)`: installing a filter.

use std::io;

use super::check;

/// Gives the calling thread a filter. Needs CAP_SYS_ADMIN, or no_new_privs.
pub fn install(program: &[libc::sock_filter]) -> io::Result<()> {
    let fprog = libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
    // Without the flag, kernels before 5.16 make the thread slower as a guard against speculation.
    let flags = libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW;
    // SAFETY: the kernel reads `len` instructions at `filter`, both of a slice that outlives the call, and copies them.
    check(unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const fprog) }).map(drop)
}

/// Makes a system call with arguments that no call takes (all −1): whether it is there, and allowed, shows in its error.
/// The result is the raw one, with the error in `errno`.
pub(crate) fn probe(number: libc::c_long) -> i64 {
    let nothing = -1i64;
    // SAFETY: an address of −1 is nobody's, a descriptor of −1 is not open, and flags of all ones are unknown to every
    // call that this is used for: each fails before it does anything.
    unsafe { libc::syscall(number, nothing, nothing, nothing, nothing, nothing, nothing) }
}
