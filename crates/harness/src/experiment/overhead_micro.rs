//! What a pod costs a single system call and a single process.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, bail};

use super::{Experiment, Session};
use crate::lab::{Lab, PodOptions, built_beside};
use crate::samples::Circumstances;
use crate::stats::median;
use crate::workload::Sleep;

pub(super) const EXPERIMENT: Experiment = Experiment {
    name: "overhead-micro",
    claim: "low overhead",
    what: "getpid, a read of one byte, fork+exit, fork+exec: natively, in a pod, without a seccomp profile, with an empty one",
    cases: || vec!["micro"],
    runs: (25, 50),
    run,
};

/// Where the directory of `harness-micro` is in a pod.
const DIRECTORY_IN_POD: &str = "/srv/harness";
const OPERATIONS: [&str; 4] = ["getpid", "read", "fork_exit", "fork_exec"];
/// Where it is measured; all but the first are names of pods. The last has a filter that allows everything: what the
/// kernel itself takes for having one.
const ARMS: [&str; 4] = ["native", "pod", "pod-unconfined", "pod-allow-all"];
/// Batches of each operation in a run, arm after arm, so that all see the same machine.
const TURNS: usize = 20;

fn run(session: &mut Session) -> Result<()> {
    let lab = Lab::new()?;
    let micro = built_beside("harness-micro")?;
    start_pods(&lab, &micro)?;
    session.expect(u64::from(session.runs + 1));
    for run in 0..=session.runs {
        session.step("in turns");
        let mut arms = ARMS.map(|arm| Measurer::start(&lab, arm, &micro)).into_iter().collect::<Result<Vec<_>>>()?;
        for operation in OPERATIONS {
            let found = in_turns(session, &mut arms, operation)?;
            // The first run warms caches up.
            let Some(run) = run.checked_sub(1) else { continue };
            for (arm, nanoseconds) in ARMS.iter().zip(found) {
                let of = Circumstances { workload: "micro", parameters: "", arm, run };
                session.record(&of, operation, nanoseconds, "ns")?;
            }
        }
        arms.into_iter().try_for_each(Measurer::finish)?;
    }
    Ok(())
}

fn start_pods(lab: &Lab, micro: &Path) -> Result<()> {
    let directory = micro.parent().context("harness-micro has no directory")?;
    let profile = lab.directory().join("allow-all.json");
    std::fs::write(&profile, r#"{"defaultAction": "SCMP_ACT_ALLOW"}"#).context("writing a seccomp profile")?;
    for pod in &ARMS[1..] {
        let seccomp = match *pod {
            "pod-unconfined" => "unconfined".into(),
            "pod-allow-all" => profile.to_string_lossy().into_owned(),
            _ => "default".into(),
        };
        let bind = format!("{}:{DIRECTORY_IN_POD}:ro", directory.display());
        let options = vec!["--bind".into(), bind, "--seccomp".into(), seccomp];
        lab.start_pod(&Sleep, pod, &PodOptions { options })?;
    }
    Ok(())
}

/// The median of each arm's batches of an operation.
fn in_turns(session: &mut Session, arms: &mut [Measurer], operation: &str) -> Result<Vec<f64>> {
    let mut batches = vec![Vec::new(); arms.len()];
    for turn in 0..=TURNS {
        for arm in session.shuffled(&[0, 1, 2, 3]) {
            let nanoseconds = arms[arm].ask(operation)?;
            // The first batch of each warms it up.
            if turn > 0 {
                batches[arm].push(nanoseconds);
            }
        }
    }
    Ok(batches.iter().filter_map(|batches| median(batches)).collect())
}

/// A `harness-micro` that waits for its turn.
struct Measurer {
    arm: &'static str,
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Measurer {
    fn start(lab: &Lab, arm: &'static str, micro: &Path) -> Result<Self> {
        let mut child = if arm == "native" {
            lab.host().spawn(Command::new(micro).stdin(Stdio::piped()).stdout(Stdio::piped()))?
        } else {
            lab.spawn_zap(&["exec", "-i", arm, &format!("{DIRECTORY_IN_POD}/harness-micro")])?
        };
        let (to, from) = (child.stdin.take(), child.stdout.take());
        let (to, from) = to.zip(from).context("a pipe to harness-micro")?;
        Ok(Self { arm, child, to, from: BufReader::new(from) })
    }

    fn ask(&mut self, operation: &str) -> Result<f64> {
        writeln!(self.to, "{operation}").with_context(|| format!("asking for {operation} in {}", self.arm))?;
        let mut line = String::new();
        self.from.read_line(&mut line).with_context(|| format!("waiting for {operation} in {}", self.arm))?;
        line.trim().parse().with_context(|| format!("{operation} in {}: harness-micro printed {line:?}", self.arm))
    }

    fn finish(mut self) -> Result<()> {
        drop(self.to);
        let status = self.child.wait().context("waiting for harness-micro")?;
        if status.success() { Ok(()) } else { bail!("harness-micro in {} ended with {status}", self.arm) }
    }
}
