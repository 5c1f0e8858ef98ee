//! Protection keys (`pkey_alloc(2)`): which of them a process has, and which its mappings have. What each key allows a
//! thread is a register of its, and comes with the others.

use std::ops::Range;
use std::sync::OnceLock;

use super::state::{MemoryState, VmaState};
use crate::tracee::{Batch, Call, Results};

/// Keys that a program can have: 1 to this.
const LAST: u32 = 15;
/// `PKEY_DISABLE_ACCESS`.
const DISABLE_ACCESS: i32 = 1;

/// Whether this host's processors have protection keys, and its kernel uses them.
pub fn are_offered() -> bool {
    static OFFERED: OnceLock<bool> = OnceLock::new();
    *OFFERED.get_or_init(|| {
        let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let flags = text.lines().find(|line| line.starts_with("flags"));
        flags.is_some_and(|line| line.split_whitespace().any(|flag| flag == "ospke"))
    })
}

/// Questions which keys are free: the kernel shows the others to nobody.
#[derive(Clone, Debug)]
pub struct Asked(Vec<Call>);

/// Adds the questions. Each changes what the key that it is given allows the thread that asks.
pub fn ask(batch: &mut Batch) -> Asked {
    let calls: Vec<Call> =
        (1..=LAST).map(|_| batch.attempt(libc::SYS_pkey_alloc, [0u64.into(), DISABLE_ACCESS.into()])).collect();
    for call in &calls {
        // Of a key that was not given this is an error without consequence.
        batch.attempt(libc::SYS_pkey_free, [crate::tracee::Arg::ResultOf(*call)]);
    }
    Asked(calls)
}

impl Asked {
    /// The keys that the process has, as bits.
    pub fn answer(&self, results: &Results) -> u16 {
        let given = self.0.iter().map(|call| results.get(*call));
        taken(given)
    }
}

/// The keys that are not among those that were given, as bits. What is refused for another reason than that no key is left
/// (a filter's) says nothing.
fn taken(given: impl Iterator<Item = i64>) -> u16 {
    let (mut free, mut knows) = (0u16, false);
    for result in given {
        let is_key = (1..=i64::from(LAST)).contains(&result);
        free |= if is_key { 1 << result } else { 0 };
        knows |= is_key || result == -i64::from(libc::ENOSPC);
    }
    if knows { !free & !1 } else { 0 }
}

/// How a process that has some keys comes to have others: the kernel gives out the lowest that is free.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// It is given this one, the next.
    Have(u32),
    /// The kernel takes the next one for memory that can only be executed.
    ExecuteOnly(Range<u64>),
    /// It gives this one back.
    Free(u32),
}

/// The steps from the keys that a process begins with to those that it shall have.
pub(super) fn steps(state: &MemoryState, inherited: Option<&MemoryState>) -> Vec<Step> {
    let (had, wanted) = (inherited.map_or(0, |parent| parent.keys), state.keys);
    let has = |bits: u16, key: u32| bits & 1 << key != 0;
    let highest = (1..=LAST).rfind(|key| has(wanted & !had, *key)).unwrap_or(0);
    let mut steps = Vec::new();
    for key in (1..=highest).filter(|key| !has(had, *key)) {
        let executed = state.vmas.iter().find(|vma| vma.is_execute_only() && u32::from(vma.key) == key);
        steps.push(executed.map_or(Step::Have(key), |vma| Step::ExecuteOnly(vma.start..vma.end)));
    }
    let freed = (1..=LAST).filter(|key| !has(wanted, *key) && (has(had, *key) || *key < highest));
    steps.extend(freed.map(Step::Free));
    steps
}

impl VmaState {
    /// Whether it is memory for which the kernel itself has taken a key.
    pub(super) fn is_execute_only(&self) -> bool {
        self.key != 0 && self.protection == libc::PROT_EXEC
    }
}

#[cfg(test)]
mod tests {
    use super::super::state::Backing;
    use super::*;

    fn state(keys: u16, executed: Option<u8>) -> MemoryState {
        let vma = |key| VmaState {
            start: 0x1000,
            end: 0x2000,
            protection: libc::PROT_EXEC,
            flags: 0,
            backing: Backing::Anonymous,
            name: None,
            policy: None,
            key,
        };
        MemoryState { keys, vmas: executed.map(vma).into_iter().collect(), ..MemoryState::default() }
    }

    #[test]
    fn keys_that_are_not_given_are_taken() {
        assert_eq!(taken([1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, -28].into_iter()), 1 << 2);
        assert_eq!(taken((1..=15).map(i64::from)), 0);
        assert_eq!(taken([-28; 15].into_iter()), 0xfffe);
        assert_eq!(taken([-1; 15].into_iter()), 0);
    }

    #[test]
    fn the_lowest_come_first() {
        let bits = |keys: &[u32]| keys.iter().fold(0, |bits, key| bits | 1 << key);
        let have = Step::Have;
        assert_eq!(steps(&state(bits(&[2, 3]), None), None), [have(1), have(2), have(3), Step::Free(1)]);
        let executed = Step::ExecuteOnly(0x1000..0x2000);
        assert_eq!(steps(&state(bits(&[1, 2]), Some(2)), None), [have(1), executed]);
        let parent = state(bits(&[1, 3]), None);
        assert_eq!(steps(&parent, Some(&parent)), []);
        assert_eq!(steps(&state(bits(&[1, 2]), None), Some(&parent)), [have(2), Step::Free(3)]);
        assert_eq!(steps(&state(0, None), Some(&parent)), [Step::Free(1), Step::Free(3)]);
    }
}
