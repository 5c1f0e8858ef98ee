//! What a TCP connection is made of: sequence numbers, queues, windows.

use std::net::SocketAddr;
use std::os::fd::BorrowedFd;

use serde::{Deserialize, Serialize};

use super::common::make_room;
use super::tcp_repair::{self, Agreed, Queue, Repair, Window};
use super::tcp_urgent;
use crate::error::{CaptureError, Context, RebuildError};
use crate::files::Descriptor;
use crate::image::{DataRef, ImageError, ImageReader};
use crate::look::Look;
use crate::sys::socket;

/// How far the two directions of a connection have been closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// Both open.
    Established,
    /// We closed; the peer has not acknowledged it.
    FinWait1,
    /// We closed, and the peer knows.
    FinWait2,
    /// The peer closed.
    CloseWait,
    /// We closed, then the peer did, before it acknowledged ours.
    Closing,
    /// The peer closed, then we did; it has not acknowledged ours.
    LastAck,
}

impl Phase {
    /// The phase behind the kernel's number of a TCP state that has a connection.
    pub(super) fn of_state(state: u8) -> Option<Phase> {
        Some(match state {
            1 => Phase::Established,
            4 => Phase::FinWait1,
            5 => Phase::FinWait2,
            8 => Phase::CloseWait,
            9 => Phase::LastAck,
            11 => Phase::Closing,
            _ => return None,
        })
    }

    /// What it is once the peer has done what it has done in `later`; how far we closed is as in this.
    fn heard(self, later: Phase) -> Phase {
        match self {
            Phase::Established if later.fin_theirs() => Phase::CloseWait,
            Phase::FinWait1 if later.fin_theirs() => Phase::Closing,
            phase => phase,
        }
    }

    /// Whether a FIN of ours is in the send queue's numbers and not acknowledged.
    pub(super) fn fin_pending(self) -> bool {
        matches!(self, Phase::FinWait1 | Phase::Closing | Phase::LastAck)
    }

    /// Whether we closed.
    pub(super) fn fin_ours(self) -> bool {
        self.fin_pending() || self == Phase::FinWait2
    }

    /// Whether the peer closed.
    pub(super) fn fin_theirs(self) -> bool {
        matches!(self, Phase::CloseWait | Phase::LastAck | Phase::Closing)
    }
}

/// A connection.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Connection {
    /// Our address.
    pub local: SocketAddr,
    /// The peer's.
    pub peer: SocketAddr,
    /// How far it is closed.
    pub phase: Phase,
    /// What the two ends agreed upon.
    pub agreed: Agreed,
    /// Windows.
    pub window: Window,
    /// `TCP_WINDOW_CLAMP`.
    pub clamp: u32,
    /// Sequence number of the first byte of the send queue.
    pub send_from: u32,
    /// The send queue.
    pub send: DataRef,
    /// How many bytes at its end were never sent.
    pub unsent: u32,
    /// How many bytes from its beginning on are urgent, if any: the last of them is received out of band.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub urgent: Option<u32>,
    /// Whether our FIN was sent, if we closed.
    pub fin_sent: bool,
    /// Sequence number of the first byte of the receive queue.
    pub receive_from: u32,
    /// The receive queue.
    pub receive: DataRef,
}

/// What was in the queues of a connection: not acknowledged, and not read.
#[derive(Debug, Default)]
pub(super) struct Queued {
    send: Vec<u8>,
    receive: Vec<u8>,
}

