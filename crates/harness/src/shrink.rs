//! Making a case that fails shorter, for whoever is to find out why.

use std::fmt::Debug;
use std::ops::Range;
use std::time::Instant;

/// A case that is a sequence of parts, each of which can be left out.
pub trait Sequence: Clone + Debug {
    /// How many parts can be left out.
    fn parts(&self) -> usize;

    /// The same without some of them.
    fn without(&self, parts: Range<usize>) -> Self;
}

/// Leaves out of a case that failed, and why it did, what it fails without: halves, quarters, … single parts, until no part
/// can be left out any more or the time is over.
pub fn smallest<C: Sequence>(
    failed: (C, String),
    deadline: Instant,
    why_it_fails: impl Fn(&C) -> Option<String>,
) -> (C, String) {
    let (mut case, mut why) = failed;
    let mut size = case.parts().div_ceil(2);
    loop {
        let (mut at, mut is_shorter) = (0, false);
        while at < case.parts() && Instant::now() < deadline {
            let end = (at + size).min(case.parts());
            let shorter = case.without(at..end);
            match why_it_fails(&shorter) {
                Some(reason) => (case, why, is_shorter) = (shorter, reason, true),
                None => at = end,
            }
        }
        if size > 1 {
            size = size.div_ceil(2);
        } else if !is_shorter || Instant::now() >= deadline {
            return (case, why);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::time::Duration;

    use super::*;

    impl Sequence for Vec<u32> {
        fn parts(&self) -> usize {
            self.len()
        }

        fn without(&self, parts: Range<usize>) -> Vec<u32> {
            [&self[..parts.start], &self[parts.end..]].concat()
        }
    }

    fn in_time() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    fn shortened(parts: u32, why_it_fails: impl Fn(&Vec<u32>) -> Option<String>) -> Vec<u32> {
        let case: Vec<u32> = (0..parts).collect();
        let why = why_it_fails(&case).expect("it fails at first");
        let (case, why) = smallest((case, why), in_time(), &why_it_fails);
        assert_eq!(why_it_fails(&case), Some(why), "what is said is why this one fails");
        case
    }

    #[test]
    fn what_has_no_part_in_a_failure_is_left_out() {
        let tried = Cell::new(0);
        let needs = |wanted: &'static [u32]| {
            let tried = &tried;
            move |case: &Vec<u32>| {
                tried.set(tried.get() + 1);
                wanted.iter().all(|part| case.contains(part)).then(|| format!("{} parts", case.len()))
            }
        };
        assert_eq!(shortened(70, needs(&[3, 31, 32, 68])), [3, 31, 32, 68]);
        assert!(tried.get() < 100, "in few steps, each of which takes a second: {}", tried.get());
        assert_eq!(shortened(70, needs(&[])), [] as [u32; 0]);
        assert_eq!(shortened(1, needs(&[0])), [0]);
    }

    #[test]
    fn a_part_that_only_another_one_needs_goes_after_it() {
        // Odd ones are needed, and even ones by those behind them: they can go in one order alone, one by one.
        let fails = |case: &Vec<u32>| {
            let (even, odd): (Vec<u32>, Vec<u32>) = case.iter().partition(|part| *part % 2 == 0);
            let steady = even.iter().zip((0..).step_by(2)).all(|(part, wanted)| *part == wanted);
            (odd == [1, 3, 5, 7] && steady).then(String::new)
        };
        assert_eq!(shortened(9, fails), [1, 3, 5, 7]);
    }

    #[test]
    fn once_the_time_is_over_it_is_what_it_has_become() {
        let tried = Cell::new(0);
        let fails = |_: &Vec<u32>| {
            tried.set(tried.get() + 1);
            Some("always".to_owned())
        };
        let case: Vec<u32> = (0..70).collect();
        let (case, why) = smallest((case, "at first".into()), Instant::now(), fails);
        assert_eq!((case.len(), &*why, tried.get()), (70, "at first", 0));
    }
}
