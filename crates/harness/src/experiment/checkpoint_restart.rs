//! How long a checkpoint and a restart take, stage by stage, and how large an image is.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use super::peers::Peers;
use super::rivals::Rivals;
use super::{Experiment, Session, bytes_below, yardstick};
use crate::lab::{Lab, Phase, Pod, PodOptions, resident};
use crate::samples::Circumstances;
use crate::workload::{self, Workload};

pub(super) const EXPERIMENT: Experiment = Experiment {
    name: "checkpoint-restart",
    claim: "sub-second checkpoint and restart latencies",
    what: "downtime, stages, whole commands and image sizes, to tmpfs and disk, first and again, compressed: servers, desktops, \
           databases; with --full or by name every program of workloads/",
    cases: || workload::all().iter().map(|workload| workload.name()).collect(),
    runs: (15, 30),
    share: 12,
    run,
};

/// What is measured unless something is asked for by name.
const USUAL: [&str; 11] = [
    "sleep",
    "apache-event",
    "apache-worker",
    "apache-prefork",
    "desktop-classic",
    "desktop-full",
    "redis_memory",
    "postgresql",
    "node",
    "python",
    "java",
];

fn run(session: &mut Session) -> Result<()> {
    let mut workloads = workload::all();
    workloads.retain(|workload| session.wants_of(&USUAL, workload.name()));
    session.each(&workloads, |workload| workload.name().into(), |session, workload| measure(session, workload.as_ref()))
}

/// Measures one workload, in a lab of its own.
fn measure(session: &mut Session, workload: &dyn Workload) -> Result<()> {
    let lab = Lab::new()?;
    let mut pod = lab.start_pod(workload, "measured", &PodOptions::default())?;
    let mut peers = Peers::connect(&lab, &pod, workload)?;
    let parameters = peers.parameters();
    let mut rivals = Rivals::start(session, &lab, workload)?;
    let mut rounds = session.rounds(workload.name());
    while let Some(run) = session.next(&mut rounds)? {
        let round = Round { lab: &lab, workload: workload.name(), parameters: &parameters, run };
        yardstick::measure(session, &lab, &round.of(""))?;
        session.step(&format!("{}: left running", workload.name()));
        round.left_running(session, &pod, &peers)?;
        round.on_disk(session, &pod)?;
        peers.use_once()?;
        workload.works(&pod).context("left running")?;
        session.step(&format!("{}: stopped and restarted", workload.name()));
        pod = round.stopped_and_restarted(session, &pod, &peers)?;
        peers.use_once()?;
        workload.works(&pod).context("restarted")?;
        rivals.turn(session, &parameters, run)?;
    }
    peers.finish()?;
    pod.remove()
}

/// One round of one workload.
#[derive(Clone, Copy)]
struct Round<'a> {
    lab: &'a Lab,
    workload: &'a str,
    parameters: &'a str,
    run: u32,
}

