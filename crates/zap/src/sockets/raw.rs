//! Raw sockets of IPv4 and IPv6: `ping`, `traceroute`, routing daemons.
//!
//! What one has received and not read is lost, as if there had been no room for it: the kernel lets nobody look behind
//! the first packet, and takes none back.

use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use serde::{Deserialize, Serialize};

use super::address;
use super::common::{self, Name, SocketOptions};
use super::multicast::{self, Membership};
use super::silence::Silenced;
use crate::error::{CaptureError, Context, RebuildError};
use crate::files::{Descriptor, FileKind, decoded};
use crate::ids::{FileId, HostPid, PodPid};
use crate::image;
use crate::look::Look;
use crate::rebuild::Rebuild;
use crate::sys::socket;

const SOL_RAW: i32 = 255;
const IP_NODEFRAG: i32 = 22;
const IPV6_CHECKSUM: i32 = 7;
const IPV6_HDRINCL: i32 = 36;

/// Headers of one's own making, which kinds of ICMP to leave out, checksums.
const RAW4: &[Name] = &[(libc::IPPROTO_IP, libc::IP_HDRINCL), (libc::IPPROTO_IP, IP_NODEFRAG), (SOL_RAW, 1)];
const RAW6: &[Name] = &[(SOL_RAW, IPV6_CHECKSUM), (libc::IPPROTO_IPV6, IPV6_HDRINCL)];
/// Which kinds of ICMPv6 to leave out, and how long that list is.
const ICMP6_FILTER: (Name, usize) = ((libc::IPPROTO_ICMPV6, 1), 32);

/// A raw socket.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RawState {
    /// `AF_INET` or `AF_INET6`.
    pub family: i32,
    /// The protocol of the packets that it sees.
    pub protocol: i32,
    /// Options, without the filter.
    pub options: SocketOptions,
    /// The filter.
    pub filter: Silenced,
    /// Where it is bound; ports mean nothing.
    pub local: Option<SocketAddr>,
    /// Whom it is connected to.
    pub peer: Option<SocketAddr>,
    /// The multicast groups that it has joined.
    pub memberships: Vec<Membership>,
}

/// Raw sockets.
pub struct Raw;

impl FileKind for Raw {
    fn name(&self) -> &'static str {
        "raw"
    }

    fn recognizes(&self, descriptor: &Descriptor) -> bool {
        let get = |name| socket::get_int(descriptor.as_fd(), libc::SOL_SOCKET, name).unwrap_or(-1);
        descriptor.link.starts_with(b"socket:")
            && matches!(get(libc::SO_DOMAIN), libc::AF_INET | libc::AF_INET6)
            && get(libc::SO_TYPE) == libc::SOCK_RAW
    }

    fn capture(&self, look: &mut Look<'_>, descriptor: &Descriptor) -> Result<Vec<u8>, CaptureError> {
        let fd = descriptor.as_fd();
        let get =
            |name| socket::get_int(fd, libc::SOL_SOCKET, name).capturing("reading an option", descriptor.object());
        let (family, protocol) = (get(libc::SO_DOMAIN)?, get(libc::SO_PROTOCOL)?);
        let v6: &[&[Name]] = if family == libc::AF_INET6 { &[common::IPV6, common::DATAGRAM6, RAW6] } else { &[] };
        let mut options = SocketOptions::capture(
            descriptor,
            &[&[common::DATAGRAM, common::IPV4, common::DATAGRAM4, RAW4], v6].concat(),
        )?;
        options.add_structure(fd, ICMP6_FILTER);
        let (local, peer) = super::tcp::ends(descriptor)?;
        let init = look.init;
        let groups = look.sockets.groups(init).capturing("listing multicast groups for", descriptor.object())?;
        let state = RawState {
            family,
            protocol,
            filter: Silenced::take(&mut options),
            memberships: multicast::memberships(fd, family, groups),
            local: (!local.ip().is_unspecified()).then_some(local),
            peer,
            options,
        };
        Ok(image::encode(&state))
    }

    fn open(&self, _rebuild: &mut Rebuild<'_>, id: FileId, state: &[u8]) -> Result<OwnedFd, RebuildError> {
        let state: RawState = decoded(state)?;
        let what = describe(id, &state);
        let socket = socket::socket(state.family, libc::SOCK_RAW, state.protocol).rebuilding("making", &what)?;
        let fd = socket.as_fd();
        Silenced::silence(fd).rebuilding("silencing", &what)?;
        state.options.prepare(fd, &what)?;
        let to_kernel = |mut end: SocketAddr| {
            end.set_port(0);
            address::to_kernel(end, state.family)
        };
        if let Some(local) = state.local {
            common::with_any_address(fd, state.family, || {
                socket::bind(fd, &to_kernel(local)).rebuilding("binding", &what)
            })?;
        }
        multicast::join_all(fd, &state.memberships).rebuilding("joining a group with", &what)?;
        if let Some(peer) = state.peer {
            socket::connect(fd, &to_kernel(peer)).rebuilding("connecting", &what)?;
        }
        state.options.finish(fd, &what)?;
        Ok(socket)
    }

    fn settle(
        &self,
        file: BorrowedFd<'_>,
        state: &[u8],
        _host_pid: &dyn Fn(PodPid) -> Option<HostPid>,
    ) -> Result<(), RebuildError> {
        let state: RawState = decoded(state)?;
        state.filter.restart(file).rebuilding("attaching the filter", "a raw socket")
    }

    fn needs_settling(&self, _state: &[u8]) -> bool {
        true
    }
}

fn describe(id: FileId, state: &RawState) -> String {
    format!("{id}, the raw socket of IP protocol {}", state.protocol)
}
