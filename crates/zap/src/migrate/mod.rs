//! Moving a pod to another host: [`source`] gives it away, [`destination`] takes it, over any two-way byte stream.
//!
//! What travels is an image, sent as it is written ([`crate::image::PartSink`]): a migration is a checkpoint whose image is
//! put together on the other side, and a restart that waits, with everything rebuilt and held, for the word *go*.

use serde::{Deserialize, Serialize};

use crate::checkpoint::Phase;

pub mod destination;
pub mod keys;
pub mod protocol;
pub mod relay;
pub mod source;
pub mod wire;

/// How memory is moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Strategy {
    /// Hold, send everything, let go over there.
    StopAndCopy,
    /// Send what there is while the pod runs, again what it wrote meanwhile, and only the last of it with the pod held.
    #[default]
    PreCopy,
}

impl Strategy {
    /// What the command line calls it.
    pub fn name(self) -> &'static str {
        match self {
            Strategy::StopAndCopy => "stop-and-copy",
            Strategy::PreCopy => "pre-copy",
        }
    }
}

/// How a pod is to be moved.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Options {
    /// How its memory is moved.
    pub strategy: Strategy,
    /// What the destination is called, for messages.
    pub to: String,
    /// Carry the contents of the root's files that the pod has open or mapped.
    pub carry_files: bool,
    /// For tests: the stream breaks before this frame, counted from 0, is sent.
    #[serde(default)]
    pub cut_before: Option<u64>,
    /// The fault point at which the monitor is to die ([`crate::fault`]).
    #[serde(default)]
    pub fault: Option<String>,
}

/// Figures of a finished migration. Times are whole microseconds, sizes bytes.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Stats {
    /// How long the pod ran nowhere, as the source saw it: from the first process held until it heard that they run.
    pub downtime_us: u64,
    /// From the request until nothing of the pod was left here.
    pub total_us: u64,
    /// Bytes sent.
    pub bytes: u64,
    /// Times that memory was looked through: the last one with the pod held.
    pub rounds: u64,
    /// How memory was moved.
    pub strategy: Strategy,
    /// look-ahead, hold, look, memory, files, write, let-go.
    pub phases: Vec<Phase>,
    /// The address at which it is reached over there; empty if it has none.
    pub address: String,
}
