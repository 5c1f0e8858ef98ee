use super::Strategy;

/// Send what there is while the pod runs, again what it wrote meanwhile, and only the last of it with the pod held: as V
/// did.
pub struct PreCopy;

/// Rounds at most, and what one may leave for the hold.
const MOST_ROUNDS: usize = 6;
const LITTLE: u64 = 1 << 20;

impl Strategy for PreCopy {
    fn name(&self) -> &'static str {
        "pre-copy"
    }

    fn about(&self) -> &'static str {
        "send it while the pod runs, and in the hold what it wrote since"
    }

    /// Until little is left, or it does not shrink any more.
    fn another_round(&self, so_far: &[u64]) -> bool {
        match *so_far {
            [] => true,
            [only] => only > LITTLE,
            [.., before, last] => so_far.len() < MOST_ROUNDS && last > LITTLE && last <= before / 2,
        }
    }
}
