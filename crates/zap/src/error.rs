//! Errors that several rooms share. Each says the step, the object, and where known what to do.

use std::io;

use crate::ids::PodPid;

/// Why something of the pod could not be written down.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The thing is of a kind, or in a state, that cannot be checkpointed (yet). The pod is refused by its name.
    #[error("process {process} ({command}): {object} {why}")]
    Refused {
        /// The process that holds the thing.
        process: PodPid,
        /// Its command name.
        command: String,
        /// The thing, as a person would name it: `file descriptor 9 (io_uring)`.
        object: String,
        /// Why, and what to do where it is known: `cannot be checkpointed yet`.
        why: String,
    },
    /// The process or thread ended while it was looked at.
    #[error("process {0} ended during the checkpoint")]
    Vanished(PodPid),
    /// A kernel interface failed.
    #[error("{step} of {object}: {source}")]
    Kernel {
        /// What was being done: `reading the queue`.
        step: &'static str,
        /// What it was done to.
        object: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel answered with something that we do not understand.
    #[error("{object}: unexpected {what}")]
    Unexpected {
        /// What was read.
        object: String,
        /// What was wrong with it.
        what: String,
    },
}

/// Why something of an image could not be made again.
#[derive(Debug, thiserror::Error)]
pub enum RebuildError {
    /// A kernel interface failed.
    #[error("{step} of {object}: {source}")]
    Kernel {
        /// What was being done.
        step: &'static str,
        /// What it was done to.
        object: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// This host lacks something that the image needs (exit code 4).
    #[error("this host lacks {0}")]
    Lacks(String),
    /// A file that the image relies on is not what it was (exit code 4).
    #[error("{path} has changed since the checkpoint ({what}); restore it, or take the checkpoint with --carry-files")]
    Changed {
        /// The file, as the pod names it.
        path: String,
        /// What differs: its size, its contents, or that it is gone.
        what: String,
    },
    /// The image says something that cannot be (exit code 5).
    #[error("the image is damaged: {0}")]
    Damaged(String),
}

/// Shorthand to give an [`io::Error`] its step and object.
pub trait Context<T> {
    /// As an error of a capture.
    fn capturing(self, step: &'static str, object: impl ToString) -> Result<T, CaptureError>;
    /// As an error of a rebuild.
    fn rebuilding(self, step: &'static str, object: impl ToString) -> Result<T, RebuildError>;
}

impl<T, E: Into<io::Error>> Context<T> for Result<T, E> {
    fn capturing(self, step: &'static str, object: impl ToString) -> Result<T, CaptureError> {
        self.map_err(|e| CaptureError::Kernel { step, object: object.to_string(), source: e.into() })
    }

    fn rebuilding(self, step: &'static str, object: impl ToString) -> Result<T, RebuildError> {
        self.map_err(|e| RebuildError::Kernel { step, object: object.to_string(), source: e.into() })
    }
}
