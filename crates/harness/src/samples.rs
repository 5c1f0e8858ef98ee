//! Raw samples: one row a measured value, with every parameter it depends on.
//!
//! Samples are written as they are measured and analysed separately: [`crate::report`] reads nothing else.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

/// One measured value.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// The experiment that measured it.
    pub experiment: String,
    /// What ran.
    pub workload: String,
    /// Everything that was set, as `key=value` joined by `;`.
    pub parameters: String,
    /// Which side of a comparison, such as `pod` or `native`.
    pub arm: String,
    /// Which repetition, from 0.
    pub run: u32,
    /// What was measured.
    pub metric: String,
    /// How much.
    pub value: f64,
    /// In what: `us`, `ns`, `bytes`, `1/s` …
    pub unit: String,
    /// Seed of the order and of whatever else was drawn at random.
    pub seed: u64,
    /// The name of the facts of the host, and of what was measured there, among those in `host.json`: it begins with the commit.
    #[serde(default)]
    pub host: String,
}

/// The head of a file of samples.
const HEAD: &str = "experiment,workload,parameters,arm,run,metric,value,unit,seed,host";

/// Writes the samples of one experiment, row by row: what was measured before an interruption is kept.
#[derive(Debug)]
pub struct Recorder {
    writer: csv::Writer<File>,
    experiment: &'static str,
    seed: u64,
    host: String,
}

impl Recorder {
    /// A recorder for `experiment` below `out`, which adds to what is there. `host` is the name of the facts
    /// ([`crate::host::HostFacts::write`]).
    pub fn open(out: &Path, experiment: &'static str, seed: u64, host: &str) -> Result<Self> {
        let path = path_of(out, experiment);
        std::fs::create_dir_all(raw_dir(out)).with_context(|| format!("making {}", raw_dir(out).display()))?;
        if let Some(head) = std::fs::read_to_string(&path).ok().as_deref().and_then(|text| text.lines().next()) {
            let with = "an older harness wrote that: it cannot be added to (leave out --resume)";
            ensure!(head == HEAD, "{}: {with}", path.display());
        }
        let opened = File::options().create(true).append(true).open(&path);
        let file = opened.with_context(|| format!("making {}", path.display()))?;
        let empty = file.metadata().with_context(|| format!("looking at {}", path.display()))?.len() == 0;
        let writer = csv::WriterBuilder::new().has_headers(empty).from_writer(file);
        Ok(Self { writer, experiment, seed, host: host.into() })
    }

    /// How long the file is.
    pub fn bytes(&self) -> Result<u64> {
        Ok(self.writer.get_ref().metadata().context("looking at samples")?.len())
    }

    /// The seed that is noted with each sample.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Notes one value.
    pub fn record(&mut self, context: &Circumstances<'_>, metric: &str, value: f64, unit: &str) -> Result<()> {
        self.writer.serialize(Sample {
            experiment: self.experiment.into(),
            workload: context.workload.into(),
            parameters: context.parameters.into(),
            arm: context.arm.into(),
            run: context.run,
            metric: metric.into(),
            value,
            unit: unit.into(),
            seed: self.seed,
            host: self.host.clone(),
        })?;
        self.writer.flush().context("writing samples")
    }
}

/// What the samples of one run have in common.
#[derive(Clone, Copy, Debug)]
pub struct Circumstances<'a> {
    /// What ran.
    pub workload: &'a str,
    /// Everything that was set, as `key=value` joined by `;`.
    pub parameters: &'a str,
    /// Which side of a comparison.
    pub arm: &'a str,
    /// Which repetition.
    pub run: u32,
}

/// Where raw samples are below `out`.
pub fn raw_dir(out: &Path) -> PathBuf {
    out.join("raw")
}

/// Where the samples of an experiment are.
pub fn path_of(out: &Path, experiment: &str) -> PathBuf {
    raw_dir(out).join(format!("{experiment}.csv"))
}

/// Every sample below `out`, in the order of file names and rows.
pub fn read_all(out: &Path) -> Result<Vec<Sample>> {
    let dir = raw_dir(out);
    let mut paths: Vec<PathBuf> = std::fs::read_dir(&dir)
        .with_context(|| format!("there are no samples in {}", dir.display()))?
        .filter_map(|entry| entry.ok().map(|e| e.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "csv"))
        .collect();
    paths.sort();
    let mut samples = Vec::new();
    for path in paths {
        let mut reader = csv::Reader::from_path(&path).with_context(|| format!("reading {}", path.display()))?;
        for row in reader.deserialize() {
            samples.push(row.with_context(|| format!("a row of {}", path.display()))?);
        }
    }
    Ok(samples)
}

