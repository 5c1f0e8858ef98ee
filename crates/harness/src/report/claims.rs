//! Every claim of `paper-repro/claims.csv`, and what the samples say about it.

use rand::SeedableRng;
use rand::rngs::StdRng;
use serde::Deserialize;

use super::findings::{Finding, SEED, finding};
use super::{costs, slopes};
use crate::samples::{Sample, number, values, values_by};
use crate::stats::{Estimate, bootstrap, median, paired_ratio};
use crate::targets::ALL;

const CLAIMS: &str = include_str!("../../../../paper-repro/claims.csv");
/// What "sub-second" means, in milliseconds.
const SECOND: f64 = 1000.0;
/// What "low overhead" means, in percent.
const FEW: f64 = 5.0;

/// A row of the file.
#[derive(Debug, Deserialize)]
struct Row {
    id: String,
    claim: String,
    paper_value: String,
    shown_by: String,
}

/// What became of a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The samples show it.
    Reproduced,
    /// They show otherwise.
    NotReproduced,
    /// There are none.
    NotMeasured,
    /// There are none of a peer.
    NotCompared,
    /// It is not for samples to show: tests do.
    Tested,
}

impl State {
    /// In words.
    pub fn words(self) -> &'static str {
        match self {
            State::Reproduced => "reproduced",
            State::NotReproduced => "not reproduced",
            State::NotMeasured => "not measured",
            State::NotCompared => "not compared",
            State::Tested => "tested",
        }
    }
}

/// A claim, and what was found.
#[derive(Clone, Debug)]
pub struct Claim {
    /// Its name in `paper-repro/`.
    pub id: String,
    /// As it is worded.
    pub claim: String,
    /// By whom, and the paper's own value where somebody has filled it in.
    pub source: String,
    /// The experiment that shows it; `None` where tests do.
    pub experiment: Option<&'static str>,
    /// What was found, in a sentence.
    pub found: String,
    /// What that means.
    pub state: State,
}

/// What was found, in a sentence, and whether that is what is claimed; `None` without samples.
type Shown = Option<(String, bool)>;
/// What finds that in samples.
type Show = fn(&[Sample]) -> Shown;
/// A number of the parameters, and the values that go with it.
type Of = (f64, Vec<f64>);

/// What shows each claim that samples show.
const SHOWN: [(&str, &str, Show); 13] = [
    ("C1", "checkpoint-restart", |samples| slowest(samples, &["stop", "leave-running"], "")),
    ("C2", "checkpoint-restart", |samples| slowest(samples, &["restart"], "")),
    ("C3", "overhead-micro", micro),
    ("C4", "overhead-apache", |samples| overhead(samples, "overhead-apache", ": requests per second")),
    ("C8", "checkpoint-restart", |samples| slowest(samples, &["stop", "leave-running", "restart"], "desktop")),
    ("C9", "migration", moves),
    ("C10", "overhead-programs", |samples| overhead(samples, "overhead-programs", "")),
    ("C11", "overhead-desktop", |samples| overhead(samples, "overhead-desktop", "")),
    ("P1", "scaling", memory),
    ("P2", "density", copies),
    ("P3", "frequency", frequency),
    ("P4", COMPARED, criu),
    ("P5", "downtime-client", pause),
];
const COMPARED: &str = "checkpoint-restart";

/// Every claim.
pub(super) fn all(samples: &[Sample]) -> Vec<Claim> {
    let rows = csv::Reader::from_reader(CLAIMS.as_bytes()).into_deserialize::<Row>();
    rows.filter_map(Result::ok).map(|row| claim(samples, row)).collect()
}

fn claim(samples: &[Sample], row: Row) -> Claim {
    let by = if row.id.starts_with('C') { "the paper" } else { "this project" };
    let source = if row.paper_value.is_empty() { by.into() } else { format!("{by}: {}", row.paper_value) };
    let shown = SHOWN.iter().find(|(id, ..)| *id == row.id);
    let (experiment, found, state) = match shown {
        None => (None, format!("Shown by {}.", row.shown_by), State::Tested),
        Some((_, experiment, show)) => {
            let (found, state) = match show(samples) {
                Some((found, true)) => (found, State::Reproduced),
                Some((found, false)) => (found, State::NotReproduced),
                None if row.id == "P4" => (format!("No run of the peer: {}.", row.shown_by), State::NotCompared),
                None => (format!("Not measured: {}.", row.shown_by), State::NotMeasured),
            };
            (Some(*experiment), found, state)
        }
    };
    Claim { id: row.id, claim: row.claim, source, experiment, found, state }
}

