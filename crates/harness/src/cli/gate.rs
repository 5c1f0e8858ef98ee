//! `harness gate`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::experiment::{self, Extent, Settings};
use crate::gate::{Regression, regressions};
use crate::lab;
use crate::samples::{Sample, read_all};

/// How often a suspicion is measured again before it becomes an alarm.
const SECOND_LOOKS: u32 = 2;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// The samples to compare with
    #[arg(long, value_name = "DIR", default_value = "results/baseline")]
    baseline: PathBuf,
    /// Repetitions a look [default: each experiment's own]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    runs: Option<u32>,
    /// Compare these samples instead of measuring
    #[arg(long, value_name = "DIR")]
    samples: Option<PathBuf>,
}

pub(super) fn run(arguments: &Arguments) -> Result<ExitCode> {
    let baseline = read_all(&arguments.baseline)?;
    ensure!(!baseline.is_empty(), "{} has no samples", arguments.baseline.display());
    let found = match &arguments.samples {
        Some(samples) => regressions(&baseline, &read_all(samples)?),
        None => look(&baseline, arguments.runs)?,
    };
    for Regression { experiment, what, worse_by, p } in &found {
        println!("{experiment}: {what} is {:.1} % worse (p = {p:.4})", worse_by * 100.0);
    }
    if found.is_empty() {
        println!("nothing is slower than {}", arguments.baseline.display());
        return Ok(ExitCode::SUCCESS);
    }
    Ok(ExitCode::FAILURE)
}

/// Measures everything that the baseline has; what looks worse is measured again, and all samples count.
fn look(baseline: &[Sample], runs: Option<u32>) -> Result<Vec<Regression>> {
    lab::clean_up_on_interrupt()?;
    let mut suspects: BTreeSet<String> = baseline.iter().map(|sample| sample.experiment.clone()).collect();
    let mut now = Vec::new();
    let mut found = Vec::new();
    for _ in 0..=SECOND_LOOKS {
        let out = tempfile::tempdir().context("making a directory for samples")?;
        for name in &suspects {
            measure(name, runs, out.path())?;
        }
        now.extend(read_all(out.path())?);
        found = regressions(baseline, &now);
        suspects = found.iter().map(|regression| regression.experiment.clone()).collect();
        if suspects.is_empty() {
            break;
        }
    }
    Ok(found)
}

fn measure(name: &str, runs: Option<u32>, out: &Path) -> Result<()> {
    let extent = Extent::Ordinary;
    let settings = Settings { runs, extent, seed: rand::random(), ..Settings::fast(out.into()) };
    eprintln!("measuring {name}, seed {}", settings.seed);
    experiment::find(name)?.run(&settings)
}
