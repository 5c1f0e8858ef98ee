//! Things that are written to and read from.

use std::io::{self, IoSlice};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use harness::program::Kind;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, getpeername, getsockname, socketpair};

/// A channel as one process has it: both its ends, which may be one.
pub(crate) struct Channel {
    pub(crate) number: usize,
    pub(crate) kind: Kind,
    reader: OwnedFd,
    writer: Option<OwnedFd>,
    /// Addresses that it had when it was opened.
    addresses: Vec<String>,
}

impl Channel {
    pub(crate) fn open(number: usize, kind: Kind) -> io::Result<Channel> {
        let (reader, writer) = ends(number, kind)?;
        let mut channel = Channel { number, kind, reader, writer, addresses: Vec::new() };
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
        matches!(self.kind, Kind::File | Kind::Append)
    }

    /// Whether it keeps the bounds of messages.
    pub(crate) fn has_messages(&self) -> bool {
        matches!(self.kind, Kind::Packets | Kind::Udp)
    }

    pub(crate) fn path(&self) -> String {
        format!("/tmp/pod-program-{}", self.number)
    }

    fn addresses_now(&self) -> Vec<String> {
        if !matches!(self.kind, Kind::Tcp | Kind::Udp) {
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
            if self.has_messages() || self.is_file() || self.kind == Kind::Event {
                break;
            }
        }
        bytes.truncate(filled);
        Ok(bytes)
    }
}

fn ends(number: usize, kind: Kind) -> io::Result<(OwnedFd, Option<OwnedFd>)> {
    let pair = |kind| socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC).map(|(a, b)| (a, Some(b)));
    let file = |append: bool| {
        let mut options = std::fs::OpenOptions::new();
        options.read(true).create(true).append(append).write(true);
        io::Result::Ok((options.open(format!("/tmp/pod-program-{number}"))?.into(), None))
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
        Kind::Event => Ok((EventFd::from_flags(EfdFlags::EFD_NONBLOCK)?.into(), None)),
        Kind::File => file(false),
        Kind::Append => file(true),
    }
}

/// FNV-1a.
pub(crate) fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}
