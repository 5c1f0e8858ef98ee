//! Connections that wait to be accepted by a unix socket, who made them, and what they have said already: bytes,
//! descriptors, that there is no more to come. It has been received by sockets that belong to nobody yet, so that only the kernel's own memory
//! tells of it ([`crate::kernel`]). Everybody who could say more, or accept them, is held.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use serde::{Deserialize, Serialize};

use super::unix::{UnixForm, UnixState};
use super::unix_name::{self, UnixName};
use super::unix_queue::{self, Queued};
use super::unix_urgent::Urgent;
use super::{unix_creds, unix_pair};
use crate::error::{CaptureError, Context, RebuildError};
use crate::files::{self, Descriptor};
use crate::ids::{Address, FileId};
use crate::image;
use crate::kernel::{self, Kernel};
use crate::look::Look;
use crate::rebuild::Rebuild;
use crate::sys::message::{Credentials, Message};
use crate::sys::socket;

/// A connection that waits, and what it has said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Caller {
    /// Who connected: PID in the pod, user, group.
    pub who: Credentials,
    /// The name of one who is gone.
    #[serde(default, with = "serde_bytes", skip_serializing_if = "Vec::is_empty")]
    pub name: Vec<u8>,
    /// What has come from there.
    pub said: Vec<Queued>,
}

/// A listener with such connections, whose state is not complete before every file has been met.
pub(crate) struct Backlog {
    id: FileId,
    descriptor: Descriptor,
}

impl std::fmt::Debug for Backlog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Backlog").field(&self.id).finish()
    }
}

/// Whether what they have said can be written down here.
pub(super) fn can_be_read() -> bool {
    kernel::reader().is_ok()
}

/// Puts a listener off at which connections wait.
pub(super) fn put_off(look: &mut Look<'_>, descriptor: &Descriptor) {
    let id = look.files.newest();
    look.sockets.backlogs.extend(id.map(|id| Backlog { id, descriptor: descriptor.clone() }));
}

/// Completes the states of those that were put off. To be called once every file has been met.
pub(crate) fn complete(look: &mut Look<'_>) -> Result<(), CaptureError> {
    let backlogs = std::mem::take(&mut look.sockets.backlogs);
    if backlogs.is_empty() {
        return Ok(());
    }
    const READING: &str = "reading what the kernel knows of";
    let mut kernel = kernel::reader().map_err(io::Error::other).capturing(READING, "connections that wait")?;
    let (mut known, mut all) = (HashMap::<Address, FileId>::new(), look.files.all());
    loop {
        // Not all of them need be open here at once.
        let some: Vec<_> = all.by_ref().take(4096).collect();
        if some.is_empty() {
            break;
        }
        let records = kernel.files(some.iter().map(|(_, file)| file.as_fd())).capturing(READING, "open files")?;
        known.extend(records.into_iter().zip(some.iter().map(|(id, _)| *id)));
    }
    drop(all);
    for Backlog { id, descriptor } in backlogs {
        let state = look.files.state(id).and_then(|file| image::decode::<UnixState>(&file.state).ok());
        let Some(mut state) = state else { continue };
        let seen = read(&mut kernel, look.depth, descriptor.as_fd(), &known);
        let seen = seen.capturing(READING, descriptor.object())?.map_err(|why| descriptor.refuse(why))?;
        let UnixForm::Listening { waiting, callers, .. } = &mut state.form else { continue };
        // A client that is gone has no inode.
        let fits = |(waiting, seen): (&u64, &Seen)| (*waiting == 0) == seen.is_gone;
        if waiting.len() != seen.len() || !waiting.iter().zip(&seen).all(fits) {
            return Err(descriptor.refuse("has connections that are not those which sock_diag shows"));
        }
        let (_, names) = look.sockets.unix(look.init).capturing("asking sock_diag about", descriptor.object())?;
        let is_taken = |seen: &Seen| {
            let is_abstract = seen.name.first() == Some(&0);
            is_abstract && names.contains_key(&(state.kind as u8, seen.name.clone()))
        };
        if seen.iter().any(is_taken) {
            let why = "has a connection that waits, of a client that is gone and whose name is another's by now";
            return Err(descriptor.refuse(format!("{why}, which cannot be checkpointed yet")));
        }
        let is_late = |id: &FileId| look.files.state(*id).is_some_and(files::is_late);
        if seen.iter().flat_map(|seen| &seen.said).flat_map(|heard| &heard.files).any(is_late) {
            let why = "has a connection that waits, with a handle on a process on its way";
            return Err(descriptor.refuse(format!("{why}, which cannot be checkpointed yet")));
        }
        *callers = seen.into_iter().map(|seen| seen.keep(look)).collect();
        look.files.amend(id, image::encode(&state));
    }
    Ok(())
}

