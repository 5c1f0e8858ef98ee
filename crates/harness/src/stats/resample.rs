//! Intervals by resampling.

use rand::Rng;
use serde::{Deserialize, Serialize};

use super::{median, quantile_sorted};

/// Resamples drawn for an interval: its ends are then good to about a twentieth of its width.
const RESAMPLES: usize = 2000;

/// A value with its 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// The statistic of the samples themselves.
    pub value: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end of the interval.
    pub high: f64,
}

/// `statistic` of `samples` with its percentile-bootstrap interval; `None` if there are no samples.
pub fn bootstrap<S: Copy>(
    samples: &[S],
    rng: &mut impl Rng,
    statistic: impl Fn(&[S]) -> Option<f64>,
) -> Option<Estimate> {
    let value = statistic(samples)?;
    let mut drawn = Vec::with_capacity(RESAMPLES);
    let mut resample = Vec::with_capacity(samples.len());
    for _ in 0..RESAMPLES {
        resample.clear();
        resample.extend((0..samples.len()).map(|_| samples[rng.random_range(0..samples.len())]));
        drawn.extend(statistic(&resample));
    }
    drawn.sort_by(f64::total_cmp);
    Some(Estimate { value, low: quantile_sorted(&drawn, 0.025)?, high: quantile_sorted(&drawn, 0.975)? })
}

/// The median of `b / a` over pairs measured one right after the other, so that a machine's drift cancels out.
pub fn paired_ratio(pairs: &[(f64, f64)], rng: &mut impl Rng) -> Option<Estimate> {
    let ratios: Vec<f64> = pairs.iter().map(|(a, b)| b / a).collect();
    bootstrap(&ratios, rng, median)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::rngs::StdRng;
    use rand::{Rng as _, SeedableRng};

    use super::*;

    #[test]
    fn the_interval_of_a_known_distribution_covers_its_median() {
        // Of 60 intervals at 95 %, fewer than 50 covering has odds below one in a thousand.
        let mut rng = StdRng::seed_from_u64(1);
        let covered = (0..60).filter(|_| {
            let samples: Vec<f64> = (0..40).map(|_| rng.random_range(0.0..1.0)).collect();
            let estimate = bootstrap(&samples, &mut rng, median).unwrap();
            estimate.low <= 0.5 && 0.5 <= estimate.high
        });
        assert!(covered.count() >= 50);
    }

    #[test]
    fn no_samples_no_estimate() {
        assert_eq!(bootstrap(&[], &mut StdRng::seed_from_u64(1), median), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn a_ratio_of_equal_factors_is_exact(values in prop::collection::vec(1.0..1e6f64, 1..30)) {
            let pairs: Vec<_> = values.iter().map(|v| (*v, v * 2.0)).collect();
            let estimate = paired_ratio(&pairs, &mut StdRng::seed_from_u64(2)).unwrap();
            prop_assert_eq!((estimate.low, estimate.value, estimate.high), (2.0, 2.0, 2.0));
        }

        #[test]
        fn the_interval_lies_within_the_samples(values in prop::collection::vec(-1e6..1e6f64, 1..30)) {
            let estimate = bootstrap(&values, &mut StdRng::seed_from_u64(3), median).unwrap();
            let (low, high) = values.iter().fold((f64::MAX, f64::MIN), |(l, h), v| (l.min(*v), h.max(*v)));
            prop_assert!(low <= estimate.low && estimate.low <= estimate.high && estimate.high <= high);
        }
    }
}
