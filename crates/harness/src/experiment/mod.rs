//! Experiments: each measures one thing that the paper claims, and writes raw samples.

mod checkpoint_restart;
mod density;
mod downtime_client;
mod frequency;
mod load;
mod migration;
mod overhead_apache;
mod overhead_desktop;
mod overhead_micro;
mod peers;
pub mod scaling;

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;

use crate::host::HostFacts;
use crate::samples::{Circumstances, Recorder};

/// Something that can be measured.
#[derive(Clone, Copy, Debug)]
pub struct Experiment {
    /// Its name on the command line and in samples.
    pub name: &'static str,
    /// The claim of the paper that it serves.
    pub claim: &'static str,
    /// What it does, in a line.
    pub what: &'static str,
    /// What it can be restricted to.
    pub cases: fn() -> Vec<&'static str>,
    /// Repetitions unless asked for otherwise, of the ordinary extent and of the full one: all experiments together take
    /// less than half an hour with the first, and have narrow intervals with the second.
    pub runs: (u32, u32),
    run: fn(&mut Session) -> Result<()>,
}

/// Every experiment, in the order in which `harness repro` runs them.
pub const ALL: &[Experiment] = &[
    overhead_micro::EXPERIMENT,
    overhead_apache::EXPERIMENT,
    overhead_desktop::EXPERIMENT,
    checkpoint_restart::EXPERIMENT,
    downtime_client::EXPERIMENT,
    migration::EXPERIMENT,
    scaling::EXPERIMENT,
    density::EXPERIMENT,
    frequency::EXPERIMENT,
];

/// The experiment called `name`.
pub fn find(name: &str) -> Result<&'static Experiment> {
    match ALL.iter().find(|experiment| experiment.name == name) {
        Some(experiment) => Ok(experiment),
        None => {
            let names: Vec<_> = ALL.iter().map(|experiment| experiment.name).collect();
            bail!("there is no experiment {name}; there are {}", names.join(", "))
        }
    }
}

/// How much of an experiment to run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Extent {
    /// The smallest sizes, once: whether it works at all.
    Fast,
    /// What answers the claim.
    #[default]
    Ordinary,
    /// The largest sizes too.
    Full,
}

/// How to run experiments.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where samples go.
    pub out: PathBuf,
    /// Repetitions; each experiment's own number if absent.
    pub runs: Option<u32>,
    /// Only these of its cases, where an experiment has several; all of them if empty.
    pub workloads: Vec<String>,
    /// How much of it.
    pub extent: Extent,
    /// Seed of everything that is drawn.
    pub seed: u64,
    /// Whether to show progress: on a terminal that is read by a person.
    pub progress: bool,
}

impl Experiment {
    /// Runs it and writes its samples, and the facts of the host beside them.
    pub fn run(&self, settings: &Settings) -> Result<()> {
        HostFacts::gather().write(&settings.out)?;
        let own = match settings.extent {
            Extent::Fast => 1,
            Extent::Ordinary => self.runs.0,
            Extent::Full => self.runs.1,
        };
        let runs = settings.runs.unwrap_or(own);
        let bar = if settings.progress { ProgressBar::new(0) } else { ProgressBar::hidden() };
        bar.set_style(
            ProgressStyle::with_template("{prefix:20} {bar:30} {pos}/{len} {elapsed} {msg}")
                .unwrap_or_else(|_| ProgressStyle::default_bar()),
        );
        bar.set_prefix(self.name);
        let recorder = Recorder::create(&settings.out, self.name, settings.seed)?;
        let (workloads, rng) = (settings.workloads.clone(), StdRng::seed_from_u64(settings.seed));
        let mut session = Session { runs, extent: settings.extent, workloads, recorder, rng, bar };
        let result = (self.run)(&mut session);
        session.bar.finish_and_clear();
        result
    }
}

/// One run of an experiment.
#[derive(Debug)]
pub struct Session {
    /// Repetitions.
    pub runs: u32,
    /// How much of it.
    extent: Extent,
    workloads: Vec<String>,
    recorder: Recorder,
    rng: StdRng,
    bar: ProgressBar,
}

impl Session {
    /// Whether a workload is to be measured.
    fn wants(&self, workload: &str) -> bool {
        self.workloads.is_empty() || self.workloads.iter().any(|wanted| wanted == workload)
    }

    /// Says how many [`step`](Self::step)s there will be.
    fn expect(&self, steps: u64) {
        self.bar.set_length(steps);
    }

    /// Says what comes next.
    fn step(&self, what: &str) {
        self.bar.set_message(what.to_string());
        self.bar.inc(1);
    }

    /// The arms in an order of their own for each run, so that no arm always goes first.
    fn shuffled<T: Clone>(&mut self, arms: &[T]) -> Vec<T> {
        let mut order = arms.to_vec();
        order.shuffle(&mut self.rng);
        order
    }

    fn record(&mut self, of: &Circumstances<'_>, metric: &str, value: f64, unit: &str) -> Result<()> {
        self.recorder.record(of, metric, value, unit)
    }

    fn record_duration(&mut self, of: &Circumstances<'_>, metric: &str, value: std::time::Duration) -> Result<()> {
        self.record(of, metric, value.as_secs_f64() * 1e6, "us")
    }
}

/// Bytes that the files below `directory` take, holes not counted.
fn bytes_below(directory: &Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    let mut bytes = 0;
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        bytes += if metadata.is_dir() { bytes_below(&entry.path())? } else { metadata.blocks() * 512 };
    }
    Ok(bytes)
}
