//! What a monitor and PID 1 say to each other.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::pod::Seccomp;

/// Descriptors of PID 1, by agreement: a new monitor finds them with `pidfd_getfd`.
pub(crate) const CONTROL: i32 = 3;
/// A copy of the monitor's end of the control socket.
pub(crate) const MONITOR_END: i32 = 4;
/// Its signalfd.
pub(super) const SIGNALS: i32 = 5;
/// The first of the descriptors kept for a monitor that might die: the far ends of the console.
pub(crate) const KEPT: i32 = 6;
/// How many can be kept.
pub(crate) const KEPT_COUNT: i32 = 10;

/// The first of those that are hoarded: far above any other.
pub(crate) const HOARD: i32 = 512;

/// An order to PID 1. Descriptors travel beside it.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Order {
    /// Start a command. Descriptors: the [`Command`] in a memory file; the writing end of a pipe on which the child
    /// reports a [`SpawnFailure`]; then stdin, stdout, stderr.
    Spawn {
        /// Answered with this number.
        id: u32,
        /// Whether the descriptors are a terminal, to be the controlling one of the new session.
        terminal: bool,
        /// Whether its end is to be remembered as that of the pod.
        main: bool,
    },
    /// Clone a child with this PID that runs the builder with the descriptors that come along.
    Build {
        /// Answered with this number.
        id: u32,
        /// The PID.
        pid: i32,
    },
    /// Keep these descriptors, from slot `slot` on.
    Keep {
        /// The first slot.
        slot: i32,
    },
    /// Keep these descriptors too, from [`HOARD`] on, one behind the other, until [`Order::DropHoard`].
    Hoard,
    /// Close all that was hoarded.
    DropHoard,
    /// Close the descriptor of that slot.
    Drop {
        /// The slot.
        slot: i32,
    },
    /// The end of this child, which PID 1 did not start on an order, is that of the pod.
    Watch {
        /// The child.
        pid: i32,
    },
    /// Asks what became of the main command.
    Status {
        /// Answered with this number.
        id: u32,
    },
}

/// What PID 1 has to say.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Report {
    /// The pod's root is in place; orders are welcome.
    Ready,
    /// It is not: PID 1 has ended.
    Failed {
        /// What was being done.
        step: String,
        /// The error number.
        errno: i32,
    },
    /// A child was started: its PID, or the error number.
    Started {
        /// Of the order.
        id: u32,
        /// PID in the pod, or errno.
        result: Result<i32, i32>,
    },
    /// A child that was started on an order, or is watched, has ended.
    Exit {
        /// PID in the pod.
        pid: i32,
        /// As `waitpid` gives it.
        status: i32,
    },
    /// The main command.
    Status {
        /// Of the order.
        id: u32,
        /// Its PID, if there is one.
        main: Option<i32>,
        /// How it ended, if it has.
        status: Option<i32>,
    },
}

/// A command to be run in a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Command {
    /// Program and arguments.
    pub(crate) argv: Vec<String>,
    /// `KEY=VALUE`.
    pub(crate) environment: Vec<String>,
    /// `USER[:GROUP]`, names or numbers; root if absent.
    pub(crate) user: Option<String>,
    /// Working directory.
    pub(crate) workdir: PathBuf,
    /// What it may have at most.
    pub(crate) capabilities: Vec<u32>,
    /// Its filter.
    pub(crate) seccomp: Seccomp,
}

/// Why a command does not run. Nothing at all is reported when it does.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum SpawnFailure {
    /// The program could not be executed.
    Exec(i32),
    /// Something before that: what, as a sentence.
    Before(String),
}

/// Long enough for every order and report; what is longer goes into a memory file.
pub(crate) const MESSAGE_LENGTH: usize = 4096;
