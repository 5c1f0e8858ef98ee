//! A person at the screen of a desktop in a pod: a VNC client (RFB 3.8) on another host.
//!
//! [`Viewer`] keeps one TCP connection for as long as it lives, follows the screen, types, moves the mouse, and notes how
//! long the screen stood still; [`Picture`] is what it saw, compared outside the [`Region`]s that move by themselves.

mod follow;
pub mod keys;
mod picture;
mod wire;

pub use follow::{Viewer, ViewerError};
pub use picture::{Picture, Region};
