//! TCP connections that no descriptor leads to: closed before all was delivered, not accepted yet.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;

use crate::namespaces::{become_root, loopback_up};
use crate::plumbing::{said, set};
use crate::stage::*;

pub(crate) const KINDS: &[crate::stage::Kind] = &[
    ("closed-early", closed_early),
    ("closed-early-elsewhere", closed_early_elsewhere),
    ("closed-and-told", closed_and_told),
    ("ended-where-it-was", ended_where_it_was),
    ("closing-always", closing_always),
    ("handshake-put-aside", handshake_put_aside),
    ("handshake-put-aside-elsewhere", handshake_put_aside_elsewhere),
];

/// A client that reads nothing, and an answer that has been closed behind what does not fit.
fn unread_answer() -> Result<TcpStream, String> {
    let listener = said(TcpListener::bind("127.0.0.1:0"))?;
    let client = said(TcpStream::connect(said(listener.local_addr())?))?;
    set(&client, libc::SOL_SOCKET, libc::SO_RCVBUF, &65536i32)?;
    let (mut server, _) = said(listener.accept())?;
    said(server.write_all(&[7; 300_000]))?;
    Ok(client)
}

fn read_answer(mut client: TcpStream) -> Checked {
    let mut answer = Vec::new();
    said(client.read_to_end(&mut answer))?;
    equal("the answer", (answer.len(), answer.iter().all(|byte| *byte == 7)), (300_000, true))
}

/// An answer whose server has closed its end, while its client has yet to take most of it.
fn closed_early() -> Checked {
    let client = unread_answer()?;
    hold_loosely()?;
    read_answer(client)
}

/// The same in a network namespace of a child's own.
fn closed_early_elsewhere() -> Checked {
    let set_up = Gate::new()?;
    let child = fork(|| {
        become_root(libc::CLONE_NEWNET)?;
        loopback_up()?;
        let client = unread_answer()?;
        set_up.open()?;
        await_go();
        read_answer(client)
    })?;
    set_up.pass(1)?;
    hold_loosely()?;
    reap(child)
}

/// An answer that has come whole, whose server has closed its end, and whose client has read nothing yet: nobody is to ask
/// whether the other end is there.
fn closed_and_told() -> Checked {
    let listener = said(TcpListener::bind("127.0.0.1:0"))?;
    let mut client = said(TcpStream::connect(said(listener.local_addr())?))?;
    let (mut server, _) = said(listener.accept())?;
    said(server.write_all(b"all there is"))?;
    let peer = said(client.peer_addr())?;
    drop(server);
    until("the end to arrive", || ready(&client) & libc::POLLRDHUP != 0)?;
    let before = ready(&client);
    hold()?;
    equal("what it is ready for", ready(&client), before)?;
    equal("the other end", said(client.peer_addr())?, peer)?;
    let mut answer = Vec::new();
    said(client.read_to_end(&mut answer))?;
    equal("the answer", answer, b"all there is".to_vec())?;
    equal("what it is ready for at last", ready(&client) & (libc::POLLERR | libc::POLLHUP), 0)
}

fn ready(client: &TcpStream) -> i16 {
    let mut asked = libc::pollfd { fd: client.as_raw_fd(), events: libc::POLLIN | libc::POLLRDHUP, revents: 0 };
    unsafe { libc::poll(&raw mut asked, 1, 0) };
    asked.revents
}

/// A connection that was closed by both ends, and not by its descriptor yet: it says where it was.
fn ended_where_it_was() -> Checked {
    let mut ended = Vec::new();
    for address in ["127.0.0.1:0", "[::1]:0"] {
        let listener = said(TcpListener::bind(address))?;
        let client = said(TcpStream::connect(said(listener.local_addr())?))?;
        let (server, _) = said(listener.accept())?;
        said(client.shutdown(std::net::Shutdown::Write))?;
        until("the end to arrive", || ready(&server) & libc::POLLRDHUP != 0)?;
        said(server.shutdown(std::net::Shutdown::Write))?;
        until("the other end to arrive", || ready(&server) & libc::POLLHUP != 0 && server.peer_addr().is_err())?;
        ended.push((said(server.local_addr())?, server));
    }
    hold()?;
    for (address, server) in ended {
        equal("its address", said(server.local_addr())?, address)?;
    }
    Ok(())
}

