//! Properties over generated pods: a checkpoint cannot be told from none, names stay the pod's own, nothing is left.
//!
//! `PROPTEST_CASES` says how many cases of each property are tried, `ZAP_SEED` which ones, `ZAP_SHRINK` in how
//! many steps at most a failing one is made smaller.

#![allow(clippy::unwrap_used)]

mod properties {
    pub(crate) mod guest;
    pub(crate) mod programs;
    pub(crate) mod remains;
}

use std::fmt::Debug;

use harness::lab::Lab;
use harness::program::{Kind, Op, Step};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner};

use properties::guest::Guest;
use properties::programs::{Action, Case, case};
use properties::remains::Remains;

/// Tries a property on as many cases as `PROPTEST_CASES` says, `cases` by default, from a seed that is printed.
fn check<S: Strategy>(cases: u32, strategy: S, property: impl Fn(S::Value) -> Result<(), TestCaseError>)
where
    S::Value: Debug,
{
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seed = number("ZAP_SEED").unwrap_or_else(rand::random);
    let cases = number("PROPTEST_CASES").map_or(cases, |cases| cases as u32);
    eprintln!("ZAP_SEED={seed} PROPTEST_CASES={cases}");
    let bytes: Vec<u8> = seed.to_ne_bytes().repeat(4);
    let config = Config {
        cases,
        max_shrink_iters: number("ZAP_SHRINK").unwrap_or(40) as u32,
        max_shrink_time: 60_000,
        failure_persistence: None,
        ..Config::default()
    };
    let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
    if let Err(error) = runner.run(&strategy, property) {
        panic!("with ZAP_SEED={seed}: {error}");
    }
}

fn same(what: &str, expected: &str, found: &str) -> Result<(), TestCaseError> {
    let (mut ours, mut theirs) = (expected.lines(), found.lines());
    loop {
        match (ours.next(), theirs.next()) {
            (None, None) => return Ok(()),
            (one, other) if one == other => {}
            (one, other) => {
                let message = format!("{what}\n  undisturbed: {}\n  disturbed:   {}", text(one), text(other));
                return Err(TestCaseError::fail(message));
            }
        }
    }
}

fn text(line: Option<&str>) -> &str {
    line.unwrap_or("(nothing)")
}

/// A pod that was checkpointed, restarted, suspended, and its copies, see what an undisturbed twin sees.
#[test]
fn a_checkpoint_cannot_be_told_from_none() {
    let (lab, other) = (Lab::new().unwrap(), Lab::new().unwrap());
    check(60, case(), |case: Case| {
        let twin = Guest::start(&lab, "twin", &case.steps);
        case.pauses().for_each(|pause| twin.go(pause));
        let pod = Guest::start(&lab, "pod", &case.steps);
        let (mut copies, mut away) = (Vec::new(), false);
        for (pause, action) in case.pauses().zip(case.actions.iter().cycle()) {
            pod.await_pause(pause);
            match action {
                Action::Nothing => {}
                Action::Suspend => pod.suspend_and_resume(),
                Action::LeaveRunning => copies.push(pod.checkpoint_and_go_on()),
                Action::LeaveRunningMeanwhile => {
                    pod.go(pause);
                    copies.push(pod.checkpoint_and_go_on());
                }
                Action::RestartMeanwhile => {
                    pod.go(pause);
                    pod.restart();
                }
                Action::Migrate(pre_copy) => {
                    away = !away;
                    pod.migrate(if away { &other } else { &lab }, *pre_copy);
                }
                Action::Restart => pod.restart(),
                Action::RestartTwice => {
                    pod.restart();
                    pod.restart();
                }
            }
            pod.go(pause);
        }
        let ended = |guest: Guest<'_>| {
            guest.go(case.last());
            guest.end()
        };
        let expected = ended(twin);
        same("the pod itself", &expected, &ended(pod))?;
        for image in copies {
            let copy = Guest::copy(&lab, &image);
            case.pauses().for_each(|pause| copy.go(pause));
            same("a copy", &expected, &ended(copy))?;
        }
        Ok(())
    });
}

/// A pod's own names, and things with names: processes, a segment, a listening port, a file, an address.
fn named_things(rounds: usize) -> Vec<Step> {
    let step = |who, op| Step { who, op };
    let begin = [
        step(0, Op::Fork),
        step(1, Op::Fork),
        step(2, Op::Session),
        step(0, Op::Segment(7)),
        step(1, Op::Open(Kind::File)),
        step(1, Op::Put { channel: 0, bytes: 100 }),
        step(2, Op::Listen(8080)),
    ];
    let round = [step(0, Op::Pause), step(0, Op::Look), step(1, Op::Look), step(2, Op::Look)];
    begin.into_iter().chain(std::iter::repeat_n(round, rounds).flatten()).collect()
}

