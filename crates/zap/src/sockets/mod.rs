//! Sockets: unix, TCP, UDP. Kinds of open file; their table lines are in [`crate::files::KINDS`].
//!
//! Everything is seen from the monitor, through copies of the pod's descriptors: socket options, queues and sequence
//! numbers belong to the socket, not to the network namespace of whoever asks. What only a namespace can tell (who is
//! the peer of a unix socket) comes from one `sock_diag` dump. A restart makes the sockets in the builder, inside the
//! pod's network namespace, while nothing can reach the pod.

mod address;
mod common;
mod connects;
mod diag;
mod handshakes;
mod hidden;
mod link;
mod multicast;
mod netlink;
mod packet;
mod raw;
mod recover;
mod silence;
mod strays;
mod tcp;
mod tcp_fin;
mod tcp_pairs;
mod tcp_queues;
mod tcp_repair;
mod tcp_urgent;
#[cfg(test)]
mod tests;
mod udp;
mod udp_held;
mod unix;
mod unix_backlog;
mod unix_creds;
mod unix_name;
mod unix_pair;
mod unix_queue;
mod unix_urgent;
mod unkept;
mod waiting;

pub use common::SocketOptions;
pub(crate) use connects::end as end_connects;
pub use diag::Sightings;
pub use handshakes::Deferring;
pub use link::{Link, LinkState};
pub use multicast::Membership;
pub use netlink::{Netlink, NetlinkState};
pub use raw::{Raw, RawState};
pub use recover::recover_all;
pub use silence::Silenced;
pub use strays::{Stage, Stray, Strays};
pub use tcp::{Form, Tcp, TcpState};
pub(crate) use tcp_pairs::reconcile;
pub use tcp_queues::{Connection, Phase};
pub use tcp_repair::{Agreed, Window, leave_repair};
pub use udp::{Datagram, Udp, UdpState};
pub use udp_held::HeldBack;
pub use unix::{Unix, UnixForm, UnixState};
pub use unix_backlog::Caller;
pub(crate) use unix_backlog::complete;
pub use unix_name::{BoundFile, UnixName};
pub use unix_queue::Queued;
pub use unix_urgent::Urgent;
pub use waiting::{Listeners, PATIENCE, PAUSE};

use std::os::fd::AsFd;

use crate::files::Descriptor;
use crate::sys::socket;

/// Why a socket that no kind recognises cannot be checkpointed.
pub(crate) fn why_not(descriptor: &Descriptor) -> String {
    let get = |name| socket::get_int(descriptor.file.as_fd(), libc::SOL_SOCKET, name).unwrap_or(-1);
    let family = get(libc::SO_DOMAIN);
    let name = match (family, get(libc::SO_TYPE), get(libc::SO_PROTOCOL)) {
        (libc::AF_INET | libc::AF_INET6, _, 262) => "an MPTCP socket".to_owned(),
        (libc::AF_INET | libc::AF_INET6, _, libc::IPPROTO_SCTP) => "an SCTP socket".to_owned(),
        (libc::AF_INET | libc::AF_INET6, _, protocol) => format!("a socket of IP protocol {protocol}"),
        (libc::AF_PACKET, ..) => "a packet socket of an old type (SOCK_PACKET)".to_owned(),
        (libc::AF_VSOCK, ..) => "a vsock socket".to_owned(),
        (libc::AF_ALG, ..) => "a socket of the kernel's cryptography (AF_ALG)".to_owned(),
        (libc::AF_BLUETOOTH, ..) => "a Bluetooth socket".to_owned(),
        (libc::AF_CAN, ..) => "a CAN socket".to_owned(),
        (libc::AF_XDP, ..) => "an XDP socket".to_owned(),
        _ => format!("a socket of family {family}"),
    };
    format!("is {name}, which cannot be checkpointed yet")
}

/// Reads some bytes as an answer of `sock_diag`.
pub(crate) fn try_answer(bytes: &[u8]) {
    diag::try_answer(bytes);
    strays::try_answer(bytes);
}

/// Reads some bytes as a packet that a pod sends, and as what the kernel writes an address in.
pub(crate) fn try_packet(bytes: &[u8]) {
    handshakes::try_packet(bytes);
    let _ = (address::from_kernel(bytes), netlink::port_and_groups(bytes), link::bound(bytes));
    drop(unix_name::plain(bytes));
}

/// Reads a text as tables of `/proc/net`.
pub(crate) fn try_table(text: &str) {
    multicast::try_table(text);
    strays::try_table(text.as_bytes());
    let _ = address::from_proc(text);
}
