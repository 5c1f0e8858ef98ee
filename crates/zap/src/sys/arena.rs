//! A stretch of memory of our own with pages behind it, that is handed out piece by piece.

use std::io;
use std::mem::ManuallyDrop;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

const MADV_POPULATE_WRITE: i32 = 23;

/// Memory that is handed out piece by piece, each byte once.
#[derive(Debug)]
pub struct Arena {
    start: NonNull<u8>,
    length: usize,
    taken: AtomicUsize,
}

// SAFETY: the mapping belongs to the arena, is the same for every thread, and what is handed out of it does not overlap.
unsafe impl Send for Arena {}
// SAFETY: as above; the count of what was taken is atomic.
unsafe impl Sync for Arena {}

impl Arena {
    /// With pages behind all of it, huge ones where the kernel can: those of the last arena if it was large enough.
    pub fn new(length: usize) -> io::Result<Arena> {
        let last = kept().take();
        let arena = match last {
            Some(last) if last.length >= length => last,
            Some(small) => {
                small.unmap();
                Arena::map(length)?
            }
            None => Arena::map(length)?,
        };
        // Without it works as well, and takes longer.
        let _ = arena.advise(MADV_POPULATE_WRITE);
        Ok(arena)
    }

    fn map(length: usize) -> io::Result<Arena> {
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping at an address of the kernel's choice; nothing refers to it yet.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), length, protection, flags, -1, 0) };
        let start = NonNull::new(start.cast::<u8>()).filter(|_| start != libc::MAP_FAILED);
        let start = start.ok_or_else(io::Error::last_os_error)?;
        let arena = Arena { start, length, taken: AtomicUsize::new(0) };
        let _ = arena.advise(libc::MADV_HUGEPAGE);
        Ok(arena)
    }

    fn advise(&self, advice: i32) -> io::Result<()> {
        // SAFETY: the whole of the arena's own mapping, of which nobody has a piece when its contents are given up.
        super::check(unsafe { libc::madvise(self.start.as_ptr().cast(), self.length, advice) }.into()).map(drop)
    }

    /// How many bytes there are.
    pub fn size(&self) -> usize {
        self.length
    }

    /// How many bytes have been handed out, and left out between them.
    pub fn taken(&self) -> usize {
        self.taken.load(Ordering::Acquire)
    }

    /// So many bytes at the next multiple of `align`, if they are still there. What is in them is left open.
    pub fn take(self: &Arc<Self>, length: usize, align: usize) -> Option<Piece> {
        let place = |taken: usize| {
            let at = taken.checked_next_multiple_of(align)?;
            Some((at, at.checked_add(length).filter(|end| *end <= self.length)?))
        };
        let before =
            self.taken.fetch_update(Ordering::AcqRel, Ordering::Acquire, |taken| Some(place(taken)?.1)).ok()?;
        let (at, _) = place(before)?;
        // Nothing of an earlier arena shows between two pieces.
        Piece { arena: self.clone(), at: before, length: at - before }.fill(0);
        Some(Piece { arena: self.clone(), at, length })
    }

    /// What was taken of it, now that nobody has a piece any more; or `all` of it, with zeros for the rest.
    pub fn bytes(&mut self, all: bool) -> &[u8] {
        let taken = self.taken();
        if all {
            // SAFETY: inside the mapping, and behind every piece that there ever was.
            unsafe { self.start.as_ptr().add(taken).write_bytes(0, self.length - taken) };
        }
        let length = if all { self.length } else { taken };
        // SAFETY: inside the mapping, which lives as long as the borrow. Every piece has a share of the arena, and to borrow
        // it exclusively takes the last one.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), length) }
    }
}

/// An arena that is larger is not kept for the next.
const MOST_KEPT: usize = 64 << 20;

/// The last arena. A page that the host of a virtual machine has to find first takes it microseconds, so those that are
/// there are kept; but the kernel may have them back.
fn kept() -> MutexGuard<'static, Option<Arena>> {
    static KEPT: Mutex<Option<Arena>> = Mutex::new(None);
    KEPT.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for Arena {
    fn drop(&mut self) {
        if self.length > MOST_KEPT || self.advise(libc::MADV_FREE).is_err() {
            return self.unmap_now();
        }
        let again = Arena { start: self.start, length: self.length, taken: AtomicUsize::new(0) };
        let other = kept().replace(again);
        if let Some(other) = other {
            other.unmap();
        }
    }
}

impl Arena {
    fn unmap(self) {
        ManuallyDrop::new(self).unmap_now();
    }

    fn unmap_now(&mut self) {
        // SAFETY: the arena's own mapping; whoever has a piece of it keeps it alive, and it is used no more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.length) };
    }
}

/// A part of an arena that nobody else has.
#[derive(Debug)]
pub struct Piece {
    arena: Arc<Arena>,
    at: usize,
    length: usize,
}

impl Piece {
    /// How far from the beginning of the arena it is.
    pub fn at(&self) -> usize {
        self.at
    }

    /// Keeps but the first bytes.
    pub fn truncate(&mut self, length: usize) {
        self.get_mut(length..).unwrap_or_default().fill(0);
        self.length = self.length.min(length);
    }
}

impl Deref for Piece {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `take` keeps it inside the mapping, which it keeps alive, and hands out no byte twice.
        unsafe { std::slice::from_raw_parts(self.arena.start.as_ptr().add(self.at), self.length) }
    }
}

impl DerefMut for Piece {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.arena.start.as_ptr().add(self.at), self.length) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_do_not_overlap_and_end_with_the_arena() {
        let arena = Arc::new(Arena::map(10_000).unwrap());
        let mut first = arena.take(5, 1).unwrap();
        let mut second = arena.take(4096, 4096).unwrap();
        first.fill(1);
        second.fill(2);
        first.truncate(4);
        assert_eq!((first.at(), second.at(), arena.taken()), (0, 4096, 8192));
        assert!(arena.take(1809, 1).is_none() && arena.take(usize::MAX, 1).is_none());
        drop((first, second));
        let mut arena = Arc::into_inner(arena).unwrap();
        assert_eq!(arena.bytes(false), [&[1; 4][..], &[0; 4092], &[2; 4096]].concat());
        assert_eq!(arena.bytes(true)[8192..], [0; 1808]);
    }

    #[test]
    fn nothing_of_the_last_one_shows_where_nothing_was_put() {
        let arena = Arc::new(Arena::new(9000).unwrap());
        arena.take(9000, 1).unwrap().fill(9);
        drop(arena);
        let arena = Arc::new(Arena::new(8500).unwrap());
        for align in [1, 8192] {
            arena.take(1, align).unwrap().fill(1);
        }
        let mut arena = Arc::into_inner(arena).unwrap();
        let bytes = arena.bytes(true);
        assert!(bytes.len() >= 8500 && bytes.iter().map(|byte| u64::from(*byte)).sum::<u64>() == 2);
    }
}
