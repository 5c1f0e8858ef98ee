//! Runs a program of [`harness::program`] with a tree of processes and their threads, and writes down what they see.
//!
//! `pod-program STEPS` (JSON). One thread of one process at a time does one step; the transcript is in memory that they share, and the
//! first process writes it out in the end.

mod bell;
mod board;
mod channel;
mod channels;
mod crew;
mod handler;
mod ipc;
mod listeners;
mod look;
mod masks;
mod memory;
mod mutexes;
mod notify;
mod raw;
mod traits;

use std::path::Path;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use board::Board;
use channel::Channel;
use crew::Thread;
use harness::program::{MEETING_POINT, Op, Step};
use listeners::{Caller, Listener};
use memory::Region;
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Pid, getpgid, getpid, setpgid, setsid};

/// What one process has.
struct Process {
    board: &'static Board,
    steps: &'static [Step],
    slot: usize,
    regions: Vec<Region>,
    channels: Vec<Channel>,
    listeners: Vec<Listener>,
    callers: Vec<Caller>,
    /// Its threads, the first one first.
    threads: Vec<Thread>,
    /// Which of them takes a step now.
    acting: usize,
    threads_born: usize,
    /// Whether there ever were more than one, here or where it was forked.
    had_threads: bool,
    /// To whom this turn may have brought signals.
    alarmed: Vec<usize>,
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let steps: Vec<Step> = match arguments.get(1).map(|text| serde_json::from_str(text)) {
        Some(Ok(steps)) => steps,
        other => {
            eprintln!("usage: pod-program STEPS: {other:?}");
            std::process::exit(2);
        }
    };
    let board = raw::share_board();
    raw::catch_signals();
    // Rust's own is too small to go on there.
    raw::alternate_stack(false);
    mutexes::share();
    let slot = board.new_slot().unwrap_or(0);
    board.begin(slot, getpid().as_raw());
    let mut process = Process {
        board,
        steps: Box::leak(steps.into_boxed_slice()),
        slot,
        regions: Vec::new(),
        channels: Vec::new(),
        listeners: Vec::new(),
        callers: Vec::new(),
        threads: vec![Thread::first()],
        acting: 0,
        threads_born: 1,
        had_threads: false,
        alarmed: Vec::new(),
    };
    process.run();
}

impl Process {
    /// Takes its steps; in a signal handler until it comes back from that.
    fn run(&mut self) {
        loop {
            let generation = self.board.generation();
            if let Some(question) = self.board.question(self.slot) {
                self.call_roll();
                self.board.answer(self.slot, question);
            }
            if self.slot == 0 && self.board.see_off() {
                // Children may have been told.
                self.alarmed = self.board.living();
                self.end_turn();
            }
            if !self.board.is_turn_of(self.slot) {
                self.board.wait(generation);
                continue;
            }
            let now = self.board.step();
            let Some(step) = self.steps.get(now) else { return self.write_transcript() };
            if matches!(step.op, Op::Fork) {
                self.call_roll();
            }
            self.acting = self.chosen(step);
            self.board.take(self.slot, &step.op, self.acting > 0);
            match step.op {
                _ if self.acting > 0 => {
                    let said = self.hand_over(now);
                    self.say(now, &said);
                    self.strike_off();
                }
                Op::Handler if self.thread().in_handler => return,
                Op::Handler => {
                    handler::run_within(&mut || {
                        self.thread_mut().in_handler = true;
                        self.say(now, "goes on within");
                        self.run();
                    });
                    self.come_back();
                }
                // A child that was just born has no turn to end.
                _ => {
                    if let Some(said) = self.perform(now, &step.op) {
                        self.say(now, &said);
                    }
                }
            }
        }
    }

    /// Notes what came of a step, and ends the turn.
    fn say(&mut self, now: usize, said: &str) {
        self.board.note(&format!("{now} {} {:?}: {said}", self.acting_name(), self.steps[now].op));
        self.end_turn();
    }

