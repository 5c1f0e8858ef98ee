//! What should be: the pods of two hosts, and what each command does to them.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

use harness::shrink::Sequence;
use proptest::prelude::*;

use crate::check;

/// Pods by host and number.
pub(crate) type Pods = BTreeMap<(usize, usize), State>;

/// As `zap ls` has it, and what it does not say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum State {
    Running,
    /// Whether its command was killed meanwhile: nobody is told before it goes on.
    Suspended {
        ended: bool,
    },
    /// Its exit code; `None` if that depends on who was first.
    Stopped(Option<i32>),
}

impl State {
    pub(crate) fn agrees(self, state: &str, exit_code: Option<i64>) -> bool {
        match self {
            State::Running => state == "running",
            State::Suspended { .. } => state == "suspended",
            State::Stopped(code) => state == "stopped" && code.is_none_or(|code| exit_code == Some(code.into())),
        }
    }
}

/// A command of zap's, and for which pod.
#[derive(Clone, Copy)]
pub(crate) struct Command {
    pub(crate) host: usize,
    pub(crate) pod: usize,
    pub(crate) verb: Verb,
}

impl fmt::Debug for Command {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}: p{} {:?}", ["a", "b"][self.host], self.pod, self.verb)
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Verb {
    Run,
    Exec,
    Suspend,
    Resume,
    Checkpoint(After),
    /// Of one of the images that there are.
    Restart(usize),
    Migrate {
        pre_copy: bool,
    },
    Terminate,
    Kill,
    Stop,
    Remove {
        force: bool,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum After {
    Gone,
    Running,
    Suspended,
}

/// What happens next.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Step {
    One(Command),
    /// Two at once.
    Both(Command, Command),
    /// One that is killed (`SIGKILL`) after so many microseconds.
    Cut(Command, u32),
    /// The pod's monitor is killed.
    Orphan(Command),
    /// Likewise, so many microseconds after the beginning of a command.
    Crash(Command, u32),
    /// A migration, during which somebody who does it is killed: at the source or at the destination.
    Strike(Command, Side, u32),
}

/// Where somebody is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    /// The monitor of the pod that is to move.
    Source,
    /// Whoever takes it.
    Destination,
}

/// A sequence of steps.
#[derive(Clone)]
pub(crate) struct Life(pub(crate) Vec<Step>);

impl Sequence for Life {
    fn parts(&self) -> usize {
        self.0.len()
    }

    fn without(&self, parts: Range<usize>) -> Life {
        Life([&self.0[..parts.start], &self.0[parts.end..]].concat())
    }
}

impl check::Case for Life {}

impl fmt::Debug for Life {
    /// A line for each step.
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|step| writeln!(out, "  {step:?}"))
    }
}

/// What every life begins with: some pods, and images of some.
pub(crate) fn prelude() -> Vec<Step> {
    let on = |host, pod, verb| Step::One(Command { host, pod, verb });
    let written = |pod| on(0, pod, Verb::Checkpoint(After::Running));
    let run = |host, pod| on(host, pod, Verb::Run);
    vec![run(0, 0), run(0, BRIDGED), run(1, 2), written(0), written(BRIDGED)]
}

pub(crate) fn life() -> impl Strategy<Value = Life> {
    proptest::collection::vec(step(), 20).prop_map(Life)
}

/// Pods of this number have an address and a published port.
pub(crate) const BRIDGED: usize = 1;

fn step() -> impl Strategy<Value = Step> {
    let after = proptest::sample::select(vec![After::Gone, After::Running, After::Suspended]);
    let verb = prop_oneof![
        4 => Just(Verb::Run),
        2 => Just(Verb::Exec),
        3 => Just(Verb::Suspend),
        3 => Just(Verb::Resume),
        5 => after.prop_map(Verb::Checkpoint),
        7 => any::<prop::sample::Index>().prop_map(|index| Verb::Restart(index.index(1 << 16))),
        3 => any::<bool>().prop_map(|pre_copy| Verb::Migrate { pre_copy }),
        1 => Just(Verb::Terminate),
        1 => Just(Verb::Kill),
        1 => Just(Verb::Stop),
        2 => any::<bool>().prop_map(|force| Verb::Remove { force }),
    ];
    let migration = || {
        let verb = any::<bool>().prop_map(|pre_copy| Verb::Migrate { pre_copy });
        (0..2usize, 0..3usize, verb).prop_map(|(host, pod, verb)| Command { host, pod, verb })
    };
    let side = || proptest::sample::select(vec![Side::Source, Side::Destination]);
    let command =
        move || (0..2usize, 0..3usize, verb.clone()).prop_map(|(host, pod, verb)| Command { host, pod, verb });
    prop_oneof![
        10 => command().prop_map(Step::One),
        3 => (command(), command()).prop_map(|(one, other)| Step::Both(one, other)),
        2 => (command(), 0..120_000u32).prop_map(|(command, delay)| Step::Cut(command, delay)),
        1 => command().prop_map(Step::Orphan),
        1 => (command(), 0..80_000u32).prop_map(|(command, delay)| Step::Crash(command, delay)),
        2 => (migration(), side(), 0..400_000u32).prop_map(|(command, side, delay)| Step::Strike(command, side, delay)),
    ]
}

