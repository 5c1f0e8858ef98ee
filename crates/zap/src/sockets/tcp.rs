//! TCP sockets: unbound, bound, listening, connecting, connected in every phase, ended.

use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use serde::{Deserialize, Serialize};

use super::common::{self, Fresh, Name, SocketOptions};
use super::tcp_queues::{Connection, Phase, Queued};
use super::tcp_repair::Agreed;
use super::waiting::{connections, has_waiting};
use super::{address, tcp_fin, tcp_repair, tcp_urgent, unkept};
use crate::error::{CaptureError, Context, RebuildError};
use crate::files::{Descriptor, FileKind, Keep};
use crate::ids::FileId;
use crate::image;
use crate::look::Look;
use crate::rebuild::Rebuild;
use crate::sys::socket;

const fn tcp(name: i32) -> Name {
    (libc::IPPROTO_TCP, name)
}

const TX_DELAY: i32 = 37;
pub(super) const RTO_MAX_MS: i32 = 44;
pub(super) const RTO_MIN_US: i32 = 45;
pub(super) const DELACK_MAX_US: i32 = 46;
/// The keys by which a listener makes cookies, if it has its own.
const FASTOPEN_KEY: (Name, usize) = (tcp(libc::TCP_FASTOPEN_KEY), 32);

/// `TCP_CORK` is not here: it is put back last, when nothing of ours is to be held back by it.
const OPTIONS: &[Name] = &[
    tcp(libc::TCP_NODELAY),
    tcp(libc::TCP_KEEPIDLE),
    tcp(libc::TCP_KEEPINTVL),
    tcp(libc::TCP_KEEPCNT),
    tcp(libc::TCP_SYNCNT),
    tcp(libc::TCP_LINGER2),
    tcp(libc::TCP_DEFER_ACCEPT),
    tcp(libc::TCP_USER_TIMEOUT),
    tcp(libc::TCP_THIN_LINEAR_TIMEOUTS),
    tcp(libc::TCP_NOTSENT_LOWAT),
    tcp(libc::TCP_INQ),
    tcp(libc::TCP_SAVE_SYN),
    tcp(libc::TCP_FASTOPEN),
    tcp(libc::TCP_FASTOPEN_CONNECT),
    tcp(libc::TCP_FASTOPEN_NO_COOKIE),
    tcp(TX_DELAY),
    tcp(RTO_MAX_MS),
    tcp(RTO_MIN_US),
    tcp(DELACK_MAX_US),
];

/// Of a socket without a connection, this is what its owner asked for; of one with, what came of it.
const UNCONNECTED: &[Name] = &[tcp(libc::TCP_MAXSEG), tcp(libc::TCP_WINDOW_CLAMP)];

/// What was decoded to open a socket, until it is connected.
const OPENED: &str = "opened TCP socket";

/// A TCP socket.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TcpState {
    /// `AF_INET` or `AF_INET6`.
    pub family: i32,
    /// Options.
    pub options: SocketOptions,
    /// `TCP_CORK`.
    pub cork: bool,
    /// Congestion control.
    pub congestion: String,
    /// What it does.
    pub form: Form,
}

/// What a TCP socket does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Form {
    /// Nothing; it may be bound.
    Idle {
        /// Where.
        local: Option<SocketAddr>,
    },
    /// It listens.
    Listening {
        /// Where.
        local: SocketAddr,
        /// How many connections may wait to be accepted.
        backlog: u32,
    },
    /// It has sent a SYN that was not answered.
    Connecting {
        /// Our address.
        local: SocketAddr,
        /// The peer's.
        peer: SocketAddr,
    },
    /// It has a connection.
    Connected(Box<Connection>),
    /// It had a connection; nothing is left but what was received.
    Ended {
        /// Our address.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        local: Option<SocketAddr>,
        /// Whether an error is waiting to be told.
        reset: bool,
        /// What was not read.
        receive: image::DataRef,
    },
}

/// The beginning of `struct tcp_info`.
pub(super) struct Info([u8; 32]);

impl Info {
    pub(super) fn read(fd: BorrowedFd<'_>) -> std::io::Result<Info> {
        let mut bytes = [0; 32];
        let length = socket::get_bytes(fd, libc::IPPROTO_TCP, libc::TCP_INFO, &mut bytes)?;
        if length < bytes.len() { Err(std::io::Error::other("TCP_INFO is too short")) } else { Ok(Info(bytes)) }
    }

