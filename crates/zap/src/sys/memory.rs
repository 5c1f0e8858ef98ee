//! Memory of other processes.

use std::fs::OpenOptions;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::fcntl::{FallocateFlags, fallocate};

use super::check;
use crate::ids::HostPid;

/// `madvise(2)`: whoever touches these pages is killed (Linux 6.13).
pub const MADV_GUARD_INSTALL: i32 = 102;
/// They can be touched again.
pub const MADV_GUARD_REMOVE: i32 = 103;

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
    anonymous(size, 4096, 0)
}

/// The same of huge pages of that size, none of which is there or reserved yet (`MAP_HUGETLB`).
pub fn huge_anonymous(size: u64, page: u64) -> io::Result<OwnedFd> {
    // MAP_HUGE_SHIFT: the flags say how many bits a page has.
    let of_size = (page.trailing_zeros() as i32) << 26;
    anonymous(size, page, libc::MAP_HUGETLB | libc::MAP_NORESERVE | of_size)
}

fn anonymous(size: u64, page: u64, more: i32) -> io::Result<OwnedFd> {
    let size = size as usize;
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS | more);
    // SAFETY: a new mapping at an address of the kernel's choice; nothing refers to it, and it is unmapped below.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), size, protection, flags, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let address = start as usize;
    let end = address + size.next_multiple_of(page as usize);
    let opened = OpenOptions::new().read(true).write(true).open(format!("/proc/self/map_files/{address:x}-{end:x}"));
    // SAFETY: the mapping made above, to which nothing refers.
    unsafe { libc::munmap(start, size.next_multiple_of(page as usize)) };
    opened.map(OwnedFd::from)
}

/// Writes to memory of huge pages of that size, whose files take no `write(2)`. Pages that are not there are had first: to
/// touch one that cannot be had would end this process.
pub fn put_huge(file: BorrowedFd<'_>, page: u64, at: u64, bytes: &[u8]) -> io::Result<()> {
    let start = at / page * page;
    let skipped = (at - start) as usize;
    let length = (skipped + bytes.len()).next_multiple_of(page as usize);
    fallocate(file, FallocateFlags::empty(), start as i64, length as i64)?;
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
    let fd = file.as_raw_fd();
    // SAFETY: a new mapping at an address of the kernel's choice; nothing refers to it, and it is unmapped below.
    let mapped = unsafe { libc::mmap(std::ptr::null_mut(), length, protection, flags, fd, start as i64) };
    if mapped == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the mapping is `length` long, which is at least what was skipped and the bytes; every page of it is there.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), mapped.cast::<u8>().add(skipped), bytes.len()) };
    // SAFETY: the mapping made above, to which nothing refers any more.
    check(unsafe { libc::munmap(mapped, length) } as libc::c_long).map(drop)
}
