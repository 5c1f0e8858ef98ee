//! Sockets in states that pass.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::stage::*;

pub(crate) const KINDS: &[crate::stage::Kind] = &[
    ("connecting", connecting),
    ("connecting-blocked", connecting_blocked),
    ("broadcast-stream", broadcast_stream),
    ("urgent", urgent),
    ("urgent-read", urgent_read),
    ("urgent-written", urgent_written),
    ("unix-urgent", unix_urgent),
    ("udp-lite", udp_lite),
    ("unix-backlog", unix_backlog),
    ("unix-backlog-messages", unix_backlog_messages),
    ("unix-backlog-alone", unix_backlog_alone),
    ("unix-backlog-silent", unix_backlog_silent),
];

fn said<T>(result: std::io::Result<T>) -> Result<T, String> {
    result.map_err(|e| e.to_string())
}

/// A listener that drops every packet: none has come from so near.
fn deaf() -> Result<TcpListener, String> {
    let listener = said(TcpListener::bind("127.0.0.1:0"))?;
    hear_from(&listener, 255)?;
    Ok(listener)
}

fn hear(listener: &TcpListener) -> Checked {
    hear_from(listener, 0)
}

fn hear_from(listener: &TcpListener, distance: i32) -> Checked {
    let length = size_of::<i32>() as u32;
    let (fd, at) = (listener.as_raw_fd(), (&raw const distance).cast());
    done("option", unsafe { libc::setsockopt(fd, libc::IPPROTO_IP, libc::IP_MINTTL, at, length) }).map(drop)
}

fn address_of(listener: &TcpListener) -> Result<libc::sockaddr_in, String> {
    let mut address: libc::sockaddr_in = unsafe { std::mem::zeroed() };
    address.sin_family = libc::AF_INET as u16;
    address.sin_port = said(listener.local_addr())?.port().to_be();
    address.sin_addr.s_addr = u32::from_ne_bytes([127, 0, 0, 1]);
    Ok(address)
}

fn start_connecting(fd: i32, to: &libc::sockaddr_in) -> i32 {
    unsafe { libc::connect(fd, (&raw const *to).cast(), size_of::<libc::sockaddr_in>() as u32) }
}

fn talk(listener: &TcpListener, client: &mut TcpStream) -> Checked {
    let (mut server, from) = said(listener.accept())?;
    equal("the client's address", from, said(client.local_addr())?)?;
    said(client.write_all(b"hello"))?;
    let mut text = [0; 5];
    said(server.read_exact(&mut text))?;
    equal("what was said", &text, b"hello")
}

/// Connections that were asked for and not answered.
fn connecting() -> Checked {
    let listener = deaf()?;
    let address = address_of(&listener)?;
    let client = done("socket", unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_NONBLOCK, 0) })?;
    let mut client = unsafe { TcpStream::from_raw_fd(client as i32) };
    equal("connect", start_connecting(client.as_raw_fd(), &address), -1)?;
    let before = said(client.local_addr())?;
    hold()?;
    equal("its address", said(client.local_addr())?, before)?;
    equal("connect", start_connecting(client.as_raw_fd(), &address), -1)?;
    let error = std::io::Error::last_os_error().raw_os_error();
    equal("what connecting again says", error, Some(libc::EALREADY))?;
    hear(&listener)?;
    let mut ready = libc::pollfd { fd: client.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
    equal("poll", unsafe { libc::poll(&raw mut ready, 1, 20_000) }, 1)?;
    equal("an error", said(client.take_error())?.map(|e| e.to_string()), None)?;
    said(client.set_nonblocking(false))?;
    talk(&listener, &mut client)
}

