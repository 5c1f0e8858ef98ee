//! Sockets of every kind that programs use beside the plain ones.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::stage::*;

pub(crate) const KINDS: &[crate::stage::Kind] = &[
    ("multicast-groups", multicast_groups),
    ("filtered-socket", filtered_socket),
    ("port-shared", port_shared),
    ("mapped-address", mapped_address),
    ("netlink-groups", netlink_groups),
    ("fast-open", fast_open),
    ("corked-stream", corked_stream),
    ("corked-idle", corked_idle),
    ("corked-datagram", corked_datagram),
    ("corked-datagram6", corked_datagram6),
    ("corked-datagram-apart", corked_datagram_apart),
    ("datagram-held-back", datagram_held_back),
    ("rights-cycle", rights_cycle),
    ("handles-on-their-way", handles_on_their_way),
    ("unix-credentials", unix_credentials),
    ("datagrams-shut", datagrams_shut),
    ("address-without-port", address_without_port),
    ("stream-headers", stream_headers),
    ("unix-names", unix_names),
    ("unix-links", unix_links),
    ("datagrams-empty", datagrams_empty),
];

pub(crate) fn said<T>(result: std::io::Result<T>) -> Result<T, String> {
    result.map_err(|e| e.to_string())
}

pub(crate) fn socket(family: i32, kind: i32, protocol: i32) -> Result<OwnedFd, String> {
    let made = done("socket", unsafe { libc::socket(family, kind, protocol) })? as i32;
    Ok(unsafe { OwnedFd::from_raw_fd(made) })
}

pub(crate) fn set<T>(file: &impl AsRawFd, level: i32, name: i32, value: &T) -> Checked {
    let (at, length) = ((&raw const *value).cast(), size_of::<T>() as u32);
    done(&format!("option {level}/{name}"), unsafe { libc::setsockopt(file.as_raw_fd(), level, name, at, length) })
        .map(drop)
}

pub(crate) fn get(file: &impl AsRawFd, level: i32, name: i32) -> Result<i32, String> {
    let (mut value, mut length) = (0i32, size_of::<i32>() as u32);
    let at = (&raw mut value).cast();
    done(&format!("option {level}/{name}"), unsafe {
        libc::getsockopt(file.as_raw_fd(), level, name, at, &raw mut length)
    })?;
    Ok(value)
}

/// Groups of both families, with sources that are wanted and that are not.
fn multicast_groups() -> Checked {
    const SOURCE: i32 = 39;
    let (v4, v6) = (said(UdpSocket::bind("0.0.0.0:0"))?, said(UdpSocket::bind("[::]:0"))?);
    said(v4.join_multicast_v4(&[239, 1, 2, 3].into(), &[127, 0, 0, 1].into()))?;
    said(v6.join_multicast_v6(&"ff05::7".parse().map_err(|_| "address")?, 1))?;
    let from = libc::ip_mreq_source {
        imr_multiaddr: libc::in_addr { s_addr: u32::from_ne_bytes([239, 9, 9, 9]) },
        imr_interface: libc::in_addr { s_addr: u32::from_ne_bytes([127, 0, 0, 1]) },
        imr_sourceaddr: libc::in_addr { s_addr: u32::from_ne_bytes([127, 0, 0, 5]) },
    };
    set(&v4, libc::IPPROTO_IP, SOURCE, &from)?;
    set(&v4, libc::IPPROTO_IP, libc::IP_MULTICAST_LOOP, &1i32)?;
    let facts = || -> Result<Vec<String>, String> {
        ["igmp6", "mcfilter", "mcfilter6"].iter().map(|name| read(format!("/proc/net/{name}"))).collect()
    };
    let before = facts()?;
    hold()?;
    equal("groups and sources", facts()?, before)?;
    let port = said(v4.local_addr())?.port();
    let sender = said(UdpSocket::bind("127.0.0.1:0"))?;
    set(&sender, libc::IPPROTO_IP, libc::IP_MULTICAST_IF, &from.imr_interface)?;
    said(sender.send_to(b"all", ("239.1.2.3", port)))?;
    said(v4.set_read_timeout(Some(std::time::Duration::from_secs(120))))?;
    let mut text = [0; 8];
    let length = said(v4.recv(&mut text))?;
    equal("what the group hears", &text[..length], b"all")
}

