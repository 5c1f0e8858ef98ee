//! What a process can see of itself.

use std::sync::atomic::Ordering::SeqCst;

use nix::sys::resource::{Resource, getrlimit};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Pid, getpgrp, getpid, getppid, getsid};

use super::channel::hash;
use super::{Process, raw};

impl Process {
    /// Everything that it can see of itself and that is the same in every run.
    pub(super) fn look(&self) -> String {
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
            let protection = region.shown();
            let readable = protection.starts_with('r');
            let sum = readable.then(|| hash(&raw::peek(region.address(), region.bytes)));
            text += &format!(" region {} {protection} {sum:x?}", region.number);
        }
        for channel in &self.channels {
            text += &format!(" {}", channel.describe());
        }
        if self.slot == 0 {
            text += &format!(" stopped {:?}", self.board.seen_stopped());
        }
        text += &format!(" {} {}", super::traits::describe(), super::ipc::describe());
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
