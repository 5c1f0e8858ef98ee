//! Where pods are recorded: one directory a pod, below one directory a host.

use std::path::{Path, PathBuf};

/// One *host*: the registry of its pods and the storage of their files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Store {
    state: PathBuf,
    storage: PathBuf,
}

impl Store {
    /// The host of a state directory; the default one (`/run/zap` with `/var/lib/zap`) if none is given.
    pub fn new(state: Option<&Path>) -> Store {
        match state {
            Some(dir) => Store { state: dir.to_owned(), storage: dir.join("storage") },
            None => Store { state: "/run/zap".into(), storage: "/var/lib/zap".into() },
        }
    }

    /// The directory of the registry.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// The registry's directory of a pod.
    pub fn pod_dir(&self, name: &str) -> PathBuf {
        self.state.join("pods").join(name)
    }

    /// The storage of a pod: its upper layers.
    pub fn storage_dir(&self, name: &str) -> PathBuf {
        self.storage.join("pods").join(name)
    }
}
