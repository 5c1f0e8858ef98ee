//! The monitor: the pod's process on the host.
