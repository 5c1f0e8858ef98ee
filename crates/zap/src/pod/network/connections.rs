//! Which connections there are: those of sockets, and those that the packet filter follows because it translates them.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use super::filter::{Base, Family, Rule, Ruleset, add_keys};
use super::netlink::{Channel, attribute, attributes};
use super::{NetworkError, kernel};

/// Where the ports are, in the header of either protocol.
pub(super) const FROM_PORT: (Base, u32) = (Base::Transport, 0);
pub(super) const TO_PORT: (Base, u32) = (Base::Transport, 2);
/// The protocols that have ports.
pub(super) const PORTS: [i32; 2] = [libc::IPPROTO_TCP, libc::IPPROTO_UDP];

/// A connection, as one of its ends has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Connection {
    tcp: bool,
    own_port: u16,
    pub(super) address: IpAddr,
    pub(super) port: u16,
}

/// What tells connections with one address apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct Ports {
    tcp: bool,
    ipv6: bool,
    own: u16,
    other: u16,
}

impl Connection {
    /// The same with somebody at another address.
    pub(super) fn with(self, address: IpAddr) -> Connection {
        Connection { address, ..self }
    }

    pub(super) fn ports(&self) -> Ports {
        Ports { tcp: self.tcp, ipv6: self.address.is_ipv6(), own: self.own_port, other: self.port }
    }
}

/// Those of sockets in the network namespace that this thread is in.
pub(super) fn of_sockets() -> Vec<Connection> {
    let read = |name: &str| fs::read_to_string(format!("/proc/thread-self/net/{name}"));
    let mut all = Vec::new();
    for name in ["tcp", "udp", "tcp6", "udp6"] {
        // Without IPv6 there are none of its.
        let text = read(name).unwrap_or_default();
        all.extend(text.lines().filter_map(|line| connection(name.starts_with("tcp"), line)));
    }
    all
}

/// From a line of `/proc/net/tcp` or its like, if it has another end that may still say something.
fn connection(tcp: bool, line: &str) -> Option<Connection> {
    const WAITS_FOR_LATE_PACKETS: &str = "06";
    let mut fields = line.split_ascii_whitespace().skip(1);
    let [own, other, state] = [fields.next()?, fields.next()?, fields.next()?];
    let ((_, own_port), (address, port)) = (end(own)?, end(other)?);
    let is_another = port != 0 && !address.is_loopback() && !address.is_unspecified();
    let lives = !(tcp && state == WAITS_FOR_LATE_PACKETS);
    (is_another && lives).then_some(Connection { tcp, own_port, address, port })
}

fn end(text: &str) -> Option<(IpAddr, u16)> {
    let (address, port) = text.split_once(':')?;
    // Words of four bytes, each as a number of this machine's.
    let words = address.as_bytes().chunks(8).map(|word| u32::from_str_radix(std::str::from_utf8(word).ok()?, 16).ok());
    let octets: Vec<u8> = words.collect::<Option<Vec<u32>>>()?.into_iter().flat_map(u32::to_ne_bytes).collect();
    let address = match octets.len() {
        4 => IpAddr::from(<[u8; 4]>::try_from(octets).ok()?),
        _ => Ipv6Addr::from(<[u8; 16]>::try_from(octets).ok()?).to_canonical(),
    };
    Some((address, u16::from_str_radix(port, 16).ok()?))
}

/// Those that this host translates, as they look outside of it: the pods' that go out under its own address.
pub(super) fn translated() -> Result<Vec<Connection>, NetworkError> {
    const GET: u16 = (libc::NFNL_SUBSYS_CTNETLINK as u16) << 8 | 1;
    let filter = Channel::filter().map_err(kernel("opening", "the packet filter"))?;
    let shown = match filter.ask(GET, libc::NLM_F_DUMP, &[0; 4]) {
        // It follows none.
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => return Ok(Vec::new()),
        shown => shown.map_err(kernel("listing", "connections that are translated"))?,
    };
    Ok(shown.iter().filter_map(|body| both_ends(body.get(4..)?)).flatten().collect())
}

