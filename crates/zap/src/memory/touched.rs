//! Pages of files that a process has mapped in: not contents, which the file has, but what makes a process that goes on
//! find its program where it left it, and weigh what it weighed.

use std::fs::File;
use std::io;
use std::ops::Range;

use super::layout::{Mapping, Nature};
use super::ranges;
use crate::ids::HostPid;
use crate::sys::memory;
use crate::sys::pagemap::{self, Scan, page};

/// The kernel maps the pages around one that is touched as well, within a window of this size (`fault_around_bytes`).
const WINDOW: u64 = 64 << 10;
/// Windows of one process that are mapped in at most: an image may say anything.
const MOST: usize = 1 << 18;

/// The windows of files in which pages are mapped in, of a process with these mappings. Best effort: none on a kernel that
/// cannot tell (before Linux 6.7).
pub fn touched(process: HostPid, mappings: &[Mapping]) -> Vec<Range<u64>> {
    let Ok(pagemap) = File::open(process.proc("pagemap")) else { return Vec::new() };
    let mut found = Vec::new();
    for span in ranges::joined(mappings.iter().filter(|m| m.nature() == Nature::File).map(|m| m.start..m.end).collect())
    {
        let all = page::PRESENT | page::FILE;
        let scan = Scan { start: span.start, end: span.end, all, tell: page::PRESENT, ..Scan::default() };
        if pagemap::scan(&pagemap, scan, &mut found).is_err() {
            break;
        }
    }
    windows(found.iter().map(|region| region.start..region.end))
}

/// Ranges, in steps of a window, of pages that are in these regions: one of each window. Another page of a window might be a
/// hole of shared memory, which takes a page when it is touched.
fn windows(regions: impl Iterator<Item = Range<u64>>) -> Vec<Range<u64>> {
    let mut all: Vec<Range<u64>> = Vec::new();
    let mut done = 0;
    for region in regions {
        let start = region.start.max(done);
        if start >= region.end {
            continue;
        }
        let edge = (start + 1).next_multiple_of(WINDOW);
        all.push(start..region.end.min(edge));
        if edge < region.end {
            all.push(edge..region.end);
        }
        done = region.end.next_multiple_of(WINDOW);
    }
    all
}

/// Maps in the pages in these windows of a running process, as far as they are files' still.
pub fn touch(process: HostPid, windows: &[Range<u64>]) -> io::Result<()> {
    let starts = |range: &Range<u64>| range.clone().step_by(WINDOW as usize);
    let bytes: Vec<Range<u64>> = windows.iter().flat_map(starts).take(MOST).map(|at| at..at + 1).collect();
    let mut rest = &bytes[..];
    let mut room = vec![0; rest.len()];
    while !rest.is_empty() {
        let done = memory::read(process, rest, &mut room[..rest.len()])?;
        // What cannot be read is left as it is.
        rest = rest.get(done + 1..).unwrap_or_default();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_of_each_window_is_touched_and_none_that_was_not() {
        const PAGE: u64 = 4096;
        let regions = [PAGE..3 * PAGE, 5 * PAGE..6 * PAGE, 15 * PAGE..40 * PAGE, 47 * PAGE..49 * PAGE];
        let starts = |range: &Range<u64>| range.clone().step_by(WINDOW as usize);
        let touched: Vec<u64> = windows(regions.into_iter()).iter().flat_map(starts).map(|at| at / PAGE).collect();
        assert_eq!(touched, [1, 16, 32, 48]);
    }
}
