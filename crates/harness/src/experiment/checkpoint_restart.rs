//! How long a checkpoint and a restart take, stage by stage, and how large an image is.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::peers::Peers;
use super::rivals::Rivals;
use super::{Experiment, Extent, Session, bytes_below};
use crate::lab::{Lab, Phase, Pod, PodOptions, resident};
use crate::samples::Circumstances;
use crate::workload::{self, Workload};

pub(super) const EXPERIMENT: Experiment = Experiment {
    name: "checkpoint-restart",
    claim: "sub-second checkpoint and restart latencies",
    what: "downtime, stages, whole-command times and image sizes: a pod that sleeps, Apache with each MPM, desktops; \
           with --full or by name every program of workloads/, too",
    cases: || workload::all().iter().map(|workload| workload.name()).collect(),
    runs: (15, 30),
    share: 8,
    run,
};

/// Ways to compress an image, and the arms that their sizes belong to.
const COMPRESSIONS: [(&str, &str); 3] = [("none", "size-none"), ("lz4", "size-lz4"), ("zstd", "size-zstd")];

fn run(session: &mut Session) -> Result<()> {
    let mut workloads = workload::served();
    workloads.retain(|workload| session.wants(workload.name()));
    // Many, and not what the claim is about: with the largest extent, or if asked for by name.
    let programs = workload::programs();
    workloads.extend(programs.filter(|workload| session.extent == Extent::Full || session.asks_for(workload.name())));
    session.each(&workloads, |workload| workload.name().into(), |session, workload| measure(session, workload.as_ref()))
}

/// Measures one workload, in a lab of its own.
fn measure(session: &mut Session, workload: &dyn Workload) -> Result<()> {
    let lab = Lab::new()?;
    let image = lab.directory().join("image");
    let mut pod = lab.start_pod(workload, "measured", &PodOptions::default())?;
    let mut peers = Peers::connect(&lab, &pod, workload)?;
    let parameters = peers.parameters();
    let mut rivals = Rivals::start(session, &lab, workload)?;
    let mut rounds = session.rounds(workload.name(), true);
    while let Some(run) = session.next(&mut rounds)? {
        let of = |arm| Circumstances { workload: workload.name(), parameters: &parameters, arm, run };

        session.step(&format!("{}: left running", workload.name()));
        for (compression, arm) in if run == 0 && !session.warms_up() { &COMPRESSIONS[..] } else { &COMPRESSIONS[..1] } {
            peers.watch();
            let checkpoint = checkpoint(&pod, &image, &["--leave-running", "--compress", compression])?;
            let gap = peers.longest_gap()?;
            session.record(&of(arm), "image_bytes", bytes_below(&image)? as f64, "bytes")?;
            if *compression == "none" {
                checkpoint.record(session, &of("leave-running"))?;
                gap.map_or(Ok(()), |gap| session.record_duration(&of("leave-running"), "viewer_gap", gap))?;
            }
            remove(&image)?;
        }
        peers.use_once()?;
        workload.works(&pod).context("left running")?;

        session.step(&format!("{}: stopped and restarted", workload.name()));
        let before = resident(&pod.processes()?)?;
        peers.watch();
        let stopped = checkpoint(&pod, &image, &[])?;
        let restarted = restart(&lab, &image, &peers)?;
        pod = restarted.pod.clone();
        let after = resident(&pod.processes()?)?;
        stopped.record(session, &of("stop"))?;
        restarted.record(session, &of("restart"))?;
        session.record(&of("stop"), "memory", before.total as f64, "bytes")?;
        session.record(&of("restart"), "memory", after.total as f64, "bytes")?;
        peers.use_once()?;
        workload.works(&pod).context("restarted")?;
        remove(&image)?;
        rivals.turn(session, &parameters, run)?;
    }
    peers.finish()?;
    pod.remove()
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
