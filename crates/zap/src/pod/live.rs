//! A pod that is alive, as its monitor holds it.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use crate::error::RebuildError;
use crate::ids::{HostPid, PodPid};
use crate::look::Console;
use crate::pod::journal::Journal;
use crate::pod::{Cgroup, PodError, PodSpec, Store};

/// How far a pod's clocks are from the host's, in nanoseconds: the pod's clock is the host's plus this.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClockOffsets {
    /// Of CLOCK_MONOTONIC.
    pub monotonic: i64,
    /// Of CLOCK_BOOTTIME.
    pub boottime: i64,
}

/// How a pod is born.
#[derive(Default)]
pub struct Birth<'a> {
    /// Its clocks; the host's own if absent.
    pub clocks: Option<ClockOffsets>,
    /// Whether its network starts out blocked (a restart lets it go last).
    pub network_blocked: bool,
    /// Fills the upper layers, in the directory that it is given, before they are mounted.
    pub unpack: Option<Unpack<'a>>,
}

/// Fills the directory of a pod's upper layers.
pub type Unpack<'a> = &'a mut dyn FnMut(&Path) -> Result<(), RebuildError>;

/// A pod that is alive. Lives in its monitor.
pub struct LivePod {
    /// As it was asked for.
    pub spec: PodSpec,
    /// The host that it is on.
    pub store: Store,
    /// Its PID 1.
    pub init: HostPid,
    /// Its processes.
    pub cgroup: Cgroup,
    /// Its first command, whose end is the pod's.
    pub main: Option<PodPid>,
    /// What must be undone if this monitor dies.
    pub journal: Journal,
}

impl LivePod {
    /// Makes a pod: namespaces, root, network, PID 1. No command runs in it.
    pub fn create(_store: Store, _spec: PodSpec, _birth: Birth<'_>) -> Result<LivePod, PodError> {
        todo!()
    }

    /// Starts the first command, with a console of its own.
    pub fn start_main(&mut self) -> Result<(), PodError> {
        todo!()
    }

    /// Has PID 1 clone a child with this PID that runs [`crate::restart::builder`] with these files (numbered from 3
    /// on, in this order; nothing else is open in it).
    pub fn build(&self, _pid: PodPid, _files: Vec<OwnedFd>) -> Result<HostPid, PodError> {
        todo!()
    }

    /// The far ends of the console, for a checkpoint.
    pub fn console(&self) -> Result<Console, PodError> {
        todo!()
    }

    /// Stops reading the console's output until the guard is dropped, so that what is in the pipes is in the image, and
    /// not in the log as well.
    pub fn hush_console(&self) -> Hush {
        todo!()
    }

    /// For a restart: makes a new console of pipes and returns the pod's ends: stdin, stdout, stderr.
    pub fn new_console_pipes(&mut self) -> Result<[OwnedFd; 3], PodError> {
        todo!()
    }

    /// For a restart: the console is this pty.
    pub fn adopt_console_master(&mut self, _master: OwnedFd) -> Result<(), PodError> {
        todo!()
    }

    /// For a restart: the end of this process is the end of the pod.
    pub fn watch_main(&mut self, _pid: PodPid) -> Result<(), PodError> {
        todo!()
    }

    /// Reads all that is in the console into the log.
    pub fn drain_console(&self) {
        todo!()
    }

    /// The host's PID of a process of the pod.
    pub fn host_pid(&self, _pid: PodPid) -> Option<HostPid> {
        todo!()
    }

    /// The directory of its upper layers: one directory for each overlay, the root's is `root`.
    pub fn upper(&self) -> PathBuf {
        todo!()
    }

    /// A path as the pod sees it, as the host reaches it.
    pub fn path(&self, path: &str) -> PathBuf {
        self.init.proc("root").join(path.trim_start_matches('/'))
    }

    /// Ends it and removes all of it from the host, its record included.
    pub fn destroy(self) -> Result<(), PodError> {
        todo!()
    }
}

/// While it lives, nobody reads the console's output.
pub struct Hush {}