/// `CTA_…`.
mod kind {
    pub(super) const ORIGINAL: u16 = 1;
    pub(super) const REPLY: u16 = 2;
    pub(super) const STATUS: u16 = 3;
    pub(super) const PROTOCOL: u16 = 4;
    pub(super) const ADDRESSES: u16 = 1;
    pub(super) const PORTS: u16 = 2;
    pub(super) const NUMBER: u16 = 1;
    pub(super) const SOURCE_PORT: u16 = 2;
    pub(super) const DESTINATION_PORT: u16 = 3;
    pub(super) const TCP: u16 = 1;
    pub(super) const STATE: u16 = 1;
}

/// A connection that is translated, as each of its ends looks from the other.
fn both_ends(shown: &[u8]) -> Option<[Connection; 2]> {
    const TRANSLATED: u32 = 0x10 | 0x20;
    const LAST_ACK: u8 = 6;
    let status = u32::from_be_bytes(attribute(shown, kind::STATUS)?.try_into().ok()?);
    let tcp =
        attribute(shown, kind::PROTOCOL).and_then(|protocol| attribute(attribute(protocol, kind::TCP)?, kind::STATE));
    let is_over = tcp.and_then(|state| state.first()).is_some_and(|state| *state >= LAST_ACK);
    if status & TRANSLATED == 0 || is_over {
        return None;
    }
    Some([sent(attribute(shown, kind::REPLY)?)?, sent(attribute(shown, kind::ORIGINAL)?)?])
}

/// The connection of whoever gets what is sent in one direction.
fn sent(direction: &[u8]) -> Option<Connection> {
    let ports = attribute(direction, kind::PORTS)?;
    let port = |wanted| Some(u16::from_be_bytes(attribute(ports, wanted)?.try_into().ok()?));
    let (_, from) = attributes(attribute(direction, kind::ADDRESSES)?).next()?;
    let address = match from.len() {
        4 => IpAddr::from(<[u8; 4]>::try_from(from).ok()?),
        _ => IpAddr::from(<[u8; 16]>::try_from(from).ok()?),
    };
    let protocol = i32::from(*attribute(ports, kind::NUMBER)?.first()?);
    let (own_port, port) = (port(kind::DESTINATION_PORT)?, port(kind::SOURCE_PORT)?);
    PORTS.contains(&protocol).then_some(Connection { tcp: protocol == libc::IPPROTO_TCP, own_port, address, port })
}

/// The four sets in which a table has pairs of ports: by family and protocol, with a name of their own.
pub(super) fn sets(of: &str) -> [(IpAddr, i32, String); 4] {
    let [v4, v6] = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
    let [tcp, udp] = PORTS;
    [(v4, tcp, "tcp4"), (v4, udp, "udp4"), (v6, tcp, "tcp6"), (v6, udp, "udp6")]
        .map(|(family, protocol, name)| (family, protocol, format!("{name}{of}")))
}

/// Makes them.
pub(super) fn make_sets(rules: &mut Ruleset, of: &str) {
    for (_, _, name) in sets(of) {
        rules.set_of_ports(&name);
    }
}

/// Fills them.
pub(super) fn fill_sets(
    (family, table): (Family, &str),
    of: &str,
    all: impl Iterator<Item = Ports>,
) -> Result<(), NetworkError> {
    let all: BTreeSet<Ports> = all.collect();
    for (address, protocol, name) in sets(of) {
        let its = |p: &&Ports| p.ipv6 == address.is_ipv6() && p.tcp == (protocol == libc::IPPROTO_TCP);
        let keys: Vec<_> = all.iter().filter(its).map(Ports::key).collect();
        add_keys(family, table, &name, &keys)?;
    }
    Ok(())
}

