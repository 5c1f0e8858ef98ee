//! Datagrams in the making (`UDP_CORK`, `MSG_MORE`): what has been sent of one so far. Only the kernel's own memory tells.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::BorrowedFd;

use serde::{Deserialize, Serialize};

use super::address;
use crate::error::{CaptureError, Context, RebuildError};
use crate::files::{Descriptor, data_of};
use crate::ids::Address;
use crate::image::DataRef;
use crate::kernel::{self, Kernel};
use crate::look::Look;
use crate::rebuild::Rebuild;
use crate::sys::{message, socket};

/// A datagram in the making.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldBack {
    /// From which of our addresses it goes.
    pub from: IpAddr,
    /// The interface that it leaves by, if addresses have a meaning there alone; else 0.
    pub interface: u32,
    /// Where it goes.
    pub to: SocketAddr,
    /// Its beginning.
    pub bytes: DataRef,
}

const UNREADABLE: &str =
    "holds back a datagram in the making (UDP_CORK, MSG_MORE), which cannot be read on this host; try again later";

/// Whether a socket has sent something that has not left yet: nearly always none has.
pub(super) fn may_hold_back(fd: BorrowedFd<'_>) -> bool {
    socket::ioctl_int(fd, libc::TIOCOUTQ).unwrap_or(0) > 0
}

/// Has what takes time done ahead of the hold.
pub(super) fn prepare() {
    drop(kernel::reader());
}

/// What a socket holds back, if anything. It has sent something that may not have left yet.
pub(super) fn capture(look: &mut Look<'_>, descriptor: &Descriptor) -> Result<Option<HeldBack>, CaptureError> {
    let Ok(mut kernel) = kernel::reader() else { return Err(descriptor.refuse(UNREADABLE)) };
    let read = read(&mut kernel, descriptor.as_fd()).capturing("reading what is held back by", descriptor.object())?;
    let read = read.map_err(|why| descriptor.refuse(why))?;
    let keep = |(Way { from, to, interface }, bytes)| HeldBack { from, to, interface, bytes: look.data.append(bytes) };
    Ok(read.map(keep))
}

/// From where to where a datagram goes.
struct Way {
    from: IpAddr,
    to: SocketAddr,
    interface: u32,
}

type Datagram = (Way, Vec<u8>);

