//! Memory of our own, in place before it is needed: a page that is touched for the first time costs a microsecond, and a
//! checkpoint that copies megabytes pays for it while the pod is held.

/// Keeps what a thread frees for what it allocates next, until [`release`].
pub fn keep_freed() {
    const NEVER: i32 = i32::MAX;
    for option in [libc::M_MMAP_THRESHOLD, libc::M_TRIM_THRESHOLD] {
        // SAFETY: numbers only; the allocator may refuse a value, and then goes on as before.
        unsafe { libc::mallopt(option, NEVER) };
    }
}

/// Has the kernel put memory behind the next `bytes` that the calling thread allocates, as huge pages where it can.
pub fn warm(bytes: usize) {
    const PAGE: usize = 4096;
    const MADV_POPULATE_WRITE: i32 = 23;
    let room = Vec::<u8>::with_capacity(bytes + PAGE);
    let start = (room.as_ptr() as usize).next_multiple_of(PAGE);
    let length = (room.as_ptr() as usize + room.capacity()).saturating_sub(start) / PAGE * PAGE;
    // What is there stays as it is then: the kernel, making huge pages of others, would keep us from our memory for milliseconds,
    // and has been seen to do so in the hold.
    for advice in [libc::MADV_HUGEPAGE, MADV_POPULATE_WRITE, libc::MADV_NOHUGEPAGE] {
        // SAFETY: whole pages inside an allocation of ours; no advice changes what is in them.
        unsafe { libc::madvise(start as *mut libc::c_void, length, advice) };
    }
}

/// Gives what was freed back to the kernel.
pub fn release() {
    // SAFETY: a number only.
    unsafe { libc::malloc_trim(0) };
}

#[cfg(test)]
mod tests {
    #[test]
    fn memory_that_was_warmed_can_be_used() {
        super::warm(5 << 20);
        assert_eq!(vec![7u8; 5 << 20].iter().map(|b| u64::from(*b)).sum::<u64>(), 7 * (5 << 20));
        super::release();
    }
}
