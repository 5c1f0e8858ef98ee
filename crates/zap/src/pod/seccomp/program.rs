//! From decisions about system calls to the program that the kernel runs before each call.
//!
//! The number alone decides for almost all: the kernel notices (`seccomp_cache_prepare` tries every number when the filter
//! is installed) and does not even run the program for those that are always allowed. The others are found by halving.

use std::collections::BTreeMap;

use super::ProfileError;

/// `AUDIT_ARCH_X86_64`.
const THIS_ARCHITECTURE: u32 = 0xc000_003e;
/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;
/// `BPF_MAXINSNS`.
const MOST_INSTRUCTIONS: usize = 4096;

/// What becomes of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Allow,
    /// It fails with this error number.
    Fail(u16),
    /// The process is killed, as by SIGSYS.
    KillProcess,
    /// The thread is.
    KillThread,
    /// The program gets SIGSYS.
    Trap,
    /// It is allowed and noted in the host's log.
    Log,
}

impl Action {
    fn code(self) -> u32 {
        match self {
            Action::Allow => libc::SECCOMP_RET_ALLOW,
            Action::Fail(errno) => libc::SECCOMP_RET_ERRNO | u32::from(errno),
            Action::KillProcess => libc::SECCOMP_RET_KILL_PROCESS,
            Action::KillThread => libc::SECCOMP_RET_KILL_THREAD,
            Action::Trap => libc::SECCOMP_RET_TRAP,
            Action::Log => libc::SECCOMP_RET_LOG,
        }
    }
}

/// How an argument is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Comparison {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    /// Equal after a logical and with this.
    Masked(u64),
}

/// A condition on an argument (0 to 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Condition {
    pub(super) argument: u32,
    pub(super) comparison: Comparison,
    pub(super) value: u64,
}

/// What is decided about one call: the first rule all of whose conditions hold, or else what is decided by default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Decision {
    pub(super) rules: Vec<(Vec<Condition>, Action)>,
}

/// Decisions about all calls.
#[derive(Clone, Debug)]
pub(super) struct Decisions {
    pub(super) by_number: BTreeMap<u32, Decision>,
    pub(super) otherwise: Action,
}

impl Decisions {
    /// Adds a rule after those that are there for the call.
    pub(super) fn add(&mut self, number: u32, conditions: Vec<Condition>, action: Action) {
        self.by_number.entry(number).or_default().rules.push((conditions, action));
    }

    /// The program.
    pub(super) fn compile(&self) -> Result<Vec<libc::sock_filter>, ProfileError> {
        let mut program = vec![
            load(ARCHITECTURE),
            // 32-bit calls have other numbers: as on a kernel without them.
            jump(libc::BPF_JEQ, THIS_ARCHITECTURE, 1, 0),
            give(Action::Fail(libc::ENOSYS as u16)),
            load(NUMBER),
        ];
        program.extend(search(&self.ranges()));
        match program.len() {
            1..=MOST_INSTRUCTIONS => Ok(program),
            n => Err(ProfileError(format!("it makes {n} instructions; the kernel takes {MOST_INSTRUCTIONS}"))),
        }
    }

    /// The code for each range of numbers, by its first number; the ranges follow on each other.
    fn ranges(&self) -> Vec<(u32, Vec<libc::sock_filter>)> {
        let otherwise = vec![give(self.otherwise)];
        let mut ranges = vec![(0, otherwise.clone())];
        for (&number, decision) in &self.by_number {
            put(&mut ranges, number, decision.code(self.otherwise));
            put(&mut ranges, number + 1, otherwise.clone());
        }
        ranges
    }
}

/// Lets a range begin at `first`, where the last one that began there or before ends.
fn put(ranges: &mut Vec<(u32, Vec<libc::sock_filter>)>, first: u32, code: Vec<libc::sock_filter>) {
    if ranges.last().is_some_and(|(number, _)| *number == first) {
        ranges.pop();
    }
    if ranges.last().is_none_or(|(_, before)| !same(before, &code)) {
        ranges.push((first, code));
    }
}