impl Ports {
    /// The two in parts of four bytes.
    fn key(&self) -> Vec<u8> {
        [self.own, self.other].into_iter().flat_map(|port| [port.to_be_bytes(), [0; 2]].concat()).collect()
    }
}

/// If the ports that are there, the one of the end that knows of the connection first, are in a set.
pub(super) fn found(rule: Rule, set: &str, own: (Base, u32), other: (Base, u32)) -> Rule {
    rule.found_in(set, (own.0, own.1, 2), Some(other))
}

/// Adds those to a set for so long.
pub(super) fn remember(rule: Rule, set: &str, own: (Base, u32), other: (Base, u32), for_ms: u64) -> Rule {
    rule.remember(set, (own.0, own.1, 2), Some(other), for_ms)
}

/// What the kernel said of a namespace that has gone meanwhile: there are none in it.
pub(super) fn none_if_gone(found: io::Result<Vec<Connection>>) -> Result<Vec<Connection>, NetworkError> {
    match found {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        found => found.map_err(kernel("looking for connections of", "a pod")),
    }
}

/// Reads some bytes as a connection that is translated.
pub(super) fn try_answer(bytes: &[u8]) {
    let _ = both_ends(bytes);
}

/// Reads a text as a table of sockets.
pub(super) fn try_table(text: &str) {
    let _ = text.lines().filter_map(|line| connection(true, line)).count();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn remote(line: &str) -> Option<(IpAddr, u16)> {
        connection(true, line).map(|connection| (connection.address, connection.port))
    }

    #[test]
    fn a_connected_socket_has_a_remote_end() {
        let line = "   1: 020012C6:0050 0200020A:A5D2 01 00000000:00000000 00:00000000 00000000     0        0 1";
        assert_eq!(remote(line), Some(([10, 2, 0, 2].into(), 0xa5d2)));
        let ports = connection(true, line).unwrap().ports();
        assert_eq!((ports.key(), ports.ipv6), (vec![0, 80, 0, 0, 0xa5, 0xd2, 0, 0], false));
        let mapped = "1: 0000000000000000FFFF0000020012C6:0050 0000000000000000FFFF00000200020A:A5D2 01 0:0";
        assert_eq!(remote(mapped), Some(([10, 2, 0, 2].into(), 0xa5d2)));
        let listens = "   0: 00000000:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000";
        assert_eq!((remote(listens), remote("  sl  local_address rem_address   st")), (None, None));
        assert_eq!(remote(&line.replace(" 01 ", " 06 ")), None);
    }

    #[test]
    fn a_translated_connection_is_known_by_its_outer_ports() {
        let attribute = |kind: u16, value: &[u8]| {
            let mut put = super::super::netlink::Attributes::default();
            put.put(kind, value);
            put.bytes().to_vec()
        };
        let direction = |from: [u8; 4], to: [u8; 4], [from_port, to_port]: [u16; 2]| {
            let addresses = [attribute(1, &from), attribute(2, &to)].concat();
            let ports = [
                attribute(1, &[libc::IPPROTO_TCP as u8]),
                attribute(2, &from_port.to_be_bytes()),
                attribute(3, &to_port.to_be_bytes()),
            ];
            [attribute(1, &addresses), attribute(2, &ports.concat())].concat()
        };
        let original = attribute(1, &direction([198, 20, 0, 2], [198, 18, 0, 2], [5000, 80]));
        let reply = attribute(2, &direction([198, 18, 0, 2], [10, 0, 2, 1], [80, 6000]));
        let shown = |status: u32| [original.clone(), reply.clone(), attribute(3, &status.to_be_bytes())].concat();
        let [outside, _] = both_ends(&shown(0x10)).unwrap();
        let expected = Connection { tcp: true, own_port: 6000, address: [198, 18, 0, 2].into(), port: 80 };
        assert_eq!(outside, expected);
        assert_eq!(both_ends(&shown(0)), None);
    }
}
