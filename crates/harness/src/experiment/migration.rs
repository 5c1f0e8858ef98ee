//! How long pods are away when they move: every strategy, over memory, how fast it is written to, and links.

use std::path::Path;

use anyhow::Result;

use super::{Experiment, Extent, Session, load, yardstick};
use crate::client::Prober;
use crate::lab::{PATIENCE, Pair, PodOptions, Way, options_of as options};
use crate::samples::Circumstances;
use crate::workload::{Apache, Desktop, Mpm, Workload};

pub(super) const EXPERIMENT: Experiment = Experiment {
    name: "migration",
    claim: "a pod moves as a unit, its connections go on, nothing stays behind",
    what: "downtime, total time, bytes and residual dependency: strategy by memory, dirty rate and link; Apache, a desktop",
    cases: || vec!["memory", "apache-event", "desktop-classic"],
    runs: (10, 10),
    share: 8,
    run,
};

const STRATEGIES: [&str; 4] = ["stop-and-copy", "pre-copy", "copy-on-reference", "flush"];
/// MiB of memory, MiB of it written a second, megabits a second of the link (0: all that it can).
const CASES: [(u64, u64, u64); 7] =
    [(64, 0, 0), (256, 0, 0), (1024, 0, 0), (256, 20, 0), (256, 200, 0), (64, 5, 1000), (64, 5, 100)];

/// Something that moves.
#[derive(Clone, Copy, Debug)]
enum Part {
    Memory(u64, u64, u64),
    Apache,
    Desktop,
}

impl Part {
    fn case(&self) -> &'static str {
        match self {
            Self::Memory(..) => "memory",
            Self::Apache => "apache-event",
            Self::Desktop => "desktop-classic",
        }
    }

    fn name(&self) -> String {
        match self {
            Self::Memory(mib, rate, link) => format!("memory={mib};dirty={rate};link={link}"),
            other => other.case().into(),
        }
    }
}

fn run(session: &mut Session) -> Result<()> {
    let pair = Pair::new()?;
    let store = pair.first.directory().join("store");
    std::fs::create_dir(&store)?;
    let some = if session.extent == Extent::Fast { &CASES[..1] } else { &CASES[..] };
    let memory = some.iter().map(|(mib, rate, link)| Part::Memory(*mib, *rate, *link));
    let parts: Vec<Part> =
        memory.chain([Part::Apache, Part::Desktop]).filter(|part| session.wants(part.case())).collect();
    session.each(&parts, Part::name, |session, part| match part {
        Part::Memory(mib, rate, link) => of_memory(session, &pair, &store, (*mib, *rate, *link)),
        Part::Apache => of_workload(session, &pair, &store, &Apache { mpm: Mpm::Event }),
        Part::Desktop => of_workload(session, &pair, &store, &Desktop::Classic),
    })
}

/// A program that does nothing but have memory and write to it.
fn of_memory(session: &mut Session, pair: &Pair, store: &Path, (mib, rate, link): (u64, u64, u64)) -> Result<()> {
    pair.shape((link > 0).then_some(link))?;
    let parameters = format!("memory={mib};dirty={rate};link={link}");
    let mut rounds = session.rounds(&parameters, false);
    while let Some(run) = session.next(&mut rounds)? {
        for strategy in session.shuffled(&STRATEGIES) {
            session.step(&format!("{parameters} {strategy}"));
            load::start(&pair.first, "memory", &[], &["memory", &mib.to_string(), &rate.to_string()])?;
            let (moved, stats) = pair.migrate(true, "memory", Way::Link, &options(strategy, store))?;
            moved.remove()?;
            let of = Circumstances { workload: "memory", parameters: &parameters, arm: strategy, run };
            record(session, &of, &stats)?;
        }
        let of = Circumstances { workload: "memory", parameters: &parameters, arm: "bytes-alone", run };
        yardstick::measure(session, &pair.first, &of)?;
        session.record_duration(&of, "total", pair.carry(mib << 20, Way::Link)?)?;
    }
    pair.shape(None)
}

/// A workload with a client that asks without a pause, where it serves pages.
fn of_workload(session: &mut Session, pair: &Pair, store: &Path, workload: &dyn Workload) -> Result<()> {
    // A case before this one may have failed with the link as slow as that wanted it.
    pair.shape(None)?;
    let pod = pair.first.start_pod(workload, "moved", &PodOptions::default())?;
    let address = pod.served_at()?;
    let mut at_first = true;
    let mut rounds = session.rounds(workload.name(), false);
    while let Some(run) = session.next(&mut rounds)? {
        let of = |arm| Circumstances { workload: workload.name(), parameters: "link=0", arm, run };
        yardstick::measure(session, &pair.first, &of(""))?;
        for strategy in session.shuffled(&STRATEGIES) {
            session.step(&format!("{} {strategy}", workload.name()));
            let serves = workload.name().starts_with("apache");
            let prober = serves.then(|| Prober::start(pair.first.client(), address, PATIENCE)).transpose()?;
            let (_, stats) = pair.migrate(at_first, "moved", Way::Link, &options(strategy, store))?;
            at_first = !at_first;
            let here = if at_first { &pair.first } else { &pair.second };
            workload.ready(here, address)?;
            let of = of(strategy);
            if let Some(prober) = prober {
                session.record_duration(&of, "client_gap", prober.finish()?.longest)?;
            }
            record(session, &of, &stats)?;
        }
    }
    let here = if at_first { &pair.first } else { &pair.second };
    here.pod("moved")?.remove()
}

fn record(session: &mut Session, of: &Circumstances<'_>, stats: &crate::lab::MigrateStats) -> Result<()> {
    for (metric, value, unit) in [
        ("downtime", stats.downtime_us, "us"),
        ("total", stats.total_us, "us"),
        ("bytes", stats.bytes, "bytes"),
        ("rounds", stats.rounds, "1"),
        ("residual", stats.residual_us, "us"),
        ("residual_bytes", stats.residual_bytes, "bytes"),
    ] {
        session.record(of, metric, value as f64, unit)?;
    }
    Ok(())
}
