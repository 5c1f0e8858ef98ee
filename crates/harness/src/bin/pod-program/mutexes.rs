//! Robust mutexes that all processes share: one whose owner ends is told to whoever takes it next.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicPtr, Ordering::SeqCst};

use super::Process;

const COUNT: usize = 3;

static MUTEXES: AtomicPtr<libc::pthread_mutex_t> = AtomicPtr::new(std::ptr::null_mut());

/// Makes them.
pub(super) fn share() {
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
    // SAFETY: a fresh mapping with room for all, never unmapped; each is initialised once.
    unsafe {
        let at = libc::mmap(std::ptr::null_mut(), COUNT * size_of::<libc::pthread_mutex_t>(), 3, flags, -1, 0);
        assert_ne!(at, libc::MAP_FAILED);
        let mut attributes = std::mem::zeroed();
        libc::pthread_mutexattr_init(&mut attributes);
        libc::pthread_mutexattr_setpshared(&mut attributes, libc::PTHREAD_PROCESS_SHARED);
        libc::pthread_mutexattr_setrobust(&mut attributes, libc::PTHREAD_MUTEX_ROBUST);
        for number in 0..COUNT {
            libc::pthread_mutex_init(at.cast::<libc::pthread_mutex_t>().add(number), &attributes);
        }
        MUTEXES.store(at.cast(), SeqCst);
    }
}

fn mutex(number: usize) -> *mut libc::pthread_mutex_t {
    // SAFETY: there are so many.
    unsafe { MUTEXES.load(SeqCst).add(number % COUNT) }
}

impl Process {
    /// Takes a mutex, or gives it back.
    pub(super) fn mutex(&mut self, which: usize) -> String {
        let number = which % COUNT;
        if let Some(at) = self.thread().mutexes.iter().position(|taken| *taken == number) {
            self.thread_mut().mutexes.remove(at);
            // SAFETY: it was initialised, and this thread has it.
            return format!("{number} given back {}", unsafe { libc::pthread_mutex_unlock(mutex(number)) });
        }
        // SAFETY: it was initialised.
        let taken = unsafe { libc::pthread_mutex_trylock(mutex(number)) };
        if taken == libc::EOWNERDEAD {
            // SAFETY: this thread has it now.
            unsafe { libc::pthread_mutex_consistent(mutex(number)) };
        }
        if matches!(taken, 0 | libc::EOWNERDEAD) {
            self.thread_mut().mutexes.push(number);
        }
        format!("{number} taken {taken}")
    }
}
