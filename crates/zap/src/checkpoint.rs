//! The story of a checkpoint: hold → capture → write → let go.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::error::CaptureError;
use crate::image::{Compression, ImageError};
use crate::tracee::TraceeError;

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
}

/// How long a phase took.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Phase {
    /// Its name, as `--stats` prints it.
    pub name: String,
    /// Microseconds.
    pub us: u64,
}

/// Figures of a finished checkpoint. Times are whole microseconds, sizes bytes.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Stats {
    /// The sum of `holds_us`.
    pub downtime_us: u64,
    /// Each time that the pod was held, from the first process held to the last let go.
    pub holds_us: Vec<u64>,
    /// From the request to the finished image.
    pub total_us: u64,
    /// hold, look, memory, files, write, let-go.
    pub phases: Vec<Phase>,
    /// Size of the image.
    pub bytes: u64,
    /// Pages of memory in it.
    pub pages: u64,
    /// Processes in it.
    pub processes: u64,
    /// Threads in it.
    pub threads: u64,
}

/// Why a checkpoint was not taken. The pod runs on.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// Something could not be captured.
    #[error("pod {pod}: {source}")]
    Capture {
        /// The pod's name.
        pod: String,
        /// What and why.
        source: CaptureError,
    },
    /// A process could not be held or used.
    #[error("pod {pod}: {source}")]
    Tracee {
        /// The pod's name.
        pod: String,
        /// What and why.
        source: TraceeError,
    },
    /// The image could not be written.
    #[error(transparent)]
    Image(#[from] ImageError),
}

impl CheckpointError {
    /// The exit code of the command (CLI.md).
    pub fn exit_code(&self) -> u8 {
        match self {
            CheckpointError::Capture { source: CaptureError::Refused { .. }, .. } => 3,
            _ => 1,
        }
    }
}
