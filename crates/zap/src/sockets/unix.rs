//! Unix sockets: streams, datagrams, sequenced packets; pairs, named ones, listeners.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use serde::{Deserialize, Serialize};

use super::common::{Name, SocketOptions};
use super::diag::UnixFacts;
use super::unix_backlog::{self, Caller};
use super::unix_name::{self, UnixName};
use super::unix_queue::{self, Queued};
use super::waiting::{connections, has_waiting};
use super::{hidden, unix_creds, unix_pair};
use crate::error::{CaptureError, Context, RebuildError};
use crate::files::{Descriptor, FileKind, decoded};
use crate::ids::{FileId, HostPid, PodPid};
use crate::image;
use crate::look::Look;
use crate::rebuild::Rebuild;
use crate::sys::message::Credentials;
use crate::sys::socket;

pub(super) const SO_PASSPIDFD: i32 = 76;
pub(super) const SO_PASSRIGHTS: i32 = 83;

const OPTIONS: &[Name] = &[
    (libc::SOL_SOCKET, libc::SO_PASSCRED),
    (libc::SOL_SOCKET, libc::SO_PASSSEC),
    (libc::SOL_SOCKET, SO_PASSPIDFD),
    (libc::SOL_SOCKET, SO_PASSRIGHTS),
    (libc::SOL_SOCKET, libc::SO_RXQ_OVFL),
    (libc::SOL_SOCKET, libc::SO_NOFCS),
];

/// A unix socket.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UnixState {
    /// `SOCK_STREAM`, `SOCK_DGRAM` or `SOCK_SEQPACKET`.
    pub kind: i32,
    /// Its inode, by which others refer to it.
    pub inode: u64,
    /// Options; `shutdown` is set.
    pub options: SocketOptions,
    /// Its name.
    pub name: UnixName,
    /// Whether others have the same name: it was accepted, and the name is its listener's.
    pub shared_name: bool,
    /// What it does.
    pub form: UnixForm,
    /// What it has received and not read.
    pub queue: Vec<Queued>,
    /// `SO_PEERCRED`: PID in the pod (zero if that process is gone), user, group. Of a listener, who listens.
    pub peer_credentials: Option<Credentials>,
}

/// What a unix socket does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum UnixForm {
    /// Nothing; a datagram socket may still be bound and receive.
    Idle,
    /// It listens.
    Listening {
        /// How many connections may wait to be accepted.
        backlog: u32,
        /// Who waits, by inode (zero: gone), in the order in which they are accepted.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        waiting: Vec<u64>,
        /// What each of them has said, if they could be asked, or said something.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        callers: Vec<Caller>,
    },
    /// It waits to be accepted by a listener of the pod.
    Waiting {
        /// Who connected: its holder, as far as the kernel tells.
        who: Credentials,
    },
    /// It is connected.
    Connected {
        /// The peer's inode; `None` if the peer was closed.
        peer: Option<u64>,
        /// The peer's name.
        peer_name: UnixName,
        /// Whether others have the peer's name.
        peer_shared_name: bool,
        /// Whether the peer is connected back.
        mutual: bool,
        /// Whether an error (the peer closed with unread data) is waiting to be told.
        reset: bool,
    },
}

/// Unix sockets.
pub struct Unix;

const ESTABLISHED: u8 = 1;
const LISTEN: u8 = 10;

