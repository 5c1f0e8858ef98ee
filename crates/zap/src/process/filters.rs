//! Seccomp filters.

use serde::{Deserialize, Serialize};

use crate::error::{CaptureError, Context};
use crate::ids::{HostPid, PodPid};
use crate::process::threads::ThreadState;
use crate::sys::ptrace;
use crate::tracee::Batch;

/// One filter of a chain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilterState {
    /// Classic BPF instructions, 8 bytes each.
    #[serde(with = "serde_bytes")]
    pub program: Vec<u8>,
    /// `SECCOMP_FILTER_FLAG_LOG` and its like, as the kernel tells them.
    pub flags: u64,
}

/// The chain of a thread, oldest first.
pub fn capture(tid: HostPid, pod: PodPid, count: u32) -> Result<Vec<FilterState>, CaptureError> {
    let mut chain = Vec::with_capacity(count as usize);
    for index in 0..count as usize {
        let found = ptrace::seccomp_filter(tid, index)
            .capturing("reading a seccomp filter", format!("process {pod}; zap itself must not run under a filter"))?;
        let Some((program, flags)) = found else { break };
        chain.push(FilterState { program, flags });
    }
    // The kernel counts from the most recent.
    Ok(chain)
}

/// Gives the threads that have other filters than the first their own, and the chain of the first. Threads with as many,
/// of which the newest is the same, have the same: a filter is put in front of those that were there.
pub fn capture_all(
    threads: &mut [ThreadState],
    hosts: impl Iterator<Item = HostPid>,
    inherited: u32,
) -> Result<Vec<FilterState>, CaptureError> {
    let mut chain: Option<(Vec<FilterState>, u32)> = None;
    for (thread, host) in threads.iter_mut().zip(hosts) {
        let Some((first, count)) = &chain else {
            chain = Some((capture(host, thread.tid, thread.filters)?, thread.filters));
            continue;
        };
        let is_same =
            thread.filters == *count && (*count <= inherited || newest(host, thread)? == first.last().cloned());
        if !is_same {
            thread.own_filters = Some(capture(host, thread.tid, thread.filters)?);
        }
    }
    Ok(chain.map(|(chain, _)| chain).unwrap_or_default())
}

fn newest(host: HostPid, thread: &ThreadState) -> Result<Option<FilterState>, CaptureError> {
    let Some(last) = thread.filters.checked_sub(1) else { return Ok(None) };
    let found = ptrace::seccomp_filter(host, last as usize)
        .capturing("reading a seccomp filter", format!("thread {}", thread.tid))?;
    Ok(found.map(|(program, flags)| FilterState { program, flags }))
}

/// Installs the filters of `chain` that come after the first `inherited`.
pub fn restart(chain: &[FilterState], inherited: usize, batch: &mut Batch) {
    const SECCOMP_SET_MODE_FILTER: i32 = 1;
    for filter in chain.iter().skip(inherited) {
        let program = batch.bytes(&filter.program);
        let header = batch.bytes(&[&((filter.program.len() / 8) as u64).to_ne_bytes()[..], &[0; 8]].concat());
        batch.pointer(header, 8, program);
        let args = [SECCOMP_SET_MODE_FILTER.into(), filter.flags.into(), header];
        batch.call(libc::SYS_seccomp, args, "installing a seccomp filter");
    }
}
