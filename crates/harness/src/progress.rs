//! How far an experiment has come: `raw/EXPERIMENT.progress.json`, beside its samples.
//!
//! A round is written down when all of its samples are: an experiment that is resumed drops the samples of rounds that
//! were cut off, and goes on with those.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::samples::raw_dir;

/// What was said of a part of an experiment, beside its samples.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    /// The part, most often a workload.
    pub part: String,
    /// `failed`, or the name of a peer.
    pub who: String,
    /// In whose words it was said.
    pub words: String,
}

/// A round that is whole.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Round {
    part: String,
    seconds: f64,
    /// Where in the file of samples it begins and ends.
    bytes: (u64, u64),
}

/// What is written down of an experiment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Written {
    finished: bool,
    rounds: Vec<Round>,
    notes: Vec<Note>,
}

/// See the [module](self).
#[derive(Debug)]
pub struct Progress {
    path: PathBuf,
    written: Written,
}

impl Progress {
    /// That of `experiment` below `out`: as it was if it is resumed, from the beginning else.
    pub fn open(out: &Path, experiment: &str, resume: bool) -> Result<Self> {
        let path = path_of(out, experiment);
        let mut written = if resume { read(&path)? } else { Written::default() };
        written.finished = false;
        // What failed is tried again, and who said something says it again.
        written.notes.clear();
        let samples = crate::samples::path_of(out, experiment);
        keep_whole_rounds(&samples, &mut written.rounds).with_context(|| format!("cutting {}", samples.display()))?;
        let progress = Self { path, written };
        progress.write()?;
        Ok(progress)
    }

    /// How many whole rounds there are of a part.
    pub fn rounds_of(&self, part: &str) -> u32 {
        self.written.rounds.iter().filter(|round| round.part == part).count() as u32
    }

    /// A round of a part is whole; its samples are at `bytes` (from, to) of their file.
    pub fn round(&mut self, part: &str, took: Duration, bytes: (u64, u64)) -> Result<()> {
        self.written.rounds.push(Round { part: part.into(), seconds: took.as_secs_f64(), bytes });
        self.write()
    }

    /// Something was said.
    pub fn note(&mut self, note: Note) -> Result<()> {
        if !self.written.notes.contains(&note) {
            self.written.notes.push(note);
        }
        self.write()
    }

    /// All rounds are whole.
    pub fn finish(&mut self) -> Result<()> {
        self.written.finished = true;
        self.write()
    }

    fn write(&self) -> Result<()> {
        let parent = self.path.parent().context("a file of progress has no directory")?;
        std::fs::create_dir_all(parent).with_context(|| format!("making {}", parent.display()))?;
        let beside = self.path.with_extension("json.new");
        let text = serde_json::to_string_pretty(&self.written)? + "\n";
        std::fs::write(&beside, text).with_context(|| format!("writing {}", beside.display()))?;
        std::fs::rename(&beside, &self.path).with_context(|| format!("writing {}", self.path.display()))
    }
}

/// Whether `experiment` has been measured to its end below `out`.
pub fn is_finished(out: &Path, experiment: &str) -> bool {
    read(&path_of(out, experiment)).is_ok_and(|written| written.finished)
}

/// What was said of all of `experiments` below `out`, with the name of the experiment.
pub fn notes<'e>(out: &Path, experiments: impl Iterator<Item = &'e str>) -> Result<Vec<(&'e str, Note)>> {
    let mut notes = Vec::new();
    for experiment in experiments {
        notes.extend(read(&path_of(out, experiment))?.notes.into_iter().map(|note| (experiment, note)));
    }
    Ok(notes)
}

/// Has nothing in the file of samples but its first line and the rounds, which move to where they are then.
fn keep_whole_rounds(samples: &Path, rounds: &mut [Round]) -> Result<()> {
    let text = match std::fs::read(samples) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    let head = text.iter().position(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    let mut kept = if rounds.is_empty() { Vec::new() } else { text[..head].to_vec() };
    for round in rounds {
        let (from, to) = (round.bytes.0.max(head as u64) as usize, round.bytes.1 as usize);
        let rows = text.get(from..to).context("it is shorter than its rounds")?;
        let start = kept.len() as u64;
        kept.extend(rows);
        round.bytes = (start, kept.len() as u64);
    }
    Ok(std::fs::write(samples, kept)?)
}

fn path_of(out: &Path, experiment: &str) -> PathBuf {
    raw_dir(out).join(format!("{experiment}.progress.json"))
}

fn read(path: &Path) -> Result<Written> {
    match std::fs::read_to_string(path) {
        Ok(text) => {
            serde_json::from_str(&text).with_context(|| format!("{} is not a file of progress", path.display()))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Written::default()),
        Err(error) => Err(error).with_context(|| format!("reading {}", path.display())),
    }
}

/// A time in words that are short.
pub fn readable(time: Duration) -> String {
    let seconds = time.as_secs_f64().ceil() as u64;
    match seconds {
        0..=99 => format!("{seconds} s"),
        100..=5999 => format!("{} min", seconds.div_ceil(60)),
        _ => format!("{:.1} h", seconds as f64 / 3600.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_rounds_are_found_again_by_who_resumes() {
        let out = tempfile::tempdir().unwrap();
        let mut progress = Progress::open(out.path(), "some", false).unwrap();
        let samples = crate::samples::path_of(out.path(), "some");
        std::fs::write(&samples, "head\na0\ncut\nb0\ncut\n").unwrap();
        progress.round("a", Duration::from_secs(2), (0, 8)).unwrap();
        progress.round("b", Duration::from_secs(2), (12, 15)).unwrap();
        progress.note(Note { part: "a".into(), who: "failed".into(), words: "no".into() }).unwrap();
        assert_eq!(notes(out.path(), ["some", "none"].into_iter()).unwrap().len(), 1);
        progress.finish().unwrap();
        assert!(is_finished(out.path(), "some") && !is_finished(out.path(), "none"));
        let again = Progress::open(out.path(), "some", true).unwrap();
        assert_eq!((again.rounds_of("a"), again.rounds_of("c")), (1, 0));
        assert_eq!(std::fs::read_to_string(&samples).unwrap(), "head\na0\nb0\n");
        let again = Progress::open(out.path(), "some", true).unwrap();
        assert_eq!(again.rounds_of("b"), 1);
        assert_eq!(std::fs::read_to_string(&samples).unwrap(), "head\na0\nb0\n");
        let anew = Progress::open(out.path(), "some", false).unwrap();
        assert_eq!(anew.rounds_of("a"), 0);
        assert_eq!(std::fs::read_to_string(&samples).unwrap(), "");
    }

    #[test]
    fn times_are_short() {
        let texts = [5, 99, 100, 3600, 7200].map(|seconds| readable(Duration::from_secs(seconds)));
        assert_eq!(texts, ["5 s", "99 s", "2 min", "60 min", "2.0 h"]);
    }
}
