//! Packets of our own making, delivered to a socket of this network namespace over loopback, as if a peer had sent them.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;

use super::address::{on_the_wire, to_kernel};
use crate::pod::network::links;
use crate::sys::socket;

/// Delivers `payload` (a transport header and what follows; its checksum, at `checksum_at`, is filled in) `from` an
/// address that need not be here `to` one that is. A non-zero `mark` goes with it, for filters to see.
pub(super) fn deliver(
    from: SocketAddr,
    to: SocketAddr,
    protocol: i32,
    checksum_at: usize,
    mut payload: Vec<u8>,
    mark: u32,
) -> io::Result<()> {
    let (from, to) = (on_the_wire(from), on_the_wire(to));
    let length = payload.len() as u16;
    let (family, header, pseudo) = match (from.ip(), to.ip()) {
        (IpAddr::V4(a), IpAddr::V4(b)) => {
            let ends = [a.octets(), b.octets()].concat();
            let pseudo = [&ends[..], &[0, protocol as u8], &length.to_be_bytes()].concat();
            // Version 4, five words, don't fragment, 64 hops; the kernel fills length and checksum in.
            let header = [&[0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, protocol as u8, 0, 0][..], &ends].concat();
            (libc::AF_INET, header, pseudo)
        }
        (IpAddr::V6(a), IpAddr::V6(b)) => {
            let ends = [a.octets(), b.octets()].concat();
            let pseudo = [&ends[..], &[0, 0], &length.to_be_bytes(), &[0, 0, 0, protocol as u8]].concat();
            let header = [&[0x60, 0, 0, 0][..], &length.to_be_bytes(), &[protocol as u8, 64], &ends].concat();
            (libc::AF_INET6, header, pseudo)
        }
        _ => return Err(io::Error::other("the two ends are of different families")),
    };
    // The addresses do not count in ICMP of IPv4.
    let pseudo = if protocol == libc::IPPROTO_ICMP { Vec::new() } else { pseudo };
    payload[checksum_at..checksum_at + 2].fill(0);
    let sum = checksum(&[&pseudo[..], &payload].concat());
    // Zero would mean that there is none (UDP).
    let sum = if sum == 0 { 0xffff } else { sum };
    payload[checksum_at..checksum_at + 2].copy_from_slice(&sum.to_be_bytes());
    let raw = socket::socket(family, libc::SOCK_RAW, libc::IPPROTO_RAW)?;
    if mark != 0 {
        socket::set_int(raw.as_fd(), libc::SOL_SOCKET, libc::SO_MARK, mark as i32)?;
    }
    super::common::make_room(raw.as_fd(), libc::SO_SNDBUFFORCE, payload.len())?;
    // The port of a raw socket's address is a protocol, if anything.
    let to = match to {
        SocketAddr::V4(v4) => to_kernel(SocketAddr::new((*v4.ip()).into(), 0), family),
        SocketAddr::V6(mut v6) => {
            links::await_local(*v6.ip())?;
            v6.set_port(0);
            to_kernel(v6.into(), family)
        }
    };
    socket::send_to(raw.as_fd(), &[header, payload].concat(), 0, &to).map(drop)
}

/// The internet checksum.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|c| u32::from(c[0]) << 8 | u32::from(*c.get(1).unwrap_or(&0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_checksum_is_that_of_rfc_1071() {
        assert_eq!(super::checksum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), !0xddf2);
    }
}
