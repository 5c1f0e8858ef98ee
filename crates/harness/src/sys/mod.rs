//! The only room of this crate with `unsafe`: what std and nix have no safe call for.

mod fork;
mod interrupt;
mod mappings;
mod segments;

pub use fork::{fork_and_exit, fork_and_sleep};
pub use interrupt::interrupts;
pub use mappings::map_apart;
pub use segments::{remove_segment, shared_segment};