    pub(super) fn state(&self) -> u8 {
        self.0[0]
    }

    fn word(&self, offset: usize) -> u32 {
        u32::from_ne_bytes([self.0[offset], self.0[offset + 1], self.0[offset + 2], self.0[offset + 3]])
    }

    /// Of a listener: connections that wait to be accepted.
    pub(super) fn waiting(&self) -> u32 {
        self.word(24)
    }

    /// Of a listener: how many may wait.
    fn backlog(&self) -> u32 {
        self.word(28)
    }

    pub(super) fn agreed(&self, segment: u16, timestamp: u32) -> Agreed {
        const TIMESTAMPS: u8 = 1;
        const SELECTIVE: u8 = 2;
        const SCALE: u8 = 4;
        let has = |option| self.0[5] & option != 0;
        Agreed {
            segment,
            scales: has(SCALE).then_some((self.0[6] & 0xf, self.0[6] >> 4)),
            selective: has(SELECTIVE),
            timestamp: has(TIMESTAMPS).then_some(timestamp),
        }
    }
}

/// The local address, and the peer's if there is one.
pub(super) fn ends(descriptor: &Descriptor) -> Result<(SocketAddr, Option<SocketAddr>), CaptureError> {
    let local = socket::local_name(descriptor.as_fd()).capturing("asking the address", descriptor.object())?;
    let peer = socket::peer_name(descriptor.as_fd()).ok();
    let local = address::from_kernel(&local)
        .ok_or_else(|| CaptureError::Unexpected { object: descriptor.object(), what: "address".to_owned() })?;
    Ok((local, peer.and_then(|p| address::from_kernel(&p))))
}

/// TCP.
pub struct Tcp;

pub(super) const CLOSE: u8 = 7;
const LISTEN: u8 = 10;
const SYN_SENT: u8 = 2;

impl Tcp {
    fn refuse_waiting(descriptor: &Descriptor, info: &Info) -> Result<(), CaptureError> {
        match info.waiting() {
            0 => Ok(()),
            n => Err(descriptor.refuse(has_waiting(&connections(n)))),
        }
    }

    fn closed(
        descriptor: &Descriptor,
        local: SocketAddr,
        options: &SocketOptions,
    ) -> Result<(Form, Vec<u8>), CaptureError> {
        let fd = descriptor.as_fd();
        let ready = socket::readiness(fd, libc::POLLIN | libc::POLLRDHUP).capturing("polling", descriptor.object())?;
        if ready & libc::POLLRDHUP == 0 {
            return Ok((Form::Idle { local: common::bound_to(local, options) }, Vec::new()));
        }
        let unread = socket::ioctl_int(fd, libc::FIONREAD).capturing("measuring the queue", descriptor.object())?;
        let queue = super::tcp_queues::peek(fd, unread as u32).capturing("reading the queue", descriptor.object())?;
        let local = (local.port() != 0).then_some(local);
        let receive = image::DataRef { offset: 0, length: queue.len() as u64 };
        Ok((Form::Ended { local, reset: ready & libc::POLLERR != 0, receive }, queue))
    }
}

/// What a socket does, and the bytes that were in its queues.
#[derive(Debug)]
enum Doing {
    Connected(Connection, Queued),
    Other(Form, Vec<u8>),
}

impl Doing {
    fn read(descriptor: &Descriptor, options: &SocketOptions) -> Result<Doing, CaptureError> {
        let mut info = Info::read(descriptor.as_fd()).capturing("reading TCP_INFO", descriptor.object())?;
        if Phase::of_state(info.state()).is_some() {
            if let Some((connection, queued)) = Connection::read(descriptor, &info, options.reuse)? {
                return Ok(Doing::Connected(connection, queued));
            }
            info = Info::read(descriptor.as_fd()).capturing("reading TCP_INFO", descriptor.object())?;
        }
        let (local, _) = ends(descriptor)?;
        let form = match info.state() {
            LISTEN => {
                Tcp::refuse_waiting(descriptor, &info)?;
                Form::Listening { local, backlog: info.backlog() }
            }
            CLOSE => return Tcp::closed(descriptor, local, options).map(|(form, queue)| Doing::Other(form, queue)),
            SYN_SENT => Form::Connecting { local, peer: peer_to_be(descriptor)? },
            state => {
                return Err(descriptor.refuse(format!("is in TCP state {state}, which cannot be checkpointed yet")));
            }
        };
        Ok(Doing::Other(form, Vec::new()))
    }

