//! Interval timers and POSIX timers.

use crate::signals::{block, poll_for, wait_for};
use crate::stage::*;

pub(crate) const KINDS: &[crate::stage::Kind] = &[
    ("interval-timers", interval_timers),
    ("interval-ticks", interval_ticks),
    ("posix-timers", posix_timers),
    ("posix-ticks", posix_ticks),
    ("absolute-timer", absolute_timer),
    ("thread-timer", thread_timer),
    ("thread-timers-expiring", thread_timers_expiring),
    ("posix-timers-expiring", posix_timers_expiring),
    ("many-timers", many_timers),
];

type Setting = [i64; 4];

fn interval(which: i32) -> Setting {
    let mut setting = [0i64; 4];
    unsafe { libc::syscall(libc::SYS_getitimer, which, setting.as_mut_ptr()) };
    setting
}

fn set_interval(which: i32, setting: Setting) -> Checked {
    call("setitimer", libc::SYS_setitimer, [which as u64, setting.as_ptr() as u64, 0]).map(drop)
}

/// Long timers: intervals as they were, what remains no longer than before.
fn interval_timers() -> Checked {
    let settings = [[7, 500_000, 1000, 250_000], [0, 0, 2000, 0], [9, 1, 3000, 0]];
    for (which, setting) in settings.into_iter().enumerate() {
        set_interval(which as i32, setting)?;
    }
    let before: Vec<Setting> = (0..3).map(interval).collect();
    hold()?;
    for (which, before) in before.into_iter().enumerate() {
        let now = interval(which as i32);
        equal("an interval", now[..2].to_vec(), before[..2].to_vec())?;
        check(now[2..] <= before[2..] && now[2] > before[2] - 120, format!("what remains: {now:?} after {before:?}"))?;
    }
    Ok(())
}

/// A timer that ticks goes on ticking.
fn interval_ticks() -> Checked {
    block(&[libc::SIGALRM]);
    set_interval(0, [0, 20_000, 0, 20_000])?;
    equal("a tick", wait_for(&[libc::SIGALRM]), libc::SIGALRM)?;
    hold_loosely()?;
    for _ in 0..10 {
        equal("a tick", wait_for(&[libc::SIGALRM]), libc::SIGALRM)?;
    }
    equal("the interval", interval(0)[..2].to_vec(), vec![0, 20_000])
}

/// `struct sigevent` as the kernel reads it.
fn timer(clock: i32, notify: i32, signal: i32, value: u64, thread: i32) -> Result<i32, String> {
    let mut event = [0u64; 8];
    event[0] = value;
    event[1] = signal as u64 | (notify as u64) << 32;
    event[2] = thread as u64;
    let mut id = 0i32;
    call("timer_create", libc::SYS_timer_create, [clock as u64, event.as_ptr() as u64, &raw mut id as u64])?;
    Ok(id)
}

fn set_timer(id: i32, flags: i32, setting: Setting) -> Checked {
    call("timer_settime", libc::SYS_timer_settime, [id as u64, flags as u64, setting.as_ptr() as u64, 0]).map(drop)
}

fn timer_now(id: i32) -> Result<Setting, String> {
    let mut setting = [0i64; 4];
    call("timer_gettime", libc::SYS_timer_gettime, [id as u64, setting.as_mut_ptr() as u64])?;
    Ok(setting)
}

