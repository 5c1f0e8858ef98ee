//! What the kernel tells of an address space, read in one go. Needs nothing of the checkpoint: several processes can be
//! surveyed at once.

use std::fs::File;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::layout::{self, Mapping};
use super::state::{MmFields, PageRun};
use super::tracking::Ahead;
use super::{pages, ranges};
use crate::error::{CaptureError, Context};
use crate::ids::HostPid;
use crate::sys::pagemap::Region;

/// What was read.
pub struct Survey {
    /// The process.
    pub process: HostPid,
    /// Its mappings.
    pub mappings: Vec<Mapping>,
    /// Private pages that are there, and guards.
    pub(super) regions: Vec<Region>,
    /// Private pages that were copied ahead and have not changed since; they may be missing from `regions`.
    pub(super) unchanged: Vec<PageRun>,
    /// Fields of the kernel's; `brk` and `exe` are still open.
    pub(super) fields: MmFields,
    pub(super) pagemap: File,
}

/// The mappings of a process, without their flags: cheap.
pub fn mappings(process: HostPid) -> Result<Vec<Mapping>, CaptureError> {
    read_mappings(process, "maps")
}

fn read_mappings(process: HostPid, name: &str) -> Result<Vec<Mapping>, CaptureError> {
    let object = || format!("/proc/{process}/{name}");
    let text = std::fs::read(process.proc(name)).capturing("reading", object())?;
    layout::parse(&text).map_err(|e| CaptureError::Unexpected { object: object(), what: e.to_string() })
}

/// The mappings of a process with their flags: the more memory, the longer it takes (17 ms/GiB).
pub(super) fn mappings_with_flags(process: HostPid) -> Result<Vec<Mapping>, CaptureError> {
    read_mappings(process, "smaps")
}

/// The mappings with the flags that were noted `before`, if all of them are still there.
fn layout_since(process: HostPid, before: &[Mapping], ours: &[Range<u64>]) -> Result<Vec<Mapping>, CaptureError> {
    let mut found = mappings(process)?;
    let mut known = before.iter().peekable();
    let is_ours = |m: &Mapping| ours.iter().any(|r| r.start <= m.start && m.end <= r.end);
    for mapping in found.iter_mut().filter(|m| !is_ours(m)) {
        while known.next_if(|k| k.start < mapping.start).is_some() {}
        match known.next_if(|k| k.same_line(mapping)) {
            Some(same) => (mapping.flags, mapping.key) = (same.flags.clone(), same.key),
            None => return mappings_with_flags(process),
        }
    }
    Ok(found)
}

/// Looks at the address space of a process that is held. `ours` are ranges that zap itself has put there: as if they were
/// not there. Where it was followed, what was noted of its layout then is believed of mappings that are still there.
pub fn survey(process: HostPid, ours: &[Range<u64>], ahead: Option<&Ahead>) -> Result<Survey, CaptureError> {
    let found = match ahead {
        Some(ahead) => layout_since(process, &ahead.layout, ours)?,
        None => mappings_with_flags(process)?,
    };
    let ours = ranges::joined(ours.to_vec());
    let mappings: Vec<Mapping> = found.iter().flat_map(|m| cut(m, &ours)).collect();
    let pagemap = File::open(process.proc("pagemap")).capturing("opening", format!("/proc/{process}/pagemap"))?;
    let unchanged = ahead.map_or(Ok(Vec::new()), |ahead| ahead.unchanged(&mappings))?;
    let regions = pages::find(&pagemap, &mappings, &pages::runs(&unchanged))
        .capturing("scanning the pages", format!("process {process}"))?;
    let fields = read_fields(process)?;
    Ok(Survey { process, mappings, regions, unchanged, fields, pagemap })
}

/// Surveys several processes (each with the ranges that are ours), with as many threads as there are processors.
pub fn survey_all(processes: &[(HostPid, Vec<Range<u64>>)]) -> Vec<Result<Survey, CaptureError>> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(processes.len());
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        while let Some((index, (process, ours))) = take(&next, processes) {
            done.push((index, survey(*process, ours, None)));
        }
        done
    };
    let mut all = std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let mut all = work();
        for other in others {
            all.extend(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        }
        all
    });
    all.sort_by_key(|(index, _)| *index);
    all.into_iter().map(|(_, survey)| survey).collect()
}

