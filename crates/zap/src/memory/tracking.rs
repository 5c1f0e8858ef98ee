//! Following memory: copied while the pod runs, so that in the hold only what was written since is left.
//!
//! A userfaultfd in asynchronous write-protect mode lets the kernel note writes in the page tables; `PAGEMAP_SCAN` reads
//! and re-arms them. Whatever is not followed (a new mapping, one that was moved) answers EPERM, and counts as written.
//! Kernels before 6.7 have [marks](super::marks) instead.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::layout::{Mapping, Nature, flag};
use super::marks::{self, Marks};
use super::pages::{self, Frames};
use super::state::PageRun;
use super::{ranges, survey};
use crate::error::{CaptureError, Context};
use crate::ids::HostPid;
use crate::image::Feed;
use crate::look::Subject;
use crate::sys::pagemap::{self, Region, Scan, page};
use crate::sys::userfault;
use crate::tracee::{Batch, Call};

/// Adds the call that makes a userfaultfd to a batch; its result is a descriptor, to be fetched for [`Handle::new`] and
/// closed in the tracee. A kernel without it answers with an error: then there is no following.
pub fn ask_for_tracking(batch: &mut Batch) -> Call {
    batch.attempt(libc::SYS_userfaultfd, [userfault::FLAGS.into()])
}

/// What a process's memory is followed through: a userfaultfd that it made, good for as long as it has this address space.
#[derive(Clone, Debug)]
pub struct Handle(Option<Arc<OwnedFd>>);

impl Handle {
    /// Takes a userfaultfd that was only just made.
    pub fn new(userfault: OwnedFd) -> io::Result<Handle> {
        userfault::begin(&userfault)?;
        Ok(Handle(Some(Arc::new(userfault))))
    }

    /// Where this kernel marks written pages and has nothing better: no process need make anything for that.
    pub fn of_marks() -> Option<Handle> {
        marks::are_wanted().then_some(Handle(None))
    }
}

/// The memory of a process that is followed, and what was copied of it. Dropped, it ends the following.
pub struct Ahead {
    process: HostPid,
    pagemap: File,
    /// What is followed, each range in one mapping.
    followed: Vec<Range<u64>>,
    /// The latest copies: sorted, disjoint.
    copied: Vec<PageRun>,
    means: Means,
}

/// How writes are noted.
enum Means {
    /// Through a userfaultfd, with which these ranges were registered.
    Userfault(Arc<OwnedFd>, Vec<Range<u64>>),
    /// By the kernel's marks.
    Marks(Marks),
}

impl Drop for Ahead {
    fn drop(&mut self) {
        let Means::Userfault(userfault, registered) = &self.means else { return };
        for range in registered {
            // What is gone, or was moved, is not followed any more.
            let _ = userfault::unregister(userfault, range);
        }
    }
}

/// What a round of copying did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Round {
    /// Bytes that had been written since the last round.
    pub written: u64,
    /// Bytes copied.
    pub copied: u64,
}

fn is_followed(mapping: &Mapping) -> bool {
    let odd = flag::DROPPABLE | flag::DEVICE | flag::FRAMES | flag::HUGETLB | flag::SHADOW_STACK;
    let kind = matches!(mapping.nature(), Nature::Anonymous | Nature::File);
    !mapping.shared && kind && mapping.flags.known & odd == 0
}

/// Private pages that hold something and were written.
const WRITTEN: Scan = Scan {
    start: 0,
    end: 0,
    all: page::WRITTEN,
    none: page::FILE | page::ZERO,
    any: page::PRESENT | page::SWAPPED,
    tell: page::PRESENT | page::SWAPPED,
    protect: false,
    checked: true,
};

/// Pages that were written, and those that are not there. This very combination makes the kernel look at nothing but the
/// page tables: 0.6 ms/GiB rather than 7.
const NOT_ARMED: Scan =
    Scan { start: 0, end: 0, all: page::WRITTEN, none: 0, any: 0, tell: page::WRITTEN, protect: false, checked: true };

impl Ahead {
    /// Begins to follow a process, which may run; of its mappings that were known `before` only those in which something was
    /// modified. It is an error (ESRCH) if the handle is of an address space that is gone.
    pub fn begin(process: HostPid, handle: Handle, before: &[Mapping]) -> Result<Ahead, CaptureError> {
        let object = || format!("the memory of process {process}");
        let is_empty = |m: &Mapping| {
            let known = before.binary_search_by_key(&m.start, |known| known.start).ok().map(|place| &before[place]);
            known.is_some_and(|known| known.end == m.end && (known.modified == 0 || !is_followed(known)))
        };
        let pagemap = File::open(process.proc("pagemap")).capturing("opening the page map of", object())?;
        let mappings = survey::mappings(process)?;
        let wanted = mappings.iter().filter(|m| is_followed(m) && !is_empty(m)).map(|m| m.start..m.end);
        let Some(userfault) = handle.0 else {
            let means = Means::Marks(Marks::begin(process).capturing("following", object())?);
            return Ok(Ahead { process, pagemap, followed: wanted.collect(), copied: Vec::new(), means });
        };
        let mut followed = Vec::new();
        for range in wanted {
            match userfault::register(&userfault, &range) {
                Ok(()) => followed.push(range),
                Err(e) if e.raw_os_error() == Some(libc::ESRCH) => return Err(e).capturing("following", object()),
                // EBUSY: the program follows it itself. EINVAL: it is gone, or of a kind that cannot be followed
                Err(_) => {}
            }
        }
        let means = Means::Userfault(userfault, followed.clone());
        Ok(Ahead { process, pagemap, followed, copied: Vec::new(), means })
    }

