//! What waits in a pty: printed and not read by the master, typed and not read by a slave.
//!
//! The kernel lets nobody look without taking, so it is taken and put back at once, in the settings that change none of
//! it. A monitor that is killed in those few microseconds takes the bytes with it; a terminal where nothing waits is not
//! touched. Of a line that is still being typed the kernel tells nothing: it is not in the image.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{read, write};

use crate::sys::descriptor;
use crate::sys::terminal::{self, Ask, Termios};

/// What waits in both directions.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    /// Typed at the master's side.
    pub(super) typed: Vec<u8>,
    /// Printed at the slave's side.
    pub(super) printed: Vec<u8>,
    /// Whether output is stopped (^S).
    pub(super) stopped: bool,
}

/// Modes that change what is typed, or answer to it.
const EDITING: u32 = libc::ECHO | libc::ECHONL | libc::ISIG | libc::IEXTEN | libc::EXTPROC;

/// Control characters that are no characters, or end a line without changing it.
const KEPT: [usize; 4] = [libc::VMIN, libc::VTIME, libc::VEOL, libc::VEOL2];

/// Looks at what waits. `slave` is a description of our own, which never waits.
pub(super) fn look(master: impl AsFd, slave: &OwnedFd) -> io::Result<Waiting> {
    // Asking whether it is ready makes the kernel deliver what is on its way.
    let to_print = ready(&master, PollFlags::POLLIN)? && descriptor::unread(&master)? > 0;
    let to_type = ready(slave, PollFlags::POLLIN)? && descriptor::unread(slave)? > 0;
    if !to_print && !to_type {
        return Ok(Waiting { stopped: !ready(slave, PollFlags::POLLOUT)?, ..Waiting::default() });
    }
    let settings = terminal::settings(&master)?;
    let packets = terminal::ask(&master, Ask::Packets)? != 0;
    // A change of settings is a packet, too, if anybody counts.
    terminal::set_packets(&master, false)?;
    let taken = take_and_put_back(&master, slave, &settings, to_print, to_type);
    terminal::set_settings(&master, &settings)?;
    terminal::set_packets(&master, packets)?;
    taken
}

fn take_and_put_back(
    master: impl AsFd,
    slave: &OwnedFd,
    settings: &Termios,
    print: bool,
    typed: bool,
) -> io::Result<Waiting> {
    let mut waiting = Waiting::default();
    if print {
        waiting.printed = drain(&master)?;
    }
    // With nothing in the way, what cannot be written to is stopped.
    waiting.stopped = !ready(slave, PollFlags::POLLOUT)?;
    if print {
        if waiting.stopped {
            go_on(&master, slave, settings)?;
        }
        put_printed(&master, slave, settings, &waiting.printed)?;
        if waiting.stopped {
            stop(&master, slave, settings)?;
        }
    }
    if typed {
        terminal::set_settings(&master, &Termios { local: settings.local & !libc::ICANON, ..*settings })?;
        waiting.typed = drain(slave)?;
        put_typed(&master, settings, &waiting.typed)?;
    }
    Ok(waiting)
}

/// Stops output, as ^S does it where that means something.
fn stop(master: impl AsFd, slave: &OwnedFd, settings: &Termios) -> io::Result<()> {
    match settings.input & libc::IXON {
        0 => terminal::set_stopped(slave, true),
        _ => put(master, &settings.characters[libc::VSTOP..=libc::VSTOP]),
    }
}

/// Lets output go on, whatever stopped it.
fn go_on(master: impl AsFd, slave: &OwnedFd, settings: &Termios) -> io::Result<()> {
    terminal::set_stopped(slave, false)?;
    if settings.input & libc::IXON != 0 {
        put(master, &settings.characters[libc::VSTART..=libc::VSTART])?;
    }
    match ready_within(slave, PollFlags::POLLOUT, 100u8.into())? {
        true => Ok(()),
        false => Err(io::Error::other("its output is stopped, and some of it has not been read")),
    }
}

