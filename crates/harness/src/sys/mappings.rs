//! `mmap(2)`.

use std::ffi::c_void;
use std::num::NonZeroUsize;

use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, mprotect, munmap};

/// Maps `count` ranges of a page each that the kernel cannot make one mapping of, every second one of them writable and
/// written to. They stay.
pub fn map_apart(count: usize) -> nix::Result<()> {
    const PAGE: usize = 4096;
    let Some(length) = NonZeroUsize::new(count * PAGE) else { return Ok(()) };
    let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
    // SAFETY: the kernel chooses where, so nothing is mapped over.
    let start = unsafe { mmap_anonymous(None, length, ProtFlags::PROT_READ, flags) }?;
    for page in (0..count).step_by(2) {
        // SAFETY: the page is of the mapping made above, which nothing else knows of.
        unsafe {
            let page = start.byte_add(page * PAGE);
            mprotect(page.cast::<c_void>(), PAGE, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE)?;
            page.cast::<u8>().write_volatile(1);
        }
    }
    Ok(())
}

/// Maps so many pages, writes to each, and unmaps them.
pub fn map_touch_unmap(pages: usize) -> nix::Result<()> {
    const PAGE: usize = 4096;
    let Some(length) = NonZeroUsize::new(pages * PAGE) else { return Ok(()) };
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: the kernel chooses where, so nothing is mapped over.
    let start = unsafe { mmap_anonymous(None, length, protection, MapFlags::MAP_PRIVATE) }?;
    for page in 0..pages {
        // SAFETY: the page is of the mapping made above, which nothing else knows of.
        unsafe { start.byte_add(page * PAGE).cast::<u8>().write_volatile(1) };
    }
    // SAFETY: the whole mapping made above, to which no reference is left.
    unsafe { munmap(start, length.get()) }
}
