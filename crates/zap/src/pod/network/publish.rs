//! Ports of the host that lead into a pod.
//!
//! The connection is sent on by the packet filter; the port itself is held by a socket that nobody answers, so that the
//! kernel tells who else has it, and keeps others from taking it.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::OwnedFd;

use super::filter::{Base, Family, Hook, Rule, Ruleset, delete_table};
use super::lease::ipv6_of;
use super::{NetworkError, kernel};
use crate::pod::host_config::HostConfig;
use crate::pod::{AddressPlan, Publish};

/// Connections of the host to itself, which has to appear to the pod under another address than 127.0.0.1.
const LOOPBACK4: [u8; 1] = [127];

/// A port that is held, by a socket.
#[derive(Debug)]
pub(super) struct Held(#[expect(dead_code, reason = "held, not used")] OwnedFd);

/// Takes the ports, or says which one is taken.
pub(super) fn hold(ports: &[Publish]) -> Result<Vec<Held>, NetworkError> {
    ports.iter().map(hold_one).collect()
}

fn hold_one(port: &Publish) -> Result<Held, NetworkError> {
    if port.address == Some(Ipv6Addr::LOCALHOST.into()) {
        return Err(NetworkError::Usage(format!("{}: no port of ::1 can lead into a pod; use 127.0.0.1", name(port))));
    }
    let bind = |address: IpAddr| -> io::Result<Held> {
        let at = SocketAddr::new(address, port.host_port);
        let socket = if port.udp { UdpSocket::bind(at)?.into() } else { TcpListener::bind(at)?.into() };
        Ok(Held(socket))
    };
    let bound = match port.address {
        Some(address) => bind(address),
        // Both families at once; without IPv6, what there is.
        None => match bind(Ipv6Addr::UNSPECIFIED.into()) {
            Err(e) if e.kind() != io::ErrorKind::AddrInUse => bind(Ipv4Addr::UNSPECIFIED.into()),
            other => other,
        },
    };
    bound.map_err(|e| match e.kind() {
        io::ErrorKind::AddrInUse => NetworkError::Taken(format!("the host's {}", name(port))),
        io::ErrorKind::AddrNotAvailable => NetworkError::Usage(format!("{}: no such address here", name(port))),
        _ => kernel("taking", &format!("the host's {}", name(port)))(e),
    })
}

fn name(port: &Publish) -> String {
    let protocol = if port.udp { "UDP" } else { "TCP" };
    match port.address {
        Some(address) => format!("{protocol} port {} of {address}", port.host_port),
        None => format!("{protocol} port {}", port.host_port),
    }
}

/// Sends what comes for the ports to the pod at `outer`, whose link is `link`.
pub(super) fn install(
    config: &HostConfig,
    link: &str,
    outer: &AddressPlan,
    ports: &[Publish],
) -> Result<(), NetworkError> {
    remove(link)?;
    let mut rules = Ruleset::new(Family::Inet, link);
    rules.chain("in", "nat", Hook::Prerouting, -100, None);
    rules.chain("own", "nat", Hook::Output, -100, None);
    rules.chain("out", "nat", Hook::Postrouting, 100, None);
    let outers = [IpAddr::from(outer.ipv4), IpAddr::from(outer.ipv6)];
    for port in ports {
        rules.rule("own", from_loopback6(port));
        for to in outers.into_iter().filter(|to| port.address.is_none_or(|a| a.is_ipv4() == to.is_ipv4())) {
            for chain in ["in", "own"] {
                rules.rule(chain, for_port(port, to).redirect(to, port.pod_port));
            }
        }
    }
    let gateway = config.address.address;
    for (to, gateway) in outers.into_iter().zip([IpAddr::from(gateway), ipv6_of(gateway).into()]) {
        // From the host itself, and from pods that go the long way round: the answer has to come back by the host. Not by what
        // the kernel calls masquerading: it forgets such connections when the bridge goes, and a pod's go on after a restart.
        if to.is_ipv4() {
            rules.rule("out", sent_to(to, config).has(Base::Network, 12, &LOOPBACK4).come_from(gateway));
        }
        rules.rule("out", sent_to(to, config).in_by(&config.bridge).come_from(gateway));
    }
    rules.make()
}

/// Removes the rules for the pod at `link`, if there are any.
pub(super) fn remove(link: &str) -> Result<(), NetworkError> {
    delete_table(Family::Inet, link)
}

fn protocol(port: &Publish) -> i32 {
    if port.udp { libc::IPPROTO_UDP } else { libc::IPPROTO_TCP }
}

/// Connections to `[::1]` are refused, so that clients of `localhost` go on to 127.0.0.1: the kernel delivers nothing to
/// ::1 that came in by another device (IPv6 has no `route_localnet`), so an answer of the pod's could never arrive.
fn from_loopback6(port: &Publish) -> Rule {
    let localhost = Ipv6Addr::LOCALHOST;
    let to = Rule::default().family_of(localhost.into()).has(Base::Network, 24, &localhost.octets());
    to.transport(protocol(port)).has(Base::Transport, 2, &port.host_port.to_be_bytes()).refuse(protocol(port))
}

/// What is for a published port, and of the family of `to`.
fn for_port(port: &Publish, to: IpAddr) -> Rule {
    let family = Rule::default().family_of(to);
    let here = match port.address {
        Some(IpAddr::V4(v4)) if !v4.is_unspecified() => family.has(Base::Network, 16, &v4.octets()),
        Some(IpAddr::V6(v6)) if !v6.is_unspecified() => family.has(Base::Network, 24, &v6.octets()),
        _ => family.for_this_host(),
    };
    here.transport(protocol(port)).has(Base::Transport, 2, &port.host_port.to_be_bytes())
}

fn sent_to(to: IpAddr, config: &HostConfig) -> Rule {
    let family = Rule::default().family_of(to);
    let destined = match to {
        IpAddr::V4(v4) => family.has(Base::Network, 16, &v4.octets()),
        IpAddr::V6(v6) => family.has(Base::Network, 24, &v6.octets()),
    };
    destined.out_by(&config.bridge)
}

/// Whether one of the ports is open to the host's loopback address: then packets from it have to be allowed on the bridge.
pub(super) fn needs_loopback(ports: &[Publish]) -> bool {
    ports.iter().any(|p| p.address.is_none_or(|a| a.is_loopback() || a.is_unspecified()))
}
