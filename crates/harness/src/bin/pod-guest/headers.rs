//! Sockets with options that few programs set, and with something to tell that nobody has read.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;

use crate::plumbing::{bind, get, said, set, socket};
use crate::stage::*;

pub(crate) const KINDS: &[crate::stage::Kind] = &[
    ("rare-options", rare_options),
    ("packet-headers", packet_headers),
    ("udp-lite-unread", udp_lite_unread),
    ("echo-unread", echo_unread),
    ("signed-packets", signed_packets),
    ("zero-copy", zero_copy),
    ("zero-copy-used", zero_copy_used),
    ("numbered-times", numbered_times),
    ("numbered-times-used", numbered_times_used),
    ("saved-request", saved_request),
    ("time-untold", time_untold),
];

const SO_RCVPRIORITY: i32 = 82;
const SO_TIMESTAMPING: i32 = 37;

fn pair(prepare: impl FnOnce(&TcpListener) -> Checked) -> Result<(TcpStream, TcpStream), String> {
    let listener = said(TcpListener::bind("127.0.0.1:0"))?;
    prepare(&listener)?;
    let client = said(TcpStream::connect(said(listener.local_addr())?))?;
    Ok((client, said(listener.accept())?.0))
}

fn talk(mut from: &TcpStream, mut to: &TcpStream) -> Checked {
    said(from.write_all(b"hello"))?;
    let mut text = [0; 5];
    said(to.read_exact(&mut text))?;
    equal("what was said", &text, b"hello")
}

/// The bytes of an option.
fn bytes(file: &impl AsRawFd, level: i32, name: i32) -> Result<Vec<u8>, String> {
    let (mut value, mut length) = (vec![0u8; 64], 64u32);
    let at = value.as_mut_ptr().cast();
    done("option", unsafe { libc::getsockopt(file.as_raw_fd(), level, name, at, &raw mut length) })?;
    value.truncate(length as usize);
    Ok(value)
}

/// Delays, times and priorities of a connection and a listener; the listener's own keys, and the processor that it is for.
fn rare_options() -> Checked {
    const TX_DELAY: i32 = 37;
    const RTO_MAX_MS: i32 = 44;
    let listener = said(TcpListener::bind("127.0.0.1:0"))?;
    set(&listener, libc::IPPROTO_TCP, libc::TCP_FASTOPEN_KEY, &[7u8; 32])?;
    set(&listener, libc::SOL_SOCKET, libc::SO_INCOMING_CPU, &0i32)?;
    let udp = said(UdpSocket::bind("127.0.0.1:0"))?;
    set(&udp, libc::SOL_SOCKET, libc::SO_INCOMING_CPU, &0i32)?;
    let priority = set(&udp, libc::SOL_SOCKET, SO_RCVPRIORITY, &1i32).is_ok();
    let (client, server) = pair(|_| Ok(()))?;
    set(&client, libc::IPPROTO_TCP, TX_DELAY, &1000i32)?;
    let limit = set(&client, libc::IPPROTO_TCP, RTO_MAX_MS, &5000i32).is_ok();
    hold()?;
    equal("the keys", bytes(&listener, libc::IPPROTO_TCP, libc::TCP_FASTOPEN_KEY)?, vec![7; 32])?;
    equal("the processor", get(&listener, libc::SOL_SOCKET, libc::SO_INCOMING_CPU)?, 0)?;
    equal("the processor", get(&udp, libc::SOL_SOCKET, libc::SO_INCOMING_CPU)?, 0)?;
    equal("the delay", get(&client, libc::IPPROTO_TCP, TX_DELAY)?, 1000)?;
    if priority {
        equal("priorities", get(&udp, libc::SOL_SOCKET, SO_RCVPRIORITY)?, 1)?;
    }
    if limit {
        equal("the limit", get(&client, libc::IPPROTO_TCP, RTO_MAX_MS)?, 5000)?;
    }
    talk(&client, &server)?;
    talk(&server, &client)
}

