//! How long pods are away when they move: every strategy, over memory, how fast it is written to, and links.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use super::onlooker::{Onlooker, Seat, Use};
use super::{Experiment, Extent, Session, load, yardstick};
use crate::lab::{Pair, PodOptions, Way, options_of as options};
use crate::samples::Circumstances;
use crate::workload::{Apache, Desktop, Mpm, Workload};

pub(super) const EXPERIMENT: Experiment = Experiment {
    name: "migration",
    claim: "a pod moves as a unit, its connections go on, nothing stays behind",
    what: "downtime, total time, bytes, residual dependency, and what clients have of it meanwhile: strategy by memory, dirty \
           rate and link; Apache, a desktop; with --full every memory with every rate and link",
    cases: || vec!["memory", "apache-event", "desktop-classic"],
    runs: (10, 10),
    share: 8,
    run,
};

const STRATEGIES: [&str; 4] = ["stop-and-copy", "pre-copy", "copy-on-reference", "flush"];
/// MiB of memory, MiB of it written a second, megabits a second of the link (0: all that it can).
const CASES: [(u64, u64, u64); 7] =
    [(64, 0, 0), (256, 0, 0), (1024, 0, 0), (256, 20, 0), (256, 200, 0), (64, 5, 1000), (64, 5, 100)];

/// What each of is combined with each of the others when everything is measured, but for what a link carries in a minute.
const GRID: ([u64; 3], [u64; 3], [u64; 3]) = ([64, 256, 1024], [0, 20, 200], [0, 1000, 100]);
const LONGEST_S: u64 = 60;
/// How long a client uses a pod before it moves.
const BEFORE: Duration = Duration::from_millis(400);

/// [`CASES`], and what of [`GRID`] is not among them.
fn all_cases() -> Vec<(u64, u64, u64)> {
    let (memory, rates, links) = GRID;
    let with_links = |mib: u64, rate: u64| links.map(|link| (mib, rate, link));
    let of_memory = |mib: u64| rates.into_iter().flat_map(move |rate| with_links(mib, rate));
    let carried = |(mib, _, link): &(u64, u64, u64)| *link == 0 || mib * 8 / link < LONGEST_S;
    let grid = memory.into_iter().flat_map(of_memory).filter(carried).filter(|case| !CASES.contains(case));
    CASES.into_iter().chain(grid).collect()
}

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
    let cases = match session.extent {
        Extent::Fast => CASES[..1].to_vec(),
        Extent::Ordinary => CASES.to_vec(),
        Extent::Full => all_cases(),
    };
    let memory = cases.into_iter().map(|(mib, rate, link)| Part::Memory(mib, rate, link));
    // What claims are about comes first, and last what takes longest: where time is short, that is left out.
    let parts: Vec<Part> =
        [Part::Apache, Part::Desktop].into_iter().chain(memory).filter(|part| session.wants(part.case())).collect();
    session.each(&parts, Part::name, |session, part| match part {
        Part::Memory(mib, rate, link) => of_memory(session, &pair, &store, (*mib, *rate, *link)),
        Part::Apache => of_workload(session, &pair, &store, &Apache { mpm: Mpm::Event }, Use::Requests),
        Part::Desktop => of_workload(session, &pair, &store, &Desktop::Classic, Use::Frames),
    })
}

/// A program that does nothing but have memory and write to it, and write to it for whoever asks.
fn of_memory(session: &mut Session, pair: &Pair, store: &Path, (mib, rate, link): (u64, u64, u64)) -> Result<()> {
    pair.shape((link > 0).then_some(link))?;
    let name = format!("memory={mib};dirty={rate};link={link}");
    let parameters = format!("{name};{}", Use::Few.parameters());
    let mut rounds = session.rounds(&name);
    while let Some(run) = session.next(&mut rounds)? {
        // One of them warms up what each of them needs; all of them would take longer than what is measured.
        let strategies = if session.warms_up() { &STRATEGIES[..1] } else { &STRATEGIES[..] };
        for strategy in session.shuffled(strategies) {
            session.step(&format!("{name} {strategy}"));
            let words = ["memory", &mib.to_string(), &rate.to_string(), "serve"];
            let pod = load::start(&pair.first, "memory", &[], &words)?;
            pair.first.attach_client()?;
            let seat = Seat::take(&pair.first, &pod, Use::Few)?;
            let onlooker = seat.look(&pair.first, &pod)?;
            let of = Circumstances { workload: "memory", parameters: &parameters, arm: strategy, run };
            moved(session, pair, &of, (true, "memory"), store, onlooker)?;
            pair.second.pod("memory")?.remove()?;
        }
        let of = Circumstances { workload: "memory", parameters: &parameters, arm: "bytes-alone", run };
        yardstick::measure(session, &pair.first, &of)?;
        session.record_duration(&of, "total", pair.carry(mib << 20, Way::Link)?)?;
    }
    pair.shape(None)
}

/// A workload with somebody who uses it without a pause.
fn of_workload(session: &mut Session, pair: &Pair, store: &Path, workload: &dyn Workload, how: Use) -> Result<()> {
    let mut pod = pair.first.start_pod(workload, "moved", &PodOptions::default())?;
    let seat = Seat::take(&pair.first, &pod, how)?;
    let parameters = format!("link=0;{}", how.parameters());
    let (address, mut at_first) = (pod.served_at()?, true);
    let mut rounds = session.rounds(workload.name());
    while let Some(run) = session.next(&mut rounds)? {
        let of = |arm| Circumstances { workload: workload.name(), parameters: &parameters, arm, run };
        yardstick::measure(session, &pair.first, &of(""))?;
        for strategy in session.shuffled(&STRATEGIES) {
            session.step(&format!("{} {strategy}", workload.name()));
            let onlooker = seat.look(&pair.first, &pod)?;
            moved(session, pair, &of(strategy), (at_first, "moved"), store, onlooker)?;
            at_first = !at_first;
            let here = if at_first { &pair.first } else { &pair.second };
            workload.ready(here, address)?;
            pod = here.pod("moved")?;
        }
    }
    pod.remove()
}

/// Has a pod moved while somebody looks on, and notes what it took, and what he noticed.
fn moved(
    session: &mut Session,
    pair: &Pair,
    of: &Circumstances<'_>,
    (from_first, pod): (bool, &str),
    store: &Path,
    onlooker: Onlooker<'_>,
) -> Result<()> {
    onlooker.look_for(BEFORE)?;
    let begun = onlooker.elapsed();
    let (_, stats) = pair.migrate(from_first, pod, Way::Link, &options(of.arm, store))?;
    let ended = onlooker.elapsed();
    let gaps = onlooker.finish().context("the client, across the move")?;
    session.record_duration(of, "client_gap", gaps.longest)?;
    // Both with the same machine beside them: what the move takes from whoever uses the pod, the downtime included.
    session.record(of, "answers_before", gaps.rate(Duration::ZERO, begun), "1/s")?;
    session.record(of, "answers_meanwhile", gaps.rate(begun, ended), "1/s")?;
    record(session, of, &stats)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_memory_meets_every_rate_and_link_that_can_carry_it() {
        let all = all_cases();
        let distinct: std::collections::BTreeSet<_> = all.iter().collect();
        assert_eq!(distinct.len(), all.len());
        assert!(all.contains(&(256, 200, 100)) && all.contains(&(1024, 20, 1000)) && !all.contains(&(1024, 0, 100)));
        assert_eq!(all.len(), CASES.len() + 3 * 8 - 5);
    }
}
