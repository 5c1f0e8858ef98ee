//! Zap beside its peers: the same workload, in the same run, in turns.

use rand::SeedableRng;
use rand::rngs::StdRng;

use super::document::{Cell, Tone};
use crate::experiment::rivals::MEASURED;
use crate::progress::Note;
use crate::samples::{Sample, values};
use crate::stats::{Estimate, median, paired_ratio};

const EXPERIMENT: &str = "checkpoint-restart";

const PEERS: [&str; 2] = ["criu", "native"];

/// What is compared: in words, our arm and metric, the peer and its arm.
const MEASURES: [(&str, &str, &str, &str, &str); 5] = [
    ("downtime, left running", "leave-running", "downtime", "criu", "criu-leave-running"),
    ("checkpoint, left running", "leave-running", "whole", "criu", "criu-leave-running"),
    ("checkpoint, stopped", "stop", "whole", "criu", "criu-stop"),
    ("restart", "restart", "whole", "criu", "criu-restart"),
    ("restart, against starting it anew", "restart", "whole", "native", "native-start"),
];

/// The head of the table.
pub(super) const HEAD: [&str; 6] = ["workload", "measure", "peer", "zap", "peer's", "verdict"];

/// The rows of the table: everything that was compared, and everything that was not, with the peer's own words; one row for
/// all of a peer of which there is neither.
pub(super) fn rows(samples: &[Sample], notes: &[(&str, Note)]) -> Vec<Vec<Cell>> {
    let mut workloads: Vec<&str> = Vec::new();
    for sample in samples.iter().filter(|sample| sample.experiment == EXPERIMENT) {
        if !workloads.contains(&&*sample.workload) {
            workloads.push(&sample.workload);
        }
    }
    let noted = |peer: &str| notes.iter().any(|(experiment, note)| *experiment == EXPERIMENT && note.who == peer);
    let is_there = |peer: &str| {
        let ran =
            |s: &Sample| s.experiment == EXPERIMENT && s.arm.strip_prefix(peer).is_some_and(|s| s.starts_with('-'));
        noted(peer) || samples.iter().any(ran)
    };
    let said = |workload: &str, peer: &str| {
        let own = notes.iter().filter(|(experiment, note)| {
            *experiment == EXPERIMENT && note.part == workload && note.who == peer && !note.words.starts_with(MEASURED)
        });
        own.map(|(_, note)| note.words.as_str()).collect::<Vec<_>>().join("; ")
    };
    let mut rows = Vec::new();
    for workload in &workloads {
        let measures = MEASURES.into_iter().filter(|measure| is_there(measure.3));
        rows.extend(measures.map(|measure| row(samples, workload, measure, &said(workload, measure.3))));
    }
    for peer in PEERS.into_iter().filter(|peer| !workloads.is_empty() && !is_there(peer)) {
        let none = || Cell::number("–");
        let verdict = Cell::verdict("not compared", Tone::None);
        rows.push(vec![Cell::words("every one"), Cell::words("all"), Cell::words(peer), none(), none(), verdict]);
    }
    rows
}

fn row(
    samples: &[Sample],
    workload: &str,
    (what, arm, metric, peer, their_arm): (&str, &str, &str, &str, &str),
    said: &str,
) -> Vec<Cell> {
    let of = |arm| values(samples, EXPERIMENT, workload, arm, metric);
    let (ours, theirs) = (of(arm), of(their_arm));
    let pairs: Vec<(f64, f64)> = theirs.iter().copied().zip(ours.iter().copied()).collect();
    let ms = |values: &[f64]| median(values).map_or("–".into(), |us| format!("{:.1} ms", us / 1e3));
    let verdict = match paired_ratio(&pairs, &mut StdRng::seed_from_u64(1)) {
        Some(ratio) => judged(ratio).of(EXPERIMENT),
        None if said.is_empty() => Cell::verdict("not compared", Tone::None),
        None => Cell::verdict(format!("not compared; {peer} says: {said}"), Tone::None),
    };
    let number = |values: &[f64]| {
        let cell = Cell::number(ms(values));
        if values.is_empty() { cell } else { cell.of(EXPERIMENT) }
    };
    vec![Cell::words(workload), Cell::words(what), Cell::words(peer), number(&ours), number(&theirs), verdict]
}

/// What the ratio of our time to the peer's says.
fn judged(ratio: Estimate) -> Cell {
    let times = |ratio: f64| if ratio < 1.0 { 1.0 / ratio } else { ratio };
    let interval = format!("ratio {:.2}, 95 % {:.2} to {:.2}", ratio.value, ratio.low, ratio.high);
    if ratio.high < 1.0 {
        Cell::verdict(format!("{:.1} times as fast ({interval})", times(ratio.value)), Tone::Good)
    } else if ratio.low > 1.0 {
        Cell::verdict(format!("{:.1} times as slow ({interval})", times(ratio.value)), Tone::Bad)
    } else {
        Cell::verdict(format!("no clear difference ({interval})"), Tone::None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::findings::tests::sample;

    fn verdicts(samples: &[Sample], notes: &[(&str, Note)]) -> Vec<String> {
        rows(samples, notes).into_iter().map(|row| row[5].text.clone()).collect()
    }

    #[test]
    fn what_was_not_run_is_not_compared() {
        let mut samples: Vec<Sample> = (0..5).map(|run| sample("leave-running", "downtime", run, 10.0)).collect();
        assert_eq!(verdicts(&samples, &[]), ["not compared"; 2]);
        let note = Note { part: "sleep".into(), who: "criu".into(), words: "Error: no".into() };
        assert_eq!(verdicts(&samples, &[(EXPERIMENT, note)])[0], "not compared; criu says: Error: no");
        samples.extend((0..5).map(|run| sample("criu-leave-running", "downtime", run, 30.0)));
        assert!(verdicts(&samples, &[])[0].starts_with("3.0 times as fast"));
    }

    #[test]
    fn a_slower_one_is_said_to_be_slower() {
        let estimate = |value: f64| Estimate { value, low: value - 0.1, high: value + 0.1 };
        assert!(judged(estimate(2.0)).text.starts_with("2.0 times as slow"));
        assert!(judged(estimate(1.0)).text.starts_with("no clear difference"));
    }
}
