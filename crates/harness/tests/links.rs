//! Pods that move over links of every speed, from 10 Mbit/s to 10 Gbit/s, while somebody talks to them: what was said is right,
//! and a peer's wire shows retransmissions at most.

#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use harness::client::{Seen, Trace};
use harness::lab::{Lab, PATIENCE, Pair, Way, options_of as options, served_at, wait_until};

const STRATEGIES: [&str; 4] = ["stop-and-copy", "pre-copy", "copy-on-reference", "flush"];

fn connect(from: &Lab, to: SocketAddr) -> Result<TcpStream> {
    let connect = || TcpStream::connect_timeout(&to, PATIENCE);
    let stream = from.client().enter(connect)?.with_context(|| format!("connecting to {to}"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Somebody who talks until it is enough; how often an answer came.
fn talking<T>(
    talk: impl Fn(&AtomicBool) -> Result<u64> + Sync,
    meanwhile: impl FnOnce() -> Result<T>,
) -> Result<(u64, T)> {
    let enough = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let talker = scope.spawn(|| talk(&enough));
        let done = meanwhile();
        enough.store(true, Ordering::SeqCst);
        let answers = talker.join().unwrap().context("the conversation");
        // Why it broke off says more than that it did.
        let done = done?;
        Ok((answers?, done))
    })
}

/// Questions that are asked in any case, however fast a pod moves: each takes two segments at least.
const QUESTIONS: u64 = 600;

/// Asks one question after the other; each is answered.
fn ask_clocks(stream: &TcpStream, enough: &AtomicBool) -> Result<u64> {
    let mut answers = BufReader::new(stream).lines();
    let mut asked = 0;
    while asked < QUESTIONS || !enough.load(Ordering::SeqCst) {
        asked += 1;
        (&*stream).write_all(format!("{asked}\n").as_bytes())?;
        let line = answers.next().context("the end")??;
        let right = line.starts_with(&format!("{asked} ")) && line.ends_with(" right");
        ensure!(right, "question {asked} is answered by {line:?}");
        // Often enough to be there whatever happens; more would be a load on whoever moves the pod.
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(asked)
}

/// Megabits a second, one hop each, there and back in a row.
const HOPS: [u64; 10] = [10, 10_000, 1000, 100, 10, 1000, 10_000, 100, 1000, 10];

fn ten_hops(pair: &Pair) -> Result<(Seen, u16, SocketAddr)> {
    let store = pair.first.directory().join("store");
    std::fs::create_dir(&store)?;
    pair.first.zap(&["run", "-d", "-n", "clock", "--", env!("CARGO_BIN_EXE_clock-server"), "1"])?;
    pair.first.attach_client()?;
    let address = pair.first.pod("clock")?.served_at()?;
    let trace = Trace::start(pair.first.client())?;
    let stream = wait_until("the server to listen", || connect(&pair.first, address))?;
    let hop = |(hop, rate): (usize, u64)| -> Result<()> {
        pair.shape(Some(rate))?;
        let options = options(STRATEGIES[hop % 4], &store);
        let (pod, stats) = pair.migrate(hop.is_multiple_of(2), "clock", Way::Link, &options)?;
        ensure!(pod.served_at()? == address, "it has another address: {:?}", pod.served_at()?);
        eprintln!("hop {hop} at {rate} Mbit/s, {}: {stats:?}", STRATEGIES[hop % 4]);
        Ok(())
    };
    let hops =
        || HOPS.into_iter().enumerate().try_for_each(|each| hop(each).with_context(|| format!("hop {}", each.0)));
    let (answers, ()) = talking(|enough| ask_clocks(&stream, enough), hops)?;
    eprintln!("{answers} answers");
    ensure!(pair.second.pods()?.is_empty(), "something is left: {:?}", pair.second.pods()?);
    Ok((trace.finish()?, stream.local_addr()?.port(), address))
}

#[test]
fn a_peer_sees_ten_hops_over_slow_and_fast_links_as_pauses() {
    let pair = Pair::new().unwrap();
    let (seen, port, address) = ten_hops(&pair).unwrap();
    let segments = seen.check_connection(port).unwrap();
    assert!(segments > 1000, "only {segments} segments were seen");
    let std::net::IpAddr::V4(address) = address.ip() else { panic!("{address}") };
    // Each destination has said so to all, and no switch or neighbour has to find out.
    let announcements = seen.announcements(address).unwrap();
    assert!(announcements >= HOPS.len(), "it was announced {announcements} times");
    assert!(seen.advertisements() >= HOPS.len(), "it was advertised {} times", seen.advertisements());
}

/// A client of Redis.
struct Redis {
    stream: BufReader<TcpStream>,
}

impl Redis {
    fn open(lab: &Lab, to: SocketAddr) -> Result<Self> {
        Ok(Self { stream: BufReader::new(connect(lab, to)?) })
    }

    fn port(&self) -> Result<u16> {
        Ok(self.stream.get_ref().local_addr()?.port())
    }

    /// What it answers to a command.
    fn ask(&mut self, words: &[&str]) -> Result<String> {
        let mut said = format!("*{}\r\n", words.len());
        words.iter().for_each(|word| said += &format!("${}\r\n{word}\r\n", word.len()));
        self.stream.get_mut().write_all(said.as_bytes())?;
        let mut line = String::new();
        ensure!(self.stream.read_line(&mut line)? > 0, "it ended the connection");
        let (kind, rest) = line.trim_end().split_at(1);
        match kind {
            "+" | ":" => Ok(rest.to_owned()),
            "$" => {
                let mut bytes = vec![0; rest.parse::<usize>()? + 2];
                self.stream.read_exact(&mut bytes)?;
                bytes.truncate(bytes.len() - 2);
                Ok(String::from_utf8(bytes)?)
            }
            _ => bail!("{} is answered by {line:?}", words[0]),
        }
    }

    /// Counts, and writes and reads all over its memory; every answer must be right.
    fn load(&mut self, name: &str, enough: &AtomicBool) -> Result<u64> {
        let mut count = 0u64;
        while !enough.load(Ordering::SeqCst) {
            count += 1;
            let counted = self.ask(&["INCR", name])?;
            ensure!(counted == count.to_string(), "{counted} came after {}", count - 1);
            let (key, value) = (format!("{name}:{}", count % 1009), format!("{count:0>200}"));
            ensure!(self.ask(&["SET", &key, &value])? == "OK");
            let read = self.ask(&["GET", &key])?;
            ensure!(read == value, "{key} is {read:?}, not {value:?}");
            let place = count.wrapping_mul(7919) % KEYS;
            let old = self.ask(&["STRLEN", &format!("key:{place}")])?;
            ensure!(old == "1000", "key:{place} has {old} bytes");
            // Memory that was there is written to.
            ensure!(self.ask(&["SETRANGE", &format!("key:{place}"), "500", &value])? == "1000");
        }
        Ok(count)
    }
}

/// As many as make half a GiB, with a thousand bytes each.
const KEYS: u64 = 430_000;

fn redis_moves(pair: &Pair) -> Result<()> {
    let store = pair.first.directory().join("store");
    std::fs::create_dir(&store)?;
    let command = "redis-server --port 80 --protected-mode no --dir /tmp --enable-debug-command yes";
    let words = ["run", "-d", "-n", "redis", "--"].into_iter().chain(command.split(' ')).chain(["--save", ""]);
    pair.first.zap(&words.collect::<Vec<_>>())?;
    pair.first.attach_client()?;
    let address: Ipv4Addr = pair.first.pods()?[0].address.clone().context("it has no address")?.parse()?;
    let address = served_at(address);
    let mut here = wait_until("Redis to listen", || Redis::open(&pair.first, address))?;
    here.ask(&["DEBUG", "POPULATE", &KEYS.to_string(), "key", "1000"])?;
    let trace = Trace::start(pair.first.client())?;
    let mut talker = Redis::open(&pair.first, address)?;
    let port = talker.port()?;
    let talker = std::sync::Mutex::new(&mut talker);
    for (hop, (strategy, rate)) in STRATEGIES.into_iter().zip([10_000, 1000, 1000, 10_000]).enumerate() {
        pair.shape(Some(rate))?;
        let name = format!("count-{hop}");
        let moves = || pair.migrate(hop.is_multiple_of(2), "redis", Way::Link, &options(strategy, &store));
        let load = |enough: &AtomicBool| talker.lock().unwrap().load(&name, enough);
        let (answers, (_, stats)) = talking(load, moves).with_context(|| strategy)?;
        eprintln!("Redis, {strategy} at {rate} Mbit/s: {answers} rounds of questions, {stats:?}");
        ensure!(here.ask(&["GET", &name])? == answers.to_string(), "another count");
    }
    let keys: u64 = here.ask(&["DBSIZE"])?.parse()?;
    ensure!(keys >= KEYS, "there are {keys} keys");
    let segments = trace.finish()?.check_connection(port)?;
    ensure!(segments > 300, "only {segments} segments were seen");
    pair.first.pod("redis")?.remove()
}

#[test]
fn redis_moves_under_load_by_every_strategy() {
    redis_moves(&Pair::new().unwrap()).unwrap();
}