/// The same, with a thread that waits in connect(2).
fn connecting_blocked() -> Checked {
    let listener = deaf()?;
    let address = address_of(&listener)?;
    let set_up = Gate::new()?;
    let child = fork(|| {
        let client = done("socket", unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0) })?;
        let mut client = unsafe { TcpStream::from_raw_fd(client as i32) };
        set_up.open()?;
        done("connect", start_connecting(client.as_raw_fd(), &address))?;
        said(client.write_all(b"hello"))
    })?;
    set_up.pass(1)?;
    until_asleep(child)?;
    hold_loosely()?;
    hear(&listener)?;
    let (mut server, _) = said(listener.accept())?;
    let mut text = [0; 5];
    said(server.read_exact(&mut text))?;
    reap(child)
}

/// An option that means nothing to a stream, and is kept all the same.
fn broadcast_stream() -> Checked {
    let listener = said(TcpListener::bind("127.0.0.1:0"))?;
    let (on, length) = (1i32, size_of::<i32>() as u32);
    let (fd, at) = (listener.as_raw_fd(), (&raw const on).cast());
    done("option", unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_BROADCAST, at, length) })?;
    hold()?;
    let (mut now, mut length) = (0i32, length);
    done("option", unsafe {
        libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_BROADCAST, (&raw mut now).cast(), &raw mut length)
    })?;
    equal("the option", now, 1)
}

fn pair() -> Result<(TcpStream, TcpStream), String> {
    let listener = said(TcpListener::bind("127.0.0.1:0"))?;
    let client = said(TcpStream::connect(said(listener.local_addr())?))?;
    Ok((client, said(listener.accept())?.0))
}

fn send_urgent(stream: &TcpStream) -> Checked {
    let sent = unsafe { libc::send(stream.as_raw_fd(), b"!".as_ptr().cast(), 1, libc::MSG_OOB) };
    equal("send", sent, 1)
}

fn receive_urgent(stream: &TcpStream) -> Result<u8, String> {
    let mut byte = 0u8;
    done("recv", unsafe { libc::recv(stream.as_raw_fd(), (&raw mut byte).cast(), 1, libc::MSG_OOB) } as i64)?;
    Ok(byte)
}

fn with_urgent() -> Result<(TcpStream, TcpStream), String> {
    let (mut client, server) = pair()?;
    said(client.write_all(b"before"))?;
    send_urgent(&client)?;
    said(client.write_all(b"after"))?;
    let mut unread = 0i32;
    until("all data", || unsafe {
        let mut ready = libc::pollfd { fd: server.as_raw_fd(), events: libc::POLLPRI, revents: 0 };
        libc::ioctl(server.as_raw_fd(), libc::FIONREAD, &raw mut unread);
        libc::poll(&raw mut ready, 1, 0) == 1
    })?;
    doze();
    Ok((client, server))
}

fn read_rest(mut server: TcpStream) -> Checked {
    let mut text = [0; 32];
    let length = said(server.read(&mut text))?;
    equal("up to the mark", &text[..length], b"before")?;
    let length = said(server.read(&mut text))?;
    equal("behind the mark", &text[..length], b"after")
}

/// Urgent data that was not read.
fn urgent() -> Checked {
    let (_client, server) = with_urgent()?;
    hold()?;
    equal("the urgent byte", receive_urgent(&server)?, b'!')?;
    read_rest(server)
}

/// Urgent data that was read, before what came earlier.
fn urgent_read() -> Checked {
    let (_client, server) = with_urgent()?;
    equal("the urgent byte", receive_urgent(&server)?, b'!')?;
    hold()?;
    read_rest(server)
}

/// Urgent data that was written, and waits for the other end to make room.
fn urgent_written() -> Checked {
    let (mut client, mut server) = pair()?;
    said(client.set_nonblocking(true))?;
    let piece: Vec<u8> = (0..9973u32).map(|n| n as u8).collect();
    let mut written = 0;
    until("a full queue", || match client.write(&piece[written % piece.len()..]) {
        Ok(more) => {
            written += more;
            false
        }
        Err(_) => true,
    })?;
    let mut room = 0;
    let mut make_room = || {
        room += 4096;
        server.read_exact(&mut [0; 4096]).is_ok()
    };
    until("room for the urgent byte", || make_room() && send_urgent(&client).is_ok())?;
    until("room for more", || client.write(b"after").is_ok_and(|sent| sent == 5) || !make_room())?;
    hold()?;
    let mut all = vec![0; written - room];
    said(server.read_exact(&mut all))?;
    let is_right = all.iter().enumerate().all(|(at, byte)| *byte == piece[(at + room) % piece.len()]);
    equal("what comes before", is_right, true)?;
    until("the urgent byte", || receive_urgent(&server) == Ok(b'!'))?;
    let mut text = [0; 5];
    said(server.read_exact(&mut text))?;
    equal("behind the mark", &text, b"after")
}

