//! What every socket has: options, buffer sizes, a filter, an owner.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;

use serde::{Deserialize, Serialize};

use crate::error::{CaptureError, Context, RebuildError};
use crate::files::Descriptor;
use crate::sys::socket::{self, FilterStep};

/// An option that is an `int`: (level, name).
pub(super) type Name = (i32, i32);

const fn sol(name: i32) -> Name {
    (libc::SOL_SOCKET, name)
}

const SO_TXTIME: i32 = 61;
const SO_PREFER_BUSY_POLL: i32 = 69;
const SO_BUSY_POLL_BUDGET: i32 = 70;
const SO_TXREHASH: i32 = 74;
const SO_RESERVE_MEM: i32 = 73;
const SO_RCVMARK: i32 = 75;
const SO_RCVPRIORITY: i32 = 82;
const IP_CHECKSUM: i32 = 23;
const IP_RECVFRAGSIZE: i32 = 25;
const IP_RECVERR_RFC4884: i32 = 26;
const IP_LOCAL_PORT_RANGE: i32 = 51;
const IPV6_FLOWINFO_SEND: i32 = 33;
const IPV6_MULTICAST_ALL: i32 = 29;
const IPV6_RECVERR_RFC4884: i32 = 31;
const IPV6_ADDR_PREFERENCES: i32 = 72;
const IPV6_MINHOPCOUNT: i32 = 73;
const IPV6_UNICAST_IF: i32 = 76;
const IPV6_RECVFRAGSIZE: i32 = 77;

/// Options of every family. `SO_REUSEADDR` is apart: repair and restarts play with it.
const GENERIC: &[Name] = &[
    sol(libc::SO_REUSEPORT),
    sol(libc::SO_KEEPALIVE),
    sol(libc::SO_OOBINLINE),
    sol(libc::SO_PRIORITY),
    sol(libc::SO_RCVLOWAT),
    sol(libc::SO_MARK),
    sol(libc::SO_DONTROUTE),
    sol(libc::SO_BROADCAST),
    sol(libc::SO_TIMESTAMP),
    sol(libc::SO_TIMESTAMPNS),
    sol(libc::SO_TIMESTAMPING),
    // The same with times that last beyond 2038: a socket has the one or the other.
    sol(63),
    sol(64),
    sol(65),
    sol(libc::SO_BUSY_POLL),
    sol(SO_PREFER_BUSY_POLL),
    sol(SO_BUSY_POLL_BUDGET),
    sol(SO_TXREHASH),
    sol(SO_RESERVE_MEM),
    sol(SO_RCVMARK),
    sol(SO_RCVPRIORITY),
    sol(libc::SO_ZEROCOPY),
    sol(libc::SO_PEEK_OFF),
];

/// Options that mean something to datagrams only.
pub(super) const DATAGRAM: &[Name] =
    &[sol(libc::SO_NO_CHECK), sol(libc::SO_RXQ_OVFL), sol(libc::SO_SELECT_ERR_QUEUE), sol(libc::SO_WIFI_STATUS)];

/// The same, of IPv4.
pub(super) const DATAGRAM4: &[Name] = &[
    (libc::IPPROTO_IP, libc::IP_PKTINFO),
    (libc::IPPROTO_IP, libc::IP_RECVTOS),
    (libc::IPPROTO_IP, libc::IP_RECVTTL),
    (libc::IPPROTO_IP, libc::IP_RECVORIGDSTADDR),
    (libc::IPPROTO_IP, libc::IP_RECVOPTS),
    (libc::IPPROTO_IP, libc::IP_RETOPTS),
    (libc::IPPROTO_IP, libc::IP_PASSSEC),
    (libc::IPPROTO_IP, IP_CHECKSUM),
    (libc::IPPROTO_IP, IP_RECVFRAGSIZE),
    (libc::IPPROTO_IP, libc::IP_MULTICAST_TTL),
    (libc::IPPROTO_IP, libc::IP_MULTICAST_LOOP),
    (libc::IPPROTO_IP, libc::IP_MULTICAST_ALL),
];

