//! What both ends of a pty share: settings, window, owner, who is in the foreground.

use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use nix::unistd::{Gid, Uid, chown};
use serde::{Deserialize, Serialize};

use super::terminal_queue::{self, Waiting};
use super::{Descriptor, reopen};
use crate::error::{CaptureError, Context};
use crate::ids::{HostPid, PodPid};
use crate::look::Look;
use crate::sys::terminal::{self, Ask, Termios};
use crate::tracee::Batch;

/// What both ends of a pty share.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalState {
    /// Input, output, control and local modes.
    pub modes: [u32; 4],
    /// Control characters.
    #[serde(with = "serde_bytes")]
    pub characters: [u8; 19],
    /// Input and output speed.
    pub speeds: [u32; 2],
    /// Rows, columns, pixels across, pixels down.
    pub window: [u16; 4],
    /// Whether the slave is locked.
    pub locked: bool,
    /// Whether output is stopped (^S).
    pub stopped: bool,
    /// Owner, group and permissions of `/dev/pts/N`.
    pub owner: (u32, u32, u32),
    /// The session that it controls.
    pub session: Option<PodPid>,
    /// The process group in the foreground.
    pub foreground: Option<PodPid>,
    /// What was typed and not read, as it was typed: of several lines, or none yet.
    #[serde(with = "serde_bytes")]
    pub typed: Vec<u8>,
    /// What was printed and not read at the master's side.
    #[serde(with = "serde_bytes")]
    pub printed: Vec<u8>,
}

impl TerminalState {
    /// Puts what waited back into the queues. Every file of the pod is open, and the slave is not locked yet.
    pub(super) fn refill(&self, master: impl AsFd, index: u32) -> std::io::Result<()> {
        if self.typed.is_empty() && self.printed.is_empty() && !self.stopped {
            return Ok(());
        }
        let slave = reopen::path(slave_path(index), libc::O_RDWR | libc::O_NONBLOCK)?;
        let (typed, printed, stopped) = (self.typed.clone(), self.printed.clone(), self.stopped);
        terminal_queue::restore(master, &slave, &self.settings(), &Waiting { typed, printed, stopped })
    }

    fn settings(&self) -> Termios {
        let [input, output, control, local] = self.modes;
        let [input_speed, output_speed] = self.speeds;
        Termios { input, output, control, local, line: 0, characters: self.characters, input_speed, output_speed }
    }
}

/// The path of a slave.
pub(super) fn slave_path(index: u32) -> PathBuf {
    PathBuf::from(format!("/dev/pts/{index}"))
}

/// Captures what `/dev/pts/INDEX` of the pod is like, through its master.
pub(super) fn capture(
    look: &Look<'_>,
    master: impl AsFd,
    index: u32,
    descriptor: &Descriptor,
) -> Result<TerminalState, CaptureError> {
    let object = || descriptor.object();
    let settings = terminal::settings(&master).capturing("reading the settings", object())?;
    if settings.line != 0 {
        return Err(
            descriptor.refuse(format!("has the line discipline {}, which cannot be checkpointed", settings.line))
        );
    }
    let path = look.init.proc("root").join(format!("dev/pts/{index}"));
    let facts = std::fs::metadata(&path).capturing("looking at", path.display())?;
    let locked = terminal::ask(&master, Ask::Locked).capturing("reading the lock", object())? != 0;
    let waiting = match locked {
        // Nobody has opened it yet.
        true => Waiting::default(),
        false => {
            let slave = reopen::path(&path, libc::O_RDWR | libc::O_NONBLOCK).capturing("opening", path.display())?;
            terminal_queue::look(&master, &slave).map_err(|e| unreadable(descriptor, e))?
        }
    };
    Ok(TerminalState {
        modes: [settings.input, settings.output, settings.control, settings.local],
        characters: settings.characters,
        speeds: [settings.input_speed, settings.output_speed],
        window: terminal::window(&master).capturing("reading the window", object())?,
        locked,
        stopped: waiting.stopped,
        owner: (facts.uid(), facts.gid(), facts.mode() & 0o7777),
        session: group(&master, Ask::Session, look.depth),
        foreground: group(&master, Ask::Foreground, look.depth),
        typed: waiting.typed,
        printed: waiting.printed,
    })
}

