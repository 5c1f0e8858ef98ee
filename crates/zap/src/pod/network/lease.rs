//! Who has which address. A lease is a link: its name says the address, its alias the MAC address and the pod.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd;
use std::sync::OnceLock;

use super::filter::{self, Family};
use super::links::{self, FarEnd, Link};
use super::netlink::{Batch, Channel};
use super::trail::End;
use super::{ETH0, Network, NetworkError, Request, bridge, former_place, forwarder, kernel};
use crate::ids::HostPid;
use crate::pod::AddressPlan;
use crate::pod::host_config::{HostConfig, Subnet};

/// The IPv6 network of pods; an address ends in the IPv4 address.
const PREFIX6: u128 = 0xfd5a_4150 << 96;

/// The name of the host's end of the link that has `address`: no two links of a namespace can have it.
pub(super) fn link_name(address: Ipv4Addr) -> String {
    format!("zv{:08x}", address.to_bits())
}

/// The alias of such a link.
pub(super) fn link_alias(pod: &str, mac: [u8; 6]) -> String {
    format!("zap {} {pod}", mac_text(mac))
}

/// The address that a link leases, if it is one of zap's.
pub(super) fn leased(link: &Link) -> Option<Ipv4Addr> {
    of_link(&link.name)
}

/// The address that a link of this name leases. The tables of its rules are called so, too.
pub(super) fn of_link(name: &str) -> Option<Ipv4Addr> {
    let digits = name.strip_prefix("zv").filter(|d| d.len() == 8)?;
    u32::from_str_radix(digits, 16).ok().map(Ipv4Addr::from_bits)
}

impl Network {
    /// Chooses an address, which is taken when the link is made that is named after it.
    pub(super) fn lease(
        config: &HostConfig,
        request: &Request<'_>,
        init: HostPid,
        channel: &Channel,
    ) -> Result<Network, NetworkError> {
        let links = bridge::list(channel)?;
        let outer = choose(config, request, &links)?;
        let inner = request.inner.unwrap_or(&outer).clone();
        let former = former_place(config, request, &outer, &inner, channel)?;
        let gateway_mac = || bridge::hardware_address(config, channel);
        let trail = request.trail.map(|trail| gateway_mac().map(|mac| End::new(trail, mac))).transpose()?;
        let link = link_name(outer.ipv4);
        let alias = link_alias(request.pod, outer.mac);
        // The kernel takes an index for the far end only when it is given one for the near end.
        let index = links.last().map_or(1, |l| l.index) + 1;
        let publish = request.publish.to_vec();
        Ok(Network {
            config: config.clone(),
            init,
            link,
            index,
            alias,
            inner,
            outer,
            publish,
            former,
            trail,
            held: Vec::new(),
            waiting_room: OnceLock::new(),
        })
    }

    /// Makes the link, once that it will be there is written down.
    pub(super) fn make_link(
        &self,
        channel: &Channel,
        bridge: u32,
        note: &dyn Fn(&Network) -> io::Result<()>,
    ) -> Result<(), NetworkError> {
        let namespace =
            File::open(self.init.proc("ns/net")).map_err(kernel("opening", "the pod's network namespace"))?;
        note(self).map_err(kernel("writing down", "the pod's connection"))?;
        // Rules of somebody who had the address and has not been tidied up after. Where none can be looked for there are none.
        for family in [Family::Inet, Family::Device] {
            if filter::has_table(family, &self.link).unwrap_or_default() {
                filter::delete_table(family, &self.link)?;
            }
        }
        let (name, index) = ETH0;
        let far = FarEnd { name, index, mac: Some(self.inner.mac), namespace: Some(namespace.as_raw_fd()) };
        let mut batch = Batch::default();
        links::add_veth(&mut batch, &self.link, self.index, Some(bridge), &far);
        links::set_alias(&mut batch, &self.link, &self.alias);
        links::set_up(&mut batch, &self.link);
        Ok(channel.run(&batch)?)
    }

    /// Whether the link of this name is not the pod's: that went with the pod's last process, and somebody has the address now.
    pub(super) fn is_somebody_elses(&self, links: &[Link]) -> bool {
        let same_name = links.iter().find(|link| link.name == self.link);
        same_name.is_some_and(|link| !self.alias.is_empty() && (link.index, &link.alias) != (self.index, &self.alias))
    }
}

