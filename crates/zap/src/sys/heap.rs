//! What the allocator does with memory that was freed.

/// Keeps what a thread frees for what it allocates next, until [`release`].
pub fn keep_freed() {
    const NEVER: i32 = i32::MAX;
    for option in [libc::M_MMAP_THRESHOLD, libc::M_TRIM_THRESHOLD] {
        // SAFETY: numbers only; the allocator may refuse a value, and then goes on as before.
        unsafe { libc::mallopt(option, NEVER) };
    }
}

/// Gives what was freed back to the kernel.
pub fn release() {
    // SAFETY: a number only.
    unsafe { libc::malloc_trim(0) };
}
