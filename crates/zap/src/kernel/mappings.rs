//! The mappings of a process as the kernel has them, without their text: all of them in one read, flags among it, at a
//! twentieth of what `/proc/PID/smaps` takes. What the bits of the flags mean is the kernel's own affair: what is asked is
//! whether anything has changed.

use std::io;
use std::sync::OnceLock;

use super::Kernel;
use crate::ids::HostPid;
use crate::sys::mappings::{Own, Places, Teller};
pub(crate) use crate::sys::mappings::{Record, Told};
use crate::sys::memory::MADV_GUARD_INSTALL;
use crate::sys::userfault;

/// Who tells of mappings, once it was opened; the error is why nobody does.
static TELLS: OnceLock<io::Result<Mappings>> = OnceLock::new();

struct Mappings {
    teller: Teller,
    /// The bits of the flags that following memory changes.
    follows: u64,
    /// See [`guards`].
    guards: Option<u64>,
}

impl Mappings {
    fn open(kernel: &Kernel) -> io::Result<Mappings> {
        let [function, _] = kernel.tellers;
        let function = function.ok_or(io::ErrorKind::Unsupported)?;
        if !kernel.has("mm_struct.mm_lock_seq") {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let at = |member: &str| kernel.members[member] as i16;
        let named = ["vm_area_struct.anon_name", "anon_vma_name.name"];
        let places = Places {
            start: at("vm_area_struct.vm_start"),
            end: at("vm_area_struct.vm_end"),
            flags: at("vm_area_struct.vm_flags"),
            offset: at("vm_area_struct.vm_pgoff"),
            modified: at("vm_area_struct.anon_vma"),
            file: at("vm_area_struct.vm_file"),
            inode: at("file.f_inode"),
            number: at("inode.i_ino"),
            system: at("inode.i_sb"),
            device: at("super_block.s_dev"),
            memory: at("vm_area_struct.vm_mm"),
            changes: at("mm_struct.mm_lock_seq"),
            name: named.iter().all(|member| kernel.has(member)).then(|| named.map(at).into()),
        };
        let teller = Teller::open(function, &places)?;
        let (follows, guards) = (followed_bits(&teller)?, guard_bits(&teller)?);
        Ok(Mappings { teller, follows, guards })
    }
}

/// The mappings of a process, without the bits of their flags that following its memory changes; `None` where nobody tells,
/// and of a process whose first thread has ended.
pub(crate) fn of(process: HostPid) -> Option<Told> {
    let mappings = TELLS.get()?.as_ref().ok()?;
    let mut told = mappings.teller.read(process.0).ok().filter(|told| !told.records.is_empty())?;
    told.records.iter_mut().for_each(|record| record.flags &= !mappings.follows);
    Some(told)
}

/// The bits of the flags that guards leave in a mapping of a file, if it shows there that they were made, as everything else
/// does that changes it.
pub(crate) fn guards() -> Option<u64> {
    TELLS.get()?.as_ref().ok()?.guards
}

/// Opens what tells of mappings, if it may be: it takes some milliseconds, once.
pub(crate) fn open() {
    let open = || Mappings::open(&*super::reader().map_err(io::Error::other)?);
    if let Err(error) = TELLS.get_or_init(open) {
        tracing::info!(%error, "mappings are read as text");
    }
}

/// Whether it has been tried to open it.
pub(crate) fn are_told() -> bool {
    TELLS.get().is_some()
}

fn record_of(own: &Own, teller: &Teller) -> io::Result<Record> {
    let all = teller.read(std::process::id() as i32)?;
    all.records.into_iter().find(|record| record.range() == own.range()).ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// The bits that are other once memory is followed.
fn followed_bits(teller: &Teller) -> io::Result<u64> {
    let own = Own::map()?;
    let before = record_of(&own, teller)?.flags;
    let userfault = userfault::own()?;
    userfault::begin(&userfault)?;
    userfault::register(&userfault, &own.range())?;
    Ok(before ^ record_of(&own, teller)?.flags)
}

/// What a guard leaves in the flags of a mapping of a file: nothing where it makes it a modified one, or where there can be none
/// (before Linux 6.15).
fn guard_bits(teller: &Teller) -> io::Result<Option<u64>> {
    let own = Own::map()?;
    let before = record_of(&own, teller)?;
    if own.advise(MADV_GUARD_INSTALL).is_err() {
        return Ok(Some(0));
    }
    let after = record_of(&own, teller)?;
    let bits = before.flags ^ after.flags;
    Ok((bits != 0 || after.modified).then_some(bits))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    #[test]
    fn mappings_are_those_of_the_text() {
        open();
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        let host = HostPid(child.id() as i32);
        let program = || std::fs::read_link(host.proc("exe"));
        while program().unwrap() == std::env::current_exe().unwrap()
            || !std::fs::read_to_string(host.proc("wchan")).unwrap().contains("nanosleep")
        {
            std::thread::yield_now();
        }
        let text = memory::layout_of(host).unwrap();
        let told = of(host).unwrap().records;
        let ranges: Vec<_> = told.iter().map(Record::range).collect();
        let known: Vec<_> = text.iter().filter(|m| m.start < 1 << 56).map(|m| m.start..m.end).collect();
        assert_eq!(ranges, known);
        assert_eq!(of(host).unwrap().records, told);
        let modified = text.iter().zip(&told).filter(|(m, _)| m.modified != 0 && !m.shared);
        assert!(modified.clone().count() > 2);
        modified.for_each(|(m, record)| assert!(record.modified, "{m:?}"));
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn as_many_as_there_are_are_told() {
        open();
        let _all: Vec<Own> = (0..3000).map(|_| Own::map().unwrap()).collect();
        let host = HostPid(std::process::id() as i32);
        let mut told = of(host).unwrap().records;
        let text = memory::mappings(host).unwrap();
        told.retain(|record| text.iter().any(|m| (m.start..m.end) == record.range()));
        assert!(told.len() > 3000 && told.is_sorted_by_key(|record| record.start));
    }

    #[test]
    fn advice_is_a_change_and_following_is_none() {
        open();
        let own = Own::map().unwrap();
        let record = || {
            let all = of(HostPid(std::process::id() as i32)).unwrap().records;
            all.into_iter().find(|record| record.range() == own.range()).unwrap()
        };
        let before = record();
        assert!(!before.modified);
        let userfault = userfault::own().unwrap();
        userfault::begin(&userfault).unwrap();
        userfault::register(&userfault, &own.range()).unwrap();
        assert_eq!(record(), before);
        own.advise(libc::MADV_DONTFORK).unwrap();
        assert_ne!(record(), before);
    }

    #[test]
    fn guards_are_a_change_that_shows() {
        open();
        let own = Own::map().unwrap();
        let record = || record_of(&own, &TELLS.get().unwrap().as_ref().unwrap().teller).unwrap();
        let before = record();
        let shows = |record: &Record| record.modified || guards().is_some_and(|bits| record.flags & bits != 0);
        assert!(!shows(&before));
        let told = own.advise(MADV_GUARD_INSTALL).is_ok() && guards().is_some();
        let after = record();
        assert_eq!(shows(&after), told);
        assert!(!told || after != before);
    }
}
