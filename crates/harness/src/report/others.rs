//! Medians of what experiments found of which neither a claim nor a target nor another table speaks: new ones are in the
//! report from their first sample.

use rand::SeedableRng;
use rand::rngs::StdRng;

use super::costs;
use super::document::Cell;
use super::findings::{Findings, SEED};
use crate::gate::YARDSTICK;
use crate::samples::Sample;
use crate::stats::{bootstrap, median};

/// The head of the table.
pub(super) const HEAD: [&str; 6] = ["experiment", "what", "arm", "metric", "median", "95 % interval"];

/// A row for each arm and metric; sizes, which are measured in an order that is drawn, from the smallest.
pub(super) fn rows(samples: &[Sample], findings: &Findings) -> Vec<Vec<Cell>> {
    let claims = findings.claims.iter().filter_map(|claim| claim.experiment);
    let known: Vec<&str> = claims.chain(findings.targets.iter().map(|finding| finding.target.experiment)).collect();
    let is_other =
        |s: &&Sample| !known.contains(&&*s.experiment) && !costs::speaks_of(&s.experiment) && s.arm != YARDSTICK;
    let mut keys: Vec<[&str; 6]> = Vec::new();
    for sample in samples.iter().filter(is_other) {
        let key = key(sample);
        if !keys.contains(&key) {
            keys.push(key);
        }
    }
    keys.sort_by_key(|[experiment, workload, parameters, ..]| (*experiment, *workload, parameters.len(), *parameters));
    keys.into_iter().filter_map(|key| row(samples, key)).collect()
}

fn key(s: &Sample) -> [&str; 6] {
    [&s.experiment, &s.workload, &s.parameters, &s.arm, &s.metric, &s.unit]
}

fn row(samples: &[Sample], wanted: [&str; 6]) -> Option<Vec<Cell>> {
    let values: Vec<f64> = samples.iter().filter(|s| key(s) == wanted).map(|s| s.value).collect();
    let found = bootstrap(&values, &mut StdRng::seed_from_u64(SEED), median)?;
    let [experiment, workload, parameters, arm, metric, unit] = wanted;
    let readable = |value| costs::readable(value, unit);
    let interval = match values.len() {
        0..2 => "one run".into(),
        _ => format!("{} to {}", readable(found.low), readable(found.high)),
    };
    let what =
        if parameters.is_empty() { workload.into() } else { format!("{workload}, {}", parameters.replace(';', ", ")) };
    Some(vec![
        Cell::words(experiment),
        Cell::words(what),
        Cell::words(arm),
        Cell::words(metric),
        Cell::number(readable(found.value)).of(experiment),
        Cell::number(interval).of(experiment),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::findings::tests::sample;

    #[test]
    fn an_experiment_that_nothing_speaks_of_has_its_medians() {
        let known = sample("stop", "whole", 0, 9e3);
        let new = |run, value| Sample {
            experiment: "new".into(),
            parameters: "n=2".into(),
            ..sample("some", "whole", run, value)
        };
        let samples =
            [known, new(0, 2000.0), new(1, 3000.0), new(2, 9000.0), Sample { arm: YARDSTICK.into(), ..new(0, 1.0) }];
        let rows = rows(&samples, &Findings::of(&samples));
        let words: Vec<&str> = rows.iter().flatten().map(|cell| &*cell.text).collect();
        assert_eq!(words, ["new", "sleep, n=2", "some", "whole", "3.0 ms", "2.0 ms to 9.0 ms"]);
    }
}
