//! From raw samples to plots, a table on the terminal and one self-contained page. Reads samples and host facts, nothing
//! else: a report can be made again, differently, from the same measurement.

mod beside;
mod claims;
mod contents;
mod costs;
mod document;
mod findings;
mod markdown;
mod others;
mod page;
mod plots;
mod slopes;
mod table;
mod verified;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

pub use claims::{Claim, State};
pub use findings::{Finding, Findings, Verdict};
pub use plots::Plot;

use contents::Material;

use crate::host::HostFacts;
use crate::samples;

/// What a report consists of.
#[derive(Debug)]
pub struct Report {
    /// The numbers.
    pub findings: Findings,
    /// The page.
    pub page: PathBuf,
    /// The plots, as SVG.
    pub plots: Vec<PathBuf>,
}

/// Makes the report of the samples below `out`: `out/plots/*.svg` (and PNG where `rsvg-convert` is installed) and
/// `out/report.html`, and the same as Markdown in `out/report.md`.
pub fn make(out: &Path) -> Result<Report> {
    let samples = samples::read_all(out)?;
    let hosts = HostFacts::read_all(out)?;
    let findings = Findings::of(&samples);
    let plots = plots::all(&samples)?;
    let directory = out.join("plots");
    std::fs::create_dir_all(&directory).with_context(|| format!("making {}", directory.display()))?;
    let paths = plots.iter().map(|plot| plot.write(&directory)).collect::<Result<_>>()?;
    let notes = crate::progress::notes(out, crate::experiment::ALL.iter().map(|experiment| experiment.name))?;
    let material = Material { findings: &findings, plots: &plots, samples: &samples, notes: &notes, hosts: &hosts };
    let blocks = contents::blocks(&material);
    let page = out.join("report.html");
    for (path, text) in
        [(&page, page::render(&blocks, &plots)), (&out.join("report.md"), markdown::render(&blocks, &plots))]
    {
        std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(Report { findings, page, plots: paths })
}

impl Report {
    /// The table for the terminal.
    pub fn table(&self) -> String {
        table::render(&self.findings)
    }
}
