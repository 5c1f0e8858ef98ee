//! Where the kernel has the contents of a page that it knows by its record (`struct page`): in its map of all memory. Where
//! that and the records begin is drawn by lot when it boots. A page of our own, of which we know number and record, tells:
//! its number is found at the end of our page tables only if the map begins where it is thought to.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use nix::sys::memfd::{MFdFlags, memfd_create};

use super::Kernel;
use crate::ids::Address;
use crate::sys::words::SharedWords;

const PAGE: u64 = 4096;
/// The map begins at a multiple of this …
const STEP: u64 = 1 << 30;
/// … and no memory is farther behind its beginning.
const MOST: u64 = 1 << 43;

/// Where the kernel's map of all memory begins, and the records of its pages.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pages {
    map: u64,
    records: u64,
    record: u64,
}

impl Pages {
    /// Finds them; an error where page numbers are not told (`CAP_SYS_ADMIN`), or tables are not as they are thought to be.
    pub(super) fn find(kernel: &mut Kernel) -> io::Result<Pages> {
        let file = File::from(memfd_create("page", MFdFlags::MFD_CLOEXEC)?);
        let words = SharedWords::map(&file, PAGE as usize / size_of::<u64>())?;
        words.all()[0].store(1, Ordering::Relaxed);
        let address = words.all().as_ptr() as u64;
        let number = number_of(address)?;
        let described = kernel.file(file.as_fd())?;
        let mapping = kernel.pointer(described, "file.f_mapping")?;
        let pages = kernel.at(mapping, "address_space.i_pages");
        let own = kernel.pointer(pages, "xarray.xa_head")?;
        let memory = kernel.window.current_task().and_then(|task| kernel.pointer(task, "task_struct.mm"))?;
        let tables = kernel.pointer(memory, "mm_struct.pgd")?;
        let record = kernel.size("page");
        let last = tables.0 / STEP * STEP;
        let mut maps = (0..MOST / STEP).map_while(|steps| last.checked_sub(steps * STEP));
        let fits = |map: &u64| {
            [4, 5]
                .iter()
                .any(|levels| end_of(kernel, tables, *map, address, *levels).is_ok_and(|end| end == Some(number)))
        };
        let map = maps.find(fits).ok_or_else(|| io::Error::other("the kernel's map of memory was not found"))?;
        Ok(Pages { map, records: own.0.wrapping_sub(number * record), record })
    }

    /// Where the contents of a page are.
    pub(super) fn contents(&self, page: Address) -> Address {
        Address(self.map.wrapping_add(page.0.wrapping_sub(self.records) / self.record * PAGE))
    }
}

/// The number of the page that is mapped at one of our addresses.
fn number_of(address: u64) -> io::Result<u64> {
    const NUMBER: u64 = (1 << 55) - 1;
    let mut entry = [0; 8];
    File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, address / PAGE * 8)?;
    match u64::from_ne_bytes(entry) & NUMBER {
        0 => Err(io::ErrorKind::PermissionDenied.into()),
        number => Ok(number),
    }
}

/// The number at the end of the page tables for an address, if the map of memory begins at `map`.
fn end_of(kernel: &mut Kernel, tables: Address, map: u64, address: u64, levels: u32) -> io::Result<Option<u64>> {
    const PRESENT: u64 = 1;
    const HUGE: u64 = 1 << 7;
    const PLACE: u64 = 0x000f_ffff_ffff_f000;
    let mut table = tables;
    for level in (0..levels).rev() {
        let index = address >> (12 + 9 * level) & 0x1ff;
        let entry = u64::from_ne_bytes(kernel.array(table.plus(8 * index))?);
        if entry & PRESENT == 0 || (level > 0 && entry & HUGE != 0) {
            return Ok(None);
        }
        if level == 0 {
            return Ok(Some((entry & PLACE) / PAGE));
        }
        table = Address(map.wrapping_add(entry & PLACE));
    }
    Ok(None)
}
