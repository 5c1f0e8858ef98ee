//! What a person sees of a migration while it runs, and what becomes of Ctrl-C meanwhile.

use std::io::{self, IsTerminal};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::print_error;
use crate::migrate::progress::{Progress, Stage};

/// Ctrl-C, once it does not end this process: a command that leads to the other host must not end by it either, or the
/// stream breaks at a moment that nobody has chosen.
pub(super) struct Interrupts(SignalFd);

impl Interrupts {
    /// From now on. Nothing was started yet: what is started later inherits it.
    pub(super) fn hold_back() -> io::Result<Interrupts> {
        let mut signals = SigSet::empty();
        signals.add(Signal::SIGINT);
        signals.thread_block()?;
        Ok(Interrupts(SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC)?))
    }
}

/// A migration that is followed.
pub(super) struct Following {
    pod: String,
    last: Arc<Mutex<Progress>>,
    bar: ProgressBar,
}

/// Whether anybody looks who would like a bar.
pub(super) fn is_watched() -> bool {
    let asked = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    io::stderr().is_terminal() && !asked("NO_COLOR") && !asked("CI")
}

impl Following {
    /// Follows the migration of a pod that is asked for on `socket`.
    pub(super) fn start(pod: &str, socket: &UnixStream, interrupts: Interrupts) -> io::Result<Following> {
        let bar = if is_watched() { ProgressBar::new_spinner() } else { ProgressBar::hidden() };
        if let Ok(style) = ProgressStyle::with_template("{spinner} {elapsed:>4} {msg}") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(100));
        let following = Following { pod: pod.to_owned(), last: Arc::default(), bar };
        let (last, socket, pod) = (following.last.clone(), socket.try_clone()?, pod.to_owned());
        std::thread::spawn(move || obey(&interrupts.0, &socket, &last, &pod));
        Ok(following)
    }

    /// The monitor says how far it is.
    pub(super) fn told(&self, bytes: &[u8]) {
        if let Ok(progress) = serde_json::from_slice(bytes) {
            let before = std::mem::replace(&mut *lock(&self.last), progress);
            self.bar.set_message(words(&self.pod, &progress, progress.sent.saturating_sub(before.sent)));
        }
    }

    /// It is over.
    pub(super) fn end(&self) {
        self.bar.finish_and_clear();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Acts on Ctrl-C, as often as it comes.
fn obey(signals: &SignalFd, socket: &UnixStream, last: &Mutex<Progress>, pod: &str) {
    let mut warned = false;
    loop {
        let heard = poll(&mut [PollFd::new(signals.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE);
        if heard.is_err() || !matches!(signals.read_signal(), Ok(Some(_))) {
            continue;
        }
        let progress = *lock(last);
        match progress.stage {
            Stage::Following { .. } if warned => std::process::exit(128 + libc::SIGINT),
            Stage::Following { .. } => {
                let left = HumanBytes(progress.left().unwrap_or(0));
                print_error(&format!(
                    "pod {pod} runs at the destination and needs this host until its memory has followed ({left} to go). \
                    Ctrl-C once more breaks that off: it is killed there, and held here as it was when it left"
                ));
                warned = true;
            }
            Stage::Given => {
                print_error(&format!("pod {pod} is being let go at the destination: that cannot be taken back"))
            }
            // The monitor takes it back, and says so.
            _ => drop(socket.shutdown(Shutdown::Write)),
        }
    }
}

/// `fresh` bytes went out in the last tenth of a second.
fn words(pod: &str, progress: &Progress, fresh: u64) -> String {
    let what = match progress.stage {
        Stage::Asking => "asking the destination".to_owned(),
        Stage::Round { number, .. } => format!("runs, round {number}"),
        Stage::Rest => "held, sending the rest".to_owned(),
        Stage::HandingOver => "held, being rebuilt there".to_owned(),
        Stage::Given => "being let go there".to_owned(),
        Stage::Following { .. } => "runs there, memory follows".to_owned(),
    };
    let left = progress.left().map_or_else(String::new, |left| format!(", {} to go", HumanBytes(left)));
    format!("{pod}: {what}: {} sent, {}/s{left}", HumanBytes(progress.sent), HumanBytes(fresh * 10))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_rate_and_what_is_left_are_told() {
        let stage = Stage::Round { number: 2, bytes: 3 << 20 };
        let progress = Progress { stage, sent_before: 1 << 20, sent: 2 << 20 };
        let said = words("web", &progress, 1 << 20);
        assert_eq!(said, "web: runs, round 2: 2.00 MiB sent, 10.00 MiB/s, 2.00 MiB to go");
        let held = words("web", &Progress { stage: Stage::HandingOver, ..progress }, 0);
        assert_eq!(held, "web: held, being rebuilt there: 2.00 MiB sent, 0 B/s");
    }
}
