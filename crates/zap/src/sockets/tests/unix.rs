//! Unix sockets.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};

use super::*;
use crate::sys::{message, socket};

fn stream(fd: OwnedFd) -> UnixStream {
    let stream = UnixStream::from(fd);
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    stream
}

#[test]
fn a_pair_keeps_its_queues() {
    in_private_network(|| {
        let (mut a, mut b) = UnixStream::pair().unwrap();
        a.write_all(b"one").unwrap();
        a.write_all(b"two").unwrap();
        b.write_all(b"back").unwrap();
        let mut again = move_all(vec![a.into(), b.into()]).into_iter();
        let (mut a, mut b) = (stream(again.next().unwrap()), stream(again.next().unwrap()));
        a.write_all(b"three").unwrap();
        let mut text = [0; 11];
        b.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"onetwothree");
        let mut text = [0; 4];
        a.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"back");
        drop(a);
        assert_eq!(b.read(&mut text).unwrap(), 0);
    });
}

#[test]
fn a_large_queue_arrives_whole() {
    in_private_network(|| {
        let (mut a, b) = UnixStream::pair().unwrap();
        a.set_nonblocking(true).unwrap();
        let mut sent = Vec::new();
        while let Ok(n) = a.write(&vec![sent.len() as u8; 3000]) {
            sent.extend(vec![sent.len() as u8; n]);
        }
        let mut again = move_all(vec![b.into(), a.into()]).into_iter();
        let mut b = stream(again.next().unwrap());
        let mut received = vec![0; sent.len()];
        b.read_exact(&mut received).unwrap();
        assert!(received == sent);
    });
}

#[test]
fn a_pair_whose_other_end_was_closed() {
    in_private_network(|| {
        let (mut a, mut b) = UnixStream::pair().unwrap();
        a.write_all(b"farewell").unwrap();
        b.write_all(b"unread").unwrap();
        drop(a);
        let mut b = stream(move_all(vec![b.into()]).remove(0));
        let mut text = [0; 8];
        b.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"farewell");
        // The peer closed without reading what it had got.
        assert_eq!(b.read(&mut text).unwrap_err().raw_os_error(), Some(libc::ECONNRESET));
        assert_eq!(b.write(b"x").unwrap_err().raw_os_error(), Some(libc::EPIPE));
    });
}

#[test]
fn halves_that_were_shut_stay_shut() {
    in_private_network(|| {
        let (mut a, mut b) = UnixStream::pair().unwrap();
        a.write_all(b"last words").unwrap();
        b.write_all(b"answer").unwrap();
        a.shutdown(Shutdown::Write).unwrap();
        let mut again = move_all(vec![a.into(), b.into()]).into_iter();
        let (mut a, mut b) = (stream(again.next().unwrap()), stream(again.next().unwrap()));
        let mut text = String::new();
        b.read_to_string(&mut text).unwrap();
        assert_eq!(text, "last words");
        assert!(a.write(b"x").is_err());
        b.write_all(b" and more").unwrap();
        drop(b);
        text.clear();
        a.read_to_string(&mut text).unwrap();
        assert_eq!(text, "answer and more");
    });
}

#[test]
fn descriptors_in_flight_arrive_with_the_bytes_that_carried_them() {
    in_private_network(|| {
        let (mut a, b) = UnixStream::pair().unwrap();
        let (x, mut y) = UnixStream::pair().unwrap();
        a.write_all(b"before").unwrap();
        message::send(&a, b"with", &[x.as_fd()], None, &[], 0).unwrap();
        a.write_all(b"after").unwrap();
        drop(x);
        y.write_all(b"through").unwrap();
        let mut again = move_all(vec![a.into(), b.into(), y.into()]).into_iter();
        let (_a, b, mut y) = (again.next(), again.next().unwrap(), stream(again.next().unwrap()));
        let mut text = [0; 3];
        let first = message::receive(&b, &mut text, 0).unwrap();
        assert_eq!((&text, first.files.len()), (b"bef", 0));
        let mut text = [0; 100];
        let second = message::receive(&b, &mut text, 0).unwrap();
        assert_eq!((&text[..second.length], second.files.len()), (&b"orewith"[..], 1));
        let third = message::receive(&b, &mut text, 0).unwrap();
        assert_eq!((&text[..third.length], third.files.len()), (&b"after"[..], 0));
        let mut x = stream(second.files.into_iter().next().unwrap());
        let mut text = [0; 7];
        x.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"through");
        x.write_all(b"hello").unwrap();
        y.read_exact(&mut text[..5]).unwrap();
    });
}