/// The same, of IPv6.
pub(super) const DATAGRAM6: &[Name] = &[
    (libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVHOPLIMIT),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVORIGDSTADDR),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVHOPOPTS),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVRTHDR),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVDSTOPTS),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVPATHMTU),
    (libc::IPPROTO_IPV6, IPV6_RECVFRAGSIZE),
    (libc::IPPROTO_IPV6, libc::IPV6_DONTFRAG),
    // What came with a packet, in the form that programs had before RFC 3542.
    (libc::IPPROTO_IPV6, libc::IPV6_2292PKTINFO),
    (libc::IPPROTO_IPV6, libc::IPV6_2292HOPOPTS),
    (libc::IPPROTO_IPV6, libc::IPV6_2292DSTOPTS),
    (libc::IPPROTO_IPV6, libc::IPV6_2292RTHDR),
    (libc::IPPROTO_IPV6, libc::IPV6_2292HOPLIMIT),
    (libc::IPPROTO_IPV6, libc::IPV6_FLOWINFO),
    (libc::IPPROTO_IPV6, IPV6_MULTICAST_ALL),
    (libc::IPPROTO_IPV6, libc::IPV6_MULTICAST_HOPS),
    (libc::IPPROTO_IPV6, libc::IPV6_MULTICAST_LOOP),
    (libc::IPPROTO_IPV6, libc::IPV6_MULTICAST_IF),
];

/// What a TCP socket may tell of the packets that come to it (`IP_PKTOPTIONS`).
pub(super) const STREAM4: &[Name] =
    &[(libc::IPPROTO_IP, libc::IP_PKTINFO), (libc::IPPROTO_IP, libc::IP_RECVTOS), (libc::IPPROTO_IP, libc::IP_RECVTTL)];

/// The same, of IPv6.
pub(super) const STREAM6: &[Name] = &[
    (libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVHOPLIMIT),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS),
];

/// The address that a socket is bound to, which may have no port (`IP_BIND_ADDRESS_NO_PORT`).
pub(super) fn bound_to(local: SocketAddr, options: &SocketOptions) -> Option<SocketAddr> {
    let late = options.number((libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT)).is_some_and(|late| late != 0);
    (local.port() != 0 || late && !local.ip().is_unspecified()).then_some(local)
}

/// Options whose value is a structure: lingering, timeouts, pacing.
const STRUCTURED: &[(Name, usize)] = &[
    (sol(libc::SO_LINGER), size_of::<libc::linger>()),
    (sol(libc::SO_RCVTIMEO), size_of::<libc::timeval>()),
    (sol(libc::SO_SNDTIMEO), size_of::<libc::timeval>()),
    (sol(libc::SO_MAX_PACING_RATE), 8),
    // A clock, and flags.
    (sol(SO_TXTIME), 8),
    // By an address of the interface; one that was chosen by number is not shown.
    ((libc::IPPROTO_IP, libc::IP_MULTICAST_IF), 4),
];

/// Options of a length of their own, and how long they may be: what is put into the headers of every packet.
const VARIABLE4: &[(Name, usize)] = &[((libc::IPPROTO_IP, libc::IP_OPTIONS), 40)];
const VARIABLE6: &[(Name, usize)] = &[
    ((libc::IPPROTO_IPV6, libc::IPV6_HOPOPTS), 2048),
    ((libc::IPPROTO_IPV6, libc::IPV6_RTHDRDSTOPTS), 2048),
    ((libc::IPPROTO_IPV6, libc::IPV6_RTHDR), 2048),
    ((libc::IPPROTO_IPV6, libc::IPV6_DSTOPTS), 2048),
];

/// The processor whose packets it is to have, of sockets of which the kernel does not note where they came in.
pub(super) const UNCONNECTED: &[Name] = &[sol(libc::SO_INCOMING_CPU)];

/// Options of IPv4, and of IPv6 sockets when they carry IPv4.
pub(super) const IPV4: &[Name] = &[
    (libc::IPPROTO_IP, libc::IP_TOS),
    (libc::IPPROTO_IP, libc::IP_TTL),
    (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER),
    (libc::IPPROTO_IP, libc::IP_RECVERR),
    (libc::IPPROTO_IP, libc::IP_FREEBIND),
    (libc::IPPROTO_IP, libc::IP_TRANSPARENT),
    (libc::IPPROTO_IP, libc::IP_MINTTL),
    (libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT),
    (libc::IPPROTO_IP, IP_RECVERR_RFC4884),
    (libc::IPPROTO_IP, libc::IP_UNICAST_IF),
    (libc::IPPROTO_IP, IP_LOCAL_PORT_RANGE),
];