fn same(a: &[libc::sock_filter], b: &[libc::sock_filter]) -> bool {
    let key = |i: &libc::sock_filter| (i.code, i.jt, i.jf, i.k);
    a.iter().map(key).eq(b.iter().map(key))
}

/// Code that finds the range that the number is in, by halving.
fn search(ranges: &[(u32, Vec<libc::sock_filter>)]) -> Vec<libc::sock_filter> {
    if let [(_, code)] = ranges {
        return code.clone();
    }
    let (lower, upper) = ranges.split_at(ranges.len() / 2);
    let (lower, above) = (search(lower), upper[0].0);
    // A conditional jump reaches 255 instructions, an unconditional one any number.
    let mut code = match u8::try_from(lower.len()) {
        Ok(length) => vec![jump(libc::BPF_JGE, above, length, 0)],
        Err(_) => vec![jump(libc::BPF_JGE, above, 0, 1), instruction(libc::BPF_JMP | libc::BPF_JA, lower.len() as u32)],
    };
    code.extend(lower);
    code.extend(search(upper));
    code
}

impl Decision {
    fn code(&self, otherwise: Action) -> Vec<libc::sock_filter> {
        let mut code = Vec::new();
        for (conditions, action) in &self.rules {
            code.extend(rule(conditions, *action));
            if conditions.is_empty() {
                return code;
            }
        }
        code.push(give(otherwise));
        code
    }
}

/// A rule's code goes on behind its end if a condition does not hold.
fn rule(conditions: &[Condition], action: Action) -> Vec<libc::sock_filter> {
    let mut code = vec![give(action)];
    for condition in conditions.iter().rev() {
        let rest = code.len() as u8;
        let mut longer = condition.code(rest);
        longer.extend(code);
        code = longer;
    }
    code
}

impl Condition {
    /// Goes on behind its end if it holds; `rest` instructions further if not. Arguments have 64 bits and are compared by
    /// halves, the higher first.
    fn code(&self, rest: u8) -> Vec<libc::sock_filter> {
        let at = ARGUMENTS + 8 * self.argument;
        let (high, low) = ((self.value >> 32) as u32, self.value as u32);
        let equal = libc::BPF_JEQ;
        // (test of the higher half that decides at once, whether it then holds), test of the lower half, negated.
        let (early, holds, test, negated) = match self.comparison {
            Comparison::Masked(mask) => return masked(at, self.value, mask, rest),
            Comparison::Equal => return equality(at, (high, low), rest),
            Comparison::NotEqual => {
                return vec![load(at + 4), jump(equal, high, 0, 2), load(at), jump(equal, low, rest, 0)];
            }
            Comparison::Greater => (libc::BPF_JGT, true, libc::BPF_JGT, false),
            Comparison::GreaterOrEqual => (libc::BPF_JGT, true, libc::BPF_JGE, false),
            Comparison::Less => (libc::BPF_JGT, false, libc::BPF_JGE, true),
            Comparison::LessOrEqual => (libc::BPF_JGT, false, libc::BPF_JGT, true),
        };
        let past = |skip: u8| skip;
        let (if_greater, if_less) = if holds { (past(3), rest + 2) } else { (rest + 3, past(2)) };
        let (yes, no) = if negated { (rest, 0) } else { (0, rest) };
        vec![
            load(at + 4),
            jump(early, high, if_greater, 0),
            jump(equal, high, 0, if_less),
            load(at),
            jump(test, low, yes, no),
        ]
    }
}

fn equality(at: u32, (high, low): (u32, u32), rest: u8) -> Vec<libc::sock_filter> {
    let equal = libc::BPF_JEQ;
    vec![load(at + 4), jump(equal, high, 0, rest + 2), load(at), jump(equal, low, 0, rest)]
}

fn masked(at: u32, value: u64, mask: u64, rest: u8) -> Vec<libc::sock_filter> {
    let and = |mask: u32| instruction(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, mask);
    let equal = libc::BPF_JEQ;
    vec![
        load(at + 4),
        and((mask >> 32) as u32),
        jump(equal, (value >> 32) as u32, 0, rest + 3),
        load(at),
        and(mask as u32),
        jump(equal, value as u32, 0, rest),
    ]
}

fn instruction(code: u32, k: u32) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt: 0, jf: 0, k }
}

