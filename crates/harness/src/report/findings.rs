//! What the samples say about each target and each claim.

use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::samples::{Sample, values};
use crate::stats::{Estimate, bootstrap, median, paired_ratio};
use crate::targets::{ALL, Measure, Target};

/// Seed of the bootstrap, so that one set of samples always gives one report.
const SEED: u64 = 2002;
/// What "sub-second" means, in milliseconds.
const SECOND: f64 = 1000.0;

/// Whether a number is where it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The whole interval is within the limit.
    Within,
    /// The number is within the limit, part of its interval is not.
    Likely,
    /// The number is past the limit, part of its interval is not.
    Doubtful,
    /// The whole interval is past the limit.
    Missed,
    /// There are no samples.
    NotMeasured,
}

impl Verdict {
    fn of(estimate: Option<Estimate>, limit: f64) -> Self {
        match estimate {
            None => Verdict::NotMeasured,
            Some(e) if e.high <= limit => Verdict::Within,
            Some(e) if e.value <= limit => Verdict::Likely,
            Some(e) if e.low <= limit => Verdict::Doubtful,
            Some(_) => Verdict::Missed,
        }
    }

    /// In words.
    pub fn words(self) -> &'static str {
        match self {
            Verdict::Within => "reached",
            Verdict::Likely => "reached, not surely",
            Verdict::Doubtful => "missed, not surely",
            Verdict::Missed => "missed",
            Verdict::NotMeasured => "not measured",
        }
    }
}

/// One target and what was measured.
#[derive(Clone, Debug)]
pub struct Finding {
    /// The target.
    pub target: Target,
    /// What was measured, in the target's unit.
    pub estimate: Option<Estimate>,
    /// How many samples, of the arm itself.
    pub samples: usize,
    /// Where that stands.
    pub verdict: Verdict,
}

/// A claim of the paper, and what the samples say about it.
#[derive(Clone, Debug)]
pub struct Claim {
    /// As the paper words it.
    pub claim: &'static str,
    /// What was found, in a sentence.
    pub found: String,
    /// Whether it was reproduced; `None` if it was not measured.
    pub reproduced: Option<bool>,
}

/// Everything that the samples say.
#[derive(Clone, Debug)]
pub struct Findings {
    /// The paper's claims.
    pub claims: Vec<Claim>,
    /// The numbers to reach.
    pub targets: Vec<Finding>,
}

impl Findings {
    /// What `samples` say.
    pub fn of(samples: &[Sample]) -> Self {
        let targets = ALL.iter().map(|target| finding(samples, *target)).collect();
        Self { claims: vec![sub_second(samples), low_overhead(samples)], targets }
    }
}

fn finding(samples: &[Sample], target: Target) -> Finding {
    let estimate = estimate(samples, &target);
    let count = values(samples, target.experiment, target.workload, target.arm, target.metric).len();
    Finding { target, estimate, samples: count, verdict: Verdict::of(estimate, target.limit) }
}

/// The number of a target, with its interval.
fn estimate(samples: &[Sample], target: &Target) -> Option<Estimate> {
    let mut rng = StdRng::seed_from_u64(SEED);
    let of = |arm| values(samples, target.experiment, target.workload, arm, target.metric);
    let ours = of(target.arm);
    let pairs = |base| of(base).into_iter().zip(ours.iter().copied()).collect::<Vec<(f64, f64)>>();
    let scaled = |e: Estimate, f: &dyn Fn(f64) -> f64| Estimate { value: f(e.value), low: f(e.low), high: f(e.high) };
    match target.measure {
        Measure::MedianMs => Some(scaled(bootstrap(&ours, &mut rng, median)?, &|us| us / 1e3)),
        Measure::MorePercent { base } => {
            Some(scaled(paired_ratio(&pairs(base), &mut rng)?, &|ratio| (ratio - 1.0) * 100.0))
        }
        Measure::LessPercent { base } => {
            let less = scaled(paired_ratio(&pairs(base), &mut rng)?, &|ratio| (1.0 - ratio) * 100.0);
            Some(Estimate { value: less.value, low: less.high, high: less.low })
        }
        Measure::More { base } => {
            let differences: Vec<f64> = pairs(base).into_iter().map(|(a, b)| b - a).collect();
            bootstrap(&differences, &mut rng, median)
        }
    }
}

