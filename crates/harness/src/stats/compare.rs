//! Two sets of samples: how far apart, and whether that could be chance.

use rand::Rng;
use rand::seq::SliceRandom;

use super::median;

/// The shift from `a` to `b`: the median of all pairwise differences `b − a` (Hodges-Lehmann).
pub fn hodges_lehmann(a: &[f64], b: &[f64]) -> Option<f64> {
    let differences: Vec<f64> = b.iter().flat_map(|y| a.iter().map(move |x| y - x)).collect();
    median(&differences)
}

/// How probable it is that labels put on at random set the ranks of `a` and `b` at least as far apart as they are: a
/// two-sided permutation test of the rank sum (Wilcoxon, Mann and Whitney), which outliers cannot lead astray. Never zero:
/// the labels found count as one of the `rounds` + 1.
pub fn permutation_test(a: &[f64], b: &[f64], rounds: usize, rng: &mut impl Rng) -> Option<f64> {
    if a.is_empty() || b.is_empty() {
        return None;
    }
    let mut ranks = ranks(&[a, b].concat());
    let expected = a.len() as f64 * (ranks.len() + 1) as f64 / 2.0;
    let distance = |ranks: &[f64]| (ranks[..a.len()].iter().sum::<f64>() - expected).abs();
    let observed = distance(&ranks);
    let mut as_far = 1;
    for _ in 0..rounds {
        ranks.partial_shuffle(rng, a.len());
        // What was drawn is at the end.
        ranks.rotate_right(a.len());
        if distance(&ranks) >= observed {
            as_far += 1;
        }
    }
    Some(f64::from(as_far) / (rounds + 1) as f64)
}

/// The rank of each sample, from 1; equal ones share the mean of theirs.
fn ranks(samples: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..samples.len()).collect();
    order.sort_by(|x, y| samples[*x].total_cmp(&samples[*y]));
    let mut ranks = vec![0.0; samples.len()];
    let mut next = 1;
    for equal in order.chunk_by(|x, y| samples[*x] == samples[*y]) {
        let shared = next as f64 + (equal.len() - 1) as f64 / 2.0;
        for place in equal {
            ranks[*place] = shared;
        }
        next += equal.len();
    }
    ranks
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
    fn equal_samples_share_their_ranks_and_two_values_are_told_apart() {
        assert_eq!(ranks(&[5.0, 1.0, 5.0, 9.0]), [2.5, 1.0, 2.5, 4.0]);
        let p = permutation_test(&[4.0; 10], &[5.0; 10], 999, &mut StdRng::seed_from_u64(1)).unwrap();
        assert!(p <= 0.002, "{p}");
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
