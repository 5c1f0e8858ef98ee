//! How a checkpoint is to be taken.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::image::Compression;

/// What becomes of the pod after its checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Afterwards {
    /// It is gone, as after `rm`.
    Gone,
    /// It goes on running.
    Running,
    /// It stays suspended.
    Suspended,
}

/// How a checkpoint is to be taken.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Options {
    /// Absolute path of the image; must not exist.
    pub output: PathBuf,
    /// What becomes of the pod.
    pub afterwards: Afterwards,
    /// How bulk bytes are compressed.
    pub compress: Compression,
    /// An image of the same pod, relative to which only changes are written.
    pub parent: Option<PathBuf>,
    /// Carry the contents of the root's files that the pod has open or mapped.
    pub carry_files: bool,
    /// The fault point at which the monitor is to die ([`crate::fault`]).
    #[serde(default)]
    pub fault: Option<String>,
}
