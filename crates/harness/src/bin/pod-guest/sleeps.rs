//! Sleeps that last through a checkpoint: none ends early, and what was slept is slept.

use crate::clocks::now;
use crate::stage::*;

pub(crate) const KINDS: &[crate::stage::Kind] = &[("sleeps", sleeps), ("long-sleep", long_sleep)];

const SECOND: i64 = 1_000_000_000;

/// Sleeps begun 3.5 s before the hold, of 4 s: too long if they were begun afresh.
fn sleeps() -> Checked {
    let (length, before) = (4 * SECOND, 7 * SECOND / 2);
    let children = [
        fork(|| lasts(length, |time| unsafe { libc::nanosleep(time, time.cast_mut()) }))?,
        fork(|| {
            lasts(length, |time| unsafe { libc::clock_nanosleep(libc::CLOCK_MONOTONIC, 0, time, time.cast_mut()) })
        })?,
        fork(|| lasts(length, |time| unsafe { libc::ppoll(std::ptr::null_mut(), 0, time, std::ptr::null()) }))?,
        fork(|| {
            lasts(length, |time| unsafe {
                let mut time = libc::timeval { tv_sec: (*time).tv_sec, tv_usec: (*time).tv_nsec / 1000 };
                let none = std::ptr::null_mut();
                libc::select(0, none, none, none, &raw mut time)
            })
        })?,
        fork(|| lasts_until(length))?,
    ];
    std::thread::sleep(std::time::Duration::from_nanos(before as u64));
    hold_loosely()?;
    children.into_iter().try_for_each(reap)
}

fn check_length(begin: i64, length: i64) -> Checked {
    let slept = now(libc::CLOCK_MONOTONIC) - begin;
    check(slept >= length, format!("slept {slept} ns of {length}"))?;
    // The pod's clock stands still between checkpoint and restart; a busy machine may add something.
    check(slept < length + 3 * SECOND, format!("slept {slept} ns instead of {length}"))
}

fn lasts(length: i64, sleep: impl FnOnce(*const libc::timespec) -> i32) -> Checked {
    let begin = now(libc::CLOCK_MONOTONIC);
    let mut time = libc::timespec { tv_sec: length / SECOND, tv_nsec: length % SECOND };
    equal("the result of a sleep", sleep(&raw mut time), 0)?;
    check_length(begin, length)
}

fn lasts_until(length: i64) -> Checked {
    let begin = now(libc::CLOCK_MONOTONIC);
    let end = begin + length;
    let time = libc::timespec { tv_sec: end / SECOND, tv_nsec: end % SECOND };
    let absolute = libc::TIMER_ABSTIME;
    let result =
        unsafe { libc::clock_nanosleep(libc::CLOCK_MONOTONIC, absolute, &raw const time, std::ptr::null_mut()) };
    equal("the result of a sleep", result, 0)?;
    check_length(begin, length)
}

/// A sleep that a signal interrupts afterwards tells what remains.
fn long_sleep() -> Checked {
    extern "C" fn nothing(_: i32) {}
    let child = fork(|| {
        unsafe { libc::signal(libc::SIGUSR1, nothing as *const () as usize) };
        let begin = now(libc::CLOCK_MONOTONIC);
        let (length, mut left) = (libc::timespec { tv_sec: 500, tv_nsec: 0 }, libc::timespec { tv_sec: 0, tv_nsec: 0 });
        let result = unsafe { libc::nanosleep(&raw const length, &raw mut left) };
        equal("nanosleep", (result, std::io::Error::last_os_error().raw_os_error()), (-1, Some(libc::EINTR)))?;
        let slept = now(libc::CLOCK_MONOTONIC) - begin;
        let told = (500 - left.tv_sec) * SECOND - left.tv_nsec;
        check((slept - told).abs() < SECOND, format!("{told} ns slept by what remains, {slept} ns by the clock"))
    })?;
    until_asleep(child)?;
    hold_loosely()?;
    unsafe { libc::kill(child, libc::SIGUSR1) };
    reap(child)
}
