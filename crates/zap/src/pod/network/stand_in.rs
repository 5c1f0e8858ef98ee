//! Answers to a pod that looks on its own network for somebody who is not there any more, but is reached through the host:
//! its question comes back to it, as the answer, by the link that it came by.

use super::filter::{Base, Checksum, Rule};
use super::former::{TARGET4, TARGET6};
use super::translate::{ADVERTISEMENT, ARP, ICMPV6, IPV6, SOLICITATION};

/// Who answers, and by which link.
pub(super) struct StandIn {
    pub(super) mac: [u8; 6],
    pub(super) device: u32,
}

impl StandIn {
    /// Answers those who ask for the IPv4 address that `whom` finds at [`TARGET4`].
    pub(super) fn answer4(&self, whom: impl FnOnce(Rule) -> Rule) -> Rule {
        const OPERATION: (Base, u32) = (Base::Network, 6);
        const HARDWARE: [u32; 2] = [8, 18];
        const SENDER: u32 = 14;
        let asked = Rule::default().ether_type(ARP).has(OPERATION.0, OPERATION.1, &[0, 1]);
        let back = whom(asked).exchange(Base::Link, [0, 6], 6).exchange(Base::Network, HARDWARE, 6);
        let back = back.exchange(Base::Network, [SENDER, TARGET4.1], 4);
        let answer = back.put(OPERATION.0, OPERATION.1, &[0, 2], Checksum::None);
        let by_us = answer.put(Base::Link, 6, &self.mac, Checksum::None);
        by_us.put(Base::Network, HARDWARE[0], &self.mac, Checksum::None).leave_by(self.device)
    }

    /// The same for the IPv6 address at [`TARGET6`].
    pub(super) fn answer6(&self, whom: impl FnOnce(Rule) -> Rule) -> Rule {
        const OPTION: u32 = 24;
        const SOURCE: (Base, u32, usize) = (Base::Network, 8, 16);
        const DESTINATION: (Base, u32, usize) = (Base::Network, 24, 16);
        // It was asked for, and is more than what was known.
        const FLAGS: [u8; 4] = [0x60, 0, 0, 0];
        let message = |offset, rule: Rule, value: &[u8]| rule.put(Base::Transport, offset, value, Checksum::At(2));
        let asked = Rule::default().ether_type(IPV6).transport(ICMPV6).has(Base::Transport, 0, &[SOLICITATION]);
        let back = whom(asked.has(Base::Transport, OPTION, &[1, 1])).exchange(Base::Link, [0, 6], 6);
        let back = back.copy((SOURCE.0, SOURCE.1), DESTINATION, Checksum::Pseudo);
        let answer = back.copy((TARGET6.0, TARGET6.1), SOURCE, Checksum::Pseudo);
        let answer = message(0, answer, &[ADVERTISEMENT, 0]);
        let by_us = message(OPTION, message(4, answer, &FLAGS), &[2, 1]);
        let by_us = message(OPTION + 2, by_us, &self.mac).put(Base::Link, 6, &self.mac, Checksum::None);
        by_us.leave_by(self.device)
    }
}
