//! What a program in a pod is told of its host, to try and reach it: for `pod-escape`.

use serde::{Deserialize, Serialize};

/// Names and numbers of things outside a pod.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Facts {
    /// A process of the host's.
    pub pid: i32,
    /// A file of the host's that no pod sees.
    pub marker: String,
    /// The state directory of zap.
    pub state: String,
    /// A directory that is bound into the pod, by its path there.
    pub bind: String,
    /// Another, which is read-only.
    pub read_only_bind: String,
    /// A listening Unix socket of the host's, by its path in the root that the pod was given.
    pub socket: String,
    /// Another, by its name without a path.
    pub abstract_name: String,
    /// A pipe with a name that the host reads from, likewise.
    pub pipe: String,
    /// A port of the host's loopback address on which somebody listens.
    pub port: u16,
    /// The key of a System V segment.
    pub key: i32,
    /// The name of a POSIX message queue.
    pub queue: String,
    /// Major and minor number of the host's disk.
    pub disk: (u32, u32),
}