    /// Gives the bytes a place in the image.
    fn keep(self, look: &mut Look<'_>) -> Form {
        match self {
            Doing::Connected(mut connection, queued) => {
                connection.keep(look, queued);
                Form::Connected(connection.into())
            }
            Doing::Other(Form::Ended { local, reset, .. }, queue) => {
                Form::Ended { local, reset, receive: look.data.append(queue) }
            }
            Doing::Other(form, _) => form,
        }
    }
}

/// What the socket does.
pub(super) fn form(
    look: &mut Look<'_>,
    descriptor: &Descriptor,
    options: &SocketOptions,
) -> Result<Form, CaptureError> {
    Doing::read(descriptor, options).map(|doing| doing.keep(look))
}

/// A socket whose bytes have no place in the image yet.
struct Read {
    family: i32,
    options: SocketOptions,
    cork: bool,
    congestion: String,
    doing: Doing,
}

impl Read {
    fn of(descriptor: &Descriptor) -> Result<Read, CaptureError> {
        let fd = descriptor.as_fd();
        refuse_layers(descriptor)?;
        let get = |level, name| socket::get_int(fd, level, name).capturing("reading an option", descriptor.object());
        let family = get(libc::SOL_SOCKET, libc::SO_DOMAIN)?;
        let v6: &[&[Name]] = if family == libc::AF_INET6 { &[common::IPV6, common::STREAM6] } else { &[] };
        let groups = [&[OPTIONS, common::IPV4, common::STREAM4], v6].concat();
        let mut options = SocketOptions::capture(descriptor, &groups)?;
        options.add_headers(fd, family);
        let doing = Doing::read(descriptor, &options)?;
        unkept::refuse_tcp(descriptor, matches!(doing, Doing::Connected(..)))?;
        match &doing {
            Doing::Other(Form::Idle { .. } | Form::Listening { .. }, _) => {
                options.add_numbers(fd, UNCONNECTED);
                options.add_numbers(fd, common::UNCONNECTED);
                options.add_variable(fd, FASTOPEN_KEY);
            }
            Doing::Connected(connection, _) if !connection.phase.fin_theirs() => {
                options.shutdown = common::reading_shut(fd).capturing("polling", descriptor.object())?.into();
            }
            _ => {}
        }
        let cork = get(libc::IPPROTO_TCP, libc::TCP_CORK)? != 0;
        Ok(Read { family, options, cork, congestion: text_option(fd, libc::TCP_CONGESTION), doing })
    }

    fn keep(self, look: &mut Look<'_>, id: Option<FileId>, descriptor: &Descriptor) -> Vec<u8> {
        let Read { family, options, cork, congestion, doing } = self;
        let state = TcpState { family, options, cork, congestion, form: doing.keep(look) };
        if let Some(id) = id {
            look.sockets.pairs.meet(id, descriptor, &state);
        }
        image::encode(&state)
    }
}

