//! Why a checkpoint was not taken.

use crate::error::CaptureError;
use crate::image::ImageError;
use crate::monitor::protocol::Failure;
use crate::pod::network::NetworkError;
use crate::pod::trees::TreesError;
use crate::pod::{LivePod, PodError};
use crate::process::hold::HoldError;
use crate::tracee::TraceeError;

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
    /// It was to be given away, and nobody took it.
    #[error("pod {pod} goes on here: {why}")]
    Kept {
        /// The pod's name.
        pod: String,
        /// Why.
        why: String,
    },
    /// It was to be given away, and uses files of its root that are not the same there.
    #[error("pod {pod} goes on here: {failure}")]
    Unlike {
        /// The pod's name.
        pod: String,
        /// Which, or why that cannot be told.
        failure: Failure,
    },
    /// It was given away, and nobody can tell whether it arrived.
    #[error(
        "pod {pod} is held, for it may be running at the destination: {why}; look there, then say \
        `zap migrate --resolve {pod} keep` or `drop`"
    )]
    InDoubt {
        /// The pod's name.
        pod: String,
        /// Why.
        why: String,
    },
    /// The image could not be written.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The pod could not be stopped, or put back as it was.
    #[error(transparent)]
    Pod(#[from] PodError),
}

impl CheckpointError {
    /// The exit code of the command (CLI.md).
    pub fn exit_code(&self) -> u8 {
        match self {
            CheckpointError::Capture { source: CaptureError::Refused { .. }, .. }
            | CheckpointError::Tracee { source: TraceeError::NoRoom(_), .. } => 3,
            CheckpointError::Unlike { failure, .. } => failure.code,
            CheckpointError::Image(ImageError::Io { .. } | ImageError::Exists(_)) => 1,
            CheckpointError::Image(_) => 5,
            _ => 1,
        }
    }
}

pub(super) fn network_failed(pod: &LivePod, source: NetworkError) -> PodError {
    PodError::Network { pod: pod.spec.name.clone(), source }
}

pub(super) fn trees_failed(pod: &LivePod, error: TreesError) -> CheckpointError {
    match error {
        TreesError::Capture(source) => refused(pod, source),
        TreesError::Image(source) => source.into(),
    }
}

pub(super) fn refused(pod: &LivePod, source: CaptureError) -> CheckpointError {
    CheckpointError::Capture { pod: pod.spec.name.clone(), source }
}

pub(super) fn held_failed(pod: &LivePod, error: HoldError) -> CheckpointError {
    let pod = pod.spec.name.clone();
    match error {
        HoldError::Capture(source) => CheckpointError::Capture { pod, source },
        HoldError::Tracee(source) => CheckpointError::Tracee { pod, source },
    }
}

pub(super) fn unexpected(object: &str, error: &impl std::fmt::Display) -> CaptureError {
    CaptureError::Unexpected { object: object.to_owned(), what: error.to_string() }
}