/// Pods with the same names beside each other, checkpointed and restarted in any order: none sees its names change.
#[test]
fn names_are_the_pods_own() {
    const ROUNDS: usize = 3;
    let lab = Lab::new().unwrap();
    let steps = named_things(ROUNDS);
    let orders = proptest::collection::vec((any::<bool>(), any::<u64>(), any::<u64>()), ROUNDS - 1);
    check(2, (2..=4usize, orders), |(count, orders)| {
        let names: Vec<String> = (0..count).map(|number| format!("pod{number}")).collect();
        let pods: Vec<Guest<'_>> = names.iter().map(|name| Guest::start_bridged(&lab, name, "same", &steps)).collect();
        let pauses: Vec<usize> = (0..steps.len()).filter(|at| matches!(steps[*at].op, Op::Pause)).collect();
        let addresses: Vec<String> = pods.iter().map(Guest::inner_address).collect();
        for (pause, order) in pauses.iter().zip(std::iter::once(None).chain(orders.iter().map(Some))) {
            pods.iter().for_each(|pod| pod.await_pause(*pause));
            if let Some((all, first, second)) = order {
                let mut chosen: Vec<&Guest<'_>> = pods.iter().collect();
                shuffle(&mut chosen, *first);
                chosen.truncate(if *all { count } else { count.div_ceil(2) });
                chosen.iter().for_each(|pod| pod.checkpoint());
                shuffle(&mut chosen, *second);
                chosen.iter().for_each(|pod| pod.restart_from_image());
            }
            prop_assert_eq!(&addresses, &pods.iter().map(Guest::inner_address).collect::<Vec<_>>());
            pods.iter().for_each(|pod| pod.go(*pause));
        }
        for pod in pods {
            let transcript = pod.end();
            let looks = |process: &str| -> Vec<String> {
                let of = |line: &str| Some(line.split_once(&format!(" {process} Look: "))?.1.to_owned());
                transcript.lines().filter_map(of).collect()
            };
            for process in ["p0", "p1", "p2"] {
                let seen = looks(process);
                prop_assert_eq!(seen.len(), ROUNDS, "{}", transcript);
                prop_assert!(seen.windows(2).all(|pair| pair[0] == pair[1]), "{:#?}", seen);
                prop_assert!(seen[0].contains("itself") && seen[0].contains("same"), "{}", seen[0]);
            }
        }
        Ok(())
    });
}

/// Puts a list into an order that a number stands for.
fn shuffle<T>(list: &mut [T], mut number: u64) {
    for end in (2..=list.len()).rev() {
        list.swap(end - 1, (number % end as u64) as usize);
        number /= end as u64;
    }
}

/// Whatever was done to pods, and whether it succeeded or not: after their removal the host is as before.
#[test]
fn nothing_is_left() {
    let lab = Lab::new().unwrap();
    // Directories of the registry and of the storage are made once, with the first pod, and so is the cache of hashes with
    // the first checkpoint.
    let first = lab.directory().join("first");
    lab.zap(&["run", "-d", "-n", "first", "--", "sleep", "1000"]).unwrap();
    lab.zap(&["checkpoint", "first", "-o", first.to_str().unwrap()]).unwrap();
    std::fs::remove_dir_all(first).unwrap();
    let commands = proptest::collection::vec((0..8u8, 0..2u8, 0..2u8), 3..9);
    check(4, commands, |commands| {
        let before = Remains::of(&lab);
        let image = |number: u8| lab.directory().join(format!("image-{number}"));
        for (command, pod, other) in &commands {
            let pod = &*format!("p{pod}");
            let path = image(*other);
            let path = path.to_str().unwrap();
            let words = match command {
                0 => vec!["run", "-d", "-n", pod, "-p", "8080:80", "--", "sleep", "1000"],
                1 => vec!["exec", pod, "sh", "-c", "echo x >/tmp/x; sleep 1000 &"],
                2 => vec!["suspend", pod],
                3 => vec!["resume", pod],
                4 => vec!["checkpoint", pod, "-o", path],
                5 => vec!["checkpoint", pod, "-o", path, "--leave-running"],
                6 => vec!["restart", path, "-d"],
                _ => vec!["kill", pod],
            };
            let (done, _) = lab.try_zap(&words).unwrap();
            let said = String::from_utf8_lossy(&done.stderr).into_owned();
            prop_assert!(said.lines().count() <= 1, "{:?}: {}", words, said);
            prop_assert!(!said.contains("panicked"), "{:?}: {}", words, said);
        }
        for pod in lab.pods().unwrap() {
            lab.zap(&["rm", "-f", &pod.name]).unwrap();
        }
        (0..2).for_each(|number| drop(std::fs::remove_dir_all(image(number))));
        Remains::await_equal(&lab, &before).map_err(TestCaseError::fail)
    });
}
