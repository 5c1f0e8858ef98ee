//! Holding a process still and acting inside it: seize, registers, the batch.

mod batch;

pub use batch::{Arg, Batch, Call, Output, Results};