    /// Says that it has come back from a handler: with what is blocked as it was before.
    fn come_back(&mut self) {
        self.thread_mut().in_handler = false;
        self.say(self.board.step(), "comes back");
    }

    /// The next one shall find things as in any other run: signals that have come are where they belong, and handlers are over.
    fn end_turn(&mut self) {
        let alarmed = std::mem::take(&mut self.alarmed);
        alarmed.iter().for_each(|slot| self.board.await_delivery(*slot));
        for slot in alarmed {
            if slot == self.slot { self.call_roll() } else { self.board.ask(slot) }
        }
        self.board.advance(self.steps);
    }

    fn write_transcript(&self) {
        let fresh = format!("{MEETING_POINT}/unfinished");
        let written = std::fs::write(&fresh, self.board.transcript())
            .and_then(|()| std::fs::rename(&fresh, format!("{MEETING_POINT}/transcript")));
        std::process::exit(if written.is_ok() { 0 } else { 1 });
    }

    fn perform(&mut self, now: usize, op: &Op) -> Option<String> {
        match op {
            Op::Fork => self.fork(),
            _ => Some(self.perform_alone(now, op)),
        }
    }

    fn perform_alone(&mut self, now: usize, op: &Op) -> String {
        match op {
            Op::Exit(_) if self.slot == 0 => "never".into(),
            Op::Exit(code) => {
                self.board.note(&format!("{now} {} exit", self.acting_name()));
                self.board.leave(self.slot);
                raw::exit(i32::from(*code))
            }
            Op::Wait => {
                let (pid, status) = raw::bury();
                if pid > 0 { format!("{} {status:x}", self.board.name(pid)) } else { pid.to_string() }
            }
            Op::Sleep(milliseconds) => sleep(Duration::from_millis(u64::from(*milliseconds))),
            Op::Look => self.look(now),
            Op::Pause => self.pause(now),
            Op::Map { .. }
            | Op::MapFile { .. }
            | Op::Segment(_)
            | Op::Store { .. }
            | Op::Protect { .. }
            | Op::Resize { .. }
            | Op::Move(_)
            | Op::Advise { .. }
            | Op::Unmap(_) => self.memory(op),
            Op::RemoveObject(_) | Op::Semaphore { .. } | Op::Message { .. } | Op::Receive(_) => ipc::perform(op),
            Op::Stop(to) => self.stop(*to),
            Op::Continue(to) => self.go_on(*to),
            // It would share the directories of this one, and of no other.
            Op::Thread(_) if crew::wanders() => "elsewhere".into(),
            Op::Thread(number) => self.start_thread(&format!("thread {number}")),
            Op::Leave | Op::Await(_) => "never".into(),
            Op::Ring(which) => self.ring(*which),
            Op::Direct { to, thread, signal } => self.direct(now, *to, *thread, *signal),
            Op::Alarm(number) => {
                self.alarmed.push(self.slot);
                raw::alarm(*number)
            }
            Op::User(_) | Op::Tune { .. } => traits::perform(op, self.slot),
            Op::Block(signal) => self.mask(libc::SIG_BLOCK, *signal),
            Op::Unblock(signal) => self.mask(libc::SIG_UNBLOCK, *signal),
            Op::Send { to, signal } => {
                let living = self.board.living();
                let slot = living[usize::from(*to) % living.len()];
                let to = self.board.pid(slot);
                self.board.senders[now].store(getpid().as_raw(), SeqCst);
                let signal = raw::SIGNALS[usize::from(*signal) % raw::SIGNALS.len()];
                let sent = raw::send(to, signal, now as i32);
                self.alarmed.push(slot);
                format!("to {} {sent}", self.board.name(to))
            }
            Op::Umask(mask) => format!("{:o}", umask(Mode::from_bits_truncate(u32::from(*mask))).bits()),
            Op::Chdir(which) => {
                if *which >= 128 {
                    crew::wander();
                }
                // A directory of a process that ended cannot be had again; the first one never ends. A thread alone is kept in none.
                let of_process = match crew::wanders() {
                    true => "/tmp",
                    false if self.slot == 0 => "/proc/self",
                    false => "/proc/sys",
                };
                let directory = ["/", "/tmp", "/usr", of_process][usize::from(*which) % 4];
                format!("{:?}", nix::unistd::chdir(directory))
            }
            Op::Session => format!("{:?}", setsid().map(|id| self.board.name(id.as_raw()))),
            Op::Group => format!("{:?}", setpgid(Pid::from_raw(0), Pid::from_raw(0))),
            Op::Join(to) => {
                let living = self.board.living();
                let to = Pid::from_raw(self.board.pid(living[usize::from(*to) % living.len()]));
                let joined = getpgid(Some(to)).and_then(|group| setpgid(Pid::from_raw(0), group));
                format!("{} {joined:?}", self.board.name(to.as_raw()))
            }
            Op::Limit(number) => traits::limit(*number),
            Op::Name(number) => {
                let name = std::ffi::CString::new(format!("name {number}) R")).unwrap_or_default();
                format!("{:?}", nix::sys::prctl::set_name(&name))
            }
            Op::Listen { .. } | Op::Connect(_) | Op::Accept(_) => self.listening(op),
            Op::Mutex(which) => self.mutex(usize::from(*which)),
            _ => self.channel(now, op),
        }
    }

