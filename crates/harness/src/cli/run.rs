//! `harness run`.

use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Args;

use super::Common;
use crate::experiment::Settings;
use crate::{experiment, lab};

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Which (see harness list)
    #[arg(required = true, value_name = "EXPERIMENT")]
    experiments: Vec<String>,
    /// Another system to measure beside zap, as NAME=PATH
    #[arg(long, value_name = "NAME=PATH")]
    peer: Vec<String>,
    /// Only this case, where an experiment has several (see harness list)
    #[arg(long = "workload", alias = "case", value_name = "NAME")]
    workloads: Vec<String>,
    #[command(flatten)]
    common: Common,
}

pub(super) fn run(arguments: &Arguments) -> Result<ExitCode> {
    if let Some(peer) = arguments.peer.first() {
        bail!("no experiment can measure a peer yet (--peer {peer})");
    }
    let experiments: Vec<_> = arguments.experiments.iter().map(|name| experiment::find(name)).collect::<Result<_>>()?;
    lab::clean_up_on_interrupt()?;
    let cases: Vec<_> = experiments.iter().flat_map(|experiment| (experiment.cases)()).collect();
    if let Some(unknown) = arguments.workloads.iter().find(|name| !cases.contains(&name.as_str())) {
        bail!("there is no case {unknown}; there are {}", cases.join(", "));
    }
    let settings = Settings { workloads: arguments.workloads.clone(), ..arguments.common.settings() };
    for experiment in experiments {
        experiment.run(&settings).with_context(|| format!("experiment {}", experiment.name))?;
        eprintln!("{}: samples in {}", experiment.name, crate::samples::raw_dir(&settings.out).display());
    }
    Ok(ExitCode::SUCCESS)
}
