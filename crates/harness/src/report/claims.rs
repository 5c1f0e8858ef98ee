//! What the samples say about each claim.

use super::findings::{Finding, SEED, finding};
use super::slopes;
use crate::samples::{Sample, values};
use crate::stats::{Estimate, bootstrap, median};
use crate::targets::{ALL, Target};
use rand::SeedableRng;
use rand::rngs::StdRng;

/// What "sub-second" means, in milliseconds.
const SECOND: f64 = 1000.0;
const PAPER: &str = "the paper";
const PROMISE: &str = "this project";

/// A claim, and what the samples say about it.
#[derive(Clone, Debug)]
pub struct Claim {
    /// As it is worded.
    pub claim: &'static str,
    /// By whom.
    pub source: &'static str,
    /// The experiment that shows it.
    pub experiment: &'static str,
    /// What was found, in a sentence.
    pub found: String,
    /// Whether it was reproduced; `None` if it was not measured.
    pub reproduced: Option<bool>,
}

/// Every claim.
pub(super) fn all(samples: &[Sample]) -> Vec<Claim> {
    let claim = |claim, source, experiment, shown: Option<(String, bool)>| {
        let (found, reproduced) = match shown {
            Some((found, reproduced)) => (found, Some(reproduced)),
            None => ("Not measured.".into(), None),
        };
        Claim { claim, source, experiment, found, reproduced }
    };
    vec![
        claim("sub-second checkpoint and restart latencies", PAPER, "checkpoint-restart", sub_second(samples)),
        claim("low overhead", PAPER, "overhead-micro", low_overhead(samples)),
        claim("a pod moves with its connections", PAPER, "migration", moves(samples)),
        claim("a peer notices a pause, nothing else", PROMISE, "downtime-client", pause(samples)),
        claim("downtime does not grow with the pod's memory", PROMISE, "scaling", memory(samples)),
        claim("an image restarts as often as one likes", PROMISE, "density", copies(samples)),
        claim("a server can be checkpointed again and again while it serves", PROMISE, "frequency", frequency(samples)),
    ]
}

fn bootstrapped(values: &[f64]) -> Option<Estimate> {
    bootstrap(values, &mut StdRng::seed_from_u64(SEED), median)
}

/// The slowest of all, of every workload.
fn sub_second(samples: &[Sample]) -> Option<(String, bool)> {
    let of = |arms: &[&str], metric: &str| {
        let wanted =
            |s: &&Sample| s.experiment == "checkpoint-restart" && arms.contains(&s.arm.as_str()) && s.metric == metric;
        samples.iter().filter(wanted).max_by(|a, b| a.value.total_cmp(&b.value))
    };
    let (checkpoint, restart) = (of(&["stop", "leave-running"], "whole")?, of(&["restart"], "whole")?);
    let (checkpoint_ms, restart_ms) = (checkpoint.value / 1e3, restart.value / 1e3);
    let found = format!(
        "The slowest checkpoint of any run, whole command, took {checkpoint_ms:.0} ms ({}), the slowest restart \
         {restart_ms:.0} ms ({}).",
        checkpoint.workload, restart.workload
    );
    Some((found, checkpoint_ms < SECOND && restart_ms < SECOND))
}

/// The promises' few percent, of servers and of each operation.
fn low_overhead(samples: &[Sample]) -> Option<(String, bool)> {
    let found: Vec<Finding> = ALL.iter().filter(|t| t.unit() == "%").map(|target| finding(samples, *target)).collect();
    let numbers: Vec<(Target, Estimate)> = found.iter().filter_map(|f| Some((f.target, f.estimate?))).collect();
    let words: Vec<String> = numbers
        .iter()
        .map(|(target, e)| {
            format!("{}: {:+.1} % (95 % interval {:+.1} to {:+.1})", target.what, e.value, e.low, e.high)
        })
        .collect();
    // What the promise calls "at most a few percent".
    let reproduced = numbers.iter().all(|(_, e)| e.value <= 5.0);
    (!numbers.is_empty()).then(|| (words.join("; ") + ".", reproduced))
}