    /// Copies what was written since the last round into the image's data, but for what the process shares with its parent,
    /// whose page map is `parent`.
    pub fn round(
        &mut self,
        feed: &mut Feed<'_>,
        subject: &Subject,
        parent: Option<&File>,
    ) -> Result<Round, CaptureError> {
        let process = self.process;
        let doing = || format!("the memory of process {process}");
        if let Means::Marks(marks) = &self.means
            && marks.know_copies()
        {
            let written = marks.written(&self.pagemap, &self.followed).capturing("looking at", doing())?;
            return Ok(Round { written, copied: 0 });
        }
        let written = self.written().capturing("looking at", doing())?;
        self.copied = PageRun::parts(&self.copied, &ranges::without(0..u64::MAX, &written));
        let frames = Frames::read(&self.pagemap, &written).capturing("looking at", doing())?;
        let theirs = parent.map(|pagemap| frames.shared_with(pagemap, &written));
        let shared = theirs.transpose().capturing("looking at", doing())?.unwrap_or_default();
        let wanted = ranges::minus(&written, &shared);
        // pages may vanish while they are read: they are left to the hold
        let copied = pages::store(feed, subject, &wanted, &frames);
        let bytes = copied.iter().map(|run| run.end - run.start).sum();
        self.copied.extend(copied);
        self.copied.sort_by_key(|r| r.start);
        if let Means::Marks(marks) = &mut self.means {
            marks.copied(frames);
        }
        Ok(Round { written: pages::total(&written) as u64, copied: bytes })
    }

    /// What was written since it was last asked, all at first.
    fn written(&mut self) -> io::Result<Vec<Range<u64>>> {
        let pagemap = &self.pagemap;
        if let Means::Marks(_) = self.means {
            return marks::present(pagemap, &self.followed);
        }
        let mut written = Vec::new();
        // what cannot be followed any more is left to the hold
        self.followed.retain(|range| protect(pagemap, range, &mut written).is_ok());
        Ok(ranges::joined(written.into_iter().map(|r| r.start..r.end).collect()))
    }

    /// Where in much memory the copies are still true, which takes a look at nothing but the page tables. The process is held,
    /// with these mappings.
    pub(super) fn much_unchanged(&self, mappings: &[Mapping]) -> Result<Vec<Range<u64>>, CaptureError> {
        let is_much = |range: &Range<u64>| range.end - range.start >= pages::WORTH_STEPPING_OVER;
        let mut candidates = ranges::common(&pages::runs(&self.copied), &self.followed);
        if let Means::Marks(marks) = &self.means {
            // All that is unchanged: what is found later says nothing of it.
            let still = marks.unwritten(&self.pagemap, &candidates);
            return still.capturing("looking at", format!("the memory of process {}", self.process));
        }
        candidates.retain(is_much);
        let mut still = Vec::new();
        for mapping in mappings.iter().filter(|m| m.nature() == Nature::Anonymous) {
            let concerned = ranges::common(&candidates, std::slice::from_ref(&(mapping.start..mapping.end)));
            let (Some(first), Some(last)) = (concerned.first(), concerned.last()) else { continue };
            let mut written = Vec::new();
            match pagemap::scan(&self.pagemap, Scan { start: first.start, end: last.end, ..NOT_ARMED }, &mut written) {
                Ok(()) => {
                    let written = ranges::joined(written.iter().map(|r| r.start..r.end).collect());
                    still.extend(ranges::minus(&concerned, &written));
                }
                // it is not the mapping that was followed
                Err(e) if e.raw_os_error() == Some(libc::EPERM) => {}
                Err(e) => return Err(e).capturing("scanning", format!("the memory of process {}", self.process)),
            }
        }
        still.retain(is_much);
        Ok(still)
    }

    /// The copies that are still true: where `much` is unchanged, and of what was found in these mappings ([`pages::find`]) the
    /// pages that are followed still and were not written.
    ///
    /// A modified page of a private file mapping that is dropped (`MADV_DONTNEED`) leaves a marker that looks like itself,
    /// swapped out and unwritten: there, what is not present counts as written.
    pub(super) fn unchanged(&self, mappings: &[Mapping], much: Vec<Range<u64>>, found: &[Region]) -> Vec<PageRun> {
        let of_files = mappings.iter().filter(|m| m.nature() != Nature::Anonymous).map(|m| m.start..m.end);
        let of_files = ranges::joined(of_files.collect());
        let unwritten = found.iter().filter(|r| r.is & (page::WP_ALLOWED | page::WRITTEN) == page::WP_ALLOWED);
        let true_parts = unwritten.flat_map(|r| match r.is & page::PRESENT {
            0 => ranges::without(r.start..r.end, &of_files),
            _ => std::iter::once(r.start..r.end).collect(),
        });
        let candidates = ranges::common(&pages::runs(&self.copied), &self.followed);
        let mut still = ranges::common(&candidates, &ranges::joined(true_parts.collect()));
        still.extend(much);
        PageRun::parts(&self.copied, &ranges::joined(still))
    }
}

/// Finds what was written in `range`, and protects it again.
fn protect(pagemap: &File, range: &Range<u64>, written: &mut Vec<Region>) -> io::Result<()> {
    pagemap::scan(pagemap, Scan { start: range.start, end: range.end, protect: true, ..WRITTEN }, written)
}
