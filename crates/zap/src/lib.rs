//! Zap runs unmodified Linux programs in *pods*, and can stop a pod, write it down, and start it again.
//!
//! Start reading at [`checkpoint`] and [`restart`]: they tell the two stories from top to bottom. `ARCHITECTURE.md`
//! in the repository has the map.

#![cfg_attr(not(test), warn(clippy::unwrap_used))]

pub mod builder;
pub mod checkpoint;
pub mod cli;
pub mod demands;
pub mod error;
pub mod fault;
pub mod fetch;
pub mod files;
#[doc(hidden)]
pub mod fuzzing;
pub mod host;
pub mod ids;
pub mod image;
pub mod inspect;
pub mod ipc;
pub mod keepers;
mod kernel;
pub mod layer;
pub mod look;
pub mod memory;
pub mod migrate;
pub mod monitor;
pub mod mounts;
pub mod namespaces;
mod parallel;
mod plausible;
pub mod pod;
pub mod probe;
pub mod process;
pub mod processor;
mod procfs;
pub mod rebuild;
pub mod record;
pub mod restart;
pub mod sockets;
#[allow(unsafe_code)]
pub mod sys;
pub mod tracee;
