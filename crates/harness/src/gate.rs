//! Is a build slower than another one?
//!
//! A change counts when a permutation test says that it is no chance, and when it is past a noise floor. Before an alarm
//! more samples are taken: see [`crate::cli`].

use std::collections::BTreeSet;

use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::samples::Sample;
use crate::stats::{hodges_lehmann, median, permutation_test};

/// Changes smaller than this are not told from the machine's own ups and downs.
pub const NOISE_FLOOR: f64 = 0.05;
/// A change counts when it is less probable than this by chance.
pub const SIGNIFICANT: f64 = 0.01;
const ROUNDS: usize = 4999;

/// Something that has become worse.
#[derive(Clone, Debug, PartialEq)]
pub struct Regression {
    /// The experiment that measured it.
    pub experiment: String,
    /// What, in words.
    pub what: String,
    /// By how much, as a part of the baseline: 0.1 is ten percent worse.
    pub worse_by: f64,
    /// How probable that is by chance.
    pub p: f64,
}

/// Everything in `now` that is worse than in `baseline`.
pub fn regressions(baseline: &[Sample], now: &[Sample]) -> Vec<Regression> {
    let references = ["native", "memcpy", "write", "bytes-alone"];
    let keys: BTreeSet<_> = baseline.iter().filter(|s| !references.contains(&&*s.arm)).map(key).collect();
    let compare = |key: &Key<'_>| {
        let [experiment, workload, parameters, arm, metric] = *key;
        let sign = direction(metric)?;
        let values = |samples| values(samples, key);
        let (before, after) = (values(baseline), values(now));
        let worse_by = sign * hodges_lehmann(&before, &after)? / median(&before).filter(|m| *m > 0.0)?;
        let p = permutation_test(&before, &after, ROUNDS, &mut StdRng::seed_from_u64(1))?;
        let sized = if parameters.is_empty() { String::new() } else { format!(" ({parameters})") };
        let what = format!("{workload}{sized}, {arm}: {metric}");
        let counts = worse_by > NOISE_FLOOR && p < SIGNIFICANT;
        counts.then(|| Regression { experiment: experiment.into(), what, worse_by, p })
    };
    keys.iter().filter_map(compare).collect()
}

/// Experiment, workload, parameters, arm, metric: what values must share to be compared.
type Key<'a> = [&'a str; 5];

fn key(sample: &Sample) -> Key<'_> {
    [&sample.experiment, &sample.workload, &sample.parameters, &sample.arm, &sample.metric]
}

fn values(samples: &[Sample], wanted: &Key<'_>) -> Vec<f64> {
    samples.iter().filter(|sample| key(sample) == *wanted).map(|sample| sample.value).collect()
}

/// 1 if more of a metric is worse, −1 if less is; `None` for what is no measure of speed or size.
fn direction(metric: &str) -> Option<f64> {
    match metric {
        "requests_per_second" => Some(-1.0),
        "downtime" | "whole" | "first_answer" | "image_bytes" | "latency_p50" | "latency_p99" | "client_gap"
        | "getpid" | "read" | "fork_exit" | "fork_exec" | "removal" => Some(1.0),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(metric: &str, center: f64) -> Vec<Sample> {
        let sample = |run: u32| Sample {
            experiment: "e".into(),
            workload: "w".into(),
            parameters: String::new(),
            arm: "pod".into(),
            run,
            metric: metric.into(),
            value: center + f64::from(run % 5),
            unit: "us".into(),
            seed: 0,
        };
        (0..20).map(sample).collect()
    }

    #[test]
    fn slower_is_named_equal_and_faster_are_not() {
        let baseline = samples("whole", 100.0);
        let found = regressions(&baseline, &samples("whole", 120.0));
        assert_eq!(found.len(), 1);
        assert!((found[0].worse_by - 0.2).abs() < 0.02 && found[0].p < 0.01, "{found:?}");
        assert_eq!(found[0].what, "w, pod: whole");
        assert_eq!(regressions(&baseline, &baseline), []);
        assert_eq!(regressions(&baseline, &samples("whole", 80.0)), []);
        assert_eq!(regressions(&baseline, &samples("whole", 102.0)), []);
    }

    #[test]
    fn fewer_requests_are_worse() {
        let baseline = samples("requests_per_second", 1000.0);
        assert_eq!(regressions(&baseline, &samples("requests_per_second", 800.0)).len(), 1);
        assert_eq!(regressions(&baseline, &samples("requests_per_second", 1200.0)), []);
        assert_eq!(regressions(&samples("pages", 10.0), &samples("pages", 50.0)), []);
    }
}
