use super::{PreCopy, Strategy};

/// Write what is dirty to a store that both hosts see, and read it from there when it is touched: as Sprite did. Nothing is
/// left at the source.
pub struct Flush;

impl Strategy for Flush {
    fn name(&self) -> &'static str {
        "flush"
    }

    fn about(&self) -> &'static str {
        "write it to a store that both see (--store), read it from there"
    }

    /// What is flushed while the pod runs need not be flushed in the hold.
    fn another_round(&self, so_far: &[u64]) -> bool {
        PreCopy.another_round(so_far)
    }

    fn needs_store(&self) -> bool {
        true
    }
}
