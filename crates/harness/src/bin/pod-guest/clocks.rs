//! Clocks, through the vDSO and the kernel: they go on and never step back.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};

use crate::stage::*;

pub(crate) const KINDS: &[crate::stage::Kind] = &[("clocks", clocks), ("clock-watchers", watchers)];

const CLOCKS: [i32; 6] = [
    libc::CLOCK_REALTIME,
    libc::CLOCK_MONOTONIC,
    libc::CLOCK_BOOTTIME,
    libc::CLOCK_MONOTONIC_RAW,
    libc::CLOCK_MONOTONIC_COARSE,
    libc::CLOCK_REALTIME_COARSE,
];

fn nanoseconds(time: libc::timespec) -> i64 {
    time.tv_sec * 1_000_000_000 + time.tv_nsec
}

/// Through the vDSO.
pub(crate) fn now(clock: i32) -> i64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    unsafe { libc::clock_gettime(clock, &raw mut time) };
    nanoseconds(time)
}

/// Through the kernel.
fn kernel_now(clock: i32) -> i64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    unsafe { libc::syscall(libc::SYS_clock_gettime, clock, &raw mut time) };
    nanoseconds(time)
}

fn clocks() -> Checked {
    let before = CLOCKS.map(|clock| (now(clock), kernel_now(clock)));
    hold()?;
    for (clock, before) in CLOCKS.into_iter().zip(before) {
        let now = (now(clock), kernel_now(clock));
        check(now.0 >= before.0 && now.1 >= before.1, format!("clock {clock} went from {before:?} to {now:?}"))?;
        check(now.1 - before.1 < 1_000_000_000_000, format!("clock {clock} jumped from {before:?} to {now:?}"))?;
        check((now.1 - now.0).abs() < 5_000_000_000, format!("clock {clock}: {now:?} by vDSO and kernel"))?;
    }
    Ok(())
}

/// Threads that read the clocks without a pause.
fn watchers() -> Checked {
    static STOP: AtomicBool = AtomicBool::new(false);
    // What a thread maps for itself when it begins is there before anybody looks.
    let begun = Arc::new(Barrier::new(3));
    let watch = |read: fn(i32) -> i64| {
        let begun = begun.clone();
        std::thread::spawn(move || {
            let mut last = CLOCKS.map(read);
            begun.wait();
            while !STOP.load(Ordering::Relaxed) {
                for (clock, last) in CLOCKS.into_iter().zip(&mut last) {
                    let now = read(clock);
                    check(now >= *last, format!("clock {clock} went from {last} to {now}"))?;
                    *last = now;
                }
                std::thread::yield_now();
            }
            Ok(())
        })
    };
    let threads = [watch(now), watch(kernel_now)];
    begun.wait();
    hold()?;
    STOP.store(true, Ordering::Relaxed);
    threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| "a thread panicked".to_owned())?)
}
