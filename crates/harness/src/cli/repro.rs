//! `harness repro`.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use clap::Args;

use super::Common;
use crate::{experiment, lab, report};

#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    common: Common,
}

/// Runs every experiment and makes the report of those that could be run: one that fails does not hide the others, but
/// it does make the command fail.
pub(super) fn run(arguments: &Arguments) -> Result<ExitCode> {
    lab::clean_up_on_interrupt()?;
    let settings = arguments.common.settings();
    let mut failed = Vec::new();
    for experiment in experiment::ALL {
        let start = Instant::now();
        let result = experiment.run(&settings);
        eprintln!("{:20} {:4.0} s", experiment.name, start.elapsed().as_secs_f64());
        if let Err(error) = result {
            eprintln!("harness: experiment {}: {error:#}", experiment.name);
            failed.push(experiment.name);
        }
    }
    super::report::print(&report::make(&settings.out)?);
    if failed.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("harness: not every experiment could be run: {}", failed.join(", "));
    Ok(ExitCode::FAILURE)
}
