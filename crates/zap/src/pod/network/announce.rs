//! Telling the neighbours where an address is now.

use std::net::Ipv6Addr;

use crate::pod::AddressPlan;

const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_NODES_MAC: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];

/// The frames that announce a pod's addresses, as the pod itself would send them.
pub(super) fn frames(plan: &AddressPlan) -> Vec<Vec<u8>> {
    vec![gratuitous_arp(plan), unsolicited_advertisement(plan)]
}

/// An ARP request for one's own address (RFC 5944, section 4.6).
fn gratuitous_arp(plan: &AddressPlan) -> Vec<u8> {
    let address = plan.ipv4.octets();
    let mut frame = ethernet([0xff; 6], plan.mac, ETHERTYPE_ARP);
    // Hardware type Ethernet, protocol type IPv4, their lengths, request.
    frame.extend([0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(plan.mac);
    frame.extend(address);
    frame.extend([0; 6]);
    frame.extend(address);
    frame
}

/// A neighbour advertisement that nobody asked for, overriding what neighbours know (RFC 4861, section 7.2.6).
fn unsolicited_advertisement(plan: &AddressPlan) -> Vec<u8> {
    let mut message = vec![136, 0, 0, 0, 0x20, 0, 0, 0];
    message.extend(plan.ipv6.octets());
    message.extend([2, 1]);
    message.extend(plan.mac);
    let sum = checksum(plan.ipv6, ALL_NODES, &message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());

    let mut frame = ethernet(ALL_NODES_MAC, plan.mac, ETHERTYPE_IPV6);
    frame.extend([0x60, 0, 0, 0]);
    frame.extend((message.len() as u16).to_be_bytes());
    // ICMPv6, hop limit 255.
    frame.extend([58, 255]);
    frame.extend(plan.ipv6.octets());
    frame.extend(ALL_NODES.octets());
    frame.extend(message);
    frame
}

fn ethernet(to: [u8; 6], from: [u8; 6], kind: u16) -> Vec<u8> {
    [&to[..], &from[..], &kind.to_be_bytes()[..]].concat()
}

/// The ICMPv6 checksum (RFC 4443, section 2.3) of a message of even length.
fn checksum(from: Ipv6Addr, to: Ipv6Addr, message: &[u8]) -> u16 {
    let pseudo =
        [&from.octets()[..], &to.octets()[..], &(message.len() as u32).to_be_bytes()[..], &[0, 0, 0, 58]].concat();
    let words = pseudo.chunks(2).chain(message.chunks(2));
    let sum: u32 = words.map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !((folded & 0xffff) + (folded >> 16)) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> AddressPlan {
        AddressPlan {
            ipv4: [198, 18, 0, 5].into(),
            prefix4: 16,
            gateway4: [198, 18, 0, 1].into(),
            ipv6: "fd5a:4150::c612:5".parse().unwrap(),
            prefix6: 64,
            gateway6: "fd5a:4150::c612:1".parse().unwrap(),
            mac: [2, 0x5a, 198, 18, 0, 5],
        }
    }

    #[test]
    fn an_arp_announcement_names_itself_twice() {
        let frame = gratuitous_arp(&plan());
        assert_eq!(frame.len(), 14 + 28);
        assert_eq!(frame[28..32], [198, 18, 0, 5]);
        assert_eq!(frame[38..42], [198, 18, 0, 5]);
    }

    #[test]
    fn the_checksum_of_an_advertisement_checks() {
        let frame = unsolicited_advertisement(&plan());
        assert_eq!(checksum(plan().ipv6, ALL_NODES, &frame[14 + 40..]), 0);
    }
}
