//! How many copies of one image run side by side, how fast each comes, and what memory it takes.

use anyhow::Result;

use super::{Experiment, Extent, Session};
use crate::lab::{Lab, Pod, PodOptions, resident};
use crate::samples::Circumstances;
use crate::workload::{Apache, Mpm, Sleep, Workload};

pub(super) const EXPERIMENT: Experiment = Experiment {
    name: "density",
    claim: "an image restarts as often as one likes, the copies side by side",
    what: "restarts of one image beside each other: time of each, memory of all of them, time to remove one",
    cases: || workloads().iter().map(|workload| workload.name()).collect(),
    runs: (10, 10),
    share: 3,
    run,
};

fn workloads() -> [Box<dyn Workload>; 2] {
    [Box::new(Sleep), Box::new(Apache { mpm: Mpm::Event })]
}

fn run(session: &mut Session) -> Result<()> {
    let copies = match session.extent {
        Extent::Fast => 2,
        Extent::Ordinary => 20,
        Extent::Full => 50,
    };
    let workloads: Vec<_> = workloads().into_iter().filter(|workload| session.wants(workload.name())).collect();
    session.each(
        &workloads,
        |workload| workload.name().into(),
        |session, workload| {
            let mut rounds = session.rounds(workload.name());
            while let Some(run) = session.next(&mut rounds)? {
                let copies = if session.warms_up() { 1 } else { copies };
                measure(session, workload.as_ref(), copies, run)?;
            }
            Ok(())
        },
    )
}

fn measure(session: &mut Session, workload: &dyn Workload, copies: u64, run: u32) -> Result<()> {
    let lab = Lab::new()?;
    let image = lab.directory().join("image");
    lab.start_pod(workload, "copy", &PodOptions::default())?.checkpoint(&image, &[])?;
    let mut pods: Vec<Pod<'_>> = Vec::new();
    for copy in 1..=copies {
        session.step(&format!("{}: copy {copy}", workload.name()));
        let parameters = format!("n={copy}");
        let of = Circumstances { workload: workload.name(), parameters: &parameters, arm: "copies", run };
        let (pod, _, took) = lab.restart(&image, &[])?;
        session.record_duration(&of, "whole", took)?;
        pods.push(pod);
        let processes: Result<Vec<_>> = pods.iter().map(Pod::processes).collect();
        let memory = resident(&processes?.concat())?;
        session.record(&of, "memory", memory.total as f64, "bytes")?;
        session.record(&of, "anonymous", memory.anonymous as f64, "bytes")?;
    }
    // Every one of them works, beside all the others.
    pods.iter().try_for_each(|pod| workload.health(&lab, pod.served_at()?))?;
    for (left, pod) in pods.into_iter().enumerate().rev() {
        let parameters = format!("n={}", left + 1);
        let of = Circumstances { workload: workload.name(), parameters: &parameters, arm: "copies", run };
        let begun = std::time::Instant::now();
        pod.remove()?;
        session.record_duration(&of, "removal", begun.elapsed())?;
    }
    Ok(())
}
