//! The only room of this crate with `unsafe`: what std and nix have no safe call for.

mod fork;
mod interrupt;

pub use fork::fork_and_exit;
pub use interrupt::interrupts;
