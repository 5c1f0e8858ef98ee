//! A program that watches itself all the while, in every thread: whatever happens to whoever holds it, no thread may see
//! anything of it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use crate::stage::*;

pub(crate) const KINDS: &[crate::stage::Kind] =
    &[("survivor", survivor), ("respawner", respawner), ("fork-storm", fork_storm), ("thread-storm", thread_storm)];

static STOP: AtomicBool = AtomicBool::new(false);

fn goes_on() -> bool {
    !STOP.load(Ordering::Relaxed)
}

/// Keeps a child with many threads, beside others; when somebody kills it there is soon another.
fn respawner() -> Checked {
    let child = |threads| {
        fork(move || {
            (0..threads).for_each(|_| drop(std::thread::spawn(await_go)));
            await_go();
            Ok(())
        })
    };
    let others = [child(10)?, child(20)?, child(30)?, child(0)?];
    let first = child(40)?;
    let keeper = std::thread::spawn(move || {
        let mut pid = first;
        loop {
            match status_of(pid)? {
                0 => return Ok(()),
                status if libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGKILL => pid = child(40)?,
                status => return equal("the child's status", status, 0),
            }
        }
    });
    hold_loosely()?;
    others.into_iter().try_for_each(reap)?;
    keeper.join().map_err(|_| "a thread panicked")?
}

/// Processes that do nothing but have children, which have children, and wait for them.
fn fork_storm() -> Checked {
    const STORMS: usize = 3;
    let begun = Gate::new()?;
    let storm = || {
        for round in 0.. {
            let child = fork(|| {
                reap(fork(|| Ok(()))?)?;
                unsafe { libc::_exit(round % 251) }
            })?;
            equal("how a child ended", status_of(child)?, (round % 251) << 8)?;
            if round == 10 {
                begun.open()?;
            }
            if std::path::Path::new(ON).exists() {
                return Ok(());
            }
        }
        Ok(())
    };
    let storms: Vec<i32> = (0..STORMS).map(|_| fork(storm)).collect::<Result<_, _>>()?;
    begun.pass(STORMS)?;
    hold_loosely()?;
    storms.into_iter().try_for_each(reap)
}

/// Threads that do nothing but have other threads, and wait for them.
fn thread_storm() -> Checked {
    const STORMS: usize = 3;
    let begun = Gate::new()?;
    let storm = |_| {
        std::thread::spawn(move || {
            for round in 0u64.. {
                let thread = std::thread::spawn(move || round * 7);
                equal("what a thread gave", thread.join().map_err(|_| "a thread panicked")?, round * 7)?;
                if round == 10 {
                    begun.open()?;
                }
                if round > 10 && !goes_on() {
                    return Ok(());
                }
            }
            Ok(())
        })
    };
    let storms: Vec<JoinHandle<Checked>> = (0..STORMS).map(storm).collect();
    begun.pass(STORMS)?;
    hold_loosely()?;
    STOP.store(true, Ordering::SeqCst);
    storms.into_iter().try_for_each(|storm| storm.join().map_err(|_| "a thread panicked")?)
}

fn survivor() -> Checked {
    let (there, back) = (Gate::new()?, Gate::new()?);
    let mut threads = vec![
        std::thread::spawn(sums),
        std::thread::spawn(vectors),
        std::thread::spawn(sleeps),
        std::thread::spawn(move || plays(there, back)),
        std::thread::spawn(move || plays(back, there)),
        std::thread::spawn(signals_itself),
    ];
    threads.extend(contenders());
    there.open()?;
    hold_loosely()?;
    STOP.store(true, Ordering::SeqCst);
    // Whichever waits for the other.
    there.open()?;
    back.open()?;
    threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| "a thread panicked")?)
}

/// Sums that are known, in registers.
fn sums() -> Checked {
    while goes_on() {
        let sum = (1..=200_000u64).fold(0u64, |sum, number| std::hint::black_box(sum + number));
        equal("a sum", sum, 20_000_100_000)?;
    }
    Ok(())
}

fn vectors() -> Checked {
    let numbers: Vec<f64> = (0..4096).map(f64::from).collect();
    while goes_on() {
        let squares: f64 = std::hint::black_box(&numbers).iter().map(|x| x * x).sum();
        equal("a sum of squares", squares, 22_898_104_320.0)?;
    }
    Ok(())
}

/// No sleep is interrupted, none is too short.
fn sleeps() -> Checked {
    while goes_on() {
        let begin = crate::clocks::now(libc::CLOCK_MONOTONIC);
        let time = libc::timespec { tv_sec: 0, tv_nsec: 3_000_000 };
        let result = unsafe { libc::nanosleep(&raw const time, std::ptr::null_mut()) };
        equal("a sleep", (result, crate::clocks::now(libc::CLOCK_MONOTONIC) - begin >= 3_000_000), (0, true))?;
    }
    Ok(())
}

/// Passes a byte to and fro.
fn plays(from: Gate, to: Gate) -> Checked {
    while goes_on() {
        from.pass(1)?;
        to.open()?;
    }
    Ok(())
}

/// Every queued signal arrives, in order.
fn signals_itself() -> Checked {
    let signal = libc::SIGRTMIN() + 9;
    crate::signals::block(&[signal]);
    let itself = unsafe { libc::pthread_self() };
    for number in 0.. {
        let value = libc::sigval { sival_ptr: number as *mut libc::c_void };
        equal("queueing a signal", unsafe { libc::pthread_sigqueue(itself, signal, value) }, 0)?;
        equal("a queued signal", crate::signals::wait_for(&[signal]), signal)?;
        if !goes_on() {
            break;
        }
    }
    Ok(())
}

/// Threads that count under one lock: the counts add up.
fn contenders() -> Vec<JoinHandle<Checked>> {
    let total = Arc::new(Mutex::new(0u64));
    let separate = Arc::new(AtomicU64::new(0));
    let one = |_| {
        let (total, separate) = (Arc::clone(&total), Arc::clone(&separate));
        std::thread::spawn(move || {
            while goes_on() {
                let mut total = total.lock().map_err(|e| e.to_string())?;
                *total += 1;
                equal("a count", separate.fetch_add(1, Ordering::SeqCst) + 1, *total)?;
            }
            Ok(())
        })
    };
    (0..4).map(one).collect()
}
