//! Which private pages an address space has, what is in them, and which of them are its parent's too.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use nix::sys::ptrace;
use nix::unistd::Pid;

use super::layout::Mapping;
use super::{PAGE, ranges};
use crate::error::{CaptureError, Context};
use crate::ids::HostPid;
use crate::image::{DataSink, Feed};
use crate::look::Subject;
use crate::sys::memory;
use crate::sys::pagemap::{self, Region, Scan, page};

use super::state::{PageRun, PageSource};

/// Bytes gathered in one buffer.
const PIECE: u64 = 2 << 20;
/// A gap between pages that is read through rather than stepped over.
const NEAR: u64 = 256 * PAGE;
/// Pages in a row that a scan leaves out if they are known: each such gap is a call more.
pub(super) const WORTH_STEPPING_OVER: u64 = 2 << 20;

/// The private pages that hold something (present or swapped, not of a file, not the page of zeros), and the guards; whether
/// they are followed, and were written. Those at `known` addresses (sorted, disjoint) are left out.
pub(super) fn find(pagemap: &File, mappings: &[Mapping], known: &[Range<u64>]) -> io::Result<Vec<Region>> {
    match find_by_scan(pagemap, mappings, known) {
        // before Linux 6.7
        Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => find_by_entries(pagemap, mappings),
        found => found,
    }
}

