//! A server whose threads read clocks through the vDSO without a pause: `clock-server [THREADS]`.
//!
//! It answers each line at port 80 with that line, how often clocks have been read, and whether one ever stepped back or
//! disagreed with the kernel's own answer.

#![allow(missing_docs)]

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Result;
use nix::time::{ClockId, clock_gettime};

/// Those that a pod keeps going wherever it runs.
const CLOCKS: [ClockId; 3] = [ClockId::CLOCK_MONOTONIC, ClockId::CLOCK_BOOTTIME, ClockId::CLOCK_MONOTONIC_COARSE];
/// Nanoseconds by which a coarse clock may be behind a precise one: 0.11 s were seen on a machine that was starved.
const BEHIND: i64 = 5_000_000_000;

static READS: AtomicU64 = AtomicU64::new(0);
static WRONG: OnceLock<String> = OnceLock::new();

fn now(clock: ClockId) -> i64 {
    clock_gettime(clock).map_or(-1, |time| time.tv_sec() * 1_000_000_000 + time.tv_nsec())
}

fn watch() {
    let mut last = CLOCKS.map(now);
    loop {
        for (clock, last) in CLOCKS.into_iter().zip(&mut last) {
            let now = now(clock);
            if now < *last {
                WRONG.get_or_init(|| format!("{clock} went from {last} to {now}"));
            }
            *last = now;
        }
        // It may have moved since it was read precisely.
        let ([before, _, coarse], after) = (last, now(ClockId::CLOCK_MONOTONIC));
        if coarse < before - BEHIND || coarse > after {
            WRONG.get_or_init(|| format!("CLOCK_MONOTONIC went from {before} to {after}, by way of a coarse {coarse}"));
        }
        READS.fetch_add(CLOCKS.len() as u64, Ordering::Relaxed);
    }
}

fn answer(stream: &TcpStream) -> Result<()> {
    stream.set_nodelay(true)?;
    for line in BufReader::new(stream).lines() {
        let (reads, wrong) = (READS.load(Ordering::Relaxed), WRONG.get());
        let verdict = wrong.map_or("right", String::as_str);
        (&*stream).write_all(format!("{} {reads} {verdict}\n", line?).as_bytes())?;
    }
    Ok(())
}

fn main() -> Result<()> {
    let threads = std::env::args().nth(1).map_or(Ok(2), |text| text.parse())?;
    (0..threads).for_each(|_| drop(std::thread::spawn(watch)));
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 80))?;
    println!("ready");
    for stream in listener.incoming() {
        let stream = stream?;
        std::thread::spawn(move || answer(&stream));
    }
    Ok(())
}
