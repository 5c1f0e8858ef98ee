//! `TCP_REPAIR`: reading and writing what a TCP connection is made of, without a packet.
//!
//! The mode outlives whoever switched it on: a socket left in it fails writes and closes without a FIN. So a capture
//! keeps it on for a few system calls, and leaves it in the one way that sends nothing. Switching it off also clears
//! `SO_REUSEADDR` (the mode forces it on), which therefore must be known before and put back.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};

use serde::{Deserialize, Serialize};

use crate::sys::socket;

const TCP: i32 = libc::IPPROTO_TCP;

/// Which queue `TCP_REPAIR_QUEUE` selects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub(super) enum Queue {
    /// Received, not yet read.
    Receive = 1,
    /// Written, not yet acknowledged.
    Send = 2,
}

/// `struct tcp_repair_window`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    /// Sequence number of the segment that last updated the peer's window.
    pub update: u32,
    /// The window that the peer offers.
    pub send: u32,
    /// The largest that it ever offered.
    pub largest: u32,
    /// The window that we offer.
    pub receive: u32,
    /// What had been received when we last offered it.
    pub receive_at: u32,
}

/// A socket in repair mode through a copy that is ours. Dropped, it is out of the mode again, and nothing was sent.
pub(super) struct Repair<'a> {
    fd: BorrowedFd<'a>,
    reuse: bool,
}

impl<'a> Repair<'a> {
    /// Switches the mode on. `reuse` is the `SO_REUSEADDR` that the socket has now.
    pub(super) fn enter(fd: BorrowedFd<'a>, reuse: bool) -> io::Result<Repair<'a>> {
        socket::set_int(fd, TCP, libc::TCP_REPAIR, 1)?;
        Ok(Repair { fd, reuse })
    }

    /// Leaves the mode, nothing sent.
    pub(super) fn leave(self) -> io::Result<()> {
        let repair = std::mem::ManuallyDrop::new(self);
        leave_repair(repair.fd, repair.reuse)
    }
}

impl Drop for Repair<'_> {
    fn drop(&mut self) {
        // Only on the way out with another error, which is the one to report.
        let _ = leave_repair(self.fd, self.reuse);
    }
}

/// Takes a socket that an interrupted capture left in repair mode out of it, nothing sent; harmless on any other.
///
/// `reuse` is the `SO_REUSEADDR` that it had before.
pub fn leave_repair(fd: impl AsFd, reuse: bool) -> io::Result<()> {
    let fd = fd.as_fd();
    if socket::get_int(fd, TCP, libc::TCP_REPAIR)? == 0 {
        return Ok(());
    }
    socket::set_int(fd, TCP, libc::TCP_REPAIR, socket::TCP_REPAIR_OFF_NO_PROBE)?;
    socket::set_int(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, reuse.into())
}

/// Selects the queue that reads, writes and sequence numbers are about.
pub(super) fn select(fd: BorrowedFd<'_>, queue: Queue) -> io::Result<()> {
    socket::set_int(fd, TCP, libc::TCP_REPAIR_QUEUE, queue as i32)
}

/// The sequence number after the last byte of the selected queue.
pub(super) fn sequence(fd: BorrowedFd<'_>) -> io::Result<u32> {
    Ok(socket::get_int(fd, TCP, socket::TCP_QUEUE_SEQ)? as u32)
}

/// Sets the sequence number of the selected queue; the socket must not be connected yet.
pub(super) fn set_sequence(fd: BorrowedFd<'_>, sequence: u32) -> io::Result<()> {
    socket::set_int(fd, TCP, socket::TCP_QUEUE_SEQ, sequence as i32)
}

/// The windows of both directions.
pub(super) fn window(fd: BorrowedFd<'_>) -> io::Result<Window> {
    let mut bytes = [0; 20];
    socket::get_bytes(fd, TCP, libc::TCP_REPAIR_WINDOW, &mut bytes)?;
    let word = |i: usize| u32::from_ne_bytes([bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]]);
    Ok(Window { update: word(0), send: word(1), largest: word(2), receive: word(3), receive_at: word(4) })
}

/// Sets the windows of both directions.
pub(super) fn set_window(fd: BorrowedFd<'_>, w: &Window) -> io::Result<()> {
    let words = [w.update, w.send, w.largest, w.receive, w.receive_at];
    socket::set_bytes(fd, TCP, libc::TCP_REPAIR_WINDOW, words.map(u32::to_ne_bytes).as_flattened())
}

/// What the two ends agreed upon in their SYNs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Agreed {
    /// Largest segment that the peer takes.
    pub segment: u16,
    /// Window scales, the peer's and ours.
    pub scales: Option<(u8, u8)>,
    /// Selective acknowledgements.
    pub selective: bool,
    /// Timestamps: our clock's value, opaque.
    pub timestamp: Option<u32>,
}

/// Sets what was agreed upon; the socket is connected (in repair mode) and has sent nothing.
pub(super) fn set_agreed(fd: BorrowedFd<'_>, agreed: &Agreed) -> io::Result<()> {
    const SEGMENT: u32 = 2;
    const SCALE: u32 = 3;
    const SELECTIVE: u32 = 4;
    const TIMESTAMPS: u32 = 8;
    let mut options = vec![(SEGMENT, u32::from(agreed.segment))];
    if let Some((send, receive)) = agreed.scales {
        options.push((SCALE, u32::from(send) | u32::from(receive) << 16));
    }
    if agreed.selective {
        options.push((SELECTIVE, 0));
    }
    if agreed.timestamp.is_some() {
        options.push((TIMESTAMPS, 0));
    }
    let bytes: Vec<u8> = options.iter().flat_map(|&(code, value)| [code, value]).flat_map(u32::to_ne_bytes).collect();
    socket::set_bytes(fd, TCP, libc::TCP_REPAIR_OPTIONS, &bytes)?;
    match agreed.timestamp {
        Some(value) => socket::set_int(fd, TCP, socket::TCP_TIMESTAMP, value as i32),
        None => Ok(()),
    }
}

/// Makes a fresh socket in repair mode the `local` end of an established connection, nothing sent, nothing received.
pub(super) fn establish(
    fd: BorrowedFd<'_>,
    family: i32,
    local: SocketAddr,
    peer: SocketAddr,
    first: (u32, u32),
) -> io::Result<()> {
    select(fd, Queue::Send)?;
    set_sequence(fd, first.0)?;
    select(fd, Queue::Receive)?;
    set_sequence(fd, first.1)?;
    socket::bind(fd, &super::address::to_kernel(local, family))?;
    socket::connect(fd, &super::address::to_kernel(peer, family))
}
