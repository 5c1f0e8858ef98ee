//! Moving a pod to another host: [`source`] gives it away, [`destination`] takes it, over any two-way byte stream.
//!
//! What travels is an image, sent as it is written ([`crate::image::PartSink`]): a migration is a checkpoint whose image is
//! put together on the other side, and a restart that waits, with everything rebuilt and held, for the word *go*. What
//! becomes of memory is a [`strategies::Strategy`]; pages that come later are filled in by [`crate::fetch`].

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::checkpoint::Phase;
use crate::fault::Stream;

mod ahead;
pub mod destination;
pub mod followers;
mod from_source;
pub mod keys;
pub mod progress;
pub mod protocol;
pub mod relay;
pub mod source;
mod store;
pub mod strategies;
pub mod wire;

/// How a pod is to be moved.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Options {
    /// How its memory is moved: the name of one of [`strategies::ALL`].
    pub strategy: String,
    /// The directory that both hosts see, for strategies that need one.
    #[serde(default)]
    pub store: Option<PathBuf>,
    /// What the destination is called, for messages.
    pub to: String,
    /// Be content with another address where its own cannot be had.
    #[serde(default)]
    pub any_address: bool,
    /// Then keep a forwarder here, for those who are connected with it at its old one.
    #[serde(default)]
    pub forward: bool,
    /// Then have those follow it there who are connected with it, on this host and on the destination …
    #[serde(default)]
    pub follow: bool,
    /// … and on hosts that these commands lead to.
    #[serde(default)]
    pub tell: Vec<String>,
    /// Carry the contents of the root's files that the pod has open or mapped.
    pub carry_files: bool,
    /// Whether whoever asks wants to hear how far it is.
    #[serde(default)]
    pub progress: bool,
    /// For tests: what happens to the stream.
    #[serde(default)]
    pub stream: Stream,
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
    /// Bytes sent, or written to the store.
    pub bytes: u64,
    /// Times that memory was looked through: the last one with the pod held.
    pub rounds: u64,
    /// How memory was moved.
    pub strategy: String,
    /// Bytes of memory that the pod left behind here when it ran there …
    #[serde(default)]
    pub residual_bytes: u64,
    /// … and for how long it depended on this host for them.
    #[serde(default)]
    pub residual_us: u64,
    /// look-ahead, hold, look, memory, files, write, let-go.
    pub phases: Vec<Phase>,
    /// What the destination did while it was held: verify, namespaces, files, memory, tree.
    #[serde(default)]
    pub there: Vec<Phase>,
    /// The address at which it is reached over there; empty if it has none.
    pub address: String,
    /// Why no forwarder could be left, if one should have been.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_forwarded: Option<String>,
}
