//! Memory that is changed in every way while it may still be on its way from another host.

use crate::memory::{PAGE, anonymous, bytes, map, protect};
use crate::stage::*;

pub(crate) const KINDS: &[crate::stage::Kind] = &[("moving-memory", moving_memory), ("moving-threads", moving_threads)];

const MIB: usize = 1 << 20;
const SIZE: usize = 48 * MIB;

/// What is in a page: told by where it was in the beginning.
fn mark(page: usize) -> u64 {
    (page as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn fill(start: *mut u8, length: usize) {
    for page in 0..length / PAGE {
        let words = bytes(start.wrapping_add(page * PAGE), PAGE).chunks_exact_mut(8);
        words.for_each(|word| word.copy_from_slice(&mark(page).to_ne_bytes()));
    }
}

/// `length` bytes that began at `offset` are at `place` now.
fn marked(what: &str, place: *mut u8, offset: usize, length: usize) -> Checked {
    for page in 0..length / PAGE {
        let found = bytes(place.wrapping_add(page * PAGE), PAGE);
        let expected = mark(offset / PAGE + page).to_ne_bytes();
        if let Some(at) = found.chunks_exact(8).position(|word| word != expected) {
            return Err(format!(
                "{what}: page {page}, word {at} is {:x?}, not {expected:x?}",
                &found[at * 8..at * 8 + 8]
            ));
        }
    }
    Ok(())
}

fn zeros(what: &str, place: *mut u8, length: usize) -> Checked {
    check(bytes(place, length).iter().all(|byte| *byte == 0), format!("{what}: not zeros"))
}

fn move_to(from: *mut u8, to: *mut u8, length: usize) -> Checked {
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    let moved = unsafe { libc::mremap(from.cast(), length, length, flags, to.cast::<libc::c_void>()) };
    done("mremap", moved as i64).map(drop)
}

/// Forks, moves, drops, unmaps and protects memory, and has the kernel read it and write to it.
fn moving_memory() -> Checked {
    let start = anonymous(SIZE)?;
    let aside = map(8 * MIB, libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)?;
    let sparse = anonymous(8 * MIB)?;
    fill(start, SIZE);
    unsafe { libc::madvise(sparse.cast(), 8 * MIB, libc::MADV_HUGEPAGE) };
    (0..8 * MIB).step_by(16 * PAGE).for_each(|at| bytes(sparse, 8 * MIB)[at] = 7);
    let at = |mib: usize| start.wrapping_add(mib * MIB);
    hold_and(|| {
        // A child, and a child of it, each with memory that has not come yet.
        let child = fork(|| {
            let grandchild = fork(|| marked("a grandchild's", at(32), 32 * MIB, 16 * MIB))?;
            marked("a child's", at(24), 24 * MIB, 8 * MIB)?;
            reap(grandchild)?;
            marked("a child's rest", at(40), 40 * MIB, 8 * MIB)
        })?;
        done("madvise", unsafe { libc::madvise(at(4).cast(), 2 * MIB, libc::MADV_DONTNEED) })?;
        zeros("what was dropped", at(4), 2 * MIB)?;
        move_to(at(8), aside, 4 * MIB)?;
        marked("what was moved", aside, 8 * MIB, 4 * MIB)?;
        move_to(aside, at(8), MIB)?;
        marked("what was moved back", at(8), 8 * MIB, MIB)?;
        done("munmap", unsafe { libc::munmap(at(16).cast(), 2 * MIB) })?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        let (length, protection) = (2 * MIB, libc::PROT_READ | libc::PROT_WRITE);
        let again = unsafe { libc::mmap(at(16).cast(), length, protection, flags, -1, 0) };
        done("mmap", again as i64)?;
        zeros("what was mapped anew", at(16), length)?;
        for page in (0..2 * MIB).step_by(2 * PAGE) {
            protect(at(20).wrapping_add(page), PAGE, libc::PROT_READ)?;
        }
        marked("what was protected", at(20), 20 * MIB, 2 * MIB)?;
        through_the_kernel(at(22))?;
        let touched =
            bytes(sparse, 8 * MIB).iter().enumerate().all(|(i, b)| *b == if i % (16 * PAGE) == 0 { 7 } else { 0 });
        check(touched, "what is sparse has changed")?;
        marked("the beginning", at(0), 0, 4 * MIB)?;
        marked("the end", at(24), 24 * MIB, 24 * MIB)?;
        reap(child)
    })
}

/// Calls that read from memory and write to it.
fn through_the_kernel(start: *mut u8) -> Checked {
    let path = std::ffi::CString::new("/tmp/moved").map_err(|e| e.to_string())?;
    let flags = libc::O_CREAT | libc::O_RDWR;
    let file = done("open", unsafe { libc::open(path.as_ptr(), flags, 0o600) })? as i32;
    let written = done("write", unsafe { libc::write(file, start.cast(), MIB) } as i64)?;
    equal("bytes written", written, MIB as i64)?;
    let other = start.wrapping_add(MIB);
    let read = done("pread", unsafe { libc::pread(file, other.cast(), MIB / 2, 0) } as i64)?;
    equal("bytes read", read, MIB as i64 / 2)?;
    marked("what was read over", other, 22 * MIB, MIB / 2)?;
    marked("what follows", other.wrapping_add(MIB / 2), 23 * MIB + MIB / 2, MIB / 2)
}

/// Threads that touch pages in different orders.
fn moving_threads() -> Checked {
    let start = anonymous(SIZE)? as usize;
    fill(start as *mut u8, SIZE);
    hold_and(|| {
        let step = |number: usize| {
            move || -> Checked {
                let pages = SIZE / PAGE;
                for nth in 0..pages {
                    let page = (nth * (2 * number + 7919) + number * 997) % pages;
                    marked("a page", (start + page * PAGE) as *mut u8, page * PAGE, PAGE)?;
                }
                Ok(())
            }
        };
        let threads: Vec<_> = (0..4).map(|number| std::thread::spawn(step(number))).collect();
        threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| "a thread panicked".to_owned())?)
    })
}
