//! Closing the halves of a rebuilt connection that were closed.
//!
//! Our own FIN can be queued in repair mode. That the peer sent one, or acknowledged ours, the kernel believes only
//! from a packet: one is made here and goes over the pod's loopback, while the socket's filter drops all other packets
//! (so that nobody's answer to what the kernel replies can reset the connection).

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};

use super::address::{on_the_wire, to_kernel};
use super::tcp_queues::{Connection, Phase};
use super::tcp_repair::{self, Queue};
use crate::error::{Context, RebuildError};
use crate::image::{DataRef, ImageReader};
use crate::sys::socket::{self, FilterStep};

const FIN: u8 = 1;
const RST: u8 = 4;
const ACK: u8 = 16;

/// The mark by which the filter knows our packets.
const MARK: u32 = 0x5a41_5046;

/// Lets only marked packets in: load the mark, compare, accept all or nothing.
const ONLY_OURS: [FilterStep; 4] =
    [(0x20, 0, 0, 0xffff_f014), (0x15, 0, 1, MARK), (0x06, 0, 0, u32::MAX), (0x06, 0, 0, 0)];

/// Closes what `connection` says is closed, in the order in which it happened.
pub(super) fn close(fd: BorrowedFd<'_>, connection: &Connection, what: &str) -> Result<(), RebuildError> {
    let phase = connection.phase;
    if phase.fin_theirs() || phase == Phase::FinWait2 {
        socket::attach_filter(fd, &ONLY_OURS).rebuilding("shielding", what)?;
        let told = tell(fd, connection).rebuilding("closing the peer's half of", what);
        socket::set_int(fd, libc::SOL_SOCKET, libc::SO_DETACH_FILTER, 0).rebuilding("unshielding", what)?;
        told?;
    }
    if phase == Phase::LastAck {
        close_second(fd, connection).rebuilding("closing", what)?;
    }
    Ok(())
}

/// The packets that a peer would have sent.
fn tell(fd: BorrowedFd<'_>, connection: &Connection) -> std::io::Result<()> {
    let received = connection.receive_from.wrapping_add(connection.receive.length as u32);
    let segment =
        Segment { from: connection.peer, to: connection.local, sequence: received, flags: ACK, acknowledges: 0 };
    if connection.phase == Phase::FinWait2 {
        let end = connection.send_from.wrapping_add(1);
        Segment { acknowledges: end, ..segment }.deliver()?;
    } else {
        Segment { acknowledges: connection.send_from, flags: FIN | ACK, ..segment }.deliver()?;
    }
    expect_phase(fd, connection.phase)
}

fn expect_phase(fd: BorrowedFd<'_>, phase: Phase) -> std::io::Result<()> {
    let wanted = if phase == Phase::LastAck { Phase::CloseWait } else { phase };
    expect(fd, |state| Phase::of_state(state) == Some(wanted))
}

/// Loopback delivers before the call that sends returns, or a moment later when another CPU has the packet.
fn expect(fd: BorrowedFd<'_>, wanted: impl Fn(u8) -> bool) -> std::io::Result<()> {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(2);
    loop {
        let state = super::tcp::Info::read(fd)?.state();
        if wanted(state) {
            return Ok(());
        }
        if std::time::Instant::now() > deadline {
            return Err(std::io::Error::other(format!("the connection is in state {state} and stays there")));
        }
        std::thread::yield_now();
    }
}

fn close_second(fd: BorrowedFd<'_>, connection: &Connection) -> std::io::Result<()> {
    if connection.fin_sent {
        tcp_repair::select(fd, Queue::Send)?;
        return socket::shutdown(fd, libc::SHUT_WR);
    }
    // The peer's window is still shut, as it was left when the unsent bytes were queued: the FIN waits behind them.
    tcp_repair::leave_repair(fd, true)?;
    socket::shutdown(fd, libc::SHUT_WR)?;
    socket::set_int(fd, libc::IPPROTO_TCP, libc::TCP_REPAIR, 1)
}

/// Makes a fresh socket one whose connection has come and gone: a connection with a peer that never was, which ends.
pub(super) fn end(
    fd: BorrowedFd<'_>,
    family: i32,
    reset: bool,
    receive: DataRef,
    image: &ImageReader,
    what: &str,
) -> Result<(), RebuildError> {
    let unread = image.read(receive).map_err(|e| RebuildError::Damaged(e.to_string()))?;
    end_with(fd, family, reset, &unread).rebuilding("ending the connection of", what)
}

