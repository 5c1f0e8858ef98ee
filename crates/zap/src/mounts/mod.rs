//! Mounts that the processes of a pod have made in its own mount namespace, which takes CAP_SYS_ADMIN: what there is now
//! beside what there was when the pod was born. And mount namespaces that were made inside the pod (`nest.rs`).

mod assemble;
mod capture;
mod late;
mod nest;
mod removed;
mod restart;
mod shown;
mod table;

use serde::{Deserialize, Serialize};

use crate::namespaces::NamespaceId;

pub(crate) use assemble::{Frame, make_nest};
pub(crate) use capture::path_of;
pub use capture::{Fresh, Home, Made, bare, capture, fresh, made, note_birth};
pub(crate) use late::Late;
pub use late::LateMounts;
pub use nest::{NestState, NestedMount, NestedSource, Nests, fill};

pub use removed::{Holder, RemovedFile};
pub use restart::{Maker, Sources, make};
pub use table::{Entry, parse};
pub(crate) use table::{below, join};

/// A mount that was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountState {
    /// Where it is.
    #[serde(with = "serde_bytes")]
    pub point: Vec<u8>,
    /// What it shows.
    pub source: Source,
    /// Its own flags, as `mount_setattr(2)` has them.
    pub attributes: u64,
    /// Whether it is shared with copies of it that are still to be made.
    pub shared: bool,
    /// Whether it cannot be bound elsewhere.
    pub unbindable: bool,
}

/// What a mount shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Source {
    /// A directory or file that the pod was born with, by its path there.
    Bind(#[serde(with = "serde_bytes")] Vec<u8>),
    /// A file system of its own.
    New(FileSystem),
    /// Part of a file system of its own that another mount made, by that mount's place in the list.
    Part(usize, #[serde(with = "serde_bytes")] Vec<u8>),
}

/// A file system that was made inside the pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileSystem {
    /// `tmpfs`, `proc` …
    pub kind: String,
    /// What was mounted, as `mount(8)` shows it.
    #[serde(with = "serde_bytes")]
    pub device: Vec<u8>,
    /// Its options.
    pub options: Vec<(String, Option<String>)>,
    /// The archive of its contents, if it has any of its own.
    pub contents: Option<String>,
    /// The directory of it that is shown.
    #[serde(with = "serde_bytes")]
    pub root: Vec<u8>,
    /// The namespace, made inside the pod, whose processes, interfaces or queues it shows; `None`: the pod's own, if any.
    #[serde(default)]
    pub of: Option<NamespaceId>,
}