impl FileKind for Tcp {
    fn name(&self) -> &'static str {
        "tcp"
    }

    fn look_ahead(&self, look: &mut Look<'_>, descriptor: &Descriptor) -> Result<(), CaptureError> {
        unkept::refuse_signed(look, descriptor)?;
        look.queued += super::tcp_queues::queued(descriptor.as_fd());
        tcp_urgent::prepare(descriptor.as_fd());
        look.sockets.hear = true;
        look.sockets.listeners.note(descriptor);
        Ok(())
    }

    fn recognizes(&self, descriptor: &Descriptor) -> bool {
        let get = |name| socket::get_int(descriptor.as_fd(), libc::SOL_SOCKET, name).unwrap_or(-1);
        descriptor.link.starts_with(b"socket:")
            && get(libc::SO_PROTOCOL) == libc::IPPROTO_TCP
            && get(libc::SO_TYPE) == libc::SOCK_STREAM
            && matches!(get(libc::SO_DOMAIN), libc::AF_INET | libc::AF_INET6)
    }

    fn check(&self, descriptor: &Descriptor) -> Result<(), CaptureError> {
        refuse_layers(descriptor)?;
        unkept::refuse_tcp(descriptor, is_connected(descriptor))
    }

    fn capture(&self, look: &mut Look<'_>, descriptor: &Descriptor) -> Result<Vec<u8>, CaptureError> {
        let id = look.files.newest();
        Ok(Read::of(descriptor)?.keep(look, id, descriptor))
    }

    fn reads_apart(&self) -> bool {
        true
    }

    fn read_apart(&self, descriptor: &Descriptor) -> Result<Keep, CaptureError> {
        let read = Read::of(descriptor)?;
        let descriptor = descriptor.clone();
        Ok(Box::new(move |look, id| read.keep(look, Some(id), &descriptor)))
    }

    fn open(&self, rebuild: &mut Rebuild<'_>, id: FileId, state: &[u8]) -> Result<OwnedFd, RebuildError> {
        let state = decode(state)?;
        let what = describe(id, &state);
        let socket = socket::socket(state.family, libc::SOCK_STREAM, libc::IPPROTO_TCP).rebuilding("making", &what)?;
        let fd = socket.as_fd();
        state.options.prepare_fresh(fd, &what, fresh(rebuild, state.family))?;
        state.options.set_buffers(fd, &what)?;
        if !state.congestion.is_empty() && text_option(fd, libc::TCP_CONGESTION) != state.congestion {
            socket::set_bytes(fd, libc::IPPROTO_TCP, libc::TCP_CONGESTION, state.congestion.as_bytes())
                .map_err(|_| RebuildError::Lacks(format!("the TCP congestion control {}", state.congestion)))?;
        }
        // Whatever else is bound to the port: the kernel agreed to it once. The true value comes back at the end.
        socket::set_int(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1).rebuilding("setting up", &what)?;
        common::with_any_address(fd, state.family, || match &state.form {
            Form::Idle { local: None } => Ok(()),
            Form::Idle { local: Some(local) } | Form::Connecting { local, .. } => {
                socket::bind(fd, &address::to_kernel(*local, state.family)).rebuilding("binding", &what)
            }
            Form::Listening { local, backlog } => {
                socket::bind(fd, &address::to_kernel(*local, state.family)).rebuilding("binding", &what)?;
                socket::listen(fd, *backlog as i32).rebuilding("listening on", &what)
            }
            Form::Connected(connection) => connection.rebuild(fd, state.family, rebuild.image, &what),
            Form::Ended { local, reset, receive } => {
                tcp_fin::end(fd, (state.family, *local), *reset, *receive, rebuild.image, &what)
            }
        })?;
        rebuild.keep_object(OPENED, u64::from(id.0), state);
        Ok(socket)
    }

    fn connect(&self, rebuild: &mut Rebuild<'_>, id: FileId, state: &[u8]) -> Result<(), RebuildError> {
        let state = rebuild.take_object::<TcpState>(OPENED, u64::from(id.0)).map_or_else(|| decode(state), Ok)?;
        let what = describe(id, &state);
        let fd = rebuild.file(id)?;
        if let Form::Connected(connection) = &state.form {
            tcp_fin::close(fd, connection, &what)?;
            connection.open_windows(fd).rebuilding("opening the windows", &what)?;
            if state.options.shutdown & 1 != 0 {
                socket::shutdown(fd, libc::SHUT_RD).rebuilding("closing", &what)?;
            }
        }
        state.options.finish(fd, &what)
    }

    fn awaken(&self, file: BorrowedFd<'_>, state: &[u8]) -> Result<(), RebuildError> {
        let state = decode(state)?;
        match &state.form {
            Form::Connecting { peer, .. } => {
                ask_again(file, *peer, state.family).rebuilding("connecting", "a TCP socket")
            }
            _ => state.let_go(file).rebuilding("leaving repair mode", "a TCP connection"),
        }
    }

    fn needs_settling(&self, state: &[u8]) -> bool {
        decode(state).is_ok_and(|s| matches!(s.form, Form::Connected(_) | Form::Connecting { .. }))
    }
}

/// The options of a TCP socket that was only just made in the network namespace in which the builder works.
fn fresh<'r>(rebuild: &'r mut Rebuild<'_>, family: i32) -> &'r mut Fresh {
    const KIND: &str = "fresh TCP socket";
    let network = rebuild.network().map_or(0, |network| u64::from(network.0) + 1);
    rebuild.object_or_default(KIND, network << 32 | family as u64)
}

impl TcpState {
    /// Whether its peer has said all, and has heard all that was said so far. It may be gone by now: a question would have the
    /// connection reset.
    fn is_quiet(&self) -> bool {
        matches!(&self.form, Form::Connected(c) if c.phase == Phase::CloseWait && c.send.length == 0)
    }

