//! Dropping requests for new TCP connections on their way to a pod, for as long as it takes to accept those that it has.
//! Whoever sent one asks again after a second.

use super::NetworkError;
use super::filter::{Base, Family, Hook, Rule, Ruleset, delete_table};

const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
/// Where a TCP header has its flags, and which they are.
const FLAGS: u32 = 13;
const SYN: u8 = 0x02;
const ACK: u8 = 0x10;

/// Drops them before they leave the host's end `link`. Again is no error.
pub(super) fn drop_at(link: &str) -> Result<(), NetworkError> {
    let mut rules = Ruleset::new(Family::Device, &table(link));
    rules.chain("to-pod", "filter", Hook::Egress, -300, Some(link));
    for ether_type in [IPV4, IPV6] {
        let first = Rule::default().ether_type(ether_type).transport(libc::IPPROTO_TCP);
        rules.rule("to-pod", first.has_masked(Base::Transport, FLAGS, &[SYN], &[SYN | ACK]).drop());
    }
    rules.make()
}

/// Lets them through again.
pub(super) fn admit_at(link: &str) -> Result<(), NetworkError> {
    delete_table(Family::Device, &table(link))
}

/// Whether this Ethernet frame is such a request.
pub(super) fn is_one(frame: &[u8]) -> bool {
    const IPV6_HEADER: usize = 40;
    let Some((&kind, packet)) = frame.get(12..).and_then(|rest| rest.split_first_chunk()) else { return false };
    let at = |place: usize| packet.get(place).copied().unwrap_or(0);
    let (protocol, header) = match u16::from_be_bytes(kind) {
        IPV4 => (at(9), usize::from(at(0) & 0x0f) * 4),
        IPV6 => (at(6), IPV6_HEADER),
        _ => return false,
    };
    i32::from(protocol) == libc::IPPROTO_TCP && at(header + FLAGS as usize) & (SYN | ACK) == SYN
}

fn table(link: &str) -> String {
    format!("{link}-newcomers")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u16, header: &[u8], flags: u8) -> Vec<u8> {
        let mut tcp = [0; 20];
        tcp[13] = flags;
        [&[2; 12][..], &kind.to_be_bytes(), header, &tcp].concat()
    }

    #[test]
    fn a_request_is_told_from_the_rest() {
        let mut ip4 = [0; 24];
        (ip4[0], ip4[9]) = (0x46, libc::IPPROTO_TCP as u8);
        let mut ip6 = [0; 40];
        (ip6[0], ip6[6]) = (0x60, libc::IPPROTO_TCP as u8);
        for (kind, header) in [(IPV4, &ip4[..]), (IPV6, &ip6[..])] {
            assert!(is_one(&frame(kind, header, SYN)));
            assert!(!is_one(&frame(kind, header, SYN | ACK)) && !is_one(&frame(kind, header, ACK)));
            for length in 0..frame(kind, header, SYN).len() {
                is_one(&frame(kind, header, SYN)[..length]);
            }
        }
        ip4[9] = libc::IPPROTO_UDP as u8;
        assert!(!is_one(&frame(IPV4, &ip4, SYN)) && !is_one(&frame(0x0806, &[0; 28], SYN)));
    }
}
