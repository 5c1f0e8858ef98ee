//! Is a build slower than another one?
//!
//! Machines differ, and one machine from hour to hour. So what is measured beside a reference (the same natively, or the
//! bytes alone) is compared as a ratio to it, taken within each run; other times are taken as multiples of the run's
//! yardstick ([`YARDSTICK`]), a piece of work without zap; only what has neither is compared as it is.
//!
//! What looks worse is a suspect. Suspects are measured again, and it is the new samples alone that count: whoever is picked
//! for having looked bad looks bad by chance too often. An alarm is a change that a permutation test, corrected for how much
//! is compared (Benjamini and Hochberg), says is no chance, and that is past a noise floor.
//!
//! What can be noticed depends on the baseline, whose own chance stays: with 30 repetitions 10 % are, on servers.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use anyhow::Result;
use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::samples::Sample;
use crate::stats::{hodges_lehmann, median, permutation_test};

/// Changes smaller than this are not told from the machine's own ups and downs.
pub const NOISE_FLOOR: f64 = 0.05;
/// Of the alarms no larger a part than this is false.
pub const SIGNIFICANT: f64 = 0.01;
/// The arm of an experiment that is a piece of work without zap: what a host takes to start programs and to write.
pub const YARDSTICK: &str = "yardstick";

/// Rounds of the permutation test for a suspicion, and for an alarm.
const FEW: usize = 999;
const MANY: usize = 49_999;
/// What is worth a second look: so improbable by chance, and half of what is an alarm.
const SUSPICIOUS: f64 = 0.05;
/// How often a suspicion is measured again before it becomes an alarm.
const SECOND_LOOKS: u32 = 3;
/// The unit of what is a multiple of something.
const MULTIPLE: &str = "×";
/// Arms that have nothing of zap in them.
const REFERENCES: [&str; 5] = ["native", "write", "memcpy", "bytes-alone", YARDSTICK];

/// What has moved.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Moved {
    /// What has become worse, the worst first.
    pub worse: Vec<Change>,
    /// What has become better, the best first. Nobody looks twice: nothing hangs on it.
    pub better: Vec<Change>,
}

/// Something that has moved.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// The experiment that measured it.
    pub experiment: String,
    /// What, in words.
    pub what: String,
    /// The median before.
    pub before: f64,
    /// The median now.
    pub now: f64,
    /// By how much it is worse, as a part of what it was: 0.1 is ten percent worse, −0.1 ten percent better.
    pub worse_by: f64,
    /// How probable so much is by chance.
    pub p: f64,
    key: [String; 5],
    sides: Sides,
}

impl Change {
    /// The arm that both sides are ratios to, if they are.
    pub fn against(&self) -> Option<&'static str> {
        self.sides.against
    }

    /// What `before` and `now` are in: the metric's own unit, or `×`, for multiples of a reference or of what was before.
    pub fn unit(&self) -> &str {
        &self.sides.unit
    }
}

/// Whether a build is slower than the one that `baseline` was measured on. `measure` measures the experiments of these names,
/// all that the baseline has at first, then those with suspects.
pub fn judge(baseline: &[Sample], mut measure: impl FnMut(&BTreeSet<String>) -> Result<Vec<Sample>>) -> Result<Moved> {
    let all = baseline.iter().map(|sample| sample.experiment.clone()).collect();
    let (mut suspects, better, tried) = changes(baseline, &measure(&all)?);
    let mut again = Vec::new();
    for _ in 0..SECOND_LOOKS {
        let experiments: BTreeSet<String> = suspects.iter().map(|suspect| suspect.experiment.clone()).collect();
        if experiments.is_empty() {
            break;
        }
        again.extend(measure(&experiments)?);
        let keys: BTreeSet<_> = suspects.into_iter().map(|suspect| suspect.key).collect();
        suspects = changes(baseline, &again).0;
        suspects.retain(|change| keys.contains(&change.key));
    }
    Ok(Moved { worse: significant(suspects, tried), better: significant(better, tried) })
}

