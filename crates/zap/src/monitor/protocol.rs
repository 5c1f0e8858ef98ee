//! What a monitor can be told and asked, and what it answers.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::checkpoint;
use crate::migrate::{self, destination};
use crate::pod::registry::ProcessId;
use crate::pod::{PodError, PodSpec, Store};
use crate::restart;
use crate::sys::tty::WindowSize;

/// How a monitor begins.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Start {
    /// It makes a pod and runs its command.
    Run {
        /// On which host.
        store: Store,
        /// What pod.
        spec: Box<PodSpec>,
        /// The outer address asked for, with the length of its prefix.
        address: Option<(Ipv4Addr, Option<u8>)>,
        /// The MAC address asked for.
        mac: Option<[u8; 6]>,
        /// How the caller watches it.
        watch: Watch,
        /// The fault point at which the monitor is to die, or to fail.
        fault: Option<String>,
    },
    /// It restarts an image.
    Restart {
        /// On which host.
        store: Store,
        /// How.
        options: Box<restart::Options>,
        /// How the caller watches it.
        watch: Watch,
    },
    /// It takes a pod that comes from another host. Two files follow: the stream's ends for reading and for writing.
    Receive {
        /// On which host.
        store: Store,
        /// How.
        options: destination::Options,
    },
    /// It takes over a pod whose monitor has died.
    TakeOver {
        /// On which host.
        store: Store,
        /// Which pod.
        name: String,
    },
}

/// Whether a caller stays to watch a command.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Watch {
    /// It shows the output; the connection carries it after the answer.
    pub attached: bool,
    /// The size of its window, where it has one.
    pub window: Option<WindowSize>,
}

/// What a monitor can be asked.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Request {
    /// Show the console; the connection carries it after the answer.
    Attach(Watch),
    /// Run another command; the connection carries its console after the answer.
    Exec(Exec),
    /// Wait for the end of the pod. The answer is a [`session::End`](super::session::End).
    Wait,
    /// Send its first command a signal.
    Signal(i32),
    /// End it: a polite signal, and when that does not help within so many seconds, the other kind.
    Stop {
        /// How long to be polite.
        seconds: u64,
    },
    /// Hold every process still.
    Suspend,
    /// Let them go on.
    Resume,
    /// End it if it runs, and remove all of it.
    Remove,
    /// Write it down. The answer is [`checkpoint::Stats`].
    Checkpoint(checkpoint::Options),
    /// Move it to another host. Two files follow: the stream's ends for reading and for writing. The answer is
    /// [`migrate::Stats`].
    Migrate(migrate::Options),
    /// After a migration was cut in the one moment in which nobody knows: it lives here (true), or there.
    Resolve {
        /// Whether it lives here.
        keep: bool,
    },
}

/// A further command.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Exec {
    /// Program and arguments.
    pub command: Vec<String>,
    /// `KEY=VALUE`.
    pub environment: Vec<String>,
    /// `USER[:GROUP]`; the first command's if absent.
    pub user: Option<String>,
    /// Working directory; the first command's if absent.
    pub workdir: Option<PathBuf>,
    /// Whether it gets a terminal.
    pub tty: bool,
    /// Whether it gets input.
    pub interactive: bool,
    /// The window.
    pub watch: Watch,
}

/// What a monitor answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Answer {
    /// It is done.
    Done(serde_json::Value),
    /// It is not.
    Failed(Failure),
}

/// Why it is not: told to a person, and to scripts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// One sentence.
    pub message: String,
    /// The exit code of the command line.
    pub code: u8,
}

impl Failure {
    /// What an error says, with its causes.
    pub fn of(error: &dyn std::error::Error, code: u8) -> Failure {
        let mut message = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            // Errors that show their cause in their own words do so at the end.
            let text = cause.to_string();
            if !message.ends_with(&text) {
                message = format!("{message}: {text}");
            }
            source = cause.source();
        }
        Failure { message: without_numbers(&message), code }
    }
}

/// `No such file or directory (os error 2)` without what only a programmer wants to know.
fn without_numbers(message: &str) -> String {
    let mut pieces = message.split(" (os error ");
    let mut text = pieces.next().unwrap_or("").to_owned();
    for piece in pieces {
        text.push_str(piece.split_once(')').map_or(piece, |(_, rest)| rest));
    }
    text
}

impl From<PodError> for Failure {
    fn from(error: PodError) -> Failure {
        Failure::of(&error, error.exit_code())
    }
}

impl From<checkpoint::CheckpointError> for Failure {
    fn from(error: checkpoint::CheckpointError) -> Failure {
        Failure::of(&error, error.exit_code())
    }
}

impl From<migrate::source::MigrateError> for Failure {
    fn from(error: migrate::source::MigrateError) -> Failure {
        Failure::of(&error, error.exit_code())
    }
}

impl From<restart::RestartError> for Failure {
    fn from(error: restart::RestartError) -> Failure {
        Failure::of(&error, error.exit_code())
    }
}

/// What a monitor says of a pod that it has made.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Born {
    /// The pod's name.
    pub name: String,
    /// The monitor.
    pub monitor: Option<ProcessId>,
    /// Figures, if it was restarted.
    pub stats: Option<restart::Stats>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_numbers_are_not_for_people() {
        let error = std::io::Error::from_raw_os_error(libc::ENOENT);
        assert_eq!(Failure::of(&error, 1).message, "No such file or directory");
        assert_eq!(without_numbers("a (os error 2); b (os error 13)"), "a; b");
    }
}
