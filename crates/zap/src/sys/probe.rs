//! Asking the kernel what it offers, by calls that change nothing. Each answers with an error where it does not.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::check;
use super::memory::MADV_GUARD_INSTALL;

/// The features of `userfaultfd(2)`: bits of `UFFD_FEATURE_*`.
pub fn userfaultfd() -> io::Result<u64> {
    /// `_IOWR(0xaa, 0x3f, struct uffdio_api)`
    const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
    // SAFETY: numbers only; on success the result is a fresh descriptor that nobody else owns.
    let fd = check(unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) })?;
    // SAFETY: as above.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    // struct uffdio_api: version, features, ioctls.
    let mut api = [0xaau64, 0, 0];
    // SAFETY: the kernel reads and writes the 24 bytes of the struct, which are ours.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, api.as_mut_ptr()) }.into())?;
    Ok(api[1])
}

/// `PROCMAP_QUERY`, asked about an address of ours.
pub fn procmap_query() -> io::Result<()> {
    /// `_IOWR('f', 17, struct procmap_query)`
    const PROCMAP_QUERY: libc::c_ulong = 0xc068_6611;
    let maps = File::open("/proc/self/maps")?;
    let mut query = [0u64; 13];
    (query[0], query[2]) = (size_of_val(&query) as u64, procmap_query as *const () as u64);
    // SAFETY: the kernel reads and writes the 104 bytes of the struct, which are ours; no names are asked for.
    check(unsafe { libc::ioctl(maps.as_raw_fd(), PROCMAP_QUERY, query.as_mut_ptr()) }.into()).map(drop)
}

/// Whether the memory layout can be set (`PR_SET_MM_MAP`).
pub fn set_memory_map() -> io::Result<()> {
    const PR_SET_MM_MAP_SIZE: u64 = 15;
    let mut size = 0u32;
    // SAFETY: the kernel writes one number, which is ours.
    check(unsafe { libc::prctl(libc::PR_SET_MM, PR_SET_MM_MAP_SIZE, &raw mut size, 0u64, 0u64) }.into()).map(drop)
}

/// Whether the vDSO can be mapped where one wants it: refused as long as one is mapped, which is what tells that it can.
pub fn map_vdso() -> io::Result<()> {
    const ARCH_MAP_VDSO_64: i32 = 0x2003;
    // SAFETY: a vDSO is mapped in every process of ours, so the kernel maps none.
    match check(unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_MAP_VDSO_64, 0) }) {
        Err(e) if e.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        other => other.map(drop),
    }
}

/// Whether timers can be made under chosen numbers.
pub fn timer_numbers() -> io::Result<()> {
    const PR_TIMER_CREATE_RESTORE_IDS: i32 = 77;
    const GET: u64 = 2;
    // SAFETY: numbers only.
    check(unsafe { libc::prctl(PR_TIMER_CREATE_RESTORE_IDS, GET, 0u64, 0u64, 0u64) }.into()).map(drop)
}

/// The number of `mseal(2)`.
pub const MSEAL: libc::c_long = 462;

/// Whether pages can be guarded (`MADV_GUARD_INSTALL`), tried on one of ours.
pub fn guards() -> io::Result<()> {
    let page = Page::new()?;
    // SAFETY: the page is ours alone, and nobody touches it any more.
    check(unsafe { libc::madvise(page.0, 4096, MADV_GUARD_INSTALL) }.into()).map(drop)
}

/// Whether there is memory that the kernel may drop (`MAP_DROPPABLE`), tried on a page.
pub fn droppable() -> io::Result<()> {
    const MAP_DROPPABLE: i32 = 0x08;
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, MAP_DROPPABLE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping where the kernel likes.
    let address = unsafe { libc::mmap(std::ptr::null_mut(), 4096, protection, flags, -1, 0) };
    if address == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    drop(Page(address));
    Ok(())
}

/// Whether the kernel has a system call of this number.
pub fn has_call(number: libc::c_long) -> io::Result<()> {
    if super::seccomp::probe(number) < 0 {
        let error = io::Error::last_os_error();
        if error.raw_os_error() == Some(libc::ENOSYS) {
            return Err(error);
        }
    }
    Ok(())
}

/// Makes `to` share the blocks of `from` (`FICLONE`).
pub fn reflink(from: &File, to: &File) -> io::Result<()> {
    const FICLONE: libc::c_ulong = 0x4004_9409;
    // SAFETY: numbers only.
    check(unsafe { libc::ioctl(to.as_raw_fd(), FICLONE, from.as_raw_fd()) }.into()).map(drop)
}

/// The address of a page of anonymous memory of ours, written on request, unmapped in the end.
pub struct Page(*mut libc::c_void);

impl Page {
    /// Maps one and writes to it.
    pub fn new() -> io::Result<Page> {
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping where the kernel likes.
        let address = unsafe { libc::mmap(std::ptr::null_mut(), 4096, protection, flags, -1, 0) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let page = Page(address);
        page.write();
        Ok(page)
    }

    /// Its address.
    pub fn address(&self) -> u64 {
        self.0 as u64
    }

    /// Writes to it.
    pub fn write(&self) {
        // SAFETY: the page is mapped, writable and ours alone.
        unsafe { self.0.cast::<u8>().write_volatile(1) }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` and used by nobody else.
        unsafe { libc::munmap(self.0, 4096) };
    }
}
