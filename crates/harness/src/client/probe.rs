//! How long a client goes without an answer.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

use super::{Connection, HttpError};
use crate::lab::Netns;

/// What a [`Prober`] saw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gaps {
    /// The longest time from one answer to the next.
    pub longest: Duration,
    /// The median of these times: what the longest is to be seen against.
    pub typical: Duration,
    /// How many answers came.
    pub answers: usize,
    /// When each answer came since the prober was started, and how long after the one before; nothing of a viewer.
    pub timeline: Vec<(Duration, Duration)>,
}

/// A client that asks one small file after another, over one connection, as fast as the answers come.
#[derive(Debug)]
pub struct Prober {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Vec<(Duration, Duration)>, HttpError>>,
}

impl Prober {
    /// Starts asking from the network namespace `from`; returns once the first answer has come.
    pub fn start(from: &Netns, to: SocketAddr, patience: Duration) -> Result<Self> {
        let mut connection = from.enter(|| Connection::open(to, patience))??;
        connection.get_file("1k.bin")?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut gaps = Vec::new();
            let begun = Instant::now();
            let mut last = begun;
            // The first in any case: on a busy machine somebody may have enough before there was one.
            while gaps.is_empty() || !stopped.load(Ordering::Relaxed) {
                connection.get_file("1k.bin")?;
                let now = Instant::now();
                gaps.push((now - begun, now - last));
                last = now;
            }
            Ok(gaps)
        });
        Ok(Self { stop, thread })
    }

    /// Stops asking and says how long the pauses were.
    pub fn finish(self) -> Result<Gaps> {
        self.stop.store(true, Ordering::Relaxed);
        let timeline = self.thread.join().map_err(|_| anyhow!("the prober panicked"))??;
        let mut gaps: Vec<Duration> = timeline.iter().map(|(_, gap)| *gap).collect();
        gaps.sort();
        let longest = *gaps.last().ok_or_else(|| anyhow!("no answer came while the prober ran"))?;
        Ok(Gaps { longest, typical: gaps[gaps.len() / 2], answers: gaps.len(), timeline })
    }
}
