//! Connections that wait to be accepted. The kernel tells how many there are and shows them to nobody before somebody
//! accepts them, and that only the pod may do: so a checkpoint waits until it has.

use std::collections::HashSet;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use super::address;
use super::diag::dump_unix;
use super::handshakes::Deferring;
use super::tcp::Info;
use super::unix_backlog;
use crate::error::CaptureError;
use crate::files::Descriptor;
use crate::look::Subject;
use crate::sys::pidfd::PidFd;
use crate::sys::{file, socket};

/// How long the pod may take to accept what waits.
pub const PATIENCE: Duration = Duration::from_millis(200);
/// How often to look meanwhile: nothing tells of a queue that has become empty.
pub const PAUSE: Duration = Duration::from_micros(500);

/// The listening sockets of a pod, found while it runs. Nothing is kept open: a port that the pod closes is free at once.
#[derive(Debug, Default)]
pub struct Listeners {
    all: Vec<Listener>,
    inodes: HashSet<u64>,
    /// Those of unix sockets at which connections may wait: a restart has them wait again.
    tolerated: HashSet<u64>,
}

#[derive(Debug)]
struct Listener {
    subject: Subject,
    number: i32,
    inode: u64,
    object: String,
}

impl Listeners {
    /// Takes note of a socket if it listens.
    pub(super) fn note(&mut self, descriptor: &Descriptor) {
        let listens = socket::get_int(descriptor.as_fd(), libc::SOL_SOCKET, libc::SO_ACCEPTCONN).unwrap_or(0) != 0;
        if listens && self.inodes.insert(descriptor.stat.st_ino) {
            self.all.push(Listener {
                subject: descriptor.subject.clone(),
                number: descriptor.number,
                inode: descriptor.stat.st_ino,
                object: descriptor.object(),
            });
        }
    }

    /// Whether any connection waits to be accepted that cannot be written down so.
    pub fn have_waiting(&self) -> bool {
        self.all.iter().any(|listener| !self.tolerates(listener) && listener.waiting().is_some())
    }

    /// Time is up: connections that wait at unix sockets go on waiting, if what they have said can be written down.
    pub fn tolerate(&mut self) {
        let waiting = self.all.iter().filter(|listener| listener.waiting().is_some());
        self.tolerated.extend(waiting.filter(|listener| listener.can_be_kept()).map(|listener| listener.inode));
    }

    fn tolerates(&self, listener: &Listener) -> bool {
        self.tolerated.contains(&listener.inode) && listener.can_be_kept()
    }

    /// Those of TCP at these ports that wait for data before they have a connection accepted (`TCP_DEFER_ACCEPT`).
    pub fn deferring(&self, ports: &HashSet<u16>) -> Vec<Deferring> {
        self.all.iter().filter_map(|listener| listener.deferring(ports)).collect()
    }

    /// Refuses the first listener at which a connection waits.
    pub fn refuse(&self) -> Result<(), CaptureError> {
        let waiting = |listener: &Listener| {
            let why = has_waiting(&listener.waiting().filter(|_| !self.tolerates(listener))?);
            Some(listener.subject.refuse(&listener.object, why))
        };
        self.all.iter().find_map(waiting).map_or(Ok(()), Err)
    }
}

/// What is wrong with a listener at which these connections wait.
pub(super) fn has_waiting(connections: &str) -> String {
    let limit = PATIENCE.as_millis();
    format!(
        "listens and has {connections} that the program has not accepted within {limit} ms; what waits there cannot be \
             checkpointed"
    )
}

/// So many connections, in words.
pub(super) fn connections(count: u32) -> String {
    format!("{count} connection{}", if count == 1 { "" } else { "s" })
}

impl Listener {
    /// A copy of its descriptor, if it is still there.
    fn copy(&self) -> Option<OwnedFd> {
        let copy = PidFd::open(self.subject.host).and_then(|process| process.get(self.number)).ok()?;
        file::fstat(&copy).is_ok_and(|stat| stat.st_ino == self.inode).then_some(copy)
    }

    fn deferring(&self, ports: &HashSet<u16>) -> Option<Deferring> {
        let copy = self.copy()?;
        let seconds = socket::get_int(copy.as_fd(), libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT).ok()?;
        let local = address::from_kernel(&socket::local_name(copy.as_fd()).ok()?)?;
        let deferring = Deferring { host: self.subject.host, number: self.number, inode: self.inode, seconds };
        (seconds != 0 && ports.contains(&local.port())).then_some(deferring)
    }

    /// Whether it is a unix socket, and either nothing waits there but those who want to be accepted, or what they have
    /// said can be read.
    fn can_be_kept(&self) -> bool {
        let is_unix = |copy: OwnedFd| {
            socket::get_int(copy.as_fd(), libc::SOL_SOCKET, libc::SO_DOMAIN).is_ok_and(|d| d == libc::AF_UNIX)
        };
        // Asked first in any case: the first time takes long, and this is ahead of the hold.
        let readable = self.copy().is_some_and(is_unix) && unix_backlog::can_be_read();
        readable || self.waiting_say_nothing()
    }

    fn waiting_say_nothing(&self) -> bool {
        let namespace = std::fs::File::open(self.subject.host.proc("ns/net"));
        let all = namespace.and_then(dump_unix).unwrap_or_default();
        all.get(&(self.inode as u32)).is_some_and(|facts| facts.waiting_say_nothing(&all))
    }

    /// Which connections wait to be accepted, in words; none if the socket is no longer there.
    fn waiting(&self) -> Option<String> {
        let copy = self.copy()?;
        let unix = socket::get_int(copy.as_fd(), libc::SOL_SOCKET, libc::SO_DOMAIN).is_ok_and(|d| d == libc::AF_UNIX);
        if unix {
            let ready = socket::readiness(copy.as_fd(), libc::POLLIN).ok()?;
            (ready & libc::POLLIN != 0).then(|| "connections".to_owned())
        } else {
            let count = Info::read(copy.as_fd()).ok()?.waiting();
            (count > 0).then(|| connections(count))
        }
    }
}
