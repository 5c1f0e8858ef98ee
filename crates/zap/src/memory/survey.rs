//! What the kernel tells of an address space, read in one go. Needs nothing of the checkpoint: several processes can be
//! surveyed at once.

use std::fs::File;
use std::ops::Range;

use super::layout::{self, Mapping};
use super::state::{MmFields, PageRun};
use super::tracking::Ahead;
use super::{pages, ranges};
use crate::error::{CaptureError, Context};
use crate::ids::HostPid;
use crate::procfs;
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
    /// Where pages of files were mapped in.
    pub(super) touched: Vec<Range<u64>>,
}

impl Survey {
    /// Notes where pages of files were mapped in while the process ran.
    pub fn with_touched(self, windows: &[Range<u64>]) -> Survey {
        Survey { touched: windows.to_vec(), ..self }
    }
}

/// The mappings of a process, without their flags: cheap.
pub fn mappings(process: HostPid) -> Result<Vec<Mapping>, CaptureError> {
    read_mappings(process, "maps")
}

fn read_mappings(process: HostPid, name: &str) -> Result<Vec<Mapping>, CaptureError> {
    let object = || format!("/proc/{process}/{name}");
    let text = procfs::read(process.proc(name)).capturing("reading", object())?;
    layout::parse(&text).map_err(|e| CaptureError::Unexpected { object: object(), what: e.to_string() })
}

/// The mappings of a process with their flags: the more memory, the longer it takes (17 ms/GiB).
pub fn layout_of(process: HostPid) -> Result<Vec<Mapping>, CaptureError> {
    read_mappings(process, "smaps")
}

/// The mappings with the flags that were noted `before`, if all of them are still there.
fn layout_since(
    process: HostPid,
    mut found: Vec<Mapping>,
    before: &[Mapping],
    ours: &[Range<u64>],
) -> Result<Vec<Mapping>, CaptureError> {
    let mut known = before.iter().peekable();
    let is_ours = |m: &Mapping| ours.iter().any(|r| r.start <= m.start && m.end <= r.end);
    for mapping in found.iter_mut().filter(|m| !is_ours(m)) {
        while known.next_if(|k| k.start < mapping.start).is_some() {}
        match known.next_if(|k| k.same_line(mapping)) {
            Some(same) => (mapping.flags, mapping.key) = (same.flags.clone(), same.key),
            None => return layout_of(process),
        }
    }
    Ok(found)
}

/// Looks at the address space of a process that is held, with these `mappings`. `ours` are ranges that zap itself has put
/// there: as if they were not there. What was noted of its layout `before` is believed of mappings that are still there.
pub fn survey(
    process: HostPid,
    mappings: Vec<Mapping>,
    ours: &[Range<u64>],
    before: Option<&[Mapping]>,
    ahead: Option<&Ahead>,
) -> Result<Survey, CaptureError> {
    let found = match before {
        Some(before) => layout_since(process, mappings, before, ours)?,
        None => layout_of(process)?,
    };
    let ours = ranges::joined(ours.to_vec());
    let mappings: Vec<Mapping> = found.iter().flat_map(|m| cut(m, &ours)).collect();
    let pagemap = File::open(process.proc("pagemap")).capturing("opening", format!("/proc/{process}/pagemap"))?;
    let unchanged = ahead.map_or(Ok(Vec::new()), |ahead| ahead.unchanged(&mappings))?;
    let regions = pages::find(&pagemap, &mappings, &pages::runs(&unchanged))
        .capturing("scanning the pages", format!("process {process}"))?;
    let fields = read_fields(process)?;
    Ok(Survey { process, mappings, regions, unchanged, fields, pagemap, touched: Vec::new() })
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
    let stat = procfs::read_record(process.proc("stat")).capturing("reading", object())?;
    let auxv = procfs::read_record(process.proc("auxv")).capturing("reading", format!("/proc/{process}/auxv"))?;
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
    fn what_is_ours_is_cut_out() {
        let file = Mapping { start: 0x1000, end: 0x5000, offset: 0x7000, inode: 9, ..Mapping::default() };
        let parts = cut(&file, std::slice::from_ref(&(0x2000..0x3000)));
        assert_eq!(
            parts.iter().map(|m| (m.start, m.end, m.offset)).collect::<Vec<_>>(),
            [(0x1000, 0x2000, 0x7000), (0x3000, 0x5000, 0x9000)]
        );
    }
}
