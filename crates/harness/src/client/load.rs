//! As many requests as a server can take, in short bursts, so that two servers can take turns.
//!
//! A machine's speed drifts by a tenth within seconds, and how a server's processes happen to share out its connections
//! matters as much. What tells servers apart by a percent is to ask them in turns many times a second, over connections
//! that are opened anew again and again.

use std::io::{ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::connection::{parse_chunks, parse_head};
use super::{Connection, content};
use crate::lab::{Netns, PATIENCE};
use crate::stats::quantile_sorted;

/// Names of what [`Burst::latencies_us`] gives.
pub const LATENCIES: [&str; 4] = ["latency_p50", "latency_p90", "latency_p99", "latency_max"];

/// What came of a burst.
#[derive(Clone, Debug, Default)]
pub struct Burst {
    /// Requests answered within its time, every byte right.
    pub answered: usize,
    /// Its time: what was asked for, or until the first answer, where that came later. A burst without an answer would say
    /// that a server which takes its time never answers.
    pub duration: Duration,
    /// Microseconds that each request took, those included that were answered after it.
    pub latencies: Vec<f64>,
    /// Connections that the server closed between two requests, as HTTP allows it to. Each was opened anew.
    pub closed: usize,
}

impl Burst {
    /// Counts another burst in.
    pub fn add(&mut self, other: Burst) {
        self.answered += other.answered;
        self.duration += other.duration;
        self.latencies.extend(other.latencies);
        self.closed += other.closed;
    }

    /// Requests answered in a second.
    pub fn requests_per_second(&self) -> f64 {
        self.answered as f64 / self.duration.as_secs_f64()
    }

    /// Latencies as in [`LATENCIES`]: median, 90th, 99th percentile, longest.
    pub fn latencies_us(&self) -> Option<[f64; 4]> {
        let mut sorted = self.latencies.clone();
        sorted.sort_by(f64::total_cmp);
        let of = |q| quantile_sorted(&sorted, q);
        Some([of(0.5)?, of(0.9)?, of(0.99)?, of(1.0)?])
    }
}

/// Connections to one server, each with a request on its way for as long as a burst lasts.
#[derive(Debug)]
pub struct Driver<'a> {
    from: &'a Netns,
    to: SocketAddr,
    name: &'static str,
    expected: Expected,
    slots: Vec<Slot>,
    epoll: Epoll,
}

/// What an answer has to be.
#[derive(Debug)]
enum Expected {
    /// These bytes.
    Bytes(Vec<u8>),
    /// What a script says, whatever that is.
    Anything,
}

/// A connection and its request.
#[derive(Debug)]
struct Slot {
    connection: Connection,
    answer: Vec<u8>,
    asked: Option<Instant>,
}

impl<'a> Driver<'a> {
    /// Opens `connections` to the server at `to`, from the network namespace `from`, to ask for the file `name` of the site, or
    /// for what a script below `cgi/` says.
    pub fn open(from: &'a Netns, to: SocketAddr, name: &'static str, connections: usize) -> Result<Self> {
        let expected = match content::size_of(name) {
            Some(size) => {
                let mut bytes = vec![0; size as usize];
                content::fill(size, 0, &mut bytes);
                Expected::Bytes(bytes)
            }
            None if name.starts_with("cgi/") => Expected::Anything,
            None => bail!("the site has no file {name}"),
        };
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("making an epoll")?;
        let mut driver = Self { from, to, name, expected, slots: Vec::new(), epoll };
        let opened: Result<Vec<_>, _> =
            from.enter(|| (0..connections).map(|_| Connection::open(to, PATIENCE)).collect())?;
        for connection in opened? {
            driver.slots.push(Slot { connection, answer: Vec::new(), asked: None });
            driver.watch(driver.slots.len() - 1)?;
        }
        Ok(driver)
    }

    /// Keeps a request on its way over every connection for `duration`, or until the first is answered, and waits for the
    /// last answers.
    pub fn burst(&mut self, duration: Duration) -> Result<Burst> {
        let mut burst = Burst { duration, ..Burst::default() };
        let start = Instant::now();
        let mut open = self.slots.len();
        (0..self.slots.len()).try_for_each(|slot| self.ask(slot, &mut burst))?;
        let mut ready = [EpollEvent::empty(); 64];
        while open > 0 {
            let timeout = EpollTimeout::try_from(PATIENCE).unwrap_or(EpollTimeout::NONE);
            let n = self.epoll.wait(&mut ready, timeout).context("waiting for answers")?;
            ensure!(n > 0, "{open} requests to {} were not answered within {} s", self.to, PATIENCE.as_secs());
            for event in &ready[..n] {
                let slot = event.data() as usize;
                if !self.read(slot, &mut burst)? {
                    continue;
                }
                let elapsed = start.elapsed();
                if burst.answered == 0 {
                    burst.duration = duration.max(elapsed);
                }
                burst.answered += usize::from(elapsed <= burst.duration);
                if elapsed < duration {
                    self.ask(slot, &mut burst)?;
                } else {
                    open -= 1;
                }
            }
        }
        Ok(burst)
    }

    /// Sends the request of a connection. One that the server has closed meanwhile is opened anew.
    fn ask(&mut self, slot: usize, burst: &mut Burst) -> Result<()> {
        let request = format!("GET /{} HTTP/1.1\r\nHost: pod\r\n\r\n", self.name);
        let Slot { connection, answer, asked } = &mut self.slots[slot];
        answer.clear();
        *asked = Some(Instant::now());
        match connection.stream().write_all(request.as_bytes()) {
            Ok(()) => Ok(()),
            Err(e) if is_closed(&e) => self.reopen(slot, burst),
            Err(e) => Err(e).with_context(|| format!("asking {}", self.to)),
        }
    }

