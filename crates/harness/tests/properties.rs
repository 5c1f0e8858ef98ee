//! Properties over generated pods: a checkpoint cannot be told from none, names stay the pod's own, nothing is left.
//!
//! `PROPTEST_CASES` says how many cases of each property are tried, `ZAP_SEED` which ones (`random`: others), `ZAP_SHRINK` how
//! many seconds a failing one is made shorter. The shortest program that failed is written down: `ZAP_CASE` tries the one of such
//! a file again, and those of `properties/kept` are tried always.

#![allow(clippy::unwrap_used)]

mod properties {
    pub(crate) mod check;
    pub(crate) mod guest;
    pub(crate) mod programs;
}

use std::ops::Range;
use std::path::{Path, PathBuf};

use harness::lab::Lab;
use harness::program::{BY_ANOTHER, Kind, Op, Step};
use harness::shrink::Sequence;
use harness::verification::{ALIVE, Tally};
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;

use properties::check::{self, side_by_side};
use properties::guest::{Checked, Guest};
use properties::programs::{Action, Case, case};

fn same(what: &str, expected: &str, found: &str) -> Checked {
    let (mut ours, mut theirs) = (expected.lines(), found.lines());
    loop {
        match (ours.next(), theirs.next()) {
            (None, None) => return Ok(()),
            (one, other) if one == other => {}
            (one, other) => {
                let (one, other) = (one.unwrap_or("(nothing)"), other.unwrap_or("(nothing)"));
                let alike = one.bytes().zip(other.bytes()).take_while(|(one, other)| one == other).count();
                let [one, other] = [one, other].map(|line| around(line, alike));
                let message = format!("{what}\n  undisturbed: {one}\n  disturbed:   {other}");
                return Err(TestCaseError::fail(message));
            }
        }
    }
}

/// Whose line it is, and what is around a place in it.
fn around(line: &str, place: usize) -> String {
    const BEFORE: usize = 60;
    const SHOWN: usize = 200;
    let head = line.find(": ").map_or(0, |colon| colon + 2);
    let from = place.saturating_sub(BEFORE).clamp(head, line.len());
    let to = line.len().min(from + SHOWN);
    let [before, behind] = [from > head, to < line.len()].map(|cut| if cut { "…" } else { "" });
    format!("{}{before}{}{behind}", &line[..head], String::from_utf8_lossy(&line.as_bytes()[from..to]))
}

/// A pod that was checkpointed, restarted, suspended, and its copies, see what an undisturbed twin sees.
#[test]
fn a_checkpoint_cannot_be_told_from_none() {
    let tally = Tally::of("equivalence").unwrap();
    for kind in Op::kinds() {
        tally.add(format!("{ALIVE}{kind}"), 0);
        tally.add(format!("{ALIVE}{kind}{BY_ANOTHER}"), 0);
    }
    let worker = || {
        let (lab, other) = (Lab::new().unwrap(), Lab::new().unwrap());
        let tally = &tally;
        move |case: Case| {
            compare(&lab, &other, &case, tally)?;
            case.count(tally);
            Ok(())
        }
    };
    side_by_side(&tally, 300, case, worker);
    tally.write().unwrap();
}

/// Programs that once could tell, or that `ZAP_CASE` names.
#[test]
fn kept_cases_cannot_be_told_from_none() {
    let cases: Vec<PathBuf> = match std::env::var_os("ZAP_CASE") {
        Some(case) => vec![case.into()],
        None => {
            let kept = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/properties/kept");
            std::fs::read_dir(kept).unwrap().map(|entry| entry.unwrap().path()).collect()
        }
    };
    let (lab, other) = (Lab::new().unwrap(), Lab::new().unwrap());
    let tally = Tally::of("kept").unwrap();
    for path in cases {
        if let Err(error) = compare(&lab, &other, &Case::read(&path), &tally) {
            panic!("{}: {error}", path.display());
        }
        tally.count("cases");
    }
    tally.write().unwrap();
}