impl Unix {
    fn form(look: &mut Look<'_>, descriptor: &Descriptor) -> Result<(UnixForm, bool, u8), CaptureError> {
        let init = look.init;
        let (all, names) = look.sockets.unix(init).capturing("asking sock_diag about", descriptor.object())?;
        let inode = descriptor.stat.st_ino as u32;
        let gone = || descriptor.refuse("is a socket of another network namespace, which cannot be checkpointed yet");
        let facts = all.get(&inode).ok_or_else(gone)?;
        let shares = |facts: &UnixFacts| !facts.name.is_empty() && names.get(&facts.whose()).is_some_and(|n| *n > 1);
        let shared = shares(facts);
        if facts.state == LISTEN {
            let say_nothing = facts.waiting_say_nothing(all);
            let readable = !facts.waiting.is_empty() && unix_backlog::can_be_read();
            if !say_nothing && !readable {
                return Err(descriptor.refuse(has_waiting(&connections(facts.waiting.len() as u32))));
            }
            let (waiting, shutdown) = (facts.waiting.clone(), facts.shutdown);
            let form = UnixForm::Listening {
                backlog: facts.backlog,
                waiting: waiting.iter().copied().map(u64::from).collect(),
                callers: Vec::new(),
            };
            waiting.into_iter().filter(|c| *c != 0).for_each(|client| look.sockets.expect_unix(client, descriptor));
            // Of those who say nothing it tells who connected them.
            if readable {
                unix_backlog::put_off(look, descriptor);
            }
            return Ok((form, shared, shutdown));
        }
        if let Some(listener) = all.iter().find(|(_, other)| other.waiting.contains(&inode)).map(|(inode, _)| *inode) {
            let shutdown = facts.shutdown;
            look.sockets.expect_unix(listener, descriptor);
            return Ok((UnixForm::Waiting { who: unix_creds::of_holder(&descriptor.subject) }, shared, shutdown));
        }
        // A datagram socket is called connected also when others are connected to it.
        let connected = facts.state == ESTABLISHED && facts.kind != libc::SOCK_DGRAM as u8;
        let Some(peer) = facts.peer.or(connected.then_some(0)) else {
            return Ok((UnixForm::Idle, shared, facts.shutdown));
        };
        let peer_facts = all.get(&peer);
        if peer == 0 && facts.kind != libc::SOCK_DGRAM as u8 && facts.shutdown != 3 {
            return Err(descriptor.refuse("waits to be accepted by its peer, which cannot be checkpointed yet"));
        }
        let peer_name = socket::peer_name(descriptor.as_fd()).unwrap_or_default();
        let peer_name = unix_name::plain(&peer_name);
        let ready = socket::readiness(descriptor.as_fd(), 0).capturing("polling", descriptor.object())?;
        let form = UnixForm::Connected {
            peer: (peer != 0).then_some(peer.into()),
            peer_shared_name: peer_facts.is_some_and(shares),
            mutual: peer_facts.is_some_and(|f| f.peer == Some(inode)),
            peer_name: UnixName { bytes: peer_name, file: None },
            reset: ready & libc::POLLERR != 0,
        };
        let shutdown = facts.shutdown;
        if peer != 0 {
            look.sockets.expect_unix(peer, descriptor);
        }
        Ok((form, shared, shutdown))
    }
}