impl Connection {
    /// Reads a connection; none if it is over. The pod is held, and nothing reaches it from outside. Its queues have no place
    /// in an image before [`keep`](Self::keep).
    pub(super) fn read(
        descriptor: &Descriptor,
        info: &super::tcp::Info,
        reuse: bool,
    ) -> Result<Option<(Connection, Queued)>, CaptureError> {
        let fd = descriptor.as_fd();
        let ends = super::tcp::ends(descriptor)?;
        let (local, peer) = (ends.0, ends.1.ok_or_else(|| unexpected(descriptor, "lack of a peer"))?);
        if has_urgent(fd).capturing("measuring the queue", descriptor.object())? {
            return Err(descriptor.refuse("has urgent data in its queue, which cannot be checkpointed yet"));
        }
        let raw = Raw::read(fd, reuse).capturing("reading the connection", descriptor.object())?;
        let Raw { sending, receiving, .. } = raw;
        let Some(phase) = sending.phase.zip(receiving.phase).map(|(ours, theirs)| ours.heard(theirs)) else {
            return Ok(None);
        };
        let fin_pending = u32::from(phase.fin_pending());
        let is_whole = sending.bytes.len() as u32 + fin_pending == sending.unacknowledged;
        if !is_whole || receiving.bytes.len() as u32 != receiving.unread {
            return Err(unexpected(descriptor, "length of a queue"));
        }
        let first = sending.end.wrapping_sub(sending.unacknowledged);
        let urgent = tcp_urgent::written(fd, first, sending.bytes.len() as u32);
        let urgent = urgent.capturing("looking for urgent data in", descriptor.object())?;
        let segment = raw.segment.try_into().map_err(|_| unexpected(descriptor, "segment size"))?;
        let fin_sent = sending.unsent == 0;
        let place = |bytes: &Vec<u8>| DataRef { offset: 0, length: bytes.len() as u64 };
        let (send, receive) = (place(&sending.bytes), place(&receiving.bytes));
        let connection = Connection {
            local,
            peer,
            phase,
            agreed: info.agreed(segment, raw.timestamp),
            window: receiving.window,
            clamp: raw.clamp,
            // An acknowledged FIN is in no queue, yet it is to be sent and acknowledged again when rebuilding.
            send_from: sending.end.wrapping_sub(sending.unacknowledged.max(u32::from(phase.fin_ours()))),
            unsent: sending.unsent.saturating_sub(u32::from(phase.fin_ours() && !fin_sent)),
            urgent,
            fin_sent,
            receive_from: receiving.end.wrapping_sub(receiving.unread + u32::from(phase.fin_theirs())),
            send,
            receive,
        };
        Ok(Some((connection, Queued { send: sending.bytes, receive: receiving.bytes })))
    }

    /// Gives what was in its queues a place in the image.
    pub(super) fn keep(&mut self, look: &mut Look<'_>, queued: Queued) {
        (self.send, self.receive) = (look.data.append(queued.send), look.data.append(queued.receive));
    }

    /// Reads once more what has been received, and whether the peer has closed. False if the connection is over.
    pub(super) fn hear_again(
        &mut self,
        look: &mut Look<'_>,
        descriptor: &Descriptor,
        reuse: bool,
    ) -> Result<bool, CaptureError> {
        let fd = descriptor.as_fd();
        let read = |fd| {
            let repair = Repair::enter(fd, reuse)?;
            let receiving = Receiving::read(fd)?;
            repair.leave().map(|()| receiving)
        };
        let receiving = read(fd).capturing("reading the connection", descriptor.object())?;
        let Some(now) = receiving.phase else { return Ok(false) };
        self.phase = self.phase.heard(now);
        self.window = receiving.window;
        self.receive_from = receiving.end.wrapping_sub(receiving.unread + u32::from(self.phase.fin_theirs()));
        self.receive = look.data.append(receiving.bytes);
        Ok(true)
    }

    /// Up to where the peer has acknowledged.
    pub(super) fn acknowledged(&self) -> u32 {
        self.send_from.wrapping_add(u32::from(self.phase == Phase::FinWait2))
    }

    /// Up to where we have sent.
    pub(super) fn sent(&self) -> u32 {
        let fin = self.phase == Phase::FinWait2 || self.phase.fin_pending() && self.fin_sent;
        (self.send_from.wrapping_add(self.send.length as u32)).wrapping_sub(self.unsent).wrapping_add(u32::from(fin))
    }

    /// Up to where we have received.
    pub(super) fn received(&self) -> u32 {
        let fin = u32::from(self.phase.fin_theirs());
        self.receive_from.wrapping_add(self.receive.length as u32).wrapping_add(fin)
    }