/// What of `now` has moved since `baseline`, where nothing can be measured again.
pub fn compare(baseline: &[Sample], now: &[Sample]) -> Moved {
    let (worse, better, tried) = changes(baseline, now);
    Moved { worse: significant(worse, tried), better: significant(better, tried) }
}

/// Everything that looks worse, and everything that looks better, if only by chance: each arm, and the arms of a measurement
/// together, which differ less from run to run. With how much was compared.
fn changes(baseline: &[Sample], now: &[Sample]) -> (Vec<Change>, Vec<Change>, usize) {
    let (before, now) = (Runs::of(baseline), Runs::of(now));
    let mut compared = 0;
    let mut found = Vec::new();
    let mut together: BTreeMap<Key<'_>, Vec<Sides>> = BTreeMap::new();
    for key in before.by_key.keys() {
        let Some(sides) = sides(key, &before, &now) else { continue };
        compared += 1;
        found.extend(change(key, sides.clone()));
        let [experiment, workload, parameters, _, metric] = *key;
        together.entry([experiment, workload, parameters, "all arms", metric]).or_default().push(sides);
    }
    for (key, arms) in together.iter().filter(|(_, arms)| arms.len() > 1) {
        compared += 1;
        found.extend(change(key, combined(arms)));
    }
    found.retain(|change| change.p < SUSPICIOUS);
    let (worse, mut better): (Vec<Change>, Vec<Change>) = found.into_iter().partition(|change| change.worse_by > 0.0);
    // Of what is no alarm only what is large enough is looked at more closely.
    better.retain(|change| change.worse_by < -NOISE_FLOOR);
    (worse, better, compared)
}

/// Those suspects, of so much that was compared, whose change is no chance and large enough, the largest first.
fn significant(mut suspects: Vec<Change>, compared: usize) -> Vec<Change> {
    for suspect in &mut suspects {
        suspect.p = suspect.sides.chance(MANY).unwrap_or(1.0);
    }
    suspects.sort_by(|a, b| a.p.total_cmp(&b.p));
    let share = SIGNIFICANT / compared.max(1) as f64;
    let rare = (1..=suspects.len()).rev().find(|rank| suspects[rank - 1].p <= share * *rank as f64);
    suspects.truncate(rare.unwrap_or(0));
    suspects.retain(|change| change.worse_by.abs() > NOISE_FLOOR);
    suspects.sort_by(|a, b| b.worse_by.abs().total_cmp(&a.worse_by.abs()));
    suspects
}

/// Experiment, workload, parameters, arm, metric: what values must share to be compared.
type Key<'a> = [&'a str; 5];
/// One repetition of one measurement: its seed, its number.
type Run = (u64, u32);

/// Values, each with its run.
type Values = Vec<(Run, f64)>;

/// What is compared: values, or ratios to a reference.
#[derive(Clone, Debug, PartialEq)]
struct Sides {
    before: Values,
    now: Values,
    against: Option<&'static str>,
    unit: String,
}

impl Sides {
    /// How probable it is that they are so far apart by chance.
    fn chance(&self, rounds: usize) -> Option<f64> {
        permutation_test(&alone(&self.before), &alone(&self.now), rounds, &mut StdRng::seed_from_u64(1))
    }
}

fn alone(values: &Values) -> Vec<f64> {
    values.iter().map(|(_, value)| *value).collect()
}

/// Samples by what was measured, and in which run.
struct Runs<'a> {
    by_key: BTreeMap<Key<'a>, Values>,
    /// Of each metric.
    units: BTreeMap<&'a str, &'a str>,
}

impl<'a> Runs<'a> {
    fn of(samples: &'a [Sample]) -> Self {
        let mut runs = Self { by_key: BTreeMap::new(), units: BTreeMap::new() };
        for s in samples {
            let key = [&*s.experiment, &*s.workload, &*s.parameters, &*s.arm, &*s.metric];
            runs.by_key.entry(key).or_default().push(((s.seed, s.run), s.value));
            runs.units.insert(&s.metric, &s.unit);
        }
        runs
    }

