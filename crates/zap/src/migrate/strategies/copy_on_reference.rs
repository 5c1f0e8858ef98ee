use super::Strategy;

/// Let it go over there at once; pages are fetched when they are touched, and meanwhile those that nobody has touched: as
/// Accent did. Until the last has come the pod depends on the host that it left.
pub struct CopyOnReference;

impl Strategy for CopyOnReference {
    fn name(&self) -> &'static str {
        "copy-on-reference"
    }

    fn about(&self) -> &'static str {
        "let it go there at once; pages follow when they are touched"
    }

    fn leaves_pages(&self) -> bool {
        true
    }
}