fn bootstrapped(values: &[f64]) -> Option<Estimate> {
    bootstrap(values, &mut StdRng::seed_from_u64(SEED), median)
}

/// The slowest whole command of these arms, of every workload with such a name.
fn slowest(samples: &[Sample], arms: &[&str], workloads: &str) -> Shown {
    let is_one = |s: &&Sample| {
        s.experiment == "checkpoint-restart"
            && s.metric == "whole"
            && s.workload.starts_with(workloads)
            && arms.contains(&&*s.arm)
    };
    let some: Vec<&Sample> = samples.iter().filter(is_one).collect();
    let slowest = some.iter().max_by(|a, b| a.value.total_cmp(&b.value))?;
    let ms = slowest.value / 1e3;
    let found = format!(
        "The slowest of {} took {ms:.0} ms, whole command, image on a tmpfs ({}, {}).",
        some.len(),
        slowest.workload,
        slowest.arm.replace('-', " ")
    );
    Some((found, ms < SECOND))
}

/// The promises' few percent of single operations; what the default seccomp profile costs is said beside them.
fn micro(samples: &[Sample]) -> Shown {
    let of_it = ALL.iter().filter(|target| target.experiment == "overhead-micro");
    let found: Vec<Finding> = of_it.map(|target| finding(samples, *target)).collect();
    let measured: Vec<_> = found.iter().filter_map(|f| Some((f.target, f.estimate?, f.samples))).collect();
    let words = measured.iter().map(|(target, e, samples)| {
        let interval = match samples {
            0..2 => "one run".into(),
            _ => format!("95 % interval {:+.1} to {:+.1}", e.low, e.high),
        };
        format!("{}: {:+.1} {} ({interval})", target.what, e.value, target.unit())
    });
    let words: Vec<String> = words.collect();
    let is_low = measured.iter().all(|(target, e, _)| target.unit() != "%" || e.value <= FEW);
    (!measured.is_empty()).then(|| (words.join("; ") + ".", is_low))
}

/// How much slower everything in a pod is of which an experiment says so, where its name ends like that.
fn overhead(samples: &[Sample], experiment: &str, ending: &str) -> Shown {
    let costs = costs::all(samples).into_iter().filter(|c| c.experiment == experiment && c.label.ends_with(ending));
    let slower: Vec<(String, Estimate)> = costs
        .filter_map(|cost| {
            let (_, estimate) = *cost.slower.iter().find(|(arm, _)| *arm == "pod")?;
            Some((cost.label.trim_end_matches(ending).to_owned(), estimate))
        })
        .collect();
    let words = slower.iter().map(|(what, e)| format!("{what} {:+.1} % ({:+.1} to {:+.1})", e.value, e.low, e.high));
    let found = format!("Slower in a pod by, with 95 % intervals: {}.", words.collect::<Vec<_>>().join("; "));
    (!slower.is_empty()).then(|| (found, slower.iter().all(|(_, e)| e.value <= FEW)))
}

/// A client of Apache that asks without a pause while its server moves: an error of its would have ended the experiment.
fn moves(samples: &[Sample]) -> Shown {
    let of =
        |strategy: &str, metric: &str| bootstrapped(&values(samples, "migration", "apache-event", strategy, metric));
    let gap = |strategy: &&str| {
        let gap = of(strategy, "client_gap")?;
        let kept = of(strategy, "answers_meanwhile").zip(of(strategy, "answers_before"));
        let kept = kept.map_or(String::new(), |(meanwhile, before)| {
            format!(", {:.0} % of the answers meanwhile", meanwhile.value / before.value * 100.0)
        });
        let [value, low, high] = [gap.value, gap.low, gap.high].map(|us| us / 1e3);
        Some(format!("{strategy} {value:.0} ms ({low:.0} to {high:.0}){kept}"))
    };
    let gaps: Vec<String> =
        ["stop-and-copy", "pre-copy", "copy-on-reference", "flush"].iter().filter_map(gap).collect();
    let found = format!("Apache's client went on over its connection; its longest pause: {}.", gaps.join("; "));
    (!gaps.is_empty()).then_some((found, true))
}

