//! Internet addresses, as the kernel writes them and as people do.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};

/// The `sockaddr` of an address, for a socket of the given family: an IPv4 address on an IPv6 socket becomes a mapped one.
pub(super) fn to_kernel(address: SocketAddr, family: i32) -> Vec<u8> {
    match address {
        SocketAddr::V4(v4) if family == libc::AF_INET => {
            let mut bytes = (libc::AF_INET as u16).to_ne_bytes().to_vec();
            bytes.extend(v4.port().to_be_bytes());
            bytes.extend(v4.ip().octets());
            bytes.extend([0; 8]);
            bytes
        }
        SocketAddr::V4(v4) => to_kernel(SocketAddrV6::new(v4.ip().to_ipv6_mapped(), v4.port(), 0, 0).into(), family),
        SocketAddr::V6(v6) => {
            let mut bytes = (libc::AF_INET6 as u16).to_ne_bytes().to_vec();
            bytes.extend(v6.port().to_be_bytes());
            bytes.extend(v6.flowinfo().to_ne_bytes());
            bytes.extend(v6.ip().octets());
            bytes.extend(v6.scope_id().to_ne_bytes());
            bytes
        }
    }
}

/// The address in a `sockaddr`; `None` if it is not one of the internet families.
pub(super) fn from_kernel(bytes: &[u8]) -> Option<SocketAddr> {
    let (family, rest) = bytes.split_first_chunk::<2>()?;
    let (port, rest) = rest.split_first_chunk::<2>()?;
    let port = u16::from_be_bytes(*port);
    match i32::from(u16::from_ne_bytes(*family)) {
        libc::AF_INET => {
            let (ip, _) = rest.split_first_chunk::<4>()?;
            Some(SocketAddrV4::new(Ipv4Addr::from(*ip), port).into())
        }
        libc::AF_INET6 => {
            let (flow, rest) = rest.split_first_chunk::<4>()?;
            let (ip, rest) = rest.split_first_chunk::<16>()?;
            let (scope, _) = rest.split_first_chunk::<4>()?;
            let (flow, scope) = (u32::from_ne_bytes(*flow), u32::from_ne_bytes(*scope));
            Some(SocketAddrV6::new(Ipv6Addr::from(*ip), port, flow, scope).into())
        }
        _ => None,
    }
}

/// An address as `/proc/net/tcp` writes it: words of the address as numbers of this machine's, a colon, the port.
pub(super) fn from_proc(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |at: usize| u32::from_str_radix(address.get(at..at + 8)?, 16).ok().map(u32::to_ne_bytes);
    if address.len() == 8 {
        return Some(SocketAddrV4::new(word(0)?.into(), port).into());
    }
    let words = [word(0)?, word(8)?, word(16)?, word(24)?];
    let ip: [u8; 16] = words.concat().try_into().ok()?;
    Some(SocketAddrV6::new(ip.into(), port, 0, 0).into())
}

/// The IP addresses as they are on the wire: a mapped IPv6 address is IPv4 there.
pub(super) fn on_the_wire(address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V6(v6) => match v6.to_ipv4_mapped() {
            Some(v4) => SocketAddr::new(v4.into(), address.port()),
            None => address,
        },
        IpAddr::V4(_) => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_come_back_from_the_kernels_form() {
        for (text, family) in [("10.1.2.3:80", libc::AF_INET), ("[fd5a::7]:443", libc::AF_INET6)] {
            let address: SocketAddr = text.parse().unwrap();
            assert_eq!(from_kernel(&to_kernel(address, family)), Some(address));
        }
        assert_eq!(from_kernel(&[1, 0, 47]), None);
    }

    #[test]
    fn an_ipv4_address_on_an_ipv6_socket_is_mapped() {
        let bytes = to_kernel("10.1.2.3:80".parse().unwrap(), libc::AF_INET6);
        let mapped = from_kernel(&bytes).unwrap();
        assert_eq!(mapped.to_string(), "[::ffff:10.1.2.3]:80");
        assert_eq!(on_the_wire(mapped).to_string(), "10.1.2.3:80");
    }

    #[test]
    fn what_proc_says() {
        assert_eq!(from_proc("0100007F:1F90"), Some("127.0.0.1:8080".parse().unwrap()));
        let loopback = "00000000000000000000000001000000:0050";
        assert_eq!(from_proc(loopback), Some("[::1]:80".parse().unwrap()));
        assert_eq!(from_proc("0100:1F90"), None);
    }
}