/// The exit code of a command, and what pods there are afterwards.
pub(crate) fn predict(pods: &Pods, command: Command) -> (i32, Pods) {
    use State::{Running, Stopped, Suspended};
    let mut after = pods.clone();
    let place = (command.host, command.pod);
    let mut becomes = |code: i32, state: State| {
        after.insert(place, state);
        (code, after.clone())
    };
    let Some(state) = pods.get(&place).copied() else {
        return match command.verb {
            Verb::Run | Verb::Restart(_) => becomes(0, Running),
            _ => (6, after),
        };
    };
    match (command.verb, state) {
        (Verb::Run | Verb::Restart(_), _) => (6, after),
        (Verb::Exec, Running) => (0, after),
        (Verb::Exec, _) => (125, after),
        (Verb::Suspend, Running) => becomes(0, Suspended { ended: false }),
        (Verb::Resume, Suspended { ended: false }) => becomes(0, Running),
        (Verb::Resume, Suspended { ended: true }) => becomes(0, Stopped(None)),
        (Verb::Suspend | Verb::Resume, _) => (1, after),
        (Verb::Checkpoint(_), Suspended { ended: true } | Stopped(_)) | (Verb::Migrate { .. }, Stopped(_)) => {
            (1, after)
        }
        (Verb::Checkpoint(After::Running), _) => (0, after),
        (Verb::Checkpoint(After::Suspended), _) => becomes(0, Suspended { ended: false }),
        (Verb::Checkpoint(After::Gone), _) => {
            after.remove(&place);
            (0, after)
        }
        (Verb::Migrate { .. }, _) => {
            let there = (1 - command.host, command.pod);
            // The destination is asked first: that a suspended pod's command was killed shows once it is held.
            if pods.contains_key(&there) {
                return (6, after);
            }
            if state == (Suspended { ended: true }) {
                return (1, after);
            }
            after.remove(&place);
            after.insert(there, Running);
            (0, after)
        }
        (Verb::Terminate, Running) => becomes(0, Stopped(Some(143))),
        (Verb::Terminate, Suspended { ended: false }) => becomes(0, Suspended { ended: true }),
        (Verb::Terminate, Suspended { ended: true }) => (1, after),
        (Verb::Kill, Running | Suspended { ended: false }) => becomes(0, Stopped(Some(137))),
        (Verb::Kill, Suspended { ended: true }) => becomes(0, Stopped(None)),
        (Verb::Terminate | Verb::Kill, Stopped(_)) => (1, after),
        (Verb::Stop, Running | Suspended { ended: false }) => becomes(0, Stopped(Some(143))),
        (Verb::Stop, Suspended { ended: true }) => becomes(0, Stopped(None)),
        (Verb::Stop, Stopped(_)) => (0, after),
        (Verb::Remove { force: false }, Running | Suspended { .. }) => (1, after),
        (Verb::Remove { .. }, _) => {
            after.remove(&place);
            (0, after)
        }
    }
}

/// What there may be afterwards, if one of its steps is the last that is done: of a command that was cut off.
pub(crate) fn may_be(pods: &Pods, command: Command, monitor_died: bool) -> Vec<Pods> {
    let after = predict(pods, command).1;
    let mut all = vec![pods.clone(), after.clone()];
    if monitor_died {
        for mut world in [pods.clone(), after] {
            // It had ended, or ends, and nobody was there to take note.
            if let Some(state) = world.get_mut(&(command.host, command.pod)) {
                *state = State::Stopped(None);
                all.push(world);
            }
        }
    }
    all
}

/// What there may be after a migration during which somebody was killed, and after it was decided where the pod lives, if
/// nobody knew: `kept` if it was here. It is never at both.
pub(crate) fn after_strike(pods: &Pods, command: Command, kept: bool) -> Vec<Pods> {
    let (here, there) = ((command.host, command.pod), (1 - command.host, command.pod));
    let moved = predict(pods, command).1;
    let mut stays = pods.clone();
    if kept {
        stays.insert(here, State::Running);
    }
    let mut all = vec![stays.clone(), moved.clone()];
    let mut with = |world: &Pods, place, state| {
        let mut world = world.clone();
        world.insert(place, state);
        all.push(world);
    };
    if moved.contains_key(&there) && !pods.contains_key(&there) {
        // What is left of the copy at the side whose monitor died, when the other one lives.
        with(&moved, here, State::Stopped(None));
        with(&stays, there, State::Stopped(None));
    }
    // It had ended, and nobody was there to take note.
    for place in [here, there] {
        if let Some(State::Suspended { ended: true }) = pods.get(&place) {
            with(&stays, place, State::Stopped(None));
        }
    }
    all
}
