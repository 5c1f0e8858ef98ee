//! The way back from a pod to those who follow it: programs of hosts that it has left, and their pods, are still connected with
//! it, and it with them, at the addresses that they have.
//!
//! What the pod says to the gateway that it was born with is for the host that it is on, unless it belongs to a connection
//! with another host that it was on before. Who is of the network that it was born on, but not of the one that it is on, is
//! reached through the host, which answers when the pod looks for them (`stand_in.rs`). And what it sends out in connections
//! that it came with is not given the host's own address.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use super::NetworkError;
use super::connections::{self, Connection, FROM_PORT, Ports, TO_PORT, found, remember};
use super::filter::{Base, Checksum, Family, Hook, Rule, Ruleset, add_keys, delete_table};
use super::former::{
    self, Connected, DESTINATION4, DESTINATION6, NUMBER4, NUMBER6, REMEMBERED_MS, SOURCE4, SOURCE6, TARGET4, TARGET6,
};
use super::lease::{ipv4_of, ipv6_of};
use super::stand_in::StandIn;
use super::translate::{IPV4, IPV6};
use crate::pod::AddressPlan;
use crate::pod::host_config::HostConfig;

/// The hosts that a pod has been on, as far as it is connected with them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trail {
    hosts: Vec<Host>,
}

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Host {
    /// The address that its bridge has.
    gateway: Ipv4Addr,
    /// The pod's connections with it; all that are no other's, if that is not known yet.
    connections: Option<BTreeSet<Ports>>,
}

/// A trail, at the host where it ends.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct End {
    trail: Trail,
    /// The hardware address of the bridge here.
    gateway_mac: [u8; 6],
}

/// Those of the pod's own network that it is connected with, and that are elsewhere.
const NEAR4: &str = "near4";
const NEAR6: &str = "near6";
/// Those that it is connected with, and their ports.
const KNOWN4: &str = "known4";
const KNOWN6: &str = "known6";
const PIECES_MS: u64 = 5000;

impl Trail {
    /// Goes on from a host whose bridge has this address.
    pub(super) fn and(mut self, gateway: Ipv4Addr) -> Trail {
        self.hosts.retain(|host| host.gateway != gateway);
        self.hosts.push(Host { gateway, connections: None });
        self
    }
}

impl End {
    pub(super) fn new(trail: &Trail, gateway_mac: [u8; 6]) -> End {
        End { trail: trail.clone(), gateway_mac }
    }

    /// The way that the pod has come, as far as it leads to anybody.
    pub(super) fn trail(&self) -> Trail {
        let is_known = |host: &&Host| host.connections.as_ref().is_none_or(|its| !its.is_empty());
        Trail { hosts: self.trail.hosts.iter().filter(is_known).cloned().collect() }
    }

    /// The hosts elsewhere, each with the name of what is its in a table.
    fn elsewhere(&self, here: Ipv4Addr) -> impl Iterator<Item = (&Host, String)> {
        let named = self.trail.hosts.iter().enumerate().map(|(number, host)| (host, format!("-{number}")));
        named.filter(move |(host, _)| host.gateway != here)
    }

    /// What comes before the exchange of addresses, in the chains of what the pod sends and of what it gets.
    pub(super) fn add_to_link(
        &self,
        rules: &mut Ruleset,
        [from_pod, to_pod]: [&str; 2],
        device: u32,
        [inner, outer]: [&AddressPlan; 2],
    ) {
        let host = StandIn { mac: self.gateway_mac, device };
        rules.set(NEAR4, Ipv4Addr::UNSPECIFIED.into());
        rules.set(NEAR6, Ipv6Addr::UNSPECIFIED.into());
        rules.rule(from_pod, host.answer4(|asked| asked.found_in(NEAR4, TARGET4, None)));
        rules.rule(from_pod, host.answer6(|asked| asked.found_in(NEAR6, TARGET6, None)));
        for (far, of) in self.elsewhere(outer.gateway4) {
            connections::make_sets(rules, &of);
            Way::all(far.gateway, inner, outer).iter().for_each(|way| way.add(rules, [from_pod, to_pod], &of));
        }
    }

