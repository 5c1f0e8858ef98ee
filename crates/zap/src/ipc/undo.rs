//! What a process gives back to semaphores when it ends (`SEM_UNDO`).
//!
//! The kernel shows the values to nobody, but it refuses an operation by which one would leave the range of a short
//! (ERANGE). A series of operations is done whole or not at all, so one that ends with something impossible changes nothing,
//! and tells by its error whether a value is beyond a bound. The process itself must ask.

use std::collections::HashMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{IpcState, SemaphoresState};
use crate::error::{CaptureError, Context};
use crate::ids::{HostPid, PodPid};
use crate::process::hold::{HeldPod, HeldProcess, HoldError, Share};
use crate::process::state::ProcessState;
use crate::sys::kcmp::{self, Shared};
use crate::tracee::{Batch, Call};

/// What a process gives back to a semaphore.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UndoState {
    /// The id of the set.
    pub set: i32,
    /// Which semaphore of it.
    pub number: u16,
    /// What is added to its value.
    pub change: i32,
    /// The value that it has now.
    pub value: u16,
}

/// The most that a semaphore, or a change to one, can be.
const MOST: i32 = 32767;

/// An operation of a series.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Operation {
    number: u16,
    change: i32,
    flags: i32,
}

const UNDO: i32 = libc::SEM_UNDO;

fn bytes_of(series: &[Operation]) -> Vec<u8> {
    // struct sembuf: three shorts.
    let one = |o: &Operation| [o.number.to_ne_bytes(), (o.change as i16).to_ne_bytes(), (o.flags as i16).to_ne_bytes()];
    series.iter().flat_map(one).flatten().collect()
}

/// What to ask of a semaphore's value to be given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Question {
    /// Is it more than this, which is not negative?
    Above(i32),
    /// Is it less than this, negated?
    Below(i32),
}

impl Question {
    /// Operations of which one is out of range if the answer is yes. The value is `left` behind them.
    fn series(self, number: u16, value: u16) -> (Vec<Operation>, i32) {
        let value = i32::from(value);
        let plain = |change| Operation { number, change, flags: libc::IPC_NOWAIT };
        let undone = |change| Operation { number, change, flags: libc::IPC_NOWAIT | UNDO };
        let (mut series, left) = match self {
            // The change is taken from what is given back.
            Question::Above(bound) => (vec![plain(MOST - value), undone(bound - MOST)], bound),
            Question::Below(0) => (vec![plain(-value), undone(MOST), plain(-MOST), undone(1)], 1),
            Question::Below(bound) => (vec![plain(-value), undone(MOST + 1 - bound)], MOST + 1 - bound),
        };
        // To change nothing is to wait for zero.
        series.retain(|operation| operation.change != 0);
        (series, left)
    }
}

/// A series about some semaphores of a set, which cannot succeed.
struct Probe {
    set: i32,
    series: Vec<Operation>,
}

impl Probe {
    /// Asks the same of several semaphores: the answer is yes if it is for one of them.
    fn new(set: i32, semaphores: impl Iterator<Item = (u16, u16)>, question: Question) -> Probe {
        let (mut series, mut last) = (Vec::new(), (0, 0));
        for (number, value) in semaphores {
            let (more, left) = question.series(number, value);
            series.extend(more);
            last = (number, left);
        }
        series.push(Operation { number: last.0, change: -last.1 - 1, flags: libc::IPC_NOWAIT });
        Probe { set, series }
    }
}

/// As many semaphores as are asked about at once, and as many probes as a batch has room for.
const TOGETHER: usize = 20;
const PROBES: usize = 4;

/// What every process of a held pod gives back, into their states.
pub fn capture_all(
    ipc: &IpcState,
    held: &HeldPod,
    init: HostPid,
    states: &mut [ProcessState],
) -> Result<(), HoldError> {
    if ipc.semaphores.is_empty() {
        return Ok(());
    }
    let found = held.each((Arc::new(ipc.semaphores.clone()), init), capture_share).wait()?;
    for (state, undo) in states.iter_mut().zip(found) {
        state.undo = undo;
    }
    Ok(())
}

type Sets = Arc<Vec<SemaphoresState>>;

/// A job of a tracer.
fn capture_share(share: &mut Share, (sets, init): (Sets, HostPid)) -> Result<Vec<(PodPid, Vec<UndoState>)>, HoldError> {
    let one = |process: &mut HeldProcess| Ok((process.found.subject.pod, capture(&sets, process, init)?));
    share.held.iter_mut().map(one).collect()
}

