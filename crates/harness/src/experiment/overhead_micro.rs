//! What a pod costs a single system call and a single process.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, bail};

use super::{Experiment, Extent, Session};
use crate::lab::{Lab, Netns, PodOptions, built_beside};
use crate::micro::OPERATIONS;
use crate::samples::Circumstances;
use crate::stats::median;
use crate::workload::Sleep;

pub(super) const EXPERIMENT: Experiment = Experiment {
    name: "overhead-micro",
    claim: "low overhead",
    what: "18 operations, from getpid to a context switch: natively, in pods with three seccomp profiles, in bare namespaces, in bubblewrap",
    cases: || vec!["micro"],
    runs: (25, 50),
    share: 3,
    run,
};

/// Where the directory of `harness-micro` is in a pod.
const DIRECTORY_IN_POD: &str = "/srv/harness";
/// Where it is measured. Three are names of pods; one has a filter that allows everything: what the kernel itself takes for
/// having one. The last two are other ways to give a program a view of its own.
const ARMS: [&str; 6] = ["native", "pod", "pod-unconfined", "pod-allow-all", "namespaces", "bubblewrap"];
const PODS: [&str; 3] = ["pod", "pod-unconfined", "pod-allow-all"];
/// New namespaces of every kind that a pod has, but for the network's, which the harness makes.
const NAMESPACES: [&str; 8] =
    ["--pid", "--fork", "--kill-child", "--mount-proc", "--ipc", "--uts", "--cgroup", "--time"];
const BUBBLEWRAP: [&str; 9] = ["--unshare-all", "--bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--"];
/// Batches of each operation in a run, arm after arm, so that all see the same machine.
const TURNS: usize = 20;

fn run(session: &mut Session) -> Result<()> {
    let lab = Lab::new()?;
    let micro = built_beside("harness-micro")?;
    start_pods(&lab, &micro)?;
    session.each(
        &["micro"],
        |part| (*part).into(),
        |session, part| {
            let mut rounds = session.rounds(part);
            while let Some(run) = session.next(&mut rounds)? {
                let mut arms = start_measurers(session, part, &lab, &micro)?;
                for (operation, _) in OPERATIONS {
                    session.step(operation);
                    for (arm, nanoseconds) in in_turns(session, &mut arms, operation)? {
                        let of = Circumstances { workload: "micro", parameters: "", arm, run };
                        session.record(&of, operation, nanoseconds, "ns")?;
                    }
                }
                arms.into_iter().try_for_each(Measurer::finish)?;
            }
            Ok(())
        },
    )
}

/// One for each place that there is; why there is none is noted.
fn start_measurers(session: &mut Session, part: &str, lab: &Lab, micro: &Path) -> Result<Vec<Measurer>> {
    let mut measurers = Vec::new();
    for arm in ARMS {
        match Measurer::start(lab, arm, micro) {
            Ok(measurer) => measurers.push(measurer),
            Err(error) if arm == "bubblewrap" => session.note(part, arm, &format!("{error:#}"))?,
            Err(error) => return Err(error),
        }
    }
    Ok(measurers)
}

fn start_pods(lab: &Lab, micro: &Path) -> Result<()> {
    let directory = micro.parent().context("harness-micro has no directory")?;
    let profile = lab.directory().join("allow-all.json");
    std::fs::write(&profile, r#"{"defaultAction": "SCMP_ACT_ALLOW"}"#).context("writing a seccomp profile")?;
    for pod in PODS {
        let seccomp = match pod {
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
fn in_turns(session: &mut Session, arms: &mut [Measurer], operation: &str) -> Result<Vec<(&'static str, f64)>> {
    let mut batches = vec![Vec::new(); arms.len()];
    let order: Vec<usize> = (0..arms.len()).collect();
    let turns = if session.extent == Extent::Fast { 2 } else { TURNS };
    for turn in 0..=turns {
        for arm in session.shuffled(&order) {
            let nanoseconds = arms[arm].ask(operation)?;
            // The first batch of each warms it up.
            if turn > 0 {
                batches[arm].push(nanoseconds);
            }
        }
    }
    Ok(arms.iter().zip(batches).filter_map(|(arm, batches)| Some((arm.arm, median(&batches)?))).collect())
}

fn piped(command: &mut Command) -> &mut Command {
    command.stdin(Stdio::piped()).stdout(Stdio::piped())
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
        let mut child = match arm {
            "native" => lab.host().spawn(piped(&mut Command::new(micro)))?,
            "namespaces" => Netns::new()?.spawn(piped(Command::new("unshare").args(NAMESPACES).arg(micro)))?,
            "bubblewrap" => Netns::new()?.spawn(piped(Command::new("bwrap").args(BUBBLEWRAP).arg(micro)))?,
            pod => lab.spawn_zap(&["exec", "-i", pod, &format!("{DIRECTORY_IN_POD}/harness-micro")])?,
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