    /// The peer has received everything up to there, so that it was sent.
    pub(super) fn was_heard_until(&mut self, there: u32) {
        let end = self.send_from.wrapping_add(self.send.length as u32);
        let left = end.wrapping_sub(there) as i32;
        self.unsent = left.max(0) as u32;
        // Behind the last byte there is nothing but our FIN.
        self.fin_sent |= left < 0;
    }

    /// Makes a fresh socket this connection, closed in neither direction yet, and leaves it in repair mode.
    pub(super) fn rebuild(
        &self,
        fd: BorrowedFd<'_>,
        family: i32,
        image: &ImageReader,
        what: &str,
    ) -> Result<(), RebuildError> {
        let length = self.send.length.checked_sub(self.unsent.into());
        let length = length.ok_or_else(|| RebuildError::Damaged(format!("{what} has more unsent bytes than bytes")))?;
        let sent = DataRef { length, ..self.send };
        let unsent = DataRef { offset: self.send.offset.wrapping_add(length), length: self.unsent.into() };
        socket::set_int(fd, libc::IPPROTO_TCP, libc::TCP_REPAIR, 1).rebuilding("entering repair mode", what)?;
        // One byte more than there is: see `teach_round_trip`.
        let first = (self.send_from.wrapping_sub(1), self.receive_from);
        tcp_repair::establish(fd, family, self.local, self.peer, first).rebuilding("connecting", what)?;
        tcp_repair::set_agreed(fd, &self.agreed).rebuilding("setting the agreed options", what)?;
        self.teach_round_trip(fd).rebuilding("teaching the round trip to", what)?;
        make_room(fd, libc::SO_RCVBUFFORCE, self.receive.length as usize).rebuilding("making room in", what)?;
        make_room(fd, libc::SO_SNDBUFFORCE, self.send.length as usize).rebuilding("making room in", what)?;
        fill_from(fd, Queue::Receive, image, self.receive).rebuilding("filling the receive queue", what)?;
        // Also if nothing is in it: what follows goes by which queue is selected.
        tcp_repair::select(fd, Queue::Send).rebuilding("selecting the send queue", what)?;
        let filled = self.write(fd, image, sent, &mut |piece| fill(fd, Queue::Send, piece));
        filled.rebuilding("filling the send queue", what)?;
        if self.phase.fin_ours() && self.fin_sent && !self.closed_second() {
            // In repair mode with the send queue selected, a FIN is queued as if it had been sent.
            socket::shutdown(fd, libc::SHUT_WR).rebuilding("closing", what)?;
        }
        if unsent.length != 0 {
            self.queue_unsent(fd, image, unsent).rebuilding("filling the send queue", what)?;
        }
        Ok(())
    }

    /// A connection that was never answered waits three seconds before it sends anything again, and what was under way
    /// at the checkpoint is lost for sure. One byte that is acknowledged at once, where the two ends use timestamps,
    /// brings that down to 200 ms.
    fn teach_round_trip(&self, fd: BorrowedFd<'_>) -> std::io::Result<()> {
        fill(fd, Queue::Send, b"\0")?;
        super::tcp_fin::acknowledge(fd, self)
    }

    /// Whether the peer closed before we did.
    pub(super) fn closed_second(&self) -> bool {
        self.phase == Phase::LastAck
    }

    /// Queues bytes as written but not sent. Outside repair mode, with the peer's window shut, so that none goes out yet.
    fn queue_unsent(&self, fd: BorrowedFd<'_>, image: &ImageReader, unsent: DataRef) -> std::io::Result<()> {
        let shut = Window { send: 0, receive_at: self.receive_from, receive: 0, ..self.window };
        let shut = Window { update: self.receive_from, ..shut };
        tcp_repair::set_window(fd, &shut)?;
        leave_keeping_port(fd)?;
        self.write(fd, image, unsent, &mut |piece| send_all(fd, piece))?;
        if self.phase.fin_ours() && !self.fin_sent && !self.closed_second() {
            socket::shutdown(fd, libc::SHUT_WR)?;
        }
        socket::set_int(fd, libc::IPPROTO_TCP, libc::TCP_REPAIR, 1)
    }

