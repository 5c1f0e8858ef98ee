//! What all processes know: whose turn it is, who lives, and what was seen so far.

use std::sync::atomic::{AtomicI32, AtomicU8, AtomicU32, AtomicU64, Ordering::SeqCst};

use harness::program::{Op, Step};

use super::{masks, raw};

const NOBODY: u32 = u32::MAX;

/// A process on the board.
pub(crate) struct Slot {
    pid: AtomicI32,
    lives: AtomicU32,
    stopped: AtomicU32,
    /// Whether it knows itself.
    begun: AtomicU32,
    /// How often it was asked whether it is back from its handlers, and how often it has said so.
    asked: AtomicU32,
    answered: AtomicU32,
    /// Which kinds of steps it has taken, by their places in [`Op::kinds`]: bits, by its first thread, by another.
    taken: [AtomicU8; 128],
    /// Its threads by number, 0 for one that does not live.
    threads: [AtomicI32; THREADS],
}

/// How many threads a process has in its life, at most.
pub(crate) const THREADS: usize = 6;

/// In memory that all processes share. Only the process whose turn it is writes.
pub(crate) struct Board {
    /// Changes whenever there may be something to do for somebody.
    generation: AtomicU32,
    step: AtomicU32,
    /// The process whose turn it is; none while that is being settled.
    turn: AtomicU32,
    /// A process that is ending.
    leaving: AtomicI32,
    slots: [Slot; 32],
    slot_count: AtomicU32,
    /// How much is in each channel.
    pub(crate) contents: [AtomicU32; 256],
    /// Whether somebody mapped it.
    pub(crate) mapped: [AtomicU32; 256],
    channel_count: AtomicU32,
    region_count: AtomicU32,
    /// Who sent the signal of a step.
    pub(crate) senders: [AtomicI32; 1024],
    /// Nanoseconds of the monotonic clock that somebody saw last.
    clock: AtomicU64,
    length: AtomicU32,
    text: [AtomicU8; 1 << 20],
}

impl Board {
    pub(crate) fn step(&self) -> usize {
        self.step.load(SeqCst) as usize
    }

    /// A number that changes when there may be something to do.
    pub(crate) fn generation(&self) -> u32 {
        self.generation.load(SeqCst)
    }

    pub(crate) fn wait(&self, generation: u32) {
        raw::futex_wait(&self.generation, generation);
    }

    fn wake(&self) {
        self.generation.fetch_add(1, SeqCst);
        raw::futex_wake(&self.generation);
    }

    /// Whether it is the turn of the process of `slot`.
    pub(crate) fn is_turn_of(&self, slot: usize) -> bool {
        self.turn.load(SeqCst) == slot as u32
    }

    /// The turn is over, and who has the next one follows from who lives now.
    pub(crate) fn advance(&self, steps: &[Step]) {
        self.turn.store(NOBODY, SeqCst);
        self.step.fetch_add(1, SeqCst);
        let awake = self.awake();
        let next = match steps.get(self.step()) {
            None | Some(Step { op: Op::Pause, .. }) => 0,
            Some(step) => awake[usize::from(step.who) % awake.len()],
        };
        self.turn.store(next as u32, SeqCst);
        self.wake();
    }

    /// A place for a process, if there is one left.
    pub(crate) fn new_slot(&self) -> Option<usize> {
        let number = self.slot_count.load(SeqCst) as usize;
        (number < self.slots.len()).then(|| self.slot_count.fetch_add(1, SeqCst) as usize)
    }

    pub(crate) fn begin(&self, slot: usize, pid: i32) {
        self.slots[slot].pid.store(pid, SeqCst);
        self.set_thread(slot, 0, pid);
        self.slots[slot].lives.store(1, SeqCst);
    }

    /// Waits until a child that was just born has begun.
    pub(crate) fn await_beginning(&self, slot: usize) {
        while self.slots[slot].begun.load(SeqCst) == 0 {
            std::thread::sleep(std::time::Duration::from_micros(50));
        }
    }

    /// A child has begun.
    pub(crate) fn set_begun(&self, slot: usize) {
        self.slots[slot].begun.store(1, SeqCst);
    }