/// Options of IP in every packet that is sent: of datagrams and of a connection, of both families.
fn packet_headers() -> Checked {
    // A record of the route with room for one address; padding that a receiver skips.
    const RECORD: [u8; 8] = [7, 7, 4, 0, 0, 0, 0, 0];
    const PADDING: [u8; 8] = [0, 0, 1, 4, 0, 0, 0, 0];
    let (client, server) = pair(|_| Ok(()))?;
    set(&server, libc::IPPROTO_IP, libc::IP_OPTIONS, &RECORD)?;
    let four = said(UdpSocket::bind("127.0.0.1:0"))?;
    set(&four, libc::IPPROTO_IP, libc::IP_OPTIONS, &RECORD)?;
    let six = said(UdpSocket::bind("[::1]:0"))?;
    set(&six, libc::IPPROTO_IPV6, libc::IPV6_DSTOPTS, &PADDING)?;
    set(&six, libc::IPPROTO_IPV6, libc::IPV6_2292HOPLIMIT, &1i32)?;
    let all = || -> Result<Vec<Vec<u8>>, String> {
        Ok(vec![
            bytes(&server, libc::IPPROTO_IP, libc::IP_OPTIONS)?,
            bytes(&four, libc::IPPROTO_IP, libc::IP_OPTIONS)?,
            bytes(&six, libc::IPPROTO_IPV6, libc::IPV6_DSTOPTS)?,
            bytes(&six, libc::IPPROTO_IPV6, libc::IPV6_2292HOPLIMIT)?,
        ])
    };
    let before = all()?;
    check(before.iter().all(|option| !option.is_empty()), format!("{before:?}"))?;
    hold()?;
    equal("the options", all()?, before)?;
    talk(&server, &client)?;
    for socket in [&four, &six] {
        said(socket.send_to(b"datagram", said(socket.local_addr())?))?;
        equal("a datagram", said(socket.recv(&mut [0; 20]))?, 8)?;
    }
    Ok(())
}

/// Datagrams whose checksums cover a part, not read yet.
fn udp_lite_unread() -> Checked {
    const LITE: i32 = 136;
    let made = || socket(libc::AF_INET, libc::SOCK_DGRAM, LITE);
    let (Ok(receiver), Ok(sender)) = (made(), made()) else {
        println!("skipped: no UDP-Lite here");
        return hold();
    };
    for file in [&receiver, &sender] {
        bind(file, [127, 0, 0, 1], 0)?;
    }
    let (receiver, sender) = (UdpSocket::from(receiver), UdpSocket::from(sender));
    // What a checksum is to cover at least, and what it does.
    set(&receiver, LITE, 11, &12i32)?;
    set(&sender, LITE, 10, &16i32)?;
    let to = said(receiver.local_addr())?;
    for text in [&b"one datagram"[..], b"another, longer than that"] {
        said(sender.send_to(text, to))?;
    }
    hold()?;
    let mut text = [0; 64];
    for expected in [&b"one datagram"[..], b"another, longer than that"] {
        let (length, from) = said(receiver.recv_from(&mut text))?;
        equal("a datagram", &text[..length], expected)?;
        equal("by whom", from, said(sender.local_addr())?)?;
    }
    Ok(())
}

/// The identifier of a `ping` socket, and an answer of itself that it has not read, for each family.
fn echo_unread() -> Checked {
    // Any root may say who may have such sockets.
    write("/proc/sys/net/ipv4/ping_group_range", "0 0")?;
    let four = socket(libc::AF_INET, libc::SOCK_DGRAM, libc::IPPROTO_ICMP);
    let six = socket(libc::AF_INET6, libc::SOCK_DGRAM, libc::IPPROTO_ICMPV6);
    let (Ok(four), Ok(six)) = (four, six) else {
        println!("skipped: no ping sockets here");
        return hold();
    };
    bind(&four, [127, 0, 0, 1], 0)?;
    let (four, six) = (UdpSocket::from(four), UdpSocket::from(six));
    for (ping, to, kind) in [(&four, "127.0.0.1:0", 8u8), (&six, "[::1]:0", 128)] {
        let request = [&[kind, 0, 0, 0, 0, 0, 0, 1][..], b"some words"].concat();
        said(ping.send_to(&request, to))?;
    }
    hold()?;
    for (ping, kind) in [(&four, 0u8), (&six, 129)] {
        let number = said(ping.local_addr())?.port().to_be_bytes();
        let mut answer = [0; 64];
        let (length, from) = said(ping.recv_from(&mut answer))?;
        check(from.ip().is_loopback(), format!("an answer from {from}"))?;
        equal("an answer", (answer[0], &answer[4..8]), (kind, &[number[0], number[1], 0, 1][..]))?;
        equal("what it says", &answer[8..length], b"some words")?;
    }
    Ok(())
}

/// A listener whose packets are signed, as routers do.
fn signed_packets() -> Checked {
    let listener = said(TcpListener::bind("127.0.0.1:0"))?;
    // struct tcp_md5sig: whose, flags and length, the key.
    let mut request = [0u8; 128 + 8 + 80];
    request[..8].copy_from_slice(&[2, 0, 0, 0, 127, 0, 0, 1]);
    request[130] = 3;
    request[136..139].copy_from_slice(b"key");
    if set(&listener, libc::IPPROTO_TCP, libc::TCP_MD5SIG, &request).is_err() {
        return Err("no TCP_MD5SIG here".into());
    }
    hold()
}

