//! The namespaces of a pod, and the two processes that it takes to make them.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;

use crate::ids::HostPid;
use crate::pod::init::{self, Setup};
use crate::pod::live::ClockOffsets;
use crate::sys::namespace::{self, Side};

/// Which namespaces every pod has of its own; the network's depends on its mode, cgroup and time come by other ways.
const ALWAYS: i32 = libc::CLONE_NEWPID | libc::CLONE_NEWNS | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;

/// Starts PID 1 of a pod as a child of the caller, in new namespaces and in that cgroup. The caller must be its
/// process's only thread.
///
/// A time namespace takes its offsets only while nobody is in it, and only a child of whoever made it gets in. So a
/// shim makes it, sets it, clones PID 1 as its own sibling, and ends.
pub(super) fn start_init(
    setup: &Setup<'_>,
    clocks: ClockOffsets,
    own_network: bool,
    cgroup: &OwnedFd,
) -> Result<HostPid, (&'static str, io::Error)> {
    let (mut answer, question) = io::pipe().map_err(|e| ("making a pipe", e))?;
    let shim = match namespace::fork().map_err(|e| ("forking", e))? {
        Side::Parent(pid) => pid,
        Side::Child => {
            let result = shim(setup, clocks, own_network, cgroup);
            let words = match result {
                Ok(pid) => [0, pid],
                Err((step, e)) => [step as i32 + 1, e.raw_os_error().unwrap_or(libc::EIO)],
            };
            let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
            let _ = (&question).write_all(&bytes);
            namespace::exit_now(0)
        }
    };
    drop(question);
    let mut bytes = [0; 8];
    let read = answer.read_exact(&mut bytes);
    nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(shim), None).map_err(|e| ("waiting", e.into()))?;
    read.map_err(|e| ("making its namespaces", e))?;
    let word = |at: usize| i32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    match word(0) {
        0 => Ok(HostPid(word(4))),
        step => Err((STEPS[(step as usize - 1).min(STEPS.len() - 1)], io::Error::from_raw_os_error(word(4)))),
    }
}

const STEPS: [&str; 3] = ["making a time namespace", "setting its clocks", "making its namespaces"];

fn shim(
    setup: &Setup<'_>,
    clocks: ClockOffsets,
    own_network: bool,
    cgroup: &OwnedFd,
) -> Result<i32, (usize, io::Error)> {
    namespace::unshare(libc::CLONE_NEWTIME).map_err(|e| (0, e))?;
    fs::write("/proc/self/timens_offsets", clock_lines(clocks)).map_err(|e| (1, e))?;
    let kinds = ALWAYS | if own_network { libc::CLONE_NEWNET } else { 0 };
    match namespace::clone_sibling(kinds, std::os::fd::AsFd::as_fd(cgroup)).map_err(|e| (2, e))? {
        Side::Parent(pid) => Ok(pid),
        Side::Child => init::run(setup),
    }
}

/// The kernel wants whole seconds, which may be negative, and nanoseconds, which may not.
fn clock_lines(clocks: ClockOffsets) -> String {
    const SECOND: i64 = 1_000_000_000;
    let line =
        |name: &str, offset: i64| format!("{name} {} {}\n", offset.div_euclid(SECOND), offset.rem_euclid(SECOND));
    line("monotonic", clocks.monotonic) + &line("boottime", clocks.boottime)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_are_written_as_the_kernel_wants_them() {
        let clocks = ClockOffsets { monotonic: -1, boottime: 2_500_000_000 };
        assert_eq!(clock_lines(clocks), "monotonic -1 999999999\nboottime 2 500000000\n");
    }
}
