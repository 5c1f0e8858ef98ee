//! Regions of memory.

use std::os::fd::AsRawFd;

use harness::program::Op;

use super::{Process, pattern, raw};

/// A region of memory, at a place that no other has.
#[derive(Clone, Copy)]
pub(super) struct Region {
    pub(super) number: usize,
    pub(super) bytes: usize,
    /// Whether it shows an object whose size is its own.
    pub(super) of_file: bool,
}

impl Region {
    pub(super) fn address(&self) -> usize {
        0x2000_0000_0000 + self.number * 0x100_0000
    }

    /// Its protection and flags as the kernel shows them.
    pub(super) fn shown(&self) -> String {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap_or_default();
        let mut shown = "gone".to_owned();
        let mut here = false;
        for line in maps.lines() {
            let mut words = line.split(' ');
            let first = words.next().unwrap_or_default();
            if let Some((from, to)) = first.split_once('-') {
                let parse = |text: &str| usize::from_str_radix(text, 16).unwrap_or(0);
                here = (parse(from)..parse(to)).contains(&self.address());
                if here {
                    shown = words.next().unwrap_or_default().to_owned();
                }
            } else if here && first == "VmFlags:" {
                // soft-dirty and what a watcher does to the region are not the program's
                let flags = words.filter(|flag| FLAGS.contains(flag));
                shown = flags.fold(shown, |all, flag| all + " " + flag);
            }
        }
        shown
    }
}

/// Flags that a program sets.
const FLAGS: [&str; 11] = ["sh", "gd", "lo", "sr", "rr", "dc", "ht", "dd", "wf", "mg", "nh"];

const PAGE: usize = 4096;

/// What is advised; the last ones are mlock(2) and munlock(2).
const ADVICE: [i32; 12] = [
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
    raw::LOCK,
    raw::UNLOCK,
];

impl Process {
    pub(super) fn memory(&mut self, op: &Op) -> String {
        match op {
            Op::Map { shared, pages } => {
                let bytes = PAGE * usize::from(*pages).max(1);
                let region = Region { number: self.board.new_region(), bytes, of_file: *shared };
                let mapped = raw::map(region.address(), region.bytes, *shared);
                self.regions.push(region);
                return mapped.to_string();
            }
            Op::Segment(key) => {
                let region = Region { number: self.board.new_region(), bytes: PAGE, of_file: true };
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
            Op::Store { page, seed, .. } if region.shown().starts_with("rw") => {
                let pages = region.bytes / PAGE;
                let at = region.address() + usize::from(*page) % pages * PAGE + usize::from(*seed);
                raw::fill(at, &pattern(usize::from(*seed) + self.slot, 1 + PAGE / 3));
                format!("in {}", region.number)
            }
            Op::Protect { protection, .. } => {
                raw::protect(region.address(), region.bytes, i32::from(*protection & 7)).to_string()
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
            _ => "not writable".into(),
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
        let region = Region { number: self.board.new_region(), bytes: PAGE, of_file: true };
        let mapped = raw::map_file(region.address(), region.bytes, shared, file);
        if mapped {
            self.regions.push(region);
        }
        format!("{} {mapped}", region.number)
    }
}