/// A connection that may send without copying.
fn zero_copy() -> Checked {
    let (client, server) = pair(|_| Ok(()))?;
    set(&client, libc::SOL_SOCKET, libc::SO_ZEROCOPY, &1i32)?;
    hold()?;
    talk(&client, &server)?;
    send_without_copy(&client, 0)
}

/// One that has done so, and has been told.
fn zero_copy_used() -> Checked {
    let (client, server) = pair(|_| Ok(()))?;
    set(&client, libc::SOL_SOCKET, libc::SO_ZEROCOPY, &1i32)?;
    send_without_copy(&client, 0)?;
    hold()?;
    said((&server).read_exact(&mut [0; 5]))?;
    send_without_copy(&client, 1)?;
    said((&server).read_exact(&mut [0; 5]))?;
    talk(&client, &server)
}

fn send_without_copy(client: &TcpStream, number: u32) -> Checked {
    let sent = unsafe { libc::send(client.as_raw_fd(), b"plain".as_ptr().cast(), 5, libc::MSG_ZEROCOPY) };
    equal("send", sent, 5)?;
    equal("its number", number_told(client)?, number)
}

/// A socket that numbers the times of what it sends.
fn numbered_times() -> Checked {
    let udp = numbering()?;
    hold()?;
    equal("its number", number_of_send(&udp)?, 0)
}

/// One that has sent something.
fn numbered_times_used() -> Checked {
    let udp = numbering()?;
    equal("its number", number_of_send(&udp)?, 0)?;
    hold()?;
    equal("its number", number_of_send(&udp)?, 1)
}

fn numbering() -> Result<UdpSocket, String> {
    let udp = said(UdpSocket::bind("127.0.0.1:0"))?;
    set(&udp, libc::SOL_SOCKET, SO_TIMESTAMPING, &(2i32 | 1 << 4 | 1 << 7))?;
    Ok(udp)
}

fn number_of_send(udp: &UdpSocket) -> Result<u32, String> {
    let sink = said(UdpSocket::bind("127.0.0.1:0"))?;
    said(udp.send_to(b"x", said(sink.local_addr())?))?;
    said(sink.recv(&mut [0; 4]))?;
    number_told(udp)
}

/// The number of the next of the news of what was sent.
fn number_told(socket: &impl AsRawFd) -> Result<u32, String> {
    let mut ready = libc::pollfd { fd: socket.as_raw_fd(), events: 0, revents: 0 };
    equal("poll", unsafe { libc::poll(&raw mut ready, 1, 20_000) }, 1)?;
    let mut control = [0u64; 64];
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    (header.msg_control, header.msg_controllen) = (control.as_mut_ptr().cast(), size_of_val(&control));
    let flags = libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT;
    done("recvmsg", unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, flags) } as i64)?;
    let mut part = unsafe { libc::CMSG_FIRSTHDR(&raw const header) };
    while !part.is_null() {
        if unsafe { ((*part).cmsg_level, (*part).cmsg_type) } == (libc::SOL_IP, libc::IP_RECVERR) {
            let news = unsafe { libc::CMSG_DATA(part).cast::<libc::sock_extended_err>().read_unaligned() };
            return Ok(news.ee_data);
        }
        part = unsafe { libc::CMSG_NXTHDR(&raw const header, part) };
    }
    Err("no number".into())
}

/// A connection that keeps the packet by which it began.
fn saved_request() -> Checked {
    let (client, server) = pair(|listener| set(listener, libc::IPPROTO_TCP, libc::TCP_SAVE_SYN, &1i32))?;
    hold()?;
    check(bytes(&server, libc::IPPROTO_TCP, libc::TCP_SAVED_SYN)?.len() >= 40, "the packet is gone")?;
    talk(&client, &server)
}

/// A time at which something was sent, which nobody has read.
fn time_untold() -> Checked {
    let udp = said(UdpSocket::bind("127.0.0.1:0"))?;
    set(&udp, libc::SOL_SOCKET, SO_TIMESTAMPING, &(2i32 | 1 << 4))?;
    let sink = said(UdpSocket::bind("127.0.0.1:0"))?;
    said(udp.send_to(b"x", said(sink.local_addr())?))?;
    said(sink.recv(&mut [0; 4]))?;
    let mut ready = libc::pollfd { fd: udp.as_raw_fd(), events: 0, revents: 0 };
    equal("poll", unsafe { libc::poll(&raw mut ready, 1, 20_000) }, 1)?;
    hold()?;
    equal("poll", unsafe { libc::poll(&raw mut ready, 1, 0) }, 1)
}