/// Timers with gaps in their ids, on several clocks, armed and not, for a thread and for nobody.
fn posix_timers() -> Checked {
    let signal = libc::SIGRTMIN() + 4;
    block(&[signal]);
    let itself = unsafe { libc::gettid() };
    let mut ids = vec![
        timer(libc::CLOCK_MONOTONIC, libc::SIGEV_SIGNAL, signal, 0x1111, 0)?,
        timer(libc::CLOCK_REALTIME, libc::SIGEV_SIGNAL, signal, 0x2222, 0)?,
        timer(libc::CLOCK_BOOTTIME, libc::SIGEV_THREAD_ID, signal, 0x3333, itself)?,
        timer(libc::CLOCK_MONOTONIC, libc::SIGEV_NONE, 0, 0, 0)?,
        timer(libc::CLOCK_PROCESS_CPUTIME_ID, libc::SIGEV_SIGNAL, signal, 0x5555, 0)?,
    ];
    let removed = ids.remove(1);
    call("timer_delete", libc::SYS_timer_delete, [removed as u64])?;
    for id in &ids[..3] {
        set_timer(*id, 0, [5, 6, 1000, 7])?;
    }
    let list = read("/proc/self/timers")?;
    let before: Vec<Setting> = ids.iter().map(|id| timer_now(*id)).collect::<Result<_, _>>()?;
    hold()?;
    equal("/proc/self/timers", read("/proc/self/timers")?, list)?;
    for (id, before) in ids.iter().zip(before) {
        let now = timer_now(*id)?;
        equal("an interval", now[..2].to_vec(), before[..2].to_vec())?;
        check(now[2..] <= before[2..] && now[2] >= before[2] - 600, format!("timer {id}: {now:?} after {before:?}"))?;
    }
    set_timer(ids[0], 0, [0, 0, 0, 1_000_000])?;
    equal("a timer's signal", wait_for(&[signal]), signal)?;
    let next = timer(libc::CLOCK_MONOTONIC, libc::SIGEV_NONE, 0, 0, 0)?;
    check(!ids.contains(&next), "a new timer got the id of another")
}

/// Thousands of timers, every third of them armed.
fn many_timers() -> Checked {
    const MANY: usize = 5000;
    let signal = libc::SIGRTMIN() + 5;
    block(&[signal]);
    let kind = |number: usize| (libc::CLOCK_MONOTONIC, libc::SIGEV_SIGNAL, signal, number as u64, 0);
    let make = |(clock, notify, signal, value, thread)| timer(clock, notify, signal, value, thread);
    let ids: Vec<i32> = (0..MANY).map(|number| make(kind(number))).collect::<Result<_, _>>()?;
    for id in ids.iter().step_by(3) {
        set_timer(*id, 0, [0, 0, 5000, 0])?;
    }
    let list = read("/proc/self/timers")?;
    hold()?;
    equal("/proc/self/timers", read("/proc/self/timers")?, list)?;
    for (place, id) in ids.iter().enumerate() {
        let left = timer_now(*id)?[2];
        check(if place % 3 == 0 { (4500..5001).contains(&left) } else { left == 0 }, format!("timer {id}: {left} s"))?;
    }
    set_timer(ids[MANY - 1], 0, [0, 0, 0, 1_000_000])?;
    equal("a timer's signal", wait_for(&[signal]), signal)
}

fn posix_ticks() -> Checked {
    let signal = libc::SIGRTMIN() + 6;
    block(&[signal]);
    let id = timer(libc::CLOCK_MONOTONIC, libc::SIGEV_SIGNAL, signal, 0xabcd, 0)?;
    set_timer(id, 0, [0, 10_000_000, 0, 10_000_000])?;
    equal("a tick", wait_for(&[signal]), signal)?;
    hold_loosely()?;
    for _ in 0..10 {
        equal("a tick", wait_for(&[signal]), signal)?;
    }
    set_timer(id, 0, [0; 4])?;
    let _ = poll_for(&[signal]);
    equal("a tick of a disarmed timer", poll_for(&[signal]), None)
}

/// An absolute deadline stays where it is on its clock.
fn absolute_timer() -> Checked {
    let signal = libc::SIGRTMIN() + 7;
    block(&[signal]);
    let id = timer(libc::CLOCK_MONOTONIC, libc::SIGEV_SIGNAL, signal, 1, 0)?;
    let deadline = crate::clocks::now(libc::CLOCK_MONOTONIC) + 1_500_000_000;
    set_timer(id, libc::TIMER_ABSTIME, [0, 0, deadline / 1_000_000_000, deadline % 1_000_000_000])?;
    hold_loosely()?;
    equal("the deadline", wait_for(&[signal]), signal)?;
    let late = crate::clocks::now(libc::CLOCK_MONOTONIC) - deadline;
    check(late >= 0, format!("{} ns too early", -late))
}

