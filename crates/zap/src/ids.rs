//! Names for the things that are numbered, so that one number is never taken for another.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A process or thread ID as the host sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct HostPid(pub i32);

/// A process or thread ID as the pod sees it: it never changes over the pod's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PodPid(pub i32);

/// An open file description of the pod, numbered by the checkpoint that met it.
///
/// Two descriptors (in one process or in several) that share offset and flags have the same `FileId`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct FileId(pub u32);

/// An address in a tracee. Never a pointer of ours.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Address(pub u64);

impl Address {
    /// The address `bytes` further on.
    pub const fn plus(self, bytes: u64) -> Address {
        Address(self.0 + bytes)
    }
}

impl HostPid {
    /// The path of one of this process's files under the host's `/proc`.
    pub fn proc(self, name: &str) -> std::path::PathBuf {
        std::path::PathBuf::from(format!("/proc/{}/{name}", self.0))
    }
}

macro_rules! display_number {
    ($($kind:ident => $format:literal),*) => {
        $(impl fmt::Display for $kind {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, $format, self.0)
            }
        })*
    };
}

display_number!(HostPid => "{}", PodPid => "{}", FileId => "file#{}", Address => "{:#x}");