/// A filter that lets through what begins with an `a`, and cannot be taken away.
fn filtered_socket() -> Checked {
    let receiver = said(UdpSocket::bind("127.0.0.1:0"))?;
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let mut steps = [step(0x30, 0, 0, 8), step(0x15, 0, 1, b'a'.into()), step(6, 0, 0, 65535), step(6, 0, 0, 0)];
    let program = libc::sock_fprog { len: steps.len() as u16, filter: steps.as_mut_ptr() };
    set(&receiver, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program)?;
    set(&receiver, libc::SOL_SOCKET, libc::SO_LOCK_FILTER, &1i32)?;
    hold()?;
    check(set(&receiver, libc::SOL_SOCKET, libc::SO_DETACH_FILTER, &0i32).is_err(), "the filter could be taken off")?;
    let sender = said(UdpSocket::bind("127.0.0.1:0"))?;
    let to = said(receiver.local_addr())?;
    said(sender.send_to(b"bad", to))?;
    said(sender.send_to(b"a good one", to))?;
    let mut text = [0; 16];
    let length = said(receiver.recv(&mut text))?;
    equal("what comes through", &text[..length], b"a good one")
}

/// Several sockets at one port, in two processes.
fn port_shared() -> Checked {
    let listen = |port: u16| -> Result<TcpListener, String> {
        let made = socket(libc::AF_INET, libc::SOCK_STREAM, 0)?;
        set(&made, libc::SOL_SOCKET, libc::SO_REUSEPORT, &1i32)?;
        bind(&made, [127, 0, 0, 1], port)?;
        done("listen", unsafe { libc::listen(made.as_raw_fd(), 16) })?;
        Ok(made.into())
    };
    let first = listen(0)?;
    let port = said(first.local_addr())?.port();
    let datagrams = |port: u16| -> Result<UdpSocket, String> {
        let made = socket(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
        set(&made, libc::SOL_SOCKET, libc::SO_REUSEPORT, &1i32)?;
        bind(&made, [127, 0, 0, 1], port)?;
        Ok(made.into())
    };
    let one = datagrams(0)?;
    let other = datagrams(said(one.local_addr())?.port())?;
    let child = fork(|| {
        let second = listen(port)?;
        await_go();
        serve(&second)
    })?;
    until("the child's socket", || read("/proc/net/tcp").unwrap_or_default().matches(" 0A ").count() == 2)?;
    hold()?;
    said(first.set_nonblocking(true))?;
    let mut clients = Vec::new();
    let mut accepted = Vec::new();
    for _ in 0..64 {
        clients.push(said(TcpStream::connect(("127.0.0.1", port)))?);
        while let Ok((stream, _)) = first.accept() {
            accepted.push(stream);
        }
    }
    check((1..64).contains(&accepted.len()), format!("of 64, one accepted {}", accepted.len()))?;
    let sender = said(UdpSocket::bind("127.0.0.1:0"))?;
    said(sender.send_to(b"x", said(one.local_addr())?))?;
    said(one.set_nonblocking(true))?;
    said(other.set_nonblocking(true))?;
    let mut byte = [0; 1];
    until("a datagram", || one.recv(&mut byte).is_ok() || other.recv(&mut byte).is_ok())?;
    // A word from the child's last client ends the child.
    write("/tmp/enough", "")?;
    reap(child)
}

fn serve(listener: &TcpListener) -> Checked {
    said(listener.set_nonblocking(true))?;
    let mut streams = 0;
    until("the end", || {
        while listener.accept().is_ok() {
            streams += 1;
        }
        std::path::Path::new("/tmp/enough").exists()
    })?;
    check(streams > 0, "the child accepted nothing")
}

pub(crate) fn bind(file: &impl AsRawFd, ip: [u8; 4], port: u16) -> Checked {
    let address = libc::sockaddr_in {
        sin_family: libc::AF_INET as u16,
        sin_port: port.to_be(),
        sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(ip) },
        sin_zero: [0; 8],
    };
    let length = size_of::<libc::sockaddr_in>() as u32;
    done("bind", unsafe { libc::bind(file.as_raw_fd(), (&raw const address).cast(), length) }).map(drop)
}

