//! Interval timers and POSIX timers of a process.

use std::collections::HashMap;
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};

use crate::ids::HostPid;
use crate::process::proc_files::Status;
use crate::process::signals::QueuedSignal;
use crate::procfs;
use crate::sys::probe;
use crate::tracee::{Arg, Batch, Call, Output, Results};

/// `struct itimerval` / `itimerspec` as four words: interval (s, fraction), time left (s, fraction).
pub type TimerWords = [u64; 4];

/// A POSIX timer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PosixTimer {
    /// Its id in the process.
    pub id: i32,
    /// The signal, or 0.
    pub signal: i32,
    /// `sigev_value`.
    pub value: u64,
    /// `sigev_notify`.
    pub notify: i32,
    /// The thread that is notified (`SIGEV_THREAD_ID`), in its own PID namespace.
    pub thread: i32,
    /// The clock.
    pub clock: i32,
    /// Interval and time left, in nanoseconds form (s, ns).
    pub setting: TimerWords,
    /// Pending overruns.
    pub overrun: i64,
}

/// The timers of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimersState {
    /// `ITIMER_REAL`, `VIRTUAL`, `PROF`, in microseconds form.
    pub intervals: [TimerWords; 3],
    /// POSIX timers in order of their ids.
    pub posix: Vec<PosixTimer>,
}

impl TimersState {
    /// The threads that are notified, as they are called here.
    pub fn notified(&self) -> impl Iterator<Item = i32> {
        self.posix.iter().filter(|timer| timer.notify == libc::SIGEV_THREAD_ID).map(|timer| timer.thread)
    }

    /// Whether a signal is of a timer that expires once and is written down as if it had not yet.
    pub fn will_send(&self, signal: &QueuedSignal) -> bool {
        const CODE: usize = 8;
        const TIMER: usize = 16;
        let word = |at: usize| signal.info[at..].first_chunk().map(|word| i32::from_ne_bytes(*word));
        let runs = |timer: &&PosixTimer| timer.setting[..2] == [0; 2] && timer.setting[2..] != [0; 2];
        let runs_once = |id| self.posix.iter().filter(runs).any(|timer| timer.id == id);
        word(CODE) == Some(libc::SI_TIMER) && word(TIMER).is_some_and(runs_once)
    }

    /// With what threads are called in their own PID namespace, in place of what the pod calls them.
    pub fn named(mut self, own: &HashMap<i32, i32>) -> TimersState {
        for timer in &mut self.posix {
            timer.thread = own.get(&timer.thread).copied().unwrap_or(timer.thread);
        }
        self
    }
}

/// What was asked of the process.
pub struct Asked {
    intervals: [Output; 3],
    posix: Vec<(PosixTimer, Output, Call)>,
}

/// Parses `/proc/PID/timers`.
pub fn parse_timers(text: &str) -> Vec<PosixTimer> {
    let mut timers: Vec<PosixTimer> = Vec::new();
    for line in text.lines() {
        let Some((label, value)) = line.split_once(':') else { continue };
        let value = value.trim();
        if label == "ID" {
            let id = value.parse().unwrap_or(-1);
            timers.push(PosixTimer {
                id,
                signal: 0,
                value: 0,
                notify: 0,
                thread: 0,
                clock: 0,
                setting: [0; 4],
                overrun: 0,
            });
            continue;
        }
        let Some(timer) = timers.last_mut() else { continue };
        match label {
            "signal" => {
                let (signal, pointer) = value.split_once('/').unwrap_or((value, "0"));
                timer.signal = signal.parse().unwrap_or(0);
                timer.value = u64::from_str_radix(pointer.trim_start_matches("0x"), 16).unwrap_or(0);
            }
            "notify" => {
                let (how, target) = value.split_once('/').unwrap_or((value, ""));
                timer.notify = match how {
                    "none" => libc::SIGEV_NONE,
                    "thread" => libc::SIGEV_THREAD,
                    _ => libc::SIGEV_SIGNAL,
                };
                if let Some(tid) = target.strip_prefix("tid.") {
                    timer.notify |= libc::SIGEV_THREAD_ID;
                    timer.thread = tid.parse().unwrap_or(0);
                }
            }
            "ClockID" => timer.clock = value.parse().unwrap_or(0),
            _ => {}
        }
    }
    timers.sort_by_key(|timer| timer.id);
    timers
}