/// What is done with a pair of unix streams: sent (with flags), and received before everything is held and after.
struct Urgent {
    sent: &'static [(&'static [u8], i32)],
    inline: bool,
    before: &'static [i32],
    after: &'static [i32],
}

const OUT_OF_BAND: i32 = libc::MSG_OOB;
const AMONG: &[(&[u8], i32)] = &[(b"ab", 0), (b"c!", OUT_OF_BAND), (b"de", 0)];
const AT_FRONT: &[(&[u8], i32)] = &[(b"!", OUT_OF_BAND), (b"de", 0)];
const AT_END: &[(&[u8], i32)] = &[(b"ab", 0), (b"!", OUT_OF_BAND)];

const URGENT: [Urgent; 7] = [
    Urgent { sent: AMONG, inline: false, before: &[], after: &[0, OUT_OF_BAND, 0, 0] },
    Urgent { sent: AMONG, inline: false, before: &[], after: &[OUT_OF_BAND, 0, 0, 0] },
    Urgent { sent: AMONG, inline: false, before: &[OUT_OF_BAND], after: &[0, 0, 0] },
    Urgent { sent: AMONG, inline: true, before: &[], after: &[0, 0, 0] },
    Urgent { sent: AT_FRONT, inline: false, before: &[], after: &[OUT_OF_BAND, 0, 0] },
    Urgent { sent: AT_FRONT, inline: false, before: &[OUT_OF_BAND], after: &[0, 0] },
    Urgent { sent: AT_END, inline: false, before: &[], after: &[0, OUT_OF_BAND, 0] },
];

/// Whether a stream was at the mark, and what came then, or the error.
type Received = Vec<(i32, Result<Vec<u8>, Option<i32>>)>;

impl Urgent {
    fn pair(&self) -> Result<[OwnedFd; 2], String> {
        let (from, to) = said(std::os::unix::net::UnixStream::pair())?;
        let on = i32::from(self.inline);
        let at = (&raw const on).cast();
        done("option", unsafe { libc::setsockopt(to.as_raw_fd(), libc::SOL_SOCKET, libc::SO_OOBINLINE, at, 4) })?;
        for (bytes, flags) in self.sent {
            let sent = unsafe { libc::send(from.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), *flags) };
            equal("send", sent, bytes.len() as isize)?;
        }
        Self::receive(&to, self.before);
        Ok([from.into(), to.into()])
    }

    fn receive(socket: &impl AsRawFd, all: &[i32]) -> Received {
        const SIOCATMARK: libc::c_ulong = 0x8905;
        let receive = |flags: &i32| {
            let (mut at_mark, mut text) = (0i32, [0u8; 32]);
            unsafe { libc::ioctl(socket.as_raw_fd(), SIOCATMARK, &raw mut at_mark) };
            let (at, flags) = (text.as_mut_ptr().cast(), flags | libc::MSG_DONTWAIT);
            let length = unsafe { libc::recv(socket.as_raw_fd(), at, text.len(), flags) };
            let length = usize::try_from(length).map_err(|_| std::io::Error::last_os_error().raw_os_error());
            (at_mark, length.map(|length| text[..length].to_vec()))
        };
        all.iter().map(receive).collect()
    }
}

