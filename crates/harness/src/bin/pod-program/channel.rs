//! Things that are written to and read from.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use harness::program::Kind;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, SockaddrStorage, getpeername,
    getsockname, recvmsg, sendmsg, socketpair,
};

/// A channel as one process has it: both its ends, which may be one.
pub(crate) struct Channel {
    pub(crate) number: usize,
    pub(crate) kind: Kind,
    reader: OwnedFd,
    writer: Option<OwnedFd>,
    /// Addresses that it had when it was opened.
    addresses: Vec<String>,
    /// The file's name, if it has one.
    path: String,
}

/// What goes along with the descriptors of a channel that is passed.
#[derive(serde::Serialize, serde::Deserialize)]
struct Label {
    number: usize,
    kind: Kind,
    addresses: Vec<String>,
    path: String,
}

impl Channel {
    pub(crate) fn open(number: usize, kind: Kind) -> io::Result<Channel> {
        let (reader, writer) = ends(number, kind)?;
        let path = path_of(number, kind);
        let mut channel = Channel { number, kind, reader, writer, addresses: Vec::new(), path };
        channel.addresses = channel.addresses_now();
        Ok(channel)
    }

    pub(crate) fn reader(&self) -> BorrowedFd<'_> {
        self.reader.as_fd()
    }

    pub(crate) fn writer(&self) -> BorrowedFd<'_> {
        self.writer.as_ref().unwrap_or(&self.reader).as_fd()
    }

    pub(crate) fn is_file(&self) -> bool {
        matches!(self.kind, Kind::File | Kind::Append | Kind::Memfd | Kind::Sealed | Kind::Shm)
    }

    /// Whether it keeps the bounds of messages.
    pub(crate) fn has_messages(&self) -> bool {
        matches!(self.kind, Kind::Packets | Kind::Udp | Kind::Datagrams)
    }

    /// Whether other channels are passed over it.
    pub(crate) fn is_post(&self) -> bool {
        matches!(self.kind, Kind::Post | Kind::PostStream)
    }

    /// One end that was accepted, and the other, if this process has it.
    pub(crate) fn accepted(number: usize, kind: Kind, reader: OwnedFd, writer: Option<OwnedFd>) -> Channel {
        let mut channel = Channel { number, kind, reader, writer, addresses: Vec::new(), path: String::new() };
        channel.addresses = channel.addresses_now();
        channel
    }

    pub(crate) fn path(&self) -> &str {
        &self.path
    }

    pub(crate) fn rename(&mut self) -> String {
        let path = format!("{}r", self.path);
        let renamed = std::fs::rename(&self.path, &path).map_err(|error| error.kind());
        if renamed.is_ok() {
            self.path = path;
        }
        format!("{renamed:?}")
    }

    /// Makes a file at least that long.
    pub(crate) fn grow(&self, bytes: u64) -> nix::Result<()> {
        let now = nix::sys::stat::fstat(&self.reader)?.st_size;
        nix::unistd::ftruncate(&self.reader, now.max(bytes as i64))
    }

    pub(crate) fn truncate(&self, bytes: u64) -> nix::Result<()> {
        nix::unistd::ftruncate(&self.reader, bytes as i64)
    }

    /// shutdown(2) of the end that is written to; the other end knows of it then.
    pub(crate) fn shut(&self) -> String {
        if !matches!(self.kind, Kind::Pair | Kind::Packets | Kind::Tcp | Kind::Named) || self.writer.is_none() {
            return "has no such end".into();
        }
        let shut = nix::sys::socket::shutdown(self.writer().as_raw_fd(), nix::sys::socket::Shutdown::Write);
        super::raw::await_event(self.reader.as_raw_fd(), libc::POLLRDHUP);
        format!("{shut:?}")
    }

    /// The same open files once more.
    pub(crate) fn dup(&self) -> io::Result<Channel> {
        let reader = self.reader.try_clone()?;
        let writer = self.writer.as_ref().map(OwnedFd::try_clone).transpose()?;
        let (addresses, path) = (self.addresses.clone(), self.path.clone());
        Ok(Channel { number: self.number, kind: self.kind, reader, writer, addresses, path })
    }

    pub(crate) fn send_over(&self, post: &Channel) -> nix::Result<usize> {
        let (number, kind) = (self.number, self.kind);
        let label = Label { number, kind, addresses: self.addresses.clone(), path: self.path.clone() };
        let label = serde_json::to_vec(&label).unwrap_or_default();
        let descriptors: Vec<i32> =
            [Some(&self.reader), self.writer.as_ref()].into_iter().flatten().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&descriptors)];
        sendmsg::<()>(post.writer().as_raw_fd(), &[IoSlice::new(&label)], &rights, MsgFlags::empty(), None)
    }

    pub(crate) fn receive_over(post: &Channel) -> io::Result<Channel> {
        let mut label = vec![0; 4096];
        let mut space = nix::cmsg_space!([i32; 2]);
        let mut parts = [IoSliceMut::new(&mut label)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<()>(post.reader().as_raw_fd(), &mut parts, Some(&mut space), flags)?;
        let rights = message.cmsgs()?.filter_map(|part| match part {
            ControlMessageOwned::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        });
        let mut descriptors = rights.flatten().map(super::raw::own).collect::<Vec<_>>().into_iter();
        let length = message.bytes;
        let label: Label = serde_json::from_slice(&label[..length])?;
        let reader = descriptors.next().ok_or_else(|| io::Error::other("nothing was passed"))?;
        let Label { number, kind, addresses, path } = label;
        Ok(Channel { number, kind, reader, writer: descriptors.next(), addresses, path })
    }

    /// What the kernel shows of it beyond flags: locks, what an epoll watches, which signals, whether a timer is armed.
    fn details(&self) -> String {
        let shown = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", self.reader.as_raw_fd()));
        let mut lines: Vec<String> = shown.unwrap_or_default().lines().filter_map(detail).collect();
        lines.sort();
        match self.kind {
            Kind::Timer => lines = vec![super::raw::armed(self.reader.as_raw_fd())],
            Kind::Queue => lines = vec![super::raw::queued(self.reader.as_raw_fd())],
            Kind::Sealed => lines.push(format!("seals {:?}", fcntl(&self.reader, FcntlArg::F_GET_SEALS))),
            _ => {}
        }
        lines.join(", ")
    }

    fn addresses_now(&self) -> Vec<String> {
        if !matches!(self.kind, Kind::Tcp | Kind::Udp | Kind::Named) {
            return Vec::new();
        }
        let own = |fd: BorrowedFd<'_>| getsockname::<SockaddrStorage>(fd.as_raw_fd()).map(|a| a.to_string());
        let peer = |fd: BorrowedFd<'_>| getpeername::<SockaddrStorage>(fd.as_raw_fd()).map(|a| a.to_string());
        let both = [self.reader(), self.writer()];
        both.iter().flat_map(|fd| [own(*fd), peer(*fd)]).map(|a| a.unwrap_or_else(|e| e.to_string())).collect()
    }

    /// Everything that can be seen of it and is the same in every run.
    pub(crate) fn describe(&self) -> String {
        let flags = |fd: BorrowedFd<'_>| {
            let status = fcntl(fd, FcntlArg::F_GETFL).map_or(-1, |flags| flags);
            let descriptor = fcntl(fd, FcntlArg::F_GETFD).map_or(-1, |flags| flags);
            format!("{}:{status:o}/{descriptor}", fd.as_raw_fd())
        };
        let mut text = format!("{:?}{}[{}", self.kind, self.number, flags(self.reader()));
        if self.writer.is_some() {
            text += &format!(" {}", flags(self.writer()));
        }
        if self.is_file() {
            let offset = nix::unistd::lseek(self.reader(), 0, nix::unistd::Whence::SeekCur);
            let stat = nix::sys::stat::fstat(self.reader());
            let facts = stat.map(|s| (s.st_mode, s.st_nlink, s.st_size, s.st_uid));
            text += &format!(" at {offset:?} {facts:?} {:x}", hash(&self.whole_file()));
        }
        text += &self.details();
        if self.addresses != self.addresses_now() {
            text += &format!(" {:?} became {:?}", self.addresses, self.addresses_now());
        }
        text + "]"
    }

    fn whole_file(&self) -> Vec<u8> {
        let mut bytes = vec![0; 1 << 20];
        let length = nix::sys::uio::pread(self.reader(), &mut bytes, 0).unwrap_or(0);
        bytes.truncate(length);
        bytes
    }

    pub(crate) fn put(&self, bytes: &[u8]) -> nix::Result<usize> {
        nix::sys::uio::writev(self.writer(), &[IoSlice::new(bytes)])
    }

    /// Reads `length` bytes or one message; an end in between is an error.
    pub(crate) fn take(&self, length: usize) -> nix::Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        let mut filled = 0;
        while filled < length {
            match nix::unistd::read(self.reader(), &mut bytes[filled..])? {
                0 => break,
                read => filled += read,
            }
            if self.has_messages() || self.is_file() || matches!(self.kind, Kind::Event | Kind::Semaphore) {
                break;
            }
        }
        bytes.truncate(filled);
        Ok(bytes)
    }
}

