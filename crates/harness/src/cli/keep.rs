//! `harness keep`.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::program::Step;
use crate::verification;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// What it is about, in small letters and hyphens
    name: String,
    /// The program, as it was written down when it failed [default: the one
    /// that failed last in target/verification]
    #[arg(value_name = "FILE")]
    case: Option<PathBuf>,
}

pub(super) fn run(arguments: &Arguments) -> Result<ExitCode> {
    let case = arguments.case.clone().map_or_else(|| latest(&verification::directory()), Ok)?;
    let kept = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/properties/kept");
    let place = keep(&kept, &arguments.name, &case)?;
    eprintln!("{} is tried always; what failed in {} belongs into its commit", place.display(), case.display());
    Ok(ExitCode::SUCCESS)
}

/// The program that failed last.
fn latest(directory: &Path) -> Result<PathBuf> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let failed = entries.filter(|entry| {
        let name = entry.file_name();
        name.to_str().is_some_and(|name| name.starts_with("failed-") && name.ends_with(".json"))
    });
    let last = failed.max_by_key(|entry| entry.metadata().and_then(|facts| facts.modified()).ok());
    let last = last.with_context(|| format!("no program has failed: there is none in {}", directory.display()))?;
    Ok(last.path())
}

/// What a file of a case has.
#[derive(Deserialize)]
struct Case {
    steps: Vec<Step>,
    actions: Vec<IgnoredAny>,
}

/// Copies a case, if it is one, to those that are tried always.
fn keep(kept: &Path, name: &str, case: &Path) -> Result<PathBuf> {
    let is_plain = |letter: char| letter.is_ascii_lowercase() || letter.is_ascii_digit() || letter == '-';
    ensure!(!name.is_empty() && name.chars().all(is_plain), "{name:?}: small letters, digits and hyphens are wanted");
    let text = std::fs::read_to_string(case).with_context(|| case.display().to_string())?;
    let found: Case = serde_json::from_str(&text).with_context(|| format!("{}: not a case", case.display()))?;
    ensure!(!found.steps.is_empty() && !found.actions.is_empty(), "{}: nothing is done in it", case.display());
    let place = kept.join(format!("{name}.json"));
    let mut file = File::create_new(&place).with_context(|| place.display().to_string())?;
    file.write_all(text.as_bytes())?;
    Ok(place)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_that_failed_is_kept_once_under_a_plain_name() {
        let [from, to] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let at = |name: &str| from.path().join(name);
        assert!(latest(from.path()).is_err());
        let case = r#"{"actions": ["Restart"], "steps": [{"who": 0, "op": "Pause"}]}"#;
        std::fs::write(at("failed-1.json"), "{}").unwrap();
        std::fs::write(at("equivalence.csv"), "").unwrap();
        std::fs::write(at("failed-2.json"), case).unwrap();
        let before = std::time::SystemTime::now() - std::time::Duration::from_secs(60);
        File::options().append(true).open(at("failed-1.json")).unwrap().set_modified(before).unwrap();
        let last = latest(from.path()).unwrap();
        assert_eq!(last, at("failed-2.json"));
        assert!(keep(to.path(), "../elsewhere", &last).is_err());
        assert!(keep(to.path(), "no-case", &at("failed-1.json")).is_err());
        let place = keep(to.path(), "a-name", &last).unwrap();
        assert_eq!(
            (place.clone(), std::fs::read_to_string(&place).unwrap()),
            (to.path().join("a-name.json"), case.into())
        );
        assert!(keep(to.path(), "a-name", &last).is_err(), "nothing is overwritten");
    }
}