/// The addresses of this host that go with an IPv4 address.
pub(super) fn plan(config: &HostConfig, ipv4: Ipv4Addr, prefix4: Option<u8>, mac: [u8; 6]) -> AddressPlan {
    AddressPlan {
        ipv4,
        prefix4: prefix4.unwrap_or(config.address.prefix),
        gateway4: config.address.address,
        ipv6: ipv6_of(ipv4),
        prefix6: 64,
        gateway6: ipv6_of(config.address.address),
        mac,
    }
}

pub(super) fn ipv6_of(ipv4: Ipv4Addr) -> Ipv6Addr {
    Ipv6Addr::from_bits(PREFIX6 | u128::from(ipv4.to_bits()))
}

/// The IPv4 address that goes with an address of the IPv6 network of pods.
pub(super) fn ipv4_of(ipv6: Ipv6Addr) -> Result<Ipv4Addr, NetworkError> {
    let ipv4 = Ipv4Addr::from_bits(ipv6.to_bits() as u32);
    if ipv6_of(ipv4) == ipv6 {
        return Ok(ipv4);
    }
    let network = Ipv6Addr::from_bits(PREFIX6);
    Err(NetworkError::Usage(format!(
        "{ipv6} is not an address of a pod: those are {network}/64 and end in the pod's IPv4 address"
    )))
}

/// The MAC address that goes with an IPv4 address: locally administered, `Z` and the address.
pub(super) fn mac_of(ipv4: Ipv4Addr) -> [u8; 6] {
    let [a, b, c, d] = ipv4.octets();
    [0x02, 0x5a, a, b, c, d]
}

fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// What is taken on this host.
struct Taken {
    addresses: HashSet<Ipv4Addr>,
    /// Those that are kept for pods that are elsewhere: given to others only if asked for, or if there are none else.
    forwarded: HashSet<Ipv4Addr>,
    macs: HashSet<String>,
    newest: Option<Ipv4Addr>,
}

impl Taken {
    fn of(config: &HostConfig, links: &[Link]) -> Taken {
        let pods = || links.iter().filter_map(|l| leased(l).map(|address| (address, l)));
        let macs = pods().filter_map(|(_, l)| l.alias.split(' ').nth(1).map(str::to_owned));
        let own = [config.address.address];
        Taken {
            addresses: pods().map(|(address, _)| address).chain(own).collect(),
            forwarded: links.iter().filter_map(forwarder::kept).collect(),
            macs: macs.chain([mac_text(mac_of(config.address.address))]).collect(),
            newest: links.iter().rev().find_map(leased),
        }
    }

    fn has_mac(&self, mac: [u8; 6]) -> bool {
        self.macs.contains(&mac_text(mac))
    }
}

/// Chooses the outer addresses for a request, given all links of the namespace in the order in which they were made.
pub(super) fn choose(config: &HostConfig, request: &Request<'_>, links: &[Link]) -> Result<AddressPlan, NetworkError> {
    let taken = Taken::of(config, links);
    let (address, prefix) = match request.address {
        Some((address, prefix)) => (wanted(config, &taken, address)?, prefix),
        None => (born_with(config, &taken, request).map_or_else(|| next_free(config, &taken), Ok)?, None),
    };
    let mac = match (request.mac, request.inner) {
        (Some(mac), _) => mac,
        (None, Some(inner)) if !taken.has_mac(inner.mac) => inner.mac,
        _ => mac_of(address),
    };
    if mac[0] & 1 == 1 || mac == [0; 6] {
        return Err(NetworkError::Usage(format!("{} cannot be the MAC address of a pod", mac_text(mac))));
    }
    if taken.has_mac(mac) {
        return Err(NetworkError::Taken(format!("the MAC address {}", mac_text(mac))));
    }
    Ok(plan(config, address, prefix, mac))
}

fn wanted(config: &HostConfig, taken: &Taken, address: Ipv4Addr) -> Result<Ipv4Addr, NetworkError> {
    if !usable(config.address, address) {
        let network = config.address;
        return Err(NetworkError::Usage(format!("{address} is not an address of the pods' network {network}")));
    }
    if taken.addresses.contains(&address) {
        return Err(NetworkError::Taken(format!("the address {address}")));
    }
    Ok(address)
}