/// Options of IPv6.
pub(super) const IPV6: &[Name] = &[
    (libc::IPPROTO_IPV6, libc::IPV6_V6ONLY),
    (libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS),
    (libc::IPPROTO_IPV6, libc::IPV6_TCLASS),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVERR),
    (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER),
    (libc::IPPROTO_IPV6, libc::IPV6_FREEBIND),
    (libc::IPPROTO_IPV6, libc::IPV6_TRANSPARENT),
    (libc::IPPROTO_IPV6, libc::IPV6_AUTOFLOWLABEL),
    (libc::IPPROTO_IPV6, IPV6_FLOWINFO_SEND),
    (libc::IPPROTO_IPV6, IPV6_RECVERR_RFC4884),
    (libc::IPPROTO_IPV6, IPV6_ADDR_PREFERENCES),
    (libc::IPPROTO_IPV6, IPV6_MINHOPCOUNT),
    (libc::IPPROTO_IPV6, IPV6_UNICAST_IF),
];

/// Options, sizes, filter and owner of a socket. Names and values are the kernel's numbers, which are its ABI.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketOptions {
    /// Status flags of the file (`O_NONBLOCK`, `O_ASYNC` …).
    pub flags: i32,
    /// Owner of the socket, which port sharing and firewalls look at.
    pub owner: (u32, u32),
    /// `SO_REUSEADDR`.
    pub reuse: bool,
    /// Options that are one number: level, name, value.
    pub numbers: Vec<(i32, i32, i32)>,
    /// Options that are a structure: level, name, its bytes.
    pub structures: Vec<(i32, i32, Vec<u8>)>,
    /// `SO_SNDBUF` and `SO_RCVBUF` as read: twice what was asked for.
    pub buffers: (i32, i32),
    /// `SO_BUF_LOCK`: which of them were set by hand.
    pub buffer_lock: i32,
    /// The interface it is bound to.
    pub device: String,
    /// The classic filter: code, jump-true, jump-false, operand.
    pub filter: Vec<FilterStep>,
    /// `SO_LOCK_FILTER`.
    pub filter_locked: bool,
    /// What `shutdown(2)` did to it, where the kind does not know better: bit 0 reading, bit 1 writing.
    #[serde(default)]
    pub shutdown: u8,
}

impl SocketOptions {
    /// Reads the options of every socket and, of `more`, those that this one has.
    pub(super) fn capture(descriptor: &Descriptor, more: &[&[Name]]) -> Result<SocketOptions, CaptureError> {
        let fd = descriptor.as_fd();
        let get =
            |name| socket::get_int(fd, libc::SOL_SOCKET, name).capturing("reading an option", descriptor.object());
        // The type of service sets the priority, so the generic options come after.
        let names = more.iter().chain([&GENERIC]).flat_map(|group| group.iter());
        let numbers = names.filter_map(|&(l, n)| socket::get_int(fd, l, n).ok().map(|v| (l, n, v))).collect();
        let structures = STRUCTURED.iter().filter_map(|&((l, n), size)| structure(fd, l, n, size)).collect();
        let filter =
            socket::filter(fd).map_err(|_| descriptor.refuse("has an eBPF filter, which cannot be read back"))?;
        Ok(SocketOptions {
            flags: descriptor.flags() & !libc::O_ACCMODE,
            owner: (descriptor.stat.st_uid, descriptor.stat.st_gid),
            reuse: get(libc::SO_REUSEADDR)? != 0,
            numbers,
            structures,
            buffers: (get(libc::SO_SNDBUF)?, get(libc::SO_RCVBUF)?),
            buffer_lock: get(socket::SO_BUF_LOCK).unwrap_or(0),
            device: device(fd),
            filter,
            filter_locked: get(libc::SO_LOCK_FILTER).unwrap_or(0) != 0,
            shutdown: 0,
        })
    }