    /// The unit of a metric.
    fn unit(&self, metric: &str) -> &'a str {
        self.units.get(metric).copied().unwrap_or_default()
    }

    /// Each value as a ratio to what the reference took in the same run; `None` if a run has no reference.
    fn ratios(&self, key: &Key<'_>, reference: &Key<'_>) -> Option<Values> {
        let references = by_run(self.by_key.get(reference)?);
        let ratio = |(run, value): &(Run, f64)| {
            let reference = references.get(run).filter(|reference| **reference > 0.0)?;
            Some((*run, value / reference))
        };
        self.by_key.get(key)?.iter().map(ratio).collect()
    }
}

/// The median of each run.
fn by_run(values: &Values) -> HashMap<Run, f64> {
    let mut of_runs: HashMap<Run, Vec<f64>> = HashMap::new();
    for (run, value) in values {
        of_runs.entry(*run).or_default().push(*value);
    }
    of_runs.into_iter().filter_map(|(run, values)| Some((run, median(&values)?))).collect()
}

/// What of a measurement is to be compared; `None` if nothing is.
fn sides(key: &Key<'_>, before: &Runs<'_>, now: &Runs<'_>) -> Option<Sides> {
    let [experiment, workload, parameters, arm, metric] = *key;
    if REFERENCES.contains(&arm) || direction(metric).is_none() {
        return None;
    }
    let beside = |reference: &'static str| {
        let metric = if reference == YARDSTICK { "whole" } else { metric };
        let reference_key = [experiment, workload, parameters, reference, metric];
        let (before, now) = (before.ratios(key, &reference_key)?, now.ratios(key, &reference_key)?);
        Some(Sides { before, now, against: Some(reference), unit: MULTIPLE.into() })
    };
    let may_be = |reference: &&str| *reference != YARDSTICK || matches!(before.unit(metric), "us" | "ns" | "ms" | "s");
    let ratios = REFERENCES.into_iter().filter(may_be).find_map(beside);
    ratios.or_else(|| {
        let unit = before.unit(metric).to_owned();
        let (before, now) = (before.by_key.get(key)?.clone(), now.by_key.get(key)?.clone());
        Some(Sides { before, now, against: None, unit })
    })
}

/// The median of several arms, each as a multiple of what it was before, in every run in which all were measured.
fn combined(arms: &[Sides]) -> Sides {
    let usual: Vec<f64> = arms.iter().map(|arm| median(&alone(&arm.before)).unwrap_or(f64::NAN)).collect();
    let of = |side: fn(&Sides) -> &Values| {
        let runs: Vec<HashMap<Run, f64>> = arms.iter().map(|arm| by_run(side(arm))).collect();
        let middle = |run: &Run| {
            let multiple = |(arm, usual): (&HashMap<Run, f64>, &f64)| Some(arm.get(run)? / usual);
            Some((*run, median(&runs.iter().zip(&usual).map(multiple).collect::<Option<Vec<f64>>>()?)?))
        };
        runs[0].keys().collect::<BTreeSet<_>>().into_iter().filter_map(middle).collect()
    };
    Sides { before: of(|arm| &arm.before), now: of(|arm| &arm.now), against: arms[0].against, unit: MULTIPLE.into() }
}

/// How much worse or better it has become, if it has.
fn change(key: &Key<'_>, sides: Sides) -> Option<Change> {
    let [experiment, workload, parameters, arm, metric] = *key;
    let (then, today) = (alone(&sides.before), alone(&sides.now));
    let (before, now) = (median(&then).filter(|before| *before > 0.0)?, median(&today)?);
    let worse_by = direction(metric)? * hodges_lehmann(&then, &today)? / before;
    if worse_by.abs() <= NOISE_FLOOR / 2.0 {
        return None;
    }
    let p = sides.chance(FEW)?;
    let sized = if parameters.is_empty() { String::new() } else { format!(" ({parameters})") };
    let what = format!("{workload}{sized}, {arm}: {metric}");
    let (experiment, key) = (experiment.to_owned(), key.map(str::to_owned));
    Some(Change { experiment, what, before, now, worse_by, p, key, sides })
}

