//! A server as people write them with tokio, and clients of it: `tokio-server DIRECTORY` goes on for ever, each of its tasks
//! writes how far it is to a file in the directory, and whatever is not as it must be ends it with an error.
//!
//! Tasks on several threads, TCP and unix sockets, timers, channels, work on blocking threads.

#![allow(missing_docs)]

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

/// Clients of each kind.
const CLIENTS: usize = 16;
/// The longest message.
const LONGEST: u64 = 40_000;

/// Tells how far somebody is.
#[derive(Clone)]
struct Progress {
    directory: PathBuf,
}

impl Progress {
    fn say(&self, name: &str, count: u64) -> Result<()> {
        let fresh = self.directory.join(format!(".{name}"));
        std::fs::write(&fresh, count.to_string())?;
        std::fs::rename(&fresh, self.directory.join(name)).with_context(|| format!("telling of {name}"))
    }
}

/// Answers every message with itself, its bytes inverted.
async fn answer(mut stream: impl AsyncRead + AsyncWrite + Unpin) -> Result<()> {
    loop {
        let mut bytes = vec![0; stream.read_u32().await? as usize];
        stream.read_exact(&mut bytes).await?;
        tokio::time::sleep(Duration::from_millis(2)).await;
        bytes.iter_mut().for_each(|byte| *byte = !*byte);
        stream.write_all(&bytes).await?;
    }
}

async fn ask(mut stream: impl AsyncRead + AsyncWrite + Unpin, name: String, progress: Progress) -> Result<()> {
    for count in 0u64.. {
        let length = count * 7919 % LONGEST;
        let bytes: Vec<u8> = (0..length).map(|at| (at * count) as u8).collect();
        stream.write_u32(length as u32).await?;
        stream.write_all(&bytes).await?;
        let mut answer = vec![0; bytes.len()];
        stream.read_exact(&mut answer).await.with_context(|| format!("{name}: message {count}"))?;
        ensure!(answer.iter().zip(&bytes).all(|(got, sent)| *got == !sent), "{name}: another answer to {count}");
        progress.say(&name, count)?;
    }
    Ok(())
}

/// Timers never end early, and the clock never steps back.
async fn tick(progress: Progress) -> Result<()> {
    let pause = Duration::from_millis(25);
    let mut before = Instant::now();
    for count in 0.. {
        tokio::time::sleep(pause).await;
        let now = Instant::now();
        ensure!(now.duration_since(before) >= pause, "tick {count} came after {:?}", now - before);
        before = now;
        progress.say("ticks", count)?;
    }
    Ok(())
}

/// Numbers that go through a chain of tasks come out in order.
async fn relay(progress: Progress) -> Result<()> {
    let (first, mut end) = mpsc::channel::<u64>(4);
    for _ in 0..20 {
        let (sender, receiver) = mpsc::channel(4);
        let mut from = std::mem::replace(&mut end, receiver);
        tokio::spawn(async move {
            while let Some(number) = from.recv().await {
                if sender.send(number).await.is_err() {
                    break;
                }
            }
        });
    }
    tokio::spawn(async move {
        for number in 0.. {
            if first.send(number).await.is_err() {
                break;
            }
        }
    });
    for count in 0.. {
        let number = end.recv().await.context("the chain is broken")?;
        ensure!(number == count, "{number} came out, not {count}");
        if count % 500 == 0 {
            progress.say("relayed", count)?;
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    Ok(())
}

/// Work for threads that may block.
async fn block(progress: Progress) -> Result<()> {
    for count in 0.. {
        let mut works = JoinSet::new();
        for number in 0..6u64 {
            works.spawn_blocking(move || {
                std::thread::sleep(Duration::from_millis(5));
                (0..=count + number).fold(0u64, u64::wrapping_add) == (count + number) * (count + number + 1) / 2
            });
        }
        while let Some(right) = works.join_next().await {
            ensure!(right?, "a sum is wrong");
        }
        progress.say("blocked", count)?;
    }
    Ok(())
}

async fn run(directory: &Path) -> Result<()> {
    let progress = Progress { directory: directory.to_owned() };
    let mut jobs: JoinSet<Result<()>> = JoinSet::new();
    let (tcp, path) = (TcpListener::bind("127.0.0.1:7000").await?, directory.join("socket"));
    let unix = UnixListener::bind(&path)?;
    let address = tcp.local_addr()?;
    // Whoever asks once and goes is no error.
    jobs.spawn(async move {
        loop {
            tokio::spawn(answer(tcp.accept().await?.0));
        }
    });
    jobs.spawn(async move {
        loop {
            tokio::spawn(answer(unix.accept().await?.0));
        }
    });
    for number in 0..CLIENTS {
        jobs.spawn(ask(TcpStream::connect(address).await?, format!("tcp{number}"), progress.clone()));
        jobs.spawn(ask(UnixStream::connect(&path).await?, format!("unix{number}"), progress.clone()));
    }
    jobs.spawn(tick(progress.clone()));
    jobs.spawn(relay(progress.clone()));
    jobs.spawn(block(progress));
    jobs.join_next().await.context("nothing was begun")??.context("a task has ended")
}

fn main() -> Result<()> {
    let directory = std::env::args_os().nth(1).context("usage: tokio-server DIRECTORY")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(4).enable_all().build()?;
    runtime.block_on(run(Path::new(&directory)))
}