    /// Reads further numeric options.
    pub(super) fn add_numbers(&mut self, fd: BorrowedFd<'_>, names: &[Name]) {
        let values = names.iter().filter_map(|&(l, n)| socket::get_int(fd, l, n).ok().map(|v| (l, n, v)));
        self.numbers.extend(values);
    }

    /// Reads what is put into the headers of every packet of a socket of this family.
    pub(super) fn add_headers(&mut self, fd: BorrowedFd<'_>, family: i32) {
        let six = if family == libc::AF_INET6 { VARIABLE6 } else { &[] };
        VARIABLE4.iter().chain(six).for_each(|option| self.add_variable(fd, *option));
    }

    /// Reads a further option whose value is of a length of its own, up to `most` bytes.
    pub(super) fn add_variable(&mut self, fd: BorrowedFd<'_>, ((level, name), most): (Name, usize)) {
        let mut bytes = vec![0; most];
        let length = socket::get_bytes(fd, level, name, &mut bytes).unwrap_or(0);
        if length > 0 {
            bytes.truncate(length);
            self.structures.push((level, name, bytes));
        }
    }

    /// Reads a further option whose value is a structure, if the socket has it.
    pub(super) fn add_structure(&mut self, fd: BorrowedFd<'_>, ((level, name), size): (Name, usize)) {
        self.structures.extend(structure(fd, level, name, size));
    }

    /// The value of one numeric option, if it was captured.
    pub(super) fn number(&self, (level, name): Name) -> Option<i32> {
        self.numbers.iter().find(|o| (o.0, o.1) == (level, name)).map(|o| o.2)
    }

    /// Sets what counts before a socket is bound: everything but sizes, filter and `SO_REUSEADDR`.
    pub(super) fn prepare(&self, fd: BorrowedFd<'_>, what: &str) -> Result<(), RebuildError> {
        self.prepare_fresh(fd, what, &mut Fresh::default())
    }

    /// The same, of a socket that was made as those were of which `fresh` has options.
    pub(super) fn prepare_fresh(&self, fd: BorrowedFd<'_>, what: &str, fresh: &mut Fresh) -> Result<(), RebuildError> {
        socket::change_owner(fd, self.owner.0, self.owner.1).rebuilding("giving its owner to", what)?;
        let mut is_fresh = true;
        for &(level, name, value) in &self.numbers {
            if fresh.number(fd, (level, name), is_fresh) == Some(value) {
                continue;
            }
            let set = socket::set_int(fd, level, name, value);
            if is_unknown(&set) && YOUNG.contains(&((level, name), value)) {
                continue;
            }
            set.rebuilding("setting an option", option_of(what, level, name))?;
            is_fresh &= ALONE.contains(&(level, name));
        }
        for (level, name, value) in &self.structures {
            if fresh.structure(fd, (*level, *name), value.len(), is_fresh).is_some_and(|now| now == *value) {
                continue;
            }
            socket::set_bytes(fd, *level, *name, value)
                .rebuilding("setting an option", option_of(what, *level, *name))?;
        }
        if !self.device.is_empty() {
            socket::set_bytes(fd, libc::SOL_SOCKET, libc::SO_BINDTODEVICE, self.device.as_bytes())
                .rebuilding("binding to its interface", what)?;
        }
        Ok(())
    }