    /// A thread lives from now on, or, with 0, no longer.
    pub(crate) fn set_thread(&self, slot: usize, number: usize, id: i32) {
        self.slots[slot].threads[number].store(id, SeqCst);
    }

    /// Numbers and IDs of a process's living threads.
    pub(crate) fn threads(&self, slot: usize) -> Vec<(usize, i32)> {
        let threads = self.slots[slot].threads.iter().map(|id| id.load(SeqCst)).enumerate();
        threads.filter(|(_, id)| *id != 0).collect()
    }

    pub(crate) fn pid(&self, slot: usize) -> i32 {
        self.slots[slot].pid.load(SeqCst)
    }

    /// Notes that a process takes a step, by its first thread or another.
    pub(crate) fn take(&self, slot: usize, op: &Op, by_another: bool) {
        let kind = op.kind();
        if let Some(at) = Op::kinds().iter().position(|known| *known == kind) {
            self.slots[slot].taken[at].fetch_or(1 << u8::from(by_another), SeqCst);
        }
    }

    /// The kinds of steps that those who live have taken, for [`Op::kinds_in`].
    pub(crate) fn taken(&self) -> String {
        let living = self.living();
        let alive = |at: usize, bit: u8| living.iter().any(|slot| self.slots[*slot].taken[at].load(SeqCst) & bit != 0);
        let of = |bits: u8, mark: &'static str| {
            let taken = (0..Op::kinds().len()).filter(move |at| alive(*at, bits));
            taken.map(move |at| format!(" {at}{mark}")).collect::<String>()
        };
        format!("taken{}{}", of(1 | 2, ""), of(2, "+"))
    }

    /// Living processes, in the order of their birth.
    pub(crate) fn living(&self) -> Vec<usize> {
        (0..self.slots.len()).filter(|slot| self.slots[*slot].lives.load(SeqCst) == 1).collect()
    }

    /// Living processes that have their turns.
    pub(crate) fn awake(&self) -> Vec<usize> {
        self.living().into_iter().filter(|slot| self.slots[*slot].stopped.load(SeqCst) == 0).collect()
    }

    /// Living processes that were stopped.
    pub(crate) fn stopped(&self) -> Vec<usize> {
        self.living().into_iter().filter(|slot| self.slots[*slot].stopped.load(SeqCst) == 1).collect()
    }

    /// Waits until a process that was told to stop or go on has done so.
    pub(crate) fn set_stopped(&self, slot: usize, stopped: bool) {
        self.slots[slot].stopped.store(u32::from(stopped), SeqCst);
        while threads_of(self.pid(slot)).into_iter().any(|state| (state == 'T') != stopped) {
            std::thread::sleep(std::time::Duration::from_micros(200));
        }
    }

    /// Waits until signals that have come are on their way into a handler, or are bound to wait.
    pub(crate) fn await_delivery(&self, slot: usize) {
        let signals = raw::BLOCKABLE.iter().fold(0, |all, signal| all | 1u64 << (signal - 1));
        let waits = |task: &std::path::Path| {
            let status = masks::shown(task.join("status"));
            let set = |name: &str| {
                let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
                u64::from_str_radix(line.trim(), 16).unwrap_or(0)
            };
            let stands = ['T', 'Z', 'X'].into_iter().any(|state| status.contains(&format!("State:\t{state}")));
            (set("ShdPnd:") | set("SigPnd:")) & !set("SigBlk:") & signals != 0 && !stands
        };
        while tasks(self.pid(slot)).iter().any(|task| waits(task)) {
            std::thread::sleep(std::time::Duration::from_micros(200));
        }
    }

    /// Asks a process whether its threads are back from handlers that they were in, and waits for the answer, unless it is stopped.
    pub(crate) fn ask(&self, slot: usize) {
        let Slot { asked, answered, .. } = &self.slots[slot];
        let number = asked.fetch_add(1, SeqCst) + 1;
        self.wake();
        while answered.load(SeqCst) != number && state_of(self.pid(slot)) != Some('T') {
            std::thread::sleep(std::time::Duration::from_micros(50));
        }
    }

    /// The number of what the process of `slot` was asked and has not answered.
    pub(crate) fn question(&self, slot: usize) -> Option<u32> {
        let Slot { asked, answered, .. } = &self.slots[slot];
        let number = asked.load(SeqCst);
        (answered.load(SeqCst) != number).then_some(number)
    }

    /// Answers it.
    pub(crate) fn answer(&self, slot: usize, question: u32) {
        self.slots[slot].answered.store(question, SeqCst);
    }

    /// Living processes that the kernel shows as stopped.
    pub(crate) fn seen_stopped(&self) -> Vec<usize> {
        self.living().into_iter().filter(|slot| state_of(self.pid(*slot)) == Some('T')).collect()
    }

    /// The process of `slot` is about to end. The first process sees to it that the turn ends when it has.
    pub(crate) fn leave(&self, slot: usize) {
        self.turn.store(NOBODY, SeqCst);
        self.slots[slot].lives.store(0, SeqCst);
        self.leaving.store(self.pid(slot), SeqCst);
        self.wake();
    }

    /// Whether a process was ending; it has ended then.
    pub(crate) fn see_off(&self) -> bool {
        let pid = self.leaving.load(SeqCst);
        if pid == 0 {
            return false;
        }
        // While other threads of it are ending, nobody can bury it.
        let alive = || state_of(pid).is_some_and(|state| state != 'Z' || threads_of(pid).len() > 1);
        while alive() || self.is_anyone_to_be_buried() {
            std::thread::sleep(std::time::Duration::from_micros(200));
        }
        self.leaving.store(0, SeqCst);
        true
    }

    /// Whether PID 1 has not come yet to bury some of those whose parents have ended: they count as of their groups.
    fn is_anyone_to_be_buried(&self) -> bool {
        let count = self.slot_count.load(SeqCst) as usize;
        (0..count).any(|slot| {
            let stat = masks::shown(format!("/proc/{}/stat", self.pid(slot)));
            stat.rsplit(')').next().is_some_and(|rest| rest.starts_with(" Z 1 "))
        })
    }

    /// A name for a PID that is the same in every run.
    pub(crate) fn name(&self, pid: i32) -> String {
        let count = self.slot_count.load(SeqCst) as usize;
        match (0..count).rev().find(|slot| self.pid(*slot) == pid) {
            Some(slot) => format!("p{slot}"),
            None => pid.to_string(),
        }
    }

    pub(crate) fn new_channel(&self) -> Option<usize> {
        let number = self.channel_count.fetch_add(1, SeqCst) as usize;
        (number < self.contents.len()).then_some(number)
    }

    pub(crate) fn new_region(&self) -> usize {
        self.region_count.fetch_add(1, SeqCst) as usize
    }

    /// Whether the monotonic clock is where it was, or later.
    pub(crate) fn time_goes_on(&self) -> bool {
        let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
        let now = now.map_or(0, |t| t.tv_sec() as u64 * 1_000_000_000 + t.tv_nsec() as u64);
        self.clock.swap(now, SeqCst) <= now
    }

    /// Adds a line to the transcript.
    pub(crate) fn note(&self, line: &str) {
        for byte in line.bytes().chain([b'\n']) {
            let at = self.length.fetch_add(1, SeqCst) as usize;
            self.text[at % self.text.len()].store(byte, SeqCst);
        }
    }

    pub(crate) fn transcript(&self) -> Vec<u8> {
        let length = (self.length.load(SeqCst) as usize).min(self.text.len());
        self.text[..length].iter().map(|byte| byte.load(SeqCst)).collect()
    }
}

/// The state of a process as the kernel shows it.
fn state_of(pid: i32) -> Option<char> {
    state_of_task(format!("/proc/{pid}/stat").as_ref())
}

/// The state of a thread as its `stat` shows it.
pub(crate) fn state_of_task(stat: &std::path::Path) -> Option<char> {
    let stat = std::fs::read_to_string(stat).ok()?;
    stat.rsplit(')').next()?.trim().chars().next()
}

/// Where its threads are shown.
fn tasks(pid: i32) -> Vec<std::path::PathBuf> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    tasks.map(|task| task.path()).collect()
}

/// The states of its threads.
fn threads_of(pid: i32) -> Vec<char> {
    tasks(pid).iter().filter_map(|task| state_of_task(&task.join("stat"))).collect()
}
