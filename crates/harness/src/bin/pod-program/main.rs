//! Runs a program of [`harness::program`] with a tree of processes, and writes down what they see.
//!
//! `pod-program STEPS` (JSON). One process at a time does one step; the transcript is in memory that they share, and the
//! first process writes it out in the end.

mod board;
mod channel;
mod raw;

use std::net::TcpListener;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use board::Board;
use channel::{Channel, hash};
use harness::program::{Kind, MEETING_POINT, Op, Step};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Pid, getpgrp, getpid, getppid, getsid, setpgid, setsid};

const PAGE: usize = 4096;

/// What one process has.
struct Process {
    board: &'static Board,
    slot: usize,
    regions: Vec<Region>,
    channels: Vec<Channel>,
    listeners: Vec<TcpListener>,
}

#[derive(Clone, Copy)]
struct Region {
    number: usize,
    bytes: usize,
}

impl Region {
    fn address(&self) -> usize {
        0x2000_0000_0000 + self.number * 0x100_0000
    }

    /// Its protection as the kernel shows it.
    fn protection(&self) -> String {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
        let found = maps.lines().find(|line| {
            let bounds = line.split(' ').next().and_then(|range| range.split_once('-'));
            let parse = |text: &str| usize::from_str_radix(text, 16).unwrap_or(0);
            bounds.is_some_and(|(from, to)| (parse(from)..parse(to)).contains(&self.address()))
        });
        found.and_then(|line| line.split(' ').nth(1)).unwrap_or("gone").to_owned()
    }
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
    let slot = board.new_slot().unwrap_or(0);
    board.begin(slot, getpid().as_raw());
    let process = Process { board, slot, regions: Vec::new(), channels: Vec::new(), listeners: Vec::new() };
    process.run(&steps);
}

