//! TCP connections that are in nobody's hands but the kernel's. Their program has closed them, and something of theirs is
//! still to be sent or to be acknowledged; or their handshake is not over, at the end that listens. No descriptor leads to
//! them, and nobody is shown what they are made of: so a checkpoint waits until they are done.
//!
//! One in `FIN_WAIT2` or `TIME_WAIT` has delivered everything, and waits for nothing but the peer's last word.

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::OwnedFd;

use super::{diag, handshakes};
use crate::error::CaptureError;
use crate::ids::PodPid;
use crate::procfs;
use crate::sys::{clone, nsfs, socket};

const SYN_RECEIVED: u8 = 3;
const FIN_WAIT1: u8 = 4;
const LAST_ACK: u8 = 9;
const CLOSING: u8 = 11;

const STATES: u32 = 1 << SYN_RECEIVED | 1 << FIN_WAIT1 | 1 << LAST_ACK | 1 << CLOSING;

/// Where to ask for the strays of a pod: in each of its network namespaces.
#[derive(Debug, Default)]
pub struct Strays {
    namespaces: Vec<Namespace>,
}

/// A `sock_diag` socket of a network namespace, and its counts of sockets.
#[derive(Debug)]
struct Namespace {
    file: OwnedFd,
    diag: OwnedFd,
    counts: Vec<File>,
}

/// A connection that only the kernel has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stray {
    /// Our address.
    pub local: SocketAddr,
    /// The peer's.
    pub peer: SocketAddr,
    /// What keeps it.
    pub stage: Stage,
    /// In which of the namespaces it is.
    namespace: usize,
}

/// What a connection that only the kernel has waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// The peer's word that it has our answer to its request.
    Opening {
        /// How often the answer was sent again.
        repeated: u8,
    },
    /// The peer's acknowledgement.
    Closing {
        /// Of so many bytes; the last of them stands for the end of the connection.
        left: u32,
    },
}

impl Strays {
    /// Prepares to ask in these network namespaces.
    pub fn of<N: Into<OwnedFd>>(namespaces: impl IntoIterator<Item = N>) -> io::Result<Strays> {
        let namespaces = namespaces.into_iter().map(|n| Namespace::open(n.into())).collect::<io::Result<_>>()?;
        Ok(Strays { namespaces })
    }

    /// Those that there are now.
    pub fn look(&self) -> io::Result<Vec<Stray>> {
        let mut found = Vec::new();
        for (number, namespace) in self.namespaces.iter().enumerate() {
            namespace.look(number, &mut found)?;
        }
        Ok(found)
    }

    /// Has the other ends of these say that they have our answers, if they do: their handshakes are over then. For listeners
    /// that do not wait for data ([`Deferring`](super::Deferring)).
    pub fn hasten(&self, strays: &[Stray]) -> io::Result<()> {
        for (number, namespace) in self.namespaces.iter().enumerate() {
            let here: Vec<Stray> = strays.iter().filter(|stray| stray.namespace == number).copied().collect();
            if !here.is_empty() {
                clone::in_thread(|| {
                    nsfs::enter(&namespace.file, libc::CLONE_NEWNET)?;
                    handshakes::hasten(&here)
                })?;
            }
        }
        Ok(())
    }
}

impl Namespace {
    fn open(file: OwnedFd) -> io::Result<Namespace> {
        clone::in_thread(move || {
            nsfs::enter(&file, libc::CLONE_NEWNET)?;
            let diag = socket::socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_SOCK_DIAG)?;
            let tables = ["/proc/thread-self/net/sockstat", "/proc/thread-self/net/sockstat6"];
            Ok(Namespace {
                file,
                diag,
                counts: tables.into_iter().filter_map(|table| File::open(table).ok()).collect(),
            })
        })
    }

    fn look(&self, number: usize, found: &mut Vec<Stray>) -> io::Result<()> {
        if !self.has_any()? {
            return Ok(());
        }
        let mut broken = false;
        diag::ask(&self.diag, diag::TCPDIAG_GETSOCK, &diag::tcp_request(STATES, 0), |message| match parse(message) {
            Some((stray, 0)) => found.push(Stray { namespace: number, ..stray }),
            // A descriptor leads to it.
            Some(_) => {}
            None => broken = true,
        })?;
        if broken { Err(io::Error::other("sock_diag gave an answer that is cut off")) } else { Ok(()) }
    }

    /// Whether the namespace has any TCP socket with a port. The list takes a walk over those of the whole host.
    fn has_any(&self) -> io::Result<bool> {
        for table in &self.counts {
            if count(&procfs::reread_record(table)?).is_none_or(|sockets| sockets > 0) {
                return Ok(true);
            }
        }
        Ok(self.counts.is_empty())
    }
}

/// How many TCP sockets a `sockstat` counts.
fn count(table: &[u8]) -> Option<u32> {
    let table = str::from_utf8(table).ok()?;
    let line = table.lines().find(|line| line.starts_with("TCP: ") || line.starts_with("TCP6: "))?;
    line.split_ascii_whitespace().nth(2)?.parse().ok()
}