    /// The connections that the pod has come with: `connections`, as it sees them.
    pub(super) fn know(
        &mut self,
        link: &str,
        connections: &[Connection],
        config: &HostConfig,
        inner: &AddressPlan,
    ) -> Result<(), NetworkError> {
        let gateways: [IpAddr; 2] = [inner.gateway4.into(), inner.gateway6.into()];
        let with_host = connections.iter().filter(|c| gateways.contains(&c.address)).map(Connection::ports);
        let mut rest: BTreeSet<Ports> = with_host.collect();
        for host in &mut self.trail.hosts {
            let its = host.connections.get_or_insert_with(|| rest.clone());
            its.retain(|ports| rest.contains(ports));
            rest.retain(|ports| !its.contains(ports));
        }
        for (far, of) in self.elsewhere(config.address.address) {
            let its = far.connections.iter().flatten().copied();
            connections::fill_sets((Family::Device, link), &of, its)?;
        }
        let near = connections.iter().map(|c| c.address).filter(|address| is_near(*address, inner, config));
        let near: BTreeSet<IpAddr> = near.collect();
        for (set, is_v4) in [(NEAR4, true), (NEAR6, false)] {
            let keys = near.iter().filter(|address| address.is_ipv4() == is_v4).map(|address| former::key(*address, 0));
            add_keys(Family::Device, link, set, &keys.collect::<Vec<_>>())?;
        }
        // What is for a host goes out to the address that it has.
        let outside: Vec<_> = connections.iter().map(|connection| self.outside(*connection, gateways)).collect();
        Connected::of(&outside).remember(&table(link), [KNOWN4, KNOWN6], Family::Inet)
    }
}

impl End {
    /// A connection, as it looks outside of the pod, which knows every host by the gateway that it was born with.
    fn outside(&self, connection: Connection, gateways: [IpAddr; 2]) -> Connection {
        let is_its = |host: &&Host| host.connections.iter().flatten().any(|ports| *ports == connection.ports());
        match self.trail.hosts.iter().find(is_its).filter(|_| gateways.contains(&connection.address)) {
            Some(host) if connection.address.is_ipv4() => connection.with(host.gateway.into()),
            Some(host) => connection.with(ipv6_of(host.gateway).into()),
            None => connection,
        }
    }
}

/// Whether the pod takes somebody for a neighbour who is none here.
fn is_near(address: IpAddr, inner: &AddressPlan, config: &HostConfig) -> bool {
    let same = |a: u128, b: u128, bits: u32| (a ^ b).checked_shr(bits).unwrap_or(0) == 0;
    match address {
        IpAddr::V4(v4) => {
            let others = 32 - u32::from(inner.prefix4.min(32));
            let is_own = v4 == inner.ipv4 || v4 == inner.gateway4;
            let on_network = same(v4.to_bits().into(), inner.ipv4.to_bits().into(), others);
            on_network && !is_own && !config.address.contains(v4)
        }
        IpAddr::V6(v6) => {
            let others = 128 - u32::from(inner.prefix6.min(128));
            let is_own = v6 == inner.ipv6 || v6 == inner.gateway6;
            let is_here = ipv4_of(v6).is_ok_and(|v4| config.address.contains(v4));
            same(v6.to_bits(), inner.ipv6.to_bits(), others) && !is_own && !is_here
        }
    }
}

/// The way to a host elsewhere, for packets of a family.
struct Way {
    kind: u16,
    family: IpAddr,
    source: (Base, u32, usize),
    destination: (Base, u32, usize),
    checksum: Checksum,
    number: (Base, u32),
    /// The host's address, and the one by which the pod knows it.
    gateway: [Vec<u8>; 2],
    /// The pod's address inside and outside.
    own: [Vec<u8>; 2],
    names: [&'static str; 2],
}

impl Way {
    fn all(gateway: Ipv4Addr, inner: &AddressPlan, outer: &AddressPlan) -> [Way; 2] {
        [
            Way {
                kind: IPV4,
                family: gateway.into(),
                source: SOURCE4,
                destination: DESTINATION4,
                checksum: Checksum::AtAndPseudo(10),
                number: NUMBER4,
                gateway: [gateway, inner.gateway4].map(|address| address.octets().to_vec()),
                own: [inner.ipv4, outer.ipv4].map(|address| address.octets().to_vec()),
                names: ["to4", "pieces4"],
            },
            Way {
                kind: IPV6,
                family: ipv6_of(gateway).into(),
                source: SOURCE6,
                destination: DESTINATION6,
                checksum: Checksum::Pseudo,
                number: NUMBER6,
                gateway: [ipv6_of(gateway), inner.gateway6].map(|address| address.octets().to_vec()),
                own: [inner.ipv6, outer.ipv6].map(|address| address.octets().to_vec()),
                names: ["to6", "pieces6"],
            },
        ]
    }