fn end_with(fd: BorrowedFd<'_>, family: i32, reset: bool, unread: &[u8]) -> std::io::Result<()> {
    let loopback: IpAddr =
        if family == libc::AF_INET { [127, 0, 0, 1].into() } else { std::net::Ipv6Addr::LOCALHOST.into() };
    let (first, port) = (1, 0);
    socket::set_int(fd, libc::IPPROTO_TCP, libc::TCP_REPAIR, 1)?;
    socket::bind(fd, &to_kernel(SocketAddr::new(loopback, port), family))?;
    let local =
        super::address::from_kernel(&socket::local_name(fd)?).ok_or_else(|| std::io::Error::other("no address"))?;
    let peer = SocketAddr::new(loopback, 9);
    tcp_repair::select(fd, Queue::Send)?;
    tcp_repair::set_sequence(fd, first)?;
    tcp_repair::select(fd, Queue::Receive)?;
    tcp_repair::set_sequence(fd, first)?;
    socket::connect(fd, &to_kernel(peer, family))?;
    super::common::make_room(fd, libc::SO_RCVBUFFORCE, unread.len())?;
    super::tcp_queues::fill(fd, Queue::Receive, unread)?;
    let segment = Segment {
        from: peer,
        to: local,
        sequence: first.wrapping_add(unread.len() as u32),
        acknowledges: first,
        flags: ACK,
    };
    socket::attach_filter(fd, &ONLY_OURS)?;
    if reset {
        Segment { flags: RST | ACK, ..segment }.deliver()?;
    } else {
        Segment { flags: FIN | ACK, ..segment }.deliver()?;
        expect_phase(fd, Phase::CloseWait)?;
        tcp_repair::select(fd, Queue::Send)?;
        socket::shutdown(fd, libc::SHUT_WR)?;
        let sequence = segment.sequence.wrapping_add(1);
        Segment { sequence, acknowledges: first.wrapping_add(1), ..segment }.deliver()?;
    }
    expect(fd, |state| state == super::tcp::CLOSE)?;
    socket::set_int(fd, libc::SOL_SOCKET, libc::SO_DETACH_FILTER, 0)?;
    tcp_repair::leave_repair(fd, true)
}

/// A TCP segment without data, from a peer to a socket of this network namespace.
#[derive(Clone, Copy)]
struct Segment {
    from: SocketAddr,
    to: SocketAddr,
    sequence: u32,
    acknowledges: u32,
    flags: u8,
}

impl Segment {
    fn deliver(self) -> std::io::Result<()> {
        let (from, to) = (on_the_wire(self.from), on_the_wire(self.to));
        let (family, packet) = match (from.ip(), to.ip()) {
            (IpAddr::V4(a), IpAddr::V4(b)) => (libc::AF_INET, self.packet_v4(a.octets(), b.octets())),
            (IpAddr::V6(a), IpAddr::V6(b)) => (libc::AF_INET6, self.packet_v6(a.octets(), b.octets())),
            _ => return Err(std::io::Error::other("the two ends are of different families")),
        };
        let raw = socket::socket(family, libc::SOCK_RAW, libc::IPPROTO_RAW)?;
        socket::set_int(raw.as_fd(), libc::SOL_SOCKET, libc::SO_MARK, MARK as i32)?;
        let to = to_kernel(SocketAddr::new(to.ip(), 0), family);
        socket::send_to(raw.as_fd(), &packet, 0, &to).map(drop)
    }

    /// The TCP header, its checksum filled in for the given pseudo header.
    fn header(&self, pseudo: &[u8]) -> Vec<u8> {
        let mut tcp = Vec::with_capacity(20);
        tcp.extend(self.from.port().to_be_bytes());
        tcp.extend(self.to.port().to_be_bytes());
        tcp.extend(self.sequence.to_be_bytes());
        tcp.extend(self.acknowledges.to_be_bytes());
        // Five words of header, no window (what is unsent stays so), no checksum yet, no urgent data.
        tcp.extend([5 << 4, self.flags, 0, 0, 0, 0, 0, 0]);
        let sum = checksum(&[pseudo, &tcp].concat());
        tcp[16..18].copy_from_slice(&sum.to_be_bytes());
        tcp
    }

    fn packet_v4(&self, from: [u8; 4], to: [u8; 4]) -> Vec<u8> {
        let pseudo = [&from[..], &to, &[0, libc::IPPROTO_TCP as u8, 0, 20]].concat();
        // Version 4, five words, 40 bytes, don't fragment, 64 hops; the kernel fills the checksum in.
        let mut packet = vec![0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, libc::IPPROTO_TCP as u8, 0, 0];
        packet.extend(from);
        packet.extend(to);
        packet.extend(self.header(&pseudo));
        packet
    }

    fn packet_v6(&self, from: [u8; 16], to: [u8; 16]) -> Vec<u8> {
        let pseudo = [&from[..], &to, &[0, 0, 0, 20, 0, 0, 0, libc::IPPROTO_TCP as u8]].concat();
        let mut packet = vec![0x60, 0, 0, 0, 0, 20, libc::IPPROTO_TCP as u8, 64];
        packet.extend(from);
        packet.extend(to);
        packet.extend(self.header(&pseudo));
        packet
    }
}

/// The internet checksum.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|c| u32::from(c[0]) << 8 | u32::from(*c.get(1).unwrap_or(&0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod unit {
    #[test]
    fn the_checksum_is_that_of_rfc_1071() {
        assert_eq!(super::checksum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), !0xddf2);
    }
}
