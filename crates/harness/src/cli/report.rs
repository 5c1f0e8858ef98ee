//! `harness report`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;

use crate::report;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Where results are
    #[arg(long, value_name = "DIR", default_value = "results/latest")]
    out: PathBuf,
}

pub(super) fn run(arguments: &Arguments) -> Result<ExitCode> {
    print(&report::make(&arguments.out)?);
    Ok(ExitCode::SUCCESS)
}

/// The table, and where the rest is.
pub(super) fn print(report: &report::Report) {
    println!("{}\nThe report: {}", report.table(), report.page.display());
}
