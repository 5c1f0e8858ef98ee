//! What a unix socket has received and not read: bytes, message boundaries, descriptors in flight, senders.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use serde::{Deserialize, Serialize};

use super::common::with_room;
use super::hidden::{self, Hidden};
use super::unix::UnixState;
use super::unix_pair;
use super::unix_urgent::{self, Piece, Urgent};
use super::{unix_backlog, unix_creds, unix_name};
use crate::error::{CaptureError, Context, RebuildError};
use crate::files::{self, Descriptor, intern_file};
use crate::ids::FileId;
use crate::image::DataRef;
use crate::look::Look;
use crate::rebuild::Rebuild;
use crate::sys::message::{self, Credentials, Message};
use crate::sys::socket;

/// A message, or a run of a stream's bytes that one read may return.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Queued {
    /// Its bytes.
    pub bytes: DataRef,
    /// The descriptors that it carries.
    pub files: Vec<FileId>,
    /// The name of the sender, if it had one (datagrams).
    pub sender: Vec<u8>,
    /// The sender's PID in the pod, user and group, if the receiver asks for them.
    pub credentials: Option<Credentials>,
    /// Whether it is out-of-band data.
    #[serde(default, skip_serializing_if = "Urgent::is_no")]
    pub urgent: Urgent,
}

/// Reads the queue and leaves it as it is.
pub(super) fn capture(look: &mut Look<'_>, descriptor: &Descriptor, kind: i32) -> Result<Vec<Queued>, CaptureError> {
    let fd = descriptor.as_fd();
    let unread = socket::ioctl_int(fd, libc::FIONREAD).unwrap_or(0);
    let ready = socket::readiness(fd, libc::POLLIN | libc::POLLPRI).capturing("polling", descriptor.object())?;
    if ready & libc::POLLIN == 0 || (kind == libc::SOCK_STREAM && unread == 0) {
        return Ok(Vec::new());
    }
    if ready & libc::POLLERR != 0 && kind != libc::SOCK_STREAM {
        return Err(
            descriptor.refuse("has an error to tell before what it has received, which cannot be checkpointed yet")
        );
    }
    let walk = || {
        super::common::peeking_by_offset(fd, |at| match kind {
            libc::SOCK_STREAM => walk_stream(fd, unread as usize, at),
            _ => walk_messages(fd),
        })
    };
    let mut walked = walk().capturing("walking the queue", descriptor.object())?;
    unix_creds::learn(look, &senders(&walked), &|| walk().map(|walked| senders(&walked)));
    if kind == libc::SOCK_STREAM {
        let found = unix_urgent::find(fd, ready & libc::POLLPRI != 0, &mut walked);
        if !found.capturing("looking for out-of-band data of", descriptor.object())? {
            let why = "has out-of-band data (MSG_OOB) among what carries descriptors or has several senders";
            return Err(descriptor.refuse(format!("{why}, which cannot be checkpointed yet")));
        }
    }
    if kind != libc::SOCK_STREAM {
        add_hidden(look, descriptor, &mut walked)?;
    }
    walked.into_iter().map(|piece| keep(look, descriptor, piece)).collect()
}

/// Adds the messages that are there and that no look has shown.
fn add_hidden(look: &Look<'_>, descriptor: &Descriptor, walked: &mut Walked) -> Result<(), CaptureError> {
    let fd = descriptor.as_fd();
    let shown: Vec<usize> = walked.iter().map(|piece| piece.bytes.len()).collect();
    let is_told = socket::get_int(fd, libc::SOL_SOCKET, libc::SO_PASSCRED).is_ok_and(|is| is != 0);
    // The namespaces around ours are nobody's business.
    let ours = look.depth.saturating_sub(1);
    let found = hidden::find(fd, false, &shown, |kernel, buffer| unix_backlog::message(kernel, ours, buffer));
    for Hidden { before, found } in found.into_iter().rev() {
        let Some((bytes, message)) = found else {
            let why = "has a message in its queue, behind one that is empty, which cannot be read; try again later";
            return Err(descriptor.refuse(why));
        };
        let credentials = message.credentials.filter(|_| is_told);
        walked.insert(before, Piece::new(Message { credentials, ..message }, bytes));
    }
    Ok(())
}

type Walked = Vec<Piece>;

/// The PIDs of those who sent it; zero where nobody is told. Empty messages are not shown a second time.
fn senders(walked: &Walked) -> Vec<i32> {
    let full = walked.iter().filter(|piece| !piece.bytes.is_empty());
    full.map(|piece| piece.message.credentials.map_or(0, |(pid, ..)| pid)).collect()
}

const PEEK: i32 = libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;

fn ended(result: io::Result<Message>) -> io::Result<Option<Message>> {
    match result {
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
        other => other.map(Some),
    }
}

fn walk_messages(fd: BorrowedFd<'_>) -> io::Result<Walked> {
    let mut walked = Vec::new();
    loop {
        let ready = socket::readiness(fd, libc::POLLIN | libc::POLLRDHUP)?;
        // With no room and MSG_TRUNC the length comes and the offset stays.
        let Some(first) = ended(message::receive(fd, &mut [], PEEK | libc::MSG_TRUNC))? else { return Ok(walked) };
        if first.length == 0 {
            // At the end of a shut connection a read gives nothing for ever.
            if ready & (libc::POLLRDHUP | libc::POLLHUP) != 0 {
                return Ok(walked);
            }
            // A second look at an empty message would find the next one.
            walked.push(Piece::new(first, Vec::new()));
            continue;
        }
        let mut bytes = vec![0; first.length];
        let Some(message) = ended(message::receive(fd, &mut bytes, PEEK))? else { return Ok(walked) };
        walked.push(Piece::new(message, bytes));
    }
}