/// Connections and datagrams of IPv4 to sockets of IPv6.
fn mapped_address() -> Checked {
    let listener = said(TcpListener::bind("[::]:0"))?;
    let port = said(listener.local_addr())?.port();
    let mut client = said(TcpStream::connect(("127.0.0.1", port)))?;
    let (mut server, _) = said(listener.accept())?;
    said(client.write_all(b"unread"))?;
    let datagrams = said(UdpSocket::bind("[::]:0"))?;
    let sender = said(UdpSocket::bind("127.0.0.1:0"))?;
    let to = ("127.0.0.1", said(datagrams.local_addr())?.port());
    said(sender.send_to(b"unread", to))?;
    until("the datagram", || datagrams.peek(&mut [0; 8]).is_ok())?;
    let names = |server: &TcpStream| Ok::<_, String>((said(server.local_addr())?, said(server.peer_addr())?));
    let before = names(&server)?;
    check(before.0.is_ipv6() && before.0.to_string().contains("::ffff:127"), before.0.to_string())?;
    hold()?;
    equal("the server's names", names(&server)?, before)?;
    let mut text = [0; 6];
    said(server.read_exact(&mut text))?;
    equal("what was unread", &text, b"unread")?;
    said(server.write_all(b"answer"))?;
    said(client.read_exact(&mut text))?;
    equal("the answer", &text, b"answer")?;
    let (length, from) = said(datagrams.recv_from(&mut text))?;
    equal("the datagram", &text[..length], b"unread")?;
    check(from.to_string().contains("::ffff:127"), from.to_string())?;
    said(TcpStream::connect(("127.0.0.1", port))).and(said(listener.accept())).map(drop)
}

/// A socket that listens to what becomes of interfaces and addresses.
fn netlink_groups() -> Checked {
    let made = socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE)?;
    let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
    address.nl_family = libc::AF_NETLINK as u16;
    address.nl_groups = (libc::RTMGRP_LINK | libc::RTMGRP_IPV4_IFADDR | libc::RTMGRP_IPV6_ROUTE) as u32;
    let length = size_of::<libc::sockaddr_nl>() as u32;
    done("bind", unsafe { libc::bind(made.as_raw_fd(), (&raw const address).cast(), length) })?;
    let groups = || {
        let all = read("/proc/net/netlink").unwrap_or_default();
        let lines = all.lines().skip(1).filter_map(|line| Some(line.split_whitespace().nth(3)?.to_owned()));
        let mut groups: Vec<String> = lines.filter(|groups| !groups.trim_start_matches('0').is_empty()).collect();
        groups.sort();
        groups
    };
    let before = groups();
    hold()?;
    equal("the groups", groups(), before)?;
    let mut byte = [0u8; 16];
    let got = unsafe { libc::recv(made.as_raw_fd(), byte.as_mut_ptr().cast(), 16, libc::MSG_DONTWAIT) };
    equal("unread news", (got, std::io::Error::last_os_error().raw_os_error()), (-1, Some(libc::EAGAIN)))?;
    // Asked for loopback, the kernel answers.
    let mut request = [0u8; 32];
    request[..4].copy_from_slice(&32u32.to_ne_bytes());
    request[4..6].copy_from_slice(&libc::RTM_GETLINK.to_ne_bytes());
    request[6..8].copy_from_slice(&(libc::NLM_F_REQUEST as u16).to_ne_bytes());
    request[20..24].copy_from_slice(&1u32.to_ne_bytes());
    done("send", unsafe { libc::send(made.as_raw_fd(), request.as_ptr().cast(), 32, 0) } as i64)?;
    let mut answer = [0u8; 8192];
    let got = done("recv", unsafe { libc::recv(made.as_raw_fd(), answer.as_mut_ptr().cast(), 8192, 0) } as i64)?;
    check(got > 32 && answer[4..6] == libc::RTM_NEWLINK.to_ne_bytes(), "no answer")
}

/// A listener that takes data with the first packet.
fn fast_open() -> Checked {
    let listener = said(TcpListener::bind("127.0.0.1:0"))?;
    set(&listener, libc::IPPROTO_TCP, libc::TCP_FASTOPEN, &7i32)?;
    hold()?;
    equal("the queue's length", get(&listener, libc::IPPROTO_TCP, libc::TCP_FASTOPEN)?, 7)?;
    said(TcpStream::connect(said(listener.local_addr())?)).and(said(listener.accept())).map(drop)
}

fn connected() -> Result<(TcpStream, TcpStream), String> {
    let listener = said(TcpListener::bind("127.0.0.1:0"))?;
    let client = said(TcpStream::connect(said(listener.local_addr())?))?;
    Ok((client, said(listener.accept())?.0))
}

