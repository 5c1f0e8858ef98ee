//! Address spaces: their layout, their pages, which pages were written, and how all of it is made again.
//!
//! [`survey`] reads what the kernel tells of an address space, [`capture`] makes a [`MemoryState`] of it (kernel → state);
//! [`rebuild_batches`] and [`late_batch`] plan the system calls that make it again (state → kernel), without doing any.

pub mod asynchronous;
mod capture;
mod elf;
mod face;
mod foreign;
pub mod keys;
mod kinship;
pub mod layout;
mod left;
mod mapped;
mod marks;
#[cfg(test)]
mod model;
mod pages;
mod plan;
pub mod policy;
mod ranges;
mod state;
mod survey;
#[cfg(test)]
mod tests;
mod touched;
mod tracking;
mod vdso;

pub use asynchronous::Contexts;
pub use capture::{Captured, Piece, ReadPiece, Request, append_all, capture, check, read_all, stream_all, unread};
pub use foreign::{FaceState, Patch, adapt, is_at_home, is_in_a_jump, write_patches};
pub use layout::{Mapping, Nature, flag};
pub use left::{LITTLE, LITTLE_AT_RESTART, LITTLE_IN_PLACE, LeftBehind, pages_of};
pub use mapped::MappedFiles;
pub use pages::{has_guards, is_empty_at, read_traced, without_guards, worth_leaving_out};
pub use plan::{MemoryBatch, Target, free_gap, late_batch, over_range, rebuild_batches};
pub use state::{Backing, MemoryState, MmFields, PageRun, PageSource, VdsoState, VmaState};
pub use survey::{Survey, are_still, layout_of, mappings, survey};
pub use touched::{touch, touched};
pub use tracking::{Ahead, Handle, Round, ask_for_tracking};
pub use vdso::own_vdso;

/// Bytes of a page on x86-64.
pub(crate) const PAGE: u64 = 4096;