/// What `process`, which is held, gives back.
fn capture(sets: &[SemaphoresState], process: &mut HeldProcess, init: HostPid) -> Result<Vec<UndoState>, HoldError> {
    if !has_list(process, init)? {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for set in sets {
        for (change, number) in changes(process, set)? {
            found.push(UndoState { set: set.id, number, change, value: set.values[usize::from(number)] });
        }
    }
    if !found.is_empty() {
        refuse_shared(process)?;
    }
    Ok(found)
}

/// Whether it has a list at all, be it empty: threads share one from birth.
fn has_list(process: &HeldProcess, init: HostPid) -> Result<bool, CaptureError> {
    let subject = &process.found.subject;
    // A process in an IPC namespace of its own left its list behind when it went there.
    let home = |pid: HostPid| std::fs::read_link(pid.proc("ns/ipc")).capturing("looking at", "an IPC namespace");
    if home(subject.host)? != home(init)? {
        return Ok(false);
    }
    // PID 1 never has one.
    let none =
        kcmp::shares(subject.host.0, init.0, Shared::SemUndo).capturing("comparing undo lists", subject.object())?;
    Ok(!none)
}

/// Refuses a list that not exactly the threads of a process have.
fn refuse_shared(process: &HeldProcess) -> Result<(), CaptureError> {
    let subject = &process.found.subject;
    let shares = |other: i32| kcmp::shares(subject.host.0, other, Shared::SemUndo).unwrap_or(false);
    let parent = process.found.status.field("PPid").and_then(|pid| pid.parse().ok()).unwrap_or(0);
    let apart = process.threads.iter().any(|thread| !shares(thread.name.host.0));
    if apart || parent > 0 && shares(parent) {
        return Err(subject.refuse(
            "its semaphore undo list",
            "is not that of all its threads alone, which cannot be checkpointed yet",
        ));
    }
    Ok(())
}

/// The semaphores of a set to which something is given back.
fn changes(process: &mut HeldProcess, set: &SemaphoresState) -> Result<Vec<(i32, u16)>, HoldError> {
    let all: Vec<(u16, u16)> = (0u16..).zip(set.values.iter().copied()).collect();
    let both = [Question::Above(0), Question::Below(0)];
    let groups: Vec<(&[(u16, u16)], Question)> =
        all.chunks(TOGETHER).flat_map(|some| both.map(|question| (some, question))).collect();
    let probes = groups.iter().map(|(some, question)| Probe::new(set.id, some.iter().copied(), *question)).collect();
    let answers = ask(process, set, probes)?;
    let hits = groups.into_iter().zip(answers).filter(|(_, yes)| *yes).map(|(group, _)| group);
    let singles: Vec<((u16, u16), Question)> =
        hits.flat_map(|(some, question)| some.iter().map(move |one| (*one, question))).collect();
    let probes = singles.iter().map(|(one, question)| Probe::new(set.id, [*one].into_iter(), *question)).collect();
    let answers = ask(process, set, probes)?;
    let hits = singles.into_iter().zip(answers).filter(|(_, yes)| *yes).map(|(single, _)| single).collect();
    values(process, set, hits)
}

/// How much it is, of semaphores of which the sign is known.
fn values(
    process: &mut HeldProcess,
    set: &SemaphoresState,
    hits: Vec<((u16, u16), Question)>,
) -> Result<Vec<(i32, u16)>, HoldError> {
    let negative: HashMap<u16, bool> =
        hits.iter().map(|((number, _), question)| (*number, matches!(question, Question::Below(_)))).collect();
    // More than the first, at most the second.
    let mut open: Vec<((u16, u16), i32, i32)> = hits.into_iter().map(|(one, _)| (one, 0, MOST + 1)).collect();
    let mut found = Vec::new();
    while !open.is_empty() {
        let middle = |low: i32, high: i32| (low + high) / 2;
        let question = |(one, low, high): &((u16, u16), i32, i32)| {
            let bound = middle(*low, *high);
            let question = if negative[&one.0] { Question::Below(bound) } else { Question::Above(bound) };
            Probe::new(set.id, [*one].into_iter(), question)
        };
        let answers = ask(process, set, open.iter().map(question).collect())?;
        for ((_, low, high), yes) in open.iter_mut().zip(answers) {
            let bound = middle(*low, *high);
            if yes { *low = bound } else { *high = bound }
        }
        open.retain(|((number, _), low, high)| {
            let size = if negative[number] { -high } else { *high };
            let known = high - low == 1;
            found.extend(known.then_some((size, *number)));
            !known
        });
    }
    Ok(found)
}

fn ask(process: &mut HeldProcess, set: &SemaphoresState, probes: Vec<Probe>) -> Result<Vec<bool>, HoldError> {
    let mut answers = Vec::with_capacity(probes.len());
    for some in probes.chunks(PROBES) {
        let mut batch = Batch::new();
        let mut add = |probe: &Probe| -> Call {
            let series = batch.bytes(&bytes_of(&probe.series));
            batch.attempt(libc::SYS_semop, [probe.set.into(), series, probe.series.len().into()])
        };
        let calls: Vec<Call> = some.iter().map(&mut add).collect();
        let results = process.threads[0].run(&process.ground, 0, &batch)?;
        for call in calls {
            answers.push(answer(process, set, results.get(call))?);
        }
    }
    Ok(answers)
}

fn answer(process: &HeldProcess, set: &SemaphoresState, result: i64) -> Result<bool, CaptureError> {
    let subject = &process.found.subject;
    match -result as i32 {
        libc::ERANGE => Ok(true),
        libc::EAGAIN => Ok(false),
        libc::EACCES => Err(subject.refuse(
            format!("its semaphores (id {})", set.id),
            "may have been used with SEM_UNDO before it lost the right to use them, which cannot be found out",
        )),
        other => Err(CaptureError::Unexpected {
            object: format!("semaphores {} of {}", set.id, subject.object()),
            what: format!("error {other} of a semop that cannot succeed"),
        }),
    }
}

/// Has the process that runs `batch` give back the same; the values stay what they are.
pub fn restart(undo: &[UndoState], batch: &mut Batch) {
    for state in undo {
        let series = giving_back(state);
        let operations = batch.bytes(&bytes_of(&series));
        let what = format!("using semaphore {} of set {}", state.number, state.set);
        batch.call(libc::SYS_semop, [state.set.into(), operations, series.len().into()], what);
    }
}

/// Steps up and down again, of which one counts.
fn giving_back(state: &UndoState) -> Vec<Operation> {
    let (value, number) = (i32::from(state.value), state.number);
    let (mut rest, sign) = (state.change.abs(), state.change.signum());
    let mut series = Vec::new();
    while rest > 0 {
        let (room, up_first) = if value < MOST { (MOST - value, true) } else { (value, false) };
        let step = rest.min(room);
        // What is taken is given back, and what is given is taken.
        let counts = |change: i32| if change.signum() == sign { 0 } else { UNDO };
        let mut pair =
            [step, -step].map(|change| Operation { number, change, flags: libc::IPC_NOWAIT | counts(change) });
        if !up_first {
            pair.reverse();
        }
        series.extend(pair);
        rest -= step;
    }
    series
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel does with a series: the errno, and what it leaves.
    fn operate(series: &[Operation], mut value: i32, mut given: i32) -> Result<(i32, i32), i32> {
        for operation in series {
            assert!(operation.change != 0 && i16::try_from(operation.change).is_ok());
            value += operation.change;
            match value {
                ..0 => return Err(libc::EAGAIN),
                0..=MOST => {}
                _ => return Err(libc::ERANGE),
            }
            if operation.flags & UNDO != 0 {
                given -= operation.change;
                if i16::try_from(given).is_err() {
                    return Err(libc::ERANGE);
                }
            }
        }
        Ok((value, given))
    }

    const VALUES: [u16; 6] = [0, 1, 2, 1000, 32766, 32767];
    const GIVEN: [i32; 11] = [-32768, -32767, -1000, -2, -1, 0, 1, 2, 1000, 32766, 32767];

    #[test]
    fn the_error_is_the_answer() {
        for (value, given) in VALUES.iter().flat_map(|value| GIVEN.map(|given| (*value, given))) {
            for bound in [0, 1, 2, 999, 1000, 16384, 32766, 32767] {
                for (question, yes) in
                    [(Question::Above(bound), given > bound), (Question::Below(bound), given < -bound)]
                {
                    let probe = Probe::new(1, [(3, value)].into_iter(), question);
                    let expected = if yes { libc::ERANGE } else { libc::EAGAIN };
                    let got = operate(&probe.series, value.into(), given);
                    assert_eq!(got, Err(expected), "{value} {given} {question:?}");
                }
            }
        }
    }

    #[test]
    fn what_is_given_back_is_made_again() {
        for (value, change) in VALUES.iter().flat_map(|value| GIVEN.map(|given| (*value, given))) {
            let series = giving_back(&UndoState { set: 1, number: 2, change, value });
            assert_eq!(operate(&series, value.into(), 0), Ok((value.into(), change)), "{value} {change}");
        }
    }
}