/// A timer that notifies a thread other than the first, as the C library's own timer threads are.
fn thread_timer() -> Checked {
    const TICKS: usize = 10;
    let signal = libc::SIGRTMIN() + 8;
    block(&[signal]);
    let (tell, told) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        let _ = tell.send(unsafe { libc::gettid() });
        pass_on(signal, tell)
    });
    let thread_id = told.recv().map_err(|e| e.to_string())?;
    let id = timer(libc::CLOCK_MONOTONIC, libc::SIGEV_THREAD_ID, signal, 0x77, thread_id)?;
    set_timer(id, 0, [0, 20_000_000, 0, 20_000_000])?;
    told.recv().map_err(|e| e.to_string())?;
    let list = read("/proc/self/timers")?;
    hold_loosely()?;
    equal("/proc/self/timers", read("/proc/self/timers")?, list)?;
    let _ = told.try_iter().count();
    for _ in 0..TICKS {
        told.recv_timeout(std::time::Duration::from_secs(120)).map_err(|e| format!("a tick for a thread: {e}"))?;
    }
    drop(told);
    thread.join().map_err(|_| "the thread panicked".to_string())
}

/// Timers for a thread, one of which expires every two milliseconds, also while it is held: each rings once.
fn thread_timers_expiring() -> Checked {
    expiring(libc::SIGEV_THREAD_ID)
}

/// Timers for a process that expire so.
fn posix_timers_expiring() -> Checked {
    expiring(libc::SIGEV_SIGNAL)
}

fn expiring(notify: i32) -> Checked {
    const TIMERS: usize = 1500;
    let signal = libc::SIGRTMIN() + 9;
    block(&[signal]);
    let ((tell, told), (go, wait)) = (std::sync::mpsc::channel(), std::sync::mpsc::channel::<()>());
    let thread = std::thread::spawn(move || {
        let _ = tell.send(unsafe { libc::gettid() });
        let _ = wait.recv();
        let mut rung = vec![0; TIMERS];
        while rung.contains(&0) {
            let Some(timer) = value_of_next(signal) else { break };
            rung[timer] += 1;
        }
        // Nor does one ring again.
        while poll_for(&[signal]).is_some() {
            rung[0] += 1;
        }
        rung
    });
    let thread_id = told.recv().map_err(|e| e.to_string())?;
    for number in 0..TIMERS as i64 {
        let id = timer(libc::CLOCK_MONOTONIC, notify, signal, number as u64, thread_id)?;
        let after = (number + 1) * 2_000_000;
        set_timer(id, 0, [0, 0, after / 1_000_000_000, after % 1_000_000_000])?;
    }
    hold_loosely()?;
    drop(go);
    let rung = thread.join().map_err(|_| "the thread panicked".to_string())?;
    let odd: Vec<(usize, i32)> = rung.into_iter().enumerate().filter(|(_, times)| *times != 1).collect();
    check(odd.is_empty(), format!("timers and how often they rang, if not once: {odd:?}"))
}

/// The value that comes with the next such signal; none if none comes for a minute.
fn value_of_next(signal: i32) -> Option<usize> {
    let minute = libc::timespec { tv_sec: 60, tv_nsec: 0 };
    unsafe {
        let (mut set, mut info): (libc::sigset_t, libc::siginfo_t) = std::mem::zeroed();
        libc::sigaddset(&raw mut set, signal);
        let came = libc::sigtimedwait(&raw const set, &raw mut info, &raw const minute);
        (came == signal).then(|| info.si_value().sival_ptr as usize)
    }
}

/// Passes signals on until nobody listens.
fn pass_on(signal: i32, tell: std::sync::mpsc::Sender<i32>) {
    while tell.send(wait_for(&[signal])).is_ok() {}
}