    fn fork(&mut self) -> Option<String> {
        let Some(slot) = self.board.new_slot() else { return Some("no room".into()) };
        match raw::fork() {
            0 => {
                self.slot = slot;
                self.be_alone();
                self.board.set_begun(slot);
                None
            }
            pid if pid > 0 => {
                self.thread_mut().has_forked = true;
                self.board.begin(slot, pid);
                // A signal that is sent to it next finds it as it will be.
                self.board.await_beginning(slot);
                Some(format!("p{slot}"))
            }
            _ => Some("failed".into()),
        }
    }

    fn pause(&self, now: usize) -> String {
        // What a link says is there at once. A file would be open for a moment, and might be at a checkpoint: a copy has another
        // meeting point.
        let told = std::os::unix::fs::symlink(self.board.taken(), format!("{MEETING_POINT}/at-{now}"));
        let go = format!("{MEETING_POINT}/go-{now}");
        while !Path::new(&go).exists() {
            std::thread::sleep(Duration::from_millis(1));
        }
        format!("{told:?}")
    }

    /// Stops another process, and waits until it stands still.
    fn stop(&self, to: u8) -> String {
        let awake = self.board.awake();
        let slot = awake[usize::from(to) % awake.len()];
        if slot == 0 || slot == self.slot {
            return "nobody".into();
        }
        let stopped = raw::kill(self.board.pid(slot), libc::SIGSTOP);
        if stopped == 0 {
            self.board.set_stopped(slot, true);
        }
        format!("p{slot} {stopped}")
    }

    fn go_on(&mut self, to: u8) -> String {
        let stopped = self.board.stopped();
        if stopped.is_empty() {
            return "nobody".into();
        }
        let slot = stopped[usize::from(to) % stopped.len()];
        let done = raw::kill(self.board.pid(slot), libc::SIGCONT);
        if done == 0 {
            self.board.set_stopped(slot, false);
            self.alarmed.push(slot);
        }
        format!("p{slot} {done}")
    }

    fn mask(&self, how: i32, signal: u8) -> String {
        raw::mask(how, raw::BLOCKABLE[usize::from(signal) % raw::BLOCKABLE.len()]);
        String::new()
    }
}

/// nanosleep(2), which nothing but a signal ends early.
fn sleep(length: Duration) -> String {
    let begun = std::time::Instant::now();
    std::thread::sleep(length);
    format!("long enough: {}", begun.elapsed() >= length)
}

fn pattern(seed: usize, bytes: usize) -> Vec<u8> {
    (0..bytes).map(|i| (seed * 31 + i * 7 + i / 256) as u8 | 1).collect()
}