/// A `struct inet_diag_msg`: a connection, and the inode of the file that leads to it.
fn parse(message: &[u8]) -> Option<(Stray, u32)> {
    let message = message.first_chunk::<{ diag::TCP_ANSWER }>()?;
    let word = |at: usize| u32::from_ne_bytes([message[at], message[at + 1], message[at + 2], message[at + 3]]);
    let address = |ip: usize, port: usize| {
        let port = u16::from_be_bytes([message[port], message[port + 1]]);
        if i32::from(message[0]) == libc::AF_INET {
            return Some(SocketAddr::new(IpAddr::from(*message[ip..].first_chunk::<4>()?), port));
        }
        let ip = Ipv6Addr::from(*message[ip..].first_chunk::<16>()?);
        let scope = if ip.is_unicast_link_local() { word(40) } else { 0 };
        Some(SocketAddrV6::new(ip, port, 0, scope).into())
    };
    let stage = match message[1] {
        SYN_RECEIVED => Stage::Opening { repeated: message[3] },
        _ => Stage::Closing { left: word(60) },
    };
    Some((Stray { local: address(8, 4)?, peer: address(24, 6)?, stage, namespace: 0 }, word(68)))
}

impl Stray {
    /// Whether it is the same connection.
    pub fn is(&self, other: &Stray) -> bool {
        (self.local, self.peer, self.opening()) == (other.local, other.peer, other.opening())
    }

    /// Whether its handshake is not over.
    pub fn opening(&self) -> bool {
        matches!(self.stage, Stage::Opening { .. })
    }

    /// Whether its peer has not answered for a second or longer: it has nothing that it could lose.
    pub fn is_unanswered(&self) -> bool {
        matches!(self.stage, Stage::Opening { repeated: 1.. })
    }

    /// The error that refuses a pod because of it.
    pub fn refuse(&self) -> CaptureError {
        let why = match self.stage {
            Stage::Opening { .. } => "has not been answered yet by the other end, which may take itself for connected",
            Stage::Closing { left: 0 | 1 } => "was closed by its program while the other end has yet to take its end",
            Stage::Closing { left } => {
                &format!("was closed by its program while the other end has yet to take {} bytes", left - 1)
            }
        };
        CaptureError::Refused {
            process: PodPid(1),
            command: "init".into(),
            object: format!("the TCP connection {} to {}", self.local, self.peer),
            why: format!("{why}, and only the kernel has it and shows it to nobody; try again later"),
        }
    }
}

/// Reads some bytes as a connection.
pub(super) fn try_answer(bytes: &[u8]) {
    let _ = parse(bytes);
}

/// Reads some bytes as a `sockstat`.
pub(super) fn try_table(bytes: &[u8]) {
    let _ = count(bytes);
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::time::{Duration, Instant};

    use super::*;

    fn strays_in_a_namespace(address: &'static str) -> (Vec<Stray>, SocketAddr, Vec<Stray>) {
        let test = std::thread::spawn(move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            crate::sys::namespace::loopback_up().unwrap();
            let strays = Strays::of([File::open("/proc/thread-self/ns/net").unwrap()]).unwrap();
            assert!(!strays.namespaces[0].has_any().unwrap());
            let listener = TcpListener::bind(address).unwrap();
            let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            socket::set_int(&client, libc::SOL_SOCKET, libc::SO_RCVBUF, 65536).unwrap();
            let (mut server, peer) = listener.accept().unwrap();
            assert_eq!(strays.look().unwrap(), []);
            server.set_nonblocking(true).unwrap();
            while server.write(&[0; 65536]).is_ok() {}
            drop(server);
            let while_full = strays.look().unwrap();
            client.read_to_end(&mut Vec::new()).unwrap();
            // What the client's kernel has answered arrives a moment later.
            let deadline = Instant::now() + Duration::from_secs(60);
            while !strays.look().unwrap().is_empty() && Instant::now() < deadline {
                std::thread::yield_now();
            }
            (while_full, peer, strays.look().unwrap())
        });
        test.join().unwrap()
    }

    #[test]
    fn what_was_closed_too_early_is_found_until_it_was_read() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let (while_full, peer, read) = strays_in_a_namespace(address);
            assert_eq!(while_full.iter().map(|stray| stray.peer).collect::<Vec<_>>(), [peer]);
            assert!(matches!(while_full[0].stage, Stage::Closing { left: 2.. }), "{while_full:?}");
            assert_eq!(read, []);
        }
    }

    #[test]
    fn the_counts_are_read() {
        assert_eq!(count(b"sockets: used 29\nTCP: inuse 3 orphan 17 tw 0\n"), Some(3));
        assert_eq!(count(b"TCP6: inuse 0\nUDP6: inuse 4\n"), Some(0));
        assert_eq!(count(b"sockets: used 29\n"), None);
    }
}
