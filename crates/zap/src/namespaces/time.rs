//! Offsets of clocks.

use std::io;

use serde::{Deserialize, Serialize};

use crate::ids::HostPid;
use crate::record::offsets;

/// How far the clocks of a namespace are from the pod's own, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimeState {
    /// CLOCK_MONOTONIC.
    pub monotonic: i64,
    /// CLOCK_BOOTTIME.
    pub boottime: i64,
}

fn of(process: HostPid) -> io::Result<(i64, i64)> {
    Ok(offsets(&std::fs::read_to_string(process.proc("timens_offsets"))?))
}

/// The offsets of the time namespace that `process` is in, in the pod of `init`.
pub(super) fn capture(init: HostPid, process: HostPid) -> io::Result<TimeState> {
    let (pods, own) = (of(init)?, of(process)?);
    Ok(TimeState { monotonic: own.0 - pods.0, boottime: own.1 - pods.1 })
}

/// Sets the clocks of the namespace that the caller has just made for its children.
pub(super) fn restart(state: &TimeState) -> io::Result<()> {
    const SECOND: i64 = 1_000_000_000;
    // What is there now is the pod's.
    let now = offsets(&std::fs::read_to_string("/proc/self/timens_offsets")?);
    let line =
        |name: &str, offset: i64| format!("{name} {} {}\n", offset.div_euclid(SECOND), offset.rem_euclid(SECOND));
    let moved = |now: i64, by: i64| now.checked_add(by).ok_or(io::ErrorKind::InvalidData);
    let lines = line("monotonic", moved(now.0, state.monotonic)?) + &line("boottime", moved(now.1, state.boottime)?);
    std::fs::write("/proc/self/timens_offsets", lines)
}
