//! `/proc/PID/pagemap` and its `PAGEMAP_SCAN` ioctl (Linux 6.7): which pages are there, and which were written.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use super::check;

/// Properties of pages, `PAGE_IS_*` of `linux/fs.h`.
pub mod page {
    /// Write protection by userfaultfd in async mode is possible there.
    pub const WP_ALLOWED: u64 = 1 << 0;
    /// Written since it was last protected.
    pub const WRITTEN: u64 = 1 << 1;
    /// Of a file (shared anonymous memory too).
    pub const FILE: u64 = 1 << 2;
    /// In memory.
    pub const PRESENT: u64 = 1 << 3;
    /// Swapped out, or a marker.
    pub const SWAPPED: u64 = 1 << 4;
    /// The shared page of zeros.
    pub const ZERO: u64 = 1 << 5;
    /// A guard made by `MADV_GUARD_INSTALL` (Linux 6.14 says so).
    pub const GUARD: u64 = 1 << 8;
}

/// Protect what matches, and end at what cannot be: `PM_SCAN_*`.
const WP_MATCHING: u64 = 1 << 0;
const CHECK_WPASYNC: u64 = 1 << 1;

/// Pages in a row that are alike.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Region {
    /// Address of the first.
    pub start: u64,
    /// Address behind the last.
    pub end: u64,
    /// What they are: [`page`].
    pub is: u64,
}

/// What to look for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Scan {
    /// First address.
    pub start: u64,
    /// Address behind the last.
    pub end: u64,
    /// A page must have all of these …
    pub all: u64,
    /// … none of these …
    pub none: u64,
    /// … and, unless this is zero, one of these.
    pub any: u64,
    /// What to say of those found.
    pub tell: u64,
    /// Protect them against writing, and fail with EPERM where that is not possible.
    pub protect: bool,
    /// Fail with EPERM where writes are not followed.
    pub checked: bool,
}

#[repr(C)]
struct Argument {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `_IOWR('f', 16, struct pm_scan_arg)`
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
const ROOM: usize = 512;

/// Appends what `scan` finds to `found`. What was found before an error stays (and, with `protect`, is protected).
pub fn scan(pagemap: &File, scan: Scan, found: &mut Vec<Region>) -> io::Result<()> {
    let mut room = [Region::default(); ROOM];
    let protect = if scan.protect { WP_MATCHING | CHECK_WPASYNC } else { 0 };
    let mut argument = Argument {
        size: size_of::<Argument>() as u64,
        flags: protect | if scan.checked { CHECK_WPASYNC } else { 0 },
        start: scan.start,
        end: scan.end,
        walk_end: 0,
        vec: room.as_mut_ptr() as u64,
        vec_len: ROOM as u64,
        max_pages: 0,
        category_inverted: scan.none,
        category_mask: scan.all | scan.none,
        category_anyof_mask: scan.any,
        return_mask: scan.tell,
    };
    while argument.start < scan.end {
        // SAFETY: the kernel reads and writes one pm_scan_arg, laid out as `Argument`, and writes at most `vec_len` regions to
        // `vec`; both outlive the call.
        let result = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut argument) };
        let count = check(result.into())? as usize;
        found.extend_from_slice(room.get(..count).ok_or_else(|| io::Error::other("PAGEMAP_SCAN found too much"))?);
        if argument.walk_end <= argument.start {
            return Err(io::Error::other("PAGEMAP_SCAN does not move on"));
        }
        argument.start = argument.walk_end;
    }
    Ok(())
}

/// The entries of the pages from `start` on, one a page (admin-guide/mm/pagemap.rst).
pub fn entries(pagemap: &File, start: u64, pages: usize) -> io::Result<Vec<u64>> {
    let mut bytes = vec![0; pages * 8];
    pagemap.read_exact_at(&mut bytes, start / 4096 * 8)?;
    let word = |b: &[u8]| b.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
    Ok(bytes.chunks_exact(8).map(word).collect())
}