/// Asks for every timer; `posix` comes from [`parse_timers`].
pub fn ask(posix: Vec<PosixTimer>, batch: &mut Batch) -> Asked {
    let intervals = [0i32, 1, 2].map(|which| {
        let out = batch.output(32);
        batch.call(libc::SYS_getitimer, [which.into(), out.into()], "reading an interval timer");
        out
    });
    let posix = posix
        .into_iter()
        .map(|timer| {
            let out = batch.output(32);
            batch.call(libc::SYS_timer_gettime, [timer.id.into(), out.into()], "reading a POSIX timer");
            let overrun = batch.attempt(libc::SYS_timer_getoverrun, [timer.id.into()]);
            (timer, out, overrun)
        })
        .collect();
    Asked { intervals, posix }
}

fn words(bytes: &[u8]) -> TimerWords {
    std::array::from_fn(|i| bytes[i * 8..].first_chunk().map_or(0, |word| u64::from_ne_bytes(*word)))
}

/// The answers.
pub fn capture(asked: Asked, results: &Results) -> TimersState {
    let posix = asked.posix.into_iter().map(|(timer, out, overrun)| PosixTimer {
        setting: words(results.output(out)),
        overrun: results.get(overrun).max(0),
        ..timer
    });
    TimersState { intervals: asked.intervals.map(|out| words(results.output(out))), posix: posix.collect() }
}

/// Timers that one batch takes care of at most.
const MANY: usize = 1000;
/// Bytes of a batch that asks for a timer.
pub const QUESTION: usize = 256;

/// How many POSIX timers a process has, by the entries that are reserved for the signals of its user (`SigQ` of its status):
/// nearly nobody has so many that it would be worth asking.
pub fn count(process: HostPid, status: &Status) -> usize {
    const FEW: usize = 100;
    let queued = status.field("SigQ").and_then(|queued| queued.split('/').next()?.parse::<usize>().ok());
    match queued {
        Some(0..=FEW) => 0,
        _ => procfs::read_text(process.proc("timers")).map_or(0, |text| text.matches("ID:").count()),
    }
}

/// Makes the POSIX timers, unarmed, with the ids that they had.
pub fn create(state: &TimersState) -> impl Iterator<Item = Batch> {
    let can_choose = *CAN_CHOOSE.get_or_init(|| probe::timer_numbers().is_ok());
    let mut timers = state.posix.clone();
    timers.sort_by_key(|timer| timer.id);
    let mut next = 0;
    let batches: Vec<Batch> = timers
        .chunks(MANY)
        .map(|some| {
            let mut batch = Batch::new();
            if can_choose {
                create_some(some, &mut batch);
            } else {
                some.iter().for_each(|timer| create_in_turn(timer, &mut next, &mut batch));
            }
            batch
        })
        .collect();
    batches.into_iter()
}

/// Whether timers can be made under ids of our choice: since Linux 6.15.
static CAN_CHOOSE: OnceLock<bool> = OnceLock::new();

/// Makes a timer where the kernel gives ids one after the other, from 0 on: those in between are made and removed.
fn create_in_turn(timer: &PosixTimer, next: &mut i32, batch: &mut Batch) {
    // Whoever has got that far is refused when the timer is armed, which is another.
    const MOST_SKIPPED: i32 = 2000;
    while *next < timer.id && timer.id - *next <= MOST_SKIPPED {
        let mut event = [0u8; 64];
        event[12..16].copy_from_slice(&libc::SIGEV_NONE.to_ne_bytes());
        let (event, id) = (batch.bytes(&event), batch.output(4));
        let args = [libc::CLOCK_MONOTONIC.into(), event, id.into()];
        batch.call(libc::SYS_timer_create, args, format!("making a timer below {}", timer.id));
        batch.call(libc::SYS_timer_delete, [(*next).into()], format!("removing a timer below {}", timer.id));
        *next += 1;
    }
    create_one(timer, batch);
    *next = timer.id.saturating_add(1);
}

