//! Memory of other processes.

use std::fs::OpenOptions;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;

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

/// New shared anonymous memory, and a descriptor of it: what `mmap` makes of `MAP_SHARED | MAP_ANONYMOUS`.
pub fn shared_anonymous(size: u64) -> io::Result<OwnedFd> {
    let size = size as usize;
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping at an address of the kernel's choice; nothing refers to it, and it is unmapped below.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), size, protection, flags, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let address = start as usize;
    let end = address + size.next_multiple_of(4096);
    let opened = OpenOptions::new().read(true).write(true).open(format!("/proc/self/map_files/{address:x}-{end:x}"));
    // SAFETY: the mapping made above, to which nothing refers.
    unsafe { libc::munmap(start, size) };
    opened.map(OwnedFd::from)
}
