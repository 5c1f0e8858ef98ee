//! Generated programs, and what happens to the pod while it runs them.

use std::ops::Range;
use std::path::Path;

use harness::program::{Kind, Op, Step};
use harness::shrink::Sequence;
use harness::verification::{self, Tally};
use proptest::prelude::*;
use serde::{Deserialize, Serialize};

use super::check;

/// What is done to a pod that pauses.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) enum Action {
    Suspend,
    LeaveRunning,
    Restart,
    RestartTwice,
    /// A checkpoint that leaves it running, while it goes on with its steps.
    LeaveRunningMeanwhile,
    /// A checkpoint while it goes on, and a restart.
    RestartMeanwhile,
    /// A migration to another host; by pre-copy or not.
    Migrate(bool),
}

/// A program, and what is done at its pauses, over and over.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Case {
    pub(crate) steps: Vec<Step>,
    pub(crate) actions: Vec<Action>,
}

impl std::fmt::Debug for Case {
    /// A line for each step.
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(out, "{:?}", self.actions)?;
        self.steps
            .iter()
            .enumerate()
            .try_for_each(|(at, step)| writeln!(out, "{at}: {}/{} {:?}", step.who, step.thread, step.op))
    }
}

impl Sequence for Case {
    /// All steps but the pause at the end.
    fn parts(&self) -> usize {
        self.last()
    }

    /// The same without some steps, and without what is done at those of them that are pauses.
    fn without(&self, parts: Range<usize>) -> Case {
        let actions = self.acts().filter(|(pause, _)| !parts.contains(pause)).map(|(_, action)| action).collect();
        let steps = [&self.steps[..parts.start], &self.steps[parts.end..]].concat();
        Case { steps, actions }
    }
}

impl check::Case for Case {
    fn keep(&self, seed: u64) -> Option<String> {
        std::fs::create_dir_all(verification::directory()).unwrap();
        let file = verification::directory().join(format!("failed-{seed}.json"));
        self.write(&file);
        let file = file.display();
        Some(format!("ZAP_CASE={file} cargo test -p harness --test properties kept\nKeep it: just keep NAME {file}"))
    }
}

impl Case {
    /// The steps that are pauses, but for the last, which is the end.
    pub(crate) fn pauses(&self) -> impl Iterator<Item = usize> {
        let last = self.last();
        let pause = move |(at, step): (usize, &Step)| (matches!(step.op, Op::Pause) && at != last).then_some(at);
        self.steps.iter().enumerate().filter_map(pause)
    }

    /// The pauses, and what is done at each.
    pub(crate) fn acts(&self) -> impl Iterator<Item = (usize, Action)> {
        self.pauses().zip(self.actions.iter().copied().cycle())
    }

    /// Counts the case, and what was done to it.
    pub(crate) fn count(&self, tally: &Tally) {
        tally.count("cases");
        self.acts().for_each(|(_, action)| tally.count(format!("action {action:?}")));
    }

    /// Reads one that was kept.
    pub(crate) fn read(path: &Path) -> Case {
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
    }

    /// Writes it down to be kept, a line for each step.
    pub(crate) fn write(&self, path: &Path) {
        let steps: Vec<String> = self.steps.iter().map(|step| serde_json::to_string(step).unwrap()).collect();
        let actions = serde_json::to_string(&self.actions).unwrap();
        let text = format!("{{\"actions\": {actions},\n\"steps\": [\n{}\n]}}\n", steps.join(",\n"));
        std::fs::write(path, text).unwrap();
    }

    /// The pause at the end: what is checkpointed while it goes on has not ended.
    pub(crate) fn last(&self) -> usize {
        self.steps.len() - 1
    }
}

pub(crate) fn case() -> impl Strategy<Value = Case> {
    let act = prop_oneof![
        1 => Just(Action::Suspend),
        3 => Just(Action::LeaveRunning),
        4 => Just(Action::Restart),
        1 => Just(Action::RestartTwice),
        2 => Just(Action::LeaveRunningMeanwhile),
        2 => Just(Action::RestartMeanwhile),
        1 => proptest::bool::ANY.prop_map(Action::Migrate),
    ];
    let part = || proptest::collection::vec(step(), 6..22);
    (proptest::collection::vec(part(), 4), proptest::collection::vec(act, 3)).prop_map(|(parts, actions)| {
        let pause = || Step::of_first(0, Op::Pause);
        let begin = [(0, Op::Fork), (1, Op::Fork), (0, Op::Thread(0)), (1, Op::Thread(0)), (1, Op::Thread(1))];
        let mut steps: Vec<Step> = begin.map(|(who, op)| Step::of_first(who, op)).into();
        for part in parts {
            steps.extend(part);
            steps.push(pause());
        }
        // In the end everybody takes the signals that wait, and looks at everything.
        let taken = (0..6).map(Op::Unblock);
        let end: Vec<Op> = taken.chain([Op::Look, Op::Wait]).collect();
        steps.extend((0..8).flat_map(|who| end.iter().map(move |op| Step::of_first(who, op.clone()))));
        steps.push(pause());
        Case { steps, actions }
    })
}

