//! System V shared memory, semaphores and messages, and POSIX message queues: the objects of a pod's IPC namespace, under their own ids.
//!
//! What the kernel neither shows nor takes is left out: who last used an object and when. What semaphores are given back
//! when a process ends is kept with the process ([`undo`]).

mod capture;
pub mod limits;
pub mod posix;
mod restart;
#[cfg(test)]
mod tests;
pub mod undo;

pub use capture::capture;
pub(crate) use capture::capture_in;
pub use restart::{remove_marked, restart};

use serde::{Deserialize, Serialize};

use crate::files::Contents;
use crate::image::DataRef;
pub use crate::sys::ipc::Permissions;

/// The IPC objects of a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IpcState {
    /// Shared memory.
    pub segments: Vec<SegmentState>,
    /// Semaphores.
    pub semaphores: Vec<SemaphoresState>,
    /// Messages.
    pub queues: Vec<QueueState>,
    /// POSIX message queues that have a name.
    #[serde(default)]
    pub posix: Vec<posix::PosixQueueState>,
}

/// A segment of shared memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SegmentState {
    /// Its id.
    pub id: i32,
    /// Whose it is.
    pub permissions: Permissions,
    /// What is in it, and its size in bytes.
    pub contents: Contents,
}

impl SegmentState {
    /// Whether it goes away with the last process that detaches it.
    pub fn is_marked(&self) -> bool {
        self.permissions.mode & SHM_DEST != 0
    }

    /// Whether it is locked in memory.
    pub fn is_locked(&self) -> bool {
        self.permissions.mode & SHM_LOCKED != 0
    }
}

const SHM_DEST: u32 = 0o1000;
const SHM_LOCKED: u32 = 0o2000;

/// A set of semaphores.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SemaphoresState {
    /// Its id.
    pub id: i32,
    /// Whose it is.
    pub permissions: Permissions,
    /// The values.
    pub values: Vec<u16>,
}

/// A queue of messages.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Its id.
    pub id: i32,
    /// Whose it is.
    pub permissions: Permissions,
    /// How many bytes it may hold.
    pub room: u64,
    /// The messages: type and bytes.
    pub messages: Vec<(i64, DataRef)>,
}

/// Reads a text as a table of System V objects.
pub(crate) fn try_table(text: &str) {
    capture::try_table(text);
}
