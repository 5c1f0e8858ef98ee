//! `harness gate`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::experiment::{self, Experiment, Extent, Settings};
use crate::gate::{self, Change};
use crate::lab;
use crate::samples::{Sample, read_all};

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// The samples to compare with
    #[arg(long, value_name = "DIR", default_value = "results/baseline")]
    baseline: PathBuf,
    /// Repetitions a look [default: each experiment's own]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    runs: Option<u32>,
    /// Only these cases, where an experiment has several (see harness list)
    #[arg(long, value_name = "NAME")]
    workload: Vec<String>,
    /// Compare these samples instead of measuring
    #[arg(long, value_name = "DIR")]
    samples: Option<PathBuf>,
}

pub(super) fn run(arguments: &Arguments) -> Result<ExitCode> {
    let mut baseline = read_all(&arguments.baseline)?;
    baseline.retain(|sample| arguments.workload.is_empty() || arguments.workload.contains(&sample.workload));
    ensure!(!baseline.is_empty(), "{} has no such samples", arguments.baseline.display());
    let found = match &arguments.samples {
        Some(samples) => gate::compare(&baseline, &read_all(samples)?),
        None => {
            lab::clean_up_on_interrupt()?;
            gate::judge(&baseline, |experiments| measure(experiments, &baseline, arguments))?
        }
    };
    let baseline = arguments.baseline.display();
    if !found.better.is_empty() {
        println!("better than {baseline} (at the first look):\n{}", table("better by", &found.better));
    }
    if found.worse.is_empty() {
        println!("nothing is slower than {baseline}");
        return Ok(ExitCode::SUCCESS);
    }
    print!("worse than {baseline}:\n{}", table("worse by", &found.worse));
    Ok(ExitCode::FAILURE)
}

fn measure(experiments: &BTreeSet<String>, baseline: &[Sample], arguments: &Arguments) -> Result<Vec<Sample>> {
    let out = tempfile::tempdir().context("making a directory for samples")?;
    for name in experiments {
        measure_one(experiment::find(name)?, baseline, arguments, out.path())?;
    }
    read_all(out.path())
}

fn measure_one(of: &Experiment, baseline: &[Sample], arguments: &Arguments, out: &Path) -> Result<()> {
    let (extent, workloads) = (Extent::Ordinary, cases_of(baseline, of));
    let settings =
        Settings { runs: arguments.runs, extent, workloads, seed: rand::random(), ..Settings::fast(out.into()) };
    eprintln!("measuring {}, seed {}", of.name, settings.seed);
    of.run(&settings)
}

/// The cases of an experiment that there is something to compare with.
fn cases_of(baseline: &[Sample], of: &Experiment) -> Vec<String> {
    let is_there = |case: &&str| baseline.iter().any(|s| s.experiment == of.name && s.workload == *case);
    (of.cases)().into_iter().filter(is_there).map(str::to_owned).collect()
}

/// What has moved, a line each.
fn table(by: &str, found: &[Change]) -> String {
    let head = ["experiment", "what", "before", "now", by, "p"].map(str::to_owned);
    let row = |change: &Change| {
        let what = change.against().map_or(change.what.clone(), |arm| format!("{} ÷ {arm}", change.what));
        let worse_by = format!("{:.1} %", change.worse_by.abs() * 100.0);
        [
            change.experiment.clone(),
            what,
            figure(change.before, change.unit()),
            figure(change.now, change.unit()),
            worse_by,
            format!("{:.4}", change.p),
        ]
    };
    let rows: Vec<[String; 6]> = std::iter::once(head).chain(found.iter().map(row)).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; 6] = std::array::from_fn(width);
    let line = |[experiment, what, numbers @ ..]: &[String; 6]| {
        let mut line = format!("{experiment:0$}  {what:1$}", widths[0], widths[1]);
        for (number, width) in numbers.iter().zip(&widths[2..]) {
            line += &format!("  {number:>width$}");
        }
        line + "\n"
    };
    rows.iter().map(line).collect()
}

/// With four digits that count, and its unit: times in milliseconds.
fn figure(value: f64, unit: &str) -> String {
    let (value, unit) = if unit == "us" { (value / 1e3, "ms") } else { (value, unit) };
    let whole = value.abs().log10().floor().max(0.0) as usize;
    format!("{value:.0$} {unit}", 3_usize.saturating_sub(whole))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_measured_that_there_is_nothing_to_compare_with() {
        let of = |workload: &str| Sample {
            experiment: "checkpoint-restart".into(),
            workload: workload.into(),
            parameters: String::new(),
            arm: "stop".into(),
            run: 0,
            metric: "whole".into(),
            value: 1.0,
            unit: "us".into(),
            seed: 1,
            host: String::new(),
        };
        let baseline = [of("redis"), of("sleep"), of("sleep"), of("gone")];
        let cases = |name| cases_of(&baseline, experiment::find(name).unwrap());
        assert_eq!((cases("checkpoint-restart"), cases("scaling")), (vec!["sleep".to_owned(), "redis".into()], vec![]));
    }

    #[test]
    fn figures_have_four_digits_that_count() {
        let figures = [figure(0.5, "×"), figure(1.25, "ns"), figure(31_440.0, "us"), figure(123_456.7, "bytes")];
        assert_eq!(figures, ["0.500 ×", "1.250 ns", "31.44 ms", "123457 bytes"]);
    }

    #[test]
    fn what_moved_is_a_table() {
        let of = |arm: &str, run, value| Sample {
            experiment: "checkpoint-restart".into(),
            workload: "sleep".into(),
            parameters: String::new(),
            arm: arm.into(),
            run,
            metric: "whole".into(),
            value,
            unit: "us".into(),
            seed: 1,
            host: String::new(),
        };
        let measured =
            |value: f64| (0..10).flat_map(|run| [of("stop", run, value), of("yardstick", run, 10.0)]).collect();
        let (before, now): (Vec<_>, Vec<_>) = (measured(40.0), measured(50.0));
        let text = table("worse by", &gate::compare(&before, &now).worse);
        let lines: Vec<Vec<&str>> =
            text.lines().map(|line| line.split("  ").filter(|w| !w.is_empty()).collect()).collect();
        assert_eq!(
            lines[0].iter().map(|w| w.trim()).collect::<Vec<_>>(),
            ["experiment", "what", "before", "now", "worse by", "p"]
        );
        assert_eq!(
            lines[1][..5].iter().map(|w| w.trim()).collect::<Vec<_>>(),
            ["checkpoint-restart", "sleep, stop: whole ÷ yardstick", "4.000 ×", "5.000 ×", "25.0 %"]
        );
    }
}
