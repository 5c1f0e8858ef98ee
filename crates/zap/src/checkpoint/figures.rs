//! What a checkpoint, or a restart, took.

use std::time::Instant;

use serde::{Deserialize, Serialize};

/// How long a phase took.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Phase {
    /// Its name, as `--stats` prints it.
    pub name: String,
    /// Microseconds.
    pub us: u64,
}

/// Figures of a finished checkpoint. Times are whole microseconds, sizes bytes.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Stats {
    /// The sum of `holds_us`.
    pub downtime_us: u64,
    /// Each time that the pod was held, from the first process held to the last let go.
    pub holds_us: Vec<u64>,
    /// From the request to the finished image.
    pub total_us: u64,
    /// hold, look, memory, files, write, let-go.
    pub phases: Vec<Phase>,
    /// Size of the image.
    pub bytes: u64,
    /// Pages of memory in it.
    pub pages: u64,
    /// Processes in it.
    pub processes: u64,
    /// Threads in it.
    pub threads: u64,
    /// Times that memory was looked through: the last one with the pod held.
    #[serde(default)]
    pub rounds: u64,
}

/// Laps of a checkpoint or restart.
pub(crate) struct Clock {
    start: Instant,
    last: Instant,
    hold: Option<Instant>,
    /// Holds that ended before anything was looked at, in microseconds.
    cut_short: Vec<u64>,
    phases: Vec<Phase>,
}

impl Clock {
    pub(crate) fn start() -> Clock {
        let now = Instant::now();
        Clock { start: now, last: now, hold: None, cut_short: Vec::new(), phases: Vec::new() }
    }

    pub(super) fn begin_hold(&mut self) {
        let now = Instant::now();
        (self.last, self.hold) = (now, Some(now));
    }

    /// The pod runs again, nothing having been looked at.
    pub(super) fn end_hold(&mut self) {
        self.cut_short.push(self.held());
        self.hold = None;
    }

    /// Microseconds since the hold began.
    pub(super) fn held(&self) -> u64 {
        self.hold.map_or(0, |begin| begin.elapsed().as_micros() as u64)
    }

    /// Microseconds from the beginning of the hold until then.
    pub(super) fn held_until(&self, then: Instant) -> u64 {
        self.hold.map_or(0, |begin| then.duration_since(begin).as_micros() as u64)
    }

    /// Ends the phase of that name.
    pub(crate) fn lap(&mut self, name: &str) {
        let now = Instant::now();
        let us = (now - self.last).as_micros() as u64;
        tracing::debug!(phase = name, us);
        self.phases.push(Phase { name: name.to_owned(), us });
        self.last = now;
    }

    pub(crate) fn phases(&self) -> &[Phase] {
        &self.phases
    }

    pub(crate) fn finish(self) -> (Vec<Phase>, u64) {
        (self.phases, self.start.elapsed().as_micros() as u64)
    }

    pub(super) fn into_stats(self, mut stats: Stats) -> Stats {
        stats.holds_us.splice(..0, self.cut_short.iter().copied());
        (stats.phases, stats.total_us) = self.finish();
        stats.downtime_us = stats.holds_us.iter().sum();
        stats
    }
}
