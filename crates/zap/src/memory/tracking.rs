//! Following memory: copied while the pod runs, so that in the hold only what was written since is left.
//!
//! A userfaultfd in asynchronous write-protect mode lets the kernel note writes in the page tables; `PAGEMAP_SCAN` reads
//! and re-arms them. Whatever is not followed (a new mapping, one that was moved) answers EPERM, and counts as written.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;

use super::layout::{Mapping, Nature, flag};
use super::pages::{self, Frames};
use super::state::PageRun;
use super::{ranges, survey};
use crate::error::{CaptureError, Context};
use crate::ids::HostPid;
use crate::image::DataSink;
use crate::look::Subject;
use crate::sys::pagemap::{self, Region, Scan, page};
use crate::sys::userfault;
use crate::tracee::{Batch, Call};

/// Adds the call that makes a userfaultfd to a batch; its result is a descriptor, to be fetched for [`Ahead::begin`] and
/// closed in the tracee. A kernel without it answers with an error: then there is no following.
pub fn ask_for_tracking(batch: &mut Batch) -> Call {
    batch.attempt(libc::SYS_userfaultfd, [userfault::FLAGS.into()])
}

/// The memory of a process that is followed, and what was copied of it. Dropped, it ends the following.
pub struct Ahead {
    process: HostPid,
    pagemap: File,
    /// What is followed, each range in one mapping.
    followed: Vec<Range<u64>>,
    /// The layout with its flags, as it was last noted.
    pub(super) layout: Vec<Mapping>,
    /// The latest copies: sorted, disjoint.
    copied: Vec<PageRun>,
    /// The frames behind the pages that were copied last: what a child shares is not copied again.
    frames: Frames,
    /// Closing it ends the following.
    _userfault: OwnedFd,
}

/// Addresses whose pages are read and written out together.
const PART: u64 = 64 << 20;

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
    !mapping.shared && mapping.nature() != Nature::Kernel && mapping.flags.known & odd == 0
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

impl Ahead {
    /// Begins to follow a process, which may run, through a userfaultfd that it made. `ours` are ranges of zap's.
    pub fn begin(process: HostPid, userfault: OwnedFd, ours: &[Range<u64>]) -> Result<Ahead, CaptureError> {
        let object = || format!("the memory of process {process}");
        userfault::begin(&userfault).capturing("following", object())?;
        let ours = ranges::joined(ours.to_vec());
        let mappings = survey::mappings(process)?;
        let private = mappings.iter().filter(|m| is_followed(m)).map(|m| m.start..m.end);
        let mut followed = Vec::new();
        for range in private.flat_map(|r| ranges::without(r, &ours)) {
            // EBUSY: the program follows it itself. EINVAL: it is gone, or of a kind that cannot be followed
            if userfault::register(&userfault, &range).is_ok() {
                followed.push(range);
            }
        }
        let pagemap = File::open(process.proc("pagemap")).capturing("opening the page map of", object())?;
        let frames = Frames::default();
        Ok(Ahead { process, pagemap, followed, layout: Vec::new(), copied: Vec::new(), frames, _userfault: userfault })
    }

    /// Copies what was written since the last round into the image's data, but for what is shared with `parent`.
    pub fn round(
        &mut self,
        data: &mut DataSink,
        subject: &Subject,
        parent: Option<&Ahead>,
    ) -> Result<Round, CaptureError> {
        let mut written = Vec::new();
        let pagemap = &self.pagemap;
        // what cannot be followed any more is left to the hold
        self.followed.retain(|range| protect(pagemap, range, &mut written).is_ok());
        let written = ranges::joined(written.into_iter().map(|r| r.start..r.end).collect());
        self.copied = PageRun::parts(&self.copied, &ranges::without(0..u64::MAX, &written));
        let doing = || format!("the memory of process {}", self.process);
        let frames = Frames::read(&self.pagemap, &written).capturing("looking at", doing())?;
        let everywhere = vec![Range { start: 0, end: u64::MAX }];
        let shared = parent.map_or(Vec::new(), |p| frames.shared_with(&p.frames, &everywhere));
        let wanted = ranges::minus(&written, &shared);
        let before = data.end();
        // pages may vanish while they are read: that part is left to the hold
        for some in wanted.chunk_by(|a, b| a.start / PART == b.start / PART) {
            if let Ok(runs) = pages::store(data, subject, some, &frames) {
                self.copied.extend(runs);
            }
            data.flush().capturing("writing", doing())?;
        }
        self.copied.sort_by_key(|r| r.start);
        self.frames = Frames::read(&self.pagemap, &pages::runs(&self.copied)).capturing("looking at", doing())?;
        Ok(Round { written: pages::total(&written) as u64, copied: data.end() - before })
    }

    /// Notes the layout with its flags: reading these takes longer the more memory there is, so not in the hold.
    pub fn note_layout(&mut self) {
        self.layout = survey::mappings_with_flags(self.process).unwrap_or_default();
    }

    /// The copies that are still true, among the pages at `wanted`. The process is held.
    pub(super) fn unchanged(&self, mappings: &[Mapping], wanted: &[Range<u64>]) -> Result<Vec<PageRun>, CaptureError> {
        let candidates = ranges::common(&ranges::common(&pages::runs(&self.copied), wanted), &self.followed);
        let mut written = Vec::new();
        for mapping in mappings {
            let range = mapping.start..mapping.end;
            let concerned = candidates.partition_point(|c| c.end <= range.start);
            if candidates.get(concerned).is_none_or(|c| c.start >= range.end) {
                continue;
            }
            let mut found = Vec::new();
            let scan = Scan { start: range.start, end: range.end, ..WRITTEN };
            match pagemap::scan(&self.pagemap, scan, &mut found) {
                Ok(()) => written.extend(found.iter().map(|r| r.start..r.end)),
                Err(e) if e.raw_os_error() == Some(libc::EPERM) => written.push(range),
                Err(e) => return Err(e).capturing("scanning", format!("the memory of process {}", self.process)),
            }
        }
        let true_still = ranges::minus(&candidates, &ranges::joined(written));
        Ok(PageRun::parts(&self.copied, &true_still))
    }
}

/// Finds what was written in `range`, and protects it again.
fn protect(pagemap: &File, range: &Range<u64>, written: &mut Vec<Region>) -> io::Result<()> {
    pagemap::scan(pagemap, Scan { start: range.start, end: range.end, protect: true, ..WRITTEN }, written)
}