#[test]
fn a_path_listener_and_its_connections() {
    for order in 0..3 {
        in_private_network(move || {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("socket");
            let listener = UnixListener::bind(&path).unwrap();
            std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o640)).unwrap();
            let client = UnixStream::connect(&path).unwrap();
            let (mut server, _) = listener.accept().unwrap();
            server.write_all(b"hello").unwrap();
            let mut files: Vec<OwnedFd> = vec![listener.into(), client.into(), server.into()];
            files.rotate_left(order);
            let mut again = move_all(files);
            again.rotate_right(order);
            let server = stream(again.pop().unwrap());
            let mut client = stream(again.pop().unwrap());
            let listener = UnixListener::from(again.pop().unwrap());
            assert_eq!(server.local_addr().unwrap().as_pathname(), Some(path.as_path()));
            assert_eq!(client.peer_addr().unwrap().as_pathname(), Some(path.as_path()));
            assert!(client.local_addr().unwrap().is_unnamed());
            let mut text = [0; 5];
            client.read_exact(&mut text).unwrap();
            assert_eq!(&text, b"hello");
            let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&path).unwrap().permissions());
            assert_eq!(mode & 0o777, 0o640);
            UnixStream::connect(&path).unwrap();
            listener.accept().unwrap();
        });
    }
}

#[test]
fn an_abstract_listener_and_its_connections() {
    for order in 0..3 {
        in_private_network(move || {
            let name = SocketAddr::from_abstract_name(b"zap/test\0name").unwrap();
            let listener = UnixListener::bind_addr(&name).unwrap();
            let client = UnixStream::connect_addr(&name).unwrap();
            let (mut server, _) = listener.accept().unwrap();
            server.write_all(b"hello").unwrap();
            let mut files: Vec<OwnedFd> = vec![listener.into(), client.into(), server.into()];
            files.rotate_left(order);
            let mut again = move_all(files);
            again.rotate_right(order);
            let server = stream(again.pop().unwrap());
            let mut client = stream(again.pop().unwrap());
            let listener = UnixListener::from(again.pop().unwrap());
            assert_eq!(server.local_addr().unwrap().as_abstract_name(), name.as_abstract_name());
            assert_eq!(client.peer_addr().unwrap().as_abstract_name(), name.as_abstract_name());
            let mut text = [0; 5];
            client.read_exact(&mut text).unwrap();
            UnixStream::connect_addr(&name).unwrap();
            listener.accept().unwrap();
        });
    }
}

#[test]
fn a_relative_name_and_a_removed_file() {
    in_private_network(|| {
        let directory = tempfile::tempdir().unwrap();
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS).unwrap();
        nix::unistd::chdir(directory.path()).unwrap();
        std::fs::create_dir("sub").unwrap();
        let relative = UnixListener::bind("sub/here").unwrap();
        let removed = UnixListener::bind("gone").unwrap();
        std::fs::remove_file("gone").unwrap();
        let again = move_all(vec![relative.into(), removed.into()]);
        assert_eq!(&socket::local_name(&again[0]).unwrap()[2..], b"sub/here\0");
        assert_eq!(&socket::local_name(&again[1]).unwrap()[2..], b"gone\0");
        assert!(!directory.path().join("gone").exists());
        UnixStream::connect(directory.path().join("sub/here")).unwrap();
        let bound = message::bound_file(&again[1]).unwrap();
        UnixStream::connect(format!("/proc/self/fd/{}", bound.as_raw_fd())).unwrap();
    });
}

