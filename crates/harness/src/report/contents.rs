//! What a report says, and in which order: claims first.

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
    pub(super) host: &'a HostFacts,
}

/// The report.
pub(super) fn blocks(of: &Material<'_>) -> Vec<Block> {
    let mut blocks = vec![
        Block::Text(
            "Claims of The Design and Implementation of Zap (OSDI 2002) as they are worded there, and promises of this \
             project. The paper's tables are not at hand, so no number of theirs is quoted. Every number leads to its raw \
             samples."
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
    let verdict = match claim.reproduced {
        Some(true) => Cell::verdict("reproduced", Tone::Good),
        Some(false) => Cell::verdict("not reproduced", Tone::Bad),
        None => Cell::verdict("not measured", Tone::None),
    };
    let ours = Cell::words(&*claim.found);
    let ours = if claim.reproduced.is_some() { ours.of(claim.experiment) } else { ours };
    vec![Cell::words(format!("“{}”", claim.claim)), Cell::words(claim.source), ours, verdict]
}

fn target(finding: &Finding) -> Vec<Cell> {
    let (unit, of) = (finding.target.unit(), finding.target.experiment);
    let (value, interval) = match finding.estimate {
        Some(e) => (format!("{:.2} {unit}", e.value), format!("{:.2} to {:.2}", e.low, e.high)),
        None => ("–".into(), "–".into()),
    };
    let tone = match finding.verdict {
        Verdict::Within | Verdict::Likely => Tone::Good,
        Verdict::Doubtful | Verdict::Missed => Tone::Bad,
        Verdict::NotMeasured => Tone::None,
    };
    let value = Cell::number(value);
    vec![
        Cell::words(finding.target.what),
        Cell::number(format!("{} {unit}", finding.target.limit)),
        if finding.estimate.is_some() { value.of(of) } else { value },
        Cell::number(interval),
        Cell::number(finding.samples.to_string()),
        Cell::verdict(finding.verdict.words(), tone),
    ]
}

fn facts(blocks: &mut Vec<Block>, of: &Material<'_>) {
    let host = of.host;
    let gib = host.memory_bytes as f64 / f64::from(1 << 30);
    let mut rows = vec![
        ("kernel".to_string(), host.kernel.clone()),
        ("distribution".into(), host.distribution.clone()),
        ("CPU".into(), format!("{} × {}", host.cpus, host.cpu)),
        ("memory".into(), format!("{gib:.1} GiB")),
        ("virtual machine".into(), if host.virtual_machine { "yes" } else { "no" }.into()),
        ("commit".into(), host.commit.clone().unwrap_or_else(|| "unknown".into())),
        ("load at the start".into(), host.load.clone()),
    ];
    rows.extend(host.noise.map(|noise| {
        let words = format!(
            "the same work of about a millisecond again and again: 95th percentile {:.0} % above the median, {:.1} % of the \
             time taken by the machine's owner",
            noise.spread * 100.0,
            noise.stolen * 100.0
        );
        ("noise".to_string(), words)
    }));
    rows.extend(host.packages.iter().map(|(name, version)| (name.clone(), version.clone())));
    rows.extend(host.mitigations.iter().map(|(name, state)| (name.clone(), state.clone())));
    let rows = rows.into_iter().map(|(name, value)| vec![Cell::words(name), Cell::words(value)]).collect();
    section(blocks, "Where it was measured", &["fact", "value"], rows);
    let mut seeds: Vec<u64> = of.samples.iter().map(|sample| sample.seed).collect();
    seeds.sort_unstable();
    seeds.dedup();
    let seeds: Vec<String> = seeds.iter().map(u64::to_string).collect();
    blocks.push(Block::Text(format!("{} raw samples, in raw/*.csv; seeds {}.", of.samples.len(), seeds.join(", "))));
}
