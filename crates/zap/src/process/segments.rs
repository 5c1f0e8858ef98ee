//! Segments of a process's own (`modify_ldt(2)`), which programs for 16-bit and 32-bit code use. They belong to its address
//! space; children have copies of them.

use serde::{Deserialize, Serialize};

use crate::tracee::{Batch, Output, Results};

/// A segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SegmentState {
    /// Its number.
    pub number: u32,
    /// Its descriptor, as the processor has it.
    pub descriptor: u64,
}

/// How many there can be, and bytes of one.
const MOST: usize = 8192;
const BYTES: usize = 8;

/// Asks for all of them.
pub fn ask(batch: &mut Batch) -> Output {
    const READ: i32 = 0;
    let all = batch.output(MOST * BYTES);
    batch.call(libc::SYS_modify_ldt, [READ.into(), all.into(), (MOST * BYTES).into()], "reading segments");
    all
}

/// The answer.
pub fn answer(all: Output, results: &Results) -> Vec<SegmentState> {
    let descriptors = results.output(all).as_chunks::<BYTES>().0.iter().map(|bytes| u64::from_ne_bytes(*bytes));
    let numbered = (0..).zip(descriptors).filter(|(_, descriptor)| *descriptor != 0);
    numbered.map(|(number, descriptor)| SegmentState { number, descriptor }).collect()
}

/// A batch that sets them again.
pub fn restarted(segments: &[SegmentState]) -> Batch {
    const WRITE: i32 = 0x11;
    let mut batch = Batch::new();
    for segment in segments {
        let description = batch.bytes(segment.description().map(u32::to_ne_bytes).as_flattened());
        batch.call(libc::SYS_modify_ldt, [WRITE.into(), description, 16i32.into()], "setting a segment");
    }
    batch
}

impl SegmentState {
    /// It as `struct user_desc`: number, base, limit, flags.
    fn description(self) -> [u32; 4] {
        let bits = |from: u32, count: u32| (self.descriptor >> from) as u32 & ((1 << count) - 1);
        let base = bits(16, 24) | bits(56, 8) << 24;
        let limit = bits(0, 16) | bits(48, 4) << 16;
        let (is_writable, contents, is_present) = (bits(41, 1), bits(42, 2), bits(47, 1));
        let (available, long, wide, in_pages) = (bits(52, 1), bits(53, 1), bits(54, 1), bits(55, 1));
        let flags = wide
            | contents << 1
            | (is_writable ^ 1) << 3
            | in_pages << 4
            | (is_present ^ 1) << 5
            | available << 6
            | long << 7;
        [self.number, base, limit, flags]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_shows_is_what_it_was_told() {
        // 16-bit code, not to be read; 32-bit data in pages, which is not there, for whoever likes.
        for description in
            [[3, 0x1234_5678, 0xf_fff, 2 << 1 | 1 << 3], [8191, 9, 0xf_ffff, 1 | 1 << 4 | 1 << 5 | 1 << 6]]
        {
            let [_, base, limit, flags] = description.map(u64::from);
            let bit = |number: u64| flags >> number & 1;
            let kind = 1 | (bit(3) ^ 1) << 1 | (flags >> 1 & 3) << 2;
            let descriptor = limit & 0xffff
                | (base & 0xff_ffff) << 16
                | (kind | 1 << 4 | 3 << 5 | (bit(5) ^ 1) << 7) << 40
                | (limit >> 16) << 48
                | (bit(6) | bit(7) << 1 | bit(0) << 2 | bit(4) << 3) << 52
                | base >> 24 << 56;
            let number = description[0];
            assert_eq!(SegmentState { number, descriptor }.description(), description);
        }
    }
}
