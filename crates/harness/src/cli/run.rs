//! `harness run`.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::Args;

use super::Common;
use crate::experiment::Settings;
use crate::{experiment, lab};

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Which (see harness list)
    #[arg(required = true, value_name = "EXPERIMENT")]
    experiments: Vec<String>,
    /// Only this case, where an experiment has several (see harness list)
    #[arg(long = "workload", alias = "case", value_name = "NAME")]
    workloads: Vec<String>,
    /// Fewer repetitions where more would take longer than this, each experiment
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    minutes: Option<u64>,
    #[command(flatten)]
    common: Common,
}

/// Runs experiments; one that fails does not keep the others from being run.
pub(super) fn run(arguments: &Arguments) -> Result<ExitCode> {
    let experiments: Vec<_> = arguments.experiments.iter().map(|name| experiment::find(name)).collect::<Result<_>>()?;
    let cases: Vec<_> = experiments.iter().flat_map(|experiment| (experiment.cases)()).collect();
    if let Some(unknown) = arguments.workloads.iter().find(|name| !cases.contains(&name.as_str())) {
        bail!("there is no case {unknown}; there are {}", cases.join(", "));
    }
    lab::clean_up_on_interrupt()?;
    let budget = arguments.minutes.map(|minutes| Duration::from_secs(minutes * 60));
    let settings = Settings { workloads: arguments.workloads.clone(), budget, ..arguments.common.settings() };
    let mut failed = false;
    for experiment in experiments {
        if let Err(error) = experiment.run(&settings) {
            eprintln!("harness: experiment {}: {error:#}", experiment.name);
            failed = true;
        }
        eprintln!("{}: samples in {}", experiment.name, crate::samples::raw_dir(&settings.out).display());
    }
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
