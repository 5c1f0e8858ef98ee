//! Structures that are plain bytes.

/// A `repr(C)` structure without padding, for which any bytes are a value.
///
/// # Safety
/// Implement it only for such structures.
pub unsafe trait Plain: Copy {}

/// The bytes of a plain structure.
pub fn bytes_of<T: Plain>(value: &T) -> &[u8] {
    // SAFETY: T has no padding (the trait's promise), so every byte is initialised; the lifetime is the borrow's.
    unsafe { std::slice::from_raw_parts((&raw const *value).cast(), size_of::<T>()) }
}

/// A plain structure from the beginning of `bytes`; `None` if they are too few.
pub fn from_bytes<T: Plain>(bytes: &[u8]) -> Option<T> {
    if bytes.len() < size_of::<T>() {
        return None;
    }
    // SAFETY: the length was checked, any bytes are a value of T, and the read is unaligned.
    Some(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}

// SAFETY: the calls and seats of the stub are repr(C) structures of 64-bit integers only.
unsafe impl Plain for crate::tracee::RawCall {}
// SAFETY: as above.
unsafe impl Plain for crate::tracee::Seat {}
