//! Holding a process still and acting inside it: seize, registers, the batch.

mod batch;
mod ground;
mod held;
pub mod interrupted;
mod stub;
#[cfg(test)]
mod tests;

pub use batch::{Arg, Batch, Call, Output, Results};
pub use ground::{Ground, Preparing, SMALL_SEAT, Site, open_memory};
pub use held::{Held, Seized, ThreadName, TraceeError, seize};
pub use stub::stub_code;
pub(crate) use stub::{RawCall, Seat};
