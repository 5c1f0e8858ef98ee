//! Sockets: unix, TCP, UDP. Kinds of open file; their table lines are in [`crate::files::KINDS`].
//!
//! Everything is seen from the monitor, through copies of the pod's descriptors: socket options, queues and sequence
//! numbers belong to the socket, not to the network namespace of whoever asks. What only a namespace can tell (who is
//! the peer of a unix socket) comes from one `sock_diag` dump. A restart makes the sockets in the builder, inside the
//! pod's network namespace, while nothing can reach the pod.

mod address;
mod common;
mod diag;
mod packet;
mod tcp;
mod tcp_fin;
mod tcp_queues;
mod tcp_repair;
#[cfg(test)]
mod tests;
mod udp;
mod unix;
mod unix_creds;
mod unix_name;
mod unix_pair;
mod unix_queue;

pub use common::SocketOptions;
pub use diag::Sightings;
pub use tcp::{Form, Tcp, TcpState};
pub use tcp_queues::{Connection, Phase};
pub use tcp_repair::{Agreed, Window, leave_repair};
pub use udp::{Datagram, Udp, UdpState};
pub use unix::{Unix, UnixForm, UnixState};
pub use unix_name::{BoundFile, UnixName};
pub use unix_queue::Queued;
