//! How long a client goes without an answer.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use nix::sys::socket::{setsockopt, sockopt};

use super::{Connection, Download, HttpError};
use crate::lab::Netns;

/// What is asked for, one after the other.
const SMALL: &str = "1k.bin";
const LARGE: &str = "100m.bin";

/// What somebody saw of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gaps {
    /// The longest time from one answer to the next.
    pub longest: Duration,
    /// The median of these times: what the longest is to be seen against.
    pub typical: Duration,
    /// How many answers came.
    pub answers: usize,
    /// When each answer came since the beginning, and how long after the one before.
    pub timeline: Vec<(Duration, Duration)>,
}

impl Gaps {
    /// Of answers that came then, each so long after the one before. `None` if there was none.
    pub fn of(timeline: Vec<(Duration, Duration)>) -> Option<Self> {
        let mut gaps: Vec<Duration> = timeline.iter().map(|(_, gap)| *gap).collect();
        gaps.sort();
        let longest = *gaps.last()?;
        Some(Self { longest, typical: gaps[gaps.len() / 2], answers: gaps.len(), timeline })
    }

    /// Answers a second from one moment to another, both since the beginning.
    pub fn rate(&self, from: Duration, to: Duration) -> f64 {
        let answers = self.timeline.iter().filter(|(at, _)| (from..to).contains(at)).count();
        answers as f64 / to.saturating_sub(from).as_secs_f64()
    }
}

/// What a reader's kernel keeps of a stream: what it has ready hides a pause of the sender.
const KEPT: usize = 64 << 10;

/// A client of one connection that asks again and again.
#[derive(Debug)]
pub struct Prober {
    begun: Instant,
    stop: Arc<AtomicBool>,
    first: Receiver<()>,
    thread: JoinHandle<Result<Vec<(Duration, Duration)>, HttpError>>,
}

impl Prober {
    /// Starts asking for one small file after another from the network namespace `from`, as fast as the answers come; returns
    /// once the first has come.
    pub fn start(from: &Netns, to: SocketAddr, patience: Duration) -> Result<Self> {
        Self::paced(from, to, patience, Duration::ZERO)
    }

    /// The same, with a pause after each answer: the machine has time for others.
    pub fn paced(from: &Netns, to: SocketAddr, patience: Duration, pause: Duration) -> Result<Self> {
        let mut connection = from.enter(|| Connection::open(to, patience))??;
        connection.get_file(SMALL)?;
        Ok(Self::ask(pause, move || connection.get_file(SMALL)))
    }

    /// Starts reading a stream of bytes, one large file after another: every part that comes is an answer.
    pub fn stream(from: &Netns, to: SocketAddr, patience: Duration) -> Result<Self> {
        let connection = from.enter(|| Connection::open(to, patience))??;
        setsockopt(connection.stream(), sockopt::RcvBuf, &KEPT)?;
        let mut stream = Stream { download: Some(connection.download(LARGE)?) };
        stream.advance()?;
        Ok(Self::ask(Duration::ZERO, move || stream.advance()))
    }

    fn ask(pause: Duration, mut next: impl FnMut() -> Result<(), HttpError> + Send + 'static) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let (came, first) = channel();
        let begun = Instant::now();
        let thread = std::thread::spawn(move || {
            let (mut gaps, mut last) = (Vec::new(), begun);
            // The first in any case: on a busy machine somebody may have enough before there was one.
            while gaps.is_empty() || !stopped.load(Ordering::Relaxed) {
                next()?;
                let now = Instant::now();
                gaps.push((now - begun, now - last));
                last = now;
                if gaps.len() == 1 {
                    let _ = came.send(());
                }
                if !pause.is_zero() {
                    std::thread::sleep(pause);
                }
            }
            Ok(gaps)
        });
        Self { begun, stop, first, thread }
    }

    /// How long it has asked.
    pub fn elapsed(&self) -> Duration {
        self.begun.elapsed()
    }

    /// Waits for the first answer to what it has asked since then, once. Where none comes, [`finish`](Self::finish) says why.
    pub fn await_first(&self) {
        let _ = self.first.recv();
    }

    /// Stops asking and says how long the pauses were.
    pub fn finish(self) -> Result<Gaps> {
        self.stop.store(true, Ordering::Relaxed);
        let timeline = self.thread.join().map_err(|_| anyhow!("the prober panicked"))??;
        Gaps::of(timeline).ok_or_else(|| anyhow!("no answer came while the prober ran"))
    }
}

/// A file that is read for ever.
#[derive(Debug)]
struct Stream {
    /// Always there between two calls that succeed.
    download: Option<Download>,
}

impl Stream {
    /// Reads what has come, or waits for more.
    fn advance(&mut self) -> Result<(), HttpError> {
        let Some(mut download) = self.download.take() else { return Ok(()) };
        if download.missing() == 0 {
            download = download.finish()?.download(LARGE)?;
        }
        download.advance(1)?;
        self.download = Some(download);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_counted_between_two_moments() {
        let ms = Duration::from_millis;
        let timeline = [10, 20, 30, 500, 510].windows(2).map(|at| (ms(at[1]), ms(at[1] - at[0]))).collect();
        let gaps = Gaps::of(timeline).unwrap();
        assert_eq!((gaps.longest, gaps.typical, gaps.answers), (ms(470), ms(10), 4));
        assert_eq!((gaps.rate(ms(0), ms(100)), gaps.rate(ms(500), ms(600))), (20.0, 20.0));
        assert_eq!(Gaps::of(Vec::new()), None);
    }
}
