//! Resource limits. Asked and set by the process itself: from outside that takes CAP_SYS_RESOURCE for another user's.

use crate::tracee::{Batch, Output, Results};

/// `RLIMIT_CPU` to `RLIMIT_RTTIME`.
const RESOURCES: u32 = 16;

/// Asks for every limit.
pub fn ask(batch: &mut Batch) -> Vec<Output> {
    (0..RESOURCES)
        .map(|resource| {
            let out = batch.output(16);
            batch.call(libc::SYS_prlimit64, [0.into(), resource.into(), 0.into(), out.into()], "reading a limit");
            out
        })
        .collect()
}

/// Soft and hard limit of each resource, by number.
pub fn capture(asked: &[Output], results: &Results) -> Vec<(u64, u64)> {
    let word = |bytes: &[u8], at: usize| bytes[at..].first_chunk().map_or(0, |word| u64::from_ne_bytes(*word));
    asked.iter().map(|out| (word(results.output(*out), 0), word(results.output(*out), 8))).collect()
}

/// Sets every limit. A hard limit above the one that zap runs under takes CAP_SYS_RESOURCE.
pub fn restart(limits: &[(u64, u64)], batch: &mut Batch) {
    for (resource, (soft, hard)) in limits.iter().enumerate() {
        let limit = batch.bytes(&[soft.to_ne_bytes(), hard.to_ne_bytes()].concat());
        let what = format!("setting resource limit {resource} to {soft}:{hard}; raise zap's own hard limit to that");
        batch.call(libc::SYS_prlimit64, [0.into(), resource.into(), limit, 0.into()], what);
    }
}
