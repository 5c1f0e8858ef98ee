//! Regions of memory.

use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering::SeqCst;

use harness::program::Op;

use super::{Process, masks, pattern, raw};

/// A region of memory, at a place that no other has.
#[derive(Clone, Copy)]
pub(super) struct Region {
    pub(super) number: usize,
    pub(super) bytes: usize,
    /// Whether it shows an object whose size is its own.
    pub(super) of_file: bool,
    /// Whether its pages were treated one by one: it may consist of several mappings for the kernel, or not.
    pub(super) in_parts: bool,
}

impl Region {
    pub(super) fn address(&self) -> usize {
        0x2000_0000_0000 + self.number * 0x100_0000
    }

    /// Protection and flags of each of its pages, as the kernel shows them.
    pub(super) fn pages(&self) -> Vec<String> {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap_or_default();
        let mut pages = vec!["gone".to_owned(); self.bytes / PAGE];
        let mut here = 0..0;
        for line in maps.lines() {
            let mut words = line.split(' ');
            let first = words.next().unwrap_or_default();
            if let Some((from, to)) = first.split_once('-') {
                let page = |text: &str| {
                    let address = usize::from_str_radix(text, 16).unwrap_or(0).max(self.address());
                    ((address - self.address()) / PAGE).min(pages.len())
                };
                here = page(from)..page(to);
                let protection = words.next().unwrap_or_default();
                pages[here.clone()].fill(protection.to_owned());
            } else if !here.is_empty() && first == "VmFlags:" {
                let flags: String =
                    words.filter(|flag| masks::MAPPING_FLAGS.contains(flag)).map(|flag| format!(" {flag}")).collect();
                pages[here.clone()].iter_mut().for_each(|page| *page += &flags);
            }
        }
        pages
    }

    /// Its pages, and what is in those that can be read.
    pub(super) fn describe(&self) -> String {
        let pages = self.pages();
        let text = masks::by_page(&pages);
        let readable = (0..pages.len()).filter(|page| pages[*page].starts_with('r'));
        let contents: Vec<u8> = readable.flat_map(|page| raw::peek(self.address() + page * PAGE, PAGE)).collect();
        format!(" region {}{text} {:x}", self.number, super::channel::hash(&contents))
    }
}

const PAGE: usize = 4096;

/// What is advised; the last ones are mlock(2) and munlock(2).
const ADVICE: [i32; 17] = [
    libc::MADV_DONTFORK,
    libc::MADV_DOFORK,
    libc::MADV_DONTNEED,
    libc::MADV_WIPEONFORK,
    libc::MADV_KEEPONFORK,
    libc::MADV_DONTDUMP,
    libc::MADV_NOHUGEPAGE,
    libc::MADV_SEQUENTIAL,
    libc::MADV_RANDOM,
    libc::MADV_NORMAL,
    libc::MADV_HUGEPAGE,
    libc::MADV_MERGEABLE,
    libc::MADV_UNMERGEABLE,
    libc::MADV_POPULATE_WRITE,
    libc::MADV_REMOVE,
    raw::LOCK,
    raw::UNLOCK,
];

impl Process {
    pub(super) fn memory(&mut self, op: &Op) -> String {
        match op {
            Op::Map { shared, pages } => {
                let bytes = PAGE * usize::from(*pages).max(1);
                let region = Region { number: self.board.new_region(), bytes, of_file: *shared, in_parts: false };
                let mapped = raw::map(region.address(), region.bytes, *shared);
                self.regions.push(region);
                return mapped.to_string();
            }
            Op::Segment(key) => {
                let region = Region { number: self.board.new_region(), bytes: PAGE, of_file: true, in_parts: false };
                let attached = raw::segment(1000 + i32::from(*key), region.address(), region.bytes);
                self.regions.push(region);
                return attached.to_string();
            }
            Op::MapFile { channel, shared } => return self.map_file(*channel, *shared),
            _ => {}
        }
        let (Op::Store { region: which, .. }
        | Op::Protect { region: which, .. }
        | Op::Resize { region: which, .. }
        | Op::Advise { region: which, .. }
        | Op::Move(which)
        | Op::Unmap(which)) = op
        else {
            return "no such thing".into();
        };
        if self.regions.is_empty() {
            return "nothing mapped".into();
        }
        let which = usize::from(*which) % self.regions.len();
        let region = self.regions[which];
        match op {
            Op::Store { page, seed, .. } => {
                let page = usize::from(*page) % (region.bytes / PAGE);
                if !region.pages()[page].starts_with("rw") {
                    return "not writable".into();
                }
                let at = region.address() + page * PAGE + usize::from(*seed);
                raw::fill(at, &pattern(usize::from(*seed) + self.slot, 1 + PAGE / 3));
                format!("in {}", region.number)
            }
            Op::Protect { protection, page, .. } => {
                let (bits, one) = (i32::from(*protection & 7), *protection & 8 != 0);
                if !one {
                    return raw::protect(region.address(), region.bytes, bits).to_string();
                }
                self.regions[which].in_parts = true;
                let page = usize::from(*page) % (region.bytes / PAGE);
                format!("page {page} {}", raw::protect(region.address() + page * PAGE, PAGE, bits))
            }
            Op::Resize { .. } | Op::Move(_) if region.in_parts => "in parts".into(),
            Op::Move(_) => {
                let place = Region { number: self.board.new_region(), ..region };
                let moved = raw::move_to(region.address(), region.bytes, place.address());
                if moved {
                    self.regions[which] = place;
                }
                format!("to {} {moved}", place.number)
            }
            Op::Resize { pages, .. } if region.of_file => format!("of a file {pages}"),
            Op::Resize { pages, .. } => {
                let bytes = PAGE * usize::from(*pages).max(1);
                let resized = raw::resize(region.address(), region.bytes, bytes);
                if resized {
                    self.regions[which].bytes = bytes;
                }
                resized.to_string()
            }
            Op::Advise { advice, .. } => {
                let advice = ADVICE[usize::from(*advice) % ADVICE.len()];
                format!("{advice} {}", raw::advise(region.address(), region.bytes, advice))
            }
            Op::Unmap(_) => {
                self.regions.remove(which);
                raw::unmap(region.address(), region.bytes).to_string()
            }
            _ => "no such thing".into(),
        }
    }

    /// Maps the first page of a file, which has one then.
    fn map_file(&mut self, channel: u8, shared: bool) -> String {
        let Some(channel) = self.channel_at(channel).filter(|channel| channel.is_file()) else {
            return "not a file".into();
        };
        if let Err(error) = channel.grow(PAGE as u64) {
            return error.to_string();
        }
        let file = channel.reader().as_raw_fd();
        let region = Region { number: self.board.new_region(), bytes: PAGE, of_file: true, in_parts: false };
        self.board.mapped[channel.number].store(1, SeqCst);
        let mapped = raw::map_file(region.address(), region.bytes, shared, file);
        if mapped {
            self.regions.push(region);
        }
        format!("{} {mapped}", region.number)
    }
}