    /// Sets what must not be in the way while queues are filled: sizes, filter, `SO_REUSEADDR`, status flags.
    pub(super) fn finish(&self, fd: BorrowedFd<'_>, what: &str) -> Result<(), RebuildError> {
        let set = |name, value| socket::set_int(fd, libc::SOL_SOCKET, name, value).rebuilding("setting up", what);
        self.set_buffers(fd, what)?;
        set(libc::SO_REUSEADDR, self.reuse.into())?;
        if !self.filter.is_empty() {
            socket::attach_filter(fd, &self.filter).rebuilding("attaching the filter", what)?;
        }
        if self.filter_locked {
            set(libc::SO_LOCK_FILTER, 1)?;
        }
        let flags = nix::fcntl::OFlag::from_bits_retain(self.flags);
        nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_SETFL(flags)).rebuilding("setting the flags", what)?;
        Ok(())
    }

    /// Shuts down what was shut down.
    pub(super) fn shut(&self, fd: BorrowedFd<'_>) -> std::io::Result<()> {
        match self.shutdown {
            0 => Ok(()),
            1 => socket::shutdown(fd, libc::SHUT_RD),
            2 => socket::shutdown(fd, libc::SHUT_WR),
            _ => socket::shutdown(fd, libc::SHUT_RDWR),
        }
    }

    /// Sets the sizes of the buffers, and whose they are.
    pub(super) fn set_buffers(&self, fd: BorrowedFd<'_>, what: &str) -> Result<(), RebuildError> {
        let sizes = [
            (libc::SO_SNDBUF, libc::SO_SNDBUFFORCE, self.buffers.0),
            (libc::SO_RCVBUF, libc::SO_RCVBUFFORCE, self.buffers.1),
        ];
        for (name, force, size) in sizes {
            // The kernel doubles what it is given.
            if socket::get_int(fd, libc::SOL_SOCKET, name).is_ok_and(|now| now != size) {
                socket::set_int(fd, libc::SOL_SOCKET, force, size / 2).rebuilding("sizing a buffer", what)?;
            }
        }
        // Setting a size by hand stops the kernel from growing it; this says whose the sizes are.
        match socket::set_int(fd, libc::SOL_SOCKET, socket::SO_BUF_LOCK, self.buffer_lock) {
            Err(e) if e.raw_os_error() != Some(libc::ENOPROTOOPT) => Err(e).rebuilding("sizing a buffer", what),
            _ => Ok(()),
        }
    }
}

/// The options of sockets that were only just made, all in the same way: asking the kernel for each of dozens, of each of
/// many sockets, takes longer than all else that is done to them.
#[derive(Default)]
pub(super) struct Fresh {
    numbers: HashMap<Name, Option<i32>>,
    structures: HashMap<Name, Option<Vec<u8>>>,
}

/// Options that older kernels do not know, and what a socket has of them that was not told otherwise: that is all that those
/// kernels can do.
const YOUNG: &[(Name, i32)] = &[
    (sol(SO_RCVPRIORITY), 0),
    (sol(super::unix::SO_PASSPIDFD), 0),
    (sol(super::unix::SO_PASSRIGHTS), 1),
    // Of TCP sockets.
    (sol(libc::SO_PEEK_OFF), -1),
    ((libc::IPPROTO_IP, IP_LOCAL_PORT_RANGE), 0),
    ((libc::IPPROTO_TCP, super::tcp::RTO_MAX_MS), 120_000),
    ((libc::IPPROTO_TCP, super::tcp::RTO_MIN_US), 200_000),
    ((libc::IPPROTO_TCP, super::tcp::DELACK_MAX_US), 200_000),
];

fn is_unknown(set: &std::io::Result<()>) -> bool {
    set.as_ref().is_err_and(|error| matches!(error.raw_os_error(), Some(libc::ENOPROTOOPT | libc::EOPNOTSUPP)))
}

/// Options that many programs set and that change nothing but themselves: a socket is fresh otherwise.
const ALONE: &[Name] = &[sol(libc::SO_KEEPALIVE), sol(libc::SO_REUSEPORT), (libc::IPPROTO_TCP, libc::TCP_NODELAY)];

impl Fresh {
    fn number(&mut self, fd: BorrowedFd<'_>, (level, name): Name, is_fresh: bool) -> Option<i32> {
        let ask = || socket::get_int(fd, level, name).ok();
        if is_fresh { *self.numbers.entry((level, name)).or_insert_with(ask) } else { ask() }
    }

    fn structure(&mut self, fd: BorrowedFd<'_>, (level, name): Name, size: usize, is_fresh: bool) -> Option<Vec<u8>> {
        let ask = || structure(fd, level, name, size).map(|(_, _, value)| value);
        if is_fresh { self.structures.entry((level, name)).or_insert_with(ask).clone() } else { ask() }
    }
}

/// Makes room for `bytes` in the buffer named by `force` (`SO_SNDBUFFORCE`, `SO_RCVBUFFORCE`): what a queue held fits in
/// again whatever the overhead. [`SocketOptions::finish`] sets the true size.
pub(super) fn make_room(fd: BorrowedFd<'_>, force: i32, bytes: usize) -> std::io::Result<()> {
    let size = bytes.saturating_mul(4).saturating_add(1 << 20).min(i32::MAX as usize / 2);
    socket::set_int(fd, libc::SOL_SOCKET, force, size as i32)
}

