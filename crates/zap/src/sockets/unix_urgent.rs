//! Out-of-band data of unix streams (`MSG_OOB`): one byte that may be read before what was sent earlier, and a mark in its
//! place, at which reads end. Nobody tells where that is: it is found by the peeks that end there.

use std::io;
use std::os::fd::BorrowedFd;

use serde::{Deserialize, Serialize};

use crate::sys::message::Message;
use crate::sys::socket;

/// Whether something in a queue is out-of-band data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Urgent {
    /// It is not.
    #[default]
    No,
    /// It is.
    Unread,
    /// It was, and has been read: the mark alone is left.
    Read,
}

impl Urgent {
    pub(super) fn is_no(&self) -> bool {
        *self == Urgent::No
    }
}

/// A part of a queue.
#[derive(Debug, Default)]
pub(super) struct Piece {
    /// What was read with it.
    pub(super) message: Message,
    /// Its bytes.
    pub(super) bytes: Vec<u8>,
    /// Whether a read ended before it.
    pub(super) begins: bool,
    /// Whether it is out-of-band data.
    pub(super) urgent: Urgent,
}

impl Piece {
    pub(super) fn new(message: Message, bytes: Vec<u8>) -> Piece {
        Piece { message, bytes, begins: true, urgent: Urgent::No }
    }

    fn mark(urgent: Urgent, byte: u8) -> Piece {
        Piece { urgent, ..Piece::new(Message::default(), vec![byte]) }
    }
}

/// What makes reads end where other senders' bytes begin.
const SENDERS: [i32; 3] = [libc::SO_PASSCRED, libc::SO_PASSSEC, super::unix::SO_PASSPIDFD];

/// Marks what of the queue of a stream is out-of-band data, some of which is unread or not. False if it cannot be told.
pub(super) fn find(fd: BorrowedFd<'_>, is_unread: bool, pieces: &mut Vec<Piece>) -> io::Result<bool> {
    const SIOCATMARK: libc::c_ulong = 0x8905;
    let get = |name| socket::get_int(fd, libc::SOL_SOCKET, name);
    let is_inline = get(libc::SO_OOBINLINE)? != 0;
    let value = if is_unread && !is_inline {
        let mut byte = [0];
        socket::receive(fd, &mut byte, libc::MSG_OOB | libc::MSG_PEEK | libc::MSG_DONTWAIT)?;
        Some(byte[0])
    } else {
        None
    };
    if socket::ioctl_int(fd, SIOCATMARK)? != 0 {
        match (is_unread, value) {
            (false, _) => pieces.insert(0, Piece::mark(Urgent::Read, 0)),
            // Reads leave it out.
            (true, Some(byte)) => pieces.insert(0, Piece::mark(Urgent::Unread, byte)),
            (true, None) => split(pieces, 0),
        }
        return Ok(true);
    }
    let (unexplained, explained) = ends(pieces, value);
    match (is_unread, &unexplained[..], &explained[..]) {
        (true, [place], _) | (true, [], [place]) => split(pieces, *place),
        (true, ..) => return Ok(false),
        (false, [place], _) if SENDERS.iter().all(|name| get(*name).is_ok_and(|on| on == 0)) => {
            pieces.insert(*place, Piece::mark(Urgent::Read, 0));
        }
        (false, ..) => {}
    }
    Ok(true)
}

/// The pieces before which a read ended and that begin with this byte: without another reason, and with one.
fn ends(pieces: &[Piece], value: Option<u8>) -> (Vec<usize>, Vec<usize>) {
    let begins = |place: &usize| pieces[*place].begins && value.is_none_or(|byte| pieces[*place].bytes[0] == byte);
    (1..pieces.len()).filter(begins).partition(|place| {
        let (before, piece) = (&pieces[place - 1].message, &pieces[*place].message);
        before.files.is_empty() && before.credentials == piece.credentials
    })
}

/// The first byte of a piece is out-of-band data.
fn split(pieces: &mut Vec<Piece>, place: usize) {
    let Some(piece) = pieces.get_mut(place) else { return };
    let rest = piece.bytes.split_off(1);
    piece.urgent = Urgent::Unread;
    if !rest.is_empty() {
        let message = Message { credentials: piece.message.credentials, ..Message::default() };
        let rest = Piece::new(std::mem::replace(&mut piece.message, message), rest);
        pieces.insert(place + 1, rest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(parts: &[(&[u8], i32)]) -> Vec<Piece> {
        let message = |pid: i32| Message { credentials: (pid > 0).then_some((pid, 0, 0)), ..Message::default() };
        parts.iter().map(|(bytes, pid)| Piece::new(message(*pid), bytes.to_vec())).collect()
    }

    #[test]
    fn a_read_that_ended_without_another_reason_ended_at_the_mark() {
        assert_eq!(ends(&pieces(&[(b"ab", 0), (b"!c", 0)]), Some(b'!')), (vec![1], vec![]));
        assert_eq!(ends(&pieces(&[(b"ab", 0), (b"!c", 0)]), Some(b'?')), (vec![], vec![]));
        assert_eq!(ends(&pieces(&[(b"ab", 1), (b"!c", 2), (b"!", 2)]), None), (vec![2], vec![1]));
    }

    #[test]
    fn the_byte_is_taken_out_of_what_it_begins() {
        let mut all = pieces(&[(b"ab", 1), (b"!c", 1)]);
        split(&mut all, 1);
        let seen: Vec<_> = all.iter().map(|piece| (&piece.bytes[..], piece.urgent)).collect();
        assert_eq!(seen, [(&b"ab"[..], Urgent::No), (b"!", Urgent::Unread), (b"c", Urgent::No)]);
        let mut all = pieces(&[(b"!", 0)]);
        split(&mut all, 0);
        assert_eq!((all.len(), all[0].urgent), (1, Urgent::Unread));
    }
}
