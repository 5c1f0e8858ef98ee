//! A line between two hosts, for the frames of one pod: from where it was to where it is.
//!
//! It is a VXLAN between the addresses of their bridges, a port of both, and each end lets nothing pass but what is for the
//! pod's addresses of old, or from them. The kernel does the rest: it tells senders what fits (path MTU) where that is less than before, and
//! takes packets apart that may be.

use std::io;
use std::net::Ipv4Addr;

use super::filter::{Base, Family, Hook, Rule, Ruleset, delete_table};
use super::links::{self, Ends, PortState};
use super::netlink::{Batch, Behind, Channel};
use super::translate::{self, ARP, IPV4, IPV6};
use super::{NetworkError, open};
use crate::pod::AddressPlan;

/// The UDP port of all lines, at both ends.
const PORT: u16 = 7412;

/// One end of a line.
pub(super) struct Line<'a> {
    /// The name of its link.
    pub(super) name: &'a str,
    /// Tells it from other lines.
    pub(super) id: u32,
    /// The addresses of the two hosts.
    pub(super) here: Ipv4Addr,
    pub(super) there: Ipv4Addr,
    /// The pod's addresses of old.
    pub(super) plan: &'a AddressPlan,
    /// Whether the pod is at the other end.
    pub(super) leads_to_pod: bool,
}

impl Line<'_> {
    /// Makes this end, a port of the bridge `master`, noting `alias` about it. It is switched off.
    pub(super) fn make(&self, channel: &Channel, master: u32, alias: &str) -> Result<(), NetworkError> {
        let ends = Ends { here: self.here, there: self.there, port: PORT, id: self.id };
        let mut batch = Batch::default();
        links::add_line(&mut batch, self.name, Some(master), &ends);
        links::set_alias(&mut batch, self.name, alias);
        channel.run(&batch).map_err(|failed| match failed.source.raw_os_error() {
            Some(libc::EOPNOTSUPP) => NetworkError::Lacks(LACKS.to_owned()),
            Some(libc::EEXIST) => NetworkError::Taken(format!("the link {} or its number {}", self.name, self.id)),
            _ => failed.into(),
        })?;
        self.guard().and_then(|()| self.filter())
    }

    /// Takes frames from nobody but the other host; neither those nor its own are translated on their way.
    fn guard(&self) -> Result<(), NetworkError> {
        const ADDRESS_OF_SENDER: u32 = 12;
        const RECEIVER: u32 = 16;
        let mut rules = Ruleset::new(Family::Inet, self.name);
        rules.chain("in", "filter", Hook::Prerouting, -300, None);
        rules.chain("out", "filter", Hook::Output, -300, None);
        rules.rule("in", self.frames().has_not(Base::Network, ADDRESS_OF_SENDER, &self.there.octets()).drop());
        rules.rule("in", self.frames().untracked());
        rules.rule("out", self.frames().has(Base::Network, RECEIVER, &self.there.octets()).untracked());
        rules.make()
    }

    /// The packets of the line.
    fn frames(&self) -> Rule {
        const VXLAN_NUMBER: u32 = 8 + 4;
        let udp = Rule::default().family_of(self.here.into()).transport(libc::IPPROTO_UDP);
        let [_, number @ ..] = self.id.to_be_bytes();
        udp.has(Base::Transport, 2, &PORT.to_be_bytes()).has(Base::Transport, VXLAN_NUMBER, &number)
    }

    fn filter(&self) -> Result<(), NetworkError> {
        let (to, from) = if self.leads_to_pod { ("out", "in") } else { ("in", "out") };
        let mut rules = Ruleset::new(Family::Device, self.name);
        // On the way out they have been given the old addresses by then.
        rules.chain("in", "filter", Hook::Ingress, -300, Some(self.name));
        rules.chain("out", "filter", Hook::Egress, -100, Some(self.name));
        to_the_pod(self.plan).into_iter().for_each(|rule| rules.rule(to, rule));
        from_the_pod(self.plan).into_iter().for_each(|rule| rules.rule(from, rule));
        [to, from].into_iter().for_each(|chain| rules.rule(chain, Rule::default().drop()));
        rules.make()
    }
}

/// What a host is without that cannot have one.
pub(super) const LACKS: &str = "links to other hosts (VXLAN in its kernel)";

/// What is for the pod, and who looks for it.
fn to_the_pod(plan: &AddressPlan) -> Vec<Rule> {
    let group = translate::solicited_group(plan.ipv6);
    vec![
        Rule::default().ether_type(IPV4).has(Base::Network, 16, &plan.ipv4.octets()).accept(),
        Rule::default().ether_type(ARP).has(Base::Network, 24, &plan.ipv4.octets()).accept(),
        Rule::default().ether_type(IPV6).has(Base::Network, 24, &plan.ipv6.octets()).accept(),
        Rule::default().ether_type(IPV6).has(Base::Network, 24, &group.octets()).accept(),
    ]
}

/// What comes from it.
fn from_the_pod(plan: &AddressPlan) -> Vec<Rule> {
    vec![
        Rule::default().ether_type(IPV4).has(Base::Network, 12, &plan.ipv4.octets()).accept(),
        Rule::default().ether_type(ARP).has(Base::Network, 14, &plan.ipv4.octets()).accept(),
        Rule::default().ether_type(IPV6).has(Base::Network, 8, &plan.ipv6.octets()).accept(),
    ]
}

/// Switches an end on.
pub(super) fn open_end(channel: &Channel, name: &str) -> Result<(), NetworkError> {
    let mut batch = Batch::default();
    links::set_up(&mut batch, name);
    Ok(channel.run(&batch)?)
}

/// Removes an end, and what is left of one. The link goes last: it is what tells of the rest.
pub(super) fn remove(name: &str) -> Result<(), NetworkError> {
    let index = nix::net::if_::if_nametoindex(name).ok();
    let channel = open()?;
    if let Some(index) = index {
        // Without its filter it would be a hole between two networks.
        let mut batch = Batch::default();
        links::set_port(&mut batch, (name, index), PortState::Disabled);
        batch.optional();
        channel.run(&batch)?;
    }
    delete_table(Family::Device, name)?;
    delete_table(Family::Inet, name)?;
    let Some(index) = index else { return Ok(()) };
    let mut batch = Batch::default();
    links::delete(&mut batch, name);
    match channel.remove(batch, index, Behind::Thread) {
        Err(gone) if gone.source.raw_os_error() == Some(libc::ENODEV) => Ok(()),
        other => Ok(other?),
    }
}

/// Whether this host can have one, tried in a network namespace that the calling thread has to itself.
pub(super) fn try_one() -> io::Result<()> {
    let mut batch = Batch::default();
    let ends = Ends { here: Ipv4Addr::LOCALHOST, there: Ipv4Addr::LOCALHOST, port: PORT, id: 1 };
    links::add_line(&mut batch, "line", None, &ends);
    Ok(Channel::route()?.run(&batch)?)
}
