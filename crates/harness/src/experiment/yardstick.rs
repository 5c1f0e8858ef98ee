//! A piece of work without zap, of the kind that zap does: what it takes says how fast a machine is in this run, and other
//! times of the run can be compared with those of another day as multiples of it (see [`crate::gate`]).

use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::Session;
use crate::gate::YARDSTICK;
use crate::lab::Lab;
use crate::samples::Circumstances;

const PROGRAMS: usize = 10;
const BYTES: usize = 16 << 20;

/// Starts some programs, one after the other, and writes to where images are written.
pub(super) fn measure(session: &mut Session, lab: &Lab, of: &Circumstances<'_>) -> Result<()> {
    let path = lab.directory().join(YARDSTICK);
    let content = vec![1; BYTES];
    let begun = Instant::now();
    for _ in 0..PROGRAMS {
        ensure!(Command::new("true").status().context("starting true")?.success(), "true failed");
    }
    std::fs::write(&path, &content).with_context(|| format!("writing {}", path.display()))?;
    let took = begun.elapsed();
    std::fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))?;
    session.record_duration(&Circumstances { arm: YARDSTICK, ..*of }, "whole", took)
}
