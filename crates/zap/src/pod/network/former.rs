//! The place on a network that a pod had at the host that it left, where a forwarder keeps it: whoever talked to it there goes on
//! talking to it, at the address that it had.
//!
//! Frames that come over the line ([`super::line`]) are led to the pod by the bridge, as all others. Who they come from is
//! remembered, by the packet filter itself: what the pod sends to them is not translated, and goes back over the line. All
//! else goes its way here, under the address that the pod has here.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use super::connections::{Connection, FROM_PORT, PORTS, TO_PORT};
use super::filter::{Base, Checksum, Family, Hook, Rule, Ruleset, add_keys};
use super::translate::{self, ARP, ICMPV6, IPV4, IPV6, SOLICITATION};
use super::{NetworkError, links};
use crate::pod::AddressPlan;

/// Such a place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FormerPlace {
    /// Tells the line from others: 24 bits.
    pub id: u32,
    /// The old host's address on the network of its pods: its end of the line.
    pub host: Ipv4Addr,
    /// The hardware address of its bridge.
    pub gateway_mac: [u8; 6],
    /// Under which addresses others know the pod there.
    pub plan: AddressPlan,
}

/// A former place, as the host has it to which the pod came.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Kept {
    pub(super) place: FormerPlace,
    /// The hardware address of the bridge here.
    pub(super) gateway_mac: [u8; 6],
}

/// Who talks to the pod at its former place, with ports, and without where there are none.
const CALLERS4: &str = "callers4";
const CALLERS6: &str = "callers6";
/// Which packets for them come in pieces: only the first has a port.
const PIECES4: &str = "pieces4";
const PIECES6: &str = "pieces6";
const PIECES_MS: u64 = 5000;
/// How long somebody is remembered who is not heard of: as long as connections are, elsewhere in the kernel.
pub(super) const REMEMBERED_MS: u64 = 5 * 24 * 3600 * 1000;

pub(super) const SOURCE4: (Base, u32, usize) = (Base::Network, 12, 4);
pub(super) const DESTINATION4: (Base, u32, usize) = (Base::Network, 16, 4);
const SENDER4: (Base, u32, usize) = (Base::Network, 14, 4);
pub(super) const TARGET4: (Base, u32, usize) = (Base::Network, 24, 4);
pub(super) const SOURCE6: (Base, u32, usize) = (Base::Network, 8, 16);
pub(super) const DESTINATION6: (Base, u32, usize) = (Base::Network, 24, 16);
pub(super) const TARGET6: (Base, u32, usize) = (Base::Transport, 8, 16);

/// The number of a packet that comes in pieces.
pub(super) const NUMBER4: (Base, u32) = (Base::Network, 4);
pub(super) const NUMBER6: (Base, u32) = (Base::Network, 40 + 6);

/// The name of the line's end that goes with a pod's link.
pub(super) fn link_name(link: &str) -> String {
    format!("zl{}", link.trim_start_matches("zv"))
}

impl Kept {
    /// What the line itself does, in the table of the pod's link: the addresses of old become those that the pod has inside,
    /// and who calls is remembered.
    pub(super) fn add_to_line(&self, rules: &mut Ruleset, line: &str, inner: &AddressPlan) {
        for (callers, pieces, family) in
            [(CALLERS4, PIECES4, Ipv4Addr::UNSPECIFIED.into()), (CALLERS6, PIECES6, Ipv6Addr::UNSPECIFIED.into())]
        {
            rules.set(callers, family);
            rules.set(pieces, family);
        }
        if translate::is_needed(inner, &self.place.plan) {
            for (chain, hook) in [("line-in", Hook::Ingress), ("line-out", Hook::Egress)] {
                rules.chain(chain, "filter", hook, -200, Some(line));
                translate::exchange(inner, &self.place.plan).into_iter().for_each(|rule| rules.rule(chain, rule));
            }
        }
        rules.chain("line-heard", "filter", Hook::Ingress, -100, Some(line));
        for rule in heard(inner) {
            rules.rule("line-heard", rule);
        }
    }

