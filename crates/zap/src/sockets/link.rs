//! Packet sockets: DHCP clients, `tcpdump`, `arping`. What the sockets themselves do not tell, `sock_diag` does: rings,
//! and what is listened to beyond one's own address.
//!
//! What one has received and not read is lost, and so is what is in its rings, as if there had been no room for it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use serde::{Deserialize, Serialize};

use super::common::{Name, SocketOptions};
use super::diag;
use super::silence::Silenced;
use crate::error::{CaptureError, Context, RebuildError};
use crate::files::{Descriptor, FileKind, decoded};
use crate::ids::{FileId, HostPid, PodPid};
use crate::image;
use crate::look::Look;
use crate::rebuild::Rebuild;
use crate::sys::{nsfs, socket};

const ADD_MEMBERSHIP: i32 = 1;
const RX_RING: i32 = 5;
const VERSION: i32 = 10;
const TX_RING: i32 = 13;
const FANOUT: i32 = 18;
/// Ways to share packets that run a program: CBPF, EBPF.
const FANOUT_PROGRAMS: [i32; 2] = [6, 7];

/// What must be said before there are rings.
const FIRST: &[i32] = &[VERSION, 12, 15, 24];
/// Copies, auxiliary data, original device, lost packets, time stamps, offsets, no queue, nothing outgoing.
const OTHERS: &[i32] = &[7, 8, 9, 14, 17, 19, 20, 23];

/// A packet socket.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LinkState {
    /// `SOCK_RAW` or `SOCK_DGRAM`.
    pub kind: i32,
    /// Options, without the filter.
    pub options: SocketOptions,
    /// The filter.
    pub filter: Silenced,
    /// Protocol, as on the wire, and interface.
    pub bound: (u16, i32),
    /// Options of packet sockets that are numbers, in the order in which they are set.
    pub numbers: Vec<(i32, i32)>,
    /// What it listens to: interface, kind, address.
    pub memberships: Vec<(i32, u16, Vec<u8>)>,
    /// Rings: option, and the request.
    pub rings: Vec<(i32, [u32; 7])>,
    /// The group that it shares packets with.
    pub fanout: i32,
}

/// Packet sockets.
pub struct Link;

impl FileKind for Link {
    fn name(&self) -> &'static str {
        "packet"
    }

    fn recognizes(&self, descriptor: &Descriptor) -> bool {
        let get = |name| socket::get_int(descriptor.as_fd(), libc::SOL_SOCKET, name).unwrap_or(-1);
        descriptor.link.starts_with(b"socket:")
            && get(libc::SO_DOMAIN) == libc::AF_PACKET
            && matches!(get(libc::SO_TYPE), libc::SOCK_RAW | libc::SOCK_DGRAM)
    }

    fn check(&self, descriptor: &Descriptor) -> Result<(), CaptureError> {
        let fanout = socket::get_int(descriptor.as_fd(), libc::SOL_PACKET, FANOUT).unwrap_or(0);
        if FANOUT_PROGRAMS.contains(&(fanout >> 16 & 0xff)) {
            return Err(descriptor.refuse("shares packets by a program (PACKET_FANOUT), which cannot be read back"));
        }
        Ok(())
    }

    fn capture(&self, _look: &mut Look<'_>, descriptor: &Descriptor) -> Result<Vec<u8>, CaptureError> {
        self.check(descriptor)?;
        let fd = descriptor.as_fd();
        let kind = socket::get_int(fd, libc::SOL_SOCKET, libc::SO_TYPE);
        let kind = kind.capturing("asking the type of", descriptor.object())?;
        let mut options = SocketOptions::capture(descriptor, &[] as &[&[Name]])?;
        let number = |name: &i32| Some((*name, socket::get_int(fd, libc::SOL_PACKET, *name).ok()?));
        let numbers: Vec<(i32, i32)> = FIRST.iter().chain(OTHERS).filter_map(number).collect();
        let name = socket::local_name(fd).capturing("asking the address of", descriptor.object())?;
        let facts = nsfs::of_socket(fd).and_then(|namespace| diag::packet(namespace, descriptor.stat.st_ino as u32));
        let facts = facts.capturing("asking sock_diag about", descriptor.object())?;
        let version = numbers.iter().find(|(name, _)| *name == VERSION).map_or(0, |(_, version)| *version);
        let state = LinkState {
            kind,
            filter: Silenced::take(&mut options),
            options,
            bound: bound(&name),
            fanout: socket::get_int(fd, libc::SOL_PACKET, FANOUT).unwrap_or(0),
            memberships: facts.memberships,
            rings: [(RX_RING, facts.received), (TX_RING, facts.sent)]
                .into_iter()
                .filter_map(|(name, ring)| Some((name, request(ring?, version))))
                .collect(),
            numbers,
        };
        Ok(image::encode(&state))
    }

    fn open(&self, _rebuild: &mut Rebuild<'_>, id: FileId, state: &[u8]) -> Result<OwnedFd, RebuildError> {
        let state: LinkState = decoded(state)?;
        let what = format!("{id}, a packet socket");
        let socket = socket::socket(libc::AF_PACKET, state.kind, 0).rebuilding("making", &what)?;
        let fd = socket.as_fd();
        Silenced::silence(fd).rebuilding("silencing", &what)?;
        state.options.prepare(fd, &what)?;
        state.set_up(fd).rebuilding("setting up", &what)?;
        state.options.finish(fd, &what)?;
        Ok(socket)
    }

    fn settle(
        &self,
        file: BorrowedFd<'_>,
        state: &[u8],
        _host_pid: &dyn Fn(PodPid) -> Option<HostPid>,
    ) -> Result<(), RebuildError> {
        let state: LinkState = decoded(state)?;
        state.filter.restart(file).rebuilding("attaching the filter", "a packet socket")
    }

    fn needs_settling(&self, _state: &[u8]) -> bool {
        true
    }
}

