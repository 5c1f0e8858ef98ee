//! Sockets that listen, and connections that wait to be accepted.

use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

use harness::program::{Kind, Op};

use super::channel::Channel;
use super::{Process, raw};

/// One that listens, and never waits in accept(2).
pub(super) enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// The end of a connection that was not accepted yet.
pub(super) struct Caller {
    number: usize,
    /// Its own address.
    name: String,
    end: OwnedFd,
}

fn unix_name(what: &str, number: usize) -> io::Result<SocketAddr> {
    SocketAddr::from_abstract_name(format!("pod-program-{what}-{number}"))
}

impl Listener {
    fn open(port: u16, tcp: bool) -> io::Result<Listener> {
        if tcp {
            let listener = TcpListener::bind(("0.0.0.0", port))?;
            listener.set_nonblocking(true)?;
            return Ok(Listener::Tcp(listener));
        }
        let listener = UnixListener::bind_addr(&unix_name("listener", usize::from(port))?)?;
        listener.set_nonblocking(true)?;
        Ok(Listener::Unix(listener))
    }

    fn connect(&self, number: usize) -> io::Result<Caller> {
        match self {
            Listener::Tcp(listener) => {
                let stream = TcpStream::connect(("127.0.0.1", listener.local_addr()?.port()))?;
                Ok(Caller { number, name: stream.local_addr()?.to_string(), end: stream.into() })
            }
            Listener::Unix(listener) => {
                let own = unix_name("caller", number)?;
                let end = raw::connect_from(&own, &listener.local_addr()?)?;
                Ok(Caller { number, name: format!("{own:?}"), end })
            }
        }
    }

    /// The connection that has waited longest, its kind, and the address of who connected.
    fn accept(&self) -> io::Result<(OwnedFd, Kind, String)> {
        match self {
            Listener::Tcp(listener) => listener.accept().map(|(end, peer)| (end.into(), Kind::Tcp, peer.to_string())),
            Listener::Unix(listener) => {
                let (end, peer): (UnixStream, _) = listener.accept()?;
                Ok((end.into(), Kind::Named, format!("{peer:?}")))
            }
        }
    }

    /// Its address, and whether somebody waits.
    pub(super) fn describe(&self) -> String {
        use std::os::fd::AsRawFd;
        let (address, descriptor) = match self {
            Listener::Tcp(listener) => (format!("{:?}", listener.local_addr().ok()), listener.as_raw_fd()),
            Listener::Unix(listener) => (format!("{:?}", listener.local_addr().ok()), listener.as_raw_fd()),
        };
        address + if raw::is_readable(descriptor) { " is called" } else { "" }
    }
}

impl Process {
    /// Steps of listeners.
    pub(super) fn listening(&mut self, op: &Op) -> String {
        if let Op::Listen { port, tcp } = op {
            return match Listener::open(*port, *tcp) {
                Ok(listener) => {
                    self.listeners.push(listener);
                    "ok".into()
                }
                Err(error) => format!("{:?}", error.kind()),
            };
        }
        let (Op::Connect(which) | Op::Accept(which)) = op else { return "no such thing".into() };
        let Some(at) = usize::from(*which).checked_rem(self.listeners.len()) else { return "nothing listens".into() };
        let listener = &self.listeners[at];
        if matches!(op, Op::Connect(_)) {
            let Some(number) = self.board.new_channel() else { return "no room".into() };
            return match listener.connect(number) {
                Ok(caller) => {
                    let waits = matches!(listener, Listener::Unix(_));
                    self.callers.push(caller);
                    // Connections of TCP that wait are nothing that can be checkpointed.
                    if waits { number.to_string() } else { self.accept(at) }
                }
                Err(error) => format!("{:?}", error.kind()),
            };
        }
        self.accept(at)
    }

    fn accept(&mut self, at: usize) -> String {
        match self.listeners[at].accept() {
            Ok((end, kind, peer)) => self.accepted(end, kind, &peer),
            Err(error) => format!("{:?}", error.kind()),
        }
    }

    /// Has a connection as a channel, if both ends are this process's.
    fn accepted(&mut self, end: OwnedFd, kind: Kind, peer: &str) -> String {
        let Some(at) = self.callers.iter().position(|caller| caller.name == peer) else {
            return "somebody else's".into();
        };
        let caller = self.callers.remove(at);
        self.channels.push(Channel::accepted(caller.number, kind, end, Some(caller.end)));
        format!("{} of {kind:?}", caller.number)
    }
}
