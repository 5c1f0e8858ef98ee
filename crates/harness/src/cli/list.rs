//! `harness list`.

use std::io::{ErrorKind, Write};
use std::process::ExitCode;

use anyhow::Result;

use crate::{experiment, workload};

pub(super) fn run() -> Result<ExitCode> {
    let mut text = String::from("Experiments\n");
    for experiment in experiment::ALL {
        text += &format!("  {}: {}\n    {}\n", experiment.name, experiment.claim, experiment.what);
        let cases = (experiment.cases)();
        if !cases.is_empty() {
            text += &format!("    cases: {}\n", cases.join(", "));
        }
    }
    text += "Workloads\n";
    for workload in workload::all() {
        text += &format!("  {}: {}\n", workload.name(), workload.claim());
    }
    match std::io::stdout().write_all(text.as_bytes()) {
        // Whoever closed the pipe has seen enough.
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(ExitCode::SUCCESS),
    }
}