/// The values of one metric of one arm of one workload.
pub fn values(samples: &[Sample], experiment: &str, workload: &str, arm: &str, metric: &str) -> Vec<f64> {
    of(samples, [experiment, workload, arm, metric]).map(|s| s.value).collect()
}

/// The samples of one metric of one arm of one workload.
fn of<'s>(samples: &'s [Sample], of: [&'s str; 4]) -> impl Iterator<Item = &'s Sample> {
    samples.iter().filter(move |s| [&*s.experiment, &*s.workload, &*s.arm, &*s.metric] == of)
}

/// The same values by a number that the parameters name, in its order.
pub fn values_by(samples: &[Sample], wanted: [&str; 4], parameter: &str) -> Vec<(f64, Vec<f64>)> {
    let mut found: Vec<(f64, f64)> =
        of(samples, wanted).filter_map(|sample| Some((number(sample, parameter)?, sample.value))).collect();
    found.sort_by(|a, b| a.0.total_cmp(&b.0));
    let same = found.chunk_by(|a, b| a.0 == b.0);
    same.map(|some| (some[0].0, some.iter().map(|(_, value)| *value).collect())).collect()
}

/// The number that the parameters of a sample name.
pub fn number(sample: &Sample, parameter: &str) -> Option<f64> {
    let pair = |pair: &str| pair.strip_prefix(parameter)?.strip_prefix('=')?.parse().ok();
    sample.parameters.split(';').find_map(pair)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_recorded_is_read_back() {
        let out = tempfile::tempdir().unwrap();
        let mut recorder = Recorder::open(out.path(), "some", 7, "abc@1").unwrap();
        let context = Circumstances { workload: "sleep", parameters: "a=1;b=2", arm: "pod", run: 3 };
        recorder.record(&context, "downtime", 1234.5, "us").unwrap();
        let samples = read_all(out.path()).unwrap();
        assert_eq!(samples.len(), 1);
        assert_eq!((samples[0].seed, samples[0].run, samples[0].value), (7, 3, 1234.5));
        assert_eq!(values(&samples, "some", "sleep", "pod", "downtime"), [1234.5]);
        assert!(values(&samples, "some", "sleep", "native", "downtime").is_empty());
        let mut again = Recorder::open(out.path(), "some", 8, "abc@2").unwrap();
        again.record(&context, "downtime", 2.0, "us").unwrap();
        let all = read_all(out.path()).unwrap();
        assert_eq!(values(&all, "some", "sleep", "pod", "downtime"), [1234.5, 2.0]);
        assert_eq!([&*all[0].host, &*all[1].host], ["abc@1", "abc@2"]);
    }

    #[test]
    fn samples_of_before_are_read_and_not_added_to() {
        let out = tempfile::tempdir().unwrap();
        std::fs::create_dir(raw_dir(out.path())).unwrap();
        let old = "experiment,workload,parameters,arm,run,metric,value,unit,seed\nsome,sleep,,pod,0,whole,1.5,us,7\n";
        std::fs::write(path_of(out.path(), "some"), old).unwrap();
        assert_eq!(read_all(out.path()).unwrap()[0].host, "");
        let error = Recorder::open(out.path(), "some", 7, "abc@1").unwrap_err().to_string();
        assert!(error.ends_with("(leave out --resume)"), "{error}");
    }

    #[test]
    fn values_are_told_apart_by_a_number() {
        let sample = |parameters: &str, value: f64| Sample {
            experiment: "some".into(),
            workload: "sleep".into(),
            parameters: parameters.into(),
            arm: "pod".into(),
            run: 0,
            metric: "whole".into(),
            value,
            unit: "us".into(),
            seed: 0,
            host: String::new(),
        };
        let all = [sample("a=1;n=10", 5.0), sample("n=2", 6.0), sample("n=10", 7.0), sample("nn=3", 8.0)];
        let found = values_by(&all, ["some", "sleep", "pod", "whole"], "n");
        assert_eq!(found, [(2.0, vec![6.0]), (10.0, vec![5.0, 7.0])]);
    }

    #[test]
    fn no_directory_says_so() {
        let out = tempfile::tempdir().unwrap();
        let error = read_all(&out.path().join("none")).unwrap_err().to_string();
        assert!(error.starts_with("there are no samples in "), "{error}");
    }
}