fn unreadable(descriptor: &Descriptor, error: std::io::Error) -> CaptureError {
    match error.raw_os_error() {
        Some(_) => CaptureError::Kernel { step: "reading the queues", object: descriptor.object(), source: error },
        None => descriptor.refuse(format!("cannot be checkpointed now: {error}")),
    }
}

/// A process group or session of the terminal by its ID in the pod, if there is one.
fn group(master: impl AsFd, what: Ask, depth: usize) -> Option<PodPid> {
    let host = HostPid(terminal::ask(master, what).ok().filter(|id| *id > 0)?);
    let label = if what == Ask::Session { "NSsid:" } else { "NSpgid:" };
    let status = std::fs::read_to_string(host.proc("status")).ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix(label))?;
    line.split_whitespace().nth(depth)?.parse().ok().map(PodPid)
}

/// Gives a new pty what the old one had. The slave may be locked only once every slave is open: see [`lock`].
pub(super) fn restore(master: impl AsFd, index: u32, state: &TerminalState) -> std::io::Result<()> {
    terminal::set_settings(&master, &state.settings())?;
    terminal::set_window(&master, state.window)?;
    let (uid, gid, mode) = state.owner;
    let path = slave_path(index);
    chown(&path, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(mode))
}

/// The index of the pty that a device number of `/proc/PID/stat` (`tty_nr`) means, if it means one.
pub fn controlling_pty(tty_nr: i32) -> Option<u32> {
    let number = tty_nr as u32;
    let (major, minor) = (number >> 8 & 0xfff, number & 0xff | number >> 12 & 0xf_ff00);
    // Major numbers 136 to 143 are the slaves' for historical reasons; 136 has a million minors by now.
    (136..=143).contains(&major).then(|| (major - 136) << 20 | minor)
}

/// The calls by which a session leader without a terminal makes `/dev/pts/INDEX` its own.
pub fn take_terminal(batch: &mut Batch, index: u32) {
    on_slave(batch, index, |batch, slave| {
        batch.call(libc::SYS_ioctl, [slave, libc::TIOCSCTTY.into(), 0.into()], "taking the controlling terminal");
    });
}

/// The calls by which a process of the session that `/dev/pts/INDEX` controls puts a process group, which exists, in the
/// foreground, by what that process calls it. SIGTTOU must be blocked.
pub fn set_foreground(batch: &mut Batch, index: u32, group: i32) {
    on_slave(batch, index, |batch, slave| {
        let number = batch.bytes(&group.to_ne_bytes());
        batch.call(libc::SYS_ioctl, [slave, libc::TIOCSPGRP.into(), number], "setting the foreground process group");
    });
}

/// The calls by which a process that does not lead its session does without its terminal, `/dev/pts/INDEX`.
pub fn give_terminal_up(batch: &mut Batch, index: u32) {
    on_slave(batch, index, |batch, slave| {
        batch.call(libc::SYS_ioctl, [slave, libc::TIOCNOTTY.into(), 0.into()], "giving the controlling terminal up");
    });
}

fn on_slave(batch: &mut Batch, index: u32, work: impl FnOnce(&mut Batch, crate::tracee::Arg)) {
    let path = slave_path(index);
    let name = batch.bytes(format!("{}\0", path.display()).as_bytes());
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    let what = format!("opening {}", path.display());
    let slave = batch.call(libc::SYS_openat, [libc::AT_FDCWD.into(), name, flags.into()], what);
    let slave = crate::tracee::Arg::ResultOf(slave);
    work(batch, slave);
    batch.call(libc::SYS_close, [slave], "closing the terminal");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_of_slaves() {
        assert_eq!(controlling_pty(136 << 8 | 5), Some(5));
        // Minor 300: its upper bits are above the major number.
        assert_eq!(controlling_pty(136 << 8 | 300 & 0xff | (300 & !0xff) << 12), Some(300));
        assert_eq!(controlling_pty(4 << 8 | 1), None);
        assert_eq!(controlling_pty(0), None);
    }
}