    /// Has `put` write a part of the send queue, piece by piece; the last byte of urgent data by itself.
    fn write(
        &self,
        fd: BorrowedFd<'_>,
        image: &ImageReader,
        part: DataRef,
        put: &mut dyn FnMut(&[u8]) -> std::io::Result<()>,
    ) -> std::io::Result<()> {
        let end = part.offset.saturating_add(part.length);
        let marked = self.urgent.and_then(|urgent| self.send.offset.checked_add(u64::from(urgent))?.checked_sub(1));
        let Some(marked) = marked.filter(|marked| (part.offset..end).contains(marked)) else {
            return read_pieces(image, part, put);
        };
        let from = |offset, end| DataRef { offset, length: end - offset };
        read_pieces(image, from(part.offset, marked), &mut *put)?;
        read_pieces(image, from(marked, marked + 1), |byte| tcp_urgent::write(fd, byte))?;
        read_pieces(image, from(marked + 1, end), put)
    }

    /// Sets the windows, once the queues and FINs are in place.
    pub(super) fn open_windows(&self, fd: BorrowedFd<'_>) -> std::io::Result<()> {
        tcp_repair::set_window(fd, &self.window)?;
        socket::set_int(fd, libc::IPPROTO_TCP, libc::TCP_WINDOW_CLAMP, self.clamp as i32)
    }
}

/// Whether there is a mark of urgent data in the receive queue, read or not: what is behind it is not counted then,
/// unless urgent data is to be read like other.
fn has_urgent(fd: BorrowedFd<'_>) -> std::io::Result<bool> {
    if socket::readiness(fd, libc::POLLPRI)? & libc::POLLPRI != 0 {
        return Ok(true);
    }
    let option = |value| socket::set_int(fd, libc::SOL_SOCKET, libc::SO_OOBINLINE, value);
    if socket::get_int(fd, libc::SOL_SOCKET, libc::SO_OOBINLINE)? != 0 {
        return Ok(false);
    }
    let before = socket::ioctl_int(fd, libc::FIONREAD)?;
    option(1)?;
    let all = socket::ioctl_int(fd, libc::FIONREAD);
    option(0)?;
    Ok(all? != before)
}

/// Leaves repair mode, nothing sent, `SO_REUSEADDR` on: others of the pod may still have to bind to the same port.
fn leave_keeping_port(fd: BorrowedFd<'_>) -> std::io::Result<()> {
    tcp_repair::leave_repair(fd, true)
}

/// What repair mode shows of a connection.
struct Raw {
    sending: Sending,
    receiving: Receiving,
    segment: i32,
    timestamp: u32,
    clamp: u32,
}

impl Raw {
    fn read(fd: BorrowedFd<'_>, reuse: bool) -> std::io::Result<Raw> {
        let clamp = socket::get_int(fd, libc::IPPROTO_TCP, libc::TCP_WINDOW_CLAMP)? as u32;
        let timestamp = socket::get_int(fd, libc::IPPROTO_TCP, socket::TCP_TIMESTAMP)? as u32;
        let repair = Repair::enter(fd, reuse)?;
        let (sending, receiving) = (Sending::read(fd)?, Receiving::read(fd)?);
        let segment = socket::get_int(fd, libc::IPPROTO_TCP, libc::TCP_MAXSEG)?;
        repair.leave()?;
        Ok(Raw { sending, receiving, segment, timestamp, clamp })
    }
}

/// What was written and not acknowledged.
struct Sending {
    end: u32,
    unacknowledged: u32,
    unsent: u32,
    bytes: Vec<u8>,
    phase: Option<Phase>,
}

