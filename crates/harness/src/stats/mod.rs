//! Statistics on raw samples: quantiles, bootstrap intervals, shifts, permutation tests.
//!
//! Nothing here assumes a distribution. Whatever draws random numbers takes its generator, so that a printed seed
//! repeats a result exactly.

mod compare;
mod resample;

pub use compare::{hodges_lehmann, permutation_test};
pub use resample::{Estimate, bootstrap, paired_ratio};

/// The quantile `q` (0 to 1) of `samples`, interpolated linearly between neighbours; `None` if there are none.
///
/// ```
/// assert_eq!(harness::stats::quantile(&[4.0, 1.0, 3.0, 2.0], 0.5), Some(2.5));
/// ```
pub fn quantile(samples: &[f64], q: f64) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    quantile_sorted(&sorted, q)
}

/// The same of samples that are sorted already.
pub fn quantile_sorted(sorted: &[f64], q: f64) -> Option<f64> {
    let last = sorted.len().checked_sub(1)?;
    let position = q.clamp(0.0, 1.0) * last as f64;
    let (low, high) = (sorted[position.floor() as usize], sorted[position.ceil() as usize]);
    // Not `low + fraction * (high - low)` where both are equal: infinities would become NaN.
    Some(if low == high { low } else { low + position.fract() * (high - low) })
}

/// The middle of `samples`; `None` if there are none.
pub fn median(samples: &[f64]) -> Option<f64> {
    quantile(samples, 0.5)
}

/// The slope of the line through `points` with the least squares; `None` where they are not of two places at least.
///
/// ```
/// assert_eq!(harness::stats::slope(&[(0.0, 1.0), (1.0, 3.0), (2.0, 5.0)]), Some(2.0));
/// ```
pub fn slope(points: &[(f64, f64)]) -> Option<f64> {
    let count = points.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / count;
    let (x, y) = (mean(|point| point.0), mean(|point| point.1));
    let spread: f64 = points.iter().map(|point| (point.0 - x).powi(2)).sum();
    let together: f64 = points.iter().map(|point| (point.0 - x) * (point.1 - y)).sum();
    (spread > 0.0).then(|| together / spread)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn quantiles_of_few_samples() {
        assert_eq!(quantile(&[], 0.5), None);
        assert_eq!(quantile(&[7.0], 0.99), Some(7.0));
        assert_eq!(quantile(&[1.0, 2.0, 3.0, 4.0, 5.0], 0.25), Some(2.0));
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
    }

    proptest! {
        #[test]
        fn a_quantile_is_within_the_samples_and_grows(
            samples in prop::collection::vec(-1e9..1e9f64, 1..50), a in 0.0..1.0f64, b in 0.0..1.0f64,
        ) {
            let (low, high) = (a.min(b), a.max(b));
            let (at_low, at_high) = (quantile(&samples, low).unwrap(), quantile(&samples, high).unwrap());
            prop_assert!(at_low <= at_high);
            prop_assert!(samples.iter().any(|s| *s <= at_low) && samples.iter().any(|s| *s >= at_high));
        }
    }
}
