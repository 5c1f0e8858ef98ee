//! Prints what single operations cost: lines of `operation nanoseconds`, the median of batches. No arguments.

use std::fs::File;
use std::io::Read;
use std::process::{Command, Stdio};
use std::time::Instant;

use harness::stats;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

const BATCHES: u32 = 21;

fn main() -> anyhow::Result<()> {
    stay_on_one_cpu()?;
    report("getpid", 20_000, || {
        std::hint::black_box(nix::unistd::getpid());
        Ok(())
    })?;
    let mut zero = File::open("/dev/zero")?;
    let mut byte = [0];
    report("read", 20_000, || Ok(zero.read_exact(&mut byte)?))?;
    report("fork_exit", 30, || Ok(harness::sys::fork_and_exit()?))?;
    report("fork_exec", 10, || {
        Command::new("/bin/true").stdin(Stdio::null()).status()?;
        Ok(())
    })
}

/// A move from one CPU to another in the middle of a batch would be most of what is measured.
fn stay_on_one_cpu() -> nix::Result<()> {
    let allowed = nix::sched::sched_getaffinity(Pid::this())?;
    let last = (0..CpuSet::count()).rev().find(|cpu| allowed.is_set(*cpu).unwrap_or(false));
    let mut one = CpuSet::new();
    one.set(last.unwrap_or(0))?;
    sched_setaffinity(Pid::this(), &one)
}

fn report(name: &str, operations: u32, mut operation: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<()> {
    let mut batches = Vec::new();
    for batch in 0..=BATCHES {
        let start = Instant::now();
        for _ in 0..operations {
            operation()?;
        }
        // The first batch warms up.
        if batch > 0 {
            batches.push(start.elapsed().as_nanos() as f64 / f64::from(operations));
        }
    }
    println!("{name} {:.2}", stats::median(&batches).unwrap_or(f64::NAN));
    Ok(())
}