/// Data that a corked connection holds back.
fn corked_stream() -> Checked {
    let (mut client, mut server) = connected()?;
    set(&client, libc::IPPROTO_TCP, libc::TCP_CORK, &1i32)?;
    said(client.write_all(b"held back"))?;
    hold_loosely()?;
    equal("the cork", get(&client, libc::IPPROTO_TCP, libc::TCP_CORK)?, 1)?;
    said(client.write_all(b" and more"))?;
    set(&client, libc::IPPROTO_TCP, libc::TCP_CORK, &0i32)?;
    let mut text = [0; 18];
    said(server.read_exact(&mut text))?;
    equal("what came", &text, b"held back and more")
}

const UDP_CORK: i32 = 1;

/// A corked socket that holds nothing back.
fn corked_idle() -> Checked {
    let (sender, receiver) = (said(UdpSocket::bind("127.0.0.1:0"))?, said(UdpSocket::bind("127.0.0.1:0"))?);
    said(sender.connect(said(receiver.local_addr())?))?;
    set(&sender, libc::IPPROTO_UDP, UDP_CORK, &1i32)?;
    hold()?;
    said(sender.send(b"one ")).and(said(sender.send(b"datagram")))?;
    set(&sender, libc::IPPROTO_UDP, UDP_CORK, &0i32)?;
    let mut text = [0; 32];
    let length = said(receiver.recv(&mut text))?;
    equal("what came", &text[..length], b"one datagram")
}

/// A datagram in the making, of several parts, a large one among them.
fn corked_datagram() -> Checked {
    let (sender, receiver) = (said(UdpSocket::bind("0.0.0.0:0"))?, said(UdpSocket::bind("127.0.0.1:0"))?);
    set(&sender, libc::IPPROTO_UDP, UDP_CORK, &1i32)?;
    let large: Vec<u8> = (0..40_000u32).map(|n| (n / 7) as u8).collect();
    let parts = [b"one ", &large[..], b" large ", b"datagram"];
    for part in &parts[..3] {
        said(sender.send_to(part, said(receiver.local_addr())?))?;
    }
    hold()?;
    said(sender.send_to(parts[3], said(receiver.local_addr())?))?;
    set(&sender, libc::IPPROTO_UDP, UDP_CORK, &0i32)?;
    let mut text = vec![0; 60_000];
    let length = said(receiver.recv(&mut text))?;
    check(text[..length] == parts.concat(), "the datagram differs")
}

/// Datagrams of IPv6, and to an address that is of IPv4.
fn corked_datagram6() -> Checked {
    let corked = |receiver: &str| -> Result<_, String> {
        let (sender, receiver) = (said(UdpSocket::bind("[::]:0"))?, said(UdpSocket::bind(receiver))?);
        let port = said(receiver.local_addr())?.port();
        let mapped = if said(receiver.local_addr())?.is_ipv4() { "::ffff:127.0.0.1" } else { "::1" };
        said(sender.connect((mapped, port)))?;
        set(&sender, libc::IPPROTO_UDP, UDP_CORK, &1i32)?;
        said(sender.send(b"one ")).and(said(sender.send(b"datagram")))?;
        Ok((sender, receiver))
    };
    let all = [corked("[::1]:0")?, corked("127.0.0.1:0")?];
    hold()?;
    for (sender, receiver) in all {
        set(&sender, libc::IPPROTO_UDP, UDP_CORK, &0i32)?;
        let mut text = [0; 32];
        let length = said(receiver.recv(&mut text))?;
        equal("what came", &text[..length], b"one datagram")?;
    }
    Ok(())
}

/// A datagram in the making that has a time to live of its own.
fn corked_datagram_apart() -> Checked {
    let (sender, receiver) = (said(UdpSocket::bind("127.0.0.1:0"))?, said(UdpSocket::bind("127.0.0.1:0"))?);
    said(sender.connect(said(receiver.local_addr())?))?;
    let sent = send_with(&sender, b"one", (libc::IPPROTO_IP, libc::IP_TTL, 7), libc::MSG_MORE)?;
    equal("sendmsg", sent, 3)?;
    hold()?;
    said(sender.send(b" datagram"))?;
    let mut text = [0; 32];
    let length = said(receiver.recv(&mut text))?;
    equal("what came", &text[..length], b"one datagram")
}

