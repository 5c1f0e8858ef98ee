//! What a report says, and in which order: claims first.

use std::collections::{BTreeMap, BTreeSet};

use super::claims::State;
use super::document::{Block, Cell, Tone};
use super::findings::{Finding, Findings, Verdict};
use super::plots::Plot;
use super::{beside, costs, others, slopes};
use crate::host::HostFacts;
use crate::progress::Note;
use crate::samples::Sample;

/// Everything that a report is made of.
pub(super) struct Material<'a> {
    pub(super) findings: &'a Findings,
    pub(super) plots: &'a [Plot],
    pub(super) samples: &'a [Sample],
    /// What was said of experiments, with their names.
    pub(super) notes: &'a [(&'a str, Note)],
    pub(super) hosts: &'a BTreeMap<String, HostFacts>,
}

/// The report.
pub(super) fn blocks(of: &Material<'_>) -> Vec<Block> {
    let mut blocks = vec![
        Block::Text(
            "Claims of The Design and Implementation of Zap (OSDI 2002), C, and promises of this project, P: the rows of \
             paper-repro/claims.csv. The paper's tables are not at hand: a value of theirs is quoted where somebody who has \
             them has filled it in there. Every number leads to its raw samples."
                .into(),
        ),
        Block::Table(vec!["claim", "source", "ours", "verdict"], of.findings.claims.iter().map(claim).collect()),
        Block::Heading("Numbers to reach".into()),
        Block::Table(
            vec!["measure", "at most", "median", "95 % interval", "samples", "verdict"],
            of.findings.targets.iter().map(target).collect(),
        ),
    ];
    section(&mut blocks, "Beside others", &beside::HEAD, beside::rows(of.samples, of.notes));
    section(&mut blocks, "What a pod costs", &costs::HEAD, costs::rows(of.samples));
    section(&mut blocks, "What one more costs", &slopes::HEAD, slopes::rows(of.samples));
    section(&mut blocks, "Other experiments", &others::HEAD, others::rows(of.samples, of.findings));
    blocks.push(Block::Heading("Pictures".into()));
    blocks.extend((0..of.plots.len()).map(Block::Picture));
    let failed = of.notes.iter().filter(|(_, note)| note.who == "failed");
    let rows = failed.map(|(name, note)| vec![Cell::words(*name), Cell::words(&*note.part), Cell::words(&*note.words)]);
    section(&mut blocks, "What could not be measured", &["experiment", "part", "why"], rows.collect());
    blocks.extend(super::verified::blocks());
    facts(&mut blocks, of);
    blocks
}

/// A heading and a table, where there are rows.
fn section(blocks: &mut Vec<Block>, heading: &str, head: &[&'static str], rows: Vec<Vec<Cell>>) {
    if !rows.is_empty() {
        blocks.extend([Block::Heading(heading.into()), Block::Table(head.to_vec(), rows)]);
    }
}

fn claim(claim: &super::claims::Claim) -> Vec<Cell> {
    let (tone, is_measured) = match claim.state {
        State::Reproduced => (Tone::Good, true),
        State::NotReproduced => (Tone::Bad, true),
        State::NotMeasured | State::NotCompared | State::Tested => (Tone::None, false),
    };
    let ours = Cell::words(&*claim.found);
    let ours = match claim.experiment.filter(|_| is_measured) {
        Some(experiment) => ours.of(experiment),
        None => ours,
    };
    let worded = Cell::words(format!("{}: {}", claim.id, claim.claim));
    vec![worded, Cell::words(&*claim.source), ours, Cell::verdict(claim.state.words(), tone)]
}

fn target(finding: &Finding) -> Vec<Cell> {
    let (unit, of) = (finding.target.unit(), finding.target.experiment);
    let (value, interval) = match finding.estimate {
        Some(e) if finding.samples < 2 => (format!("{:.2} {unit}", e.value), "one run".into()),
        Some(e) => (format!("{:.2} {unit}", e.value), format!("{:.2} to {:.2} {unit}", e.low, e.high)),
        None => ("–".into(), "–".into()),
    };
    let tone = match finding.verdict {
        Verdict::Within | Verdict::Likely => Tone::Good,
        Verdict::Doubtful | Verdict::Missed => Tone::Bad,
        Verdict::NotMeasured => Tone::None,
    };
    let number = |text: String| {
        let cell = Cell::number(text);
        if finding.estimate.is_some() { cell.of(of) } else { cell }
    };
    vec![
        Cell::words(finding.target.what),
        Cell::number(format!("{} {unit}", finding.target.limit)),
        number(value),
        number(interval),
        number(finding.samples.to_string()),
        Cell::verdict(finding.verdict.words(), tone),
    ]
}

/// The values of a fact, each with the experiments that it was true of.
type Values<'a> = Vec<(String, BTreeSet<&'a str>)>;

/// Each fact once where it is the same for all samples, else with the experiments that it was true of.
fn facts(blocks: &mut Vec<Block>, of: &Material<'_>) {
    let mut measured: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for sample in of.samples {
        measured.entry(&sample.host).or_default().insert(&sample.experiment);
    }
    let mut all: Vec<(String, Values<'_>)> = Vec::new();
    for (host, experiments) in &measured {
        for (fact, value) in of.hosts.get(*host).map(HostFacts::described).unwrap_or_default() {
            let place = all.iter().position(|(known, _)| *known == fact).unwrap_or_else(|| {
                all.push((fact, Vec::new()));
                all.len() - 1
            });
            match all[place].1.iter_mut().find(|(known, _)| *known == value) {
                Some((_, known)) => known.extend(experiments),
                None => all[place].1.push((value, experiments.clone())),
            }
        }
    }
    let said = |values: Values<'_>| {
        let is_one = values.len() == 1;
        let each = values.into_iter().map(|(value, experiments)| {
            let of = experiments.into_iter().collect::<Vec<_>>().join(", ");
            if is_one { value } else { format!("{value} ({of})") }
        });
        each.collect::<Vec<_>>().join("; ")
    };
    let rows = all.into_iter().map(|(fact, values)| vec![Cell::words(fact), Cell::words(said(values))]).collect();
    section(blocks, "Where it was measured", &["fact", "value"], rows);
    let mut seeds: Vec<u64> = of.samples.iter().map(|sample| sample.seed).collect();
    seeds.sort_unstable();
    seeds.dedup();
    let seeds: Vec<String> = seeds.iter().map(u64::to_string).collect();
    blocks.push(Block::Text(format!(
        "{} raw samples, in raw/*.csv; the facts, by the name that each sample has, in raw/host.json; seeds {}.",
        of.samples.len(),
        seeds.join(", ")
    )));
}
