//! What a pod is: spec, namespaces, root file system, network, cgroup, PID 1, registry.

mod cgroup;
mod error;
pub mod journal;
pub mod live;
mod registry;
pub mod rootfs;
mod spec;

pub use cgroup::Cgroup;
pub use error::PodError;
pub use live::{Birth, ClockOffsets, LivePod};
pub use registry::Store;
pub use spec::{AddressPlan, Bind, Limits, NetworkMode, PodSpec, Publish, Seccomp};