/// 1 if more of a metric is worse, −1 if less is; `None` for what is no measure of speed or size.
fn direction(metric: &str) -> Option<f64> {
    match metric {
        "requests_per_second" => Some(-1.0),
        "downtime" | "whole" | "total" | "first_answer" | "image_bytes" | "latency_p50" | "latency_p99"
        | "client_gap" | "viewer_gap" | "removal" => Some(1.0),
        operation => crate::micro::OPERATIONS.iter().any(|(name, _)| *name == operation).then_some(1.0),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use rand::Rng;

    use super::*;
    use crate::samples::read_all;

    fn sample(arm: &str, metric: &str, run: u32, value: f64) -> Sample {
        Sample {
            experiment: "e".into(),
            workload: "w".into(),
            parameters: String::new(),
            arm: arm.into(),
            run,
            metric: metric.into(),
            value,
            unit: if metric == "image_bytes" { "bytes" } else { "us" }.into(),
            seed: 0,
            host: String::new(),
        }
    }

    fn samples(metric: &str, center: f64) -> Vec<Sample> {
        (0..20).map(|run| sample("pod", metric, run, center + f64::from(run % 5))).collect()
    }

    fn regressions(baseline: &[Sample], now: &[Sample]) -> Vec<Change> {
        compare(baseline, now).worse
    }

    #[test]
    fn faster_is_named_and_no_regression() {
        let moved = compare(&samples("whole", 100.0), &samples("whole", 80.0));
        assert_eq!((moved.worse.len(), moved.better.len()), (0, 1));
        assert!((moved.better[0].worse_by + 0.2).abs() < 0.02, "{moved:?}");
    }

    #[test]
    fn slower_is_named_equal_and_faster_are_not() {
        let baseline = samples("whole", 100.0);
        let found = regressions(&baseline, &samples("whole", 120.0));
        assert_eq!(found.len(), 1);
        assert!((found[0].worse_by - 0.2).abs() < 0.02 && found[0].p < 0.01, "{found:?}");
        assert_eq!((&*found[0].what, found[0].against()), ("w, pod: whole", None));
        assert_eq!((found[0].before, found[0].now), (102.0, 122.0));
        assert_eq!(regressions(&baseline, &baseline), []);
        assert_eq!(regressions(&baseline, &samples("whole", 80.0)), []);
        assert_eq!(regressions(&baseline, &samples("whole", 102.0)), []);
    }

    #[test]
    fn fewer_requests_are_worse() {
        let baseline = samples("requests_per_second", 1000.0);
        assert_eq!(regressions(&baseline, &samples("requests_per_second", 800.0)).len(), 1);
        assert_eq!(regressions(&baseline, &samples("requests_per_second", 1200.0)), []);
        assert_eq!(regressions(&samples("pages", 10.0), &samples("pages", 50.0)), []);
    }

    #[test]
    fn a_slower_machine_is_no_regression_where_a_reference_ran_beside() {
        for (reference, metric, against) in [
            ("native", "whole", Some("native")),
            (YARDSTICK, "downtime", Some(YARDSTICK)),
            (YARDSTICK, "image_bytes", None),
        ] {
            let on_machine = |slowness: f64, zap: f64| {
                let of_run = |run: u32| {
                    let wobble = slowness * (1.0 + f64::from(run % 5) / 50.0);
                    let metric_of = if reference == YARDSTICK { "whole" } else { metric };
                    [sample("pod", metric, run, 100.0 * wobble * zap), sample(reference, metric_of, run, 40.0 * wobble)]
                };
                (0..12).flat_map(of_run).collect::<Vec<Sample>>()
            };
            let baseline = on_machine(1.0, 1.0);
            let found = regressions(&baseline, &on_machine(1.3, 1.1));
            assert_eq!((found.len(), found[0].against()), (1, against), "{found:?}");
            let moved_by = if against.is_some() { 0.1 } else { 0.43 };
            assert!((found[0].worse_by - moved_by).abs() < 0.02, "{found:?}");
            assert_eq!(regressions(&baseline, &on_machine(1.3, 1.0)).is_empty(), against.is_some());
        }
    }

    #[test]
    fn suspects_are_measured_again_and_nobody_else() {
        let two = |slow: f64| {
            let other = |s: Sample| Sample { experiment: "other".into(), ..s };
            [samples("whole", 100.0 * slow), samples("whole", 100.0).into_iter().map(other).collect()].concat()
        };
        let mut asked = Vec::new();
        // The first look was a mishap.
        let mut slow = [1.3, 1.0].into_iter();
        let found = judge(&two(1.0), |experiments| {
            asked.push(experiments.iter().cloned().collect::<Vec<_>>());
            Ok(two(slow.next().unwrap()))
        });
        assert_eq!(
            (found.unwrap().worse, asked),
            (vec![], vec![vec!["e".to_owned(), "other".into()], vec!["e".into()]])
        );
        let found = judge(&two(1.0), |_| Ok(two(1.1))).unwrap().worse;
        assert_eq!(found.iter().map(|c| &*c.experiment).collect::<Vec<_>>(), ["e"]);
    }

    /// Repetitions of a baseline that was made for this (`--full`), and of a look.
    const BASELINE: u32 = 30;
    const LOOK: u32 = 15;

    /// Measurements as noisy as those in `results/baseline`: each run is one of those there, drawn at random, with all
    /// that was measured in it.
    struct Simulated {
        runs: BTreeMap<(String, String, String), BTreeMap<Run, Vec<Sample>>>,
        rng: StdRng,
    }

    impl Simulated {
        fn new(seed: u64) -> Self {
            let baseline = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../results/baseline");
            let mut runs: BTreeMap<_, BTreeMap<_, Vec<Sample>>> = BTreeMap::new();
            for s in read_all(&baseline).unwrap() {
                let part = (s.experiment.clone(), s.workload.clone(), s.parameters.clone());
                runs.entry(part).or_default().entry((s.seed, s.run)).or_default().push(s);
            }
            // Of others there are too few runs to draw from.
            runs.retain(|_, of_part| of_part.len() >= 8);
            assert!(runs.len() >= 5, "{} parts", runs.len());
            Self { runs, rng: StdRng::seed_from_u64(seed) }
        }

        /// Measures these experiments, or all, so many times.
        fn measure(
            &mut self,
            times: u32,
            only: Option<&BTreeSet<String>>,
            slower: impl Fn(&Sample) -> f64,
        ) -> Vec<Sample> {
            let seed = self.rng.random();
            let mut drawn = Vec::new();
            for ((experiment, ..), runs) in &self.runs {
                if only.is_some_and(|only| !only.contains(experiment)) {
                    continue;
                }
                let choices: Vec<_> = runs.values().collect();
                for run in 0..times {
                    let chosen = choices[self.rng.random_range(0..choices.len())];
                    let again = |s: &Sample| Sample { run, seed, value: s.value * slower(s), ..s.clone() };
                    drawn.extend(chosen.iter().map(again));
                }
            }
            drawn
        }
    }

    #[test]
    fn twenty_runs_of_the_same_build_raise_no_alarm() {
        let mut machine = Simulated::new(7);
        for number in 0..20 {
            let baseline = machine.measure(BASELINE, None, |_| 1.0);
            let found = judge(&baseline, |experiments| Ok(machine.measure(LOOK, Some(experiments), |_| 1.0))).unwrap();
            assert_eq!(found.worse, [], "run {number}");
        }
    }

    #[test]
    fn ten_percent_slower_is_caught_and_nothing_else_is_blamed() {
        let mut machine = Simulated::new(11);
        let is_slower = |s: &Sample| {
            s.experiment == "checkpoint-restart" && s.workload == "apache-event" && s.unit == "us" && s.arm != YARDSTICK
        };
        for number in 0..5 {
            let baseline = machine.measure(BASELINE, None, |_| 1.0);
            let slower = |s: &Sample| if is_slower(s) { 1.1 } else { 1.0 };
            let found = judge(&baseline, |experiments| Ok(machine.measure(LOOK, Some(experiments), slower))).unwrap();
            let found = found.worse;
            assert!(!found.is_empty(), "run {number}: it is not noticed");
            let blamed = |c: &Change| c.experiment == "checkpoint-restart" && c.what.starts_with("apache-event");
            assert!(found.iter().all(blamed), "run {number}: {found:?}");
        }
    }
}
