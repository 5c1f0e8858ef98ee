//! Ways for the bytes of a migration: what comes for a command is carried, and what it says comes back.
//!
//! `slow-pipe BYTES-A-SECOND COMMAND ARG…` carries no faster than that; `slow-pipe link ADDRESS COMMAND ARG…` goes by TCP: the
//! command, which enters the network namespace that has the address, is run by a `slow-pipe answer` there.

#![allow(missing_docs)]

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Carries until nothing more comes; at most so many bytes a second.
fn carry(rate: Option<f64>, mut from: impl Read, mut to: impl Write) -> std::io::Result<()> {
    let (begun, mut carried) = (Instant::now(), 0u64);
    let mut piece = vec![0; if rate.is_some() { 16 << 10 } else { 256 << 10 }];
    loop {
        let length = from.read(&mut piece)?;
        if length == 0 {
            return Ok(());
        }
        to.write_all(piece.get(..length).unwrap_or_default())?;
        to.flush()?;
        carried += length as u64;
        if let Some(rate) = rate {
            let due = Duration::from_secs_f64(carried as f64 / rate);
            std::thread::sleep(due.saturating_sub(begun.elapsed()));
        }
    }
}

fn code_of(mut child: Child) -> Result<ExitCode> {
    Ok(ExitCode::from(child.wait()?.code().unwrap_or(1) as u8))
}

/// `COMMAND` with what comes for it at that rate.
fn slowly(rate: f64, command: &[String]) -> Result<ExitCode> {
    let [program, rest @ ..] = command else { bail!("which command?") };
    let mut child = Command::new(program).args(rest).stdin(Stdio::piped()).spawn()?;
    if let Some(to) = child.stdin.take() {
        // The command has ended, or whoever speaks has: either way nothing is left to carry.
        let _ = carry(Some(rate), std::io::stdin().lock(), to);
    }
    code_of(child)
}

/// Calls a `slow-pipe answer` that is started where the command is to run.
fn link(address: &str, command: &[String]) -> Result<ExitCode> {
    let at = command.iter().position(|word| word == "--").context("the command does not enter a network namespace")?;
    let (enter, run) = command.split_at(at + 1);
    let [program, rest @ ..] = enter else { bail!("which namespace?") };
    let itself = std::env::current_exe()?;
    let mut answering = Command::new(program);
    answering.args(rest).arg(itself).args(["answer", address]).args(run);
    let mut child = answering.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    // It says at which port it listens.
    let mut said = child.stdout.take().context("a pipe")?;
    let mut port = String::new();
    let mut byte = [0];
    while said.read(&mut byte)? == 1 && byte != [b'\n'] {
        port.push(char::from(byte[0]));
    }
    let stream = TcpStream::connect((address, port.parse()?)).with_context(|| format!("calling {address}:{port}"))?;
    stream.set_nodelay(true)?;
    let back = stream.try_clone()?;
    let listening = std::thread::spawn(move || carry(None, back, std::io::stdout()));
    let _ = carry(None, std::io::stdin().lock(), &stream);
    let _ = stream.shutdown(Shutdown::Write);
    let _ = listening.join();
    code_of(child)
}

/// Runs the command with a connection as its stdin and stdout.
fn answer(address: &str, command: &[String]) -> Result<ExitCode> {
    let [program, rest @ ..] = command else { bail!("which command?") };
    let listener = TcpListener::bind((address, 0))?;
    println!("{}", listener.local_addr()?.port());
    let (stream, _) = listener.accept()?;
    stream.set_nodelay(true)?;
    let ends = [stream.try_clone()?, stream].map(std::os::fd::OwnedFd::from);
    let [stdin, stdout] = ends.map(Stdio::from);
    code_of(Command::new(program).args(rest).stdin(stdin).stdout(stdout).spawn()?)
}

fn main() -> Result<ExitCode> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match &arguments[..] {
        [word, address, command @ ..] if word == "link" => link(address, command),
        [word, address, command @ ..] if word == "answer" => answer(address, command),
        [rate, command @ ..] => slowly(rate.parse()?, command),
        [] => bail!("slow-pipe BYTES-A-SECOND COMMAND ARG…"),
    }
}