impl LinkState {
    fn set_up(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        for &(name, value) in &self.numbers {
            if !socket::get_int(fd, libc::SOL_PACKET, name).is_ok_and(|now| now == value) {
                socket::set_int(fd, libc::SOL_PACKET, name, value)?;
            }
        }
        for (name, ring) in &self.rings {
            let bytes: Vec<u8> = ring.iter().flat_map(|word| word.to_ne_bytes()).collect();
            // Old versions take the first four words.
            let length = if self.numbers.contains(&(VERSION, 2)) { 28 } else { 16 };
            socket::set_bytes(fd, libc::SOL_PACKET, *name, &bytes[..length])?;
        }
        let (protocol, interface) = self.bound;
        if self.bound != (0, 0) {
            let mut address = (libc::AF_PACKET as u16).to_ne_bytes().to_vec();
            address.extend(protocol.to_ne_bytes());
            address.extend(interface.to_ne_bytes());
            address.extend([0; 12]);
            socket::bind(fd, &address)?;
        }
        // The latest is the first of the kernel's list.
        for (interface, kind, address) in self.memberships.iter().rev() {
            let mut request = interface.to_ne_bytes().to_vec();
            request.extend(kind.to_ne_bytes());
            request.extend((address.len() as u16).to_ne_bytes());
            request.extend(address);
            request.resize(16, 0);
            socket::set_bytes(fd, libc::SOL_PACKET, ADD_MEMBERSHIP, &request)?;
        }
        if self.fanout != 0 {
            socket::set_int(fd, libc::SOL_PACKET, FANOUT, self.fanout)?;
        }
        Ok(())
    }
}

/// Protocol and interface of a `struct sockaddr_ll`.
pub(super) fn bound(name: &[u8]) -> (u16, i32) {
    let protocol = name.get(2..4).and_then(|p| p.first_chunk()).map_or(0, |p| u16::from_ne_bytes(*p));
    let interface = name.get(4..8).and_then(|i| i.first_chunk()).map_or(0, |i| i32::from_ne_bytes(*i));
    (protocol, interface)
}

/// `struct tpacket_req3` from `struct packet_diag_ring`: sizes and numbers of blocks and frames, and, of the third version,
/// time limit, private room, features.
fn request(ring: [u32; 7], version: i32) -> [u32; 7] {
    match version {
        2 => ring,
        _ => [ring[0], ring[1], ring[2], ring[3], 0, 0, 0],
    }
}
