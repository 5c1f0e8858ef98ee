//! Outer addresses for a pod that keeps others inside: rewritten, frame by frame, where its link meets the host.
//!
//! The pod's world has its own address (*inner*) where others have the one it goes by (*outer*). So that the pod can also
//! talk to whoever has the inner address outside (the original, when this is its copy), the two are *exchanged*: what is
//! inner on one side is outer on the other. A source can only ever need the one direction and a destination the other,
//! which makes the rules for frames out of the pod and into it the same. Nothing is remembered between frames.
//!
//! The gateway is treated alike when the pod was born on a host whose bridge has another address.

use std::net::{Ipv4Addr, Ipv6Addr};

use super::NetworkError;
use super::filter::{Base, Checksum, Family, Hook, Rule, Ruleset, delete_table};
use super::former::{self, Kept};
use super::links::link_local;
use super::trail::End;
use crate::pod::AddressPlan;

pub(super) const IPV4: u16 = 0x0800;
pub(super) const ARP: u16 = 0x0806;
pub(super) const IPV6: u16 = 0x86dd;
pub(super) const ICMPV6: i32 = 58;
pub(super) const SOLICITATION: u8 = 135;
pub(super) const ADVERTISEMENT: u8 = 136;

/// Rewrites what passes the host's end `link`; what passes between the pod and its former place, if it has one, has its own way,
/// and so has what it says to those that it was connected with where it was before (`trail`, with the link's number).
pub(super) fn install(
    link: &str,
    inner: &AddressPlan,
    outer: &AddressPlan,
    former: Option<&Kept>,
    trail: Option<(&End, u32)>,
) -> Result<(), NetworkError> {
    remove(link)?;
    let mut rules = Ruleset::new(Family::Device, link);
    if let Some(former) = former {
        former.add_to_line(&mut rules, &former::link_name(link), inner);
    }
    let chains = [("from-pod", Hook::Ingress), ("to-pod", Hook::Egress)];
    for (chain, hook) in chains {
        rules.chain(chain, "filter", hook, -200, Some(link));
    }
    if let Some((end, device)) = trail {
        end.add_to_link(&mut rules, chains.map(|(chain, _)| chain), device, [inner, outer]);
    }
    for (chain, hook) in chains {
        if let (Some(former), Hook::Ingress) = (former, hook) {
            former.add_to_pod(&mut rules, chain, inner);
        }
        for rule in exchange(inner, outer) {
            rules.rule(chain, rule);
        }
    }
    rules.make()
}

/// Removes the rules of `link`, if there are any.
pub(super) fn remove(link: &str) -> Result<(), NetworkError> {
    delete_table(Family::Device, link)
}

/// Whether anything has to be rewritten.
pub(super) fn is_needed(inner: &AddressPlan, outer: &AddressPlan) -> bool {
    let of = |plan: &AddressPlan| (plan.ipv4, plan.ipv6, plan.mac, plan.gateway4, plan.gateway6);
    of(inner) != of(outer)
}

/// Two values of one field: `from` becomes `to` where something comes from, `to` becomes `from` where something goes to.
#[derive(Clone, Copy)]
struct Pair<T> {
    from: T,
    to: T,
}

fn pairs<T: PartialEq + Copy>(own: [T; 2], gateway: [T; 2]) -> Vec<Pair<T>> {
    // For the gateway the roles are reversed: the pod sends to it what it would receive from itself.
    let all = [Pair { from: own[0], to: own[1] }, Pair { from: gateway[1], to: gateway[0] }];
    all.into_iter().filter(|p| p.from != p.to).collect()
}

/// What makes of inner addresses outer ones, and the reverse.
pub(super) fn exchange(inner: &AddressPlan, outer: &AddressPlan) -> Vec<Rule> {
    let macs: Vec<_> = pairs([inner.mac, outer.mac], [[0; 6]; 2]);
    let v4 = pairs([inner.ipv4, outer.ipv4], [inner.gateway4, outer.gateway4]);
    let mut v6 = pairs([inner.ipv6, outer.ipv6], [inner.gateway6, outer.gateway6]);
    v6.extend(pairs([link_local(inner.mac), link_local(outer.mac)], [Ipv6Addr::UNSPECIFIED; 2]));

    let mut rules = Vec::new();
    rules.extend(macs.iter().flat_map(ethernet));
    rules.extend(v4.iter().flat_map(ipv4));
    rules.extend(v4.iter().flat_map(quoted4));
    rules.push(Rule::default().ether_type(IPV4).accept());
    rules.extend(macs.iter().flat_map(arp_hardware));
    rules.extend(v4.iter().map(gratuitous_arp));
    rules.extend(v4.iter().flat_map(arp));
    rules.push(Rule::default().ether_type(ARP).accept());
    rules.extend(v6.iter().flat_map(ipv6));
    rules.extend(v6.iter().flat_map(quoted6));
    rules.extend(macs.iter().flat_map(neighbour_hardware));
    rules.extend(v6.iter().flat_map(neighbour));
    rules
}

/// Source and destination of a frame.
fn ethernet(mac: &Pair<[u8; 6]>) -> [Rule; 2] {
    let place = |offset, old: &[u8; 6], new: &[u8; 6]| {
        Rule::default().has(Base::Link, offset, old).put(Base::Link, offset, new, Checksum::None)
    };
    [place(6, &mac.from, &mac.to), place(0, &mac.to, &mac.from)]
}

/// Source and destination of an IPv4 packet; TCP and UDP count them into their checksums.
fn ipv4(pair: &Pair<Ipv4Addr>) -> [Rule; 2] {
    let place = |offset, old: Ipv4Addr, new: Ipv4Addr| {
        let found = Rule::default().ether_type(IPV4).has(Base::Network, offset, &old.octets());
        found.put(Base::Network, offset, &new.octets(), Checksum::AtAndPseudo(10))
    };
    [place(12, pair.from, pair.to), place(16, pair.to, pair.from)]
}

