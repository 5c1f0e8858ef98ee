//! Runs a program of [`harness::program`] with a tree of processes, and writes down what they see.
//!
//! `pod-program STEPS` (JSON). One process at a time does one step; the transcript is in memory that they share, and the
//! first process writes it out in the end.

mod board;
mod channel;
mod channels;
mod handler;
mod ipc;
mod listeners;
mod look;
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
use harness::program::{MEETING_POINT, Op, Step};
use listeners::{Caller, Listener};
use memory::Region;
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Pid, getpgid, getpid, setpgid, setsid};

/// What one process has.
struct Process {
    board: &'static Board,
    slot: usize,
    regions: Vec<Region>,
    channels: Vec<Channel>,
    listeners: Vec<Listener>,
    callers: Vec<Caller>,
    /// Mutexes that it has taken.
    mutexes: Vec<usize>,
    /// Whether it is in a signal handler.
    in_handler: bool,
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
        slot,
        regions: Vec::new(),
        channels: Vec::new(),
        listeners: Vec::new(),
        callers: Vec::new(),
        mutexes: Vec::new(),
        in_handler: false,
    };
    process.run(&steps);
}

impl Process {
    /// Takes its steps; in a signal handler until it comes back from that.
    fn run(&mut self, steps: &[Step]) {
        loop {
            let generation = self.board.generation();
            if self.slot == 0 {
                self.board.see_off(steps);
            }
            if !self.board.is_turn_of(self.slot) {
                self.board.wait(generation);
                continue;
            }
            let now = self.board.step();
            let Some(step) = steps.get(now) else { return self.write_transcript() };
            self.board.take(self.slot, &step.op);
            match step.op {
                Op::Handler if self.in_handler => {
                    self.say(steps, now, "comes back");
                    self.in_handler = false;
                    return;
                }
                Op::Handler => handler::run_within(&mut || {
                    self.in_handler = true;
                    self.say(steps, now, "goes on within");
                    self.run(steps);
                }),
                // A child that was just born has no turn to end.
                _ => {
                    if let Some(said) = self.perform(now, &step.op) {
                        self.say(steps, now, &said);
                    }
                }
            }
        }
    }

    /// Notes what came of a step, and ends the turn.
    fn say(&self, steps: &[Step], now: usize, said: &str) {
        self.board.note(&format!("{now} p{} {:?}: {said}", self.slot, steps[now].op));
        self.board.advance(steps);
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
                self.board.note(&format!("{now} p{} exit", self.slot));
                self.board.leave(self.slot);
                raw::exit(i32::from(*code))
            }
            Op::Wait => {
                let (pid, status) = raw::bury();
                if pid > 0 { format!("{} {status:x}", self.board.name(pid)) } else { pid.to_string() }
            }
            Op::Sleep(milliseconds) => sleep(Duration::from_millis(u64::from(*milliseconds))),
            Op::Look => self.look(),
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
            Op::Thread(number) => raw::park_thread(&format!("thread {number}")),
            Op::Alarm(_) | Op::User(_) | Op::Tune { .. } => traits::perform(op, self.slot),
            Op::Block(signal) => self.mask(libc::SIG_BLOCK, *signal),
            Op::Unblock(signal) => self.mask(libc::SIG_UNBLOCK, *signal),
            Op::Send { to, signal } => {
                let living = self.board.living();
                let to = self.board.pid(living[usize::from(*to) % living.len()]);
                self.board.senders[now].store(getpid().as_raw(), SeqCst);
                let signal = raw::SIGNALS[usize::from(*signal) % raw::SIGNALS.len()];
                let sent = raw::send(to, signal, now as i32);
                self.board.see_delivered(to, signal);
                format!("to {} {sent}", self.board.name(to))
            }
            Op::Umask(mask) => format!("{:o}", umask(Mode::from_bits_truncate(u32::from(*mask))).bits()),
            Op::Chdir(which) => {
                // A directory of a process that ended cannot be had again; the first one never ends.
                let of_process = if self.slot == 0 { "/proc/self" } else { "/proc/sys" };
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
                // A child has nothing of what its parent took.
                self.mutexes.clear();
                None
            }
            pid if pid > 0 => {
                self.board.begin(slot, pid);
                Some(format!("p{slot}"))
            }
            _ => Some("failed".into()),
        }
    }

    fn pause(&self, now: usize) -> String {
        let at = format!("{MEETING_POINT}/at-{now}");
        let told = std::fs::write(format!("{at}.new"), self.board.taken());
        let told = told.and_then(|()| std::fs::rename(format!("{at}.new"), at));
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

    fn go_on(&self, to: u8) -> String {
        let stopped = self.board.stopped();
        if stopped.is_empty() {
            return "nobody".into();
        }
        let slot = stopped[usize::from(to) % stopped.len()];
        let done = raw::kill(self.board.pid(slot), libc::SIGCONT);
        if done == 0 {
            self.board.set_stopped(slot, false);
        }
        format!("p{slot} {done}")
    }

    fn mask(&self, how: i32, signal: u8) -> String {
        raw::mask(how, raw::SIGNALS[usize::from(signal) % raw::SIGNALS.len()]);
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
