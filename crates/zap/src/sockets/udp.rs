//! UDP and UDP-Lite sockets, and the datagram sockets of `ping`.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use serde::{Deserialize, Serialize};

use super::common::{self, Name, SocketOptions, make_room};
use super::hidden::{self, Hidden};
use super::multicast::{self, Membership};
use super::udp_held::{self, HeldBack};
use super::{address, packet, unkept};
use crate::error::{CaptureError, Context, RebuildError};
use crate::files::{Descriptor, FileKind, decoded};
use crate::ids::FileId;
use crate::image::{self, DataRef};
use crate::look::Look;
use crate::rebuild::Rebuild;
use crate::sys::{message, socket};

const UDP_CORK: i32 = 1;
const UDP_NO_CHECK6_TX: i32 = 101;
const UDP_NO_CHECK6_RX: i32 = 102;
pub(super) const UDP_SEGMENT: i32 = 103;
const UDP_GRO: i32 = 104;
const UDP_ENCAP: i32 = 100;
const IPPROTO_UDPLITE: i32 = 136;
/// How much of a datagram the checksum is to cover, sent and received.
const UDPLITE_SEND_CSCOV: i32 = 10;
const UDPLITE_RECV_CSCOV: i32 = 11;

const UDP: &[Name] = &[
    (libc::IPPROTO_UDP, UDP_CORK),
    (libc::IPPROTO_UDP, UDP_ENCAP),
    (libc::IPPROTO_UDP, UDP_NO_CHECK6_TX),
    (libc::IPPROTO_UDP, UDP_NO_CHECK6_RX),
    (libc::IPPROTO_UDP, UDP_SEGMENT),
    (libc::IPPROTO_UDP, UDP_GRO),
    (IPPROTO_UDPLITE, UDPLITE_SEND_CSCOV),
    (IPPROTO_UDPLITE, UDPLITE_RECV_CSCOV),
];

/// A UDP socket.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UdpState {
    /// `AF_INET` or `AF_INET6`.
    pub family: i32,
    /// `IPPROTO_UDP`, UDP-Lite's, or ICMP's.
    pub protocol: i32,
    /// Options.
    pub options: SocketOptions,
    /// Where it is bound.
    pub local: Option<SocketAddr>,
    /// Whom it is connected to.
    pub peer: Option<SocketAddr>,
    /// The multicast groups that it has joined.
    #[serde(default)]
    pub memberships: Vec<Membership>,
    /// What it has received and not read.
    pub queue: Vec<Datagram>,
    /// What it holds back of a datagram in the making.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_back: Option<HeldBack>,
}

/// A datagram that was not read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Datagram {
    /// Who sent it.
    pub from: SocketAddr,
    /// To which of our addresses.
    pub to: SocketAddr,
    /// Its bytes.
    pub bytes: DataRef,
}

/// UDP.
pub struct Udp;