/// The next piece of work, with its place.
fn take<'a, T>(next: &AtomicUsize, all: &'a [T]) -> Option<(usize, &'a T)> {
    let index = next.fetch_add(1, Ordering::Relaxed);
    all.get(index).map(|one| (index, one))
}

/// The parts of a mapping that are not ours.
fn cut(mapping: &Mapping, ours: &[Range<u64>]) -> Vec<Mapping> {
    let part = |r: Range<u64>| {
        let offset = if mapping.inode == 0 { mapping.offset } else { mapping.offset + (r.start - mapping.start) };
        Mapping { start: r.start, end: r.end, offset, ..mapping.clone() }
    };
    ranges::without(mapping.start..mapping.end, ours).into_iter().map(part).collect()
}

fn read_fields(process: HostPid) -> Result<MmFields, CaptureError> {
    let object = || format!("/proc/{process}/stat");
    let stat = std::fs::read(process.proc("stat")).capturing("reading", object())?;
    let auxv = std::fs::read(process.proc("auxv")).capturing("reading", format!("/proc/{process}/auxv"))?;
    parse_stat(&stat, auxv).ok_or_else(|| CaptureError::Unexpected { object: object(), what: "text".into() })
}

/// Fields of proc(5), counted from 1; the command in parentheses may hold anything.
fn parse_stat(stat: &[u8], auxv: Vec<u8>) -> Option<MmFields> {
    let behind = stat.iter().rposition(|b| *b == b')')? + 2;
    let words: Vec<&[u8]> = stat.get(behind..)?.split(|b| *b == b' ').collect();
    let field = |number: usize| std::str::from_utf8(words.get(number - 3)?.trim_ascii()).ok()?.parse::<u64>().ok();
    Some(MmFields {
        start_code: field(26)?,
        end_code: field(27)?,
        start_stack: field(28)?,
        start_data: field(45)?,
        end_data: field(46)?,
        start_brk: field(47)?,
        arg_start: field(48)?,
        arg_end: field(49)?,
        env_start: field(50)?,
        env_end: field(51)?,
        auxv,
        ..MmFields::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_is_understood() {
        let stat = std::fs::read("/proc/self/stat").unwrap();
        let fields = parse_stat(&stat, Vec::new()).unwrap();
        let maps = mappings(HostPid(std::process::id() as i32)).unwrap();
        let at = |name: &[u8]| maps.iter().find(|m| m.path == name).map(|m| m.start..m.end).unwrap();
        assert!(at(b"[stack]").contains(&fields.start_stack));
        assert!(at(b"[stack]").contains(&fields.arg_start) && fields.arg_start < fields.arg_end);
        assert!(at(b"[heap]").contains(&fields.start_brk));
        assert!(fields.start_code < fields.end_code);
        assert!(parse_stat(b"1 (x) y) R 1 2", Vec::new()).is_none());
        assert!(parse_stat(b"", Vec::new()).is_none());
    }

    #[test]
    fn several_are_surveyed_in_order() {
        let ours = HostPid(std::process::id() as i32);
        let all = survey_all(&[(ours, Vec::new()), (HostPid(-1), Vec::new()), (ours, Vec::new())]);
        assert_eq!(all.iter().map(Result::is_ok).collect::<Vec<_>>(), [true, false, true]);
        assert!(survey_all(&[]).is_empty());
    }

    #[test]
    fn what_is_ours_is_cut_out() {
        let file = Mapping { start: 0x1000, end: 0x5000, offset: 0x7000, inode: 9, ..Mapping::default() };
        let parts = cut(&file, std::slice::from_ref(&(0x2000..0x3000)));
        assert_eq!(
            parts.iter().map(|m| (m.start, m.end, m.offset)).collect::<Vec<_>>(),
            [(0x1000, 0x2000, 0x7000), (0x3000, 0x5000, 0x9000)]
        );
    }
}