fn step() -> impl Strategy<Value = Step> {
    (any::<u8>(), any::<u8>(), op()).prop_map(|(who, thread, op)| Step { who, thread, op })
}

fn op() -> impl Strategy<Value = Op> {
    let any = any::<u8>;
    let bytes = || 0..4000u16;
    prop_oneof![
        3 => Just(Op::Fork),
        1 => any().prop_map(Op::Exit),
        1 => Just(Op::Wait),
        2 => (proptest::bool::ANY, 1..5u8).prop_map(|(shared, pages)| Op::Map { shared, pages }),
        1 => (0..3u8).prop_map(Op::Segment),
        4 => (any(), any(), any()).prop_map(|(region, page, seed)| Op::Store { region, page, seed }),
        2 => (any(), 0..16u8, any()).prop_map(|(region, protection, page)| Op::Protect { region, protection, page }),
        1 => any().prop_map(Op::Unmap),
        1 => any().prop_map(Op::Move),
        6 => kind().prop_map(Op::Open),
        8 => (any(), bytes()).prop_map(|(channel, bytes)| Op::Put { channel, bytes }),
        4 => (any(), bytes()).prop_map(|(channel, bytes)| Op::Take { channel, bytes }),
        1 => (any(), bytes()).prop_map(|(channel, offset)| Op::Seek { channel, offset }),
        1 => any().prop_map(Op::Unlink),
        1 => any().prop_map(Op::Rename),
        1 => (any(), bytes()).prop_map(|(channel, bytes)| Op::Grow { channel, bytes }),
        1 => (any(), bytes()).prop_map(|(channel, bytes)| Op::Truncate { channel, bytes }),
        1 => any().prop_map(Op::Shut),
        2 => any().prop_map(Op::Dup),
        2 => (any(), 0..4u8, proptest::bool::ANY)
            .prop_map(|(channel, start, open_file)| Op::LockRange { channel, start, open_file }),
        4 => (any(), any()).prop_map(|(channel, over)| Op::Pass { channel, over }),
        2 => any().prop_map(Op::Fetch),
        4 => (any(), any(), 0..8u8).prop_map(|(epoll, channel, how)| Op::Watch { epoll, channel, how }),
        2 => any().prop_map(Op::Ready),
        2 => (any(), proptest::bool::ANY).prop_map(|(channel, shared)| Op::MapFile { channel, shared }),
        1 => (any(), 1..9u8).prop_map(|(region, pages)| Op::Resize { region, pages }),
        2 => (any(), any()).prop_map(|(region, advice)| Op::Advise { region, advice }),
        1 => any().prop_map(Op::RemoveObject),
        3 => (0..2u8, -2..4i8, proptest::bool::ANY)
            .prop_map(|(key, change, undo)| Op::Semaphore { key, change, undo }),
        2 => (0..2u8, any()).prop_map(|(key, bytes)| Op::Message { key, bytes }),
        1 => (0..2u8).prop_map(Op::Receive),
        1 => any().prop_map(Op::Stop),
        1 => any().prop_map(Op::Continue),
        2 => any().prop_map(Op::Thread),
        1 => Just(Op::Leave),
        3 => any().prop_map(Op::Await),
        2 => any().prop_map(Op::Ring),
        3 => (any(), any(), any()).prop_map(|(to, thread, signal)| Op::Direct { to, thread, signal }),
        1 => any().prop_map(Op::Alarm),
        1 => any().prop_map(Op::User),
        3 => (any(), any()).prop_map(|(what, value)| Op::Tune { what, value }),
        1 => any().prop_map(Op::Lock),
        1 => any().prop_map(Op::Close),
        2 => (8000..8010u16, proptest::bool::ANY).prop_map(|(port, tcp)| Op::Listen { port, tcp }),
        2 => any().prop_map(Op::Connect),
        1 => any().prop_map(Op::Accept),
        1 => any().prop_map(Op::Terminal),
        2 => any().prop_map(Op::Mutex),
        1 => Just(Op::Handler),
        2 => any().prop_map(Op::Block),
        1 => any().prop_map(Op::Unblock),
        3 => (any(), any()).prop_map(|(to, signal)| Op::Send { to, signal }),
        1 => any().prop_map(Op::Umask),
        1 => any().prop_map(Op::Chdir),
        1 => Just(Op::Session),
        1 => Just(Op::Group),
        1 => any().prop_map(Op::Join),
        1 => any().prop_map(Op::Limit),
        1 => any().prop_map(Op::Name),
        2 => (0..6u8).prop_map(Op::Sleep),
        3 => Just(Op::Look),
    ]
}

fn kind() -> impl Strategy<Value = Kind> {
    proptest::sample::select(Kind::ALL.to_vec())
}