/// The same, by a flag of the call alone.
fn datagram_held_back() -> Checked {
    let (sender, receiver) = (said(UdpSocket::bind("127.0.0.1:0"))?, said(UdpSocket::bind("127.0.0.1:0"))?);
    said(sender.connect(said(receiver.local_addr())?))?;
    let sent = unsafe { libc::send(sender.as_raw_fd(), b"one ".as_ptr().cast(), 4, libc::MSG_MORE) };
    equal("send", sent, 4)?;
    hold()?;
    said(sender.send(b"datagram"))?;
    let mut text = [0; 32];
    let length = said(receiver.recv(&mut text))?;
    equal("what came", &text[..length], b"one datagram")
}

/// Sends bytes, with one number beside them: of what level and kind, and which.
fn send_with(
    through: &impl AsRawFd,
    bytes: &[u8],
    (level, kind, number): (i32, i32, i32),
    flags: i32,
) -> Result<i64, String> {
    let mut piece = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let mut control = [0u64; 8];
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    (header.msg_iov, header.msg_iovlen) = (&raw mut piece, 1);
    (header.msg_control, header.msg_controllen) =
        (control.as_mut_ptr().cast(), unsafe { libc::CMSG_SPACE(4) } as usize);
    unsafe {
        let part = libc::CMSG_FIRSTHDR(&raw const header);
        (*part).cmsg_level = level;
        (*part).cmsg_type = kind;
        (*part).cmsg_len = libc::CMSG_LEN(4) as usize;
        libc::CMSG_DATA(part).cast::<i32>().write_unaligned(number);
    }
    done("sendmsg", unsafe { libc::sendmsg(through.as_raw_fd(), &raw const header, flags) } as i64)
}

pub(crate) fn send_file(through: &impl AsRawFd, file: i32) -> Checked {
    send_with(through, b"f", (libc::SOL_SOCKET, libc::SCM_RIGHTS, file), 0).map(drop)
}

pub(crate) fn receive_file(through: &impl AsRawFd) -> Result<OwnedFd, String> {
    let mut byte = [0u8];
    let mut piece = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
    let mut control = [0u64; 8];
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    (header.msg_iov, header.msg_iovlen) = (&raw mut piece, 1);
    (header.msg_control, header.msg_controllen) = (control.as_mut_ptr().cast(), 64);
    done("recvmsg", unsafe { libc::recvmsg(through.as_raw_fd(), &raw mut header, 0) } as i64)?;
    let part = unsafe { libc::CMSG_FIRSTHDR(&raw const header) };
    check(!part.is_null(), "no descriptor came")?;
    Ok(unsafe { OwnedFd::from_raw_fd(libc::CMSG_DATA(part).cast::<i32>().read_unaligned()) })
}

/// A socket that is on its way through itself, held by nobody else.
fn rights_cycle() -> Checked {
    use std::os::unix::net::UnixStream;
    let (one, other) = said(UnixStream::pair())?;
    let (mut near, far) = said(UnixStream::pair())?;
    // The end that reads goes into its own queue, and into one that is read later.
    send_file(&near, far.as_raw_fd())?;
    send_file(&one, far.as_raw_fd())?;
    send_file(&one, one.as_raw_fd())?;
    drop(far);
    drop(one);
    hold()?;
    let far = receive_file(&other)?;
    let mut one: UnixStream = receive_file(&other)?.into();
    let mut again: UnixStream = receive_file(&far)?.into();
    said(near.write_all(b"hello"))?;
    let mut text = [0; 5];
    said(again.read_exact(&mut text))?;
    equal("through the cycle", &text, b"hello")?;
    said(one.write_all(b"hello"))?;
    let mut other = other;
    said(other.read_exact(&mut text))
}

