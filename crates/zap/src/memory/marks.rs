//! The kernel's marks on pages that were written: *soft-dirty* (admin-guide/mm/soft-dirty.rst), for kernels before 6.7.
//!
//! Marks are cleared for a whole process, and not in the moment in which they are read: what was written between the two
//! would be lost. So they are cleared once, before anything is copied, and what bears a mark in the hold is copied again.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::sync::OnceLock;

use super::pages::{self, Frames, entry};
use crate::ids::HostPid;
use crate::probe;

/// Whether there are marks, and nothing better. The file that clears them is there on kernels that never set one: it is tried.
pub(super) fn are_wanted() -> bool {
    static WANTED: OnceLock<bool> = OnceLock::new();
    *WANTED.get_or_init(|| !probe::follows_asynchronously() && probe::soft_dirty().is_ok())
}

/// The marks of a process since they were cleared.
pub(super) struct Marks {
    /// The frames of the pages that were copied, as they were before: a page that vanished, and was then read, is the page of
    /// zeros, and bears no mark.
    frames: Option<Frames>,
}

impl Marks {
    /// Clears those of a process, which may run.
    pub(super) fn begin(process: HostPid) -> io::Result<Marks> {
        const SOFT_DIRTY: &str = "4";
        fs::write(process.proc("clear_refs"), SOFT_DIRTY)?;
        Ok(Marks { frames: None })
    }

    /// Whether pages have been copied.
    pub(super) fn know_copies(&self) -> bool {
        self.frames.is_some()
    }

    /// Notes what has been copied, all of it since the marks were cleared.
    pub(super) fn copied(&mut self, frames: Frames) {
        self.frames = Some(frames);
    }

    /// Bytes that were written since.
    pub(super) fn written(&self, pagemap: &File, followed: &[Range<u64>]) -> io::Result<u64> {
        let marked = pages::by_entries(pagemap, followed.iter().cloned(), |entry| entry & entry::SOFT_DIRTY != 0)?;
        Ok(pages::total(&marked) as u64)
    }

    /// The pages among those at `copied` that are what they were. The process is held.
    pub(super) fn unwritten(&self, pagemap: &File, copied: &[Range<u64>]) -> io::Result<Vec<Range<u64>>> {
        let Some(frames) = &self.frames else { return Ok(Vec::new()) };
        let unmarked = Frames::read(pagemap, copied)?.unmarked();
        frames.shared_with(pagemap, &unmarked)
    }
}

/// The private pages at `followed` that are there.
pub(super) fn present(pagemap: &File, followed: &[Range<u64>]) -> io::Result<Vec<Range<u64>>> {
    pages::by_entries(pagemap, followed.iter().cloned(), |_| true)
}