/// Fills a pty, whose settings are left as `settings` says.
pub(super) fn restore(master: impl AsFd, slave: &OwnedFd, settings: &Termios, waiting: &Waiting) -> io::Result<()> {
    put_printed(&master, slave, settings, &waiting.printed)?;
    put_typed(&master, settings, &waiting.typed)?;
    terminal::set_settings(&master, settings)?;
    if waiting.stopped { stop(master, slave, settings) } else { Ok(()) }
}

/// Prints bytes as they are. The settings are changed.
fn put_printed(master: impl AsFd, slave: &OwnedFd, settings: &Termios, bytes: &[u8]) -> io::Result<()> {
    if bytes.is_empty() {
        return Ok(());
    }
    terminal::set_settings(&master, &Termios { output: settings.output & !libc::OPOST, ..*settings })?;
    put(slave, bytes)
}

/// Types bytes as they are; lines stay lines. The settings are changed.
fn put_typed(master: impl AsFd, settings: &Termios, bytes: &[u8]) -> io::Result<()> {
    if bytes.is_empty() {
        return Ok(());
    }
    let mut plain = Termios { input: settings.input & libc::IUTF8, local: settings.local & !EDITING, ..*settings };
    for (place, character) in plain.characters.iter_mut().enumerate() {
        *character = if KEPT.contains(&place) { *character } else { 0 };
    }
    let mut bytes = bytes.to_vec();
    let end_of_file = settings.characters[libc::VEOF];
    if settings.local & libc::ICANON != 0 && bytes.contains(&0) && end_of_file != 0 {
        // A zero byte in the queue is where ^D was typed.
        plain.characters[libc::VEOF] = end_of_file;
        bytes.iter_mut().filter(|b| **b == 0).for_each(|b| *b = end_of_file);
    }
    terminal::set_settings(&master, &plain)?;
    put(master, &bytes)
}

/// Of all sizes, as much as with this one fits into a pty with no other: what was in it can always be put back.
const PIECE: usize = 1023;
/// How long the kernel's worker may take to make room by moving bytes to the reader's own buffer. Meanwhile they are
/// nowhere but here, and on a machine that has much to do it comes late.
const PATIENCE: Duration = Duration::from_secs(3);

/// Writes bytes into a pty, whoever's flags it has.
fn put(to: impl AsFd, bytes: &[u8]) -> io::Result<()> {
    let flags = descriptor::flags(&to)?;
    if flags & libc::O_NONBLOCK != 0 {
        return put_in_pieces(to, bytes);
    }
    descriptor::set_flags(&to, flags | libc::O_NONBLOCK)?;
    let written = put_in_pieces(&to, bytes);
    descriptor::set_flags(&to, flags)?;
    written
}

fn put_in_pieces(to: impl AsFd, mut bytes: &[u8]) -> io::Result<()> {
    let mut deadline = Instant::now() + PATIENCE;
    while !bytes.is_empty() {
        match write(&to, &bytes[..bytes.len().min(PIECE)]) {
            Ok(written) => {
                bytes = &bytes[written..];
                deadline = Instant::now() + PATIENCE;
            }
            Err(nix::errno::Errno::EAGAIN) if Instant::now() < deadline => std::thread::yield_now(),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn drain(from: impl AsFd) -> io::Result<Vec<u8>> {
    let mut all = Vec::new();
    let mut buffer = [0; 4096];
    while ready(&from, PollFlags::POLLIN)? {
        match read(&from, &mut buffer)? {
            0 => break,
            length => all.extend_from_slice(&buffer[..length]),
        }
    }
    Ok(all)
}

fn ready(file: impl AsFd, events: PollFlags) -> io::Result<bool> {
    ready_within(file, events, PollTimeout::ZERO)
}

fn ready_within(file: impl AsFd, events: PollFlags, patience: PollTimeout) -> io::Result<bool> {
    let mut polled = [PollFd::new(file.as_fd(), events)];
    poll(&mut polled, patience)?;
    Ok(polled[0].revents().is_some_and(|got| got.intersects(events)))
}
