//! System V shared memory by key.

use std::io;

/// Makes a segment of one page for everybody; its number.
pub fn shared_segment(key: i32) -> io::Result<i32> {
    // SAFETY: plain numbers.
    match unsafe { libc::shmget(key, 4096, libc::IPC_CREAT | libc::IPC_EXCL | 0o666) } {
        -1 => Err(io::Error::last_os_error()),
        number => Ok(number),
    }
}

/// Removes a segment.
pub fn remove_segment(number: i32) {
    // SAFETY: this command takes no buffer.
    unsafe { libc::shmctl(number, libc::IPC_RMID, std::ptr::null_mut()) };
}