/// Each client: one that lost a connection, or got a wrong byte, would have ended the experiment.
fn pause(samples: &[Sample]) -> Shown {
    let described = |(workload, client, what): &(&str, &str, &str)| {
        let is_it = |s: &&Sample| s.parameters.contains(client);
        let some: Vec<Sample> = samples.iter().filter(is_it).cloned().collect();
        let of = |metric| bootstrapped(&values(&some, "downtime-client", workload, "leave-running", metric));
        let (gap, down) = (of("client_gap")?, of("pod_downtime")?);
        let [value, low, high, down] = [gap.value, gap.low, gap.high, down.value].map(|us| us / 1e3);
        Some(format!("{what} {value:.0} ms ({low:.0} to {high:.0}), the pod's downtime {down:.0} ms"))
    };
    let clients = [
        ("apache-event", "client=requests", "without an answer"),
        ("apache-event", "client=bytes", "without a byte of a stream"),
        ("desktop-classic", "client=frames", "without a frame"),
    ];
    let found: Vec<String> = clients.iter().filter_map(described).collect();
    let all = format!("The longest {}; every byte right, no connection lost.", found.join("; "));
    (!found.is_empty()).then_some((all, true))
}

/// At most 5 ms a GiB: less than the tenth part of what copying it takes.
fn memory(samples: &[Sample]) -> Shown {
    let (most, each) = slopes::fitted(samples, "memory", "leave-running", "downtime")?;
    let [value, low, high] = [each.value, each.low, each.high].map(|us| us * 1024.0 / 1e3);
    let found = format!("{value:.1} ms more for each GiB (95 % interval {low:.1} to {high:.1}), up to {most:.0} MiB.");
    Some((found, value <= 5.0))
}

fn copies(samples: &[Sample]) -> Shown {
    let describe = |workload: &str| {
        let by_number = |metric| values_by(samples, ["density", workload, "copies", metric], "n");
        let times = by_number("whole");
        let ((_, first), (most, last)) = (times.first()?, times.last()?);
        let (first, last) = (median(first)? / 1e3, median(last)? / 1e3);
        let memory = median(&by_number("memory").last()?.1)? / most / f64::from(1 << 20);
        Some(format!(
            "{most:.0} copies of {workload}, the first in {first:.0} ms, the last in {last:.0} ms, each {memory:.1} MiB"
        ))
    };
    let found: Vec<String> = ["sleep", "apache-event"].iter().filter_map(|workload| describe(workload)).collect();
    (!found.is_empty()).then(|| (found.join("; ") + ".", true))
}

fn frequency(samples: &[Sample]) -> Shown {
    let by_rate = |metric| values_by(samples, ["frequency", "apache-event", "leave-running", metric], "rate");
    let (answered, latest) = (by_rate("requests_per_second"), by_rate("latency_p99"));
    let without = median(&answered.first().filter(|(rate, _)| *rate == 0.0)?.1)?;
    let kept = |((rate, answered), (_, latest)): (&Of, &Of)| {
        let (kept, latest) = (median(answered)? / without * 100.0, median(latest)? / 1e3);
        (*rate > 0.0).then(|| format!("{kept:.0} % at {rate} a second (99th percentile {latest:.0} ms)"))
    };
    let found: Vec<String> = answered.iter().zip(&latest).filter_map(kept).collect();
    let growth = storage(samples).into_iter().map(|(_, growth)| growth).fold(0.0, f64::max) / f64::from(1 << 20);
    let all =
        format!("Of the requests without checkpoints: {}; at most {growth:.0} MiB/s of images.", found.join(", "));
    (!found.is_empty()).then_some((all, true))
}

/// Bytes a second that images of a server took which was checkpointed so many times a second.
pub(super) fn storage(samples: &[Sample]) -> Vec<(f64, f64)> {
    let is_one = |s: &&Sample| s.experiment == "frequency" && s.metric == "image_bytes";
    let each =
        samples.iter().filter(is_one).filter_map(|s| Some((number(s, "rate")?, s.value / number(s, "seconds")?)));
    let mut each: Vec<(f64, f64)> = each.collect();
    each.sort_by(|a, b| a.0.total_cmp(&b.0));
    let same = each.chunk_by(|a, b| a.0 == b.0);
    same.filter_map(|some| Some((some[0].0, median(&some.iter().map(|(_, each)| *each).collect::<Vec<_>>())?)))
        .collect()
}