/// Either what is held back, or why it cannot be kept.
fn read(kernel: &mut Kernel, fd: BorrowedFd<'_>) -> io::Result<Result<Option<Datagram>, &'static str>> {
    const HEADER: usize = 8;
    let socket = kernel.socket(fd)?;
    let family = kernel.word(socket, "udp_sock.pending")? as i32;
    if family == 0 {
        return Ok(Ok(None));
    }
    let cork = kernel.at(socket, "inet_sock.cork");
    let (base, flow) = (kernel.at(cork, "inet_cork_full.base"), kernel.at(cork, "inet_cork_full.fl"));
    let is_plain = is_plain(kernel, fd, base)?
        && match family {
            libc::AF_INET => is_plain4(kernel, fd, base)?,
            _ => is_plain6(kernel, fd, socket, flow)?,
        };
    if !is_plain {
        return Ok(Err("holds back a datagram with options of its own, which cannot be checkpointed yet"));
    }
    let way = if family == libc::AF_INET { way4(kernel, flow)? } else { way6(kernel, flow)? };
    let mut bytes = Vec::new();
    for (place, buffer) in kernel.queue(kernel.at(socket, "sock.sk_write_queue"))?.into_iter().enumerate() {
        let header = if place == 0 { HEADER } else { 0 };
        let Some(part) = kernel.buffer(buffer)? else { return Ok(Err(UNREADABLE)) };
        bytes.extend(part.get(before(kernel, buffer)? + header..).unwrap_or_default());
    }
    if usize::from(kernel.half(socket, "udp_sock.len")?) != bytes.len() + HEADER {
        return Err(io::Error::other("what is held back is of another length"));
    }
    Ok(Ok(Some((way, bytes))))
}

/// How many bytes of a buffer lie before what its transport has: room for the header of IP.
fn before(kernel: &mut Kernel, buffer: Address) -> io::Result<usize> {
    let transport = u64::from(kernel.half(buffer, "sk_buff.transport_header")?);
    let (head, start) = (kernel.pointer(buffer, "sk_buff.head")?, kernel.pointer(buffer, "sk_buff.data")?);
    Ok((head.0 + transport).saturating_sub(start.0) as usize)
}

/// The ports of a flow: the one to which it goes comes first.
fn port(kernel: &mut Kernel, flow: Address, ports: &str) -> io::Result<u16> {
    kernel.half(flow, ports).map(u16::from_be)
}

fn way4(kernel: &mut Kernel, flow: Address) -> io::Result<Way> {
    let from = Ipv4Addr::from(kernel.word(flow, "flowi4.saddr")?.to_ne_bytes());
    let to = Ipv4Addr::from(kernel.word(flow, "flowi4.daddr")?.to_ne_bytes());
    let to = SocketAddr::new(to.into(), port(kernel, flow, "flowi4.uli")?);
    Ok(Way { from: from.into(), to, interface: 0 })
}

fn way6(kernel: &mut Kernel, flow: Address) -> io::Result<Way> {
    let from = Ipv6Addr::from(kernel.array::<16>(kernel.at(flow, "flowi6.saddr"))?);
    let to = Ipv6Addr::from(kernel.array::<16>(kernel.at(flow, "flowi6.daddr"))?);
    let is_local = from.is_unicast_link_local() || to.is_unicast_link_local() || to.is_multicast();
    // It begins with its `struct flowi_common`.
    let interface = if is_local { kernel.word(flow, "flowi_common.flowic_oif")? } else { 0 };
    let to = SocketAddrV6::new(to, port(kernel, flow, "flowi6.uli")?, 0, interface);
    Ok(Way { from: from.into(), to: to.into(), interface })
}

/// Whether a datagram has nothing that was said with it alone: pieces, a time to go; see below.
fn is_plain(kernel: &mut Kernel, fd: BorrowedFd<'_>, base: Address) -> io::Result<bool> {
    let pieces = socket::get_int(fd, libc::IPPROTO_UDP, super::udp::UDP_SEGMENT).unwrap_or(0);
    Ok(i32::from(kernel.half(base, "inet_cork.gso_size")?) == pieces
        && kernel.pointer(base, "inet_cork.transmit_time")? == Address(0))
}

/// The same of IPv4: options, time to live, kind of service.
fn is_plain4(kernel: &mut Kernel, fd: BorrowedFd<'_>, base: Address) -> io::Result<bool> {
    let service = socket::get_int(fd, libc::IPPROTO_IP, libc::IP_TOS).unwrap_or(0) as u8;
    Ok(kernel.pointer(base, "inet_cork.opt")? == Address(0)
        && kernel.byte(base, "inet_cork.ttl")? == 0
        // Before Linux 6.15: -1, unless it was said with it.
        && [service, u8::MAX].contains(&kernel.byte(base, "inet_cork.tos")?))
}

/// The same of IPv6: options, hops, class, label.
fn is_plain6(kernel: &mut Kernel, fd: BorrowedFd<'_>, socket: Address, flow: Address) -> io::Result<bool> {
    let get = |name| socket::get_int(fd, libc::IPPROTO_IPV6, name);
    let own = kernel.pointer(socket, "inet_sock.pinet6")?;
    let cork = kernel.at(own, "ipv6_pinfo.cork");
    /// Of the first word of a header: version and class.
    const CLASS: u32 = 0x0ff0_0000;
    let label = u32::from_be(kernel.word(flow, "flowi6.flowlabel")?) & !CLASS;
    Ok(kernel.pointer(cork, "inet6_cork.opt")? == Address(0)
        && i32::from(kernel.byte(cork, "inet6_cork.hop_limit")?) == get(libc::IPV6_UNICAST_HOPS)?
        && i32::from(kernel.byte(cork, "inet6_cork.tclass")?) == get(libc::IPV6_TCLASS)?
        && label == 0)
}

/// Has a socket hold it back again.
pub(super) fn restart(
    rebuild: &Rebuild<'_>,
    fd: BorrowedFd<'_>,
    held: &HeldBack,
    what: &str,
) -> Result<(), RebuildError> {
    let bytes = data_of(rebuild.image, held.bytes).rebuilding("reading what is held back by", what)?;
    let family = socket::get_int(fd, libc::SOL_SOCKET, libc::SO_DOMAIN).rebuilding("asking", what)?;
    let to = address::to_kernel(held.to, family);
    let sent = message::send_from(fd, (held.from, held.interface), &bytes, &to, libc::MSG_MORE | libc::MSG_DONTWAIT);
    sent.rebuilding("holding back what is in the making by", what).map(drop)
}
