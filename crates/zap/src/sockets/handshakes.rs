//! Helping handshakes over their end.
//!
//! At the end that listens the kernel keeps a handshake as a request that nobody is shown, until the other end's word comes
//! that it has the answer (the last of three packets). That word may be on its way, or lost, or have been put aside because
//! the listener waits for data (`TCP_DEFER_ACCEPT`): then the other end takes itself for connected, and can say so again. It
//! does when the answer is sent again, and that the kernel does for whoever asks again; only the sequence numbers must be
//! right. So a packet that means nothing is sent to the request, whose number cannot be right: the kernel says what it
//! expects, and that is overheard.
//!
//! (An acknowledgement that is made up would do as well, but would make a connection also with somebody who is not there.)

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};
use std::{io, thread};

use serde::{Deserialize, Serialize};

use super::address::on_the_wire;
use super::strays::Stray;
use super::{common, packet};
use crate::ids::HostPid;
use crate::sys::pidfd::PidFd;
use crate::sys::{file, socket};

const SYN: u8 = 2;
const ACK: u8 = 16;
/// `FIN`, `SYN`, `RST` and `ACK`.
const KINDS: u8 = 0x17;

/// How long the kernel may take to say what it expects: it does so before the call returns, or on another processor.
const ANSWERED: Duration = Duration::from_millis(10);

/// Has the other ends of these handshakes say again that they have their answers. To be called in their network namespace.
pub(super) fn hasten(strays: &[Stray]) -> io::Result<()> {
    let overheard = socket::socket(libc::AF_PACKET, libc::SOCK_DGRAM, i32::from((libc::ETH_P_ALL as u16).to_be()))?;
    common::make_room(overheard.as_fd(), libc::SO_RCVBUFFORCE, 4 << 20)?;
    for stray in strays {
        // One byte of data exempts it from the kernel's limit of such answers.
        let nothing = Segment { sequence: rand::random(), flags: 0, data: b"\0" };
        // What cannot be sent is not answered.
        let _ = nothing.deliver(stray);
    }
    let deadline = Instant::now() + ANSWERED;
    let mut left: Vec<&Stray> = strays.iter().collect();
    let mut bytes = [0; 128];
    while !left.is_empty() {
        match socket::receive(&overheard, &mut bytes, libc::MSG_DONTWAIT) {
            Ok(length) => {
                let Some(heard) = Heard::parse(&bytes[..length]) else { continue };
                let Some(place) = left.iter().position(|stray| heard.is_of(stray)) else { continue };
                let request = Segment { sequence: heard.expects.wrapping_sub(1), flags: SYN, data: &[] };
                let _ = request.deliver(left.swap_remove(place));
            }
            // What has come is heard, however long it takes until we run again.
            Err(e) if e.kind() == io::ErrorKind::WouldBlock && Instant::now() > deadline => break,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => thread::yield_now(),
            Err(e) => return Err(e),
        }
    }
    // The kernel takes tens of milliseconds to close a packet socket.
    thread::spawn(move || drop(overheard));
    Ok(())
}

/// A TCP segment of the other end's.
struct Segment<'d> {
    sequence: u32,
    flags: u8,
    data: &'d [u8],
}

impl Segment<'_> {
    fn deliver(&self, stray: &Stray) -> io::Result<()> {
        let mut tcp = Vec::with_capacity(21);
        tcp.extend(stray.peer.port().to_be_bytes());
        tcp.extend(stray.local.port().to_be_bytes());
        tcp.extend(self.sequence.to_be_bytes());
        tcp.extend([0; 4]);
        tcp.extend([5 << 4, self.flags, 0, 0, 0, 0, 0, 0]);
        tcp.extend(self.data);
        packet::deliver(stray.peer, stray.local, libc::IPPROTO_TCP, 16, tcp, 0)
    }
}

/// A packet that acknowledges something and says nothing else.
struct Heard {
    from: SocketAddr,
    to: SocketAddr,
    expects: u32,
}

impl Heard {
    fn parse(packet: &[u8]) -> Option<Heard> {
        let (from, to, tcp): (IpAddr, IpAddr, &[u8]) = match (packet.first()? >> 4, packet.get(6)?, packet.get(9)?) {
            (4, _, 6) => {
                let ends = packet.get(12..)?.first_chunk::<8>()?;
                let (from, to) = (ends.first_chunk::<4>()?, ends.last_chunk::<4>()?);
                ((*from).into(), (*to).into(), packet.get(usize::from(packet[0] & 15) * 4..)?)
            }
            (6, 6, _) => {
                let ends = packet.get(8..)?.first_chunk::<32>()?;
                let (from, to) = (ends.first_chunk::<16>()?, ends.last_chunk::<16>()?);
                ((*from).into(), (*to).into(), packet.get(40..)?)
            }
            _ => return None,
        };
        let tcp = tcp.first_chunk::<20>()?;
        let port = |at: usize| u16::from_be_bytes([tcp[at], tcp[at + 1]]);
        let expects = u32::from_be_bytes([tcp[8], tcp[9], tcp[10], tcp[11]]);
        let heard = Heard { from: SocketAddr::new(from, port(0)), to: SocketAddr::new(to, port(2)), expects };
        (tcp[13] & KINDS == ACK).then_some(heard)
    }