/// Out-of-band data of unix streams: among other data, before it, behind it, read already, to be read like other. What comes
/// of it differs from kernel to kernel.
fn unix_urgent() -> Checked {
    let pairs = || URGENT.iter().map(Urgent::pair).collect::<Result<Vec<_>, _>>();
    let receive = |pairs: &[[OwnedFd; 2]]| -> Vec<Received> {
        URGENT.iter().zip(pairs).map(|(urgent, [_, to])| Urgent::receive(to, urgent.after)).collect()
    };
    let expected = receive(&pairs()?);
    equal("what comes out of band", &expected[1][0].1, &Ok(b"!".to_vec()))?;
    let pairs = pairs()?;
    hold()?;
    equal("what comes of it", receive(&pairs), expected)
}

/// A pair of sockets whose checksums cover a part.
fn udp_lite() -> Checked {
    const LITE: i32 = 136;
    const SEND_COVERAGE: i32 = 10;
    let end = || -> Result<std::net::UdpSocket, String> {
        let fd = done("socket", unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM, LITE) })? as i32;
        let address = libc::sockaddr_in {
            sin_family: libc::AF_INET as u16,
            sin_port: 0,
            sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes([127, 0, 0, 1]) },
            sin_zero: [0; 8],
        };
        let length = size_of::<libc::sockaddr_in>() as u32;
        done("bind", unsafe { libc::bind(fd, (&raw const address).cast(), length) })?;
        let (covered, length) = (12i32, size_of::<i32>() as u32);
        let at = (&raw const covered).cast();
        done("option", unsafe { libc::setsockopt(fd, LITE, SEND_COVERAGE, at, length) })?;
        Ok(unsafe { std::net::UdpSocket::from_raw_fd(fd) })
    };
    let (one, other) = (end()?, end()?);
    said(one.connect(said(other.local_addr())?))?;
    hold()?;
    let (mut covered, mut length) = (0i32, size_of::<i32>() as u32);
    let at = (&raw mut covered).cast();
    done("option", unsafe { libc::getsockopt(one.as_raw_fd(), LITE, SEND_COVERAGE, at, &raw mut length) })?;
    equal("what checksums cover", covered, 12)?;
    said(one.send(b"hello"))?;
    let mut text = [0; 16];
    let (length, from) = said(other.recv_from(&mut text))?;
    equal("what was said", &text[..length], b"hello")?;
    equal("by whom", from, said(one.local_addr())?)
}

/// Connections that nobody accepted yet, and that have said nothing: they wait on in their order, also when one has no more
/// to say.
fn unix_backlog_silent() -> Checked {
    use std::os::unix::net::{UnixListener, UnixStream};
    let listener = said(UnixListener::bind("/tmp/listener"))?;
    let mut clients = Vec::new();
    for _ in 0..3 {
        clients.push(said(UnixStream::connect("/tmp/listener"))?);
    }
    said(clients[2].shutdown(std::net::Shutdown::Write))?;
    let child = fork(|| {
        // Its connection is the last, and its own.
        let client = said(UnixStream::connect("/tmp/listener"))?;
        await_go();
        said((&client).write_all(b"child"))
    })?;
    until("a connection", || read("/proc/net/unix").is_ok_and(|all| all.matches("/tmp/listener").count() >= 5))?;
    until_asleep(child)?;
    let early = fork(|| {
        let _client = said(UnixStream::connect("/tmp/listener"))?;
        // Held by another when this one has ended.
        fork(|| {
            await_go();
            Ok(())
        })
        .map(drop)
    })?;
    reap(early)?;
    hold()?;
    for (number, client) in (0u8..).zip(&mut clients[..2]) {
        said(client.write_all(&[number; 10]))?;
        let (mut server, _) = said(listener.accept())?;
        let mut text = [0; 10];
        said(server.read_exact(&mut text))?;
        equal("what was said", text, [number; 10])?;
        said(server.write_all(b"answer"))?;
        let mut answer = [0; 6];
        said(client.read_exact(&mut answer))?;
    }
    let mut text = String::new();
    let (mut silent, _) = said(listener.accept())?;
    said(silent.read_to_string(&mut text))?;
    equal("what one who has no more to say said", text.as_str(), "")?;
    let (mut server, _) = said(listener.accept())?;
    said(server.read_to_string(&mut text))?;
    equal("what a child said", text.as_str(), "child")?;
    equal("who connected", peer(&server)?, child)?;
    let (server, _) = said(listener.accept())?;
    equal("who connected and has ended", peer(&server)?, early)?;
    reap(child)
}

