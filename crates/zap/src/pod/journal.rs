//! What must be undone if a monitor dies: written down before it is done.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::pod::PodError;

/// Something that was done to a pod and must not stay so.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Undo {
    /// Its cgroup is frozen for a checkpoint: thaw it.
    Thaw,
    /// Its network is blocked: unblock it.
    Unblock,
}

/// The undo journal of one pod.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
}

impl Journal {
    /// The journal kept in that file.
    pub fn at(path: PathBuf) -> Journal {
        Journal { path }
    }

    /// Notes something that is about to be done.
    pub fn record(&mut self, _undo: Undo) -> Result<(), PodError> {
        let _ = &self.path;
        todo!()
    }

    /// Notes that it has been undone.
    pub fn done(&mut self, _undo: &Undo) -> Result<(), PodError> {
        todo!()
    }
}
