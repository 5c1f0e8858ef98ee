//! What a pod is: spec, namespaces, root file system, network, cgroup, PID 1, registry.

mod spec;

pub use spec::{AddressPlan, Bind, Limits, NetworkMode, PodSpec, Publish, Seccomp};