/// The packet that a message about an error quotes (unreachable, too big): it went the other way.
fn quoted4(pair: &Pair<Ipv4Addr>) -> [Rule; 2] {
    const UNREACHABLE: u8 = 3;
    let place = |offset, old: Ipv4Addr, new: Ipv4Addr| {
        let error = Rule::default().ether_type(IPV4).transport(libc::IPPROTO_ICMP);
        let found = error.has(Base::Transport, 0, &[UNREACHABLE]).has(Base::Transport, offset, &old.octets());
        found.put(Base::Transport, offset, &new.octets(), Checksum::At(2))
    };
    [place(8 + 12, pair.to, pair.from), place(8 + 16, pair.from, pair.to)]
}

/// The same for IPv6, where errors are the messages up to 3.
fn quoted6(pair: &Pair<Ipv6Addr>) -> [Rule; 2] {
    let place = |offset, old: Ipv6Addr, new: Ipv6Addr| {
        let error = Rule::default().ether_type(IPV6).transport(ICMPV6);
        let found = error.has_masked(Base::Transport, 0, &[0], &[0xfc]).has(Base::Transport, offset, &old.octets());
        found.put(Base::Transport, offset, &new.octets(), Checksum::At(2))
    };
    [place(8 + 8, pair.to, pair.from), place(8 + 24, pair.from, pair.to)]
}

/// Sender and target hardware address of an ARP packet.
fn arp_hardware(mac: &Pair<[u8; 6]>) -> [Rule; 2] {
    let place = |offset, old: &[u8; 6], new: &[u8; 6]| {
        let found = Rule::default().ether_type(ARP).has(Base::Network, offset, old);
        found.put(Base::Network, offset, new, Checksum::None)
    };
    [place(8, &mac.from, &mac.to), place(18, &mac.to, &mac.from)]
}

/// An announcement has the sender's address as target as well.
fn gratuitous_arp(pair: &Pair<Ipv4Addr>) -> Rule {
    let (old, new) = (pair.from.octets(), pair.to.octets());
    let found = Rule::default().ether_type(ARP).has(Base::Network, 14, &old).has(Base::Network, 24, &old);
    found.put(Base::Network, 14, &new, Checksum::None).put(Base::Network, 24, &new, Checksum::None).accept()
}

/// Sender and target address of an ARP packet.
fn arp(pair: &Pair<Ipv4Addr>) -> [Rule; 2] {
    let place = |offset, old: Ipv4Addr, new: Ipv4Addr| {
        let found = Rule::default().ether_type(ARP).has(Base::Network, offset, &old.octets());
        found.put(Base::Network, offset, &new.octets(), Checksum::None)
    };
    [place(14, pair.from, pair.to), place(24, pair.to, pair.from)]
}

/// Source and destination of an IPv6 packet, also where the destination is the group in which an address is looked for.
fn ipv6(pair: &Pair<Ipv6Addr>) -> Vec<Rule> {
    let place = |offset, old: Ipv6Addr, new: Ipv6Addr| {
        let found = Rule::default().ether_type(IPV6).has(Base::Network, offset, &old.octets());
        found.put(Base::Network, offset, &new.octets(), Checksum::Pseudo)
    };
    let (old, new) = (solicited_group(pair.to), solicited_group(pair.from));
    let group = place(24, old, new).put(Base::Link, 0, &group_mac(new), Checksum::None);
    vec![place(8, pair.from, pair.to), place(24, pair.to, pair.from), group]
}

/// The address that a neighbour is asked about, and the one that it answers about.
fn neighbour(pair: &Pair<Ipv6Addr>) -> [Rule; 2] {
    let place = |message, old: Ipv6Addr, new: Ipv6Addr| {
        let found = neighbour_message(message).has(Base::Transport, 8, &old.octets());
        found.put(Base::Transport, 8, &new.octets(), Checksum::At(2))
    };
    [place(ADVERTISEMENT, pair.from, pair.to), place(SOLICITATION, pair.to, pair.from)]
}

/// The hardware address that comes with either, as the only option: the sender's.
fn neighbour_hardware(mac: &Pair<[u8; 6]>) -> [Rule; 2] {
    let place = |message, option| {
        let found = neighbour_message(message).has(Base::Transport, 24, &[option, 1]);
        let ours = found.has(Base::Transport, 26, &mac.from);
        ours.put(Base::Transport, 26, &mac.to, Checksum::At(2))
    };
    [place(SOLICITATION, 1), place(ADVERTISEMENT, 2)]
}

fn neighbour_message(message: u8) -> Rule {
    Rule::default().ether_type(IPV6).transport(ICMPV6).has(Base::Transport, 0, &[message])
}

/// The solicited-node multicast group of an address (RFC 4291, section 2.7.1).
pub(super) fn solicited_group(address: Ipv6Addr) -> Ipv6Addr {
    const GROUPS: u128 = 0xff02_0000_0000_0000_0000_0001_ff00_0000;
    Ipv6Addr::from_bits(GROUPS | address.to_bits() & 0xff_ffff)
}

fn group_mac(group: Ipv6Addr) -> [u8; 6] {
    let [.., a, b, c, d] = group.octets();
    [0x33, 0x33, a, b, c, d]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_group_of_an_address_has_its_last_three_bytes() {
        let group = solicited_group("fd5a:4150::c612:5".parse().unwrap());
        assert_eq!(group.to_string(), "ff02::1:ff12:5");
        assert_eq!(group_mac(group), [0x33, 0x33, 0xff, 0x12, 0, 5]);
    }
}
