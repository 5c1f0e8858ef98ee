//! What one more of something costs: slopes fitted to the samples of the scaling experiment, and how near the times are to
//! what the machine can do at all.

use rand::SeedableRng;
use rand::rngs::StdRng;

use super::document::Cell;
use crate::experiment::scaling::DIMENSIONS;
use crate::samples::{Sample, values_by};
use crate::stats::{Estimate, bootstrap, median, slope};

const EXPERIMENT: &str = "scaling";
const MEASURES: [(&str, &str, &str); 4] = [
    ("downtime, left running", "leave-running", "downtime"),
    ("checkpoint, stopped", "stop", "whole"),
    ("restart", "restart", "whole"),
    ("image", "stop", "image_bytes"),
];

/// The head of the table.
pub(super) const HEAD: [&str; 6] =
    ["more of", "measure", "up to", "each more", "share of a memcpy", "share of a write"];

/// A row for each thing that there can be more of, and each measure.
pub(super) fn rows(samples: &[Sample]) -> Vec<Vec<Cell>> {
    let mut rows = Vec::new();
    for dimension in &DIMENSIONS {
        for (what, arm, metric) in MEASURES {
            let Some((most, each)) = fitted(samples, dimension.name, arm, metric) else { continue };
            let each = if metric == "image_bytes" { bytes(each) } else { time(each) };
            let each = format!("{each} per {}", dimension.unit);
            let limit = |limit| {
                let share =
                    (metric != "image_bytes").then(|| share(samples, dimension.name, arm, metric, limit)).flatten();
                Cell::number(share.map_or("–".into(), |share| format!("{:.0} %", share * 100.0))).of(EXPERIMENT)
            };
            rows.push(vec![
                Cell::words(dimension.name),
                Cell::words(what),
                Cell::number(format!("{most:.0} {}", dimension.unit)),
                Cell::number(each).of(EXPERIMENT),
                limit("memcpy"),
                limit("write"),
            ]);
        }
    }
    rows
}

/// The most that was measured, and the slope with its interval.
pub(super) fn fitted(samples: &[Sample], dimension: &str, arm: &str, metric: &str) -> Option<(f64, Estimate)> {
    let by_size = values_by(samples, [EXPERIMENT, dimension, arm, metric], "n");
    let most = by_size.last()?.0;
    let points: Vec<(f64, f64)> =
        by_size.into_iter().flat_map(|(n, values)| values.into_iter().map(move |value| (n, value))).collect();
    Some((most, bootstrap(&points, &mut StdRng::seed_from_u64(1), slope)?))
}

/// At the largest size: the time that the image's bytes take by themselves, as a part of the time that was measured.
fn share(samples: &[Sample], dimension: &str, arm: &str, metric: &str, limit: &str) -> Option<f64> {
    let largest = |arm, metric| {
        let by_size = values_by(samples, [EXPERIMENT, dimension, arm, metric], "n");
        median(&by_size.last()?.1)
    };
    Some(largest(limit, "whole")? / largest(arm, metric)?)
}

fn time(slope: Estimate) -> String {
    let all = [slope.value, slope.low, slope.high];
    let largest = all.iter().fold(0.0_f64, |largest, us| largest.max(us.abs()));
    let (unit, factor) = if largest >= 1000.0 {
        ("ms", 1e-3)
    } else if largest >= 1.0 {
        ("µs", 1.0)
    } else {
        ("ns", 1e3)
    };
    let [value, low, high] = all.map(|us| us * factor);
    format!("{value:.1} {unit} ({low:.1} to {high:.1})")
}

fn bytes(slope: Estimate) -> String {
    let (unit, factor) = if slope.value.abs() >= 10_240.0 { ("KiB", 1.0 / 1024.0) } else { ("bytes", 1.0) };
    format!("{:.0} {unit} ({:.0} to {:.0})", slope.value * factor, slope.low * factor, slope.high * factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(n: u64, arm: &str, value: f64) -> Sample {
        Sample {
            experiment: EXPERIMENT.into(),
            workload: "memory".into(),
            parameters: format!("n={n}"),
            arm: arm.into(),
            run: 0,
            metric: "whole".into(),
            value,
            unit: "us".into(),
            seed: 0,
            host: String::new(),
        }
    }

    #[test]
    fn a_slope_and_the_share_of_the_limit() {
        let mut samples = Vec::new();
        for n in [10, 100, 1000] {
            for _ in 0..5 {
                samples.push(sample(n, "restart", 5000.0 + 2.0 * n as f64));
                samples.push(sample(n, "memcpy", 0.7 * n as f64));
            }
        }
        let rows = rows(&samples);
        assert_eq!(rows.len(), 1);
        assert_eq!(rows[0][3].text, "2.0 µs (2.0 to 2.0) per MiB");
        assert_eq!((rows[0][4].text.as_str(), rows[0][5].text.as_str()), ("10 %", "–"));
    }

    #[test]
    fn units_fit_the_number() {
        let of = |value: f64| Estimate { value, low: value, high: value };
        assert_eq!(time(of(0.5)), "500.0 ns (500.0 to 500.0)");
        assert_eq!(time(of(2500.0)), "2.5 ms (2.5 to 2.5)");
        assert_eq!(bytes(of(100.0)), "100 bytes (100 to 100)");
        assert_eq!(bytes(of(1_048_576.0)), "1024 KiB (1024 to 1024)");
    }
}
