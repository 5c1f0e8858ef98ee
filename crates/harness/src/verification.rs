//! What tests have tried, for the report: each test writes a table of its own, `NAME.csv`, into one directory.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Mutex;

/// The directory: `ZAP_VERIFICATION`, or `verification` in the workspace's `target`.
pub fn directory() -> PathBuf {
    match std::env::var_os("ZAP_VERIFICATION") {
        Some(directory) => directory.into(),
        None => PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../target/verification"),
    }
}

/// What counts begin with that say at how many checkpoints somebody lived who had taken a kind of step.
pub const ALIVE: &str = "alive at a checkpoint: ";

/// Counts by what was counted, from several threads.
#[derive(Debug)]
pub struct Tally {
    name: &'static str,
    counts: Mutex<BTreeMap<String, u64>>,
}

impl Tally {
    /// For the table of the test `name`. The last run's is removed: a run that fails leaves none.
    pub fn of(name: &'static str) -> io::Result<Tally> {
        match std::fs::remove_file(directory().join(format!("{name}.csv"))) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(Tally { name, counts: Mutex::default() }),
        }
    }

    /// Counts one more.
    pub fn count(&self, what: impl Into<String>) {
        self.add(what, 1);
    }

    /// Counts as many more.
    pub fn add(&self, what: impl Into<String>, many: u64) {
        let mut counts = self.counts.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        *counts.entry(what.into()).or_insert(0) += many;
    }

    /// Writes the table: a row for each thing that was counted.
    pub fn write(&self) -> io::Result<()> {
        let counts = self.counts.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let rows: Vec<[String; 2]> = counts.iter().map(|(what, count)| [what.clone(), count.to_string()]).collect();
        write(self.name, &["what", "count"], &rows)
    }
}

/// Writes a table with these columns.
pub fn write<const N: usize>(name: &str, columns: &[&str; N], rows: &[[String; N]]) -> io::Result<()> {
    let directory = directory();
    std::fs::create_dir_all(&directory)?;
    let mut table = csv::Writer::from_path(directory.join(format!("{name}.csv")))?;
    table.write_record(columns)?;
    rows.iter().try_for_each(|row| table.write_record(row))?;
    table.flush()
}

/// A table as it was written: the columns, and the rows; nothing if that test has not been run.
pub fn read(name: &str) -> Option<(Vec<String>, Vec<Vec<String>>)> {
    let mut table = csv::Reader::from_path(directory().join(format!("{name}.csv"))).ok()?;
    let words = |record: &csv::StringRecord| record.iter().map(str::to_owned).collect::<Vec<_>>();
    let columns = words(table.headers().ok()?);
    let rows = table.records().map(|record| record.map(|record| words(&record)));
    Some((columns, rows.collect::<Result<_, _>>().ok()?))
}

/// The names of all tables that there are.
pub fn names() -> Vec<String> {
    let entries = std::fs::read_dir(directory()).into_iter().flatten().flatten();
    let name = |entry: std::fs::DirEntry| Some(entry.file_name().to_str()?.strip_suffix(".csv")?.to_owned());
    let mut names: Vec<String> = entries.filter_map(name).collect();
    names.sort();
    names
}