    fn add(&self, rules: &mut Ruleset, [from_pod, to_pod]: [&str; 2], of: &str) {
        let [go, pieces] = self.names.map(|name| format!("{name}{of}"));
        let ([far, known], [inner, outer]) = (&self.gateway, &self.own);
        let (source, destination) = (self.source, self.destination);
        let ip = || Rule::default().ether_type(self.kind);
        rules.set(&pieces, self.family);
        rules.side_chain(&go);
        let put = |place: (Base, u32, usize), from: &[u8], to: &[u8]| {
            Rule::default().has(place.0, place.1, from).put(place.0, place.1, to, self.checksum)
        };
        rules.rule(&go, put(destination, known, far));
        rules.rule(&go, put(source, inner, outer));
        rules.rule(&go, Rule::default().accept());
        let is_v4 = self.family.is_ipv4();
        let its = |(family, ..): &(IpAddr, i32, String)| family.is_ipv4() == is_v4;
        for (_, protocol, set) in connections::sets(of).into_iter().filter(its) {
            let [whole4, first4, whole6, first6] = former::with_ports(protocol);
            let [whole, first] = if is_v4 { [whole4, first4] } else { [whole6, first6] };
            let to_host = |rule: Rule| rule.has(destination.0, destination.1, known);
            let first = found(to_host(first), &set, FROM_PORT, TO_PORT);
            rules.rule(from_pod, first.remember(&pieces, destination, Some(self.number), PIECES_MS));
            rules.rule(from_pod, found(to_host(whole), &set, FROM_PORT, TO_PORT).go_to(&go));
            let [whole4, first4, whole6, first6] = former::with_ports(protocol);
            let heard = if is_v4 { [whole4, first4] } else { [whole6, first6] };
            for rule in heard.map(|rule| rule.has(source.0, source.1, far)) {
                rules.rule(to_pod, remember(rule, &set, TO_PORT, FROM_PORT, REMEMBERED_MS));
            }
        }
        let piece = if is_v4 { former::piece4() } else { former::piece6() };
        rules.rule(from_pod, piece.found_in(&pieces, destination, Some(self.number)).go_to(&go));
        rules.rule(to_pod, ip().has(source.0, source.1, far).put(source.0, source.1, known, self.checksum));
    }
}

fn table(link: &str) -> String {
    format!("zk{}", link.trim_start_matches("zv"))
}

/// The pod's link that a table of [`keep_address`] is for.
pub(super) fn link_of(table: &str) -> Option<String> {
    table.strip_prefix("zk").map(|digits| format!("zv{digits}"))
}

/// Leaves connections that the pod at `link` has come with the address that it has here: those with whom it is connected know it.
pub(super) fn keep_address(link: &str, outer: &AddressPlan) -> Result<(), NetworkError> {
    let table = table(link);
    delete_table(Family::Inet, &table)?;
    let mut rules = Ruleset::new(Family::Inet, &table);
    // Before the way out gives them the host's.
    rules.chain("out", "nat", Hook::Postrouting, 99, None);
    let v4 = (IpAddr::from(outer.ipv4), outer.ipv4.octets().to_vec(), SOURCE4, DESTINATION4, KNOWN4);
    let v6 = (IpAddr::from(outer.ipv6), outer.ipv6.octets().to_vec(), SOURCE6, DESTINATION6, KNOWN6);
    for (address, own, source, destination, known) in [v4, v6] {
        rules.set(known, address);
        for protocol in connections::PORTS {
            let sent = Rule::default().family_of(address).has(source.0, source.1, &own).transport(protocol);
            rules.rule("out", sent.found_in(known, destination, Some(TO_PORT)).keep_source(source));
        }
    }
    rules.make()
}

/// Removes the rules of [`keep_address`].
pub(super) fn forget_address(link: &str) -> Result<(), NetworkError> {
    delete_table(Family::Inet, &table(link))
}

#[cfg(test)]
mod tests {
    use super::super::lease;
    use super::*;

    #[test]
    fn who_is_of_the_network_that_a_pod_was_born_on_is_near_unless_it_is_here() {
        let born = HostConfig::default();
        let plan = lease::plan(&born, [198, 18, 0, 2].into(), None, [2; 6]);
        let elsewhere = HostConfig::parse("address = \"198.19.0.1/16\"").unwrap();
        let near = |text: &str, config: &HostConfig| is_near(text.parse().unwrap(), &plan, config);
        for neighbour in ["198.18.0.3", "fd5a:4150::c612:3"] {
            assert!(near(neighbour, &elsewhere) && !near(neighbour, &born), "{neighbour}");
        }
        for other in ["198.18.0.1", "198.18.0.2", "198.19.0.5", "10.0.0.1", "fd5a:4150::c613:5", "fd5a:4150::c612:1"] {
            assert!(!near(other, &elsewhere), "{other}");
        }
    }

    #[test]
    fn a_trail_has_each_host_once() {
        let [a, b] = [Ipv4Addr::new(198, 18, 0, 1), Ipv4Addr::new(198, 19, 0, 1)];
        let trail = Trail::default().and(a).and(b).and(a);
        assert_eq!(trail.hosts.iter().map(|host| host.gateway).collect::<Vec<_>>(), [b, a]);
    }
}
