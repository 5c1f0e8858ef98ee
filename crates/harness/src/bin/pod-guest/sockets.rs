//! Sockets in states that pass.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd};

use crate::stage::*;

pub(crate) const KINDS: &[crate::stage::Kind] = &[
    ("connecting", connecting),
    ("connecting-blocked", connecting_blocked),
    ("broadcast-stream", broadcast_stream),
    ("urgent", urgent),
    ("urgent-read", urgent_read),
    ("udp-lite", udp_lite),
    ("unix-backlog", unix_backlog),
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
    let mut who = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut length = size_of::<libc::ucred>() as u32;
    let at = (&raw mut who).cast();
    let asked =
        unsafe { libc::getsockopt(server.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERCRED, at, &raw mut length) };
    done("SO_PEERCRED", asked)?;
    equal("who connected", who.pid, child)?;
    reap(child)
}

/// Connections that nobody accepted yet, with what was said already.
fn unix_backlog() -> Checked {
    use std::os::unix::net::{UnixListener, UnixStream};
    let listener = said(UnixListener::bind("/tmp/listener"))?;
    let mut clients = Vec::new();
    for number in 0u8..3 {
        let mut client = said(UnixStream::connect("/tmp/listener"))?;
        said(client.write_all(&[number; 10]))?;
        clients.push(client);
    }
    hold()?;
    for (number, client) in (0u8..).zip(&mut clients) {
        let (mut server, _) = said(listener.accept())?;
        let mut text = [0; 10];
        said(server.read_exact(&mut text))?;
        equal("what was said before", text, [number; 10])?;
        said(server.write_all(b"answer"))?;
        let mut answer = [0; 6];
        said(client.read_exact(&mut answer))?;
    }
    Ok(())
}