fn load(offset: u32) -> libc::sock_filter {
    instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset)
}

fn give(action: Action) -> libc::sock_filter {
    instruction(libc::BPF_RET | libc::BPF_K, action.code())
}

fn jump(test: u32, k: u32, jt: u8, jf: u8) -> libc::sock_filter {
    libc::sock_filter { code: (libc::BPF_JMP | test | libc::BPF_K) as u16, jt, jf, k }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Runs a program as the kernel would.
    fn run(program: &[libc::sock_filter], architecture: u32, number: u32, arguments: [u64; 6]) -> u32 {
        let mut data = [number.to_ne_bytes(), architecture.to_ne_bytes()].concat();
        data.extend([0; 8]);
        arguments.iter().for_each(|a| data.extend(a.to_ne_bytes()));
        let (mut at, mut register) = (0, 0u32);
        loop {
            let i = program[at];
            at += 1;
            let hit = |yes: bool| usize::from(if yes { i.jt } else { i.jf });
            match u32::from(i.code) {
                0x20 => register = u32::from_ne_bytes(data[i.k as usize..][..4].try_into().unwrap()),
                0x15 => at += hit(register == i.k),
                0x25 => at += hit(register > i.k),
                0x35 => at += hit(register >= i.k),
                0x05 => at += i.k as usize,
                0x54 => register &= i.k,
                0x06 => return i.k,
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    fn holds(condition: &Condition, arguments: [u64; 6]) -> bool {
        let (a, b) = (arguments[condition.argument as usize], condition.value);
        match condition.comparison {
            Comparison::Equal => a == b,
            Comparison::NotEqual => a != b,
            Comparison::Less => a < b,
            Comparison::LessOrEqual => a <= b,
            Comparison::Greater => a > b,
            Comparison::GreaterOrEqual => a >= b,
            Comparison::Masked(mask) => a & mask == b,
        }
    }

    /// Numbers that meet in both halves, in one, and in none.
    fn number() -> impl Strategy<Value = u64> {
        prop_oneof![0..4u64, (0..3u64, 0..3u64).prop_map(|(a, b)| a << 32 | b), any::<u64>()]
    }

    fn condition() -> impl Strategy<Value = Condition> {
        let comparison = prop_oneof![
            Just(Comparison::Equal),
            Just(Comparison::NotEqual),
            Just(Comparison::Less),
            Just(Comparison::LessOrEqual),
            Just(Comparison::Greater),
            Just(Comparison::GreaterOrEqual),
            number().prop_map(Comparison::Masked),
        ];
        (0..6u32, comparison, number()).prop_map(|(argument, comparison, value)| Condition {
            argument,
            comparison,
            value,
        })
    }

    proptest! {
        #[test]
        fn the_program_decides_as_the_rules_say(
            rules in prop::collection::vec((0..400u32, prop::collection::vec(condition(), 0..4), 0..9u16), 0..120),
            calls in prop::collection::vec((0..402u32, prop::array::uniform6(number())), 20),
        ) {
            let mut decisions = Decisions { by_number: BTreeMap::new(), otherwise: Action::Fail(99) };
            for (number, conditions, action) in &rules {
                decisions.add(*number, conditions.clone(), Action::Fail(*action));
            }
            let program = decisions.compile().unwrap();
            for (number, arguments) in calls {
                let first = rules.iter().find(|(n, all, _)| *n == number && all.iter().all(|c| holds(c, arguments)));
                let expected = Action::Fail(first.map_or(99, |(_, _, action)| *action)).code();
                prop_assert_eq!(run(&program, THIS_ARCHITECTURE, number, arguments), expected);
                prop_assert_eq!(run(&program, 0x4000_0003, number, arguments), Action::Fail(libc::ENOSYS as u16).code());
            }
        }
    }

    #[test]
    fn a_program_that_is_too_long_is_refused() {
        let mut decisions = Decisions { by_number: BTreeMap::new(), otherwise: Action::Allow };
        for number in 0..3000 {
            decisions.add(2 * number, vec![], Action::Fail(1));
        }
        assert!(decisions.compile().is_err());
    }
}