/// "Sub-second checkpoint and restart latencies": the slowest of all, of every workload.
fn sub_second(samples: &[Sample]) -> Claim {
    let of = |arms: &[&str], metric: &str| {
        let wanted =
            |s: &&Sample| s.experiment == "checkpoint-restart" && arms.contains(&s.arm.as_str()) && s.metric == metric;
        samples.iter().filter(wanted).max_by(|a, b| a.value.total_cmp(&b.value))
    };
    let slowest = (of(&["stop", "leave-running"], "whole"), of(&["restart"], "whole"));
    let claim = "sub-second checkpoint and restart latencies";
    let (Some(checkpoint), Some(restart)) = slowest else {
        return Claim { claim, found: "Not measured.".into(), reproduced: None };
    };
    let (checkpoint_ms, restart_ms) = (checkpoint.value / 1e3, restart.value / 1e3);
    let found = format!(
        "The slowest checkpoint of any run, whole command, took {checkpoint_ms:.0} ms ({}), the slowest restart \
         {restart_ms:.0} ms ({}).",
        checkpoint.workload, restart.workload
    );
    Claim { claim, found, reproduced: Some(checkpoint_ms < SECOND && restart_ms < SECOND) }
}

/// "Low overhead": the promises' few percent, of the server and of each operation.
fn low_overhead(samples: &[Sample]) -> Claim {
    let claim = "low overhead";
    let found: Vec<Finding> = ALL.iter().filter(|t| t.unit() == "%").map(|target| finding(samples, *target)).collect();
    let numbers: Vec<(Target, Estimate)> = found.iter().filter_map(|f| Some((f.target, f.estimate?))).collect();
    if numbers.is_empty() {
        return Claim { claim, found: "Not measured.".into(), reproduced: None };
    }
    let words: Vec<String> = numbers
        .iter()
        .map(|(target, e)| {
            format!("{}: {:+.1} % (95 % interval {:+.1} to {:+.1})", target.what, e.value, e.low, e.high)
        })
        .collect();
    // What the promise calls "at most a few percent".
    let reproduced = numbers.iter().all(|(_, e)| e.value <= 5.0);
    Claim { claim, found: words.join("; ") + ".", reproduced: Some(reproduced) }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn sample(arm: &str, metric: &str, run: u32, value: f64) -> Sample {
        let experiment = if metric == "getpid" { "overhead-micro" } else { "checkpoint-restart" };
        let workload = if metric == "getpid" { "micro" } else { "sleep" };
        Sample {
            experiment: experiment.into(),
            workload: workload.into(),
            parameters: String::new(),
            arm: arm.into(),
            run,
            metric: metric.into(),
            value,
            unit: "us".into(),
            seed: 1,
        }
    }

    fn named<'a>(findings: &'a Findings, what: &str) -> &'a Finding {
        findings.targets.iter().find(|f| f.target.what.starts_with(what)).unwrap()
    }

    #[test]
    fn verdicts_follow_the_interval() {
        let verdict = |low, value, high| Verdict::of(Some(Estimate { value, low, high }), 10.0);
        assert_eq!(verdict(7.0, 8.0, 9.0), Verdict::Within);
        assert_eq!(verdict(7.0, 8.0, 11.0), Verdict::Likely);
        assert_eq!(verdict(7.0, 11.0, 12.0), Verdict::Doubtful);
        assert_eq!(verdict(11.0, 12.0, 13.0), Verdict::Missed);
        assert_eq!(Verdict::of(None, 10.0), Verdict::NotMeasured);
    }

    #[test]
    fn samples_become_numbers_in_the_unit_of_the_target() {
        let mut samples = Vec::new();
        for run in 0..10 {
            samples.push(sample("leave-running", "downtime", run, 2000.0));
            samples.push(sample("native", "getpid", run, 50.0));
            samples.push(sample("pod-unconfined", "getpid", run, 51.0));
            samples.push(sample("pod", "getpid", run, 71.0));
        }
        let findings = Findings::of(&samples);
        assert_eq!(named(&findings, "sleep: downtime").estimate.unwrap().value, 2.0);
        assert!((named(&findings, "getpid").estimate.unwrap().value - 2.0).abs() < 1e-9);
        assert_eq!(named(&findings, "getpid").verdict, Verdict::Missed);
        assert_eq!(named(&findings, "the default seccomp").estimate.unwrap().value, 20.0);
        assert_eq!(named(&findings, "Apache (event): downtime").verdict, Verdict::NotMeasured);
        assert_eq!(findings.claims[0].reproduced, None);
        assert_eq!(findings.claims[1].reproduced, Some(true));
    }

    #[test]
    fn one_slow_run_is_enough_to_lose_the_claim() {
        let mut samples = vec![sample("stop", "whole", 0, 9e3), sample("restart", "whole", 0, 9e3)];
        assert_eq!(Findings::of(&samples).claims[0].reproduced, Some(true));
        samples.push(sample("restart", "whole", 1, 1.2e6));
        assert_eq!(Findings::of(&samples).claims[0].reproduced, Some(false));
    }
}