/// A client of Apache that asks without a pause while its server moves: an error of its would have ended the experiment.
fn moves(samples: &[Sample]) -> Option<(String, bool)> {
    let strategies = ["stop-and-copy", "pre-copy", "copy-on-reference", "flush"];
    let gap = |strategy: &&str| {
        let gap = bootstrapped(&values(samples, "migration", "apache-event", strategy, "client_gap"))?;
        Some(format!("{strategy} {:.0} ms ({:.0} to {:.0})", gap.value / 1e3, gap.low / 1e3, gap.high / 1e3))
    };
    let gaps: Vec<String> = strategies.iter().filter_map(gap).collect();
    let found = format!("Apache's client went on over its connection; its longest pause: {}.", gaps.join(", "));
    (!gaps.is_empty()).then_some((found, true))
}

fn pause(samples: &[Sample]) -> Option<(String, bool)> {
    let of = |metric| values(samples, "downtime-client", "apache-event", "leave-running", metric);
    let (gap, down) = (bootstrapped(&of("client_gap"))?, bootstrapped(&of("pod_downtime"))?);
    let found = format!(
        "Its longest pause was {:.0} ms ({:.0} to {:.0}), the pod's downtime {:.0} ms; every byte right, no connection lost.",
        gap.value / 1e3,
        gap.low / 1e3,
        gap.high / 1e3,
        down.value / 1e3
    );
    Some((found, true))
}

/// At most 5 ms a GiB: less than the tenth part of what copying it takes.
fn memory(samples: &[Sample]) -> Option<(String, bool)> {
    let (most, each) = slopes::fitted(samples, "memory", "leave-running", "downtime")?;
    let [value, low, high] = [each.value, each.low, each.high].map(|us| us * 1024.0 / 1e3);
    let found = format!("{value:.1} ms more for each GiB (95 % interval {low:.1} to {high:.1}), up to {most:.0} MiB.");
    Some((found, value <= 5.0))
}

fn copies(samples: &[Sample]) -> Option<(String, bool)> {
    let describe = |workload: &str| {
        let by_number = crate::samples::values_by(samples, ["density", workload, "copies", "whole"], "n");
        let ((_, first), (most, last)) = (by_number.first()?.clone(), by_number.last()?.clone());
        let (first, last) = (median(&first)? / 1e3, median(&last)? / 1e3);
        Some(format!("{most:.0} copies of {workload}, the first in {first:.0} ms, the last in {last:.0} ms"))
    };
    let found: Vec<String> = ["sleep", "apache-event"].iter().filter_map(|workload| describe(workload)).collect();
    (!found.is_empty()).then(|| (found.join("; ") + ".", true))
}

fn frequency(samples: &[Sample]) -> Option<(String, bool)> {
    let wanted = ["frequency", "apache-event", "leave-running", "requests_per_second"];
    let by_rate = crate::samples::values_by(samples, wanted, "rate");
    let without = median(&by_rate.first().filter(|(rate, _)| *rate == 0.0)?.1)?;
    let kept = |(rate, values): &(f64, Vec<f64>)| {
        let kept = median(values)? / without * 100.0;
        (*rate > 0.0).then(|| format!("{kept:.0} % at {rate} a second"))
    };
    let found: Vec<String> = by_rate.iter().filter_map(kept).collect();
    (!found.is_empty()).then(|| (format!("Of the requests without checkpoints: {}.", found.join(", ")), true))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::findings::tests::sample;

    #[test]
    fn one_slow_run_is_enough_to_lose_the_claim() {
        let mut samples = vec![sample("stop", "whole", 0, 9e3), sample("restart", "whole", 0, 9e3)];
        assert_eq!(all(&samples)[0].reproduced, Some(true));
        samples.push(sample("restart", "whole", 1, 1.2e6));
        assert_eq!(all(&samples)[0].reproduced, Some(false));
        assert!(all(&samples)[1..].iter().all(|claim| claim.reproduced.is_none()));
    }
}