fn create_one(timer: &PosixTimer, batch: &mut Batch) {
    let mut event = [0u8; 64];
    event[..8].copy_from_slice(&timer.value.to_ne_bytes());
    event[8..12].copy_from_slice(&timer.signal.to_ne_bytes());
    event[12..16].copy_from_slice(&timer.notify.to_ne_bytes());
    event[16..20].copy_from_slice(&timer.thread.to_ne_bytes());
    let (event, id) = (batch.bytes(&event), batch.bytes(&timer.id.to_ne_bytes()));
    let what = format!("making POSIX timer {}", timer.id);
    batch.call(libc::SYS_timer_create, [timer.clock.into(), event, id], what);
}

fn create_some(timers: &[PosixTimer], batch: &mut Batch) {
    const PR_TIMER_CREATE_RESTORE_IDS: i32 = 77;
    batch.call(
        libc::SYS_prctl,
        [PR_TIMER_CREATE_RESTORE_IDS.into(), 1i32.into()],
        "asking for timer ids of our choice",
    );
    timers.iter().for_each(|timer| create_one(timer, batch));
    batch.call(libc::SYS_prctl, [PR_TIMER_CREATE_RESTORE_IDS.into(), 0i32.into()], "leaving timer ids to the kernel");
}

/// Arms what was armed: the last thing before the process is let go.
pub fn arm(state: &TimersState) -> impl Iterator<Item = Batch> {
    let mut intervals = Batch::new();
    arm_intervals(state, &mut intervals);
    let posix = state.posix.chunks(MANY).map(|some| {
        let mut batch = Batch::new();
        arm_some(some, &mut batch);
        batch
    });
    std::iter::once(intervals).chain(posix)
}

fn put(batch: &mut Batch, setting: &TimerWords) -> Arg {
    let bytes: Vec<u8> = setting.iter().flat_map(|word| word.to_ne_bytes()).collect();
    batch.bytes(&bytes)
}

fn arm_intervals(state: &TimersState, batch: &mut Batch) {
    for (which, setting) in state.intervals.iter().enumerate().filter(|(_, setting)| **setting != [0; 4]) {
        let mut setting = *setting;
        if which != 0 {
            setting = without_tick(setting);
        }
        if setting[2..] == [0, 0] {
            // It has expired, and the kernel sets it again once its signal, which is pending, is taken.
            setting[3] = 1;
        }
        let setting = put(batch, &setting);
        batch.call(libc::SYS_setitimer, [which.into(), setting, 0u64.into()], "arming an interval timer");
    }
}

fn arm_some(timers: &[PosixTimer], batch: &mut Batch) {
    for timer in timers.iter().filter(|timer| timer.setting[2..] != [0, 0]) {
        let setting = put(batch, &timer.setting);
        let args = [timer.id.into(), 0u64.into(), setting, 0u64.into()];
        batch.call(libc::SYS_timer_settime, args, format!("arming POSIX timer {}", timer.id));
    }
}

/// The kernel adds a tick to whatever a timer of CPU time is set to, so that it never expires early; what was read has it
/// already.
fn without_tick(setting: TimerWords) -> TimerWords {
    let tick = nix::time::clock_getres(nix::time::ClockId::CLOCK_MONOTONIC_COARSE);
    let tick = tick.map_or(0, |tick| tick.tv_nsec() as u64 / 1000);
    let left = setting[2] * 1_000_000 + setting[3];
    let left = if left > tick { left - tick } else { left };
    [setting[0], setting[1], left / 1_000_000, left % 1_000_000]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tick_is_taken_off_once() {
        let [_, _, seconds, micros] = without_tick([0, 0, 5, 0]);
        assert!((4_980_000..5_000_000).contains(&(seconds * 1_000_000 + micros)));
        assert_eq!(without_tick([1, 2, 0, 1]), [1, 2, 0, 1]);
    }

    #[test]
    fn proc_timers() {
        let text = "ID: 1\nsignal: 60/00007fff864e541c\nnotify: signal/pid.1634\nClockID: 0\nID: 0\nsignal: 60/00007fff864e540c\nnotify: signal/tid.1635\nClockID: 1\n";
        let timers = parse_timers(text);
        assert_eq!(timers.iter().map(|t| (t.id, t.clock)).collect::<Vec<_>>(), [(0, 1), (1, 0)]);
        assert_eq!((timers[0].signal, timers[0].value), (60, 0x7fff_864e_540c));
        assert_eq!((timers[0].notify, timers[0].thread), (libc::SIGEV_THREAD_ID, 1635));
    }
}