/// A server that closes each connection behind its answer, and a client that asks again and again.
fn closing_always() -> Checked {
    let listener = said(TcpListener::bind("127.0.0.1:0"))?;
    let address = said(listener.local_addr())?;
    let server = fork(|| {
        loop {
            let (mut client, _) = said(listener.accept())?;
            let mut length = [0];
            said(client.read_exact(&mut length))?;
            if length[0] == 0 {
                return Ok(());
            }
            said(client.write_all(&vec![length[0]; 1000 * usize::from(length[0])]))?;
        }
    })?;
    let client = fork(|| {
        let mut length = 0u8;
        while !std::path::Path::new("/tmp/on").exists() {
            length = length % 250 + 1;
            let mut connection = said(TcpStream::connect(address))?;
            said(connection.write_all(&[length]))?;
            let mut answer = Vec::new();
            said(connection.read_to_end(&mut answer))?;
            equal("the answer's length", answer.len(), 1000 * usize::from(length))?;
        }
        said(said(TcpStream::connect(address))?.write_all(&[0]))
    })?;
    hold_loosely()?;
    reap(client)?;
    reap(server)
}

/// A server that accepts whoever waits, and echoes what comes, until nobody is left; and clients that have said nothing.
fn silent_clients(address: &str) -> Result<(i32, Vec<TcpStream>), String> {
    let listener = said(TcpListener::bind(address))?;
    set(&listener, libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT, &30i32)?;
    let to = said(listener.local_addr())?;
    let clients: Result<Vec<_>, _> = (0..3).map(|_| said(TcpStream::connect(to))).collect();
    let clients = clients?;
    let port = format!(":{:04X}", to.port());
    until("the handshakes to be put aside", || {
        let tables = ["/proc/net/tcp", "/proc/net/tcp6"].map(|table| read(table).unwrap_or_default());
        let half =
            |line: &&str| line.split_whitespace().nth(1).is_some_and(|a| a.ends_with(&port)) && line.contains(" 03 ");
        tables.iter().flat_map(|table| table.lines()).filter(half).count() == 3
    })?;
    let server = fork(|| {
        for _ in 0..3 {
            let (mut client, _) = said(listener.accept())?;
            fork(|| {
                let mut text = [0; 5];
                said(client.read_exact(&mut text))?;
                said(client.write_all(&text))
            })?;
        }
        await_go();
        equal("the option", crate::plumbing::get(&listener, libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT)?, 31)
    })?;
    Ok((server, clients))
}

fn speak(server: i32, clients: Vec<TcpStream>) -> Checked {
    for mut client in clients {
        said(client.write_all(b"hello"))?;
        let mut text = [0; 5];
        said(client.read_exact(&mut text))?;
        equal("what was said", &text, b"hello")?;
    }
    reap(server)
}

/// Clients that take themselves for connected, and a listener that waits for what they have to say (`TCP_DEFER_ACCEPT`).
fn handshake_put_aside() -> Checked {
    let (four, clients_of_four) = silent_clients("127.0.0.1:0")?;
    let (six, clients_of_six) = silent_clients("[::1]:0")?;
    hold_loosely()?;
    speak(four, clients_of_four)?;
    speak(six, clients_of_six)
}

/// The same in a network namespace of a child's own.
fn handshake_put_aside_elsewhere() -> Checked {
    let set_up = Gate::new()?;
    let child = fork(|| {
        become_root(libc::CLONE_NEWNET)?;
        loopback_up()?;
        let (server, clients) = silent_clients("127.0.0.1:0")?;
        set_up.open()?;
        await_go();
        speak(server, clients)
    })?;
    set_up.pass(1)?;
    hold_loosely()?;
    reap(child)
}