/// Connections that nobody accepted yet, with what was said already: by one who goes on, by one who has no more to say, and
/// by one who is gone, with a name too.
fn unix_backlog() -> Checked {
    use std::os::unix::net::{UnixListener, UnixStream};
    let listener = said(UnixListener::bind("/tmp/listener"))?;
    let mut clients = Vec::new();
    for number in 0u8..4 {
        let mut client = said(UnixStream::connect("/tmp/listener"))?;
        said(client.write_all(&[number; 10]))?;
        said(client.write_all(b" and more"))?;
        clients.push(client);
    }
    let much: Vec<u8> = (0..100_000u32).map(|n| (n / 7) as u8).collect();
    said(clients[3].write_all(&much))?;
    let gone = clients.remove(1);
    drop(gone);
    let named = done("socket", unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_STREAM, 0) })? as i32;
    let named = unsafe { OwnedFd::from_raw_fd(named) };
    let (name, length) = unix_name(b"\0gone");
    done("bind", unsafe { libc::bind(named.as_raw_fd(), (&raw const name).cast(), length) })?;
    let (to, length) = unix_name(b"/tmp/listener");
    done("connect", unsafe { libc::connect(named.as_raw_fd(), (&raw const to).cast(), length) })?;
    drop(named);
    said(clients[1].shutdown(std::net::Shutdown::Write))?;
    hold()?;
    for number in 0u8..4 {
        let (mut server, _) = said(listener.accept())?;
        let mut text = [0; 19];
        said(server.read_exact(&mut text))?;
        equal("what was said before", &text[..], &[&[number; 10][..], b" and more"].concat())?;
        if number == 3 {
            let mut rest = vec![0; much.len()];
            said(server.read_exact(&mut rest))?;
            check(rest == much, "the long message differs")?;
        }
        if number == 1 || number == 2 {
            equal("what comes behind it", said(server.read(&mut text))?, 0)?;
        }
        if number != 1 {
            said(server.write_all(b"answer"))?;
            let client = &mut clients[usize::from(number - u8::from(number > 1))];
            let mut answer = [0; 6];
            said(client.read_exact(&mut answer))?;
        }
    }
    let (_, from) = said(listener.accept())?;
    equal("who is gone", std::os::linux::net::SocketAddrExt::as_abstract_name(&from), Some(&b"gone"[..]))
}

/// The process that connected a socket, as whoever accepted it knows it.
fn peer(socket: &impl AsRawFd) -> Result<i32, String> {
    let mut who = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut length = size_of::<libc::ucred>() as u32;
    let at = (&raw mut who).cast();
    let fd = socket.as_raw_fd();
    done("SO_PEERCRED", unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_PEERCRED, at, &raw mut length) })?;
    Ok(who.pid)
}

/// A `sockaddr_un` and its length.
fn unix_name(bytes: &[u8]) -> (libc::sockaddr_un, u32) {
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as u16;
    bytes.iter().zip(&mut address.sun_path).for_each(|(from, to)| *to = *from as libc::c_char);
    (address, 2 + bytes.len() as u32)
}

