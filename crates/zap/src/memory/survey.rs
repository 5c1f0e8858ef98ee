//! What the kernel tells of an address space, read in one go. Needs nothing of the checkpoint: several processes can be
//! surveyed at once.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use super::layout::{self, Mapping};
use super::state::{MmFields, PageRun};
use super::tracking::Ahead;
use super::{pages, ranges};
use crate::error::{CaptureError, Context};
use crate::ids::HostPid;
use crate::procfs;
use crate::sys::pagemap::Region;
use crate::sys::procmap::{self, Queried};

/// What was read.
pub struct Survey {
    /// The process.
    pub process: HostPid,
    /// Its mappings.
    pub mappings: Arc<Vec<Mapping>>,
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

/// Whether the mappings of a process are what they were `before`. The kernel's text has the path of each in it, which takes
/// long to write: whose file is the same is not asked for it.
pub fn are_still(process: HostPid, before: &[Mapping]) -> bool {
    let Ok(maps) = File::open(process.proc("maps")) else { return false };
    let mut at = 0;
    for known in before.iter().filter(|known| known.start < TOP) {
        match procmap::query(&maps, at, known.inode == 0) {
            Ok(Some(found)) if is_line(&found, known) => at = found.end,
            // Before Linux 6.11 nobody can be asked.
            _ => return false,
        }
    }
    matches!(procmap::query(&maps, at, false), Ok(None))
}

/// What lies above is the kernel's, and cannot be asked for.
const TOP: u64 = 1 << 56;

fn is_line(found: &Queried, known: &Mapping) -> bool {
    let bit = |flag: u64, bit: i32| if found.flags & flag != 0 { bit } else { 0 };
    let protection = bit(procmap::READ, libc::PROT_READ)
        | bit(procmap::WRITE, libc::PROT_WRITE)
        | bit(procmap::EXECUTE, libc::PROT_EXEC);
    let device = libc::makedev(found.device.0, found.device.1);
    (found.start, found.end, protection, found.flags & procmap::SHARED != 0, found.offset, device, found.inode)
        == (known.start, known.end, known.protection, known.shared, known.offset, known.device, known.inode)
        && (known.inode != 0 || found.name == known.path)
}

/// Looks at the address space of a process that is held, with these `mappings` and their flags. `ours` are ranges that zap
/// itself has put there: as if they were not there. What is `untouched` need not be looked at.
pub fn survey(
    process: HostPid,
    mappings: &Arc<Vec<Mapping>>,
    ours: &[Range<u64>],
    (ahead, untouched): (Option<&Ahead>, &[Range<u64>]),
) -> Result<Survey, CaptureError> {
    let ours = ranges::joined(ours.to_vec());
    let is_ours = |mapping: &Mapping| ours.iter().any(|ours| mapping.start < ours.end && ours.start < mapping.end);
    let mappings = match mappings.iter().any(is_ours) {
        true => Arc::new(mappings.iter().flat_map(|mapping| cut(mapping, &ours)).collect()),
        false => mappings.clone(),
    };
    let pagemap = File::open(process.proc("pagemap")).capturing("opening", format!("/proc/{process}/pagemap"))?;
    let much = ahead.map_or(Ok(Vec::new()), |ahead| ahead.much_unchanged(&mappings))?;
    let known = ranges::joined(much.iter().chain(untouched).cloned().collect());
    let regions =
        pages::find(&pagemap, &mappings, &known).capturing("scanning the pages", format!("process {process}"))?;
    let unchanged = ahead.map_or(Vec::new(), |ahead| ahead.unchanged(&mappings, much, &regions));
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

/// Reads some bytes as the line that says where a process has what.
pub(super) fn try_stat(bytes: &[u8]) {
    drop(parse_stat(bytes, Vec::new()));
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
    fn mappings_that_are_still_there_are_told_from_others() {
        let own = HostPid(std::process::id() as i32);
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        let host = HostPid(child.id() as i32);
        while std::fs::read_link(host.proc("exe")).unwrap() == std::fs::read_link(own.proc("exe")).unwrap()
            || !std::fs::read_to_string(host.proc("wchan")).unwrap().contains("nanosleep")
        {
            std::thread::yield_now();
        }
        let before = layout_of(host).unwrap();
        let is_known = procmap::query(&File::open(host.proc("maps")).unwrap(), 0, false).is_ok();
        assert_eq!(are_still(host, &before), is_known);
        type Change = fn(&mut Vec<Mapping>);
        let changes: [Change; 6] = [
            |m| m[1].end += 4096,
            |m| m[1].protection ^= libc::PROT_WRITE,
            |m| m[0].inode += 1,
            |m| drop(m.remove(2)),
            |m| m.iter_mut().find(|m| m.path == b"[heap]").unwrap().path = b"[anon:a]".to_vec(),
            |m| m.retain(|m| m.path != b"[stack]"),
        ];
        for change in changes {
            let mut other = before.clone();
            change(&mut other);
            assert!(!are_still(host, &other));
        }
        child.kill().unwrap();
        child.wait().unwrap();
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