/// Handles on processes and files of `/proc` that are on their way, among bytes and messages; some are held by nobody else.
fn handles_on_their_way() -> Checked {
    use std::os::unix::net::{UnixDatagram, UnixStream};
    let child = fork(|| {
        await_go();
        Ok(())
    })?;
    let handle = |pid: i32| {
        let number = call("pidfd_open", libc::SYS_pidfd_open, [pid as u64, 0])?;
        Ok::<_, String>(unsafe { OwnedFd::from_raw_fd(number as i32) })
    };
    let (mut near, mut far) = said(UnixStream::pair())?;
    let (from, to) = said(UnixDatagram::pair())?;
    said(near.write_all(b"before"))?;
    let itself = handle(child)?;
    for through in [near.as_raw_fd(), from.as_raw_fd()] {
        send_file(&through, itself.as_raw_fd())?;
        let status = said(std::fs::File::open(format!("/proc/{child}/status")))?;
        send_file(&through, status.as_raw_fd())?;
    }
    drop(itself);
    said(near.write_all(b"after"))?;
    said(from.send(b"after"))?;
    hold()?;
    let mut text = [0; 6];
    said(far.read_exact(&mut text))?;
    equal("what came before", &text, b"before")?;
    for through in [far.as_raw_fd(), to.as_raw_fd()] {
        let handle = receive_file(&through)?;
        let alive = [handle.as_raw_fd() as u64, 0, 0, 0];
        call("a signal to the child", libc::SYS_pidfd_send_signal, alive)?;
        let mut status = String::new();
        said(std::fs::File::from(receive_file(&through)?).read_to_string(&mut status))?;
        check(status.contains(&format!("\nPid:\t{child}\n")), status)?;
    }
    let mut text = [0; 5];
    said(far.read_exact(&mut text))?;
    equal("what came after", &text, b"after")?;
    equal("the message after", said(to.recv(&mut text))?, 5)?;
    reap(child)
}

/// Who is at the other end of a pair, and who listens: this process and one that has ended.
fn unix_credentials() -> Checked {
    use std::os::unix::net::{UnixListener, UnixStream};
    let who = |socket: i32| {
        let (mut known, mut length) = ([0i32; 3], 12u32);
        let at = known.as_mut_ptr().cast();
        let asked = unsafe { libc::getsockopt(socket, libc::SOL_SOCKET, libc::SO_PEERCRED, at, &raw mut length) };
        done("who is there", asked).map(|_| known)
    };
    let (one, other) = said(UnixStream::pair())?;
    let listener = said(UnixListener::bind("/tmp/listening"))?;
    let child = fork(|| {
        let mut client = said(UnixStream::connect("/tmp/listening"))?;
        said(client.write_all(b"gone"))
    })?;
    let (accepted, _) = said(listener.accept())?;
    reap(child)?;
    let all = [one.as_raw_fd(), other.as_raw_fd(), accepted.as_raw_fd()];
    let ask = || all.iter().map(|socket| who(*socket)).collect::<Result<Vec<_>, _>>();
    let before = ask()?;
    equal("who has ended", before[2][0], child)?;
    hold()?;
    equal("who is there", ask()?, before)
}

/// Sockets of datagrams that are shut down: one to read from, one wholly.
fn datagrams_shut() -> Checked {
    let target = said(UdpSocket::bind("127.0.0.1:0"))?;
    let mut shut = Vec::new();
    for how in [libc::SHUT_RD, libc::SHUT_RDWR] {
        let socket = said(UdpSocket::bind("127.0.0.1:0"))?;
        said(socket.connect(said(target.local_addr())?))?;
        done("shutdown", unsafe { libc::shutdown(socket.as_raw_fd(), how) })?;
        shut.push(socket);
    }
    hold()?;
    for (socket, sends) in shut.iter().zip([true, false]) {
        equal("what there is to read", said(socket.recv(&mut [0; 8]))?, 0)?;
        equal("whether it sends", socket.send(b"hello").is_ok(), sends)?;
    }
    Ok(())
}

/// Sockets that are bound to an address, and get a port when they connect.
fn address_without_port() -> Checked {
    let mut bound = Vec::new();
    for kind in [libc::SOCK_STREAM, libc::SOCK_DGRAM] {
        let socket = socket(libc::AF_INET, kind, 0)?;
        set(&socket, libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT, &1i32)?;
        bind(&socket, [127, 7, 7, 7], 0)?;
        bound.push(socket);
    }
    let listener = said(TcpListener::bind("127.0.0.1:0"))?;
    hold()?;
    let (stream, datagrams) = (&bound[0], &bound[1]);
    let address = said(UdpSocket::from(said(datagrams.try_clone())?).local_addr())?;
    equal("the address of datagrams", address.to_string(), "127.7.7.7:0".into())?;
    let mut to: libc::sockaddr_in = unsafe { std::mem::zeroed() };
    to.sin_family = libc::AF_INET as u16;
    to.sin_port = said(listener.local_addr())?.port().to_be();
    to.sin_addr.s_addr = u32::from_ne_bytes([127, 0, 0, 1]);
    let length = size_of::<libc::sockaddr_in>() as u32;
    done("connect", unsafe { libc::connect(stream.as_raw_fd(), (&raw const to).cast(), length) })?;
    equal("where it comes from", said(listener.accept())?.1.ip().to_string(), "127.7.7.7".into())
}

