//! Address spaces whose pages come later: whoever touches one that has not come is to wait for it.

use std::os::fd::OwnedFd;

use crate::error::{Context, RebuildError};
use crate::ids::{HostPid, PodPid};
use crate::memory::PageRun;
use crate::memory::{is_empty_at, over_range};
use crate::process::grow::{Grove, GrowError};
use crate::process::state::ProcessState;
use crate::sys::pidfd::PidFd;
use crate::sys::userfault;
use crate::tracee::Batch;

/// An address space whose pages come later.
pub struct Incomplete {
    /// The process.
    pub process: PodPid,
    host: HostPid,
    /// Its own userfaultfd, with nothing registered yet.
    pub userfault: OwnedFd,
    /// The pages, and where they come from.
    pub left: Vec<PageRun>,
    ranges: Vec<std::ops::Range<u64>>,
}

/// How many ranges one batch empties.
const MANY: usize = 512;

impl Grove<'_> {
    /// Has a process make a userfaultfd, if some of its pages come later. It has forked its children.
    pub(super) fn leave_out(&mut self, state: &ProcessState) -> Result<(), GrowError> {
        let pid = state.place.pid;
        let mut ranges: Vec<_> = state.memory.left.iter().map(|run| run.start..run.end).collect();
        if ranges.is_empty() {
            return Ok(());
        }
        // A huge page may have come into being around pages that were filled: what of it is not of the image must go.
        for some in ranges.chunks(MANY) {
            let mut batch = Batch::new();
            some.iter().for_each(|range| over_range(&mut batch, range, libc::MADV_DONTNEED));
            self.run(pid, &batch)?;
        }
        let mut batch = Batch::new();
        let made = batch.call(libc::SYS_userfaultfd, [userfault::FILLING.into()], "making a userfaultfd");
        let number = self.run(pid, &batch)?.get(made) as i32;
        let host = self.host(pid)?;
        let userfault = PidFd::open(host).and_then(|process| process.get(number));
        let mut batch = Batch::new();
        batch.call(libc::SYS_close, [number.into()], "closing a userfaultfd");
        self.run(pid, &batch)?;
        let object = || format!("the userfaultfd of process {pid}");
        let userfault = userfault.rebuilding("fetching", object())?;
        userfault::begin_filling(&userfault).rebuilding("preparing", object())?;
        ranges = state.memory.incomplete();
        self.incomplete.push(Incomplete { process: pid, host, userfault, left: state.memory.left.clone(), ranges });
        Ok(())
    }

    /// The address spaces whose pages come later; from now on whoever touches one of those waits. Nobody may touch them
    /// before they are served: everybody is held, and has done all that a restart does.
    pub fn take_incomplete(&mut self) -> Result<Vec<Incomplete>, GrowError> {
        let all = std::mem::take(&mut self.incomplete);
        for Incomplete { process, host, userfault, left, ranges } in &all {
            let object = || format!("the memory of process {process}");
            for range in ranges {
                userfault::register_missing(userfault, range).rebuilding("watching", object())?;
            }
            let pages = left.iter().map(|run| run.start..run.end);
            if !is_empty_at(*host, pages).rebuilding("looking at", object())? {
                return Err(
                    RebuildError::Lacks(format!("a way to keep {} empty; use another strategy", object())).into()
                );
            }
        }
        Ok(all)
    }
}
