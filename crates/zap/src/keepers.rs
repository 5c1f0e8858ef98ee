//! Processes that keep files for the builder, which may not have all of an image open at once: where a limit forbids it
//! (`RLIMIT_NOFILE`, and nobody may raise it), a copy of the builder keeps those that were opened lately, and it closes them.
//! Whoever needs one fetches it (`pidfd_getfd`).

use std::collections::HashSet;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use serde::{Deserialize, Serialize};

use crate::ids::{FileId, HostPid, PodPid};
use crate::sys::clone::{Helper, spawn_helper};
use crate::sys::pidfd::PidFd;

/// What is to be kept by others, and by whom.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Keeping {
    /// Free PIDs, one for each keeper.
    pub pids: Vec<PodPid>,
    /// How many files one keeper is given: so many the builder has open beside those which it needs.
    pub portion: usize,
    /// Files that processes need for more than to have them open: they stay in the builder, and every seed has them.
    pub near: HashSet<FileId>,
}

impl Keeping {
    /// What there is to do for `files` files, of which `most` can be open at once, as `most` says, and `wanted` would have
    /// to be. Nothing, nearly always.
    pub fn of(files: usize, (wanted, most): (u64, u64), near: impl FnOnce() -> HashSet<FileId>) -> Keeping {
        let portion = most as usize / 4;
        if wanted <= most || portion == 0 {
            return Keeping::default();
        }
        // The PIDs are chosen by whoever knows which are free.
        Keeping { pids: vec![PodPid(0); files.div_ceil(portion)], portion, near: near() }
    }

    /// Whether anything is to be kept by others.
    pub fn is_needed(&self) -> bool {
        !self.pids.is_empty()
    }
}

/// Where a file is: the number of the keeper, and the file's number there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// Which keeper, in the order in which they were made.
    pub keeper: usize,
    /// The descriptor in it.
    pub number: i32,
}

/// The keepers of a builder. They end with it.
#[derive(Default)]
pub struct Keepers(Vec<(Helper, PidFd)>);

impl Keepers {
    /// A new one with that PID, which has every file that this process has now, under the same numbers.
    pub fn add(&mut self, pid: PodPid) -> io::Result<usize> {
        let helper = spawn_helper(pid)?;
        let handle = PidFd::open(HostPid(pid.0))?;
        self.0.push((helper, handle));
        Ok(self.0.len() - 1)
    }

    /// A copy of a file that one of them keeps.
    pub fn fetch(&self, kept: Kept) -> io::Result<OwnedFd> {
        let (_, handle) = self.0.get(kept.keeper).ok_or_else(|| io::Error::other("there is no such keeper"))?;
        handle.get(kept.number)
    }

    /// The numbers of the handles on them.
    pub fn handles(&self) -> Vec<i32> {
        self.0.iter().map(|(_, handle)| handle.as_raw_fd()).collect()
    }
}
