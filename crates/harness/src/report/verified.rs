//! What tests have tried, from the tables that they wrote ([`crate::verification`]): cases and seeds, operations by the
//! checkpoints that they were alive at, faults and what became of them, and what is known not to hold.

use super::document::{Block, Cell};
use crate::verification;

const KNOWN: &str = include_str!("../../../../docs/known-failures.md");
const ALIVE: &str = "before a checkpoint: ";

/// The section; nothing if no test has left a table.
pub(super) fn blocks() -> Vec<Block> {
    let tests = ["equivalence", "names", "lifecycle", "hostile"].map(|name| (name, verification::read(name)));
    let tried: Vec<(&str, Vec<Vec<String>>)> =
        tests.into_iter().filter_map(|(name, table)| Some((name, table?.1))).collect();
    let faults: Vec<Vec<Cell>> = verification::names()
        .iter()
        .filter(|name| name.starts_with("faults-"))
        .filter_map(|name| verification::read(name))
        .flat_map(|(_, rows)| rows)
        .map(|row| row.into_iter().map(Cell::words).collect())
        .collect();
    if tried.is_empty() && faults.is_empty() {
        return Vec::new();
    }
    let counts = |alive: bool| {
        let rows = tried.iter().flat_map(|(test, rows)| rows.iter().map(move |row| (*test, row)));
        rows.filter(move |(_, row)| row[0].starts_with(ALIVE) == alive)
    };
    let summary =
        counts(false).map(|(test, row)| vec![Cell::words(test), Cell::words(&*row[0]), Cell::number(&*row[1])]);
    let operations =
        counts(true).map(|(_, row)| vec![Cell::words(row[0].trim_start_matches(ALIVE)), Cell::number(&*row[1])]);
    let mut blocks = vec![
        Block::Heading("Verification".into()),
        Block::Text("What generated cases tried; a seed tries the same cases again.".into()),
        Block::Table(vec!["test", "what", "times"], summary.collect()),
        Block::Text("Operations that processes had done when they were written down.".into()),
        Block::Table(vec!["operation", "checkpoints"], operations.collect()),
    ];
    if !faults.is_empty() {
        blocks.push(Block::Text("Faults, and what became of pod and host.".into()));
        blocks.push(Block::Table(vec!["fault", "outcome"], faults));
    }
    let gaps: Vec<Vec<Cell>> = known_gaps(KNOWN).into_iter().map(|gap| vec![Cell::words(gap)]).collect();
    blocks.push(Block::Table(vec!["known gaps (docs/known-failures.md)"], gaps));
    blocks
}

/// The titles of a numbered list.
fn known_gaps(page: &str) -> Vec<String> {
    let text = page.split_whitespace().collect::<Vec<_>>().join(" ");
    let parts = text.split(". **").skip(1).filter_map(|rest| rest.split_once("**"));
    parts.map(|(title, _)| title.to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_the_titles_of_the_list() {
        assert_eq!(known_gaps("What.\n\n1. **One\n   thing** is\n2. **Other**: x"), ["One thing", "Other"]);
        assert!(known_gaps(KNOWN).len() > 5);
    }
}