    fn is_of(&self, stray: &Stray) -> bool {
        let same = |here: SocketAddr, there: SocketAddr| {
            let there = on_the_wire(there);
            (here.ip(), here.port()) == (there.ip(), there.port())
        };
        same(self.from, stray.local) && same(self.to, stray.peer)
    }
}

/// A listener that waits for data before it has connections accepted, but not for now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deferring {
    /// A process that has it.
    pub host: HostPid,
    /// Its number there.
    pub number: i32,
    /// Its inode.
    pub inode: u64,
    /// The `TCP_DEFER_ACCEPT` that it has otherwise, in seconds.
    pub seconds: i32,
}

impl Deferring {
    /// Has it wait for nothing. What it is must have been written down.
    pub fn suspend(&self) -> io::Result<()> {
        self.set(0)
    }

    /// Has it be as it was.
    pub fn resume(&self) -> io::Result<()> {
        self.set(self.seconds)
    }

    /// Sets the option, if the listener is still there.
    fn set(&self, seconds: i32) -> io::Result<()> {
        let listener: OwnedFd = match PidFd::open(self.host).and_then(|process| process.get(self.number)) {
            Err(e) if matches!(e.raw_os_error(), Some(libc::ESRCH | libc::EBADF)) => return Ok(()),
            found => found?,
        };
        if file::fstat(&listener)?.st_ino != self.inode {
            return Ok(());
        }
        socket::set_int(&listener, libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT, seconds)
    }
}

/// Reads some bytes as a packet.
pub(super) fn try_packet(bytes: &[u8]) {
    let _ = Heard::parse(bytes);
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    use super::*;
    use crate::sockets::Strays;

    /// A connection that is put aside, and what there is of it before and after, with the client's next words.
    fn helped(address: &'static str) {
        let test = std::thread::spawn(move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            crate::sys::namespace::loopback_up().unwrap();
            let strays = Strays::of([File::open("/proc/thread-self/ns/net").unwrap()]).unwrap();
            let listener = TcpListener::bind(address).unwrap();
            let defer = |seconds| socket::set_int(&listener, libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT, seconds);
            defer(60).unwrap();
            let port = listener.local_addr().unwrap().port();
            let to = if address.contains('.') { format!("127.0.0.1:{port}") } else { format!("[::1]:{port}") };
            let mut clients = [to.clone(), to, format!("127.0.0.1:{port}")];
            let clients = if address.contains("[::]") { &mut clients[..] } else { &mut clients[..2] };
            let mut clients: Vec<TcpStream> = clients.iter().map(|to| TcpStream::connect(to).unwrap()).collect();
            let deadline = Instant::now() + Duration::from_secs(60);
            let mut found = strays.look().unwrap();
            while found.len() != clients.len() {
                assert!(Instant::now() < deadline, "{found:?}");
                thread::yield_now();
                found = strays.look().unwrap();
            }
            assert!(found.iter().all(|stray| stray.opening()));
            defer(0).unwrap();
            strays.hasten(&found).unwrap();
            listener.set_nonblocking(true).unwrap();
            let deadline = Instant::now() + Duration::from_secs(60);
            while !strays.look().unwrap().is_empty() {
                assert!(Instant::now() < deadline, "{:?}", strays.look());
                thread::yield_now();
            }
            for _ in 0..clients.len() {
                let (mut server, peer) = listener.accept().unwrap();
                let of_peer = |client: &&mut TcpStream| client.local_addr().unwrap().port() == peer.port();
                let client = clients.iter_mut().find(of_peer).unwrap();
                server.set_nonblocking(false).unwrap();
                server.write_all(b"w").unwrap();
                client.read_exact(&mut [0]).unwrap();
                client.write_all(b"x").unwrap();
                server.read_exact(&mut [0]).unwrap();
            }
        });
        test.join().unwrap();
    }

    #[test]
    fn what_was_put_aside_becomes_a_connection() {
        for address in ["127.0.0.1:0", "[::1]:0", "[::]:0"] {
            helped(address);
        }
    }

    #[test]
    fn a_listener_is_put_right_if_it_is_still_there() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let seconds = || socket::get_int(&listener, libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT).unwrap();
        let inode = file::fstat(&listener).unwrap().st_ino;
        let host = HostPid(std::process::id() as i32);
        let number = std::os::fd::AsRawFd::as_raw_fd(&listener);
        let deferring = Deferring { host, number, inode, seconds: 31 };
        deferring.resume().unwrap();
        assert_eq!(seconds(), 31);
        deferring.suspend().unwrap();
        assert_eq!(seconds(), 0);
        Deferring { inode: inode + 1, ..deferring.clone() }.resume().unwrap();
        Deferring { number: 1 << 20, ..deferring }.resume().unwrap();
        assert_eq!(seconds(), 0);
    }

    #[test]
    fn only_bare_acknowledgements_are_heard() {
        let mut packet = vec![0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
        packet.extend([0, 80, 1, 0, 0, 0, 0, 9, 0, 0, 0, 8, 0x50, ACK, 0, 0, 0, 0, 0, 0]);
        let heard = Heard::parse(&packet).unwrap();
        assert_eq!((heard.from, heard.to), ("10.0.0.1:80".parse().unwrap(), "10.0.0.2:256".parse().unwrap()));
        assert_eq!(heard.expects, 8);
        packet[33] = SYN | ACK;
        assert!(Heard::parse(&packet).is_none());
        for length in 0..packet.len() {
            assert!(Heard::parse(&packet[..length]).is_none(), "{length}");
        }
    }
}
