//! What single operations cost. For each name of an operation that comes as a line on stdin, a batch of it is done and a
//! line says how many nanoseconds one took: so that who asks can have several of these take turns. No arguments; with
//! `echo` it gives back every byte instead.

use std::io::{BufRead, Read, Write};
use std::process::Command;

use anyhow::Result;
use harness::micro::Bench;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

fn main() -> Result<()> {
    if std::env::args().nth(1).as_deref() == Some("echo") {
        return echo();
    }
    stay_on_one_cpu()?;
    let mut again = Command::new(std::env::current_exe()?);
    again.arg("echo");
    let mut bench = Bench::new(again)?;
    for operation in std::io::stdin().lock().lines() {
        println!("{:.2}", bench.batch(&operation?)?);
        std::io::stdout().flush()?;
    }
    Ok(())
}

fn echo() -> Result<()> {
    let (mut from, mut to, mut byte) = (std::io::stdin().lock(), std::io::stdout().lock(), [0]);
    while from.read(&mut byte)? == 1 {
        to.write_all(&byte)?;
        to.flush()?;
    }
    Ok(())
}

/// A move from one CPU to another in the middle of a batch would be most of what is measured.
fn stay_on_one_cpu() -> nix::Result<()> {
    let allowed = nix::sched::sched_getaffinity(Pid::this())?;
    let last = (0..CpuSet::count()).rev().find(|cpu| allowed.is_set(*cpu).unwrap_or(false));
    let mut one = CpuSet::new();
    one.set(last.unwrap_or(0))?;
    sched_setaffinity(Pid::this(), &one)
}
