//! TCP.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use super::*;
use crate::sockets::{Form, TcpState};
use crate::sys::socket;

fn connected(address: &str) -> (TcpListener, TcpStream, TcpStream) {
    let listener = TcpListener::bind(address).unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (server, _) = listener.accept().unwrap();
    (listener, client, server)
}

fn patient(fd: OwnedFd) -> TcpStream {
    let stream = TcpStream::from(fd);
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    stream
}

#[test]
fn a_listener_listens_again() {
    in_private_network(|| {
        let listener = TcpListener::bind("127.0.0.1:8080").unwrap();
        let fd: OwnedFd = listener.into();
        socket::set_int(&fd, libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT, 1).unwrap();
        socket::listen(&fd, 77).unwrap();
        let deferred = socket::get_int(&fd, libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT).unwrap();
        let again = move_all(vec![fd]).remove(0);
        assert_eq!(socket::get_int(&again, libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT).unwrap(), deferred);
        let mut info = [0; 32];
        socket::get_bytes(&again, libc::IPPROTO_TCP, libc::TCP_INFO, &mut info).unwrap();
        assert_eq!((info[0], info[28]), (10, 77));
        let listener = TcpListener::from(again);
        let mut client = TcpStream::connect("127.0.0.1:8080").unwrap();
        client.write_all(b"x").unwrap();
        listener.accept().unwrap();
    });
}

#[test]
fn a_listener_with_a_connection_waiting_is_refused() {
    in_private_network(|| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (spec, mut sink) = (spec(), DataSink::default());
        let mut look = Look::new(&spec, this_thread(), &mut sink, Console::None, false);
        let refusal = intern_file(&mut look, &subject(), 3, listener.into()).unwrap_err().to_string();
        assert!(refusal.contains("1 connection that the program has not accepted"), "{refusal}");
    });
}

fn both_ends_keep_their_queues(address: &'static str) {
    in_private_network(move || {
        let (listener, mut client, mut server) = connected(address);
        client.write_all(b"to the server").unwrap();
        server.write_all(b"to the client").unwrap();
        let port = listener.local_addr().unwrap();
        let mut again = move_all(vec![server.into(), listener.into(), client.into()]).into_iter();
        let (mut server, listener) = (patient(again.next().unwrap()), TcpListener::from(again.next().unwrap()));
        let mut client = patient(again.next().unwrap());
        assert_eq!(listener.local_addr().unwrap(), port);
        server.write_all(b", and more").unwrap();
        let mut text = [0; 23];
        client.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"to the client, and more");
        let mut text = [0; 13];
        server.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"to the server");
        drop(client);
        assert_eq!(server.read(&mut text).unwrap(), 0);
        TcpStream::connect(port).unwrap();
    });
}

#[test]
fn both_ends_of_a_connection_keep_their_queues() {
    both_ends_keep_their_queues("127.0.0.1:0");
}

#[test]
fn both_ends_of_an_ipv6_connection_keep_their_queues() {
    both_ends_keep_their_queues("[::1]:0");
}

/// Fills a connection until neither queue takes more; how much went in.
fn stuff(writer: &mut TcpStream) -> Vec<u8> {
    writer.set_nonblocking(true).unwrap();
    let mut written = Vec::new();
    loop {
        let piece: Vec<u8> = (0..5000u32).map(|n| ((written.len() as u32 + n) % 251) as u8).collect();
        match writer.write(&piece) {
            Ok(n) => written.extend(&piece[..n]),
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return written,
            Err(e) => panic!("{e}"),
        }
    }
}

/// The ends of a connection are captured in that order, and in between the kernel moves bytes from one to the other.
fn bytes_move_between_captures(is_sender_first: bool) {
    in_private_network(move || {
        let (_listener, mut client, server) = connected("127.0.0.1:0");
        let sent = stuff(&mut client);
        let (writer, mut reader) = (OwnedFd::from(client), server.try_clone().unwrap());
        let reading = OwnedFd::from(server.try_clone().unwrap());
        let order = if is_sender_first { [&writer, &reading] } else { [&reading, &writer] };
        let waiting = || socket::ioctl_int(&writer, libc::TIOCOUTQ).unwrap();
        let before = waiting();
        let mut read = vec![0; 300_000];
        let captured = capture_while(&order, |place| {
            if place == 0 {
                reader.read_exact(&mut read).unwrap();
                wait_until(|| waiting() < before);
            }
        });
        assert_eq!(read, sent[..read.len()]);
        drop((writer, reading, reader));
        server.shutdown(Shutdown::Both).unwrap();
        fresh_network();
        let mut again = rebuild(&captured);
        let (first, second) = (again.remove(0), again.remove(0));
        let (writer, reading) = if is_sender_first { (first, second) } else { (second, first) };
        let (mut client, mut server) = (patient(writer), patient(reading));
        let mut rest = vec![0; sent.len() - read.len()];
        server.read_exact(&mut rest).unwrap();
        assert!(rest == sent[read.len()..], "other bytes came");
        client.set_nonblocking(false).unwrap();
        client.write_all(b"and more").unwrap();
        let mut more = [0; 8];
        server.read_exact(&mut more).unwrap();
        assert_eq!(&more, b"and more");
        server.write_all(b"back").unwrap();
        client.read_exact(&mut more[..4]).unwrap();
        assert_eq!(&more[..4], b"back");
    });
}