impl Sending {
    /// Acknowledgements still come in over the pod's loopback. If one has while this was read, it is read again: there
    /// are no more of them than bytes.
    fn read(fd: BorrowedFd<'_>) -> std::io::Result<Sending> {
        tcp_repair::select(fd, Queue::Send)?;
        let end = tcp_repair::sequence(fd)?;
        let unacknowledged = || Ok::<u32, std::io::Error>(socket::ioctl_int(fd, libc::TIOCOUTQ)? as u32);
        loop {
            let before = unacknowledged()?;
            let unsent = socket::ioctl_int(fd, libc::SIOCOUTQNSD)? as u32;
            let (bytes, phase) = (peek(fd, before)?, phase(fd)?);
            if unacknowledged()? == before {
                return Ok(Sending { end, unacknowledged: before, unsent, bytes, phase });
            }
        }
    }
}

/// What was received and not read, and the windows.
struct Receiving {
    end: u32,
    unread: u32,
    bytes: Vec<u8>,
    window: Window,
    phase: Option<Phase>,
}

impl Receiving {
    /// As with [`Sending::read`]: what comes in has an end where the window is full.
    fn read(fd: BorrowedFd<'_>) -> std::io::Result<Receiving> {
        tcp_repair::select(fd, Queue::Receive)?;
        loop {
            let end = tcp_repair::sequence(fd)?;
            let unread = socket::ioctl_int(fd, libc::FIONREAD)? as u32;
            let (bytes, window, phase) = (peek(fd, unread)?, tcp_repair::window(fd)?, phase(fd)?);
            if tcp_repair::sequence(fd)? == end {
                return Ok(Receiving { end, unread, bytes, window, phase });
            }
        }
    }
}

/// How far a connection is closed; none if it is over.
fn phase(fd: BorrowedFd<'_>) -> std::io::Result<Option<Phase>> {
    Ok(Phase::of_state(super::tcp::Info::read(fd)?.state()))
}

/// About how many bytes are in both queues, whatever the state.
pub(super) fn queued(fd: BorrowedFd<'_>) -> u64 {
    let ask = |what| socket::ioctl_int(fd, what).map_or(0, |bytes| bytes.max(0) as u64);
    ask(libc::TIOCOUTQ) + ask(libc::FIONREAD)
}

/// Up to `length` bytes of the selected queue, left where they are.
pub(super) fn peek(fd: BorrowedFd<'_>, length: u32) -> std::io::Result<Vec<u8>> {
    if length == 0 {
        return Ok(Vec::new());
    }
    let read = super::common::peeking_from_start(fd, || {
        socket::receive_fresh(fd, length as usize, libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL)
    });
    match read {
        Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => Ok(Vec::new()),
        read => read,
    }
}

/// Puts bytes into a queue, which stays selected.
pub(super) fn fill(fd: BorrowedFd<'_>, queue: Queue, bytes: &[u8]) -> std::io::Result<()> {
    tcp_repair::select(fd, queue)?;
    // One buffer of the kernel's a call: larger pieces need memory in one piece.
    bytes.chunks(32 * 1024).try_for_each(|piece| send_all(fd, piece))
}

fn fill_from(fd: BorrowedFd<'_>, queue: Queue, image: &ImageReader, place: DataRef) -> std::io::Result<()> {
    fill(fd, queue, &[])?;
    read_pieces(image, place, |piece| fill(fd, queue, piece))
}

fn read_pieces(
    image: &ImageReader,
    place: DataRef,
    mut take: impl FnMut(&[u8]) -> std::io::Result<()>,
) -> std::io::Result<()> {
    image.read_pieces(place, |piece| take(piece).map_err(PieceError::Taking)).map_err(|error| match error {
        PieceError::Taking(error) => error,
        PieceError::Reading(error) => std::io::Error::other(error),
    })
}

enum PieceError {
    Taking(std::io::Error),
    Reading(ImageError),
}

impl From<ImageError> for PieceError {
    fn from(error: ImageError) -> PieceError {
        PieceError::Reading(error)
    }
}

fn send_all(fd: BorrowedFd<'_>, mut bytes: &[u8]) -> std::io::Result<()> {
    while !bytes.is_empty() {
        let sent = socket::send(fd, bytes, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL)?;
        bytes = &bytes[sent..];
    }
    Ok(())
}

fn unexpected(descriptor: &Descriptor, what: &str) -> CaptureError {
    CaptureError::Unexpected { object: descriptor.object(), what: what.to_owned() }
}
