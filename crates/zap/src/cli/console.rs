//! A command's console on the caller's terminal.

use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::termios::{self, SetArg, Termios};

use crate::monitor::frame::{self, Collector, Kind};
use crate::monitor::protocol::Failure;
use crate::monitor::session::End;
use crate::sys::tty::{self, WindowSize};

/// Ctrl-P Ctrl-Q.
const DETACH: [u8; 2] = [16, 17];
const CHUNK: usize = 64 << 10;
/// Signals that are passed on to the command rather than ending the one that watches it.
const PASSED_ON: [Signal; 5] = [Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM, Signal::SIGUSR1, Signal::SIGUSR2];

/// The size of the caller's terminal, if it has one.
pub(super) fn window() -> Option<WindowSize> {
    tty::window_size(io::stdin()).or_else(|_| tty::window_size(io::stdout())).ok()
}

pub(super) fn stdin_is_terminal() -> bool {
    io::stdin().is_terminal()
}

/// Puts the terminal back as it was.
struct Raw(Termios);

impl Raw {
    fn enter() -> Option<Raw> {
        let stdin = io::stdin();
        let before = termios::tcgetattr(&stdin).ok()?;
        let mut raw = before.clone();
        termios::cfmakeraw(&mut raw);
        termios::tcsetattr(&stdin, SetArg::TCSADRAIN, &raw).ok()?;
        Some(Raw(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = termios::tcsetattr(io::stdin(), SetArg::TCSADRAIN, &self.0);
    }
}

/// Shows the console behind `socket` until its command ends, and gives its exit code.
pub(super) fn watch(socket: UnixStream, terminal: bool, input: bool) -> Result<u8, Failure> {
    watch_with(socket, terminal, input, false)
}

/// The same of a command that is the watcher's own: when nobody reads its output any more it hears of that, as it would if it
/// had written to the pipe itself.
pub(super) fn watch_own(socket: UnixStream, terminal: bool, input: bool) -> Result<u8, Failure> {
    watch_with(socket, terminal, input, true)
}

fn watch_with(socket: UnixStream, terminal: bool, input: bool, own: bool) -> Result<u8, Failure> {
    let raw = if terminal && input && stdin_is_terminal() { Raw::enter() } else { None };
    let result = Watcher::new(socket, (terminal, input), raw.is_some(), own).and_then(Watcher::run);
    drop(raw);
    match result {
        Ok(Outcome::Ended(End::Exited(code))) => Ok(code as u8),
        Ok(Outcome::Ended(End::TakenAway(why))) => {
            let _ = writeln!(io::stderr(), "zap: {why}");
            Ok(0)
        }
        Ok(Outcome::Left) => {
            let _ = writeln!(io::stderr(), "zap: left it running; `zap attach` comes back to it");
            Ok(0)
        }
        Ok(Outcome::Lost) => {
            Err(Failure { message: "the pod's monitor was lost; the pod may run on".to_owned(), code: 125 })
        }
        Err(e) => Err(Failure { message: format!("the console: {e}"), code: 125 }),
    }
}

enum Outcome {
    Ended(End),
    Left,
    Lost,
}

struct Watcher {
    socket: UnixStream,
    signals: SignalFd,
    terminal: bool,
    input: bool,
    raw: bool,
    heard: Collector,
    /// The first of the two keys that detach has been typed.
    leaving: bool,
    /// Whether the command is to hear of it that nobody reads its output, and has not yet.
    tells_of_closed_pipes: bool,
}

impl Watcher {
    fn new(
        socket: UnixStream,
        (terminal, input): (bool, bool),
        raw: bool,
        tells_of_closed_pipes: bool,
    ) -> io::Result<Watcher> {
        let mut set = SigSet::empty();
        PASSED_ON.iter().for_each(|s| set.add(*s));
        set.add(Signal::SIGWINCH);
        set.add(Signal::SIGHUP);
        set.thread_block()?;
        let signals = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        let heard = Collector::default();
        Ok(Watcher { socket, signals, terminal, input, raw, heard, leaving: false, tells_of_closed_pipes })
    }

    fn run(mut self) -> io::Result<Outcome> {
        let stdin = io::stdin();
        loop {
            let mut fds = vec![
                PollFd::new(self.socket.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
            ];
            if self.input {
                fds.push(PollFd::new(stdin.as_fd(), PollFlags::POLLIN));
            }
            match poll(&mut fds, PollTimeout::NONE) {
                Err(nix::Error::EINTR) => continue,
                other => other?,
            };
            let ready: Vec<bool> = fds.iter().map(|f| f.any().unwrap_or(false)).collect();
            drop(fds);
            if ready[0]
                && let Some(outcome) = self.hear()?
            {
                return Ok(outcome);
            }
            if ready[1] && self.signalled()? {
                return Ok(Outcome::Left);
            }
            if ready.get(2) == Some(&true) && self.typed()? {
                return Ok(Outcome::Left);
            }
        }
    }

    fn hear(&mut self) -> io::Result<Option<Outcome>> {
        let mut buffer = vec![0; CHUNK];
        match nix::unistd::read(&self.socket, &mut buffer) {
            Ok(0) | Err(nix::Error::ECONNRESET) => return Ok(Some(Outcome::Lost)),
            Ok(length) => self.heard.add(&buffer[..length]),
            Err(nix::Error::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
        while let Some((kind, payload)) = self.heard.take()? {
            match kind {
                Kind::Output => self.show(io::stdout(), &payload)?,
                Kind::ErrorOutput => self.show(io::stderr(), &payload)?,
                Kind::End => return Ok(Some(Outcome::Ended(serde_json::from_slice(&payload)?))),
                _ => {}
            }
        }
        Ok(None)
    }

    /// Output that nobody reads is no reason to stop watching.
    fn show(&mut self, mut to: impl Write, bytes: &[u8]) -> io::Result<()> {
        match to.write_all(bytes).and_then(|()| to.flush()) {
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => match std::mem::take(&mut self.tells_of_closed_pipes) {
                true => self.send(Kind::Signal, &(Signal::SIGPIPE as i32).to_le_bytes()),
                false => Ok(()),
            },
            other => other,
        }
    }

    fn send(&self, kind: Kind, payload: &[u8]) -> io::Result<()> {
        match frame::write(&self.socket, kind, payload) {
            // What its end was is still to be read.
            Err(e) if matches!(e.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) => Ok(()),
            other => other,
        }
    }

    /// True when the terminal went away.
    fn signalled(&mut self) -> io::Result<bool> {
        while let Some(info) = self.signals.read_signal()? {
            match Signal::try_from(info.ssi_signo as i32)? {
                Signal::SIGHUP => return Ok(true),
                Signal::SIGWINCH => {
                    if let (true, Some(size)) = (self.terminal, window()) {
                        let [a, b] = size.rows.to_le_bytes();
                        let [c, d] = size.columns.to_le_bytes();
                        self.send(Kind::Resize, &[a, b, c, d])?;
                    }
                }
                signal => self.send(Kind::Signal, &(signal as i32).to_le_bytes())?,
            }
        }
        Ok(false)
    }

    /// True when the keys that detach were typed.
    fn typed(&mut self) -> io::Result<bool> {
        let mut buffer = vec![0; CHUNK];
        let length = match nix::unistd::read(io::stdin(), &mut buffer) {
            Ok(0) | Err(nix::Error::EIO) => {
                self.input = false;
                self.send(Kind::InputEnd, &[])?;
                return Ok(false);
            }
            Ok(length) => length,
            Err(nix::Error::EINTR | nix::Error::EAGAIN) => return Ok(false),
            Err(e) => return Err(e.into()),
        };
        if !self.raw {
            self.send(Kind::Input, &buffer[..length])?;
            return Ok(false);
        }
        let (bytes, left) = filter_keys(&buffer[..length], &mut self.leaving);
        if !bytes.is_empty() {
            self.send(Kind::Input, &bytes)?;
        }
        Ok(left)
    }
}

/// What is to be sent of what was typed, and whether the keys that detach were among it.
fn filter_keys(typed: &[u8], leaving: &mut bool) -> (Vec<u8>, bool) {
    let mut bytes = Vec::with_capacity(typed.len() + 1);
    for byte in typed {
        if std::mem::take(leaving) {
            if *byte == DETACH[1] {
                return (bytes, true);
            }
            bytes.push(DETACH[0]);
        }
        match *byte == DETACH[0] {
            true => *leaving = true,
            false => bytes.push(*byte),
        }
    }
    (bytes, false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_both_keys_detach() {
        let mut leaving = false;
        assert_eq!(filter_keys(b"ab\x10", &mut leaving), (b"ab".to_vec(), false));
        assert_eq!(filter_keys(b"c", &mut leaving), (b"\x10c".to_vec(), false));
        assert_eq!(filter_keys(b"\x10\x11d", &mut leaving), (vec![], true));
    }
}