/// As [`Caller`], before its bytes are where bulk bytes go.
struct Seen {
    who: Credentials,
    is_gone: bool,
    name: Vec<u8>,
    said: Vec<Heard>,
}

struct Heard {
    bytes: Vec<u8>,
    files: Vec<FileId>,
    credentials: Option<Credentials>,
    urgent: Urgent,
}

impl Seen {
    fn keep(self, look: &mut Look<'_>) -> Caller {
        let mut keep = |heard: Heard| Queued {
            bytes: look.data.append(heard.bytes),
            files: heard.files,
            sender: Vec::new(),
            credentials: heard.credentials,
            urgent: heard.urgent,
        };
        Caller { who: self.who, name: self.name, said: self.said.into_iter().map(&mut keep).collect() }
    }
}

/// Either what was read, or why it cannot be kept.
type Read<T> = io::Result<Result<T, &'static str>>;

/// The connections that wait at a listener, in their order.
fn read(
    kernel: &mut Kernel,
    depth: usize,
    listener: BorrowedFd<'_>,
    known: &HashMap<Address, FileId>,
) -> Read<Vec<Seen>> {
    let listener = kernel.socket(listener)?;
    let mut all = Vec::new();
    for buffer in kernel.queue(kernel.at(listener, "sock.sk_receive_queue"))? {
        let waiting = kernel.pointer(buffer, "sk_buff.sk")?;
        match read_one(kernel, depth, waiting, known)? {
            Ok(seen) => all.push(seen),
            Err(why) => return Ok(Err(why)),
        }
    }
    Ok(Ok(all))
}

fn read_one(kernel: &mut Kernel, depth: usize, waiting: Address, known: &HashMap<Address, FileId>) -> Read<Seen> {
    let client = kernel.pointer(waiting, "unix_sock.peer")?;
    let is_gone = kernel.pointer(client, "sock.sk_socket")? == NOWHERE;
    let name = if is_gone { name_of(kernel, client)? } else { Vec::new() };
    let out_of_band = kernel.pointer(waiting, "unix_sock.oob_skb")?;
    let pid = kernel.pointer(waiting, "sock.sk_peer_pid")?;
    let credentials = kernel.pointer(waiting, "sock.sk_peer_cred")?;
    let (user, group) = (kernel.word(credentials, "cred.euid")?, kernel.word(credentials, "cred.egid")?);
    let who = (kernel.pid(pid, depth)?, user, group);
    let mut said = Vec::new();
    for buffer in kernel.queue(kernel.at(waiting, "sock.sk_receive_queue"))? {
        match heard(kernel, depth, buffer, known)? {
            Ok(heard) => {
                let urgent = if buffer == out_of_band { Urgent::Unread } else { Urgent::No };
                said.push(Heard { urgent, ..heard });
            }
            Err(why) => return Ok(Err(why)),
        }
    }
    Ok(Ok(Seen { who, is_gone, name, said }))
}

const NOWHERE: Address = Address(0);

/// The name of a socket.
fn name_of(kernel: &mut Kernel, socket: Address) -> io::Result<Vec<u8>> {
    let address = kernel.pointer(socket, "unix_sock.addr")?;
    if address == NOWHERE {
        return Ok(Vec::new());
    }
    let length = kernel.word(address, "unix_address.len")?;
    Ok(unix_name::plain(&kernel.bytes(kernel.at(address, "unix_address.name"), length as usize)?))
}

/// A message of a queue, with its sender's name and credentials, whose PID is that of the PID namespace around which `depth` lie;
/// `None` if it carries descriptors, or cannot be read.
pub(super) fn message(kernel: &mut Kernel, depth: usize, buffer: Address) -> io::Result<Option<(Vec<u8>, Message)>> {
    let Ok(heard) = heard(kernel, depth, buffer, &HashMap::new())? else { return Ok(None) };
    let sender = kernel.pointer(buffer, "sk_buff.sk")?;
    let mut name = (libc::AF_UNIX as u16).to_ne_bytes().to_vec();
    if sender != NOWHERE {
        name.extend(name_of(kernel, sender)?);
    }
    let (length, credentials) = (heard.bytes.len(), heard.credentials);
    Ok(Some((heard.bytes, Message { length, name, credentials, ..Message::default() })))
}