/// Connections that are to tell of the headers of what comes to them.
fn stream_headers() -> Checked {
    const OPTIONS: [(i32, i32); 6] = [
        (libc::IPPROTO_IP, libc::IP_PKTINFO),
        (libc::IPPROTO_IP, libc::IP_RECVTOS),
        (libc::IPPROTO_IP, libc::IP_RECVTTL),
        (libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO),
        (libc::IPPROTO_IPV6, libc::IPV6_RECVHOPLIMIT),
        (libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS),
    ];
    let listener = said(TcpListener::bind("[::1]:0"))?;
    let client = said(TcpStream::connect(said(listener.local_addr())?))?;
    let (server, _) = said(listener.accept())?;
    let all = [listener.as_raw_fd(), client.as_raw_fd(), server.as_raw_fd()];
    for (level, name) in OPTIONS {
        all.iter().try_for_each(|socket| set(socket, level, name, &1i32))?;
    }
    hold()?;
    for (level, name) in OPTIONS {
        for socket in &all {
            equal(&format!("option {level}/{name}"), get(socket, level, name)?, 1)?;
        }
    }
    Ok(())
}

/// Names that are relative, removed, replaced.
fn unix_names() -> Checked {
    use std::os::unix::net::{UnixListener, UnixStream};
    said(std::fs::create_dir_all("/tmp/far/away"))?;
    said(std::env::set_current_dir("/tmp/far"))?;
    let relative = said(UnixListener::bind("away/relative"))?;
    said(std::env::set_current_dir("/tmp"))?;
    let removed = said(UnixListener::bind("/tmp/removed"))?;
    let mut to_removed = said(UnixStream::connect("/tmp/removed"))?;
    let (mut of_removed, _) = said(removed.accept())?;
    said(std::fs::remove_file("/tmp/removed"))?;
    let replaced = said(UnixListener::bind("/tmp/replaced"))?;
    said(std::fs::remove_file("/tmp/replaced"))?;
    let replacing = said(UnixListener::bind("/tmp/replaced"))?;
    let moved = said(UnixListener::bind("/tmp/moved"))?;
    said(std::fs::rename("/tmp/moved", "/tmp/elsewhere"))?;
    let linked = said(UnixListener::bind("/tmp/first"))?;
    said(std::fs::hard_link("/tmp/first", "/tmp/second"))?;
    said(std::fs::remove_file("/tmp/first"))?;
    let names = || {
        let all =
            [&relative, &removed, &replaced, &replacing, &moved, &linked].map(|l| format!("{:?}", l.local_addr()));
        (all, format!("{:?}", to_removed.peer_addr()))
    };
    let before = names();
    hold()?;
    equal("names", names(), before)?;
    for (path, listener) in [
        ("/tmp/far/away/relative", &relative),
        ("/tmp/replaced", &replacing),
        ("/tmp/elsewhere", &moved),
        ("/tmp/second", &linked),
    ] {
        let connected = UnixStream::connect(path).map_err(|e| format!("{path}: {e}"))?;
        said(listener.set_nonblocking(true))?;
        listener.accept().map_err(|e| format!("{path}: {e}"))?;
        drop(connected);
    }
    check(UnixStream::connect("/tmp/removed").is_err(), "a removed name is there")?;
    said(of_removed.write_all(b"hello"))?;
    let mut text = [0; 5];
    said(to_removed.read_exact(&mut text))
}