impl<'a> Round<'a> {
    fn of(&self, arm: &'a str) -> Circumstances<'a> {
        Circumstances { workload: self.workload, parameters: self.parameters, arm, run: self.run }
    }

    /// To a tmpfs: the first checkpoint since the pod was started or restarted; a repetition at once, when its memory is
    /// followed already; and compressed.
    fn left_running(&self, session: &mut Session, pod: &Pod<'_>, peers: &Peers) -> Result<()> {
        let image = self.lab.directory().join("image");
        for (arm, size, compression) in [
            ("leave-running", "size-none", "none"),
            ("repeat", "", "none"),
            ("lz4", "size-lz4", "lz4"),
            ("zstd", "size-zstd", "zstd"),
        ] {
            peers.watch();
            let checkpoint = checkpoint(pod, &image, &["--leave-running", "--compress", compression])?;
            let gap = peers.longest_gap()?;
            checkpoint.record(session, &self.of(arm))?;
            gap.map_or(Ok(()), |gap| session.record_duration(&self.of(arm), "viewer_gap", gap))?;
            if !size.is_empty() {
                session.record(&self.of(size), "image_bytes", bytes_below(&image)? as f64, "bytes")?;
            }
            remove(&image)?;
        }
        Ok(())
    }

    /// To a disk, and a copy from there once memory has forgotten the image.
    fn on_disk(&self, session: &mut Session, pod: &Pod<'_>) -> Result<()> {
        let directory = tempfile::Builder::new().prefix("zap-images-").tempdir_in("/var/tmp");
        let directory = directory.context("making a directory below /var/tmp")?;
        let image = directory.path().join("image");
        checkpoint(pod, &image, &["--leave-running"])?.record(session, &self.of("disk"))?;
        forget(&image)?;
        let (copy, stats, whole) = self.lab.restart(&image, &[])?;
        session.record_duration(&self.of("restart-disk"), "whole", whole)?;
        record_phases(session, &self.of("restart-disk"), &stats.phases)?;
        copy.remove()
    }

    /// The pod that was restarted from the image of the one that was stopped.
    fn stopped_and_restarted(&self, session: &mut Session, pod: &Pod<'_>, peers: &Peers) -> Result<Pod<'a>> {
        let image = self.lab.directory().join("image");
        let before = resident(&pod.processes()?)?;
        peers.watch();
        let stopped = checkpoint(pod, &image, &[])?;
        // For some milliseconds the kernel is still at the links of a pod that was the last on its bridge, and nobody else can
        // change any: this waits for it, so that the restart is measured by itself.
        self.lab.host().output(Command::new("ip").args(["link", "set", "lo", "up"]))?;
        let restarted = restart(self.lab, &image, peers)?;
        let after = resident(&restarted.pod.processes()?)?;
        stopped.record(session, &self.of("stop"))?;
        restarted.record(session, &self.of("restart"))?;
        session.record(&self.of("stop"), "memory", before.total as f64, "bytes")?;
        session.record(&self.of("restart"), "memory", after.total as f64, "bytes")?;
        remove(&image)?;
        Ok(restarted.pod)
    }
}

/// Has the kernel drop what it keeps of the files of an image in memory.
fn forget(image: &Path) -> Result<()> {
    for entry in std::fs::read_dir(image).with_context(|| format!("reading {}", image.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            forget(&path)?;
        } else if path.is_file() {
            let file = std::fs::File::open(&path)?;
            file.sync_all()?;
            posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
        }
    }
    Ok(())
}

fn remove(image: &Path) -> Result<()> {
    std::fs::remove_dir_all(image).with_context(|| format!("removing {}", image.display()))
}

struct Checkpoint {
    stats: crate::lab::CheckpointStats,
    whole: Duration,
}

fn checkpoint(pod: &Pod<'_>, image: &Path, options: &[&str]) -> Result<Checkpoint> {
    let (stats, whole) = pod.checkpoint(image, options)?;
    Ok(Checkpoint { stats, whole })
}

impl Checkpoint {
    fn record(&self, session: &mut Session, of: &Circumstances<'_>) -> Result<()> {
        let stats = &self.stats;
        session.record(of, "downtime", stats.downtime_us as f64, "us")?;
        session.record_duration(of, "whole", self.whole)?;
        session.record(of, "total", stats.total_us as f64, "us")?;
        record_phases(session, of, &stats.phases)?;
        for (metric, value) in [("pages", stats.pages), ("processes", stats.processes), ("threads", stats.threads)] {
            session.record(of, metric, value as f64, "1")?;
        }
        session.record(of, "bytes", stats.bytes as f64, "bytes")
    }
}

struct Restart<'a> {
    pod: Pod<'a>,
    stats: crate::lab::RestartStats,
    whole: Duration,
    /// From before the command was started until a peer was answered: a request over a new connection after it had
    /// ended, or a new frame for a viewer.
    first_answer: Option<Duration>,
}

fn restart<'a>(lab: &'a Lab, image: &Path, peers: &Peers) -> Result<Restart<'a>> {
    let began = Instant::now();
    let (stats, whole) = lab.restart_only(image, &[])?;
    let first_answer = peers.first_answer(lab, &stats, began)?;
    Ok(Restart { pod: lab.pod(&stats.name)?, stats, whole, first_answer })
}

impl Restart<'_> {
    fn record(&self, session: &mut Session, of: &Circumstances<'_>) -> Result<()> {
        session.record_duration(of, "whole", self.whole)?;
        session.record(of, "total", self.stats.total_us as f64, "us")?;
        if let Some(first_answer) = self.first_answer {
            session.record_duration(of, "first_answer", first_answer)?;
        }
        record_phases(session, of, &self.stats.phases)
    }
}

fn record_phases(session: &mut Session, of: &Circumstances<'_>, phases: &[Phase]) -> Result<()> {
    for phase in phases {
        session.record(of, &format!("phase:{}", phase.name), phase.us as f64, "us")?;
    }
    Ok(())
}
