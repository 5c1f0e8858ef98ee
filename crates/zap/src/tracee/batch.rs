//! A batch: system calls that run inside a tracee in one go.
//!
//! Rooms build batches without knowing where the tracee's scratch area is; addresses are filled in when it is run.

use crate::ids::Address;

/// A call of a batch, by its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call(pub(super) usize);

/// A buffer that a call fills, read back by the tracer after the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Output {
    pub(super) offset: usize,
    pub(super) length: usize,
}

/// An argument of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arg {
    /// A plain number.
    Value(u64),
    /// The address of bytes or of an output buffer in the scratch area (offset into the batch's data).
    Data(usize),
    /// The result of an earlier call.
    ResultOf(Call),
}

impl From<u64> for Arg {
    fn from(value: u64) -> Arg {
        Arg::Value(value)
    }
}

impl From<u32> for Arg {
    fn from(value: u32) -> Arg {
        Arg::Value(value.into())
    }
}

impl From<i32> for Arg {
    fn from(value: i32) -> Arg {
        Arg::Value(value as i64 as u64)
    }
}

impl From<usize> for Arg {
    fn from(value: usize) -> Arg {
        Arg::Value(value as u64)
    }
}

impl From<Address> for Arg {
    fn from(value: Address) -> Arg {
        Arg::Value(value.0)
    }
}

impl From<Output> for Arg {
    fn from(value: Output) -> Arg {
        Arg::Data(value.offset)
    }
}

/// What happens when a call of a batch fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OnFailure {
    /// The batch ends there; the tracer reports the step.
    Stop,
    /// The batch goes on; the caller looks at the result.
    GoOn,
}

/// One call as it was built.
#[derive(Clone, Debug)]
pub(super) struct Step {
    pub(super) number: i64,
    pub(super) args: [Arg; 6],
    pub(super) on_failure: OnFailure,
    /// What it is for, in an error: `mapping 0x7f…`.
    pub(super) what: String,
}

/// System calls to run inside a tracee in one go, with the bytes they read and write.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    pub(super) steps: Vec<Step>,
    pub(super) data: Vec<u8>,
    /// Words of the data that are offsets into it and become addresses when the batch is placed.
    pointers: Vec<usize>,
}

impl Batch {
    /// An empty batch.
    pub fn new() -> Batch {
        Batch::default()
    }

    /// Adds a call that must succeed; `what` names it in the error otherwise. At most six arguments; the rest are zero.
    pub fn call<const N: usize>(&mut self, number: libc::c_long, args: [Arg; N], what: impl Into<String>) -> Call {
        self.push(number, args, OnFailure::Stop, what.into())
    }

    /// Adds a call that may fail; its result is in [`Results::get`].
    pub fn attempt<const N: usize>(&mut self, number: libc::c_long, args: [Arg; N]) -> Call {
        self.push(number, args, OnFailure::GoOn, String::new())
    }

    fn push<const N: usize>(
        &mut self,
        number: libc::c_long,
        args: [Arg; N],
        on_failure: OnFailure,
        what: String,
    ) -> Call {
        const { assert!(N <= 6) };
        let mut all = [Arg::Value(0); 6];
        all[..N].copy_from_slice(&args);
        self.steps.push(Step { number, args: all, on_failure, what });
        Call(self.steps.len() - 1)
    }

    /// Puts bytes for a call to read into the scratch area (8-byte aligned) and gives the argument that points to them.
    pub fn bytes(&mut self, bytes: &[u8]) -> Arg {
        let offset = self.data.len();
        self.data.extend_from_slice(bytes);
        self.data.resize(self.data.len().next_multiple_of(8), 0);
        Arg::Data(offset)
    }

    /// Marks the 8-byte word at `place` bytes behind `structure` as the address of `target` (both [`Arg::Data`]): pointers
    /// inside structures that a call reads.
    pub fn pointer(&mut self, structure: Arg, place: usize, target: Arg) {
        if let (Arg::Data(structure), Arg::Data(target)) = (structure, target) {
            let at = structure + place;
            self.data[at..at + 8].copy_from_slice(&(target as u64).to_ne_bytes());
            self.pointers.push(at);
        }
    }

    /// Puts the calls of `other` behind these. Handles of its calls and outputs mean nothing any more.
    pub fn append(&mut self, other: Batch) {
        let (calls, data) = (self.steps.len(), self.data.len());
        let moved = |arg: Arg| match arg {
            Arg::Value(value) => Arg::Value(value),
            Arg::Data(offset) => Arg::Data(offset + data),
            Arg::ResultOf(call) => Arg::ResultOf(Call(call.0 + calls)),
        };
        self.steps.extend(other.steps.into_iter().map(|step| Step { args: step.args.map(moved), ..step }));
        self.data.extend_from_slice(&other.data);
        for at in other.pointers {
            self.pointer(Arg::Data(data), at, Arg::Data(data + other.data.get(at..at + 8).map_or(0, word)));
        }
    }

    /// The data with its pointers filled in, for a batch whose data begins at `base`.
    pub(super) fn relocated(&self, base: u64) -> Vec<u8> {
        let mut data = self.data.clone();
        for &at in &self.pointers {
            let mut word = [0; 8];
            word.copy_from_slice(&data[at..at + 8]);
            data[at..at + 8].copy_from_slice(&(u64::from_ne_bytes(word) + base).to_ne_bytes());
        }
        data
    }

    /// Bytes that the batch needs in a scratch area.
    pub fn size(&self) -> usize {
        super::stub::size(self.steps.len()) + self.data.len()
    }

    /// Reserves a zeroed buffer of `length` bytes (8-byte aligned) for a call to fill.
    pub fn output(&mut self, length: usize) -> Output {
        let offset = self.data.len();
        self.data.resize((offset + length).next_multiple_of(8), 0);
        Output { offset, length }
    }

    /// The calls as they were built: number and arguments.
    #[cfg(test)]
    pub(crate) fn calls(&self) -> impl Iterator<Item = (i64, [Arg; 6])> {
        self.steps.iter().map(|step| (step.number, step.args))
    }

    /// The bytes that the calls read.
    #[cfg(test)]
    pub(crate) fn data(&self) -> &[u8] {
        &self.data
    }

    /// How many calls there are.
    pub fn len(&self) -> usize {
        self.steps.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }
}

fn word(bytes: &[u8]) -> usize {
    bytes.first_chunk().map_or(0, |word| u64::from_ne_bytes(*word)) as usize
}

/// What a batch brought back.
#[derive(Clone, Debug)]
pub struct Results {
    pub(super) results: Vec<i64>,
    pub(super) data: Vec<u8>,
    /// How many calls were left behind successfully (or allowed to fail).
    pub(super) reached: usize,
}

impl Results {
    /// The result of a call as the kernel gave it: negative is an errno.
    pub fn get(&self, call: Call) -> i64 {
        self.results[call.0]
    }

    /// The call that ended the batch early, and its errno.
    pub(super) fn failure(&self, batch: &Batch) -> Option<(usize, i32)> {
        (self.reached < batch.steps.len()).then(|| (self.reached, -self.results[self.reached] as i32))
    }

    /// The bytes of an output buffer.
    pub fn output(&self, output: Output) -> &[u8] {
        &self.data[output.offset..output.offset + output.length]
    }
}