/// What one buffer has.
fn heard(kernel: &mut Kernel, depth: usize, buffer: Address, known: &HashMap<Address, FileId>) -> Read<Heard> {
    let Some(bytes) = kernel.buffer(buffer)? else {
        return Ok(Err("has a connection that waits and has sent more at once (16 KiB) than can be read on this host"));
    };
    let notes = kernel.at(buffer, "sk_buff.cb");
    let pid = kernel.pointer(notes, "unix_skb_parms.pid")?;
    let credentials = if pid == NOWHERE {
        None
    } else {
        let (user, group) = (kernel.word(notes, "unix_skb_parms.uid")?, kernel.word(notes, "unix_skb_parms.gid")?);
        Some((kernel.pid(pid, depth)?, user, group))
    };
    let list = kernel.pointer(notes, "unix_skb_parms.fp")?;
    let records = if list == NOWHERE {
        Vec::new()
    } else {
        let (count, first) = (kernel.half(list, "scm_fp_list.count")?, kernel.at(list, "scm_fp_list.fp"));
        kernel.pointers(first, count.into())?
    };
    let files: Option<Vec<FileId>> = records.iter().map(|record| known.get(record).copied()).collect();
    let lost = "has a connection that waits, with a descriptor on its way that nobody holds any more, which cannot be \
                checkpointed yet";
    Ok(files.map(|files| Heard { bytes, files, credentials, urgent: Urgent::No }).ok_or(lost))
}

/// Has those who wait to be accepted by the listener `id` connect again, in their order, and say what they had said.
pub(super) fn call_again(
    rebuild: &mut Rebuild<'_>,
    id: FileId,
    listener: &UnixState,
    what: &str,
) -> Result<(), RebuildError> {
    let UnixForm::Listening { waiting, callers, backlog } = &listener.form else { return Ok(()) };
    if waiting.is_empty() {
        return Ok(());
    }
    let missing = || RebuildError::Damaged(format!("who waits to be accepted by {what} is not in it"));
    let mut client = |inode: &u64| match inode {
        0 => Ok(None),
        inode => unix_pair::number(rebuild, *inode).map(Some).ok_or_else(missing),
    };
    let clients = waiting.iter().map(&mut client).collect::<Result<Vec<_>, _>>()?;
    let holders: Vec<_> = waiting.iter().map(|inode| unix_creds::of_waiting(rebuild, *inode)).collect();
    let listening = rebuild.file(id)?;
    // There may be more than are let in now: nobody must wait for room.
    let listen =
        |room: usize| unix_creds::acting(listener.peer_credentials, &|| socket::listen(listening, room as i32));
    let is_crowded = waiting.len() > *backlog as usize;
    if is_crowded {
        listen(waiting.len()).rebuilding("listening on", what)?;
    }
    let way = unix_name::way_to(listening, &listener.name).rebuilding("looking for", what)?;
    for (place, client) in clients.into_iter().enumerate() {
        let caller = callers.get(place);
        let who = caller.map(|caller| caller.who).or(holders[place]);
        // One who is gone is not missed once it has said all.
        let gone: OwnedFd;
        let client = match client {
            Some(number) => rebuild.file(number)?,
            None => {
                gone = socket::socket(libc::AF_UNIX, listener.kind, 0).rebuilding("making a client of", what)?;
                let bytes = caller.map(|caller| caller.name.clone()).unwrap_or_default();
                unix_name::bind(gone.as_fd(), &UnixName { bytes, file: None })
                    .rebuilding("naming a client of", what)?;
                gone.as_fd()
            }
        };
        unix_creds::acting(who, &|| socket::connect(client, &way.0)).rebuilding("connecting to", what)?;
        for queued in caller.iter().flat_map(|caller| &caller.said) {
            unix_queue::send_again(rebuild, queued, client, &[], what)?;
        }
    }
    if is_crowded { listen(*backlog as usize).rebuilding("listening on", what) } else { Ok(()) }
}
