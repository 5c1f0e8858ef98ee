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
    let window = |start: u64, end: u64| start / WINDOW * WINDOW..end.next_multiple_of(WINDOW);
    ranges::joined(found.iter().map(|region| window(region.start, region.end)).collect())
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
