//! Has so much of one thing, says `ready`, and goes on for ever: what checkpoints are measured with.
//!
//! `harness-load KIND COUNT [RATE [serve]]`. KIND is `memory` (COUNT MiB, all of it touched, RATE MiB of it written a second;
//! with `serve` a server, too, that writes to a page for every request), `processes`, `threads`, `mappings`, `files` (descriptors of files of a hundred names), `sockets` (half of them are
//! connected to the other half) or `connections` (TCP sockets, the same).

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let (kind, count, rate, serves) = match words[..] {
        [kind, count] => (kind, count.parse()?, 0.0, false),
        [kind, count, rate] => (kind, count.parse()?, rate.parse()?, false),
        ["memory", count, rate, "serve"] => ("memory", count.parse()?, rate.parse()?, true),
        _ => bail!("usage: harness-load KIND COUNT [RATE [serve]]"),
    };
    raise_limit()?;
    match kind {
        "memory" => return memory(count, rate, serves),
        "processes" => (0..count).try_for_each(|_| harness::sys::fork_and_sleep())?,
        "threads" => (0..count).try_for_each(thread)?,
        "mappings" => harness::sys::map_apart(count)?,
        "files" => return keep(files(count)?),
        "sockets" => return keep(pairs(count, UnixStream::pair)?),
        "connections" => {
            let listener = TcpListener::bind("127.0.0.1:0")?;
            let address = listener.local_addr()?;
            let connect = || Ok((TcpStream::connect(address)?, listener.accept()?.0));
            return keep((pairs(count, connect)?, listener));
        }
        other => bail!("there is no kind {other}"),
    }
    keep(())
}

fn raise_limit() -> Result<()> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most).context("raising the limit of open files")
}

/// Says that everything is there, and has it stay.
fn keep<T>(kept: T) -> Result<()> {
    println!("ready");
    std::io::stdout().flush()?;
    loop {
        std::thread::park();
        std::hint::black_box(&kept);
    }
}

fn thread(number: usize) -> Result<()> {
    let thread = std::thread::Builder::new().stack_size(64 << 10);
    thread.spawn(|| std::thread::sleep(Duration::MAX)).map(drop).with_context(|| format!("thread {number}"))
}

/// Every second one is not at its beginning.
fn files(count: usize) -> Result<Vec<File>> {
    let open = |number: usize| -> Result<File> {
        let path = format!("/tmp/load-{}", number % 100);
        let mut file = File::options().create(true).read(true).append(true).open(path)?;
        if number < 100 {
            file.write_all(b"some contents")?;
        }
        file.seek(SeekFrom::Start(number as u64 % 2))?;
        Ok(file)
    };
    (0..count).map(open).collect()
}

/// Connected sockets, `count` in all, a byte on its way over each pair.
fn pairs<S: Write>(count: usize, connect: impl Fn() -> std::io::Result<(S, S)>) -> Result<Vec<(S, S)>> {
    let pair = |_| {
        let (mut one, other) = connect()?;
        one.write_all(b"x")?;
        Ok((one, other))
    };
    (0..count / 2).map(pair).collect()
}

const PAGE: usize = 4096;
/// From one page to the next that is written to: far from each other, and every one comes in its turn.
const STRIDE: usize = 7919;

/// Has memory, all of it touched, and goes on writing to it.
fn memory(mib: usize, rate: f64, serves: bool) -> Result<()> {
    let memory: Arc<Vec<AtomicU8>> = Arc::new((0..mib << 20).map(|at| AtomicU8::new((at / PAGE) as u8)).collect());
    if serves {
        let (listener, memory) = (TcpListener::bind("0.0.0.0:80")?, Arc::clone(&memory));
        std::thread::spawn(move || listener.incoming().for_each(|peer| drop(peer.map(|peer| answer(peer, &memory)))));
    }
    println!("ready");
    std::io::stdout().flush()?;
    let (begun, mut touched, mut page) = (Instant::now(), 0f64, 0);
    loop {
        std::thread::sleep(Duration::from_millis(10));
        let due = begun.elapsed().as_secs_f64() * rate * (1 << 20) as f64 / PAGE as f64;
        // What a pause has left undone stays undone.
        touched = touched.max(due - rate * 64.0);
        while touched < due {
            page = write_to_next(&memory, page);
            touched += 1.0;
        }
    }
}

/// Writes to the page after this one.
fn write_to_next(memory: &[AtomicU8], page: usize) -> usize {
    let page = (page + STRIDE) % (memory.len() / PAGE).max(1);
    if let Some(byte) = memory.get(page * PAGE) {
        byte.fetch_add(1, Ordering::Relaxed);
    }
    page
}

/// Answers every request of a connection with the small file of the site, and writes to a page before.
fn answer(mut peer: TcpStream, memory: &[AtomicU8]) -> std::io::Result<()> {
    const SIZE: usize = 1 << 10;
    let mut said = format!("HTTP/1.1 200 OK\r\nContent-Length: {SIZE}\r\n\r\n").into_bytes();
    let head = said.len();
    said.resize(head + SIZE, 0);
    harness::client::content::fill(SIZE as u64, 0, &mut said[head..]);
    let (mut request, mut byte, mut page) = (Vec::new(), [0], 0);
    loop {
        peer.read_exact(&mut byte)?;
        request.push(byte[0]);
        if request.ends_with(b"\r\n\r\n") {
            request.clear();
            page = write_to_next(memory, page);
            peer.write_all(&said)?;
        }
    }
}
