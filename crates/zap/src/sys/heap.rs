//! Memory of our own, in place before it is needed: a page that is touched for the first time costs a microsecond, and a
//! checkpoint that copies megabytes pays for it while the pod is held.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// Buffers that are smaller are not worth preparing.
const WORTH_IT: usize = 64 << 10;

/// Keeps what a thread frees for what it allocates next, until [`release`].
pub fn keep_freed() {
    const NEVER: i32 = i32::MAX;
    for option in [libc::M_MMAP_THRESHOLD, libc::M_TRIM_THRESHOLD] {
        // SAFETY: numbers only; the allocator may refuse a value, and then goes on as before.
        unsafe { libc::mallopt(option, NEVER) };
    }
}

/// Buffers of zeros that have memory behind them, by their size. Any thread may take one.
///
/// Memory that is merely allocated and freed ahead does not do: allocators keep it by thread, and give large pieces back.
#[derive(Debug, Default)]
pub struct Stock(Mutex<BTreeMap<usize, Vec<Vec<u8>>>>);

impl Stock {
    /// Has the kernel put memory behind buffers of these sizes. They are allocated before any is touched, so that they lie
    /// side by side and huge pages reach across them.
    pub fn add(&self, sizes: impl IntoIterator<Item = usize>) {
        const MADV_POPULATE_WRITE: i32 = 23;
        let worth_it = sizes.into_iter().filter(|bytes| *bytes >= WORTH_IT);
        let mut rooms: Vec<Vec<u8>> = worth_it.map(Vec::with_capacity).collect();
        for advice in [libc::MADV_HUGEPAGE, MADV_POPULATE_WRITE] {
            rooms.iter().for_each(|room| advise(room, advice));
        }
        let mut stock = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for mut room in rooms.drain(..) {
            room.resize(room.capacity(), 0);
            stock.entry(room.len()).or_default().push(room);
        }
    }

    /// So many zeros: of the smallest buffer that has room for them, or newly allocated.
    pub fn zeros(&self, bytes: usize) -> Vec<u8> {
        if bytes < WORTH_IT {
            return vec![0; bytes];
        }
        let mut stock = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = stock.range_mut(bytes..).find_map(|(_, buffers)| buffers.pop());
        drop(stock);
        match found {
            Some(mut buffer) => {
                buffer.truncate(bytes);
                buffer
            }
            None => vec![0; bytes],
        }
    }
}

/// Advises the kernel about the whole pages of a buffer's room.
fn advise(room: &Vec<u8>, advice: i32) {
    const PAGE: usize = 4096;
    let start = (room.as_ptr() as usize).next_multiple_of(PAGE);
    let length = (room.as_ptr() as usize + room.capacity()).saturating_sub(start) / PAGE * PAGE;
    // SAFETY: whole pages inside an allocation of ours; the advice is about memory behind them, not about what is in them.
    unsafe { libc::madvise(start as *mut libc::c_void, length, advice) };
}

/// Gives what was freed back to the kernel.
pub fn release() {
    // SAFETY: a number only.
    unsafe { libc::malloc_trim(0) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_buffer_with_room_is_taken() {
        let stock = Stock::default();
        stock.add([3 << 20, 1 << 20]);
        let (small, large, fresh) = (stock.zeros(900_000), stock.zeros(900_000), stock.zeros(900_000));
        assert!(small.capacity() < 2 << 20 && large.capacity() >= 3 << 20 && fresh.capacity() < 1 << 20);
        assert!([small, large, fresh].iter().all(|buffer| *buffer == vec![0; 900_000]));
        release();
    }
}
