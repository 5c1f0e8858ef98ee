//! The pod's process on the host: makes the pod, serves commands, keeps the undo journal, log and console.
//!
//! Start reading at [`protocol`] for what it can be asked, and `start.rs` for its life.

pub mod client;
pub mod frame;
pub mod log;
pub mod protocol;
mod serve;
pub mod session;
mod start;
mod watcher;

pub use start::main;

/// The first argument by which `zap` knows that it is to be a monitor.
pub const ARGUMENT: &str = "monitor";
