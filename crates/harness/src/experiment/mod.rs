//! Experiments: each measures one thing that the paper claims, and writes raw samples.

mod checkpoint_restart;
mod density;
mod downtime_client;
mod frequency;
mod load;
mod migration;
mod onlooker;
mod overhead_apache;
mod overhead_desktop;
mod overhead_micro;
mod overhead_programs;
mod peers;
pub(crate) mod rivals;
pub mod scaling;
mod session;
mod yardstick;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, bail};

use crate::host::HostFacts;
use crate::peer::PeerSpec;
use session::{Session, bytes_below};

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
    /// Repetitions unless asked for otherwise, of the ordinary extent and of the full one.
    pub runs: (u32, u32),
    /// Its share of the time when everything is measured within a given one, in parts of no particular size.
    pub share: u32,
    run: fn(&mut Session) -> Result<()>,
}

/// Every experiment, in the order in which `harness repro` runs them.
pub const ALL: &[Experiment] = &[
    overhead_micro::EXPERIMENT,
    overhead_apache::EXPERIMENT,
    overhead_programs::EXPERIMENT,
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
    /// How long it may take: there are fewer repetitions where that is needed, but one at least.
    pub budget: Option<Duration>,
    /// Whether whole rounds that are there already are kept, and only what is missing is measured.
    pub resume: bool,
    /// Other systems to measure beside zap, where an experiment can.
    pub peers: Vec<PeerSpec>,
}

impl Settings {
    /// The fast form: whether it works at all.
    pub fn fast(out: PathBuf) -> Self {
        Self {
            out,
            runs: None,
            workloads: Vec::new(),
            extent: Extent::Fast,
            seed: 1,
            progress: false,
            budget: None,
            resume: false,
            peers: Vec::new(),
        }
    }
}

impl Experiment {
    /// Runs it and writes its samples, and the facts of the host beside them.
    pub fn run(&self, settings: &Settings) -> Result<()> {
        let host = HostFacts::gather().write(&settings.out)?;
        let own = match settings.extent {
            Extent::Fast => 1,
            Extent::Ordinary => self.runs.0,
            Extent::Full => self.runs.1,
        };
        let mut session = Session::open(self.name, own, settings, &host)?;
        (self.run)(&mut session)?;
        session.close()
    }
}
