//! Downtime as clients see it, against what the pod reports.

use std::time::Duration;

use anyhow::{Context, Result};

use super::onlooker::{Seat, Use};
use super::{Experiment, Session, yardstick};
use crate::client::Gaps;
use crate::lab::{Lab, PodOptions};
use crate::samples::Circumstances;
use crate::workload::{Apache, Desktop, Mpm, Workload};

pub(super) const EXPERIMENT: Experiment = Experiment {
    name: "downtime-client",
    claim: "a peer notices a pause, nothing else",
    what: "the longest time without an answer (requests), a byte (a stream over TCP) or a frame (VNC) across a checkpoint, \
           and the downtime that the pod reports",
    cases: || vec!["apache-event", "desktop-classic"],
    runs: (20, 50),
    share: 2,
    run,
};

/// What is used, and how.
const PARTS: [(&dyn Workload, Use); 3] = [
    (&Apache { mpm: Mpm::Event }, Use::Requests),
    (&Apache { mpm: Mpm::Event }, Use::Bytes),
    (&Desktop::Classic, Use::Frames),
];

fn run(session: &mut Session) -> Result<()> {
    let parts: Vec<_> = PARTS.into_iter().filter(|(workload, _)| session.wants(workload.name())).collect();
    session.each(&parts, |part| name(*part), |session, part| measure(session, *part))
}

fn name((workload, how): (&dyn Workload, Use)) -> String {
    format!("{} {how:?}", workload.name()).to_lowercase()
}

fn measure(session: &mut Session, (workload, how): (&dyn Workload, Use)) -> Result<()> {
    let lab = Lab::new()?;
    let image = lab.directory().join("image");
    let mut pod = lab.start_pod(workload, "used", &PodOptions::default())?;
    let seat = Seat::take(&lab, &pod, how)?;
    let name = name((workload, how));
    let mut rounds = session.rounds(&name);
    while let Some(run) = session.next(&mut rounds)? {
        let of = |arm| Circumstances { workload: workload.name(), parameters: how.parameters(), arm, run };
        yardstick::measure(session, &lab, &of(""))?;
        for arm in ["leave-running", "stop-restart"] {
            session.step(&format!("{name}, {arm}"));
            let onlooker = seat.look(&lab, &pod)?;
            onlooker.look_for(WINDOW)?;
            let options: &[&str] = if arm == "leave-running" { &["--leave-running"] } else { &[] };
            let (stats, _) = pod.checkpoint(&image, options)?;
            if arm == "stop-restart" {
                pod = lab.restart(&image, &[])?.0;
            }
            // One more answer, so that the pause has ended before he stops.
            workload.ready(&lab, pod.served_at()?)?;
            let gaps = onlooker.finish().context("the client, across the checkpoint")?;
            std::fs::remove_dir_all(&image).with_context(|| format!("removing {}", image.display()))?;
            let of = of(arm);
            session.record_duration(&of, "client_gap", gaps.longest)?;
            session.record_duration(&of, "client_typical", gaps.typical)?;
            record_timeline(session, &of, &gaps)?;
            session.record(&of, "pod_downtime", stats.downtime_us as f64, "us")?;
        }
    }
    pod.remove()
}

/// How far before and after the longest pause answers are recorded, and in steps of what.
const WINDOW: Duration = Duration::from_millis(150);
const STEP_MS: i64 = 2;

/// The longest pause that ended in each step of a window around the longest of all; steps without an answer have none.
fn record_timeline(session: &mut Session, of: &Circumstances<'_>, gaps: &Gaps) -> Result<()> {
    let Some((middle, longest)) = gaps.timeline.iter().max_by_key(|(_, gap)| *gap) else { return Ok(()) };
    let mut steps: std::collections::BTreeMap<i64, Duration> = std::collections::BTreeMap::new();
    let is_near = |at: &Duration| *at + *longest + WINDOW >= *middle && *at <= *middle + WINDOW;
    for (at, gap) in gaps.timeline.iter().filter(|(at, _)| is_near(at)) {
        let ms = at.as_millis() as i64 - middle.as_millis() as i64;
        let longest = steps.entry(ms.div_euclid(STEP_MS) * STEP_MS).or_default();
        *longest = (*longest).max(*gap);
    }
    for (ms, gap) in steps {
        let parameters = format!("{};at_ms={ms}", of.parameters);
        session.record_duration(&Circumstances { parameters: &parameters, ..*of }, "gap", gap)?;
    }
    Ok(())
}