/// Connections that nobody accepted yet, with messages that have bounds, senders, and descriptors on their way.
fn unix_backlog_messages() -> Checked {
    let listener = done("socket", unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_SEQPACKET, 0) })? as i32;
    let (address, length) = unix_name(b"\0listener");
    let name = (&raw const address).cast();
    done("bind", unsafe { libc::bind(listener, name, length) })?;
    done("listen", unsafe { libc::listen(listener, 3) })?;
    let on = 1i32;
    let at = (&raw const on).cast();
    done("option", unsafe { libc::setsockopt(listener, libc::SOL_SOCKET, libc::SO_PASSCRED, at, 4) })?;
    let kept = said(std::fs::File::create("/tmp/kept"))?;
    let connect = || -> Result<OwnedFd, String> {
        let client = done("socket", unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_SEQPACKET, 0) })? as i32;
        done("connect", unsafe { libc::connect(client, name, length) })?;
        Ok(unsafe { OwnedFd::from_raw_fd(client) })
    };
    let said_all = Gate::new()?;
    let child = fork(|| {
        let client = connect()?;
        equal("send", unsafe { libc::send(client.as_raw_fd(), b"child".as_ptr().cast(), 5, 0) }, 5)?;
        said_all.open()?;
        await_go();
        Ok(())
    })?;
    said_all.pass(1)?;
    let client = connect()?;
    for message in [&b"first"[..], b"", b"third"] {
        let sent = unsafe { libc::send(client.as_raw_fd(), message.as_ptr().cast(), message.len(), 0) };
        equal("send", sent, message.len() as isize)?;
    }
    crate::plumbing::send_file(&client, kept.as_raw_fd())?;
    // No more than these are let in from now on.
    done("listen", unsafe { libc::listen(listener, 0) })?;
    hold()?;
    let accept = || -> Result<OwnedFd, String> {
        let server = unsafe { libc::accept(listener, std::ptr::null_mut(), std::ptr::null_mut()) };
        Ok(unsafe { OwnedFd::from_raw_fd(done("accept", server)? as i32) })
    };
    let (of_child, server) = (accept()?, accept()?);
    equal("the child's", message_of(&of_child)?, (b"child".to_vec(), child))?;
    let own = unsafe { libc::getpid() };
    for message in [&b"first"[..], b"", b"third"] {
        equal("a message", message_of(&server)?, (message.to_vec(), own))?;
    }
    let off = 0i32;
    let at = (&raw const off).cast();
    done("option", unsafe { libc::setsockopt(server.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PASSCRED, at, 4) })?;
    let mut came: std::fs::File = crate::plumbing::receive_file(&server)?.into();
    said(came.write_all(b"through it"))?;
    let mut kept = kept;
    said(kept.write_all(b", and behind"))?;
    equal("the file", read("/tmp/kept")?.as_str(), "through it, and behind")?;
    reap(child)
}

/// A message, and the process that it is from.
fn message_of(socket: &OwnedFd) -> Result<(Vec<u8>, i32), String> {
    let mut text = [0u8; 64];
    let mut piece = libc::iovec { iov_base: text.as_mut_ptr().cast(), iov_len: text.len() };
    let mut control = [0u64; 8];
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    (header.msg_iov, header.msg_iovlen) = (&raw mut piece, 1);
    (header.msg_control, header.msg_controllen) = (control.as_mut_ptr().cast(), 64);
    let length = done("recvmsg", unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, 0) } as i64)?;
    let part = unsafe { libc::CMSG_FIRSTHDR(&raw const header) };
    check(!part.is_null(), "no sender came")?;
    let who = unsafe { libc::CMSG_DATA(part).cast::<libc::ucred>().read_unaligned() };
    Ok((text[..length as usize].to_vec(), who.pid))
}

/// A connection that nobody accepted yet, with a descriptor on its way that nobody holds any more.
fn unix_backlog_alone() -> Checked {
    use std::os::unix::net::{UnixListener, UnixStream};
    let listener = said(UnixListener::bind("/tmp/listener"))?;
    let client = said(UnixStream::connect("/tmp/listener"))?;
    crate::plumbing::send_file(&client, said(std::fs::File::create("/tmp/alone"))?.as_raw_fd())?;
    hold()?;
    let (server, _) = said(listener.accept())?;
    let mut came: std::fs::File = crate::plumbing::receive_file(&server)?.into();
    said(came.write_all(b"through it"))?;
    equal("the file", read("/tmp/alone")?.as_str(), "through it")
}