impl FileKind for Unix {
    fn name(&self) -> &'static str {
        "unix"
    }

    fn recognizes(&self, descriptor: &Descriptor) -> bool {
        descriptor.link.starts_with(b"socket:")
            && socket::get_int(descriptor.as_fd(), libc::SOL_SOCKET, libc::SO_DOMAIN).is_ok_and(|d| d == libc::AF_UNIX)
    }

    fn look_ahead(&self, look: &mut Look<'_>, descriptor: &Descriptor) -> Result<(), CaptureError> {
        look.sockets.listeners.note(descriptor);
        // Who is gone takes a moment to find out.
        unix_creds::of_peer(look, descriptor.as_fd());
        if socket::get_int(descriptor.as_fd(), libc::SOL_SOCKET, libc::SO_TYPE)
            .is_ok_and(|kind| kind != libc::SOCK_STREAM)
        {
            hidden::prepare(descriptor.as_fd());
        }
        // So are names that nobody has told.
        unix_name::capture(look, descriptor).map(drop)
    }

    fn capture(&self, look: &mut Look<'_>, descriptor: &Descriptor) -> Result<Vec<u8>, CaptureError> {
        let fd = descriptor.as_fd();
        look.sockets.meet_unix(descriptor.stat.st_ino as u32);
        let kind = socket::get_int(fd, libc::SOL_SOCKET, libc::SO_TYPE)
            .capturing("asking the type of", descriptor.object())?;
        let mut options = SocketOptions::capture(descriptor, &[OPTIONS])?;
        let (form, shared_name, shutdown) = Self::form(look, descriptor)?;
        options.shutdown = shutdown;
        let listens = matches!(form, UnixForm::Listening { .. });
        let name = unix_name::capture(look, descriptor)?;
        if !unix_name::is_found(look, fd, &name).capturing("looking for the name of", descriptor.object())? {
            let why = "is bound to a path that only a mount namespace made inside the pod has";
            return Err(descriptor.refuse(format!("{why}, which cannot be checkpointed yet")));
        }
        let state = UnixState {
            kind,
            inode: descriptor.stat.st_ino,
            name,
            shared_name,
            queue: if listens { Vec::new() } else { unix_queue::capture(look, descriptor, kind)? },
            peer_credentials: unix_creds::of_peer(look, fd),
            options,
            form,
        };
        Ok(image::encode(&state))
    }

    fn carries(&self, state: &[u8]) -> Result<Vec<FileId>, RebuildError> {
        let state: UnixState = decoded(state)?;
        Ok(state.queue.into_iter().flat_map(|queued| queued.files).collect())
    }

    fn open(&self, rebuild: &mut Rebuild<'_>, id: FileId, state: &[u8]) -> Result<OwnedFd, RebuildError> {
        let state: UnixState = decoded(state)?;
        let what = state.describe(id);
        let socket = match &state.form {
            UnixForm::Connected { .. } if state.comes_in_pairs() => unix_pair::take(rebuild, &state, &what)?,
            _ => state.open_alone(rebuild, &what)?,
        };
        state.options.prepare(socket.as_fd(), &what)?;
        rebuild.keep_object(unix_pair::NUMBER, state.inode, id);
        unix_pair::remember_name(rebuild, id, &state);
        Ok(socket)
    }

    fn connect(&self, rebuild: &mut Rebuild<'_>, id: FileId, state: &[u8]) -> Result<(), RebuildError> {
        let state: UnixState = decoded(state)?;
        let what = state.describe(id);
        unix_queue::fill(rebuild, id, &state, &what)?;
        unix_backlog::call_again(rebuild, id, &state, &what)?;
        if let UnixForm::Connected { peer, peer_name, reset, .. } = &state.form {
            if !state.comes_in_pairs() {
                unix_pair::connect_datagram(rebuild, id, *peer, peer_name).rebuilding("connecting", &what)?;
            } else if peer.is_none() {
                unix_pair::close_other_end(rebuild, id, state.inode, *reset)
                    .rebuilding("closing the peer of", &what)?;
            }
        }
        state.options.finish(rebuild.file(id)?, &what)
    }

    fn settle(
        &self,
        file: BorrowedFd<'_>,
        state: &[u8],
        _host_pid: &dyn Fn(PodPid) -> Option<HostPid>,
    ) -> Result<(), RebuildError> {
        let state: UnixState = decoded(state)?;
        state.options.shut(file).rebuilding("shutting down", "a unix socket")
    }

    fn needs_settling(&self, state: &[u8]) -> bool {
        // A closed peer shuts the socket down by itself.
        decoded::<UnixState>(state)
            .is_ok_and(|s| s.options.shutdown != 0 && !matches!(s.form, UnixForm::Connected { peer: None, .. }))
    }
}

impl UnixState {
    /// Whether the socket and its peer were made, and must be made again, together.
    pub(super) fn comes_in_pairs(&self) -> bool {
        match &self.form {
            UnixForm::Connected { peer, mutual, peer_name, .. } => {
                self.kind != libc::SOCK_DGRAM
                    || (*mutual && peer_name.bytes.is_empty())
                    || (peer.is_none() && peer_name.bytes.is_empty())
            }
            _ => false,
        }
    }

    fn open_alone(&self, rebuild: &mut Rebuild<'_>, what: &str) -> Result<OwnedFd, RebuildError> {
        let socket = match unix_pair::take_listener(rebuild, self.kind, &self.name) {
            Some(bound) => bound,
            None => {
                let socket = socket::socket(libc::AF_UNIX, self.kind, 0).rebuilding("making", what)?;
                unix_name::bind(socket.as_fd(), &self.name).rebuilding("binding", what)?;
                socket
            }
        };
        if let UnixForm::Listening { backlog, .. } = &self.form {
            unix_creds::acting(self.peer_credentials, &|| socket::listen(&socket, *backlog as i32))
                .rebuilding("listening on", what)?;
            unix_pair::offer_listener(rebuild, self.kind, &self.name, &socket).rebuilding("copying", what)?;
        }
        Ok(socket)
    }

    fn describe(&self, id: FileId) -> String {
        let name = String::from_utf8_lossy(&self.name.bytes).replace('\0', "@");
        format!("{id}, the unix socket {name:?} (inode {})", self.inode)
    }
}
