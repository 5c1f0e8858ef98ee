//! Directory trees on their way through an image: the upper layers of a pod's overlays, and what is in its tmpfs mounts.
//!
//! An archive is a stream of entries. One that comes later takes the place of an earlier one of the same path, so a tree is
//! packed while the pod runs ([`pack`]), what changes meanwhile is added ([`follow`]), and in the hold what has changed since
//! ([`pack_changes`]): of a large file that is written to all the time, the blocks that differ. Everything that a file
//! system can say of a file travels: overlay's whiteouts and `trusted.overlay.*` attributes, hard links, holes, devices,
//! sockets, times. The image's checksums cover it.

mod blocks;
mod format;
mod pack;
#[cfg(test)]
mod tests;
mod tree;
mod unpack;

pub use pack::{Index, Inodes, follow, pack, pack_changes};
pub(crate) use unpack::labelled;
pub use unpack::unpack;
