//! What single operations cost. For each name of an operation that comes as a line on stdin, a batch of it is done and a
//! line says how many nanoseconds one took: so that who asks can have several of these take turns. No arguments.

use std::fs::File;
use std::io::{BufRead, Read, Write};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Result, bail};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

fn main() -> Result<()> {
    stay_on_one_cpu()?;
    let mut zero = File::open("/dev/zero")?;
    for operation in std::io::stdin().lock().lines() {
        let nanoseconds = match operation?.as_str() {
            "getpid" => batch(10_000, || {
                std::hint::black_box(nix::unistd::getpid());
                Ok(())
            }),
            "read" => batch(10_000, || Ok(zero.read_exact(&mut [0])?)),
            "fork_exit" => batch(20, || Ok(harness::sys::fork_and_exit()?)),
            "fork_exec" => batch(5, || {
                Command::new("/bin/true").stdin(Stdio::null()).status()?;
                Ok(())
            }),
            other => bail!("there is no operation {other}"),
        };
        println!("{:.2}", nanoseconds?);
        std::io::stdout().flush()?;
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

/// Nanoseconds of one of `operations`.
fn batch(operations: u32, mut operation: impl FnMut() -> Result<()>) -> Result<f64> {
    let start = Instant::now();
    for _ in 0..operations {
        operation()?;
    }
    Ok(start.elapsed().as_nanos() as f64 / f64::from(operations))
}
