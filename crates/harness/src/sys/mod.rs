//! The only room of this crate with `unsafe`: what std and nix have no safe call for.

mod fork;
mod interrupt;
mod mappings;
mod module;
mod segments;
mod sysv;

pub use fork::{fork_and_exit, fork_and_sleep};
pub use interrupt::interrupts;
pub use mappings::{map_apart, map_touch_unmap};
pub use module::load_module;
pub use segments::{remove_segment, shared_segment};
pub use sysv::{readable_bytes, segment_and_gone, semaphore_and_gone};
