//! A pod's cgroup (v2): what its processes are, freezing them, and ending them all.

use std::path::{Path, PathBuf};

use crate::ids::HostPid;
use crate::pod::PodError;

/// The cgroup of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Freezes every process, and returns when all stand still.
    pub fn freeze(&self) -> Result<(), PodError> {
        todo!()
    }

    /// Lets them go on.
    pub fn thaw(&self) -> Result<(), PodError> {
        todo!()
    }

    /// Kills every process, PID 1 too, and returns when all are gone.
    pub fn kill(&self) -> Result<(), PodError> {
        todo!()
    }

    /// The processes in it (not threads), PID 1 too.
    pub fn pids(&self) -> Result<Vec<HostPid>, PodError> {
        todo!()
    }

    /// Removes the empty group.
    pub fn remove(&self) -> Result<(), PodError> {
        todo!()
    }
}
