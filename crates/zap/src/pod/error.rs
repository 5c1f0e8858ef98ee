//! Why something could not be done to a pod.

use std::io;
use std::path::PathBuf;

use crate::error::RebuildError;
use crate::pod::network::NetworkError;

/// Why a pod could not be made, found, or acted on.
#[derive(Debug, thiserror::Error)]
pub enum PodError {
    /// A kernel interface failed.
    #[error("pod {pod}: {step}: {source}")]
    Kernel {
        /// The pod.
        pod: String,
        /// What was being done.
        step: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A file of the registry or the storage could not be used.
    #[error("{step} {}: {source}", path.display())]
    Store {
        /// What was being done.
        step: &'static str,
        /// To which file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A record of the registry cannot be understood.
    #[error("{}: {what}", path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// There is no pod of that name (exit code 6).
    #[error("there is no pod {0}; `zap ls` shows those that exist")]
    Unknown(String),
    /// The name is taken (exit code 6).
    #[error("the name {0} is taken; `zap rm {0}` frees it once the pod has stopped")]
    Taken(String),
    /// An address or port is taken (exit code 6).
    #[error("{0} is taken")]
    Busy(String),
    /// The pod is not in a state in which this can be done.
    #[error("pod {pod} is {state}{hint}")]
    State {
        /// The pod.
        pod: String,
        /// Its state.
        state: String,
        /// What to do, beginning with `; `, or nothing.
        hint: &'static str,
    },
    /// Somebody in the pod has frozen some of it, or has made groups in which he may have (exit code 3).
    #[error(
        "the control group {group} has groups or was frozen by somebody in the pod, which does not come to a stand then; \
         undo that first"
    )]
    Groups {
        /// Of a hierarchy of version 1.
        group: String,
    },
    /// The command cannot be executed (exit code 126) or is not there (127).
    #[error("pod {pod}: {command}: {source}")]
    Exec {
        /// The pod.
        pod: String,
        /// The program as it was given.
        command: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// Something asked for is not there or makes no sense: a user, a directory, a limit.
    #[error("pod {pod}: {what}")]
    Request {
        /// The pod.
        pod: String,
        /// What is wrong, as a sentence.
        what: String,
    },
    /// This host lacks something (exit code 4).
    #[error("this host lacks {0}")]
    Lacks(String),
    /// Its network could not be set up or changed.
    #[error("pod {pod}: {source}")]
    Network {
        /// The pod.
        pod: String,
        /// What and why.
        source: NetworkError,
    },
    /// PID 1 of the pod ended.
    #[error("pod {0} ended meanwhile")]
    Ended(String),
    /// Its contents could not be unpacked.
    #[error(transparent)]
    Unpack(#[from] RebuildError),
}

impl PodError {
    /// The exit code of the command line that stands for it.
    pub fn exit_code(&self) -> u8 {
        match self {
            PodError::Unknown(_) | PodError::Taken(_) | PodError::Busy(_) => 6,
            PodError::Groups { .. } => 3,
            PodError::Lacks(_) | PodError::Unpack(RebuildError::Lacks(_) | RebuildError::Changed { .. }) => 4,
            PodError::Unpack(RebuildError::Damaged(_)) => 5,
            PodError::Network { source, .. } => source.exit_code(),
            PodError::Exec { source, .. } if source.kind() == io::ErrorKind::NotFound => 127,
            PodError::Exec { .. } => 126,
            _ => 1,
        }
    }
}
