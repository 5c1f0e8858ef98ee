//! How a restart can fail.

use crate::error::RebuildError;
use crate::image::ImageError;
use crate::pod::PodError;
use crate::tracee::TraceeError;

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
    /// The builder, inside the new pod, could not make something of it.
    #[error("restart of {pod}: {message}")]
    Builder {
        /// The pod's name in the image.
        pod: String,
        /// What the builder said.
        message: String,
        /// The exit code of the command.
        exit_code: u8,
    },
    /// The new pod could not be made.
    #[error(transparent)]
    Pod(#[from] PodError),
    /// Whoever was to give it up did not.
    #[error("pod {pod} was not handed over: {why}")]
    NotGiven {
        /// The pod's name in the image.
        pod: String,
        /// Why.
        why: String,
    },
    /// A defect of zap.
    #[error("the restart ended unexpectedly; its log has the reason")]
    Panicked,
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
            RestartError::Builder { exit_code, .. } => *exit_code,
            RestartError::Pod(error) => error.exit_code(),
            _ => 1,
        }
    }
}