fn compare(lab: &Lab, other: &Lab, case: &Case, tally: &Tally) -> Checked {
    let twin = Guest::start(lab, "twin", &case.steps)?;
    case.pauses().for_each(|pause| twin.go(pause));
    let pod = Guest::start(lab, "pod", &case.steps)?;
    let (mut copies, mut away) = (Vec::new(), false);
    for (pause, action) in case.acts() {
        let alive = pod.await_pause(pause)?;
        if !matches!(action, Action::Suspend) {
            tally.count("checkpoints");
            alive.into_iter().for_each(|kind| tally.count(format!("{ALIVE}{kind}")));
        }
        match action {
            Action::Suspend => pod.suspend_and_resume()?,
            Action::LeaveRunning => copies.push(pod.checkpoint_and_go_on()?),
            Action::LeaveRunningMeanwhile => {
                pod.go(pause);
                copies.push(pod.checkpoint_and_go_on()?);
            }
            Action::RestartMeanwhile => {
                pod.go(pause);
                pod.restart()?;
            }
            Action::Migrate(pre_copy) => {
                away = !away;
                pod.migrate(if away { other } else { lab }, pre_copy)?;
            }
            Action::Restart => pod.restart()?,
            Action::RestartTwice => {
                pod.restart()?;
                pod.restart()?;
            }
        }
        pod.go(pause);
    }
    let ended = |guest: Guest<'_>| {
        guest.go(case.last());
        guest.end()
    };
    let expected = ended(twin)?;
    same("the pod itself", &expected, &ended(pod)?)?;
    for image in copies {
        let copy = Guest::copy(lab, &image)?;
        case.pauses().for_each(|pause| copy.go(pause));
        same("a copy", &expected, &ended(copy)?)?;
    }
    Ok(())
}

/// What each answers who calls its port: so many bytes, and its number.
const ANSWER: u16 = 100;

/// What programs that are generated leave out of what they tell are rows of the list of differences, which says so of no other.
#[test]
fn what_is_masked_is_listed() {
    const DIFFERENCES: &str = include_str!("../../../docs/differences.md");
    const MASKS: &str = include_str!("../src/bin/pod-program/masks.rs");
    let rows = DIFFERENCES.lines().filter_map(|line| line.strip_prefix("| ")?.split_once(" | "));
    let mut marked: Vec<&str> = rows.filter_map(|(what, _)| what.strip_suffix(" †")).collect();
    for mask in MASKS.lines().filter_map(|line| line.strip_prefix("/// Row: ")) {
        let rows = marked.len();
        marked.retain(|row| !row.starts_with(mask));
        assert_eq!(rows - marked.len(), 1, "one row of docs/differences.md with the mark † begins so: {mask}");
    }
    assert!(marked.is_empty(), "these are not masked: {marked:#?}");
}

/// A pod's own names, and things with names: processes, IPC objects, a listening port, files, an address. What is in them
/// is told apart by the pod's number.
fn named_things(rounds: usize, number: u8) -> Vec<Step> {
    let step = Step::of_first;
    let begin = [
        step(0, Op::Fork),
        step(1, Op::Fork),
        step(2, Op::Session),
        step(0, Op::Segment(7)),
        step(0, Op::Store { region: 0, page: 0, seed: number }),
        step(0, Op::Semaphore { key: 0, change: number as i8 + 1, undo: false }),
        step(0, Op::Message { key: 0, bytes: number + 1 }),
        step(1, Op::Open(Kind::Queue)),
        step(1, Op::Put { channel: 0, bytes: 10 + u16::from(number) }),
        step(1, Op::Open(Kind::File)),
        step(1, Op::Put { channel: 1, bytes: 100 + u16::from(number) }),
        step(2, Op::Open(Kind::Shm)),
        step(2, Op::Put { channel: 0, bytes: 100 + u16::from(number) }),
        step(2, Op::Listen { port: 8080, tcp: true }),
    ];
    let round = [
        step(0, Op::Pause),
        step(2, Op::Connect(0)),
        step(2, Op::Put { channel: 1, bytes: ANSWER + u16::from(number) }),
        step(2, Op::Take { channel: 1, bytes: 2 * ANSWER }),
        step(2, Op::Close(1)),
        step(0, Op::Look),
        step(1, Op::Look),
        step(2, Op::Look),
    ];
    begin.into_iter().chain(std::iter::repeat_n(round, rounds).flatten()).collect()
}

/// So many pods, and in what order they are checkpointed and restarted in each round but the first: all or half of them.
#[derive(Clone, Debug)]
struct Namesakes {
    count: usize,
    orders: Vec<(bool, u64, u64)>,
}

impl Sequence for Namesakes {
    fn parts(&self) -> usize {
        self.orders.len()
    }

    fn without(&self, parts: Range<usize>) -> Namesakes {
        let orders = [&self.orders[..parts.start], &self.orders[parts.end..]].concat();
        Namesakes { count: self.count, orders }
    }
}

