//! `seccomp(2)`: installing a filter.

use std::io;

use super::check;

/// Gives the calling thread a filter. Needs CAP_SYS_ADMIN, or no_new_privs.
pub fn install(program: &[libc::sock_filter]) -> io::Result<()> {
    let fprog = libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
    // SAFETY: the kernel reads `len` instructions at `filter`, both of a slice that outlives the call, and copies them.
    check(unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const fprog) }).map(drop)
}
