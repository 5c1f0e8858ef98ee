//! Finding and following pages.

use std::fs::{self, File};
use std::io;

use super::{Feature, holds, useful, works};
use crate::sys::pagemap::{self, Scan, page};
use crate::sys::probe::{self, Page};

const WRITE_PROTECT: u64 = 1 << 0;
const EVENTS: u64 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6;
const SHARED_MISSING: u64 = 1 << 5;
const WRITE_PROTECT_SHARED: u64 = 1 << 12;
const WRITE_PROTECT_ASYNC: u64 = 1 << 15;
/// The bit of a pagemap entry.
const SOFT_DIRTY: u64 = 1 << 55;

pub(super) fn features() -> Vec<Feature> {
    let offered = probe::userfaultfd();
    let has = |bits: u64| match &offered {
        Ok(features) => holds(features & bits == bits, "the kernel's userfaultfd lacks it"),
        Err(e) => Err(io::Error::other(super::reason(e))),
    };
    vec![
        useful("userfaultfd", "filling memory after a restart while the pod runs", has(EVENTS | SHARED_MISSING)),
        useful(
            "userfaultfd wp async",
            "following which pages are written, almost for free",
            has(WRITE_PROTECT | WRITE_PROTECT_SHARED | WRITE_PROTECT_ASYNC),
        ),
        useful("PAGEMAP_SCAN", "finding written pages in milliseconds; else each entry is read", works(pagemap_scan())),
        useful("soft-dirty", "following written pages where userfaultfd cannot", soft_dirty()),
        useful(
            "PROCMAP_QUERY",
            "asking about one mapping without reading the whole list",
            works(probe::procmap_query()),
        ),
    ]
}

/// Whether memory can be filled while a pod runs.
pub(crate) fn can_fill() -> bool {
    probe::userfaultfd().is_ok_and(|features| features & (EVENTS | SHARED_MISSING) == EVENTS | SHARED_MISSING)
}

/// Whether writes can be followed through a userfaultfd and found by a scan.
pub(crate) fn follows_asynchronously() -> bool {
    probe::userfaultfd().is_ok_and(|features| features & WRITE_PROTECT_ASYNC != 0) && pagemap_scan().is_ok()
}

fn pagemap_scan() -> io::Result<()> {
    let memory = Page::new()?;
    let (start, end) = (memory.address(), memory.address() + 4096);
    let scan = Scan { start, end, all: page::PRESENT, tell: page::PRESENT, ..Scan::default() };
    let mut found = Vec::new();
    pagemap::scan(&File::open("/proc/self/pagemap")?, scan, &mut found)?;
    holds(found.len() == 1, "it does not find a page that is there").map(drop)
}

/// Some kernels have the file but never set the bit, so it is tried. Clearing our own bits harms nobody.
pub(crate) fn soft_dirty() -> io::Result<String> {
    let memory = Page::new()?;
    let pagemap = File::open("/proc/self/pagemap")?;
    let is_set = || {
        Ok::<_, io::Error>(
            pagemap::entries(&pagemap, memory.address(), 1)?.first().is_some_and(|e| e & SOFT_DIRTY != 0),
        )
    };
    fs::write("/proc/self/clear_refs", "4")?;
    let before = is_set()?;
    memory.write();
    holds(!before && is_set()?, "the kernel never sets the bit")
}
