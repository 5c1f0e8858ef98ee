//! Memory that waits to be filled: by the monitor that has taken the pod, or, should that die, by the next one.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::ledger::{Ledger, Plan, remaining};
use super::remaining::Remaining;
use super::supply::{self, Supply};
use super::{Fetching, Whose};
use crate::memory::PageRun;
use crate::pod::control::HOARD;
use crate::pod::journal::Undo;
use crate::pod::{LivePod, PodError};
use crate::process::grow::Incomplete;
use crate::sys::pidfd::PidFd;
use crate::sys::userfault;

/// Addresses that a process can have, but for the first that the kernel gives nobody.
const EVERYWHERE: std::ops::Range<u64> = 1 << 16..0x7fff_ffff_f000;

/// Fewer than a message can carry (SCM_MAX_FD).
const HOARDED_AT_ONCE: usize = 200;

/// An address space that is to be filled.
pub struct Space {
    /// Registered, with all its pages missing.
    pub userfault: OwnedFd,
    /// The pages, and where they come from.
    pub left: Vec<PageRun>,
}

/// Address spaces that wait to be filled.
pub struct Filling {
    pub(super) spaces: Vec<(OwnedFd, Remaining)>,
    pub(super) supply: Box<dyn Supply>,
    pub(super) ledger: Ledger,
    pub(super) end: u64,
}

impl Filling {
    /// These, from there.
    pub fn new(spaces: Vec<Space>, supply: Box<dyn Supply>) -> io::Result<Filling> {
        let end = spaces.iter().flat_map(|space| &space.left).filter_map(PageRun::data).map(|range| range.end).max();
        let end = end.unwrap_or(0);
        let check = supply.outlives_us().and_then(|(_, check)| check);
        let plan = Plan { spaces: spaces.iter().map(|space| space.left.clone()).collect(), end, check };
        let ledger = Ledger::begin(&plan)?;
        let spaces = spaces.into_iter().map(|space| (space.userfault, remaining(&space.left))).collect();
        Ok(Filling { spaces, supply, ledger, end })
    }

    /// Address spaces of a pod, from there: it must not outlive this monitor any more without the rest of its memory, or
    /// somebody who goes on putting it in place. Why not, in words.
    pub fn entrust(pod: &mut LivePod, incomplete: Vec<Incomplete>, supply: Box<dyn Supply>) -> Result<Filling, String> {
        let failed = |e: PodError| e.to_string();
        let spaces = incomplete.into_iter().map(|space| Space { userfault: space.userfault, left: space.left });
        let filling = Filling::new(spaces.collect(), supply).map_err(|e| e.to_string())?;
        let undo = if filling.outlives_us() { Undo::Filling } else { Undo::Fetching };
        pod.journal.record(undo).map_err(failed)?;
        for some in filling.hoard().chunks(HOARDED_AT_ONCE) {
            pod.control().hoard(some).map_err(failed)?;
        }
        Ok(filling)
    }

    /// Whether another monitor can go on with it, if it finds [`Filling::hoard`].
    pub fn outlives_us(&self) -> bool {
        self.supply.outlives_us().is_some()
    }

    /// What PID 1 must have a copy of, in this order.
    pub fn hoard(&self) -> Vec<BorrowedFd<'_>> {
        let data = self.supply.outlives_us();
        let ours = data.map(|(data, _)| [self.ledger.file(), data]).into_iter().flatten();
        ours.chain(self.spaces.iter().map(|(userfault, _)| userfault.as_fd())).collect()
    }

    /// What another monitor has left undone, of which this PID 1 has kept all that is needed.
    pub fn left_undone(init: &PidFd) -> io::Result<Filling> {
        let (ledger, plan, remaining) = Ledger::read(init.get(HOARD)?.into())?;
        let data = init.get(HOARD + 1)?;
        let mut spaces = Vec::with_capacity(remaining.len());
        for (number, remaining) in (HOARD + 2..).zip(remaining) {
            let userfault = init.get(number)?;
            // Who waits had been heard of: they try again, and are heard of by us. A process that has gone has nobody.
            let _ = userfault::wake_all(&userfault, &EVERYWHERE);
            spaces.push((userfault, remaining));
        }
        Ok(Filling { spaces, supply: supply::of_file(data, plan.check), ledger, end: plan.end })
    }

    /// Begins.
    pub fn begin(self, whose: Whose) -> io::Result<Fetching> {
        Fetching::begin(self, whose)
    }
}
