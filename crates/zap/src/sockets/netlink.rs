//! Netlink sockets that wait for nothing: under the same port id, in the same groups.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use serde::{Deserialize, Serialize};

use super::common::{Name, SocketOptions};
use crate::error::{CaptureError, Context, RebuildError};
use crate::files::{Descriptor, FileKind, decoded};
use crate::ids::FileId;
use crate::image;
use crate::look::Look;
use crate::rebuild::Rebuild;
use crate::sys::socket;

const ADD_MEMBERSHIP: i32 = 1;
const LIST_MEMBERSHIPS: i32 = 9;

/// Packet information, broadcast errors, no ENOBUFS, all namespaces, short and extended acknowledgements, strict checks.
const OPTIONS: &[Name] = &[
    (libc::SOL_NETLINK, 3),
    (libc::SOL_NETLINK, 4),
    (libc::SOL_NETLINK, 5),
    (libc::SOL_NETLINK, 8),
    (libc::SOL_NETLINK, 10),
    (libc::SOL_NETLINK, 11),
    (libc::SOL_NETLINK, 12),
    (libc::SOL_SOCKET, libc::SO_PASSCRED),
];

/// A netlink socket.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NetlinkState {
    /// `SOCK_RAW` or `SOCK_DGRAM`.
    pub kind: i32,
    /// `NETLINK_ROUTE` and so on.
    pub protocol: i32,
    /// Options.
    pub options: SocketOptions,
    /// Its port id; zero if it is not bound.
    pub port: u32,
    /// The groups that it listens to.
    pub groups: Vec<u32>,
    /// To whom it sends by default: port id and groups.
    pub peer: (u32, u32),
}

/// Netlink.
pub struct Netlink;

impl FileKind for Netlink {
    fn name(&self) -> &'static str {
        "netlink"
    }

    fn recognizes(&self, descriptor: &Descriptor) -> bool {
        descriptor.link.starts_with(b"socket:")
            && socket::get_int(descriptor.as_fd(), libc::SOL_SOCKET, libc::SO_DOMAIN)
                .is_ok_and(|d| d == libc::AF_NETLINK)
    }

    fn check(&self, descriptor: &Descriptor) -> Result<(), CaptureError> {
        let protocol = socket::get_int(descriptor.as_fd(), libc::SOL_SOCKET, libc::SO_PROTOCOL);
        refuse_protocol(descriptor, protocol.capturing("asking the protocol of", descriptor.object())?)
    }

    fn capture(&self, _look: &mut Look<'_>, descriptor: &Descriptor) -> Result<Vec<u8>, CaptureError> {
        let fd = descriptor.as_fd();
        let get =
            |name| socket::get_int(fd, libc::SOL_SOCKET, name).capturing("reading an option", descriptor.object());
        let (kind, protocol) = (get(libc::SO_TYPE)?, get(libc::SO_PROTOCOL)?);
        refuse_protocol(descriptor, protocol)?;
        let ready = socket::readiness(fd, libc::POLLIN).capturing("polling", descriptor.object())?;
        if ready & libc::POLLIN != 0 {
            return Err(descriptor.refuse("is a netlink socket with unread messages, which cannot be checkpointed yet"));
        }
        let groups = groups(fd).capturing("listing the groups of", descriptor.object())?;
        if protocol == libc::NETLINK_GENERIC && !groups.is_empty() {
            let why = "listens to generic netlink groups, whose numbers are this host's; it cannot be checkpointed yet";
            return Err(descriptor.refuse(why));
        }
        let local = socket::local_name(fd).capturing("asking the address of", descriptor.object())?;
        let peer = socket::peer_name(fd).map(|p| port_and_groups(&p)).unwrap_or_default();
        let options = SocketOptions::capture(descriptor, &[OPTIONS])?;
        let state = NetlinkState { kind, protocol, options, port: port_and_groups(&local).0, groups, peer };
        Ok(image::encode(&state))
    }

    fn open(&self, _rebuild: &mut Rebuild<'_>, id: FileId, state: &[u8]) -> Result<OwnedFd, RebuildError> {
        let state: NetlinkState = decoded(state)?;
        let what = describe(id, &state);
        let socket = socket::socket(libc::AF_NETLINK, state.kind, state.protocol).rebuilding("making", &what)?;
        let fd = socket.as_fd();
        state.options.prepare(fd, &what)?;
        if state.port != 0 {
            socket::bind(fd, &to_kernel((state.port, 0))).rebuilding("binding", &what)?;
        }
        for group in &state.groups {
            socket::set_int(fd, libc::SOL_NETLINK, ADD_MEMBERSHIP, *group as i32)
                .rebuilding("joining a group", &what)?;
        }
        if state.peer != (0, 0) {
            socket::connect(fd, &to_kernel(state.peer)).rebuilding("connecting", &what)?;
        }
        Ok(socket)
    }

    fn connect(&self, rebuild: &mut Rebuild<'_>, id: FileId, state: &[u8]) -> Result<(), RebuildError> {
        let state: NetlinkState = decoded(state)?;
        state.options.finish(rebuild.file(id)?, &describe(id, &state))
    }
}

/// Those whose kernel side keeps nothing about a socket that asks nothing.
fn refuse_protocol(descriptor: &Descriptor, protocol: i32) -> Result<(), CaptureError> {
    match protocol {
        libc::NETLINK_ROUTE | libc::NETLINK_KOBJECT_UEVENT | libc::NETLINK_AUDIT | libc::NETLINK_GENERIC => Ok(()),
        4 => Ok(()),
        other => {
            Err(descriptor.refuse(format!("is a netlink socket of protocol {other}, which cannot be checkpointed yet")))
        }
    }
}

/// A bit map, as long as the protocol has groups.
fn groups(fd: BorrowedFd<'_>) -> std::io::Result<Vec<u32>> {
    let mut map = [0; 64];
    let length = socket::get_bytes(fd, libc::SOL_NETLINK, LIST_MEMBERSHIPS, &mut map)?;
    let bits = (0..length as u32 * 8).filter(|bit| map[*bit as usize / 8] & 1 << (bit % 8) != 0);
    Ok(bits.map(|bit| bit + 1).collect())
}

pub(super) fn port_and_groups(address: &[u8]) -> (u32, u32) {
    let word = |at: usize| address.get(at..at + 4).and_then(|w| w.first_chunk()).map_or(0, |w| u32::from_ne_bytes(*w));
    (word(4), word(8))
}

fn to_kernel((port, groups): (u32, u32)) -> Vec<u8> {
    let mut address = (libc::AF_NETLINK as u32).to_ne_bytes().to_vec();
    address.extend(port.to_ne_bytes());
    address.extend(groups.to_ne_bytes());
    address
}

fn describe(id: FileId, state: &NetlinkState) -> String {
    format!("{id}, the netlink socket of protocol {} with the port id {}", state.protocol, state.port)
}