impl Process {
    fn run(mut self, steps: &[Step]) {
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
            // A child that was just born has no turn to end.
            if let Some(said) = self.perform(now, &step.op) {
                self.board.note(&format!("{now} p{} {:?}: {said}", self.slot, step.op));
                self.board.advance(steps);
            }
        }
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
            Op::Look => self.look(),
            Op::Pause => self.pause(now),
            Op::Map { .. } | Op::Segment(_) | Op::Store { .. } | Op::Protect { .. } | Op::Unmap(_) => self.memory(op),
            Op::Block(signal) => self.mask(libc::SIG_BLOCK, *signal),
            Op::Unblock(signal) => self.mask(libc::SIG_UNBLOCK, *signal),
            Op::Send { to, signal } => {
                let living = self.board.living();
                let to = self.board.pid(living[usize::from(*to) % living.len()]);
                self.board.senders[now].store(getpid().as_raw(), SeqCst);
                let sent = raw::send(to, raw::SIGNALS[usize::from(*signal) % raw::SIGNALS.len()], now as i32);
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
            Op::Limit(number) => {
                let hard = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(_, hard)| hard);
                format!("{:?}", setrlimit(Resource::RLIMIT_NOFILE, 600 + u64::from(*number), hard))
            }
            Op::Name(number) => {
                let name = std::ffi::CString::new(format!("name {number}) R")).unwrap_or_default();
                format!("{:?}", nix::sys::prctl::set_name(&name))
            }
            Op::Listen(port) => match TcpListener::bind(("0.0.0.0", *port)) {
                Ok(listener) => {
                    self.listeners.push(listener);
                    "ok".into()
                }
                Err(error) => format!("{:?}", error.kind()),
            },
            _ => self.channel(now, op),
        }
    }

    fn fork(&mut self) -> Option<String> {
        let Some(slot) = self.board.new_slot() else { return Some("no room".into()) };
        match raw::fork() {
            0 => {
                self.slot = slot;
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
        let told = std::fs::write(format!("{MEETING_POINT}/at-{now}"), "");
        let go = format!("{MEETING_POINT}/go-{now}");
        while !Path::new(&go).exists() {
            std::thread::sleep(Duration::from_millis(1));
        }
        format!("{told:?}")
    }

    fn mask(&self, how: i32, signal: u8) -> String {
        raw::mask(how, raw::SIGNALS[usize::from(signal) % raw::SIGNALS.len()]);
        String::new()
    }

    fn memory(&mut self, op: &Op) -> String {
        match op {
            Op::Map { shared, pages } => {
                let region = Region { number: self.board.new_region(), bytes: PAGE * usize::from(*pages).max(1) };
                let mapped = raw::map(region.address(), region.bytes, *shared);
                self.regions.push(region);
                return mapped.to_string();
            }
            Op::Segment(key) => {
                let region = Region { number: self.board.new_region(), bytes: PAGE };
                let id = raw::segment(1000 + i32::from(*key), region.address(), region.bytes);
                self.regions.push(region);
                return id.to_string();
            }
            _ => {}
        }
        let (Op::Store { region: which, .. } | Op::Protect { region: which, .. } | Op::Unmap(which)) = op else {
            return "no such thing".into();
        };
        if self.regions.is_empty() {
            return "nothing mapped".into();
        }
        let which = usize::from(*which) % self.regions.len();
        let region = self.regions[which];
        match op {
            Op::Store { page, seed, .. } if region.protection().starts_with("rw") => {
                let pages = region.bytes / PAGE;
                let at = region.address() + usize::from(*page) % pages * PAGE + usize::from(*seed);
                raw::fill(at, &pattern(usize::from(*seed) + self.slot, 1 + PAGE / 3));
                format!("in {}", region.number)
            }
            Op::Protect { protection, .. } => {
                raw::protect(region.address(), region.bytes, i32::from(*protection & 7)).to_string()
            }
            Op::Unmap(_) => {
                self.regions.remove(which);
                raw::unmap(region.address(), region.bytes).to_string()
            }
            _ => "not writable".into(),
        }
    }

    fn channel(&mut self, now: usize, op: &Op) -> String {
        if let Op::Open(kind) = op {
            let Some(number) = self.board.new_channel() else { return "no room".into() };
            return match Channel::open(number, *kind) {
                Ok(channel) => {
                    self.channels.push(channel);
                    number.to_string()
                }
                Err(error) => error.to_string(),
            };
        }
        let (Op::Put { channel: which, .. }
        | Op::Take { channel: which, .. }
        | Op::Seek { channel: which, .. }
        | Op::Unlink(which)
        | Op::Lock(which)
        | Op::Close(which)) = op
        else {
            return "no such thing".into();
        };
        if self.channels.is_empty() {
            return "nothing open".into();
        }
        let which = usize::from(*which) % self.channels.len();
        let channel = &self.channels[which];
        match op {
            Op::Put { bytes, .. } => self.put(now, channel, usize::from(*bytes)),
            Op::Take { bytes, .. } => self.take(channel, usize::from(*bytes)),
            Op::Seek { offset, .. } if channel.is_file() => {
                let whence = nix::unistd::Whence::SeekSet;
                format!("{:?}", nix::unistd::lseek(channel.reader(), i64::from(*offset), whence))
            }
            Op::Unlink(_) if channel.is_file() => format!("{:?}", nix::unistd::unlink(channel.path().as_str())),
            Op::Lock(_) if channel.is_file() => {
                #[allow(deprecated, reason = "its replacement wants to own the descriptor")]
                let locked =
                    nix::fcntl::flock(channel.reader().as_raw_fd(), nix::fcntl::FlockArg::LockExclusiveNonblock);
                format!("{locked:?}")
            }
            Op::Close(_) => {
                self.channels.remove(which);
                "closed".into()
            }
            _ => "not a file".into(),
        }
    }

    fn put(&self, now: usize, channel: &Channel, bytes: usize) -> String {
        let contents = &self.board.contents[channel.number];
        let inside = contents.load(SeqCst) as usize;
        match channel.kind {
            Kind::Event => {
                let put = channel.put(&(bytes as u64).to_ne_bytes());
                return format!("{put:?}");
            }
            Kind::File | Kind::Append => {}
            _ if bytes == 0 || (channel.has_messages() && inside > 5) || inside + bytes > 30_000 => {
                return "full".into();
            }
            Kind::Packets | Kind::Udp => contents.store(inside as u32 + 1, SeqCst),
            _ => contents.store((inside + bytes) as u32, SeqCst),
        }
        format!("{} {:?}", channel.number, channel.put(&pattern(now, bytes)))
    }

    fn take(&self, channel: &Channel, bytes: usize) -> String {
        let contents = &self.board.contents[channel.number];
        let inside = contents.load(SeqCst) as usize;
        let (length, left) = match channel.kind {
            Kind::Event => (8, 0),
            Kind::File | Kind::Append => (bytes, 0),
            Kind::Packets | Kind::Udp if inside > 0 => (1 << 16, inside - 1),
            _ if inside > 0 => (bytes.min(inside), inside - bytes.min(inside)),
            _ => return "empty".into(),
        };
        contents.store(left as u32, SeqCst);
        let taken = channel.take(length);
        format!("{} {:?}", channel.number, taken.map(|bytes| (bytes.len(), hash(&bytes))))
    }

    /// Everything that it can see of itself and that is the same in every run.
    fn look(&self) -> String {
        let name = |pid: Pid| self.board.name(pid.as_raw());
        let own = getpid().as_raw() == self.board.pid(self.slot);
        let session = getsid(None).map(name);
        let mask = umask(Mode::empty());
        umask(mask);
        let mut text = format!(
            "{} of {} in {} {session:?} umask {:o} cwd {:?} host {:?} time {}",
            if own { "itself" } else { "another" },
            name(getppid()),
            name(getpgrp()),
            mask.bits(),
            std::env::current_dir().map(|path| path.to_string_lossy().replace(&getpid().to_string(), "PID")).ok(),
            nix::unistd::gethostname(),
            self.board.time_goes_on(),
        );
        text += &format!(" limit {:?}", getrlimit(Resource::RLIMIT_NOFILE).map(|(soft, _)| soft));
        text += &format!(" comm {:?}", std::fs::read_to_string("/proc/self/comm").unwrap_or_default());
        text += &format!(" signals {:?} seen {:?}", raw::blocked_and_pending(), self.signals_seen());
        for region in &self.regions {
            let protection = region.protection();
            let readable = protection.starts_with('r');
            let sum = readable.then(|| hash(&raw::peek(region.address(), region.bytes)));
            text += &format!(" region {} {protection} {sum:x?}", region.number);
        }
        for channel in &self.channels {
            text += &format!(" {}", channel.describe());
        }
        for listener in &self.listeners {
            text += &format!(" {:?}", listener.local_addr().ok());
        }
        text
    }

    /// Signals that came: number, value, and whether they are from who sent them.
    fn signals_seen(&self) -> Vec<(i32, i32, bool)> {
        let count = raw::SEEN_COUNT.load(SeqCst) as usize;
        let entries = raw::SEEN.iter().take(count).map(|entry| [0, 1, 2].map(|i| entry[i].load(SeqCst)));
        let true_sender = |pid: i32, value: i32| {
            self.board.senders.get(value as usize).is_some_and(|sender| sender.load(SeqCst) == pid)
        };
        entries.map(|[signal, pid, value]| (signal, value, true_sender(pid, value))).collect()
    }
}

fn pattern(seed: usize, bytes: usize) -> Vec<u8> {
    (0..bytes).map(|i| (seed * 31 + i * 7 + i / 256) as u8 | 1).collect()
}
