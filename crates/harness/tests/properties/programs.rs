//! Generated programs, and what happens to the pod while it runs them.

use harness::program::{Kind, Op, Step};
use proptest::prelude::*;

/// What is done to a pod that pauses.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Action {
    Nothing,
    Suspend,
    LeaveRunning,
    Restart,
    RestartTwice,
}

/// A program, and what is done at its pauses, over and over.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) steps: Vec<Step>,
    pub(crate) actions: Vec<Action>,
}

impl Case {
    /// The steps that are pauses.
    pub(crate) fn pauses(&self) -> impl Iterator<Item = usize> {
        let pause = |(at, step): (usize, &Step)| matches!(step.op, Op::Pause).then_some(at);
        self.steps.iter().enumerate().filter_map(pause)
    }
}

pub(crate) fn case() -> impl Strategy<Value = Case> {
    let act = prop_oneof![
        1 => Just(Action::Nothing),
        1 => Just(Action::Suspend),
        3 => Just(Action::LeaveRunning),
        4 => Just(Action::Restart),
        1 => Just(Action::RestartTwice),
    ];
    let part = || proptest::collection::vec(step(), 8..30);
    (proptest::collection::vec(part(), 2..4), proptest::collection::vec(act, 1..4)).prop_map(|(parts, actions)| {
        let pause = || Step { who: 0, op: Op::Pause };
        let mut steps: Vec<Step> = vec![Step { who: 0, op: Op::Fork }, Step { who: 1, op: Op::Fork }];
        for part in parts {
            steps.extend(part);
            steps.push(pause());
        }
        // In the end everybody looks at everything.
        steps.extend((0..8).flat_map(|who| [Op::Look, Op::Wait].map(|op| Step { who, op })));
        Case { steps, actions }
    })
}

fn step() -> impl Strategy<Value = Step> {
    (any::<u8>(), op()).prop_map(|(who, op)| Step { who, op })
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
        1 => (any(), 0..8u8).prop_map(|(region, protection)| Op::Protect { region, protection }),
        1 => any().prop_map(Op::Unmap),
        6 => kind().prop_map(Op::Open),
        8 => (any(), bytes()).prop_map(|(channel, bytes)| Op::Put { channel, bytes }),
        4 => (any(), bytes()).prop_map(|(channel, bytes)| Op::Take { channel, bytes }),
        1 => (any(), bytes()).prop_map(|(channel, offset)| Op::Seek { channel, offset }),
        1 => any().prop_map(Op::Unlink),
        1 => any().prop_map(Op::Lock),
        1 => any().prop_map(Op::Close),
        1 => (8000..8010u16).prop_map(Op::Listen),
        2 => any().prop_map(Op::Block),
        1 => any().prop_map(Op::Unblock),
        3 => (any(), any()).prop_map(|(to, signal)| Op::Send { to, signal }),
        1 => any().prop_map(Op::Umask),
        1 => any().prop_map(Op::Chdir),
        1 => Just(Op::Session),
        1 => Just(Op::Group),
        1 => any().prop_map(Op::Limit),
        1 => any().prop_map(Op::Name),
        3 => Just(Op::Look),
    ]
}

fn kind() -> impl Strategy<Value = Kind> {
    use Kind::{Append, Event, File, Packets, Pair, Pipe, Tcp, Udp};
    proptest::sample::select(vec![Pipe, Pair, Packets, Tcp, Udp, Event, File, Append])
}
