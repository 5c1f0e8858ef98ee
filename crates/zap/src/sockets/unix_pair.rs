//! Making connected unix sockets again: both ends at once, or one end and a peer that is closed afterwards.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use super::unix::{UnixForm, UnixState};
use super::unix_creds;
use super::unix_name::{self, UnixName};
use super::unix_queue::Sender;
use crate::error::{Context, RebuildError};
use crate::ids::FileId;
use crate::namespaces::NamespaceId;
use crate::rebuild::Rebuild;
use crate::sys::message::Credentials;
use crate::sys::socket;

/// Object: the file number of the unix socket of an inode.
pub(super) const NUMBER: &str = "unix-number";
/// Object: the end of a pair that waits to be taken by the socket of an inode.
const WAITING: &str = "unix-waiting";
/// Object: the peer of a socket (by its inode) that belongs to nobody, until its queue is filled.
pub(super) const OTHER_END: &str = "unix-other-end";
/// Object: the one [`Listeners`].
const LISTENERS: &str = "unix-listeners";

/// Object: the one [`Namesakes`].
const NAMESAKES: &str = "unix-namesakes";

/// Sockets of the pod that have an abstract name: type, name, number.
struct Namesakes(Vec<(i32, Vec<u8>, FileId)>);

/// Listeners that accept sockets that have their name, of the pod or made for now.
#[derive(Default)]
struct Listeners(Vec<Listener>);

struct Listener {
    kind: i32,
    name: Vec<u8>,
    /// Who listens.
    credentials: Option<Credentials>,
    socket: OwnedFd,
}

/// The number of the socket of that inode, if it is in the image.
pub(super) fn number(rebuild: &mut Rebuild<'_>, inode: u64) -> Option<FileId> {
    rebuild.object::<FileId>(NUMBER, inode).copied()
}

/// The socket of `state`, with its peer made as well.
pub(super) fn take(rebuild: &mut Rebuild<'_>, state: &UnixState, what: &str) -> Result<OwnedFd, RebuildError> {
    let waiting = rebuild.object::<Option<OwnedFd>>(WAITING, state.inode).and_then(Option::take);
    if let Some(end) = waiting {
        return Ok(end);
    }
    let UnixForm::Connected { peer, .. } = &state.form else {
        return Err(RebuildError::Damaged(format!("{what} has no peer")));
    };
    let (ours, theirs) = make(rebuild, state).rebuilding("making a pair for", what)?;
    match peer {
        Some(peer) => rebuild.keep_object(WAITING, *peer, Some(theirs)),
        None => rebuild.keep_object(OTHER_END, state.inode, Some(theirs)),
    }
    Ok(ours)
}

fn make(rebuild: &mut Rebuild<'_>, state: &UnixState) -> io::Result<(OwnedFd, OwnedFd)> {
    let UnixForm::Connected { peer, peer_name, peer_shared_name, .. } = &state.form else {
        return Err(io::Error::other("it is not connected"));
    };
    let (ours, theirs) = (state.peer_credentials, peer.and_then(|p| unix_creds::known_by(rebuild, p)));
    if state.shared_name {
        // The accepted end knows who connected, the connected end who listened.
        return accept_at(rebuild, state.kind, (&state.name, theirs), (peer_name, ours));
    }
    if *peer_shared_name || (state.form.peer_is_gone() && !peer_name.bytes.is_empty()) {
        let (accepted, connected) = accept_at(rebuild, state.kind, (peer_name, ours), (&state.name, theirs))?;
        return Ok((connected, accepted));
    }
    let (ours, theirs) = pair(rebuild, ours, state.kind)?;
    unix_name::bind(ours.as_fd(), &state.name)?;
    unix_name::bind(theirs.as_fd(), &UnixName { file: None, ..peer_name.clone() })?;
    Ok((ours, theirs))
}

/// Pairs that were made ahead, and how many at once the next time: each time takes a process of its own.
#[derive(Default)]
struct Stock(HashMap<Wanted, (Vec<(OwnedFd, OwnedFd)>, usize)>);

/// Namespace, credentials, type.
type Wanted = (Option<NamespaceId>, Option<Credentials>, i32);

/// The most pairs that are made at once. There are never more to spare than were taken: the limit of the builder's
/// descriptors counts on it.
const MANY: usize = 32;

fn pair(rebuild: &mut Rebuild<'_>, credentials: Option<Credentials>, kind: i32) -> io::Result<(OwnedFd, OwnedFd)> {
    const STOCK: &str = "unix-stock";
    let wanted = (rebuild.network(), credentials, kind);
    let stock: &mut Stock = rebuild.object_or_default(STOCK, 0);
    let (ready, next) = stock.0.entry(wanted).or_insert_with(|| (Vec::new(), 1));
    if ready.is_empty() {
        *ready = unix_creds::pairs(credentials, kind, *next)?;
        *next = (2 * *next).min(MANY);
    }
    ready.pop().ok_or_else(|| io::Error::other("no pair was made"))
}

impl UnixForm {
    pub(super) fn peer_is_gone(&self) -> bool {
        matches!(self, UnixForm::Connected { peer: None, .. })
    }
}

/// A name, and the credentials of whoever listened at it or connected from it.
type Party<'a> = (&'a UnixName, Option<Credentials>);

/// A socket accepted by a listener of the given name, and the one that connected to it: (accepted, connected).
fn accept_at(
    rebuild: &mut Rebuild<'_>,
    kind: i32,
    listens: Party<'_>,
    connects: Party<'_>,
) -> io::Result<(OwnedFd, OwnedFd)> {
    let connected = socket::socket(libc::AF_UNIX, kind, 0)?;
    unix_name::bind(connected.as_fd(), connects.0)?;
    let listener = listener(rebuild, kind, listens)?;
    let way = unix_name::way_to(listener.as_fd(), listens.0)?;
    unix_creds::acting(connects.1, &|| socket::connect(&connected, &way.0))?;
    Ok((socket::accept(listener)?, connected))
}