    /// What comes before the exchange of addresses, in the chain of what the pod sends.
    pub(super) fn add_to_pod(&self, rules: &mut Ruleset, chain: &str, inner: &AddressPlan) {
        let [old, here] = [self.place.gateway_mac, self.gateway_mac];
        for (side, gateway) in [(CALLERS4, inner.gateway4.into()), (CALLERS6, inner.gateway6.into())] {
            rules.side_chain(side);
            self.onward(gateway, inner).into_iter().for_each(|rule| rules.rule(side, rule));
        }
        for rule in answers(inner, old) {
            rules.rule(chain, rule);
        }
        // The pod may have learnt the gateway's hardware address from either side.
        rules.rule(chain, Rule::default().has(Base::Link, 0, &old).put(Base::Link, 0, &here, Checksum::None));
    }

    /// What is for a caller: those on the pod's own network are reached directly, others by the gateway there.
    fn onward(&self, gateway: IpAddr, inner: &AddressPlan) -> [Rule; 3] {
        let (offset, own, mask) = match gateway {
            IpAddr::V4(v4) => (16, v4.octets().to_vec(), mask(32, inner.prefix4)),
            IpAddr::V6(v6) => (24, v6.octets().to_vec(), mask(128, inner.prefix6)),
        };
        let to_gateway = |rule: Rule| rule.put(Base::Link, 0, &self.place.gateway_mac, Checksum::None).accept();
        let network: Vec<u8> = own.iter().zip(&mask).map(|(byte, mask)| byte & mask).collect();
        [
            to_gateway(Rule::default().has(Base::Network, offset, &own)),
            Rule::default().has_masked(Base::Network, offset, &network, &mask).accept(),
            to_gateway(Rule::default()),
        ]
    }
}

/// The first `prefix` of so many bits.
fn mask(bits: u8, prefix: u8) -> Vec<u8> {
    (0..bits / 8)
        .map(|byte| u8::MAX.checked_shl(8 - u32::from(prefix.saturating_sub(byte * 8).min(8))).unwrap_or(0))
        .collect()
}

/// A packet that has ports, whole or as the first of several pieces. The packet filter does not look whether it is one of the
/// others, whose data it would take for ports.
pub(super) fn with_ports(protocol: i32) -> [Rule; 4] {
    [whole4(), first4(), whole6(), first6()].map(|rule| rule.transport(protocol))
}

fn whole4() -> Rule {
    Rule::default().ether_type(IPV4).has_masked(Base::Network, 6, &[0; 2], &PIECE4)
}

fn first4() -> Rule {
    piece4().has_masked(Base::Network, 6, &[0; 2], &[0x1f, 0xff])
}

pub(super) fn piece4() -> Rule {
    Rule::default().ether_type(IPV4).has_any(Base::Network, 6, &PIECE4)
}

fn whole6() -> Rule {
    Rule::default().ether_type(IPV6).has_not(Base::Network, 6, &[PIECE6])
}

fn first6() -> Rule {
    piece6().has_masked(Base::Network, 40 + 2, &[0; 2], &[0xff, 0xf8])
}

pub(super) fn piece6() -> Rule {
    Rule::default().ether_type(IPV6).has(Base::Network, 6, &[PIECE6])
}

/// "More follow", and where in the packet this piece belongs.
const PIECE4: [u8; 2] = [0x3f, 0xff];
/// The header of a piece, if it comes first.
const PIECE6: u8 = 44;

/// Remembers who sent a frame that came over the line. One for all is made one for the pod.
fn heard(inner: &AddressPlan) -> Vec<Rule> {
    let remember = |rule: Rule, set, address, port| rule.remember(set, address, port, REMEMBERED_MS);
    let ip = |kind| Rule::default().ether_type(kind);
    let mut rules = Vec::new();
    for protocol in PORTS {
        let [whole4, first4, whole6, first6] = with_ports(protocol);
        rules.extend([whole4, first4].map(|rule| remember(rule, CALLERS4, SOURCE4, Some(FROM_PORT))));
        rules.extend([whole6, first6].map(|rule| remember(rule, CALLERS6, SOURCE6, Some(FROM_PORT))));
    }
    rules.push(remember(ip(IPV4), CALLERS4, SOURCE4, None));
    rules.push(remember(ip(ARP), CALLERS4, SENDER4, None));
    rules.push(remember(ip(IPV6), CALLERS6, SOURCE6, None));
    rules.push(Rule::default().put(Base::Link, 0, &inner.mac, Checksum::None));
    rules
}

