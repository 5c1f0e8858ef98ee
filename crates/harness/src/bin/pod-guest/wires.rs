//! Sockets that see packets as they are.

use std::net::UdpSocket;
use std::os::fd::{AsRawFd, OwnedFd};

use crate::plumbing::{bind, get, said, set, socket};
use crate::stage::*;

pub(crate) const KINDS: &[crate::stage::Kind] =
    &[("raw-socket", raw_socket), ("packet-socket", packet_socket), ("packet-ring", packet_ring)];

const SOL_RAW: i32 = 255;
const MAGIC: &[u8] = b"the packet that is waited for";

fn patient(file: &OwnedFd) -> Checked {
    set(file, libc::SOL_SOCKET, libc::SO_RCVTIMEO, &libc::timeval { tv_sec: 20, tv_usec: 0 })
}

fn receive(file: &OwnedFd) -> Result<Vec<u8>, String> {
    let mut buffer = vec![0u8; 4096];
    let length = unsafe { libc::recv(file.as_raw_fd(), buffer.as_mut_ptr().cast(), 4096, 0) };
    buffer.truncate(done("recv", length as i64)? as usize);
    Ok(buffer)
}

/// Sockets for echo requests, of both families; one hears nothing but answers.
fn raw_socket() -> Checked {
    let four = socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP)?;
    set(&four, SOL_RAW, 1, &!(1u32 << 0))?;
    set(&four, libc::IPPROTO_IP, libc::IP_TTL, &9i32)?;
    bind(&four, [127, 0, 0, 1], 0)?;
    let six = socket(libc::AF_INET6, libc::SOCK_RAW, libc::IPPROTO_ICMPV6)?;
    let mut only = [!0u32; 8];
    only[129 / 32] &= !(1 << (129 % 32));
    set(&six, libc::IPPROTO_ICMPV6, 1, &only)?;
    let own = socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_RAW)?;
    let header = get(&own, libc::IPPROTO_IP, libc::IP_HDRINCL)?;
    hold()?;
    equal("the filter", get(&four, SOL_RAW, 1)?, !1)?;
    equal("hops", get(&four, libc::IPPROTO_IP, libc::IP_TTL)?, 9)?;
    equal("headers of its own", get(&own, libc::IPPROTO_IP, libc::IP_HDRINCL)?, header)?;
    [&four, &six].into_iter().try_for_each(patient)?;
    // Type 8, its checksum, number 1, first of all.
    let mut request = [8u8, 0, 0xf7, 0xfd, 0, 1, 0, 1];
    let mut to: libc::sockaddr_in = unsafe { std::mem::zeroed() };
    (to.sin_family, to.sin_addr.s_addr) = (libc::AF_INET as u16, u32::from_ne_bytes([127, 0, 0, 1]));
    let at = (&raw const to).cast();
    let sent = unsafe { libc::sendto(four.as_raw_fd(), request.as_ptr().cast(), 8, 0, at, 16) };
    done("sendto", sent as i64)?;
    let answer = receive(&four)?;
    equal("an answer", (answer[20], answer[8], &answer[24..]), (0, 64, &[0, 1, 0, 1][..]))?;
    let mut to: libc::sockaddr_in6 = unsafe { std::mem::zeroed() };
    (to.sin6_family, to.sin6_addr.s6_addr[15]) = (libc::AF_INET6 as u16, 1);
    request[0] = 128;
    let at = (&raw const to).cast();
    let sent = unsafe { libc::sendto(six.as_raw_fd(), request.as_ptr().cast(), 8, 0, at, 28) };
    done("sendto", sent as i64)?;
    equal("an answer", receive(&six)?[0], 129)
}

/// A packet socket at loopback, for everything.
fn at_loopback(prepare: impl FnOnce(&OwnedFd) -> Checked) -> Result<OwnedFd, String> {
    let made = socket(libc::AF_PACKET, libc::SOCK_RAW, 0)?;
    prepare(&made)?;
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    (address.sll_family, address.sll_ifindex) = (libc::AF_PACKET as u16, 1);
    address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
    let length = size_of::<libc::sockaddr_ll>() as u32;
    done("bind", unsafe { libc::bind(made.as_raw_fd(), (&raw const address).cast(), length) })?;
    Ok(made)
}

fn send_magic() -> Checked {
    let (from, to) = (said(UdpSocket::bind("127.0.0.1:0"))?, said(UdpSocket::bind("127.0.0.1:0"))?);
    said(from.send_to(MAGIC, said(to.local_addr())?)).map(drop)
}

fn has_magic(bytes: &[u8]) -> bool {
    bytes.windows(MAGIC.len()).any(|window| window == MAGIC)
}

/// One with options, promiscuous, and one that has a filter and no interface.
fn packet_socket() -> Checked {
    let all = at_loopback(|made| set(made, libc::SOL_PACKET, libc::PACKET_AUXDATA, &1i32))?;
    let request = libc::packet_mreq { mr_ifindex: 1, mr_type: 1, mr_alen: 0, mr_address: [0; 8] };
    set(&all, libc::SOL_PACKET, libc::PACKET_ADD_MEMBERSHIP, &request)?;
    let deaf = socket(libc::AF_PACKET, libc::SOCK_DGRAM, i32::from((libc::ETH_P_IP as u16).to_be()))?;
    let mut nothing = [libc::sock_filter { code: 6, jt: 0, jf: 0, k: 0 }];
    let program = libc::sock_fprog { len: 1, filter: nothing.as_mut_ptr() };
    set(&deaf, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program)?;
    let facts = || -> Result<Vec<String>, String> {
        let table = read("/proc/net/packet")?;
        // Types, protocols, interfaces, whether they run; not numbers and memory.
        let line = |line: &str| line.split_whitespace().skip(2).take(4).collect::<Vec<_>>().join(" ");
        let mut lines: Vec<String> = table.lines().skip(1).map(line).collect();
        lines.sort();
        Ok(lines)
    };
    let before = facts()?;
    hold()?;
    equal("packet sockets", facts()?, before)?;
    equal("the option", get(&all, libc::SOL_PACKET, libc::PACKET_AUXDATA)?, 1)?;
    set(&all, libc::SOL_PACKET, libc::PACKET_DROP_MEMBERSHIP, &request)?;
    patient(&all)?;
    send_magic()?;
    while !has_magic(&receive(&all)?) {}
    let got = unsafe { libc::recv(deaf.as_raw_fd(), [0u8; 8].as_mut_ptr().cast(), 8, libc::MSG_DONTWAIT) };
    equal("what comes through the filter", got, -1)
}

/// One whose packets come through shared memory.
fn packet_ring() -> Checked {
    const BLOCK: usize = 1 << 16;
    const BLOCKS: usize = 8;
    let made = at_loopback(|made| {
        set(made, libc::SOL_PACKET, libc::PACKET_VERSION, &2i32)?;
        // Blocks, frames, a block's time, private room, features.
        let request = [BLOCK as u32, BLOCKS as u32, 2048, (BLOCK / 2048 * BLOCKS) as u32, 20, 0, 0];
        set(made, libc::SOL_PACKET, libc::PACKET_RX_RING, &request)
    })?;
    let (length, protection) = (BLOCK * BLOCKS, libc::PROT_READ | libc::PROT_WRITE);
    let at = unsafe { libc::mmap(std::ptr::null_mut(), length, protection, libc::MAP_SHARED, made.as_raw_fd(), 0) };
    check(at != libc::MAP_FAILED, "mmap")?;
    hold()?;
    send_magic()?;
    until("the packet", || has_magic(unsafe { std::slice::from_raw_parts(at.cast::<u8>(), length) }))
}