/// The name of what has one.
fn path_of(number: usize, kind: Kind) -> String {
    let directory = if kind == Kind::Shm { "/dev/shm" } else { "/tmp" };
    format!("{directory}/pod-program-{number}")
}

fn ends(number: usize, kind: Kind) -> io::Result<(OwnedFd, Option<OwnedFd>)> {
    let pair = |kind| socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC).map(|(a, b)| (a, Some(b)));
    let file = |append: bool| {
        let mut options = std::fs::OpenOptions::new();
        options.read(true).create(true).append(append).write(true);
        io::Result::Ok((options.open(path_of(number, kind))?.into(), None))
    };
    match kind {
        Kind::Pipe => Ok(nix::unistd::pipe().map(|(a, b)| (a, Some(b)))?),
        Kind::Pair => Ok(pair(SockType::Stream)?),
        Kind::Packets => Ok(pair(SockType::SeqPacket)?),
        Kind::Tcp => {
            let listener = TcpListener::bind("127.0.0.1:0")?;
            let writer = TcpStream::connect(listener.local_addr()?)?;
            Ok((listener.accept()?.0.into(), Some(writer.into())))
        }
        Kind::Udp => {
            let (one, other) = (UdpSocket::bind("127.0.0.1:0")?, UdpSocket::bind("127.0.0.1:0")?);
            one.connect(other.local_addr()?)?;
            other.connect(one.local_addr()?)?;
            Ok((one.into(), Some(other.into())))
        }
        Kind::Named => {
            let path = path_of(number, kind);
            let listener = UnixListener::bind(&path)?;
            let writer = UnixStream::connect(path)?;
            Ok((listener.accept()?.0.into(), Some(writer.into())))
        }
        Kind::Semaphore => Ok((EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_SEMAPHORE)?.into(), None)),
        Kind::Event => Ok((EventFd::from_flags(EfdFlags::EFD_NONBLOCK)?.into(), None)),
        Kind::Fifo => {
            let path = path_of(number, kind);
            nix::unistd::mkfifo(path.as_str(), nix::sys::stat::Mode::S_IRWXU)?;
            let both = std::fs::File::options().read(true).write(true).open(&path)?;
            Ok((std::fs::File::open(&path)?.into(), Some(both.into())))
        }
        Kind::Pty => {
            let pty = nix::pty::openpty(None, None)?;
            let mut settings = nix::sys::termios::tcgetattr(&pty.slave)?;
            nix::sys::termios::cfmakeraw(&mut settings);
            nix::sys::termios::tcsetattr(&pty.slave, nix::sys::termios::SetArg::TCSANOW, &settings)?;
            Ok((pty.master, Some(pty.slave)))
        }
        Kind::Memfd => Ok((nix::sys::memfd::memfd_create(c"a file", nix::sys::memfd::MFdFlags::empty())?, None)),
        Kind::Sealed => {
            Ok((nix::sys::memfd::memfd_create(c"sealed", nix::sys::memfd::MFdFlags::MFD_ALLOW_SEALING)?, None))
        }
        Kind::Datagrams => Ok(pair(SockType::Datagram)?),
        Kind::Post => Ok(pair(SockType::SeqPacket)?),
        Kind::PostStream => Ok(pair(SockType::Stream)?),
        Kind::Timer => Ok((super::raw::timer()?, None)),
        Kind::Signals => Ok((super::raw::signals_file()?, None)),
        Kind::Queue => Ok((super::raw::open_queue(number)?, None)),
        Kind::Epoll => Ok((super::raw::epoll()?, None)),
        Kind::Notify => Ok((super::notify::open(&path_of(number, kind))?, None)),
        Kind::File | Kind::Shm => file(false),
        Kind::Append => file(true),
    }
}

/// A line of fdinfo that says something of the program's doing.
fn detail(line: &str) -> Option<String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    match words[..] {
        // lock: N: kind, advisory, mode, PID, file, from, to
        ["lock:", _, kind, _, mode, _, _, from, to] => Some(format!("{kind} {mode} {from}-{to}")),
        ["tfd:", number, "events:", events, "data:", data, ..] => Some(format!("{number} {events} {data}")),
        ["sigmask:", mask] => Some(mask.to_owned()),
        ["eventfd-count:", count] => Some(count.to_owned()),
        ["inotify", number, _, _, mask, ..] => Some(format!("{number} {mask}")),
        _ => None,
    }
}

/// FNV-1a.
pub(crate) fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}