/// The address that the pod was born with, if it can have it here.
fn born_with(config: &HostConfig, taken: &Taken, request: &Request<'_>) -> Option<Ipv4Addr> {
    let address = request.inner?.ipv4;
    (usable(config.address, address) && !taken.addresses.contains(&address)).then_some(address)
}

/// The first free address after the one leased last, so that an address is not taken up again sooner than need be.
fn next_free(config: &HostConfig, taken: &Taken) -> Result<Ipv4Addr, NetworkError> {
    let pool = config.pool.unwrap_or(config.address);
    let free = |address: &Ipv4Addr| usable(config.address, *address) && !taken.addresses.contains(address);
    let newest = taken.newest.filter(|address| pool.contains(*address));
    let unclaimed = |address: &Ipv4Addr| free(address) && !taken.forwarded.contains(address);
    let later = newest.and_then(|newest| pool.hosts().skip_while(|a| *a <= newest).find(unclaimed));
    later
        .or_else(|| pool.hosts().find(unclaimed))
        .or_else(|| pool.hosts().find(free))
        .ok_or_else(|| NetworkError::Taken(format!("every address of the pool {pool}")))
}

fn usable(network: Subnet, address: Ipv4Addr) -> bool {
    network.contains(address) && network.first() < address && address < network.last()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(address: [u8; 4], mac: [u8; 6]) -> Link {
        Link { name: link_name(address.into()), alias: link_alias("p", mac), ..Link::default() }
    }

    fn chosen(request: &Request<'_>, links: &[Link]) -> Result<AddressPlan, NetworkError> {
        choose(&HostConfig::default(), request, links)
    }

    #[test]
    fn the_first_pod_gets_the_first_address_after_the_bridge() {
        let plan = chosen(&Request::default(), &[]).unwrap();
        assert_eq!(plan.ipv4.to_string(), "198.18.0.2");
        assert_eq!(plan.ipv6.to_string(), "fd5a:4150::c612:2");
        assert_eq!(plan.gateway6.to_string(), "fd5a:4150::c612:1");
        assert_eq!(plan.mac, [2, 0x5a, 198, 18, 0, 2]);
    }

    #[test]
    fn addresses_are_taken_up_again_last() {
        let links = [link([198, 18, 0, 9], [2; 6]), link([198, 18, 0, 3], [4; 6])];
        assert_eq!(chosen(&Request::default(), &links).unwrap().ipv4.to_string(), "198.18.0.4");
        let last = [link([198, 18, 255, 254], [2; 6])];
        assert_eq!(chosen(&Request::default(), &last).unwrap().ipv4.to_string(), "198.18.0.2");
    }

    #[test]
    fn a_restarted_pod_gets_its_own_addresses_if_they_are_free() {
        let inner = plan(&HostConfig::default(), [198, 18, 7, 7].into(), None, [6, 1, 2, 3, 4, 5]);
        let request = Request { inner: Some(&inner), ..Request::default() };
        assert_eq!(chosen(&request, &[]).unwrap(), inner);
        let beside = chosen(&request, &[link([198, 18, 7, 7], inner.mac)]).unwrap();
        assert_eq!(beside.ipv4.to_string(), "198.18.7.8");
        assert_eq!(beside.mac, mac_of(beside.ipv4));
    }

    #[test]
    fn what_was_asked_for_and_is_taken_is_an_error() {
        let links = [link([198, 18, 0, 5], [2, 0, 0, 0, 0, 1])];
        let ask = |address: [u8; 4], mac| {
            let request = Request { address: Some((address.into(), None)), mac, ..Request::default() };
            chosen(&request, &links).map_err(|e| e.exit_code())
        };
        assert_eq!(ask([198, 18, 0, 5], None).unwrap_err(), 6);
        assert_eq!(ask([198, 18, 0, 1], None).unwrap_err(), 6);
        assert_eq!(ask([198, 18, 0, 6], Some([2, 0, 0, 0, 0, 1])).unwrap_err(), 6);
        assert_eq!(ask([10, 0, 0, 1], None).unwrap_err(), 2);
        assert_eq!(ask([198, 18, 255, 255], None).unwrap_err(), 2);
        assert_eq!(ask([198, 18, 0, 6], Some([1, 0, 0, 0, 0, 1])).unwrap_err(), 2);
        assert!(ask([198, 18, 0, 6], None).is_ok());
    }
}
