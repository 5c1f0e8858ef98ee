//! What a pod costs a single system call and a single process.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::{Experiment, Session};
use crate::lab::{Lab, PodOptions};
use crate::samples::Circumstances;
use crate::workload::Sleep;

pub(super) const EXPERIMENT: Experiment = Experiment {
    name: "overhead-micro",
    claim: "low overhead",
    what: "getpid, a read of one byte, fork+exit, fork+exec: natively, in a pod, in a pod without a seccomp profile",
    runs: 25,
    run,
};

/// Where the directory of `harness-micro` is in a pod.
const DIRECTORY_IN_POD: &str = "/srv/harness";

fn run(session: &mut Session) -> Result<()> {
    let lab = Lab::new()?;
    let micro = micro()?;
    let directory = micro.parent().context("harness-micro has no directory")?;
    let bind = format!("{}:{DIRECTORY_IN_POD}:ro", directory.display());
    let confined = PodOptions { options: vec!["--bind".into(), bind] };
    let mut unconfined = confined.clone();
    unconfined.options.extend(["--seccomp".into(), "unconfined".into()]);
    lab.start_pod(&Sleep, "pod", &confined)?;
    lab.start_pod(&Sleep, "pod-unconfined", &unconfined)?;

    session.expect(u64::from(session.runs + 1) * 3);
    for run in 0..=session.runs {
        for arm in session.shuffled(&["native", "pod", "pod-unconfined"]) {
            session.step(arm);
            let printed = if arm == "native" {
                String::from_utf8_lossy(&lab.host().output(&mut Command::new(&micro))?.stdout).into_owned()
            } else {
                lab.pod(arm)?.exec(&[&format!("{DIRECTORY_IN_POD}/harness-micro")])?
            };
            // The first round warms caches up.
            let Some(run) = run.checked_sub(1) else { continue };
            let of = Circumstances { workload: "micro", parameters: "", arm, run };
            for (operation, nanoseconds) in parse(&printed)? {
                session.record(&of, operation, nanoseconds, "ns")?;
            }
        }
    }
    Ok(())
}

/// The `harness-micro` beside this program.
fn micro() -> Result<PathBuf> {
    let this = std::env::current_exe().context("finding this program's own path")?;
    let beside = this.ancestors().skip(1).take(2).map(|dir| dir.join("harness-micro"));
    match beside.into_iter().find(|path| path.is_file()) {
        Some(path) => Ok(path),
        None => bail!("there is no harness-micro beside {}: build the workspace", this.display()),
    }
}

/// Lines of `operation nanoseconds`.
fn parse(printed: &str) -> Result<Vec<(&str, f64)>> {
    let parsed: Option<Vec<_>> = printed
        .lines()
        .map(|line| {
            let (operation, nanoseconds) = line.split_once(' ')?;
            Some((operation, nanoseconds.parse().ok()?))
        })
        .collect();
    match parsed {
        Some(lines) if !lines.is_empty() => Ok(lines),
        _ => bail!("harness-micro printed {printed:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_micro_benchmark() {
        assert_eq!(parse("getpid 51.5\nread 90\n").unwrap(), [("getpid", 51.5), ("read", 90.0)]);
        assert!(parse("").is_err());
        assert!(parse("getpid fast\n").is_err());
    }
}
