//! What tests have tried, from the tables that they wrote ([`crate::verification`]): cases and seeds, operations by the
//! checkpoints that they were alive at, faults and what became of them, and what is known not to hold.

use std::collections::BTreeMap;

use super::document::{Block, Cell, Tone};
use crate::program::BY_ANOTHER;
use crate::verification::{self, ALIVE};

/// What the names of tables of faults begin with.
const FAULTS: &str = "faults-";
const SEED: &str = "seed ";
const KNOWN: &str = include_str!("../../../../docs/known-failures.md");

/// What errors at a fault point are called in tables, and at the head of ours.
const HOW: [(&str, &str); 3] = [("monitor killed", "monitor killed"), ("error", "EIO"), ("ENOSPC", "ENOSPC")];

/// The section; nothing if no test has left a table.
pub(super) fn blocks() -> Vec<Block> {
    let (faults, counts): (Vec<String>, Vec<String>) =
        verification::names().into_iter().partition(|name| name.starts_with(FAULTS));
    let tables = |names: Vec<String>| -> Vec<(String, Vec<Vec<String>>)> {
        names.into_iter().filter_map(|name| Some((name.clone(), verification::read(&name)?.1))).collect()
    };
    let (faults, counts) = (tables(faults), tables(counts));
    if faults.is_empty() && counts.is_empty() {
        return Vec::new();
    }
    let mut blocks = vec![Block::Heading("Verification".into())];
    blocks.extend(tried(&counts));
    blocks.extend(survived(&faults));
    let gaps: Vec<Vec<Cell>> = known_gaps(KNOWN).into_iter().map(|gap| vec![Cell::words(gap)]).collect();
    blocks.push(Block::Table(vec!["known gaps (docs/known-failures.md)"], gaps));
    blocks
}

/// What cases there were, and which operations were alive when they were written down.
fn tried(counts: &[(String, Vec<Vec<String>>)]) -> Vec<Block> {
    let is_alive = |row: &[String]| row[0].starts_with(ALIVE);
    let summary = counts.iter().map(|(test, rows)| {
        let (seeds, others): (Vec<_>, Vec<_>) =
            rows.iter().filter(|row| !is_alive(row)).partition(|row| row[0].starts_with(SEED));
        let others: Vec<String> = others.iter().map(|row| format!("{} {}", row[1], row[0])).collect();
        let seeds: Vec<&str> = seeds.iter().map(|row| row[0].trim_start_matches(SEED)).collect();
        vec![Cell::words(test), Cell::words(others.join(", ")), Cell::words(seeds.join(", "))]
    });
    let of_equivalence = counts.iter().filter(|(test, _)| test == "equivalence").flat_map(|(_, rows)| rows);
    let alive: BTreeMap<&str, &str> = of_equivalence
        .filter(|row| is_alive(row))
        .map(|row| (row[0].trim_start_matches(ALIVE), row[1].as_str()))
        .collect();
    let kinds: Vec<[Cell; 3]> = alive
        .iter()
        .filter(|(kind, _)| !kind.ends_with(BY_ANOTHER))
        .map(|(kind, count)| {
            let by_another = alive.get(&*format!("{kind}{BY_ANOTHER}")).copied().unwrap_or("0");
            [Cell::words(*kind), Cell::number(*count), Cell::number(by_another)]
        })
        .collect();
    let beside = kinds.chunks(2).map(|some| some.concat()).collect();
    vec![
        Block::Text("What generated cases tried; a seed tries the same cases again.".into()),
        Block::Table(vec!["test", "what was tried", "seeds"], summary.collect()),
        Block::Text(
            "At how many checkpoints a process lived that had taken a step of a kind, and one of which a thread other than \
             its first had taken it."
                .into(),
        ),
        Block::Table(vec!["step", "checkpoints", "by a thread", "step", "checkpoints", "by a thread"], beside),
    ]
}

/// What became of pod and host: of faults at named points, by how they failed, and of others.
fn survived(faults: &[(String, Vec<Vec<String>>)]) -> Vec<Block> {
    let mut points: Vec<(String, [String; HOW.len()])> = Vec::new();
    let mut others = Vec::new();
    for (table, rows) in faults {
        let test = table.trim_start_matches(FAULTS).replace('-', " ");
        for row in rows {
            let [fault, outcome] = &row[..] else { continue };
            let at = fault.split_once(" at ").and_then(|(how, point)| {
                Some((HOW.iter().position(|(name, _)| *name == how)?, format!("{test}: {point}")))
            });
            match at {
                None => others.push(vec![Cell::words(fault), Cell::words(outcome)]),
                Some((how, point)) => {
                    let known = points.iter().position(|(name, _)| *name == point);
                    let place = known.unwrap_or_else(|| {
                        points.push((point, Default::default()));
                        points.len() - 1
                    });
                    points[place].1[how].clone_from(outcome);
                }
            }
        }
    }
    let row = |(point, outcomes): (String, [String; HOW.len()])| {
        let outcomes = outcomes.into_iter().map(|outcome| {
            if outcome.is_empty() { Cell::verdict("cannot fail", Tone::None) } else { Cell::words(outcome) }
        });
        std::iter::once(Cell::words(point)).chain(outcomes).collect()
    };
    let head = std::iter::once("fault point").chain(HOW.map(|(_, head)| head)).collect();
    vec![
        Block::Text("What became of pod and host, by the point at which something failed and how.".into()),
        Block::Table(head, points.into_iter().map(row).collect()),
        Block::Text("Of full disks, short writes, and wires that stalled or were cut.".into()),
        Block::Table(vec!["fault", "outcome"], others),
    ]
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
