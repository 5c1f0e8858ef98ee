//! Namespaces that were made inside the pod, by browser sandboxes and container programs: one kind, one file.
//!
//! A namespace has a number in the image; a process names those in which it is not at home in the pod's own
//! ([`Membership`]). A restart makes them before any process, in the builder, each under the user namespace that owned
//! it; a process grows in the pod's own and goes into its namespaces when it has its memory and files ([`enter`]).

pub mod enter;
mod ipc;
mod links;
mod make;
pub mod network;
mod pid;
mod sight;
mod time;
mod user;
mod uts;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::ipc::IpcState;
use crate::mounts::NestState;

pub use links::LinksState;
pub use make::{Made, make};
pub use pid::{Levels, PidState};
pub use sight::Sightings;
pub use time::TimeState;
pub use user::UserState;
pub use uts::UtsState;
pub(crate) use uts::restart as name;

/// A namespace of the image, by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct NamespaceId(pub u32);

/// What a namespace is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Kind {
    /// Users, groups, capabilities.
    User,
    /// Process numbers.
    Pid,
    /// Mounts.
    Mount,
    /// Interfaces, addresses, sockets.
    Network,
    /// System V objects and POSIX queues.
    Ipc,
    /// The host name.
    Uts,
    /// The root of the control groups.
    Cgroup,
    /// The offsets of clocks.
    Time,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Kind; 8] =
        [Kind::User, Kind::Pid, Kind::Mount, Kind::Network, Kind::Ipc, Kind::Uts, Kind::Cgroup, Kind::Time];

    /// Its name below `/proc/PID/ns`.
    pub fn file(self) -> &'static str {
        match self {
            Kind::User => "user",
            Kind::Pid => "pid",
            Kind::Mount => "mnt",
            Kind::Network => "net",
            Kind::Ipc => "ipc",
            Kind::Uts => "uts",
            Kind::Cgroup => "cgroup",
            Kind::Time => "time",
        }
    }

    /// Its `CLONE_NEW…`.
    pub fn flag(self) -> i32 {
        match self {
            Kind::User => libc::CLONE_NEWUSER,
            Kind::Pid => libc::CLONE_NEWPID,
            Kind::Mount => libc::CLONE_NEWNS,
            Kind::Network => libc::CLONE_NEWNET,
            Kind::Ipc => libc::CLONE_NEWIPC,
            Kind::Uts => libc::CLONE_NEWUTS,
            Kind::Cgroup => libc::CLONE_NEWCGROUP,
            Kind::Time => libc::CLONE_NEWTIME,
        }
    }

    /// Its name in messages.
    pub fn name(self) -> &'static str {
        match self {
            Kind::User => "user",
            Kind::Pid => "PID",
            Kind::Mount => "mount",
            Kind::Network => "network",
            Kind::Ipc => "IPC",
            Kind::Uts => "host name",
            Kind::Cgroup => "cgroup",
            Kind::Time => "time",
        }
    }
}

/// In which PID namespace the next children of a process are born.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Births {
    /// In its own.
    #[default]
    Here,
    /// In a new one, whose first process the next child will be.
    New,
    /// In this one, further inside.
    In(NamespaceId),
}

impl Births {
    /// Whether it is its own.
    pub fn is_here(&self) -> bool {
        *self == Births::Here
    }
}

/// The namespaces of a process that are not the pod's own.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Membership(pub BTreeMap<Kind, NamespaceId>);

impl Membership {
    /// The namespace of that kind, if it is not the pod's own.
    pub fn of(&self, kind: Kind) -> Option<NamespaceId> {
        self.0.get(&kind).copied()
    }

    /// Whether it is at home in the pod's own alone.
    pub fn is_home(&self) -> bool {
        self.0.is_empty()
    }
}

/// A namespace that was made inside the pod. Its owner has a lower number.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NamespaceState {
    /// Its number.
    pub id: NamespaceId,
    /// The user namespace that owns it; of a user namespace, its parent. `None`: the pod's.
    pub owner: Option<NamespaceId>,
    /// What is in it.
    pub body: Body,
}

/// What is in a namespace.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Body {
    /// See [`Kind::User`].
    User(UserState),
    /// See [`Kind::Pid`].
    Pid(PidState),
    /// See [`Kind::Mount`].
    Mount(NestState),
    /// See [`Kind::Network`].
    Network(LinksState),
    /// See [`Kind::Ipc`].
    Ipc(IpcState),
    /// See [`Kind::Uts`].
    Uts(UtsState),
    /// See [`Kind::Cgroup`].
    Cgroup,
    /// See [`Kind::Time`].
    Time(TimeState),
}

impl Body {
    /// What it is of.
    pub fn kind(&self) -> Kind {
        match self {
            Body::User(_) => Kind::User,
            Body::Pid(_) => Kind::Pid,
            Body::Mount(_) => Kind::Mount,
            Body::Network(_) => Kind::Network,
            Body::Ipc(_) => Kind::Ipc,
            Body::Uts(_) => Kind::Uts,
            Body::Cgroup => Kind::Cgroup,
            Body::Time(_) => Kind::Time,
        }
    }
}

/// Reads some bytes as entries of tables of a network, and as parts of packet filters.
pub(crate) fn try_entry(bytes: &[u8]) {
    network::try_entry(bytes);
}

/// Reads some bytes as answers of netlink about a network namespace, and as the map of a user namespace.
pub(crate) fn try_bytes(bytes: &[u8]) {
    network::try_answer(bytes);
    links::try_answer(bytes);
    user::try_map(&String::from_utf8_lossy(bytes));
}
