//! What other places than the bare host cost: every figure of the overhead experiments, pair by pair.

use rand::SeedableRng;
use rand::rngs::StdRng;

use super::document::Cell;
use super::findings::SEED;
use crate::samples::Sample;
use crate::stats::{Estimate, median, paired_ratio};

/// The head of the table.
pub(super) const HEAD: [&str; 6] =
    ["what", "natively", "in a pod", "slower in a pod by", "bare namespaces", "bubblewrap"];

/// What is compared with `native`.
const ARMS: [&str; 3] = ["pod", "namespaces", "bubblewrap"];

/// One figure: which experiment, of what, and the share by which each arm is slower than native.
pub(super) struct Cost {
    pub(super) experiment: String,
    pub(super) label: String,
    natively: f64,
    in_pod: f64,
    unit: String,
    pub(super) slower: Vec<(&'static str, Estimate)>,
}

/// Whether an experiment is one of these.
pub(super) fn speaks_of(experiment: &str) -> bool {
    experiment.starts_with("overhead")
}

/// Every figure that there are pairs of.
pub(super) fn all(samples: &[Sample]) -> Vec<Cost> {
    let mut keys: Vec<[&str; 4]> = Vec::new();
    for sample in samples.iter().filter(|s| speaks_of(&s.experiment) && s.arm == "native") {
        let key: [&str; 4] = [&sample.experiment, &sample.workload, &sample.parameters, &sample.metric];
        let is_no_speed = ["connections_closed", "latency", "latency_max", "latency_p90"].contains(&key[3]);
        if !is_no_speed && !key[3].starts_with("x11perf:") && !keys.contains(&key) {
            keys.push(key);
        }
    }
    keys.into_iter().filter_map(|key| cost(samples, key)).collect()
}

fn cost(samples: &[Sample], [experiment, workload, parameters, metric]: [&str; 4]) -> Option<Cost> {
    let is_it = |s: &&Sample| {
        [&*s.experiment, &*s.workload, &*s.parameters, &*s.metric] == [experiment, workload, parameters, metric]
    };
    let of = |arm: &str| samples.iter().filter(is_it).filter(|s| s.arm == arm).map(|s| s.value).collect::<Vec<f64>>();
    let unit = samples.iter().find(is_it)?.unit.clone();
    let native = of("native");
    let slower = |arm: &'static str| {
        // What is better when it is more, is slower when it is less.
        let more_is_better = unit.ends_with("/s");
        let ratio = |(native, there): (&f64, &f64)| if more_is_better { (*there, *native) } else { (*native, *there) };
        let pairs: Vec<(f64, f64)> = native.iter().zip(&of(arm)).map(ratio).collect();
        let e = paired_ratio(&pairs, &mut StdRng::seed_from_u64(SEED))?;
        let percent = |ratio: f64| (ratio - 1.0) * 100.0;
        Some((arm, Estimate { value: percent(e.value), low: percent(e.low), high: percent(e.high) }))
    };
    let what = match (experiment, parameters.split(';').find_map(|pair| pair.strip_prefix("file="))) {
        ("overhead-micro", _) => metric.replace('_', " "),
        (_, Some(file)) => format!("{workload}, {file}: {}", metric.replace('_', " ")),
        _ => format!("{workload}: {}", metric.replace('_', " ")),
    };
    Some(Cost {
        experiment: experiment.into(),
        label: what,
        natively: median(&native)?,
        in_pod: median(&of("pod"))?,
        slower: ARMS.iter().filter_map(|arm| slower(arm)).collect(),
        unit,
    })
}

/// The rows of the table.
pub(super) fn rows(samples: &[Sample]) -> Vec<Vec<Cell>> {
    all(samples).into_iter().map(row).collect()
}

fn row(cost: Cost) -> Vec<Cell> {
    let percent = |arm: &str| match cost.slower.iter().find(|(name, _)| *name == arm) {
        Some((_, e)) => {
            Cell::number(format!("{:+.1} % ({:+.1} to {:+.1})", e.value, e.low, e.high)).of(&cost.experiment)
        }
        None => Cell::number("–"),
    };
    let figure = |value| Cell::number(readable(value, &cost.unit)).of(&cost.experiment);
    vec![
        Cell::words(&*cost.label),
        figure(cost.natively),
        figure(cost.in_pod),
        percent("pod"),
        percent("namespaces"),
        percent("bubblewrap"),
    ]
}

/// A value with its unit, as people say it.
pub(super) fn readable(value: f64, unit: &str) -> String {
    match unit {
        "bytes/s" => format!("{:.0} MB/s", value / 1e6),
        "us" if value >= 1e6 => format!("{:.2} s", value / 1e6),
        "us" if value >= 1e3 => format!("{:.1} ms", value / 1e3),
        "us" => format!("{value:.0} µs"),
        "ns" if value >= 1e4 => format!("{:.1} µs", value / 1e3),
        "ns" => format!("{value:.0} ns"),
        "1/s" => format!("{value:.0} /s"),
        other => format!("{value:.1} {other}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::findings::tests::sample;

    #[test]
    fn pairs_become_percent_slower() {
        let mut samples = Vec::new();
        for run in 0..6 {
            samples.push(sample("native", "getpid", run, 100.0));
            samples.push(sample("pod", "getpid", run, 110.0));
        }
        let found = &all(&samples)[0];
        assert!((found.slower[0].1.value - 10.0).abs() < 1e-6 && found.label == "getpid");
        samples.iter_mut().for_each(|sample| sample.unit = "1/s".into());
        assert!((all(&samples)[0].slower[0].1.value + 9.09).abs() < 0.01);
        assert_eq!(rows(&samples)[0][4].text, "–");
    }
}
