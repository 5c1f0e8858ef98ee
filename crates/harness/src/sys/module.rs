//! Kernel modules.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Loads a module, which must not be compressed, without parameters (`finit_module(2)`).
pub fn load_module(module: &File) -> io::Result<()> {
    // SAFETY: a descriptor that is open, an empty string, no flags.
    let result = unsafe { libc::syscall(libc::SYS_finit_module, module.as_raw_fd(), c"".as_ptr(), 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