impl FileKind for Udp {
    fn name(&self) -> &'static str {
        "udp"
    }

    fn recognizes(&self, descriptor: &Descriptor) -> bool {
        let get = |name| socket::get_int(descriptor.as_fd(), libc::SOL_SOCKET, name).unwrap_or(-1);
        descriptor.link.starts_with(b"socket:")
            && matches!(get(libc::SO_DOMAIN), libc::AF_INET | libc::AF_INET6)
            && get(libc::SO_TYPE) == libc::SOCK_DGRAM
            && matches!(
                get(libc::SO_PROTOCOL),
                libc::IPPROTO_UDP | IPPROTO_UDPLITE | libc::IPPROTO_ICMP | libc::IPPROTO_ICMPV6
            )
    }

    fn look_ahead(&self, look: &mut Look<'_>, descriptor: &Descriptor) -> Result<(), CaptureError> {
        look.sockets.hear = true;
        if udp_held::may_hold_back(descriptor.as_fd()) {
            udp_held::prepare();
        }
        hidden::prepare(descriptor.as_fd());
        Ok(())
    }

    fn check(&self, descriptor: &Descriptor) -> Result<(), CaptureError> {
        unkept::refuse_udp(descriptor)
    }

    fn capture(&self, look: &mut Look<'_>, descriptor: &Descriptor) -> Result<Vec<u8>, CaptureError> {
        let fd = descriptor.as_fd();
        let get = |level, name| socket::get_int(fd, level, name).capturing("reading an option", descriptor.object());
        let (family, protocol) = (get(libc::SOL_SOCKET, libc::SO_DOMAIN)?, get(libc::SOL_SOCKET, libc::SO_PROTOCOL)?);
        let v6: &[&[Name]] = if family == libc::AF_INET6 { &[common::IPV6, common::DATAGRAM6] } else { &[] };
        let mut options = SocketOptions::capture(
            descriptor,
            &[&[UDP, common::DATAGRAM, common::IPV4, common::DATAGRAM4], v6].concat(),
        )?;
        options.add_headers(fd, family);
        unkept::refuse_udp(descriptor)?;
        let is_udp = matches!(protocol, libc::IPPROTO_UDP | IPPROTO_UDPLITE);
        let held_back = if is_udp && udp_held::may_hold_back(fd) { held_back(look, descriptor)? } else { None };
        let (local, peer) = super::tcp::ends(descriptor)?;
        options.shutdown = shut(fd).capturing("polling", descriptor.object())?;
        if peer.is_none() {
            options.add_numbers(fd, common::UNCONNECTED);
        }
        let queue = capture_queue(look, descriptor, &options, is_udp)?;
        let init = look.init;
        let groups = look.sockets.groups(init).capturing("listing multicast groups for", descriptor.object())?;
        let memberships = multicast::memberships(fd, family, groups);
        let local = common::bound_to(local, &options);
        Ok(image::encode(&UdpState { family, protocol, options, local, peer, memberships, queue, held_back }))
    }

    fn open(&self, rebuild: &mut Rebuild<'_>, id: FileId, state: &[u8]) -> Result<OwnedFd, RebuildError> {
        let state: UdpState = decoded(state)?;
        let what = describe(id, &state);
        let socket = socket::socket(state.family, libc::SOCK_DGRAM, state.protocol).rebuilding("making", &what)?;
        let fd = socket.as_fd();
        state.options.prepare(fd, &what)?;
        socket::set_int(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1).rebuilding("setting up", &what)?;
        if let Some(local) = state.local {
            common::with_any_address(fd, state.family, || {
                socket::bind(fd, &address::to_kernel(local, state.family)).rebuilding("binding", &what)
            })?;
        }
        multicast::join_all(fd, &state.memberships).rebuilding("joining a group with", &what)?;
        // Before it is connected: it may have received from others then.
        for datagram in &state.queue {
            let bytes =
                crate::files::data_of(rebuild.image, datagram.bytes).rebuilding("reading the queue of", &what)?;
            make_room(fd, libc::SO_RCVBUFFORCE, 16 << 20).rebuilding("making room in", &what)?;
            send_again(datagram, state.protocol, &bytes).rebuilding("filling the queue of", &what)?;
        }
        if let Some(peer) = state.peer {
            socket::connect(fd, &address::to_kernel(peer, state.family)).rebuilding("connecting", &what)?;
        }
        Ok(socket)
    }

    fn connect(&self, rebuild: &mut Rebuild<'_>, id: FileId, state: &[u8]) -> Result<(), RebuildError> {
        let state: UdpState = decoded(state)?;
        let what = describe(id, &state);
        state.options.finish(rebuild.file(id)?, &what)?;
        // Of a socket without a peer the kernel does it, and says that there is none.
        match state.options.shut(rebuild.file(id)?) {
            Err(e) if e.raw_os_error() != Some(libc::ENOTCONN) => return Err(e).rebuilding("shutting down", &what),
            _ => {}
        }
        match &state.held_back {
            Some(held) => udp_held::restart(rebuild, rebuild.file(id)?, held, &what),
            None => Ok(()),
        }
    }
}

/// What a socket holds back that has sent something which has not left: perhaps nothing, if that waits for the address of
/// a neighbour.
fn held_back(look: &mut Look<'_>, descriptor: &Descriptor) -> Result<Option<HeldBack>, CaptureError> {
    match udp_held::capture(look, descriptor) {
        Err(CaptureError::Refused { .. }) if look.sockets.awaits_neighbour(look.init) => Ok(None),
        captured => captured,
    }
}

