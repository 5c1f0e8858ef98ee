//! Holding a process still and acting inside it: seize, registers, the batch.

mod batch;
mod ground;
mod held;
pub mod interrupted;
mod stub;

pub use batch::{Arg, Batch, Call, Output, Results};
pub use ground::{Ground, SMALL_SEAT, open_memory};
pub use held::{Held, Seized, ThreadName, TraceeError, seize};
pub(crate) use stub::{RawCall, Seat};