#[test]
fn a_peer_outside_is_refused() {
    in_private_network(|| {
        let (a, _outside) = UnixStream::pair().unwrap();
        let (spec, mut sink) = (spec(), DataSink::default());
        let mut look = Look::new(&spec, this_thread(), &mut sink, Console::None, false);
        intern_file(&mut look, &subject(), 3, a.into()).unwrap();
        let refusal = finish(&mut look).unwrap_err().to_string();
        assert!(refusal.contains("connected to a socket outside the pod"), "{refusal}");
    });
}

#[test]
fn datagrams_keep_their_boundaries_and_senders() {
    in_private_network(|| {
        let name = |n: &str| SocketAddr::from_abstract_name(n).unwrap();
        let receiver = UnixDatagram::bind_addr(&name("receiver")).unwrap();
        let sender = UnixDatagram::bind_addr(&name("sender")).unwrap();
        let unnamed = UnixDatagram::unbound().unwrap();
        let gone = UnixDatagram::bind_addr(&name("gone")).unwrap();
        sender.connect_addr(&name("receiver")).unwrap();
        unnamed.connect_addr(&name("receiver")).unwrap();
        sender.send(b"one").unwrap();
        unnamed.send(b"").unwrap();
        unnamed.send(b"three").unwrap();
        gone.send_to_addr(b"four", &name("receiver")).unwrap();
        drop(gone);
        let again = move_all(vec![receiver.into(), sender.into(), unnamed.into()]);
        let mut again = again.into_iter().map(UnixDatagram::from);
        let (receiver, sender) = (again.next().unwrap(), again.next().unwrap());
        receiver.set_nonblocking(true).unwrap();
        let mut buffer = [0; 16];
        let mut expect = |text: &[u8], from: Option<&str>| {
            let (length, address) = receiver.recv_from(&mut buffer).unwrap();
            assert_eq!((&buffer[..length], address.as_abstract_name()), (text, from.map(str::as_bytes)));
        };
        expect(b"one", Some("sender"));
        expect(b"", None);
        expect(b"three", None);
        expect(b"four", Some("gone"));
        sender.send(b"still connected").unwrap();
        expect(b"still connected", Some("sender"));
    });
}

#[test]
fn sequenced_packets_keep_their_boundaries() {
    in_private_network(|| {
        let (a, b) = socket::pair(libc::AF_UNIX, libc::SOCK_SEQPACKET).unwrap();
        for packet in ["one", "two two", "three"] {
            socket::send(&a, packet.as_bytes(), 0).unwrap();
        }
        drop(a);
        let again = move_all(vec![b]).remove(0);
        let mut buffer = [0; 16];
        for packet in ["one", "two two", "three", ""] {
            let length = socket::receive(&again, &mut buffer, libc::MSG_DONTWAIT).unwrap();
            assert_eq!(&buffer[..length], packet.as_bytes());
        }
    });
}

#[test]
fn peers_keep_their_credentials() {
    in_private_network(|| {
        let (a, b) = std::thread::spawn(|| {
            crate::sys::ipc::act_as(1, 2).unwrap();
            UnixStream::pair().unwrap()
        })
        .join()
        .unwrap();
        socket::set_int(&b, libc::SOL_SOCKET, libc::SO_PASSCRED, 1).unwrap();
        (&a).write_all(b"from root").unwrap();
        let credentials = |fd: &OwnedFd| {
            let mut bytes = [0; 12];
            socket::get_bytes(fd, libc::SOL_SOCKET, libc::SO_PEERCRED, &mut bytes).unwrap();
            bytes
        };
        let (a, b): (OwnedFd, OwnedFd) = (a.into(), b.into());
        let before = credentials(&a);
        assert_eq!(before[4..], [1, 0, 0, 0, 2, 0, 0, 0]);
        let again = move_all(vec![a, b]);
        assert_eq!((credentials(&again[0]), credentials(&again[1])), (before, before));
        let message = message::receive(&again[1], &mut [0; 100], 0).unwrap();
        assert_eq!(message.credentials, Some((std::process::id() as i32, 0, 0)));
    });
}
