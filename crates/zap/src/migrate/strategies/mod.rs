//! How memory is moved: one file a strategy, and one line in [`ALL`].

mod copy_on_reference;
mod flush;
mod pre_copy;
mod stop_and_copy;

pub use copy_on_reference::CopyOnReference;
pub use flush::Flush;
pub use pre_copy::PreCopy;
pub use stop_and_copy::StopAndCopy;

/// What a strategy decides. The answers have a default: that of stop-and-copy.
pub trait Strategy: Send + Sync {
    /// What the command line calls it.
    fn name(&self) -> &'static str;

    /// What it does, in a few words, for the help.
    fn about(&self) -> &'static str;

    /// Whether what the pod has written is to be copied (once more) while it runs. Each of the rounds `so_far` is told by
    /// the bytes that had been written when it began; before the first there are none.
    fn another_round(&self, so_far: &[u64]) -> bool {
        let _ = so_far;
        false
    }

    /// Whether pages that were not copied before the hold stay behind, and are fetched once the pod runs over there.
    fn leaves_pages(&self) -> bool {
        false
    }

    /// Whether what is copied goes to a store that both hosts see, and is read from there once the pod runs.
    fn needs_store(&self) -> bool {
        false
    }
}

/// Every strategy that the command line offers, the oldest idea first.
pub const ALL: [&dyn Strategy; 4] = [&StopAndCopy, &PreCopy, &CopyOnReference, &Flush];

/// The strategy of that name.
pub fn of_name(name: &str) -> Option<&'static dyn Strategy> {
    ALL.into_iter().find(|strategy| strategy.name() == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unlike_and_lead_to_their_strategies() {
        for strategy in ALL {
            assert_eq!(of_name(strategy.name()).map(Strategy::about), Some(strategy.about()));
        }
        assert!(of_name("magic").is_none());
    }

    #[test]
    fn rounds_end_when_little_is_left_or_it_shrinks_no_more() {
        let goes_on = |rounds: &[u64]| PreCopy.another_round(rounds);
        assert!(goes_on(&[]) && goes_on(&[1 << 30]) && goes_on(&[1 << 30, 1 << 28]));
        assert!(!goes_on(&[1 << 30, 1 << 19]) && !goes_on(&[1 << 30, 3 << 28]) && !goes_on(&[1 << 19]));
        assert!(!StopAndCopy.another_round(&[]) && !CopyOnReference.another_round(&[]));
    }
}