/// A read of a stream ends after a buffer that carries descriptors, but may begin before it. Nothing is read past the
/// end: that would take an error that the program is to see.
fn walk_stream(fd: BorrowedFd<'_>, unread: usize, at: &dyn Fn(usize) -> io::Result<()>) -> io::Result<Walked> {
    let mut walked: Walked = Vec::new();
    let mut position = 0;
    while position < unread {
        let mut bytes = vec![0; unread - position];
        let Some(message) = ended(message::receive(fd, &mut bytes, PEEK))? else { break };
        if message.length == 0 {
            break;
        }
        bytes.truncate(message.length);
        let end = position + message.length;
        let mut begins = true;
        if !message.files.is_empty() {
            at(position)?;
            // The last buffer of the run is the one that carries them.
            let plain = message::peek_all_but_last_buffer(fd, message.length)?;
            at(end)?;
            let rest = bytes.split_off(plain);
            begins = plain == 0;
            if plain > 0 {
                let credentials = message.credentials;
                walked.push(Piece::new(Message { length: plain, credentials, ..Message::default() }, bytes));
            }
            bytes = rest;
        }
        walked.push(Piece { begins, ..Piece::new(message, bytes) });
        position = end;
    }
    Ok(walked)
}

fn keep(look: &mut Look<'_>, descriptor: &Descriptor, piece: Piece) -> Result<Queued, CaptureError> {
    let Piece { message, bytes, urgent, .. } = piece;
    if message.flags & libc::MSG_CTRUNC != 0 {
        return Err(descriptor.refuse("has a queue with more control data than can be read"));
    }
    let files = message.files.into_iter().map(|file| carried(look, descriptor, file));
    Ok(Queued {
        files: files.collect::<Result<_, _>>()?,
        bytes: look.data.append(bytes),
        sender: unix_name::plain(&message.name),
        credentials: message.credentials.map(|c| super::unix_creds::in_pod(look, c)),
        urgent,
    })
}

/// A file that is on its way. Not one that is opened late in the mount namespace of whoever holds it.
fn carried(look: &mut Look<'_>, descriptor: &Descriptor, file: OwnedFd) -> Result<FileId, CaptureError> {
    let id = intern_file(look, &descriptor.subject, -1, file)?;
    if look.files.state(id).is_some_and(files::is_late_elsewhere) {
        let why = "has a file on its way of a proc that is mounted for a PID namespace made inside the pod";
        return Err(
            descriptor.refuse(format!("{why}, which cannot be checkpointed yet; try again when it has been taken"))
        );
    }
    Ok(id)
}

/// Sends everything to the socket again, from its peer, or from whoever had the sender's name.
pub(super) fn fill(rebuild: &mut Rebuild<'_>, id: FileId, state: &UnixState, what: &str) -> Result<(), RebuildError> {
    for queued in &state.queue {
        let sender = unix_pair::sender(rebuild, id, state, &queued.sender).rebuilding("finding the sender to", what)?;
        let (from, to): (BorrowedFd<'_>, &[u8]) = match &sender {
            Sender::File(number) => (rebuild.file(*number)?, &[]),
            Sender::Kept(end) | Sender::Stranger(end) => (end.as_fd(), &[]),
            Sender::Namesake(number, to) => (rebuild.file(*number)?, &to.0),
        };
        send_again(rebuild, queued, from, to, what)?;
        if queued.urgent == Urgent::Read {
            let taken = socket::receive(rebuild.file(id)?, &mut [0], libc::MSG_OOB | libc::MSG_DONTWAIT);
            taken.rebuilding("taking out-of-band data of", what)?;
        }
        if let Sender::Kept(end) = sender {
            rebuild.keep_object(unix_pair::OTHER_END, state.inode, Some(end));
        }
    }
    Ok(())
}

/// Sends a message again, from `from` to the name `to` or its peer, as whoever sent it.
pub(super) fn send_again(
    rebuild: &Rebuild<'_>,
    queued: &Queued,
    from: BorrowedFd<'_>,
    to: &[u8],
    what: &str,
) -> Result<(), RebuildError> {
    let bytes = rebuild.image.read(queued.bytes).map_err(|e| RebuildError::Damaged(e.to_string()))?;
    let files = queued.files.iter().map(|f| rebuild.file(*f)).collect::<Result<Vec<_>, _>>()?;
    let more = if queued.urgent.is_no() { 0 } else { libc::MSG_OOB };
    let send = |as_said| send(from, to, &bytes, &files, as_said, more);
    with_room(from, bytes.len(), || unix_creds::sending(queued.credentials, &send))
        .rebuilding("filling the queue of", what)
}

/// Who sends a queued message again.
pub(super) enum Sender {
    /// The peer, a file of the pod.
    File(FileId),
    /// The other end of a pair whose owner was closed.
    Kept(OwnedFd),
    /// A socket made for this, connected to the receiver.
    Stranger(OwnedFd),
    /// A file of the pod that has the sender's name, and the way to the receiver.
    Namesake(FileId, unix_name::Way),
}

fn send(
    from: BorrowedFd<'_>,
    to: &[u8],
    bytes: &[u8],
    files: &[BorrowedFd<'_>],
    credentials: Option<Credentials>,
    more: i32,
) -> io::Result<()> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL | more;
    let mut sent = message::send(from, bytes, files, credentials, to, flags)?;
    while sent < bytes.len() {
        sent += message::send(from, &bytes[sent..], &[], credentials, to, flags)?;
    }
    Ok(())
}
