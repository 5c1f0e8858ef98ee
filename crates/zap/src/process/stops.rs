//! Processes that a signal has stopped.

use std::time::{Duration, Instant};

use crate::ids::HostPid;
use crate::process::proc_files::parse_stat;
use crate::procfs;

/// How long a thread that has been let go may take to get to its stop.
const PATIENCE: Duration = Duration::from_millis(500);

/// Waits until every thread of `processes` is in its stop, or has ended. Should somebody outside let one go on meanwhile,
/// it is not waited for much longer.
pub fn await_all(processes: &[HostPid]) {
    let deadline = Instant::now() + PATIENCE;
    for process in processes {
        // The kernel tells nobody but the parent; it takes microseconds.
        while !is_stopped(*process) && Instant::now() < deadline {
            std::thread::yield_now();
        }
    }
}

fn is_stopped(process: HostPid) -> bool {
    let Ok(threads) = std::fs::read_dir(process.proc("task")) else { return true };
    let stat = |path: std::path::PathBuf| parse_stat(&procfs::read_record(path.join("stat")).ok()?);
    threads.flatten().filter_map(|thread| stat(thread.path())).all(|stat| matches!(stat.state, b'T' | b'Z' | b'X'))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use nix::sys::signal::{Signal, kill};
    use nix::unistd::Pid;

    use super::*;

    #[test]
    fn a_stop_is_waited_for() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = HostPid(child.id() as i32);
        assert!(!is_stopped(process));
        kill(Pid::from_raw(process.0), Signal::SIGSTOP).unwrap();
        await_all(&[process]);
        assert!(is_stopped(process));
        child.kill().unwrap();
        child.wait().unwrap();
        // Whoever has gone is not waited for.
        assert!(is_stopped(process));
    }
}