/// The listener of a name: the pod's own if it is abstract and open already (there can be only one), or one for now.
fn listener<'r>(rebuild: &'r mut Rebuild<'_>, kind: i32, (name, credentials): Party<'_>) -> io::Result<&'r OwnedFd> {
    let all = listeners(rebuild);
    let same =
        |l: &Listener| l.kind == kind && l.name == name.bytes && (!name.is_path() || l.credentials == credentials);
    if let Some(found) = all.iter().position(same) {
        return Ok(&all[found].socket);
    }
    let socket = socket::socket(libc::AF_UNIX, kind, 0)?;
    unix_name::bind(socket.as_fd(), &UnixName { file: None, ..name.clone() })?;
    unix_creds::acting(credentials, &|| socket::listen(&socket, 8))?;
    all.push(Listener { kind, name: name.bytes.clone(), credentials, socket });
    Ok(&all[all.len() - 1].socket)
}

fn listeners<'r>(rebuild: &'r mut Rebuild<'_>) -> &'r mut Vec<Listener> {
    &mut rebuild.object_or_default::<Listeners>(LISTENERS, 0).0
}

/// The listener for now at an abstract name, whose owner needs it: there can be only one socket with that name.
pub(super) fn take_listener(rebuild: &mut Rebuild<'_>, kind: i32, name: &UnixName) -> Option<OwnedFd> {
    let all = listeners(rebuild);
    let found = all.iter().position(|l| !name.is_path() && l.kind == kind && l.name == name.bytes)?;
    Some(all.swap_remove(found).socket)
}

/// Lets sockets that were accepted under the abstract name of `socket` be accepted by it.
pub(super) fn offer_listener(
    rebuild: &mut Rebuild<'_>,
    kind: i32,
    name: &UnixName,
    socket: &OwnedFd,
) -> io::Result<()> {
    if name.bytes.first() == Some(&0) {
        let (name, socket) = (name.bytes.clone(), socket.try_clone()?);
        listeners(rebuild).push(Listener { kind, name, credentials: None, socket });
    }
    Ok(())
}

/// Remembers who of the pod has an abstract name.
pub(super) fn remember_name(rebuild: &mut Rebuild<'_>, id: FileId, state: &UnixState) {
    if state.name.bytes.first() != Some(&0) {
        return;
    }
    match rebuild.object::<Namesakes>(NAMESAKES, 0) {
        Some(all) => all.0.push((state.kind, state.name.bytes.clone(), id)),
        None => rebuild.keep_object(NAMESAKES, 0, Namesakes(vec![(state.kind, state.name.bytes.clone(), id)])),
    }
}

/// Who sends to the socket `id` what it had received from `name`.
pub(super) fn sender(rebuild: &mut Rebuild<'_>, id: FileId, state: &UnixState, name: &[u8]) -> io::Result<Sender> {
    if state.comes_in_pairs() {
        if let UnixForm::Connected { peer: Some(peer), .. } = &state.form {
            let number = number(rebuild, *peer);
            return number.map(Sender::File).ok_or_else(|| io::Error::other("its peer is not in the image"));
        }
        let kept = rebuild.object::<Option<OwnedFd>>(OTHER_END, state.inode).and_then(Option::take);
        return kept.map(Sender::Kept).ok_or_else(|| io::Error::other("it has no peer"));
    }
    let all = rebuild.object::<Namesakes>(NAMESAKES, 0);
    let namesake = all.and_then(|all| all.0.iter().find(|(k, n, _)| *k == state.kind && n == name)).map(|n| n.2);
    let receiver = rebuild.file(id).map_err(io::Error::other)?;
    let way = unix_name::way_to(receiver, &state.name)?;
    if let Some(namesake) = namesake {
        return Ok(Sender::Namesake(namesake, way));
    }
    let stranger = socket::socket(libc::AF_UNIX, state.kind, 0)?;
    unix_name::bind(stranger.as_fd(), &UnixName { bytes: name.to_vec(), file: None })?;
    socket::connect(&stranger, &way.0)?;
    Ok(Sender::Stranger(stranger))
}

/// Connects a datagram socket to its peer, which may have been closed since.
pub(super) fn connect_datagram(
    rebuild: &mut Rebuild<'_>,
    id: FileId,
    peer: Option<u64>,
    peer_name: &UnixName,
) -> io::Result<()> {
    let number = peer.and_then(|p| number(rebuild, p));
    let socket = rebuild.file(id).map_err(io::Error::other)?;
    if let Some(number) = number {
        let target = rebuild.file(number).map_err(io::Error::other)?;
        return unix_name::connect_to(socket, target, peer_name);
    }
    let gone = socket::socket(libc::AF_UNIX, libc::SOCK_DGRAM, 0)?;
    unix_name::bind(gone.as_fd(), peer_name)?;
    unix_name::connect_to(socket, gone.as_fd(), peer_name)
}

/// Closes the peer that belongs to nobody. If the socket is to learn that what it sent was never read, something is sent.
pub(super) fn close_other_end(rebuild: &mut Rebuild<'_>, id: FileId, inode: u64, reset: bool) -> io::Result<()> {
    let end = rebuild.object::<Option<OwnedFd>>(OTHER_END, inode).and_then(Option::take);
    if reset {
        let socket = rebuild.file(id).map_err(io::Error::other)?;
        socket::send(socket, b"\0", libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL)?;
    }
    drop(end);
    Ok(())
}
