//! `harness repro`.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Args;

use super::Common;
use crate::experiment::{self, Experiment, Settings};
use crate::progress::{is_finished, readable};
use crate::{lab, report};

/// The time kept for the report.
const REPORT: Duration = Duration::from_secs(20);

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Fewer repetitions where everything would take longer than this; with
    /// --full there is no such limit
    #[arg(long, value_name = "N", default_value_t = 25, overrides_with = "minutes", value_parser = clap::value_parser!(u64).range(1..))]
    minutes: u64,
    #[command(flatten)]
    common: Common,
}

/// Runs every experiment and makes the report of those that could be run: one that fails does not hide the others, but
/// it does make the command fail.
pub(super) fn run(arguments: &Arguments) -> Result<ExitCode> {
    lab::clean_up_on_interrupt()?;
    let until = Instant::now() + Duration::from_secs(arguments.minutes * 60).saturating_sub(REPORT);
    let until = (!arguments.common.full).then_some(until);
    let settings = arguments.common.settings();
    let (mut left, mut failed) = (experiment::ALL, Vec::new());
    while let Some((experiment, others)) = left.split_first() {
        let number = experiment::ALL.len() - others.len();
        if !measure(experiment, number, until.map(|until| share(until, left)), &settings) {
            failed.push(experiment.name);
        }
        left = others;
    }
    super::report::print(&report::make(&settings.out)?);
    if failed.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("harness: not everything could be measured, in: {}", failed.join(", "));
    Ok(ExitCode::FAILURE)
}

/// What the first of `experiments` has of the time that all of them have. What one does not use is the others'.
fn share(until: Instant, experiments: &[Experiment]) -> Duration {
    let all: u32 = experiments.iter().map(|experiment| experiment.share).sum();
    let first = experiments.first().map_or(0, |experiment| experiment.share);
    until.saturating_duration_since(Instant::now()) * first / all.max(1)
}

/// Whether everything of an experiment was measured.
fn measure(experiment: &Experiment, number: usize, budget: Option<Duration>, settings: &Settings) -> bool {
    let count = experiment::ALL.len();
    if settings.resume && is_finished(&settings.out, experiment.name) {
        eprintln!("{number:2}/{count} {:20} is there already", experiment.name);
        return true;
    }
    let time = budget.map_or_else(|| "as long as it takes".into(), |budget| format!("at most {}", readable(budget)));
    eprintln!("{number:2}/{count} {:20} {time}", experiment.name);
    let begun = Instant::now();
    let result = experiment.run(&Settings { budget, ..settings.clone() });
    eprintln!("{:5} {:20} took {}", "", experiment.name, readable(begun.elapsed()));
    if let Err(error) = &result {
        eprintln!("harness: experiment {}: {error:#}", experiment.name);
    }
    result.is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_use_up_the_time_and_no_more() {
        let until = Instant::now() + Duration::from_secs(1000);
        let of = |place: usize| share(until, &experiment::ALL[place..]);
        let last = experiment::ALL.len() - 1;
        assert!(of(last) > Duration::from_secs(990) && of(last) <= Duration::from_secs(1000));
        assert!(of(0) > Duration::ZERO && of(0) < Duration::from_secs(500));
    }
}
