//! Signals: actions, masks, queues, alternate stacks.

use serde::{Deserialize, Serialize};

use crate::sys::ptrace::SigInfo;
use crate::tracee::{Arg, Batch, Output, Results};

/// Bytes of the kernel's `struct sigaction`: handler, flags, restorer, mask.
const ACTION: usize = 32;
const SIGNALS: i32 = 64;

/// What a process does about each signal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ActionState {
    /// The signal.
    pub signal: i32,
    /// Handler address, flags, restorer address, mask.
    pub action: [u64; 4],
}

/// An alternate signal stack.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AlternateStack {
    /// Its lowest address.
    pub address: u64,
    /// `SS_DISABLE`, `SS_AUTODISARM`.
    pub flags: i32,
    /// Bytes.
    pub size: u64,
}

/// A queued signal, as `siginfo_t`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueuedSignal {
    /// The 128 bytes of `siginfo_t`.
    #[serde(with = "serde_bytes")]
    pub info: Vec<u8>,
}

impl QueuedSignal {
    /// Wraps what the kernel gave.
    pub fn new(info: SigInfo) -> QueuedSignal {
        QueuedSignal { info: info.to_vec() }
    }

    /// Its number.
    pub fn number(&self) -> i32 {
        self.info.first_chunk().map_or(0, |word| i32::from_ne_bytes(*word))
    }
}

/// Signals that programs ignore unless they say otherwise, and that have no other effect.
const MARKERS: [i32; 3] = [libc::SIGURG, libc::SIGWINCH, libc::SIGCHLD];

/// A signal that can end a batch, of those that are ignored by default and not in `busy` (bit 0 is signal 1).
pub fn ignored_marker(busy: u64) -> Option<i32> {
    MARKERS.into_iter().find(|signal| busy & (1 << (signal - 1)) == 0)
}

/// A signal that can end a batch where those are `pending`, which would end it too soon.
pub fn marker(pending: u64) -> Option<i32> {
    const FIRST_REAL_TIME: i32 = 32;
    let real_time = || (FIRST_REAL_TIME..=SIGNALS).find(|signal| pending & (1 << (signal - 1)) == 0);
    ignored_marker(pending).or_else(real_time)
}

/// The same in a program that handles all of those: what its own threads send one another at any time would end a batch too
/// soon, as SIGURG would in Go, whose threads preempt each other with it.
pub fn handled_marker(pending: u64) -> Option<i32> {
    Some(libc::SIGWINCH).filter(|signal| pending & (1 << (signal - 1)) == 0).or_else(|| marker(pending))
}

/// A signal that can end batches in a restart, where these are to be pending afterwards.
pub fn marker_beside<'q>(queued: impl Iterator<Item = &'q QueuedSignal>) -> i32 {
    let bit = |signal: &QueuedSignal| 1u64.checked_shl((signal.number() - 1) as u32).unwrap_or(0);
    marker(queued.fold(0, |all, signal| all | bit(signal))).unwrap_or(MARKERS[0])
}

fn settable() -> impl Iterator<Item = i32> {
    (1..=SIGNALS).filter(|signal| ![libc::SIGKILL, libc::SIGSTOP].contains(signal))
}

/// Asks for every action.
pub fn ask_actions(batch: &mut Batch) -> Vec<(i32, Output)> {
    settable()
        .map(|signal| {
            let out = batch.output(ACTION);
            let args = [signal.into(), 0u64.into(), out.into(), 8u64.into()];
            batch.call(libc::SYS_rt_sigaction, args, "reading a signal action");
            (signal, out)
        })
        .collect()
}

/// The actions that are not the default.
pub fn actions(asked: &[(i32, Output)], results: &Results) -> Vec<ActionState> {
    asked
        .iter()
        .filter_map(|(signal, out)| {
            let bytes = results.output(*out);
            let word = |i: usize| bytes[i * 8..].first_chunk().map_or(0, |word| u64::from_ne_bytes(*word));
            let action = [word(0), word(1), word(2), word(3)];
            (action != [0; 4]).then_some(ActionState { signal: *signal, action })
        })
        .collect()
}

/// Sets every action; those that are not named are reset to the default.
pub fn restart_actions(states: &[ActionState], batch: &mut Batch) {
    for signal in settable() {
        let action = states.iter().find(|state| state.signal == signal).map_or([0; 4], |state| state.action);
        let bytes: Vec<u8> = action.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let bytes = batch.bytes(&bytes);
        let args = [signal.into(), bytes, 0u64.into(), 8u64.into()];
        batch.call(libc::SYS_rt_sigaction, args, format!("setting the action of signal {signal}"));
    }
}

/// Asks for the alternate stack.
pub fn ask_alternate_stack(batch: &mut Batch) -> Output {
    let out = batch.output(24);
    batch.call(libc::SYS_sigaltstack, [0u64.into(), out.into()], "reading the alternate stack");
    out
}

/// The alternate stack; `SS_ONSTACK` is where the thread is, not what was set.
pub fn alternate_stack(out: Output, results: &Results) -> AlternateStack {
    let bytes = results.output(out);
    let word = |i: usize| bytes[i * 8..].first_chunk().map_or(0, |word| u64::from_ne_bytes(*word));
    AlternateStack { address: word(0), flags: word(1) as i32 & !libc::SS_ONSTACK, size: word(2) }
}

/// Sets the alternate stack.
pub fn restart_alternate_stack(state: &AlternateStack, batch: &mut Batch) {
    let words = [state.address, state.flags as u32 as u64, state.size];
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let bytes = batch.bytes(&bytes);
    batch.call(libc::SYS_sigaltstack, [bytes, 0u64.into()], "setting the alternate stack");
}

/// Queues signals again, in order: to the thread (`thread` is (tgid, tid)) or to its whole process.
///
/// The thread queues them to itself, which is what lets `si_code` of the kernel's own signals through.
pub fn requeue(signals: &[QueuedSignal], own: (i32, i32), shared: bool, batch: &mut Batch) {
    for signal in signals {
        let info = batch.bytes(&signal.info);
        let (tgid, tid, number): (Arg, Arg, Arg) = (own.0.into(), own.1.into(), signal.number().into());
        let what = format!("queueing signal {}", signal.number());
        if shared {
            batch.call(libc::SYS_rt_sigqueueinfo, [tgid, number, info], what);
        } else {
            batch.call(libc::SYS_rt_tgsigqueueinfo, [tgid, tid, number, info], what);
        }
    }
}

/// Throws away every signal that is pending (all are blocked during a batch): what the restart itself caused.
pub fn drain(batch: &mut Batch) {
    let all = batch.bytes(&u64::MAX.to_ne_bytes());
    let now = batch.bytes(&[0; 16]);
    for _ in 0..4 {
        batch.attempt(libc::SYS_rt_sigtimedwait, [all, 0u64.into(), now, 8u64.into()]);
    }
}
