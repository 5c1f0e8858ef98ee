//! Which private pages an address space has, what is in them, and which of them are its parent's too.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use super::layout::Mapping;
use super::{PAGE, ranges};
use crate::error::{CaptureError, Context};
use crate::ids::HostPid;
use crate::image::DataSink;
use crate::look::Subject;
use crate::sys::memory;
use crate::sys::pagemap::{self, Region, Scan, page};

use super::state::{PageRun, PageSource};

/// Bytes gathered in one buffer.
const PIECE: u64 = 32 << 20;

/// The private pages that hold something (present or swapped, not of a file, not the page of zeros), and the guards.
pub(super) fn find(pagemap: &File, mappings: &[Mapping]) -> io::Result<Vec<Region>> {
    match find_by_scan(pagemap, mappings) {
        // before Linux 6.7
        Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => find_by_entries(pagemap, mappings),
        found => found,
    }
}

fn find_by_scan(pagemap: &File, mappings: &[Mapping]) -> io::Result<Vec<Region>> {
    let Some(last) = mappings.iter().map(|m| m.end).rfind(|end| *end <= 1 << 56) else { return Ok(Vec::new()) };
    let tell = page::PRESENT | page::SWAPPED | guard_bit(pagemap);
    let (none, any) = (page::FILE | page::ZERO, page::PRESENT | page::SWAPPED);
    let mut found = Vec::new();
    pagemap::scan(pagemap, Scan { start: 0, end: last, none, any, tell, ..Scan::default() }, &mut found)?;
    Ok(found)
}

/// [`page::GUARD`] if this kernel knows it.
fn guard_bit(pagemap: &File) -> u64 {
    static BIT: OnceLock<u64> = OnceLock::new();
    *BIT.get_or_init(|| {
        let probe = Scan { start: 0, end: PAGE, any: page::PRESENT, tell: page::GUARD, ..Scan::default() };
        pagemap::scan(pagemap, probe, &mut Vec::new()).map_or(0, |()| page::GUARD)
    })
}

/// The slow way: an entry a page. The page of zeros cannot be told there, so it is copied.
fn find_by_entries(pagemap: &File, mappings: &[Mapping]) -> io::Result<Vec<Region>> {
    const AT_ONCE: u64 = 64 << 20;
    let mut found: Vec<Region> = Vec::new();
    for mapping in mappings.iter().filter(|m| !m.shared && m.end <= 1 << 47) {
        for start in (mapping.start..mapping.end).step_by(AT_ONCE as usize) {
            let end = mapping.end.min(start + AT_ONCE);
            let entries = pagemap::entries(pagemap, start, ((end - start) / PAGE) as usize)?;
            for (address, entry) in (start..).step_by(PAGE as usize).zip(entries) {
                if entry & (entry::PRESENT | entry::SWAPPED) == 0 || entry & entry::FILE != 0 {
                    continue;
                }
                match found.last_mut() {
                    Some(last) if last.end == address => last.end += PAGE,
                    _ => found.push(Region { start: address, end: address + PAGE, is: page::PRESENT }),
                }
            }
        }
    }
    Ok(found)
}

/// Bits of an entry of pagemap.
mod entry {
    pub(super) const PRESENT: u64 = 1 << 63;
    pub(super) const SWAPPED: u64 = 1 << 62;
    pub(super) const FILE: u64 = 1 << 61;
    /// Page frame number, or type and place of swap.
    pub(super) const PLACE: u64 = (1 << 55) - 1;
}

/// The page frame (or place in swap) behind each of some pages: equal at the same address in parent and child means that
/// they share the page copy-on-write.
#[derive(Clone, Debug, Default)]
pub struct Frames {
    /// First address, then one frame a page; sorted.
    runs: Vec<(u64, Vec<u64>)>,
}

impl Frames {
    /// The frames behind `ranges` (sorted, disjoint).
    pub(super) fn read(pagemap: &File, ranges: &[Range<u64>]) -> io::Result<Frames> {
        let frame = |entry: u64| {
            if entry & (entry::PRESENT | entry::SWAPPED) == 0 { 0 } else { entry & (entry::PLACE | entry::SWAPPED) }
        };
        let run = |r: &Range<u64>| {
            let entries = pagemap::entries(pagemap, r.start, ((r.end - r.start) / PAGE) as usize)?;
            Ok((r.start, entries.into_iter().map(frame).collect()))
        };
        Ok(Frames { runs: ranges.iter().map(run).collect::<io::Result<_>>()? })
    }

