//! A process as the image knows it.

use serde::{Deserialize, Serialize};

use crate::files::{DescriptorState, PosixLock};
use crate::ids::{FileId, PodPid};
use crate::ipc::undo::UndoState;
use crate::memory::MemoryState;
use crate::namespaces::{Births, Membership, NamespaceId};
use crate::process::controls::ProcessControls;
use crate::process::credentials::CredentialsState;
use crate::process::filters::FilterState;
use crate::process::own_directories::OwnDirectories;
use crate::process::segments::SegmentState;
use crate::process::sharing::SharingState;
use crate::process::signals::{ActionState, QueuedSignal};
use crate::process::threads::ThreadState;
use crate::process::timers::TimersState;

/// Where a process stands in the tree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// Its PID.
    pub pid: PodPid,
    /// Its parent's; 1 for the children of PID 1.
    pub parent: PodPid,
    /// Its process group.
    pub group: PodPid,
    /// Its session.
    pub session: PodPid,
    /// The signal that tells its parent of its end; 0 for none.
    pub exit_signal: i32,
    /// Its wait status, if it has ended and waits to be reaped.
    pub ended: Option<i32>,
    /// Who cloned it, if that was not its parent but a sibling, with which it shares something ([`crate::process::sharing`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cloner: Option<PodPid>,
    /// What it is called in PID namespaces made inside the pod, if it is in one.
    #[serde(default, skip_serializing_if = "Inner::is_none")]
    pub inner: Inner,
}

/// The numbers of a process in PID namespaces made inside the pod: one for each, the outermost first.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inner {
    /// The innermost: its own.
    pub namespace: Option<NamespaceId>,
    /// Its PIDs.
    pub pids: Vec<i32>,
    /// Those of its process group; 0 where that is not to be seen.
    pub groups: Vec<i32>,
    /// Those of its session; 0 where that is not to be seen.
    pub sessions: Vec<i32>,
}

impl Inner {
    fn is_none(&self) -> bool {
        self.pids.is_empty()
    }
}

impl Place {
    /// Who clones it.
    pub fn cloner(&self) -> PodPid {
        self.cloner.unwrap_or(self.parent)
    }

    /// How many PID namespaces lie between the pod's and this process.
    pub fn level(&self) -> usize {
        self.inner.pids.len()
    }

    /// What it is called that many PID namespaces below the pod's; 0: nothing.
    pub fn seen_from(&self, level: usize) -> i32 {
        if level == 0 { self.pid.0 } else { self.inner.pids.get(level - 1).copied().unwrap_or(0) }
    }

    /// Whether it is the first process of its PID namespace.
    pub fn is_first(&self) -> bool {
        self.inner.pids.last() == Some(&1)
    }

    /// What it calls its own process group; 0 if it cannot see it.
    pub fn own_group(&self) -> i32 {
        self.inner.groups.last().copied().unwrap_or(self.group.0)
    }
}

/// A process that has ended and waits to be reaped: what others can still see of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndedState {
    /// Where it stood.
    pub place: Place,
    /// `comm`, raw.
    #[serde(with = "serde_bytes")]
    pub command: Vec<u8>,
    /// Who it was.
    pub credentials: CredentialsState,
}

/// The controlling terminal of a session, kept with the session's leader.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalState {
    /// N of `/dev/pts/N`.
    pub index: u32,
    /// Its foreground process group.
    pub foreground: Option<PodPid>,
}

/// Everything that belongs to one live process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ProcessState {
    /// Where it stands.
    pub place: Place,
    /// Its controlling terminal, if it leads the session.
    pub terminal: Option<TerminalState>,
    /// Whether it does not lead its session, and has no controlling terminal: the session may have got one after its birth.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub no_terminal: bool,
    /// File mode creation mask.
    pub umask: u32,
    /// Working directory.
    pub cwd: FileId,
    /// Root directory, if it is not the pod's.
    pub root: Option<FileId>,
    /// Descriptors.
    pub descriptors: Vec<DescriptorState>,
    /// POSIX record locks.
    pub locks: Vec<PosixLock>,
    /// Address space.
    pub memory: MemoryState,
    /// Signal actions that are not the default.
    pub actions: Vec<ActionState>,
    /// Timers.
    pub timers: TimersState,
    /// Soft and hard limit of each resource, by number.
    pub limits: Vec<(u64, u64)>,
    /// Signals queued to the process.
    pub pending: Vec<QueuedSignal>,
    /// The stop signal, if it is stopped.
    pub stopped: Option<i32>,
    /// Whether its parent has yet to be told of the stop.
    pub stop_is_news: bool,
    /// `oom_score_adj`.
    pub oom_score_adj: i32,
    /// Of the leader of a session: the niceness of the group that the kernel makes of it (`/proc/PID/autogroup`).
    #[serde(default)]
    pub autogroup: i32,
    /// `coredump_filter`.
    pub coredump_filter: u32,
    /// `personality`.
    pub personality: u32,
    /// `PR_GET_DUMPABLE`.
    pub dumpable: i32,
    /// `PR_GET_CHILD_SUBREAPER`.
    pub subreaper: bool,
    /// Who logged in (`loginuid`), if that is not as it is for zap's own processes in the pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub login: Option<u32>,
    /// `PR_GET_THP_DISABLE`.
    pub thp_disable: i32,
    /// Switches that it has set.
    #[serde(default)]
    pub controls: ProcessControls,
    /// Segments of its own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub segments: Vec<SegmentState>,
    /// Its first thread, if that has ended while others run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_leader: Option<EndedState>,
    /// What it shares with whoever cloned it.
    #[serde(default, skip_serializing_if = "SharingState::is_nothing")]
    pub sharing: SharingState,
    /// What it gives back to semaphores when it ends.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub undo: Vec<UndoState>,
    /// Seccomp filters, oldest first.
    pub filters: Vec<FilterState>,
    /// Threads, the leader first unless it has ended.
    pub threads: Vec<ThreadState>,
    /// The namespaces that it is in, where they are not the pod's own.
    #[serde(default, skip_serializing_if = "Membership::is_home")]
    pub namespaces: Membership,
    /// In which PID namespace its next children are born.
    #[serde(default, skip_serializing_if = "Births::is_here")]
    pub births: Births,
}

impl ProcessState {
    /// The threads that are made besides the one that a process begins with.
    pub fn further_threads(&self) -> &[ThreadState] {
        &self.threads[usize::from(self.ended_leader.is_none())..]
    }

    /// The directories of threads that have some of their own.
    pub fn directories_of_threads(&self) -> impl Iterator<Item = FileId> {
        self.threads.iter().filter_map(|thread| thread.directories.as_ref()).flat_map(OwnDirectories::files)
    }

    /// Capabilities that one of its threads or another could ever have.
    pub fn bounding(&self) -> u64 {
        self.threads.iter().fold(0, |all, thread| all | thread.credentials.bounding())
    }

    /// How many seccomp filters, from the oldest on, all of its threads have in common.
    pub fn shared_filters(&self) -> usize {
        let own = self.threads.iter().filter_map(|thread| thread.own_filters.as_ref());
        let shared = |chain: &Vec<FilterState>| common(&self.filters, chain);
        own.map(shared).min().unwrap_or(self.filters.len())
    }

    /// The filters that a thread has beyond those which all of them share.
    pub fn filters_of<'s>(&'s self, thread: &'s ThreadState) -> &'s [FilterState] {
        &thread.own_filters.as_ref().unwrap_or(&self.filters)[self.shared_filters()..]
    }
}

/// How many filters, from the oldest on, two chains have in common.
pub fn common(a: &[FilterState], b: &[FilterState]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}