    /// Reads what has come over a connection; whether its answer is complete.
    fn read(&mut self, slot: usize, burst: &mut Burst) -> Result<bool> {
        let mut chunk = [0; 16 << 10];
        let Slot { connection, answer, asked } = &mut self.slots[slot];
        let unasked = asked.is_none();
        match connection.stream().read(&mut chunk) {
            Ok(0) if answer.is_empty() || unasked => return self.reopen(slot, burst).map(|()| false),
            Ok(0) => bail!("{} closed a connection in the middle of an answer", self.to),
            Ok(n) => answer.extend_from_slice(&chunk[..n]),
            Err(e) if is_closed(&e) && (answer.is_empty() || unasked) => {
                return self.reopen(slot, burst).map(|()| false);
            }
            Err(e) => return Err(e).with_context(|| format!("reading an answer of {}", self.to)),
        }
        let Some(head) = parse_head(self.name, answer)? else { return Ok(false) };
        ensure!(head.status == 200, "{} answered with status {}", self.to, head.status);
        let rest = &answer[head.bytes..];
        let chunks;
        let body = match head.length {
            Some(length) if (rest.len() as u64) < length => return Ok(false),
            Some(_) => rest,
            None => match parse_chunks(self.name, rest)? {
                Some((body, _)) => {
                    chunks = body;
                    &chunks
                }
                None => return Ok(false),
            },
        };
        let right = match &self.expected {
            Expected::Bytes(bytes) => body == bytes,
            Expected::Anything => !body.is_empty(),
        };
        ensure!(right, "{} answered with other bytes than {} has", self.to, self.name);
        burst.latencies.extend(asked.take().map(|asked| asked.elapsed().as_secs_f64() * 1e6));
        Ok(true)
    }

    /// A server may close a connection on which nothing is asked, and the next request may cross that on its way. The
    /// request, if there was one, is sent again over a new one, and the time goes on.
    fn reopen(&mut self, slot: usize, burst: &mut Burst) -> Result<()> {
        burst.closed += 1;
        let asked = self.slots[slot].asked;
        let _ = self.epoll.delete(self.slots[slot].connection.stream());
        self.slots[slot].connection = self.from.enter(|| Connection::open(self.to, PATIENCE))??;
        self.watch(slot)?;
        if asked.is_some() {
            self.ask(slot, burst)?;
            self.slots[slot].asked = asked;
        }
        Ok(())
    }

    fn watch(&self, slot: usize) -> Result<()> {
        let event = EpollEvent::new(EpollFlags::EPOLLIN, slot as u64);
        self.epoll.add(self.slots[slot].connection.stream().as_fd(), event).context("watching a connection")
    }
}

fn is_closed(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn answer() -> Vec<u8> {
        let mut body = vec![0; 1024];
        content::fill(1024, 0, &mut body);
        [b"HTTP/1.1 200 OK\r\nContent-Length: 1024\r\n\r\n".to_vec(), body].concat()
    }

    /// Serves connections one after the other in `netns`; the first is closed after `first` answers.
    fn serve(netns: &Netns, answer: Vec<u8>, first: usize) -> SocketAddr {
        let listener = netns.enter(|| TcpListener::bind("127.0.0.1:0")).unwrap().unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            let mut left = first;
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut request = [0; 1024];
                while left > 0 && matches!(stream.read(&mut request), Ok(1..)) {
                    stream.write_all(&answer).unwrap();
                    left -= 1;
                }
                left = usize::MAX;
            }
        });
        address
    }

    #[test]
    fn requests_are_counted_and_timed() {
        let netns = Netns::new().unwrap();
        let mut driver = Driver::open(&netns, serve(&netns, answer(), usize::MAX), "1k.bin", 1).unwrap();
        let burst = driver.burst(Duration::from_secs(1)).unwrap();
        assert!(burst.answered > 0 && burst.latencies.len() == burst.answered + 1, "{burst:?}");
        assert!(burst.latencies_us().unwrap().is_sorted());
        assert_eq!(burst.closed, 0);
    }

    #[test]
    fn what_is_answered_late_is_answered() {
        let netns = Netns::new().unwrap();
        let listener = netns.enter(|| TcpListener::bind("127.0.0.1:0")).unwrap().unwrap();
        let mut driver = Driver::open(&netns, listener.local_addr().unwrap(), "1k.bin", 1).unwrap();
        let asked_for = Duration::from_millis(10);
        let late = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.read_exact(&mut [0; 16]).unwrap();
            std::thread::sleep(asked_for);
            stream.write_all(&answer()).unwrap();
            stream
        });
        let burst = driver.burst(asked_for).unwrap();
        assert!(burst.answered == 1 && burst.latencies.len() == 1 && burst.duration > asked_for, "{burst:?}");
        late.join().unwrap();
    }

    #[test]
    fn a_closed_connection_is_opened_anew_and_counted() {
        let netns = Netns::new().unwrap();
        let mut driver = Driver::open(&netns, serve(&netns, answer(), 3), "1k.bin", 1).unwrap();
        let burst = driver.burst(Duration::from_secs(1)).unwrap();
        assert!(burst.answered > 3, "{burst:?}");
        assert_eq!(burst.closed, 1);
    }

    #[test]
    fn a_wrong_byte_is_an_error() {
        let netns = Netns::new().unwrap();
        let mut wrong = answer();
        wrong[600] ^= 1;
        let mut driver = Driver::open(&netns, serve(&netns, wrong, usize::MAX), "1k.bin", 1).unwrap();
        assert!(driver.burst(Duration::from_secs(1)).unwrap_err().to_string().contains("other bytes"));
    }
}
