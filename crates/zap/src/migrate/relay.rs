//! Carrying a stream over TLS: between a connection and the two pipes whose other ends a monitor has.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustls::Connection;

use crate::sys::file::set_nonblocking;

/// Bytes that wait for the monitor at most, and are taken from it at a time.
const BUFFER: usize = 1 << 20;

/// A connection on its way through: what is left to carry, and what has ended.
struct Relay {
    tls: Connection,
    socket: TcpStream,
    /// What is to go out; `None` once it has ended.
    from: Option<File>,
    /// Where what comes in goes; `None` once nobody takes it.
    to: Option<File>,
    inbox: Vec<u8>,
    taken: usize,
    heard_all: bool,
}

/// Two pipes: our ends (to read from, to write to), and the other side's (to read from, to write to).
pub fn pipes() -> io::Result<([OwnedFd; 2], [OwnedFd; 2])> {
    let (out_read, out_write) = io::pipe()?;
    let (in_read, in_write) = io::pipe()?;
    Ok(([out_read.into(), in_write.into()], [in_read.into(), out_write.into()]))
}

/// Carries bytes both ways until both sides have ended, or one fails.
pub fn carry(tls: Connection, socket: TcpStream, [from, to]: [OwnedFd; 2]) -> io::Result<()> {
    socket.set_nonblocking(true)?;
    socket.set_nodelay(true)?;
    for pipe in [&from, &to] {
        set_nonblocking(pipe)?;
    }
    let (from, to) = (Some(File::from(from)), Some(File::from(to)));
    let mut relay = Relay { tls, socket, from, to, inbox: Vec::new(), taken: 0, heard_all: false };
    while relay.turn()? {}
    Ok(())
}

/// The number of bytes moved, or `None` when it would have had to wait.
fn unless_waiting(result: io::Result<usize>) -> io::Result<Option<usize>> {
    match result {
        Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(None),
        other => other.map(Some),
    }
}

impl Relay {
    /// Waits until something can be done and does it; false when nothing is left to do.
    fn turn(&mut self) -> io::Result<bool> {
        let unsent = self.tls.wants_write();
        if self.heard_all && self.inbox.is_empty() {
            self.to = None;
        }
        let done = self.from.is_none() && !unsent && (self.to.is_none() || self.heard_all && self.inbox.is_empty());
        if done {
            return Ok(false);
        }
        let nothing = PollFlags::empty();
        let hear = !self.heard_all && self.inbox.len() < BUFFER;
        let socket = if unsent { PollFlags::POLLOUT } else { nothing } | if hear { PollFlags::POLLIN } else { nothing };
        let mut fds = vec![PollFd::new(self.socket.as_fd(), socket)];
        let sending = self.from.as_ref().filter(|_| !unsent && !self.tls.is_handshaking());
        fds.extend(sending.map(|from| PollFd::new(from.as_fd(), PollFlags::POLLIN)));
        let giving = self.to.as_ref().filter(|_| !self.inbox.is_empty());
        fds.extend(giving.map(|to| PollFd::new(to.as_fd(), PollFlags::POLLOUT)));
        let (sending, giving) = (sending.is_some(), giving.is_some());
        poll(&mut fds, PollTimeout::NONE)?;
        let ready = |index: usize| fds[index].any().unwrap_or(false);
        let (socket, from, to) = (ready(0), sending && ready(1), giving && ready(1 + usize::from(sending)));
        drop(fds);
        if from {
            self.take_from_monitor()?;
        }
        if to {
            self.give_to_monitor()?;
        }
        if socket {
            self.exchange(hear)?;
        }
        Ok(true)
    }

    fn take_from_monitor(&mut self) -> io::Result<()> {
        let Some(from) = &mut self.from else { return Ok(()) };
        let mut bytes = vec![0; 64 << 10];
        match unless_waiting(from.read(&mut bytes))? {
            None => {}
            Some(0) => {
                self.from = None;
                self.tls.send_close_notify();
            }
            Some(length) => self.tls.writer().write_all(&bytes[..length])?,
        }
        Ok(())
    }

    fn give_to_monitor(&mut self) -> io::Result<()> {
        let Some(to) = &mut self.to else { return Ok(()) };
        match unless_waiting(to.write(&self.inbox[self.taken..])) {
            Ok(Some(length)) => self.taken += length,
            Ok(None) => {}
            // Nobody takes it any more.
            Err(_) => {
                self.to = None;
                self.taken = self.inbox.len();
            }
        }
        if self.taken == self.inbox.len() {
            self.inbox.clear();
            self.taken = 0;
        }
        Ok(())
    }

    /// What can be sent is sent, and what has come is taken in.
    fn exchange(&mut self, hear: bool) -> io::Result<()> {
        while self.tls.wants_write() {
            if unless_waiting(self.tls.write_tls(&mut self.socket))?.is_none() {
                break;
            }
        }
        if !hear {
            return Ok(());
        }
        match unless_waiting(self.tls.read_tls(&mut self.socket))? {
            None => return Ok(()),
            Some(0) => self.heard_all = true,
            Some(_) => {}
        }
        let state = self.tls.process_new_packets().map_err(|error| {
            // The other side is told why.
            let _ = self.tls.write_tls(&mut self.socket);
            io::Error::other(error)
        })?;
        let mut fresh = vec![0; state.plaintext_bytes_to_read()];
        self.tls.reader().read_exact(&mut fresh)?;
        self.inbox.extend(fresh);
        self.heard_all |= state.peer_has_closed();
        Ok(())
    }
}