/// Runs `send` with room for `bytes` more in the sender's buffer, whose size is put back.
pub(super) fn with_room(
    fd: BorrowedFd<'_>,
    bytes: usize,
    send: impl FnOnce() -> std::io::Result<()>,
) -> std::io::Result<()> {
    let size = socket::get_int(fd, libc::SOL_SOCKET, libc::SO_SNDBUF)?;
    let lock = socket::get_int(fd, libc::SOL_SOCKET, socket::SO_BUF_LOCK);
    // What was sent before and is not read yet counts as well.
    let unread = socket::ioctl_int(fd, libc::TIOCOUTQ)?;
    make_room(fd, libc::SO_SNDBUFFORCE, bytes + unread as usize)?;
    let sent = send();
    socket::set_int(fd, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, size / 2)?;
    lock.and_then(|lock| socket::set_int(fd, libc::SOL_SOCKET, socket::SO_BUF_LOCK, lock))?;
    sent
}

/// Whether the reading half of a socket is shut.
pub(super) fn reading_shut(fd: BorrowedFd<'_>) -> std::io::Result<bool> {
    Ok(socket::readiness(fd, libc::POLLRDHUP)? & libc::POLLRDHUP != 0)
}

/// Runs `bind` with the socket allowed to bind to an address that is not there (yet): IPv6 addresses take their time.
pub(super) fn with_any_address<T>(
    fd: BorrowedFd<'_>,
    family: i32,
    bind: impl FnOnce() -> Result<T, RebuildError>,
) -> Result<T, RebuildError> {
    let (level, name) = if family == libc::AF_INET6 {
        (libc::IPPROTO_IPV6, libc::IPV6_FREEBIND)
    } else {
        (libc::IPPROTO_IP, libc::IP_FREEBIND)
    };
    let before = socket::get_int(fd, level, name).rebuilding("reading an option", "a socket")?;
    socket::set_int(fd, level, name, 1).rebuilding("setting an option", "a socket")?;
    let result = bind()?;
    socket::set_int(fd, level, name, before).rebuilding("setting an option", "a socket")?;
    Ok(result)
}

/// Runs `peek` with `SO_PEEK_OFF` out of the way. The offset is the shared socket's, so it is put back.
pub(super) fn peeking_from_start<T>(
    fd: BorrowedFd<'_>,
    peek: impl FnOnce() -> std::io::Result<T>,
) -> std::io::Result<T> {
    let offset = socket::get_int(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF).unwrap_or(-1);
    if offset < 0 {
        return peek();
    }
    socket::set_int(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, -1)?;
    let result = peek();
    socket::set_int(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, offset)?;
    result
}

/// Runs `walk` with peeks that go on where the last one ended, from the start; the argument jumps to an offset.
pub(super) fn peeking_by_offset<T>(
    fd: BorrowedFd<'_>,
    walk: impl FnOnce(&dyn Fn(usize) -> std::io::Result<()>) -> std::io::Result<T>,
) -> std::io::Result<T> {
    let before = socket::get_int(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF)?;
    let set = |offset| socket::set_int(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, offset);
    set(0)?;
    let result = walk(&|offset| set(offset as i32));
    set(before)?;
    result
}

fn structure(fd: BorrowedFd<'_>, level: i32, name: i32, size: usize) -> Option<(i32, i32, Vec<u8>)> {
    let mut bytes = vec![0; size];
    let length = socket::get_bytes(fd, level, name, &mut bytes).ok()?;
    (length == size).then_some((level, name, bytes))
}

fn device(fd: BorrowedFd<'_>) -> String {
    let mut name = [0; libc::IFNAMSIZ];
    let length = socket::get_bytes(fd, libc::SOL_SOCKET, libc::SO_BINDTODEVICE, &mut name).unwrap_or(0);
    String::from_utf8_lossy(&name[..length]).trim_end_matches('\0').to_owned()
}

fn option_of(what: &str, level: i32, name: i32) -> String {
    format!("{what} (level {level}, option {name})")
}
