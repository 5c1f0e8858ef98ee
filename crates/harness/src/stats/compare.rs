//! Two sets of samples: how far apart, and whether that could be chance.

use rand::Rng;
use rand::seq::SliceRandom;

use super::median;

/// The shift from `a` to `b`: the median of all pairwise differences `b − a` (Hodges-Lehmann).
pub fn hodges_lehmann(a: &[f64], b: &[f64]) -> Option<f64> {
    let differences: Vec<f64> = b.iter().flat_map(|y| a.iter().map(move |x| y - x)).collect();
    median(&differences)
}

/// How probable it is that labels put on at random set the medians of `a` and `b` at least as far apart as they are:
/// a two-sided permutation test. Never zero: the labels found count as one of the `rounds` + 1.
pub fn permutation_test(a: &[f64], b: &[f64], rounds: usize, rng: &mut impl Rng) -> Option<f64> {
    let observed = (median(a)? - median(b)?).abs();
    let mut pooled = [a, b].concat();
    let mut as_far = 1;
    for _ in 0..rounds {
        pooled.shuffle(rng);
        let (left, right) = pooled.split_at(a.len());
        if (median(left)? - median(right)?).abs() >= observed {
            as_far += 1;
        }
    }
    Some(f64::from(as_far) / (rounds + 1) as f64)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::rngs::StdRng;
    use rand::{Rng as _, SeedableRng};

    use super::*;

    #[test]
    fn a_clear_difference_is_found() {
        let a: Vec<f64> = (0..20).map(f64::from).collect();
        let b: Vec<f64> = a.iter().map(|x| x + 30.0).collect();
        assert_eq!(hodges_lehmann(&a, &b), Some(30.0));
        assert!(permutation_test(&a, &b, 999, &mut StdRng::seed_from_u64(1)).unwrap() <= 0.002);
    }

    #[test]
    fn equal_samples_differ_by_chance_alone() {
        let a: Vec<f64> = (0..20).map(f64::from).collect();
        assert_eq!(permutation_test(&a, &a, 99, &mut StdRng::seed_from_u64(1)), Some(1.0));
        assert_eq!(permutation_test(&a, &[], 99, &mut StdRng::seed_from_u64(1)), None);
    }

    #[test]
    fn false_alarms_are_as_rare_as_the_test_says() {
        let mut rng = StdRng::seed_from_u64(5);
        let mut draw = |n| (0..n).map(|_| rng.random_range(0.0..1.0)).collect::<Vec<f64>>();
        let sets: Vec<_> = (0..200).map(|_| (draw(12), draw(12))).collect();
        let alarms = sets.iter().filter(|(a, b)| permutation_test(a, b, 199, &mut rng).unwrap() < 0.05).count();
        // Ten are expected; more than 22 has odds below one in a thousand.
        assert!(alarms <= 22, "{alarms} of 200");
    }

    proptest! {
        #[test]
        fn the_shift_turns_with_the_arms(
            a in prop::collection::vec(-1e6..1e6f64, 1..20), b in prop::collection::vec(-1e6..1e6f64, 1..20),
        ) {
            let (there, back) = (hodges_lehmann(&a, &b).unwrap(), hodges_lehmann(&b, &a).unwrap());
            prop_assert!((there + back).abs() < 1e-6);
        }
    }
}