fn find_by_scan(pagemap: &File, mappings: &[Mapping], known: &[Range<u64>]) -> io::Result<Vec<Region>> {
    let Some(last) = mappings.iter().map(|m| m.end).rfind(|end| *end <= 1 << 56) else { return Ok(Vec::new()) };
    let tell = page::PRESENT | page::SWAPPED | page::WP_ALLOWED | page::WRITTEN | guard_bit(pagemap);
    let (none, any) = (page::FILE | page::ZERO, page::PRESENT | page::SWAPPED);
    let mut found = Vec::new();
    for part in ranges::without(0..last, known) {
        pagemap::scan(
            pagemap,
            Scan { start: part.start, end: part.end, none, any, tell, ..Scan::default() },
            &mut found,
        )?;
    }
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

/// Whether a process has guards, which are found on kernels that have them.
pub fn has_guards(process: HostPid) -> bool {
    let Ok(pagemap) = File::open(process.proc("pagemap")) else { return false };
    if guard_bit(&pagemap) == 0 {
        return false;
    }
    guards_in(&pagemap, &(0..1 << 47)).is_ok_and(|has| has)
}

/// Whether there are guards at these addresses. The kernel has some, and tells.
fn guards_in(pagemap: &File, range: &Range<u64>) -> io::Result<bool> {
    let scan = Scan { start: range.start, end: range.end, any: page::GUARD, tell: page::GUARD, ..Scan::default() };
    let mut found = Vec::new();
    pagemap::scan(pagemap, scan, &mut found)?;
    Ok(!found.is_empty())
}

/// Addresses in a row in which nothing was modified that a scan leaves out: looking at their page tables takes longer than a
/// call.
const WORTH_LEAVING_OUT: u64 = 256 << 10;

/// Of mappings in which nothing was ever modified, the stretches that are worth leaving out of a scan.
pub fn worth_leaving_out(mappings: impl Iterator<Item = Range<u64>>) -> Vec<Range<u64>> {
    let mut all = ranges::joined(mappings.collect());
    all.retain(|range| range.end - range.start >= WORTH_LEAVING_OUT);
    all
}

/// Those at which a process that does not run has no guards, which are no modification.
pub fn without_guards(process: HostPid, mut all: Vec<Range<u64>>) -> io::Result<Vec<Range<u64>>> {
    let pagemap = File::open(process.proc("pagemap"))?;
    if guard_bit(&pagemap) != 0 {
        all.retain(|range| guards_in(&pagemap, range).is_ok_and(|has| !has));
    }
    Ok(all)
}

/// Whether nothing is at these addresses (sorted, disjoint) of a process.
pub fn is_empty_at(process: HostPid, pages: impl Iterator<Item = Range<u64>>) -> io::Result<bool> {
    let pagemap = File::open(process.proc("pagemap"))?;
    for range in ranges::joined(pages.collect()) {
        let there = |entry: &u64| entry & (entry::PRESENT | entry::SWAPPED) != 0;
        let mut found = Vec::new();
        let any = page::PRESENT | page::SWAPPED;
        let scan = Scan { start: range.start, end: range.end, any, tell: any, ..Scan::default() };
        match pagemap::scan(&pagemap, scan, &mut found) {
            // before Linux 6.7
            Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => {
                let entries = pagemap::entries(&pagemap, range.start, ((range.end - range.start) / PAGE) as usize)?;
                if entries.iter().any(there) {
                    return Ok(false);
                }
            }
            other => other?,
        }
        if !found.is_empty() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The slow way: an entry a page. The page of zeros cannot be told there, so it is copied.
fn find_by_entries(pagemap: &File, mappings: &[Mapping]) -> io::Result<Vec<Region>> {
    let private = mappings.iter().filter(|m| !m.shared && m.end <= 1 << 47).map(|m| m.start..m.end);
    let found = by_entries(pagemap, private, |_| true)?;
    Ok(found.into_iter().map(|r| Region { start: r.start, end: r.end, is: page::PRESENT }).collect())
}

/// The pages at `ranges` that are private, there or swapped out, and whose entries pass `test`.
pub(super) fn by_entries(
    pagemap: &File,
    ranges: impl IntoIterator<Item = Range<u64>>,
    test: impl Fn(u64) -> bool,
) -> io::Result<Vec<Range<u64>>> {
    const AT_ONCE: u64 = 64 << 20;
    let mut found: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        for start in (range.start..range.end).step_by(AT_ONCE as usize) {
            let end = range.end.min(start + AT_ONCE);
            let entries = pagemap::entries(pagemap, start, ((end - start) / PAGE) as usize)?;
            for (address, entry) in (start..).step_by(PAGE as usize).zip(entries) {
                let there = entry & (entry::PRESENT | entry::SWAPPED) != 0 && entry & entry::FILE == 0;
                if !there || !test(entry) {
                    continue;
                }
                match found.last_mut() {
                    Some(last) if last.end == address => last.end += PAGE,
                    _ => found.push(address..address + PAGE),
                }
            }
        }
    }
    Ok(found)
}

/// Bits of an entry of pagemap.
pub(super) mod entry {
    pub(in crate::memory) const PRESENT: u64 = 1 << 63;
    pub(in crate::memory) const SWAPPED: u64 = 1 << 62;
    pub(in crate::memory) const FILE: u64 = 1 << 61;
    /// Written since the marks were last cleared (admin-guide/mm/soft-dirty.rst).
    pub(in crate::memory) const SOFT_DIRTY: u64 = 1 << 55;
    /// Mapped nowhere else.
    pub(in crate::memory) const EXCLUSIVE: u64 = 1 << 56;
    /// Page frame number, or type and place of swap.
    pub(in crate::memory) const PLACE: u64 = (1 << 55) - 1;
}

/// The page frame (or place in swap) behind each of some pages: equal at the same address in parent and child means that
/// they share the page copy-on-write.
#[derive(Clone, Debug, Default)]
pub(super) struct Frames {
    /// First address, then one entry of pagemap a page; sorted.
    runs: Vec<(u64, Vec<u64>)>,
}

impl Frames {
    /// The frames behind `ranges` (sorted, disjoint).
    pub(super) fn read(pagemap: &File, ranges: &[Range<u64>]) -> io::Result<Frames> {
        let mut runs = Vec::with_capacity(ranges.len());
        // one read for ranges that are close to each other
        for near in ranges.chunk_by(|a, b| b.start - a.end < NEAR) {
            let (start, end) = (near[0].start, near[near.len() - 1].end);
            let entries = pagemap::entries(pagemap, start, ((end - start) / PAGE) as usize)?;
            let part =
                |r: &Range<u64>| &entries[((r.start - start) / PAGE) as usize..((r.end - start) / PAGE) as usize];
            runs.extend(near.iter().map(|r| (r.start, part(r).to_vec())));
        }
        Ok(Frames { runs })
    }

    /// The pages that are there and bear no mark of having been written.
    pub(super) fn unmarked(&self) -> Vec<Range<u64>> {
        let addresses = |start: u64| (start..).step_by(PAGE as usize);
        let pages = self.runs.iter().flat_map(|(start, entries)| addresses(*start).zip(entries));
        let clean = |entry: u64| entry & entry::PRESENT != 0 && entry & entry::SOFT_DIRTY == 0;
        in_rows(pages.filter(|(_, entry)| clean(**entry)).map(|(address, _)| address))
    }

    /// The pages that other processes map too.
    pub(super) fn mapped_elsewhere(&self) -> Vec<Range<u64>> {
        let addresses = |start: u64| (start..).step_by(PAGE as usize);
        let pages = self.runs.iter().flat_map(|(start, entries)| addresses(*start).zip(entries));
        in_rows(pages.filter(|(_, entry)| *entry & entry::EXCLUSIVE == 0).map(|(address, _)| address))
    }

    /// The addresses that it knows.
    fn ranges(&self) -> Vec<Range<u64>> {
        self.runs.iter().map(|(start, frames)| *start..start + frames.len() as u64 * PAGE).collect()
    }

    /// The frames of a range that lies in one run.
    fn of(&self, range: &Range<u64>) -> &[u64] {
        let index = self.runs.partition_point(|(start, _)| *start <= range.start) - 1;
        let (start, frames) = &self.runs[index];
        &frames[((range.start - start) / PAGE) as usize..((range.end - start) / PAGE) as usize]
    }

    /// The pages that are the same in the process with page map `parent`, among those at `candidates` (sorted, disjoint).
    pub(super) fn shared_with(&self, parent: &File, candidates: &[Range<u64>]) -> io::Result<Vec<Range<u64>>> {
        let candidates = ranges::common(&self.ranges(), candidates);
        let parent = Frames::read(parent, &candidates)?;
        let same = candidates.into_iter().flat_map(|range| {
            let pairs = self.of(&range).iter().zip(parent.of(&range));
            let addresses = (range.start..).step_by(PAGE as usize).zip(pairs);
            addresses.filter(|(_, (ours, theirs))| is_same(**ours, **theirs)).map(|(address, _)| address)
        });
        Ok(in_rows(same))
    }
}

/// Whether two entries lead to one page.
fn is_same(ours: u64, theirs: u64) -> bool {
    let there = ours & (entry::PRESENT | entry::SWAPPED) != 0;
    there && (ours ^ theirs) & (entry::PLACE | entry::PRESENT | entry::SWAPPED) == 0
}

/// Pages in order, those that follow each other as one range.
fn in_rows(pages: impl Iterator<Item = u64>) -> Vec<Range<u64>> {
    let mut rows: Vec<Range<u64>> = Vec::new();
    for address in pages {
        match rows.last_mut() {
            Some(last) if last.end == address => last.end += PAGE,
            _ => rows.push(address..address + PAGE),
        }
    }
    rows
}

/// The addresses of `pages`.
pub(super) fn runs(pages: &[PageRun]) -> Vec<Range<u64>> {
    ranges::joined(pages.iter().map(|r| r.start..r.end).collect())
}

/// Copies the pages at `wanted` (sorted, disjoint; `frames` knows them) of a running process into the image's data, and
/// gives those that were there.
pub(super) fn store(feed: &mut Feed<'_>, subject: &Subject, wanted: &[Range<u64>], frames: &Frames) -> Vec<PageRun> {
    let elsewhere = frames.mapped_elsewhere();
    let mut reader = Reader { process: subject.host, forced: None };
    let mut runs = Vec::with_capacity(wanted.len());
    for piece in pieces(wanted) {
        let mut buffer = feed.buffer(total(&piece));
        // Some may vanish meanwhile: the piece is in the image for nothing then.
        let read = reader.read(&piece, &elsewhere, &mut buffer);
        let offset = feed.append(buffer).offset;
        if read.is_ok() {
            note(&piece, offset, &mut runs);
        }
    }
    runs
}

/// `wanted` in portions that are read in one go.
pub(super) fn pieces(wanted: &[Range<u64>]) -> Vec<Vec<Range<u64>>> {
    let mut pieces = Vec::new();
    let (mut piece, mut bytes): (Vec<Range<u64>>, u64) = (Vec::new(), 0);
    for range in wanted {
        let mut rest = range.clone();
        while !rest.is_empty() {
            let now = rest.start..rest.end.min(rest.start + (PIECE - bytes));
            rest.start = now.end;
            bytes += now.end - now.start;
            piece.push(now);
            if bytes == PIECE {
                pieces.push(std::mem::take(&mut piece));
                bytes = 0;
            }
        }
    }
    pieces.extend((!piece.is_empty()).then_some(piece));
    pieces
}

/// The contents of the pages of a piece, one behind the other. The process is held.
pub(super) fn read(subject: &Subject, pagemap: &File, piece: &[Range<u64>]) -> Result<Vec<u8>, CaptureError> {
    let mut buffer = vec![0; total(piece)];
    read_into(&mut buffer, subject, pagemap, piece)?;
    Ok(buffer)
}

/// The same, into a buffer of their size.
pub(super) fn read_into(
    buffer: &mut [u8],
    subject: &Subject,
    pagemap: &File,
    piece: &[Range<u64>],
) -> Result<(), CaptureError> {
    let frames =
        Frames::read(pagemap, piece).capturing("reading", format!("the page frames of process {}", subject.pod))?;
    let mut reader = Reader { process: subject.host, forced: None };
    let object = || format!("process {}", subject.pod);
    reader.read(piece, &frames.mapped_elsewhere(), buffer).capturing("reading the memory", object())
}

/// The contents of pages of a process whose thread `thread` the calling thread has stopped as its tracer.
pub fn read_traced(process: HostPid, thread: Pid, pages: &[Range<u64>]) -> io::Result<Vec<u8>> {
    let mut buffer = vec![0; total(pages)];
    let mem = File::open(process.proc("mem"))?;
    let mut rest = &mut buffer[..];
    for range in pages {
        let (now, later) = rest.split_at_mut((range.end - range.start) as usize);
        match mem.read_exact_at(now, range.start) {
            // Not even tracers are let through there; word by word they are.
            Err(error) if error.raw_os_error() == Some(libc::EIO) => {
                for (word, address) in now.chunks_exact_mut(8).zip((range.start..).step_by(8)) {
                    word.copy_from_slice(&ptrace::read(thread, address as ptrace::AddressType)?.to_ne_bytes());
                }
            }
            read => read?,
        }
        rest = later;
    }
    Ok(buffer)
}

/// Puts the contents of a piece into the image's data.
pub(super) fn append(data: &mut DataSink, piece: &[Range<u64>], bytes: Vec<u8>, runs: &mut Vec<PageRun>) {
    note(piece, data.append_pages(bytes).offset, runs);
}

/// Notes that a piece is at `offset` of the image's data.
pub(super) fn note(piece: &[Range<u64>], mut offset: u64, runs: &mut Vec<PageRun>) {
    for range in piece {
        runs.push(PageRun { start: range.start, end: range.end, source: PageSource::Data(offset) });
        offset += range.end - range.start;
    }
}

pub(super) fn total(ranges: &[Range<u64>]) -> usize {
    ranges.iter().map(|r| (r.end - r.start) as usize).sum()
}

/// Reads the memory of a process without changing it.
struct Reader {
    process: HostPid,
    forced: Option<File>,
}

impl Reader {
    /// Reads `ranges` one behind the other. `process_vm_readv` is the fast way, but it *pins* pages, and pinning a page
    /// that is shared copy-on-write gives the process a copy of its own (FAULT_FLAG_UNSHARE, since Linux 5.19): pages
    /// `elsewhere` mapped are read through `/proc/PID/mem`, which does not pin.
    fn read(&mut self, ranges: &[Range<u64>], elsewhere: &[Range<u64>], buffer: &mut [u8]) -> io::Result<()> {
        let mut rest = buffer;
        let mut fast: Vec<Range<u64>> = Vec::new();
        for range in ranges {
            let slow = ranges::common(std::slice::from_ref(range), elsewhere);
            let mut at = range.start;
            for shared in slow {
                fast.extend((at < shared.start).then_some(at..shared.start));
                rest = self.read_fast(&std::mem::take(&mut fast), rest)?;
                rest = self.read_slowly(&shared, rest)?;
                at = shared.end;
            }
            fast.extend((at < range.end).then_some(at..range.end));
        }
        self.read_fast(&fast, rest).map(drop)
    }

    fn read_fast<'b>(&mut self, mut ranges: &[Range<u64>], buffer: &'b mut [u8]) -> io::Result<&'b mut [u8]> {
        let (mut now, later) = buffer.split_at_mut(total(ranges));
        while !ranges.is_empty() {
            let done = memory::read(self.process, ranges, now)?;
            // the process itself may not read one of the pages (no PROT_READ), but a tracer may: the range with it goes
            // the slow way, and what comes behind is tried again
            let mut end = 0;
            let ends = ranges.iter().map(|r| {
                end += (r.end - r.start) as usize;
                end
            });
            let Some(stopped) = ends.take(ranges.len()).position(|end| end > done) else { break };
            let place = total(&ranges[..stopped]);
            now = self.read_slowly(&ranges[stopped], &mut now[place..])?;
            ranges = &ranges[stopped + 1..];
        }
        Ok(later)
    }

    fn read_slowly<'b>(&mut self, range: &Range<u64>, buffer: &'b mut [u8]) -> io::Result<&'b mut [u8]> {
        let file = match &mut self.forced {
            Some(file) => file,
            none => none.insert(File::open(self.process.proc("mem"))?),
        };
        let (now, later) = buffer.split_at_mut((range.end - range.start) as usize);
        file.read_exact_at(now, range.start)?;
        Ok(later)
    }
}
