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

fn table(link: &str) -> String {
    format!("{link}-newcomers")
}