/// Run beside run, every workload that both had.
fn criu(samples: &[Sample]) -> Shown {
    let mut workloads: Vec<&str> = Vec::new();
    for sample in samples.iter().filter(|s| s.experiment == COMPARED && s.arm.starts_with("criu")) {
        if !workloads.contains(&&*sample.workload) {
            workloads.push(&sample.workload);
        }
    }
    let compared = |workload: &&str| {
        let of = |arm| values(samples, COMPARED, workload, arm, "downtime");
        let (ours, theirs) = (of("leave-running"), of("criu-leave-running"));
        let pairs: Vec<(f64, f64)> = theirs.iter().copied().zip(ours.iter().copied()).collect();
        let ratio = paired_ratio(&pairs, &mut StdRng::seed_from_u64(SEED))?;
        let (ours, theirs) = (median(&ours)? / 1e3, median(&theirs)? / 1e3);
        let words = format!(
            "{workload} {ours:.1} ms, criu {theirs:.1} ms (ratio {:.2}, 95 % {:.2} to {:.2})",
            ratio.value, ratio.low, ratio.high
        );
        Some((words, ratio.high < 1.0))
    };
    let found: Vec<(String, bool)> = workloads.iter().filter_map(compared).collect();
    let words: Vec<&str> = found.iter().map(|(words, _)| words.as_str()).collect();
    (!found.is_empty()).then(|| (words.join("; ") + ".", found.iter().all(|(_, shorter)| *shorter)))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::experiment;
    use crate::report::findings::tests::sample;

    fn state(samples: &[Sample], id: &str) -> State {
        all(samples).iter().find(|claim| claim.id == id).unwrap().state
    }

    #[test]
    fn one_slow_run_is_enough_to_lose_the_claim() {
        let mut samples = vec![sample("stop", "whole", 0, 9e3), sample("restart", "whole", 0, 9e3)];
        assert_eq!([state(&samples, "C1"), state(&samples, "C2")], [State::Reproduced; 2]);
        samples.push(sample("restart", "whole", 1, 1.2e6));
        assert_eq!([state(&samples, "C1"), state(&samples, "C2")], [State::Reproduced, State::NotReproduced]);
        assert_eq!(state(&samples, "C8"), State::NotMeasured);
    }

    #[test]
    fn what_no_peer_ran_beside_is_not_compared() {
        let mut samples: Vec<Sample> = (0..5).map(|run| sample("leave-running", "downtime", run, 10.0)).collect();
        assert_eq!(state(&samples, "P4"), State::NotCompared);
        samples.extend((0..5).map(|run| sample("criu-leave-running", "downtime", run, 30.0)));
        assert_eq!(state(&samples, "P4"), State::Reproduced);
    }

    /// The file, this table, the list of experiments and the page for readers speak of the same things.
    #[test]
    fn every_experiment_has_a_claim_and_every_claim_something_that_shows_it() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let page = std::fs::read_to_string(root.join("paper-repro/README.md")).unwrap();
        let mut reader = csv::Reader::from_reader(CLAIMS.as_bytes());
        let rows: Vec<Row> = reader.deserialize().collect::<Result<_, _>>().unwrap();
        for experiment in experiment::ALL {
            let command = format!("harness run {}", experiment.name);
            assert!(rows.iter().any(|row| row.shown_by.contains(&command)), "no claim for {}", experiment.name);
        }
        for row in &rows {
            assert!(page.contains(&format!("| {} |", row.id)), "{} is not in paper-repro/README.md", row.id);
            match SHOWN.iter().find(|(id, ..)| *id == row.id) {
                Some((_, experiment, _)) => {
                    assert!(row.shown_by.contains(&format!("harness run {experiment}")), "{row:?}");
                }
                None => {
                    let test = row.shown_by.split(' ').next().unwrap();
                    assert!(test.ends_with(".rs") && root.join(test).is_file(), "{row:?}");
                }
            }
        }
        assert!(SHOWN.iter().all(|(id, ..)| rows.iter().any(|row| row.id == *id)));
        assert_eq!(all(&[]).len(), rows.len());
    }
}
