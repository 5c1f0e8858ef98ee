//! Memory of other processes.

use std::io;
use std::ops::Range;

use super::check;
use crate::ids::HostPid;

/// Ranges in one `process_vm_readv`: UIO_MAXIOV.
const MOST: usize = 1024;

/// Reads `ranges` of a process's memory into `buffer`, one behind the other. Returns how much could be read: less than
/// everything where a page does not permit it.
pub fn read(process: HostPid, ranges: &[Range<u64>], buffer: &mut [u8]) -> io::Result<usize> {
    let (mut done, mut wanted_so_far) = (0, 0);
    for some in ranges.chunks(MOST) {
        let wanted: usize = some.iter().map(|r| (r.end - r.start) as usize).sum();
        let room = buffer.get_mut(done..done + wanted).ok_or(io::ErrorKind::InvalidInput)?;
        let local = libc::iovec { iov_base: room.as_mut_ptr().cast(), iov_len: room.len() };
        let there = |r: &Range<u64>| libc::iovec { iov_base: r.start as *mut _, iov_len: (r.end - r.start) as usize };
        let remote: Vec<libc::iovec> = some.iter().map(there).collect();
        // SAFETY: the kernel writes to `room` only, which is ours; the remote addresses are checked by the kernel.
        let read = check(unsafe {
            libc::process_vm_readv(process.0, &local, 1, remote.as_ptr(), remote.len() as libc::c_ulong, 0)
        } as libc::c_long);
        match read {
            Ok(read) => done += read as usize,
            Err(error) if error.raw_os_error() == Some(libc::EFAULT) => return Ok(done),
            Err(error) => return Err(error),
        }
        wanted_so_far += wanted;
        if done < wanted_so_far {
            return Ok(done);
        }
    }
    Ok(done)
}
