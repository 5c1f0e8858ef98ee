//! Closing the halves of a rebuilt connection that were closed.
//!
//! Our own FIN can be queued in repair mode. That the peer sent one, or acknowledged ours, the kernel believes only
//! from a packet: one is made here and goes over the pod's loopback, while the socket's filter drops all other packets
//! (so that nobody's answer to what the kernel replies can reset the connection).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::BorrowedFd;

use super::address::to_kernel;
use super::packet;
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

/// The peer's acknowledgement of everything before the send queue, when nothing was received yet.
pub(super) fn acknowledge(fd: BorrowedFd<'_>, connection: &Connection) -> std::io::Result<()> {
    socket::attach_filter(fd, &ONLY_OURS)?;
    let (sequence, acknowledges) = (connection.receive_from, connection.send_from);
    let (from, to) = (connection.peer, connection.local);
    let echo = match connection.agreed.timestamp {
        // The kernel takes the time from an echo alone: not from bytes that were never really sent.
        Some(_) => Some(socket::get_int(fd, libc::IPPROTO_TCP, socket::TCP_TIMESTAMP)? as u32),
        None => None,
    };
    let delivered = Segment { from, to, sequence, acknowledges, flags: ACK, echo }.deliver();
    let arrived = delivered.and_then(|()| until(|| Ok(socket::ioctl_int(fd, libc::TIOCOUTQ)? == 0)));
    socket::set_int(fd, libc::SOL_SOCKET, libc::SO_DETACH_FILTER, 0)?;
    arrived
}

/// The packets that a peer would have sent.
fn tell(fd: BorrowedFd<'_>, connection: &Connection) -> std::io::Result<()> {
    let received = connection.receive_from.wrapping_add(connection.receive.length as u32);
    let segment = Segment {
        from: connection.peer,
        to: connection.local,
        sequence: received,
        flags: ACK,
        acknowledges: 0,
        echo: None,
    };
    if connection.phase == Phase::FinWait2 {
        let end = connection.send_from.wrapping_add(1);
        Segment { acknowledges: end, ..segment }.deliver()?;
    } else {
        let end = Segment { acknowledges: connection.send_from, flags: FIN | ACK, ..segment };
        end.deliver()?;
        // The first is acknowledged some 40 ms later, when nothing shields the socket from the answer of a host (or of the
        // pod) where the other end is gone by now; one that comes again is acknowledged at once.
        end.deliver()?;
    }
    expect_phase(fd, connection.phase)
}

fn expect_phase(fd: BorrowedFd<'_>, phase: Phase) -> std::io::Result<()> {
    let wanted = if phase == Phase::LastAck { Phase::CloseWait } else { phase };
    until(|| Ok(Phase::of_state(super::tcp::Info::read(fd)?.state()) == Some(wanted)))
}

/// Loopback delivers before the call that sends returns, or a moment later when another CPU has the packet.
fn until(arrived: impl Fn() -> std::io::Result<bool>) -> std::io::Result<()> {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(2);
    while !arrived()? {
        if std::time::Instant::now() > deadline {
            return Err(std::io::Error::other("a packet over loopback did not arrive; is it filtered?"));
        }
        std::thread::yield_now();
    }
    Ok(())
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
    (family, local): (i32, Option<SocketAddr>),
    reset: bool,
    receive: DataRef,
    image: &ImageReader,
    what: &str,
) -> Result<(), RebuildError> {
    let unread = image.read(receive).map_err(|e| RebuildError::Damaged(e.to_string()))?;
    end_with(fd, (family, local), reset, &unread).rebuilding("ending the connection of", what)
}

fn end_with(
    fd: BorrowedFd<'_>,
    (family, local): (i32, Option<SocketAddr>),
    reset: bool,
    unread: &[u8],
) -> std::io::Result<()> {
    let mapped = matches!(local.map(|local| local.ip()), Some(IpAddr::V6(ip)) if ip.to_ipv4_mapped().is_some());
    let loopback: IpAddr = match family {
        libc::AF_INET => [127, 0, 0, 1].into(),
        _ if mapped => Ipv4Addr::LOCALHOST.to_ipv6_mapped().into(),
        _ => Ipv6Addr::LOCALHOST.into(),
    };
    let first = 1;
    socket::set_int(fd, libc::IPPROTO_TCP, libc::TCP_REPAIR, 1)?;
    let local = local.unwrap_or_else(|| SocketAddr::new(loopback, 0));
    socket::bind(fd, &to_kernel(local, family))?;
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
        echo: None,
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
    until(|| Ok(super::tcp::Info::read(fd)?.state() == super::tcp::CLOSE))?;
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
    /// The timestamp of ours that it answers.
    echo: Option<u32>,
}

impl Segment {
    fn deliver(self) -> std::io::Result<()> {
        packet::deliver(self.from, self.to, libc::IPPROTO_TCP, 16, self.header(), MARK)
    }

    /// The TCP header, without its checksum.
    fn header(&self) -> Vec<u8> {
        let mut tcp = Vec::with_capacity(20);
        tcp.extend(self.from.port().to_be_bytes());
        tcp.extend(self.to.port().to_be_bytes());
        tcp.extend(self.sequence.to_be_bytes());
        tcp.extend(self.acknowledges.to_be_bytes());
        // Five words of header and three of options; no window (what is unsent stays so), no urgent data.
        let words = if self.echo.is_some() { 8 } else { 5 };
        tcp.extend([words << 4, self.flags, 0, 0, 0, 0, 0, 0]);
        if let Some(echo) = self.echo {
            // Padding, and a timestamp option whose own time is zero: the peer's next one is later, whatever it is.
            tcp.extend([1, 1, 8, 10, 0, 0, 0, 0]);
            tcp.extend(echo.to_be_bytes());
        }
        tcp
    }
}