#[test]
fn what_arrives_after_its_sender_was_captured_was_sent() {
    bytes_move_between_captures(true);
}

#[test]
fn what_is_acknowledged_after_its_receiver_was_captured_is_not_lost() {
    bytes_move_between_captures(false);
}

#[test]
fn full_queues_arrive_whole() {
    in_private_network(|| {
        let (_listener, mut client, server) = connected("127.0.0.1:0");
        let sent = stuff(&mut client);
        let mut again = move_all(vec![client.into(), server.into()]).into_iter();
        let (mut client, mut server) = (patient(again.next().unwrap()), patient(again.next().unwrap()));
        let mut received = vec![0; sent.len()];
        server.read_exact(&mut received).unwrap();
        assert!(received == sent, "the bytes differ");
        client.set_nonblocking(false).unwrap();
        client.write_all(b"end").unwrap();
        let mut end = [0; 3];
        server.read_exact(&mut end).unwrap();
        assert_eq!(&end, b"end");
    });
}

fn state_of(fd: impl AsFd) -> u8 {
    let mut info = [0; 32];
    socket::get_bytes(fd, libc::IPPROTO_TCP, libc::TCP_INFO, &mut info).unwrap();
    info[0]
}

#[test]
fn halves_that_were_closed_stay_closed() {
    for address in ["127.0.0.1:0", "[::1]:0"] {
        in_private_network(move || {
            let (_listener, mut client, mut server) = connected(address);
            client.write_all(b"last words").unwrap();
            client.shutdown(Shutdown::Write).unwrap();
            server.write_all(b"answer").unwrap();
            wait_until(|| state_of(&client) == 5);
            let states = (5, 8);
            let mut again = move_all(vec![client.into(), server.into()]).into_iter();
            let (mut client, mut server) = (patient(again.next().unwrap()), patient(again.next().unwrap()));
            assert_eq!((state_of(&client), state_of(&server)), states);
            let mut text = String::new();
            server.read_to_string(&mut text).unwrap();
            assert_eq!(text, "last words");
            assert!(client.write_all(b"no").is_err());
            server.write_all(b" and more").unwrap();
            drop(server);
            text.clear();
            client.read_to_string(&mut text).unwrap();
            assert_eq!(text, "answer and more");
        });
    }
}

#[test]
fn an_ended_connection_keeps_what_was_not_read() {
    in_private_network(|| {
        let (_listener, client, mut server) = connected("127.0.0.1:0");
        server.write_all(b"rest").unwrap();
        server.shutdown(Shutdown::Write).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        drop(server);
        wait_until(|| state_of(&client) == 7);
        let mut client = patient(move_all(vec![client.into()]).remove(0));
        assert_eq!(state_of(&client), 7);
        let mut text = String::new();
        client.read_to_string(&mut text).unwrap();
        assert_eq!(text, "rest");
    });
}

#[test]
fn a_reset_is_still_told() {
    in_private_network(|| {
        let (_listener, mut client, server) = connected("127.0.0.1:0");
        client.write_all(b"unread").unwrap();
        drop(server);
        wait_until(|| state_of(&client) == 7);
        let client = patient(move_all(vec![client.into()]).remove(0));
        assert_eq!(client.take_error().unwrap().unwrap().raw_os_error(), Some(libc::ECONNRESET));
    });
}

#[test]
fn a_capture_leaves_the_socket_as_it_was() {
    in_private_network(|| {
        let (_listener, mut client, mut server) = connected("127.0.0.1:0");
        client.write_all(b"abc").unwrap();
        let fd: OwnedFd = server.try_clone().unwrap().into();
        socket::set_int(&fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, 2).unwrap();
        let reuse = socket::get_int(&fd, libc::SOL_SOCKET, libc::SO_REUSEADDR).unwrap();
        capture(&[&fd]);
        assert_eq!(socket::get_int(&fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF).unwrap(), 2);
        assert_eq!(socket::get_int(&fd, libc::SOL_SOCKET, libc::SO_REUSEADDR).unwrap(), reuse);
        assert_eq!(socket::get_int(&fd, libc::IPPROTO_TCP, libc::TCP_REPAIR).unwrap(), 0);
        let mut text = [0; 3];
        server.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"abc");
        server.write_all(b"def").unwrap();
        client.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"def");
    });
}

