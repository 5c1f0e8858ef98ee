//! Trying a property on many cases, several side by side.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use harness::shrink::{Sequence, smallest};
use harness::verification::Tally;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner};

/// A case that can be told, and made shorter.
pub(crate) trait Case: Sequence {
    /// Keeps one that failed with this seed; the words that try it alone again, if there are such.
    fn keep(&self, _seed: u64) -> Option<String> {
        None
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// The words that try a set of cases of this test again.
fn command(test: &str, seed: u64, cases: u32) -> String {
    let program = env!("CARGO_CRATE_NAME");
    format!("ZAP_SEED={seed} PROPTEST_CASES={cases} cargo test -p harness --test {program} {test}")
}

/// The seed of the first worker. The suite tries the same cases every time, so that a change is judged by what it changes;
/// `just soak` tries others.
const SEED: u64 = 20_021_209;

fn seeds(workers: u32) -> Vec<u64> {
    match number("ZAP_SEED") {
        Some(seed) => vec![seed],
        None if std::env::var("ZAP_SEED").is_ok_and(|wish| wish == "random") => {
            (0..workers).map(|_| rand::random()).collect()
        }
        None => (0..workers).map(|worker| SEED + u64::from(worker)).collect(),
    }
}

/// Tries what a worker makes of a case on as many cases as `PROPTEST_CASES` says, `cases` by default. Every worker has a seed
/// of its own, which is printed: with `ZAP_SEED=random` a new one, with the number of a seed there is but one worker, with that.
pub(crate) fn side_by_side<S, P>(
    tally: &Tally,
    cases: u32,
    strategy: impl Fn() -> S + Sync,
    worker: impl Fn() -> P + Sync,
) where
    S: Strategy,
    S::Value: Case,
    P: Fn(S::Value) -> Result<(), TestCaseError>,
{
    let cases = number("PROPTEST_CASES").map_or(cases, |cases| cases as u32);
    let processors = std::thread::available_parallelism().map_or(1, usize::from).min(4) as u32;
    let seeds = seeds(processors.min(cases));
    let each = cases.div_ceil(seeds.len() as u32);
    // Tests are threads that are called so, but where there is one at a time.
    let thread = std::thread::current();
    let test = thread.name().filter(|name| *name != "main").unwrap_or_default();
    let failures = std::thread::scope(|scope| {
        let run = |seed: u64| {
            println!("{}", command(test, seed, each));
            let tried = catch_unwind(AssertUnwindSafe(|| one(seed, each, strategy(), worker())));
            tried.unwrap_or_else(|panic| Err(reason(&*panic)))
        };
        let workers: Vec<_> = seeds.iter().map(|seed| (seed, scope.spawn(move || run(*seed)))).collect();
        let failed = |(seed, worker): (&u64, std::thread::ScopedJoinHandle<'_, Result<(), String>>)| {
            let why = worker.join().unwrap_or_else(|panic| Err(reason(&*panic))).err()?;
            Some(format!("{why}\nTry it again: {}", command(test, *seed, each)))
        };
        workers.into_iter().filter_map(failed).collect::<Vec<_>>()
    });
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    seeds.iter().for_each(|seed| tally.add(format!("seed {seed}"), each.into()));
}

fn reason(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
}

/// How long a failing case is made shorter.
const SHRINKING: u64 = 60;

fn one<S: Strategy>(
    seed: u64,
    cases: u32,
    strategy: S,
    property: impl Fn(S::Value) -> Result<(), TestCaseError>,
) -> Result<(), String>
where
    S::Value: Case,
{
    let why_it_fails = |case: &S::Value| match catch_unwind(AssertUnwindSafe(|| property(case.clone()))) {
        Ok(tried) => tried.err().map(|why| why.to_string()),
        Err(panic) => Some(reason(&*panic)),
    };
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &seed.to_ne_bytes().repeat(4));
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    for _ in 0..cases {
        let case = strategy.new_tree(&mut runner).map_err(|why| why.to_string())?.current();
        let Some(why) = why_it_fails(&case) else { continue };
        let deadline = Instant::now() + Duration::from_secs(number("ZAP_SHRINK").unwrap_or(SHRINKING));
        let (case, why) = smallest((case, why), deadline, why_it_fails);
        let alone = case.keep(seed).map_or_else(String::new, |words| format!("This case alone: {words}\n"));
        return Err(format!("{why}\n{case:?}{alone}"));
    }
    Ok(())
}
