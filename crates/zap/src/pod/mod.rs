//! What a pod is: spec, namespaces, root file system, network, cgroup, PID 1, registry.

pub mod capabilities;
mod cgroup;
mod error;
pub mod host_config;
pub mod journal;
pub mod limits;
pub mod live;
pub mod network;
mod registry;
pub mod rootfs;
pub mod seccomp;
mod spec;

pub use cgroup::Cgroup;
pub use error::PodError;
pub use live::{Birth, ClockOffsets, LivePod};
pub use registry::Store;
pub use spec::{AddressPlan, Bind, Limits, NetworkMode, PodSpec, Publish, Seccomp};
