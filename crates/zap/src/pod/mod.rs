//! What a pod is: spec, namespaces, root file system, network, cgroup, PID 1, registry.

mod birth;
pub mod capabilities;
pub(crate) mod cgroup;
pub mod console;
pub mod control;
mod devices;
mod error;
pub mod host_config;
mod init;
pub mod journal;
pub mod limits;
pub mod live;
pub mod mounts;
mod namespaces;
pub mod network;
pub(crate) mod old_groups;
pub mod processes;
pub mod registry;
pub mod rootfs;
pub mod seccomp;
mod spec;
pub mod sysctls;
pub mod takeover;
pub mod trees;

pub use cgroup::Cgroup;
pub(crate) use devices::probe as probe_devices;
pub use error::PodError;
pub(crate) use init::Command;
pub use live::{Birth, ClockOffsets, LivePod};
pub use namespaces::Shim;
pub use registry::{PodState, Record, Store, make_private_directory};
pub(crate) use spec::may_name_itself;
pub use spec::{AddressPlan, Bind, Limits, NetworkMode, PodSpec, Publish, Seccomp, is_name};
