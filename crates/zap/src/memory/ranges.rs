//! Arithmetic on sorted lists of address ranges.

use std::ops::Range;

/// What `a` and `b` have in common; `None` if nothing.
pub(super) fn overlap(a: &Range<u64>, b: &Range<u64>) -> Option<Range<u64>> {
    let both = a.start.max(b.start)..a.end.min(b.end);
    (both.start < both.end).then_some(both)
}

/// `whole` without `holes` (sorted, disjoint), in order.
pub(super) fn without(whole: Range<u64>, holes: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut rest = Vec::new();
    let mut start = whole.start;
    let first = holes.partition_point(|h| h.end <= whole.start);
    for hole in holes[first..].iter().take_while(|h| h.start < whole.end) {
        if start < hole.start {
            rest.push(start..hole.start);
        }
        start = start.max(hole.end);
    }
    if start < whole.end {
        rest.push(start..whole.end);
    }
    rest
}

/// `ranges` without `holes` (both sorted, disjoint).
pub(super) fn minus(ranges: &[Range<u64>], holes: &[Range<u64>]) -> Vec<Range<u64>> {
    ranges.iter().flat_map(|r| without(r.clone(), holes)).collect()
}

/// Sorts, and joins what overlaps or touches.
pub(super) fn joined(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.retain(|r| r.start < r.end);
    ranges.sort_by_key(|r| r.start);
    let mut joined: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

/// The parts that lie in both lists (each sorted and disjoint).
pub(super) fn common(a: &[Range<u64>], b: &[Range<u64>]) -> Vec<Range<u64>> {
    // From where both have something on: a short list costs no walk over a long one.
    let first = |of: &[Range<u64>], other: &[Range<u64>]| {
        of.partition_point(|r| other.first().is_some_and(|o| r.end <= o.start))
    };
    let (mut i, mut j, mut found) = (first(a, b), first(b, a), Vec::new());
    while let (Some(x), Some(y)) = (a.get(i), b.get(j)) {
        found.extend(overlap(x, y));
        if x.end <= y.end { i += 1 } else { j += 1 }
    }
    found
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn some() -> impl Strategy<Value = Vec<Range<u64>>> {
        prop::collection::vec((0u64..60, 1u64..8), 0..8)
            .prop_map(|all| joined(all.iter().map(|(s, l)| *s..s + l).collect()))
    }

    fn has(ranges: &[Range<u64>], point: u64) -> bool {
        ranges.iter().any(|r| r.contains(&point))
    }

    proptest! {
        #[test]
        fn they_do_as_they_say(a in some(), b in some()) {
            let (rest, both) = (without(0..80, &a), common(&a, &b));
            for point in 0..80 {
                prop_assert_eq!(has(&rest, point), !has(&a, point));
                prop_assert_eq!(has(&both, point), has(&a, point) && has(&b, point));
            }
        }
    }
}
