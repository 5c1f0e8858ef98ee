//! What a process can see of itself.

use std::sync::atomic::Ordering::SeqCst;

use nix::sys::stat::{Mode, umask};
use nix::unistd::{Pid, getpgrp, getpid, getppid, getsid};

use super::{Process, crew, masks, raw};

impl Process {
    /// Everything that it can see of itself and that is the same in every run; the first thread asks the others what they see.
    pub(super) fn look(&mut self, now: usize) -> String {
        if self.acting > 0 {
            return self.look_as_thread();
        }
        let others = self.ask_others(now);
        self.look_as_process() + &others
    }

    /// What is a thread's own.
    fn look_as_thread(&self) -> String {
        let is_itself = raw::thread_id() == self.thread().id;
        let in_handler = if self.thread().in_handler { " in a handler" } else { "" };
        let place = if crew::wanders() { format!(" {}", place()) } else { String::new() };
        format!(
            "{} comm {:?} signals {:?} {} mutexes {:?} time {}{in_handler}{place}",
            if is_itself { "itself" } else { "another" },
            masks::shown("/proc/thread-self/comm"),
            raw::blocked_and_pending(),
            super::traits::describe_thread(),
            self.thread().mutexes,
            self.board.time_goes_on(),
        )
    }

    fn look_as_process(&self) -> String {
        let name = |pid: Pid| self.board.name(pid.as_raw());
        let own = getpid().as_raw() == self.board.pid(self.slot);
        let session = getsid(None).map(name);
        let mut text = format!(
            "{} of {} in {} {session:?} {} host {:?} time {}",
            if own { "itself" } else { "another" },
            name(getppid()),
            name(getpgrp()),
            place(),
            nix::unistd::gethostname(),
            self.board.time_goes_on(),
        );
        text += &format!(" comm {:?}", masks::shown("/proc/self/comm"));
        text += &format!(" signals {:?} seen {:?}", raw::blocked_and_pending(), self.signals_seen());
        self.regions.iter().for_each(|region| text += &region.describe());
        for channel in &self.channels {
            text += &format!(" {}{}", channel.describe(), if self.is_ready(channel) { " ready" } else { "" });
        }
        if self.slot == 0 {
            text += &format!(" stopped {:?}", self.board.seen_stopped());
        }
        text += &format!(" {} {}", super::traits::describe(), super::ipc::describe());
        self.listeners.iter().for_each(|listener| text += &format!(" {}", listener.describe()));
        let in_handler = if self.thread().in_handler { " in a handler" } else { "" };
        text + in_handler
            + &format!(
                " mutexes {:?} waiting {} terminal {} files {}",
                self.thread().mutexes,
                self.waiting(),
                self.terminal(),
                files()
            )
    }

    /// Its terminal, and the group in front there.
    fn terminal(&self) -> String {
        let stat = masks::shown("/proc/self/stat");
        // after the name: state, parent, group, session, terminal, group in front
        let words: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let front = words.get(5).and_then(|word| word.parse().ok()).unwrap_or(0);
        format!("{} {}", words.get(4).unwrap_or(&""), self.board.name(front))
    }

    /// Signals that came: number, value, and whether they are from who sent them; of those for one thread, whether it was that.
    fn signals_seen(&self) -> Vec<(i32, i32, bool, bool)> {
        let count = raw::SEEN_COUNT.load(SeqCst) as usize;
        let entries = raw::SEEN.iter().take(count).map(|entry| [0, 1, 2, 3].map(|i| entry[i].load(SeqCst)));
        let seen = |[signal, pid, value, by]: [i32; 4]| {
            let (value, wanted) = (value % raw::DIRECTED, value / raw::DIRECTED);
            let true_sender = self.board.senders.get(value as usize).is_some_and(|sender| sender.load(SeqCst) == pid);
            (signal, value, true_sender, wanted == 0 || wanted - 1 == by)
        };
        let mut all: Vec<_> = entries.map(seen).collect();
        // Whichever thread is the first to get to it takes a signal that is for all.
        if self.had_threads {
            all.sort_unstable();
        }
        masks::one_death(&mut all, |seen| (seen.0, seen.1) == (raw::DEATH, 0));
        all
    }
}

/// Its descriptors, and to what they lead, without numbers that the kernel gives.
fn files() -> String {
    let entries = std::fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    let mut links: Vec<(u32, String)> = entries
        .filter_map(|entry| {
            let link = std::fs::read_link(entry.path()).ok()?.to_string_lossy().into_owned();
            let number = entry.file_name().to_str()?.parse().ok()?;
            // the directory itself, that is being read
            (!link.starts_with("/proc/")).then(|| (number, masks::without_number(&link).to_owned()))
        })
        .collect();
    links.sort();
    links.into_iter().map(|(number, link)| format!("{number}>{link} ")).collect()
}

/// Where the thread is, and its mask for what it makes there.
fn place() -> String {
    let mask = umask(Mode::empty());
    umask(mask);
    let directory = std::env::current_dir().map(|path| path.to_string_lossy().replace(&getpid().to_string(), "PID"));
    format!("umask {:o} cwd {:?}", mask.bits(), directory.ok())
}