/// Files of sockets with several names, in the same directory and in others, also without the one that was bound to.
fn unix_links() -> Checked {
    use std::os::unix::fs::MetadataExt;
    use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
    said(std::fs::create_dir_all("/tmp/links/deep/er"))?;
    said(std::fs::create_dir_all("/dev/shm/links"))?;
    let all = said(UnixListener::bind("/tmp/links/a"))?;
    let elsewhere = said(UnixListener::bind("/tmp/links/gone"))?;
    let moved = said(UnixListener::bind("/tmp/links/moved"))?;
    let memory = said(UnixListener::bind("/dev/shm/links/a"))?;
    let letters = said(UnixDatagram::bind("/tmp/links/letters"))?;
    for (from, to) in [
        ("/tmp/links/a", "/tmp/links/b"),
        ("/tmp/links/a", "/tmp/links/deep/er/c"),
        ("/tmp/links/gone", "/tmp/links/deep/d"),
        ("/tmp/links/gone", "/tmp/links/deep/er/e"),
        ("/tmp/links/moved", "/tmp/links/deep/f"),
        ("/dev/shm/links/a", "/dev/shm/b"),
        ("/tmp/links/letters", "/tmp/links/deep/g"),
    ] {
        said(std::fs::hard_link(from, to))?;
    }
    said(std::fs::remove_file("/tmp/links/gone"))?;
    said(std::fs::rename("/tmp/links/moved", "/tmp/links/renamed"))?;
    let groups: [(&UnixListener, &[&str]); 4] = [
        (&all, &["/tmp/links/a", "/tmp/links/b", "/tmp/links/deep/er/c"]),
        (&elsewhere, &["/tmp/links/deep/d", "/tmp/links/deep/er/e"]),
        (&moved, &["/tmp/links/renamed", "/tmp/links/deep/f"]),
        (&memory, &["/dev/shm/links/a", "/dev/shm/b"]),
    ];
    let names = || groups.map(|(listener, _)| format!("{:?}", listener.local_addr()));
    let before = names();
    hold()?;
    equal("names", names(), before)?;
    for (listener, paths) in groups {
        for path in paths {
            let connected = UnixStream::connect(path).map_err(|e| format!("{path}: {e}"))?;
            said(listener.set_nonblocking(true))?;
            listener.accept().map_err(|e| format!("{path}: {e}"))?;
            drop(connected);
            equal(path, said(std::fs::metadata(path))?.nlink(), paths.len() as u64)?;
        }
    }
    let sender = said(UnixDatagram::unbound())?;
    said(sender.send_to(b"a letter", "/tmp/links/deep/g"))?;
    let mut text = [0; 16];
    let length = said(letters.recv(&mut text))?;
    equal("what was sent to another name", &text[..length], b"a letter")
}

/// Empty datagrams among others, that were looked at and not read; some look like the end of a connection.
fn datagrams_empty() -> Checked {
    let sent: [&[u8]; 6] = [b"", b"a", b"", b"", b"b", b""];
    let told = said(UdpSocket::bind("127.0.0.1:0"))?;
    let teller = said(UdpSocket::bind("127.0.0.1:0"))?;
    let mut pairs = Vec::new();
    for kind in [libc::SOCK_DGRAM, libc::SOCK_SEQPACKET] {
        let mut ends = [0; 2];
        done("socketpair", unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, ends.as_mut_ptr()) })?;
        pairs.push(ends.map(|end| unsafe { OwnedFd::from_raw_fd(end) }));
    }
    let seen = said(std::os::unix::net::UnixDatagram::bind("/tmp/seen"))?;
    let sender = said(std::os::unix::net::UnixDatagram::bind("/tmp/sender"))?;
    set(&seen, libc::SOL_SOCKET, libc::SO_PASSCRED, &1i32)?;
    for piece in sent {
        said(teller.send_to(piece, said(told.local_addr())?))?;
        said(sender.send_to(piece, "/tmp/seen"))?;
        for [from, _] in &pairs {
            let sent = unsafe { libc::send(from.as_raw_fd(), piece.as_ptr().cast(), piece.len(), 0) };
            equal("sent", sent, piece.len() as isize)?;
        }
    }
    let receivers = [told.as_raw_fd(), seen.as_raw_fd(), pairs[0][1].as_raw_fd(), pairs[1][1].as_raw_fd()];
    for receiver in receivers {
        for _ in 0..2 {
            let peeked = unsafe { libc::recv(receiver, std::ptr::null_mut(), 0, libc::MSG_PEEK) };
            done("recv", peeked as i64)?;
        }
    }
    // The end of its stream, to which all leads.
    let [from, _] = &pairs[1];
    done("shutdown", unsafe { libc::shutdown(from.as_raw_fd(), libc::SHUT_WR) })?;
    hold()?;
    let mut text = [0; 8];
    for receiver in receivers {
        for (place, piece) in sent.iter().enumerate() {
            let length = done(&format!("reading {place} of {receiver}"), unsafe {
                libc::recv(receiver, text.as_mut_ptr().cast(), 8, libc::MSG_DONTWAIT) as i64
            })?;
            equal(&format!("datagram {place} of {receiver}"), &text[..length as usize], piece)?;
        }
    }
    Ok(())
}
