use super::Strategy;

/// Hold, send everything, let go over there: as LOCUS and the first Zap did.
pub struct StopAndCopy;

impl Strategy for StopAndCopy {
    fn name(&self) -> &'static str {
        "stop-and-copy"
    }

    fn about(&self) -> &'static str {
        "hold it, send everything, let it go there"
    }
}