#[test]
fn options_come_back() {
    in_private_network(|| {
        let (_listener, client, server) = connected("[::1]:0");
        client.set_nodelay(true).unwrap();
        client.set_nonblocking(true).unwrap();
        let fd: OwnedFd = client.into();
        let set = |level, name, value| socket::set_int(&fd, level, name, value).unwrap();
        set(libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1);
        set(libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 33);
        set(libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, 4321);
        set(libc::IPPROTO_IPV6, libc::IPV6_TCLASS, 16);
        set(libc::SOL_SOCKET, libc::SO_SNDBUF, 50_000);
        let linger = [1i32.to_ne_bytes(), 7i32.to_ne_bytes()].concat();
        socket::set_bytes(&fd, libc::SOL_SOCKET, libc::SO_LINGER, &linger).unwrap();
        let accept_all = [(0x06, 0, 0, u32::MAX)];
        socket::attach_filter(&fd, &accept_all).unwrap();
        let before = capture(&[&fd]);
        let again = move_all(vec![fd, server.into()]).remove(0);
        let after = capture(&[&again]);
        let options = |c: &Captured| {
            let mut state = crate::image::decode::<TcpState>(&c.states[0].state).unwrap();
            // Binding to one address sets it, and nothing clears it afterwards.
            state.options.numbers.retain(|o| (o.0, o.1) != (libc::IPPROTO_IPV6, libc::IPV6_V6ONLY));
            state
        };
        let (before, after) = (options(&before), options(&after));
        assert_eq!(before.options, after.options);
        assert_eq!(after.options.filter, accept_all);
        let connection = |s: TcpState| match s.form {
            Form::Connected(c) => (c.agreed.segment, c.agreed.scales, c.agreed.selective, c.window.receive),
            _ => panic!(),
        };
        assert_eq!(connection(before), connection(after));
    });
}

#[test]
fn listener_and_connections_share_a_port_in_any_order() {
    in_private_network(|| {
        let (listener, client, server) = connected("0.0.0.0:9090");
        let address: SocketAddr = listener.local_addr().unwrap();
        socket::set_int(&listener, libc::SOL_SOCKET, libc::SO_REUSEADDR, 0).unwrap();
        let again = move_all(vec![server.into(), client.into(), listener.into()]);
        assert_eq!(socket::get_int(&again[2], libc::SOL_SOCKET, libc::SO_REUSEADDR).unwrap(), 0);
        TcpStream::connect(address).unwrap();
    });
}

/// A namespace that stays when the test's thread has left it.
struct Peer(std::process::Child);

impl Peer {
    /// A network namespace at the other end of a link: 10.9.0.2 there, 10.9.0.1 here.
    fn new() -> Peer {
        let child = std::process::Command::new("unshare").args(["-n", "sleep", "1000"]).spawn().unwrap();
        let pid = child.id();
        let ours = std::fs::read_link("/proc/thread-self/ns/net").unwrap();
        wait_until(|| std::fs::read_link(format!("/proc/{pid}/ns/net")).is_ok_and(|theirs| theirs != ours));
        let peer = Peer(child);
        ip(&format!("link add name here type veth peer name there netns {pid}"));
        ip("addr add 10.9.0.1/24 dev here");
        ip("link set here up");
        peer.run("ip addr add 10.9.0.2/24 dev there");
        peer.run("ip link set lo up");
        peer.run("ip link set there up");
        peer
    }

    fn run(&self, command: &str) {
        let pid = self.0.id().to_string();
        let status = std::process::Command::new("nsenter").args(["-t", &pid, "-n"]).args(command.split(' ')).status();
        assert!(status.unwrap().success(), "{command}");
    }

    /// Runs something over there.
    fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let namespace = std::fs::File::open(format!("/proc/{}/ns/net", self.0.id())).unwrap();
        std::thread::scope(|scope| {
            let entered = || {
                nix::sched::setns(&namespace, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
                work()
            };
            scope.spawn(entered).join().unwrap()
        })
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[test]
fn what_was_lost_under_way_is_sent_again_soon() {
    in_private_network(|| {
        let peer = Peer::new();
        let listener = TcpListener::bind("10.9.0.1:80").unwrap();
        let mut client = peer.inside(|| TcpStream::connect("10.9.0.1:80").unwrap());
        client.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        // So much that more than a few segments are under way at a time.
        let reader = std::thread::spawn(move || {
            client.read_exact(&mut vec![0; 8 << 20]).unwrap();
            client
        });
        server.write_all(&vec![0; 8 << 20]).unwrap();
        let mut client = reader.join().unwrap();
        peer.run("ip link set there down");
        let sent = stuff(&mut server);
        let fds: Vec<OwnedFd> = vec![server.into(), listener.into()];
        let captured = capture(&fds.iter().collect::<Vec<_>>());
        // As the pod ends: without a packet.
        socket::set_int(&fds[0], libc::IPPROTO_TCP, libc::TCP_REPAIR, 1).unwrap();
        drop(fds);
        peer.run("ip link set there up");
        let again = rebuild(&captured);
        let mut info = [0; 12];
        socket::get_bytes(&again[0], libc::IPPROTO_TCP, libc::TCP_INFO, &mut info).unwrap();
        let timeout = u32::from_ne_bytes(info[8..].try_into().unwrap());
        assert!(timeout < 500_000, "what was lost is sent again after {timeout} us");
        let mut received = vec![0; sent.len()];
        client.read_exact(&mut received).unwrap();
        assert!(received == sent, "the bytes differ");
    });
}
