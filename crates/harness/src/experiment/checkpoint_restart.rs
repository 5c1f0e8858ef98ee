//! How long a checkpoint and a restart take, stage by stage, and how large an image is.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::{Experiment, Session, bytes_below};
use crate::client::{Connection, Crowd};
use crate::lab::{Lab, PATIENCE, Phase, Pod, PodOptions};
use crate::samples::Circumstances;
use crate::workload::{self, Workload};

pub(super) const EXPERIMENT: Experiment = Experiment {
    name: "checkpoint-restart",
    claim: "sub-second checkpoint and restart latencies",
    what: "downtime, stages, whole-command times and image sizes: a pod that sleeps, Apache with each MPM",
    runs: 15,
    run,
};

/// Open connections while Apache is checkpointed: idle ones, and ones in the middle of a download.
const IDLE: usize = 46;
const DOWNLOADING: usize = 4;
/// Ways to compress an image, and the arms that their sizes belong to.
const COMPRESSIONS: [(&str, &str); 3] = [("none", "size-none"), ("lz4", "size-lz4"), ("zstd", "size-zstd")];

fn run(session: &mut Session) -> Result<()> {
    let workloads = workload::all();
    session.expect(u64::from(session.runs + 1) * workloads.len() as u64 * 2);
    for workload in &workloads {
        measure(session, workload.as_ref()).with_context(|| format!("with {}", workload.name()))?;
    }
    Ok(())
}

/// Measures one workload, in a lab of its own.
fn measure(session: &mut Session, workload: &dyn Workload) -> Result<()> {
    let lab = Lab::new()?;
    let image = lab.directory().join("image");
    let mut pod = lab.start_pod(workload, "measured", &PodOptions::default())?;
    let serves = workload.serves();
    let mut crowd = match serves {
        true => Some(Crowd::open(lab.client(), pod.served_at()?, IDLE, DOWNLOADING, PATIENCE)?),
        false => None,
    };
    let parameters = if serves { format!("idle={IDLE};downloading={DOWNLOADING}") } else { String::new() };
    for run in 0..=session.runs {
        // The first round warms up: it is made, but not recorded.
        let recorded = run.checked_sub(1);
        let of = |arm| Circumstances { workload: workload.name(), parameters: &parameters, arm, run: run.max(1) - 1 };

        session.step(&format!("{}: left running", workload.name()));
        for (compression, arm) in if run == 1 { &COMPRESSIONS[..] } else { &COMPRESSIONS[..1] } {
            let checkpoint = checkpoint(&pod, &image, &["--leave-running", "--compress", compression])?;
            if recorded.is_some() {
                session.record(&of(arm), "image_bytes", bytes_below(&image)? as f64, "bytes")?;
                if *compression == "none" {
                    checkpoint.record(session, &of("leave-running"))?;
                }
            }
            remove(&image)?;
        }
        use_connections(&mut crowd)?;

        session.step(&format!("{}: stopped and restarted", workload.name()));
        let stopped = checkpoint(&pod, &image, &[])?;
        let restarted = restart(&lab, &image, serves)?;
        pod = restarted.pod.clone();
        if recorded.is_some() {
            stopped.record(session, &of("stop"))?;
            restarted.record(session, &of("restart"))?;
        }
        use_connections(&mut crowd)?;
        remove(&image)?;
    }
    if let Some(crowd) = crowd {
        crowd.finish().context("the connections, after all checkpoints")?;
    }
    pod.remove()
}

/// Every open connection must still work, with every byte right, or the times mean nothing.
fn use_connections(crowd: &mut Option<Crowd>) -> Result<()> {
    crowd.as_mut().map_or(Ok(()), |crowd| crowd.use_once().context("after a checkpoint"))
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
    /// From before the command was started until a request over a new connection was answered, after it had ended.
    first_answer: Option<Duration>,
}

fn restart<'a>(lab: &'a Lab, image: &Path, serves: bool) -> Result<Restart<'a>> {
    let (stats, whole) = lab.restart_only(image, &[])?;
    let first_answer = match serves {
        true => {
            let address = stats.served_at()?;
            let start = Instant::now();
            lab.client().enter(|| Connection::open(address, PATIENCE)?.get_file("1k.bin"))??;
            Some(whole + start.elapsed())
        }
        false => None,
    };
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