impl check::Case for Namesakes {}

/// Pods with the same names and addresses beside each other, checkpointed and restarted in any order: none sees its names change.
#[test]
fn names_are_the_pods_own() {
    let orders = || proptest::collection::vec((any::<bool>(), any::<u64>(), any::<u64>()), 2);
    let namesakes = || (2..=4usize, orders()).prop_map(|(count, orders)| Namesakes { count, orders });
    let tally = Tally::of("names").unwrap();
    let worker = || {
        let (lab, tally) = (Lab::new().unwrap(), &tally);
        move |namesakes: Namesakes| keep_their_names(&lab, &namesakes, tally)
    };
    side_by_side(&tally, 6, namesakes, worker);
    tally.write().unwrap();
}

fn keep_their_names(lab: &Lab, Namesakes { count, orders }: &Namesakes, tally: &Tally) -> Checked {
    let (count, rounds) = (*count, orders.len() + 1);
    let names: Vec<String> = (0..count).map(|number| format!("pod{number}")).collect();
    let programs: Vec<Vec<Step>> = (0..count).map(|number| named_things(rounds, number as u8)).collect();
    let steps = &programs[0];
    let pauses: Vec<usize> = (0..steps.len()).filter(|at| matches!(steps[*at].op, Op::Pause)).collect();
    // Each is born at the address that the one before has left, which it keeps.
    let start = |(name, steps): (&String, &Vec<Step>)| {
        let pod = Guest::start_bridged(lab, name, "same", steps)?;
        pod.await_pause(pauses[0])?;
        pod.checkpoint()?;
        Ok(pod)
    };
    let pods: Vec<Guest<'_>> = names.iter().zip(&programs).map(start).collect::<Checked<_>>()?;
    tally.add("pods", count as u64);
    pods.iter().try_for_each(Guest::restart_from_image)?;
    let mut first_looks = std::collections::BTreeSet::new();
    let addresses: Vec<String> = pods.iter().map(Guest::inner_address).collect();
    prop_assert!(addresses.iter().all(|address| *address == addresses[0]), "{:?}", addresses);
    for (pause, order) in pauses.iter().zip(std::iter::once(None).chain(orders.iter().map(Some))) {
        pods.iter().try_for_each(|pod| pod.await_pause(*pause).map(drop))?;
        if let Some((all, first, second)) = order {
            let mut chosen: Vec<&Guest<'_>> = pods.iter().collect();
            shuffle(&mut chosen, *first);
            chosen.truncate(if *all { count } else { count.div_ceil(2) });
            chosen.iter().try_for_each(|pod| pod.checkpoint())?;
            shuffle(&mut chosen, *second);
            tally.add("pods restarted", chosen.len() as u64);
            chosen.iter().try_for_each(|pod| pod.restart_from_image())?;
        }
        prop_assert_eq!(&addresses, &pods.iter().map(Guest::inner_address).collect::<Vec<_>>());
        pods.iter().for_each(|pod| pod.go(*pause));
    }
    for (number, pod) in pods.into_iter().enumerate() {
        let transcript = pod.end()?;
        let told = |what: &str| -> Vec<String> {
            let of = |line: &str| Some(line.split_once(&format!(" {what}"))?.1.split_once(": ")?.1.to_owned());
            transcript.lines().filter_map(of).collect()
        };
        for process in ["p0", "p1", "p2"] {
            let seen = told(&format!("{process} Look"));
            prop_assert_eq!(seen.len(), rounds, "{}", transcript);
            prop_assert!(seen.windows(2).all(|pair| pair[0] == pair[1]), "{:#?}", seen);
            prop_assert!(first_looks.insert(seen[0].clone()), "two pods see the same: {}", seen[0]);
            prop_assert!(seen[0].contains("itself") && seen[0].contains("same"), "{}", seen[0]);
        }
        let answers = told("p2 Take");
        let own = format!("Ok(({}, ", usize::from(ANSWER) + number);
        let is_own = |answer: &String| answer.contains(&own);
        prop_assert!(answers.len() == rounds && answers.iter().all(is_own), "pod {} heard {:?}", number, answers);
    }
    tally.count("cases");
    Ok(())
}

/// Puts a list into an order that a number stands for.
fn shuffle<T>(list: &mut [T], mut number: u64) {
    for end in (2..=list.len()).rev() {
        list.swap(end - 1, (number % end as u64) as usize);
        number /= end as u64;
    }
}
