//! What the samples say about each target and each claim.

use rand::SeedableRng;
use rand::rngs::StdRng;

use super::claims::{self, Claim};
use crate::samples::{Sample, values};
use crate::stats::{Estimate, bootstrap, median, paired_ratio};
use crate::targets::{ALL, Measure, Target};

/// Seed of the bootstrap, so that one set of samples always gives one report.
pub(super) const SEED: u64 = 2002;

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
    /// One run says nothing of how far others lie from it: nothing is sure then.
    fn of(estimate: Option<Estimate>, samples: usize, limit: f64) -> Self {
        match estimate {
            None => Verdict::NotMeasured,
            Some(e) if samples < 2 && e.value <= limit => Verdict::Likely,
            Some(_) if samples < 2 => Verdict::Doubtful,
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

/// Everything that the samples say.
#[derive(Clone, Debug)]
pub struct Findings {
    /// The claims, the paper's first.
    pub claims: Vec<Claim>,
    /// The numbers to reach.
    pub targets: Vec<Finding>,
}

impl Findings {
    /// What `samples` say.
    pub fn of(samples: &[Sample]) -> Self {
        let targets = ALL.iter().map(|target| finding(samples, *target)).collect();
        Self { claims: claims::all(samples), targets }
    }
}

pub(super) fn finding(samples: &[Sample], target: Target) -> Finding {
    let is_among = |s: &&Sample| s.experiment == target.experiment && s.parameters.contains(target.parameters);
    let among: Vec<Sample> = samples.iter().filter(is_among).cloned().collect();
    let estimate = estimate(&among, &target);
    let count = values(&among, target.experiment, target.workload, target.arm, target.metric).len();
    Finding { target, estimate, samples: count, verdict: Verdict::of(estimate, count, target.limit) }
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

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::report::claims::State;

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
            host: String::new(),
        }
    }

    fn named<'a>(findings: &'a Findings, what: &str) -> &'a Finding {
        findings.targets.iter().find(|f| f.target.what.starts_with(what)).unwrap()
    }

    #[test]
    fn verdicts_follow_the_interval() {
        let verdict = |low, value, high| Verdict::of(Some(Estimate { value, low, high }), 5, 10.0);
        assert_eq!(verdict(7.0, 8.0, 9.0), Verdict::Within);
        assert_eq!(verdict(7.0, 8.0, 11.0), Verdict::Likely);
        assert_eq!(verdict(7.0, 11.0, 12.0), Verdict::Doubtful);
        assert_eq!(verdict(11.0, 12.0, 13.0), Verdict::Missed);
        assert_eq!(Verdict::of(None, 0, 10.0), Verdict::NotMeasured);
        let of_one_run = |value| Verdict::of(Some(Estimate { value, low: value, high: value }), 1, 10.0);
        assert_eq!((of_one_run(8.0), of_one_run(12.0)), (Verdict::Likely, Verdict::Doubtful));
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
        let claimed = |id: &str| findings.claims.iter().find(|claim| claim.id == id).unwrap().state;
        assert_eq!((claimed("C1"), claimed("C3")), (State::NotMeasured, State::Reproduced));
    }
}