    fn ranges(&self) -> Vec<Range<u64>> {
        self.runs.iter().map(|(start, frames)| *start..start + frames.len() as u64 * PAGE).collect()
    }

    /// The frames of a range that lies in one run.
    fn of(&self, range: &Range<u64>) -> &[u64] {
        let index = self.runs.partition_point(|(start, _)| *start <= range.start) - 1;
        let (start, frames) = &self.runs[index];
        &frames[((range.start - start) / PAGE) as usize..((range.end - start) / PAGE) as usize]
    }

    /// The pages that are the same in `parent`, among those at `kept` addresses (sorted, disjoint).
    pub(super) fn shared_with(&self, parent: &Frames, kept: &[Range<u64>]) -> Vec<Range<u64>> {
        let candidates = ranges::common(&ranges::common(&self.ranges(), &parent.ranges()), kept);
        let mut shared: Vec<Range<u64>> = Vec::new();
        for range in candidates {
            let pairs = self.of(&range).iter().zip(parent.of(&range));
            for (address, (ours, theirs)) in (range.start..).step_by(PAGE as usize).zip(pairs) {
                if *ours == 0 || ours != theirs {
                    continue;
                }
                match shared.last_mut() {
                    Some(last) if last.end == address => last.end += PAGE,
                    _ => shared.push(address..address + PAGE),
                }
            }
        }
        shared
    }
}

/// Copies the pages at `wanted` (sorted, disjoint) into the image's data.
pub(super) fn store(
    data: &mut DataSink,
    subject: &Subject,
    wanted: &[Range<u64>],
) -> Result<Vec<PageRun>, CaptureError> {
    let mut runs = Vec::with_capacity(wanted.len());
    let mut some: Vec<Range<u64>> = Vec::new();
    let mut bytes = 0;
    for range in wanted {
        let mut rest = range.clone();
        while !rest.is_empty() {
            let now = rest.start..rest.end.min(rest.start + (PIECE - bytes));
            rest.start = now.end;
            bytes += now.end - now.start;
            some.push(now);
            if bytes == PIECE {
                store_piece(data, subject, &some, bytes, &mut runs)?;
                (bytes, some) = (0, Vec::new());
            }
        }
    }
    store_piece(data, subject, &some, bytes, &mut runs)?;
    Ok(runs)
}

fn store_piece(
    data: &mut DataSink,
    subject: &Subject,
    some: &[Range<u64>],
    bytes: u64,
    runs: &mut Vec<PageRun>,
) -> Result<(), CaptureError> {
    if bytes == 0 {
        return Ok(());
    }
    let mut buffer = vec![0; bytes as usize];
    read_all(subject.host, some, &mut buffer).capturing("reading the memory", format!("process {}", subject.pod))?;
    let mut offset = data.append_pages(buffer).offset;
    for range in some {
        runs.push(PageRun { start: range.start, end: range.end, source: PageSource::Data(offset) });
        offset += range.end - range.start;
    }
    Ok(())
}

/// Reads `ranges` one behind the other, those too that the process itself may not read.
fn read_all(process: HostPid, ranges: &[Range<u64>], buffer: &mut [u8]) -> io::Result<()> {
    let mut done = memory::read(process, ranges, buffer)?;
    let mut forced: Option<File> = None;
    let mut place = 0;
    for range in ranges {
        let length = (range.end - range.start) as usize;
        if place + length > done {
            // a page without PROT_READ: `mem` reads it for a tracer, and the rest of this range
            let file = match &mut forced {
                Some(file) => file,
                none => none.insert(File::open(process.proc("mem"))?),
            };
            let from = done.saturating_sub(place);
            file.read_exact_at(&mut buffer[place + from..place + length], range.start + from as u64)?;
            done = place + length;
            let later = &ranges[ranges.partition_point(|r| r.start <= range.start)..];
            done += memory::read(process, later, &mut buffer[done..])?;
        }
        place += length;
    }
    Ok(())
}
