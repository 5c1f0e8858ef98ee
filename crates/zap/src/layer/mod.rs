//! Directory trees on their way through an image: the upper layers of a pod's overlays, and what is in its tmpfs mounts.
//!
//! An archive is a stream of entries. One that comes later takes the place of an earlier one of the same path, so a tree is
//! packed while the pod runs ([`pack`]), and in the hold only what changed since is added ([`pack_changes`]). Everything
//! that a file system can say of a file travels: overlay's whiteouts and `trusted.overlay.*` attributes, hard links, holes,
//! devices, sockets, times. The image's checksums cover it.

mod follow;
mod format;
mod pack;
#[cfg(test)]
mod tests;
mod tree;
mod unpack;

pub use follow::{FollowError, Followed};
pub use pack::{Index, Inodes, pack, pack_changes};
pub use unpack::unpack;