    /// Out of repair mode: the kernel asks the peer at once where it is, and sends what was not sent.
    fn let_go(&self, fd: BorrowedFd<'_>) -> std::io::Result<()> {
        let set = |level, name, value: bool| socket::set_int(fd, level, name, value.into());
        if self.is_quiet() {
            tcp_repair::leave_repair(fd, self.options.reuse)?;
        } else {
            set(libc::IPPROTO_TCP, libc::TCP_REPAIR, false)?;
        }
        set(libc::SOL_SOCKET, libc::SO_REUSEADDR, self.options.reuse)?;
        if self.cork {
            return set(libc::IPPROTO_TCP, libc::TCP_CORK, true);
        }
        // Setting this option is what pushes a queue.
        set(libc::IPPROTO_TCP, libc::TCP_NODELAY, true)?;
        let delay = self.options.number(tcp(libc::TCP_NODELAY)).unwrap_or(0);
        socket::set_int(fd, libc::IPPROTO_TCP, libc::TCP_NODELAY, delay)
    }
}

/// Whom a socket is connecting to. `getpeername` does not tell, but the list of the network namespace does.
fn peer_to_be(descriptor: &Descriptor) -> Result<SocketAddr, CaptureError> {
    let family = socket::get_int(descriptor.as_fd(), libc::SOL_SOCKET, libc::SO_DOMAIN);
    let name = if family.is_ok_and(|family| family == libc::AF_INET6) { "net/tcp6" } else { "net/tcp" };
    let list = std::fs::read_to_string(descriptor.subject.host.proc(name)).capturing("reading", name)?;
    let inode = descriptor.stat.st_ino.to_string();
    let line = list.lines().find(|line| line.split_ascii_whitespace().nth(9) == Some(&inode));
    let peer = line.and_then(|line| address::from_proc(line.split_ascii_whitespace().nth(2)?));
    peer.ok_or_else(|| CaptureError::Unexpected { object: descriptor.object(), what: "lack of a peer".to_owned() })
}

/// Asks for a connection anew. Nobody waits for the answer here; a failure is the program's to see.
fn ask_again(fd: BorrowedFd<'_>, peer: SocketAddr, family: i32) -> std::io::Result<()> {
    use crate::sys::descriptor::{flags, set_flags};
    let before = flags(fd)?;
    set_flags(fd, before | libc::O_NONBLOCK)?;
    let _ = socket::connect(fd, &address::to_kernel(peer, family));
    set_flags(fd, before)
}

/// Whether it has a connection now.
fn is_connected(descriptor: &Descriptor) -> bool {
    Info::read(descriptor.as_fd()).is_ok_and(|info| Phase::of_state(info.state()).is_some())
}

/// A protocol on top (TLS in the kernel …) keeps state of its own.
fn refuse_layers(descriptor: &Descriptor) -> Result<(), CaptureError> {
    let layer = text_option(descriptor.as_fd(), libc::TCP_ULP);
    if layer.is_empty() {
        return Ok(());
    }
    Err(descriptor.refuse(format!("has {layer} in the kernel on top of TCP, which cannot be checkpointed yet")))
}

fn text_option(fd: BorrowedFd<'_>, name: i32) -> String {
    let mut bytes = [0; 16];
    let length = socket::get_bytes(fd, libc::IPPROTO_TCP, name, &mut bytes).unwrap_or(0);
    String::from_utf8_lossy(&bytes[..length]).trim_end_matches('\0').to_owned()
}

fn decode(state: &[u8]) -> Result<TcpState, RebuildError> {
    image::decode(state).map_err(|e| RebuildError::Damaged(format!("a TCP socket: {e}")))
}

fn describe(id: FileId, state: &TcpState) -> String {
    match &state.form {
        Form::Idle { local: None } => format!("{id}, an unbound TCP socket"),
        Form::Idle { local: Some(local) } => format!("{id}, the TCP socket bound to {local}"),
        Form::Listening { local, .. } => format!("{id}, the TCP listener on {local}"),
        Form::Connecting { local, peer } => format!("{id}, the TCP connection {local} to {peer}"),
        Form::Connected(c) => format!("{id}, the TCP connection {} to {}", c.local, c.peer),
        Form::Ended { .. } => format!("{id}, a TCP socket whose connection ended"),
    }
}
