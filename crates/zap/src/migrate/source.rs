//! The side that gives a pod away.

use std::sync::Arc;

use super::protocol::{Hello, Message, VERSION};
use super::wire::{NotSent, Wire};
use super::{Options, Stats, Strategy};
use crate::checkpoint::{self, Afterwards, CheckpointError, Given};
use crate::fault;
use crate::image::{Compression, FORMAT, ImageWriter};
use crate::monitor::protocol::Failure;
use crate::pod::LivePod;
use crate::record;

/// Why a pod was not moved. It goes on running here, but for [`CheckpointError::InDoubt`].
#[derive(Debug, thiserror::Error)]
pub enum MigrateError {
    /// The stream failed.
    #[error("pod {pod} goes on here: the stream to {to} failed: {source}")]
    Wire {
        /// The pod's name.
        pod: String,
        /// What the destination is called.
        to: String,
        /// How.
        source: std::io::Error,
    },
    /// The destination would not have it.
    #[error("pod {pod} goes on here: {to} refuses it: {failure}")]
    Refused {
        /// The pod's name.
        pod: String,
        /// What the destination is called.
        to: String,
        /// Its words.
        failure: Failure,
    },
    /// The destination said something that has no place in the protocol.
    #[error("pod {pod} goes on here: {to} says {said}, which is not its turn to say")]
    Protocol {
        /// The pod's name.
        pod: String,
        /// What the destination is called.
        to: String,
        /// The message.
        said: &'static str,
    },
    /// It could not be written down, or was not taken.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
}

impl MigrateError {
    /// The exit code of the command (CLI.md).
    pub fn exit_code(&self) -> u8 {
        match self {
            MigrateError::Refused { failure, .. } => failure.code,
            MigrateError::Checkpoint(error) => error.exit_code(),
            _ => 1,
        }
    }
}

/// Moves a pod over `wire`. When this returns figures, the pod's processes here have ended and the caller removes the rest.
pub fn migrate(pod: &mut LivePod, options: &Options, wire: Arc<Wire>) -> Result<Stats, MigrateError> {
    fault::arm(options.fault.as_deref());
    let name = pod.spec.name.clone();
    let broken = |source: std::io::Error| MigrateError::Wire { pod: name.clone(), to: options.to.clone(), source };
    wire.greet().map_err(broken)?;
    wire.send(&Message::Hello(Box::new(hello(pod)))).map_err(broken)?;
    match wire.hear().map_err(broken)? {
        Message::Welcome { .. } => {}
        Message::Refused(failure) => {
            return Err(MigrateError::Refused { pod: name.clone(), to: options.to.clone(), failure });
        }
        other => {
            return Err(MigrateError::Protocol { pod: name.clone(), to: options.to.clone(), said: other.name() });
        }
    }
    fault::point("migrate-welcomed");
    let how = checkpoint::Options {
        output: Default::default(),
        afterwards: Afterwards::Gone,
        compress: Compression::None,
        parent: None,
        carry_files: options.carry_files,
        stop_and_copy: options.strategy == Strategy::StopAndCopy,
        fault: options.fault.clone(),
    };
    let was_suspended = pod.cgroup.is_frozen();
    let mut address = String::new();
    let mut give = |pod: &mut LivePod| hand_over(pod, &wire, was_suspended, &mut address);
    let writer = ImageWriter::sending(wire.clone()).map_err(CheckpointError::from);
    let sent = writer.and_then(|writer| checkpoint::send(pod, &how, writer, &mut give)).map_err(|error| {
        // The destination hears why; if it cannot hear any more it finds out by itself.
        let _ = wire.send(&Message::Abandoned(error.to_string()));
        match error {
            CheckpointError::Image(error) => broken(std::io::Error::other(error)),
            other => other.into(),
        }
    })?;
    fault::point("migrate-away");
    Ok(Stats {
        downtime_us: sent.downtime_us,
        bytes: wire.sent(),
        rounds: sent.rounds,
        strategy: options.strategy,
        phases: sent.phases,
        address,
        // The caller knows when nothing of the pod is left.
        ..Stats::default()
    })
}

fn hello(pod: &LivePod) -> Hello {
    let memory = pod.cgroup.pids().unwrap_or_default().into_iter().filter_map(|process| {
        let status = std::fs::read_to_string(process.proc("status")).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
        line.split_ascii_whitespace().next()?.parse::<u64>().ok()
    });
    Hello {
        protocol: VERSION,
        format: FORMAT,
        records: record::KNOWN.iter().map(|(kind, version)| ((*kind).to_owned(), *version)).collect(),
        spec: pod.spec.clone(),
        address: pod.network.as_ref().map(|network| network.outer().ipv4),
        memory: memory.sum::<u64>() << 10,
    }
}

/// All has been sent and the pod is held: waits until it is rebuilt over there, gives it up here, and has it let go there.
fn hand_over(pod: &mut LivePod, wire: &Wire, was_suspended: bool, address: &mut String) -> Given {
    fault::point("migrate-sent");
    match wire.hear() {
        Ok(Message::Ready { address: there }) => *address = there,
        Ok(Message::Failed(failure)) => return Given::Kept(format!("it could not be rebuilt there: {failure}")),
        Ok(other) => {
            return Given::Kept(format!("the destination says {}, which is not its turn to say", other.name()));
        }
        Err(error) => return Given::Kept(format!("the stream failed before it was ready there: {error}")),
    }
    fault::point("migrate-ready");
    if let Err(error) = wire.commit() {
        return Given::Kept(error.to_string());
    }
    // From here on it must not run here, whatever happens to us: the destination may be told the next moment.
    if let Err(error) = pod.give_up() {
        let back = pod.take_back(was_suspended);
        return Given::Kept(format!("it could not be given up: {error}{}", and(back.err())));
    }
    fault::point("migrate-given-up");
    let kept = match wire.send_whole(&Message::Go) {
        Ok(()) => {
            fault::point("migrate-told");
            match wire.hear() {
                Ok(Message::Running) => return Given::Away,
                // Its copy has ended: that is certain.
                Ok(Message::Failed(failure)) => format!("it could not be let go there: {failure}"),
                Ok(other) => return Given::InDoubt(format!("the destination says {}", other.name())),
                Err(error) => return Given::InDoubt(doubt(&error)),
            }
        }
        Err(NotSent::Nothing(error)) => format!("the stream failed before it was let go there: {error}"),
        Err(NotSent::Some(error)) => return Given::InDoubt(doubt(&error)),
    };
    match pod.take_back(was_suspended) {
        Ok(()) => Given::Kept(kept),
        Err(error) => Given::InDoubt(format!("{kept}; and here: {error}")),
    }
}

fn doubt(error: &std::io::Error) -> String {
    format!("the stream failed in the one moment in which nobody knows: {error}")
}

fn and(error: Option<impl std::fmt::Display>) -> String {
    error.map_or_else(String::new, |error| format!("; and {error}"))
}
