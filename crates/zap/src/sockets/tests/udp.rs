//! UDP.

use std::net::UdpSocket;
use std::os::fd::OwnedFd;

use super::*;
use crate::sys::socket;

fn patient(fd: OwnedFd) -> UdpSocket {
    let socket = UdpSocket::from(fd);
    socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    socket
}

fn queues_and_peers(address: &'static str) {
    in_private_network(move || {
        let server = UdpSocket::bind((address, 5353)).unwrap();
        let client = UdpSocket::bind((address, 0)).unwrap();
        client.connect(server.local_addr().unwrap()).unwrap();
        for text in ["one", "", "three"] {
            client.send(text.as_bytes()).unwrap();
        }
        server.send_to(b"back", client.local_addr().unwrap()).unwrap();
        let from = client.local_addr().unwrap();
        let mut again = move_all(vec![server.into(), client.into()]).into_iter();
        let (server, client) = (patient(again.next().unwrap()), patient(again.next().unwrap()));
        let mut buffer = [0; 16];
        for text in ["one", "", "three"] {
            let (length, sender) = server.recv_from(&mut buffer).unwrap();
            assert_eq!((&buffer[..length], sender), (text.as_bytes(), from));
        }
        assert_eq!(client.recv(&mut buffer).unwrap(), 4);
        client.send(b"more").unwrap();
        assert_eq!(server.recv(&mut buffer).unwrap(), 4);
    });
}

#[test]
fn datagrams_stay_queued_and_sockets_connected() {
    queues_and_peers("127.0.0.1");
}

#[test]
fn ipv6_datagrams_stay_queued_and_sockets_connected() {
    queues_and_peers("::1");
}

#[test]
fn a_wildcard_socket_knows_where_its_datagrams_went() {
    in_private_network(|| {
        let server = UdpSocket::bind("[::]:7777").unwrap();
        let client = UdpSocket::bind("127.0.0.9:0").unwrap();
        let fd: OwnedFd = server.into();
        socket::set_int(&fd, libc::IPPROTO_IP, libc::IP_RECVORIGDSTADDR, 1).unwrap();
        client.send_to(b"here", "127.0.0.7:7777").unwrap();
        let large = vec![7; 60_000];
        client.send_to(&large, "127.0.0.7:7777").unwrap();
        let again = move_all(vec![fd, client.into()]).remove(0);
        let mut buffer = vec![0; 65536];
        let got = crate::sys::message::receive(&again, &mut buffer, libc::MSG_DONTWAIT).unwrap();
        let to = crate::sockets::address::from_kernel(&got.destination).unwrap();
        assert_eq!((got.length, to.to_string().as_str()), (4, "127.0.0.7:7777"));
        assert_eq!(socket::receive(&again, &mut buffer, libc::MSG_DONTWAIT).unwrap(), large.len());
    });
}