fn capture_queue(
    look: &mut Look<'_>,
    descriptor: &Descriptor,
    options: &SocketOptions,
    is_udp: bool,
) -> Result<Vec<Datagram>, CaptureError> {
    let fd = descriptor.as_fd();
    let ready = socket::readiness(fd, libc::POLLIN).capturing("polling", descriptor.object())?;
    if ready & libc::POLLIN == 0 {
        return Ok(Vec::new());
    }
    let shared = options.number((libc::SOL_SOCKET, libc::SO_REUSEPORT)).is_some_and(|v| v != 0);
    for (is_so, why) in [
        (shared, "shares its port and has unread datagrams, which cannot be checkpointed yet"),
        (ready & libc::POLLERR != 0, "has an error to tell before its datagrams, which cannot be checkpointed yet"),
    ] {
        if is_so {
            return Err(descriptor.refuse(why));
        }
    }
    let walked = with_destinations(fd, || match socket::get_int(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF) {
        Ok(_) => common::peeking_by_offset(fd, |_| walk(fd, usize::MAX)),
        // Of the sockets of `ping` the first is all that can be seen.
        Err(_) => walk(fd, 1),
    });
    let walked = walked.capturing("walking the queue", descriptor.object())?;
    let shown: Vec<usize> = walked.iter().map(|(_, bytes)| bytes.len()).collect();
    let strange = || CaptureError::Unexpected { object: descriptor.object(), what: "address of a datagram".into() };
    let keep = |(message, bytes): (message::Message, Vec<u8>)| {
        let from = address::from_kernel(&message.name).ok_or_else(strange)?;
        let to = address::from_kernel(&message.destination).ok_or_else(strange)?;
        Ok(Datagram { from, to, bytes: look.data.append(bytes) })
    };
    let mut queue = walked.into_iter().map(keep).collect::<Result<Vec<_>, _>>()?;
    if is_udp {
        let found = hidden::find(fd, true, &shown, hidden::udp_ends);
        for Hidden { before, found: (from, to) } in found.into_iter().rev() {
            queue.insert(before, Datagram { from, to, bytes: look.data.append(Vec::new()) });
        }
    }
    Ok(queue)
}

/// What `shutdown(2)` did to it, as far as it shows: that nothing is to be read, or that all is over.
fn shut(fd: BorrowedFd<'_>) -> io::Result<u8> {
    let ready = socket::readiness(fd, libc::POLLRDHUP)?;
    Ok(if ready & libc::POLLHUP != 0 { 3 } else { u8::from(ready & libc::POLLRDHUP != 0) })
}

/// Reads the queue, up to so many datagrams, and leaves it.
fn walk(fd: BorrowedFd<'_>, most: usize) -> io::Result<Vec<(message::Message, Vec<u8>)>> {
    const PEEK: i32 = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    let mut walked = Vec::new();
    let mut buffer = vec![0; 65536];
    while walked.len() < most {
        match message::receive(fd, &mut buffer, PEEK) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
            Err(e) => return Err(e),
            Ok(message) => {
                let bytes = buffer[..message.length].to_vec();
                walked.push((message, bytes));
            }
        }
    }
    Ok(walked)
}

/// Runs `read` with the socket telling where datagrams were sent to.
fn with_destinations<T>(fd: BorrowedFd<'_>, read: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let options = [(libc::IPPROTO_IP, libc::IP_RECVORIGDSTADDR), (libc::IPPROTO_IPV6, libc::IPV6_RECVORIGDSTADDR)];
    let before = options.map(|(level, name)| socket::get_int(fd, level, name));
    for ((level, name), _) in options.iter().zip(&before).filter(|(_, b)| b.is_ok()) {
        socket::set_int(fd, *level, *name, 1)?;
    }
    let result = read();
    for ((level, name), value) in options.iter().zip(before) {
        if let Ok(value) = value {
            socket::set_int(fd, *level, *name, value)?;
        }
    }
    result
}

/// Delivers a datagram to the socket that is bound to where it goes.
fn send_again(datagram: &Datagram, protocol: i32, bytes: &[u8]) -> io::Result<()> {
    let (from, to) = (datagram.from, datagram.to);
    if matches!(protocol, libc::IPPROTO_ICMP | libc::IPPROTO_ICMPV6) {
        // A reader gets the whole message, and the number of the socket is in it.
        return packet::deliver(from, to, protocol, 2, bytes.to_vec(), 0);
    }
    let mut payload = Vec::with_capacity(8 + bytes.len());
    payload.extend(from.port().to_be_bytes());
    payload.extend(to.port().to_be_bytes());
    // Of UDP-Lite, this says how much is covered by the checksum: all.
    let length = if protocol == IPPROTO_UDPLITE { 0 } else { 8 + bytes.len() as u16 };
    payload.extend(length.to_be_bytes());
    payload.extend([0, 0]);
    payload.extend(bytes);
    packet::deliver(from, to, protocol, 6, payload, 0)
}

fn describe(id: FileId, state: &UdpState) -> String {
    match (state.local, state.peer) {
        (None, _) => format!("{id}, an unbound UDP socket"),
        (Some(local), None) => format!("{id}, the UDP socket bound to {local}"),
        (Some(local), Some(peer)) => format!("{id}, the UDP socket {local} to {peer}"),
    }
}