/// Finds packets with ports, whole or in pieces, that the pod sends to callers.
fn connections_with_callers() -> Vec<Rule> {
    let mut rules = Vec::new();
    for protocol in PORTS {
        let [whole4, first4, whole6, first6] = with_ports(protocol);
        rules.push(whole4.found_in(CALLERS4, DESTINATION4, Some(TO_PORT)).go_to(CALLERS4));
        rules.push(whole6.found_in(CALLERS6, DESTINATION6, Some(TO_PORT)).go_to(CALLERS6));
        let first = first4.found_in(CALLERS4, DESTINATION4, Some(TO_PORT));
        rules.push(first.remember(PIECES4, DESTINATION4, Some(NUMBER4), PIECES_MS));
        let first = first6.found_in(CALLERS6, DESTINATION6, Some(TO_PORT));
        rules.push(first.remember(PIECES6, DESTINATION6, Some(NUMBER6), PIECES_MS));
    }
    rules.push(piece4().found_in(PIECES4, DESTINATION4, Some(NUMBER4)).go_to(CALLERS4));
    rules.push(piece6().found_in(PIECES6, DESTINATION6, Some(NUMBER6)).go_to(CALLERS6));
    rules
}

/// Finds what the pod sends to callers.
fn answers(inner: &AddressPlan, gateway_mac: [u8; 6]) -> Vec<Rule> {
    const REQUEST: [u8; 2] = [0, 1];
    const REPLY: [u8; 2] = [0, 2];
    let ip = |kind| Rule::default().ether_type(kind);
    let other = |rule: Rule| PORTS.into_iter().fold(rule, Rule::not_transport);
    let mut rules = connections_with_callers();
    rules.push(other(ip(IPV4)).found_in(CALLERS4, DESTINATION4, None).go_to(CALLERS4));
    rules.push(other(ip(IPV6)).found_in(CALLERS6, DESTINATION6, None).go_to(CALLERS6));
    // Who asks where a caller is asks there, but the gateway is always the one here.
    let asked = ip(ARP).has(Base::Network, 6, &REQUEST).has_not(Base::Network, 24, &inner.gateway4.octets());
    rules.push(asked.found_in(CALLERS4, TARGET4, None).accept());
    let solicited = ip(IPV6).transport(ICMPV6).has(Base::Transport, 0, &[SOLICITATION]);
    let asked = solicited.has_not(Base::Transport, 8, &inner.gateway6.octets());
    rules.push(asked.found_in(CALLERS6, TARGET6, None).accept());
    let answered = || ip(ARP).has(Base::Network, 6, &REPLY);
    rules.push(
        answered().has_not(Base::Network, 24, &inner.gateway4.octets()).found_in(CALLERS4, TARGET4, None).accept(),
    );
    rules.push(answered().has(Base::Link, 0, &gateway_mac).accept());
    rules
}

/// Keys of [`CALLERS4`] and [`CALLERS6`], or of sets like them: those with whom a pod has connections.
#[derive(Debug, Default)]
pub(super) struct Connected {
    v4: BTreeSet<Vec<u8>>,
    v6: BTreeSet<Vec<u8>>,
}

/// The key of an address with a port, or with 0 for none.
pub(super) fn key(address: IpAddr, port: u16) -> Vec<u8> {
    [&links::octets(address)[..], &port.to_be_bytes(), &[0; 2]].concat()
}

impl Connected {
    pub(super) fn of(connections: &[Connection]) -> Connected {
        let mut all = Connected::default();
        for connection in connections {
            let keys = [connection.port, 0].map(|port| key(connection.address, port));
            if connection.address.is_ipv4() { all.v4.extend(keys) } else { all.v6.extend(keys) }
        }
        all
    }

    /// Puts them into sets of a table.
    pub(super) fn remember(self, table: &str, [v4, v6]: [&str; 2], family: Family) -> Result<(), NetworkError> {
        for (set, keys) in [(v4, self.v4), (v6, self.v6)] {
            add_keys(family, table, set, &keys.into_iter().collect::<Vec<_>>())?;
        }
        Ok(())
    }
}

/// Has those be answered over the line with whom the pod at `link` has connections.
pub(super) fn know(link: &str, connections: &[Connection]) -> Result<(), NetworkError> {
    Connected::of(connections).remember(link, [CALLERS4, CALLERS6], Family::Device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_are_as_long_as_their_prefixes() {
        assert_eq!(mask(32, 16), [255, 255, 0, 0]);
        assert_eq!(mask(32, 20), [255, 255, 240, 0]);
        assert_eq!(mask(128, 64), [[255; 8], [0; 8]].concat());
        assert_eq!((mask(32, 0), mask(32, 32)), (vec![0; 4], vec![255; 4]));
    }
}
