//! Links, addresses and routes, as requests to the kernel.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use nix::poll::PollTimeout;

use super::netlink::{Attributes, Batch, Channel, attributes};

const CREATE: i32 = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
const UP: u32 = libc::IFF_UP as u32;
const AF_INET6: u16 = libc::AF_INET6 as u16;
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const ADDR_GEN_NONE: u8 = 1;
const IFLA_BR_FORWARD_DELAY: u16 = 1;
const IFLA_BR_MCAST_SNOOPING: u16 = 23;
const IFLA_BRPORT_STATE: u16 = 1;
const IFLA_BRPORT_LEARNING: u16 = 8;
const IFLA_BRPORT_UNICAST_FLOOD: u16 = 9;
const IFLA_BRPORT_MCAST_FLOOD: u16 = 27;
const IFLA_BRPORT_BCAST_FLOOD: u16 = 30;
const VETH_INFO_PEER: u16 = 1;
const IFLA_VXLAN_ID: u16 = 1;
const IFLA_VXLAN_GROUP: u16 = 2;
const IFLA_VXLAN_LOCAL: u16 = 4;
const IFLA_VXLAN_LEARNING: u16 = 7;
const IFLA_VXLAN_PORT: u16 = 15;
const NUD_REACHABLE: u16 = 0x02;
const NTF_STICKY: u8 = 0x40;
const OPERSTATE_UP: u8 = 6;
const SKIP_STATISTICS: u32 = 1 << 3;

/// A link as the kernel lists it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) alias: String,
    pub(super) up: bool,
    pub(super) master: Option<u32>,
    pub(super) address: Vec<u8>,
    pub(super) carries: bool,
}

/// Whether a port of the bridge lets packets through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum PortState {
    Disabled = 0,
    Forwarding = 3,
}

/// One end of a veth in another network namespace.
pub(super) struct FarEnd<'a> {
    pub(super) name: &'a str,
    pub(super) index: u32,
    pub(super) mac: Option<[u8; 6]>,
    pub(super) namespace: Option<i32>,
}

fn link_header(index: u32, flags: u32, change: u32) -> Vec<u8> {
    // struct ifinfomsg: family, padding, type, index, flags, change.
    [[0; 4], index.to_ne_bytes(), flags.to_ne_bytes(), change.to_ne_bytes()].concat()
}

/// Makes a bridge without the delays of a spanning tree. Multicast goes to every port: with no querier on the network
/// snooping would cut neighbour discovery off after minutes.
pub(super) fn add_bridge(batch: &mut Batch, name: &str, mac: [u8; 6]) {
    batch.push(("making the bridge", name), (libc::RTM_NEWLINK, CREATE), &link_header(0, 0, 0), |link| {
        link.put_str(libc::IFLA_IFNAME, name).put(libc::IFLA_ADDRESS, &mac).nest(libc::IFLA_LINKINFO, |info| {
            info.put_str(libc::IFLA_INFO_KIND, "bridge").nest(libc::IFLA_INFO_DATA, |data| {
                data.put_u32(IFLA_BR_FORWARD_DELAY, 0).put(IFLA_BR_MCAST_SNOOPING, &[0]);
            });
        });
    });
}

/// Makes a veth: our end a port of the bridge `master`, if there is one, the far end where it says.
pub(super) fn add_veth(batch: &mut Batch, name: &str, index: u32, master: Option<u32>, far: &FarEnd<'_>) {
    batch.push(("making the link", name), (libc::RTM_NEWLINK, CREATE), &link_header(index, 0, 0), |link| {
        link.put_str(libc::IFLA_IFNAME, name);
        if let Some(master) = master {
            link.put_u32(libc::IFLA_MASTER, master);
        }
        link.nest(libc::IFLA_LINKINFO, |info| {
            info.put_str(libc::IFLA_INFO_KIND, "veth").nest(libc::IFLA_INFO_DATA, |data| {
                data.nest_after(VETH_INFO_PEER, &link_header(far.index, 0, 0), |peer| far.fill(peer));
            });
        });
    });
}

impl FarEnd<'_> {
    fn fill(&self, peer: &mut Attributes) {
        peer.put_str(libc::IFLA_IFNAME, self.name);
        if let Some(mac) = self.mac {
            peer.put(libc::IFLA_ADDRESS, &mac);
        }
        if let Some(namespace) = self.namespace {
            peer.put_u32(libc::IFLA_NET_NS_FD, namespace as u32);
        }
    }
}

/// Between which addresses of two hosts a link leads.
pub(super) struct Ends {
    pub(super) here: Ipv4Addr,
    pub(super) there: Ipv4Addr,
    pub(super) port: u16,
    /// Tells it from others with the same port: 24 bits.
    pub(super) id: u32,
}

/// Makes a link to another host (VXLAN, RFC 7348), a port of the bridge `master` if there is one.
pub(super) fn add_line(batch: &mut Batch, name: &str, master: Option<u32>, ends: &Ends) {
    batch.push(("making the link", name), (libc::RTM_NEWLINK, CREATE), &link_header(0, 0, 0), |link| {
        link.put_str(libc::IFLA_IFNAME, name);
        if let Some(master) = master {
            link.put_u32(libc::IFLA_MASTER, master);
        }
        link.nest(libc::IFLA_LINKINFO, |info| {
            info.put_str(libc::IFLA_INFO_KIND, "vxlan").nest(libc::IFLA_INFO_DATA, |data| {
                data.put_u32(IFLA_VXLAN_ID, ends.id).put(IFLA_VXLAN_LEARNING, &[0]);
                data.put(IFLA_VXLAN_LOCAL, &ends.here.octets()).put(IFLA_VXLAN_GROUP, &ends.there.octets());
                data.put(IFLA_VXLAN_PORT, &ends.port.to_be_bytes());
            });
        });
    });
}

/// Switches a link on, without the link-local address that the kernel would choose for it.
pub(super) fn set_up(batch: &mut Batch, name: &str) {
    batch.push(("setting up", name), (libc::RTM_NEWLINK, 0), &link_header(0, 0, 0), |link| {
        link.put_str(libc::IFLA_IFNAME, name).nest(libc::IFLA_AF_SPEC, |family| {
            family.nest(AF_INET6, |v6| {
                v6.put(IFLA_INET6_ADDR_GEN_MODE, &[ADDR_GEN_NONE]);
            });
        });
    });
    batch.optional();
    batch.push(("switching on", name), (libc::RTM_NEWLINK, 0), &link_header(0, UP, UP), |link| {
        link.put_str(libc::IFLA_IFNAME, name);
    });
}

/// Notes something about a link, where `ip link` shows it.
pub(super) fn set_alias(batch: &mut Batch, name: &str, alias: &str) {
    batch.push(("noting about", name), (libc::RTM_NEWLINK, 0), &link_header(0, 0, 0), |link| {
        link.put_str(libc::IFLA_IFNAME, name).put(libc::IFLA_IFALIAS, alias.as_bytes());
    });
}

/// Switches a link off.
pub(super) fn set_down(batch: &mut Batch, name: &str) {
    batch.push(("switching off", name), (libc::RTM_NEWLINK, 0), &link_header(0, 0, UP), |link| {
        link.put_str(libc::IFLA_IFNAME, name);
    });
}

/// Puts a link into the bridge `master`.
pub(super) fn set_master(batch: &mut Batch, name: &str, master: u32) {
    batch.push(("putting into the bridge", name), (libc::RTM_NEWLINK, 0), &link_header(0, 0, 0), |link| {
        link.put_str(libc::IFLA_IFNAME, name).put_u32(libc::IFLA_MASTER, master);
    });
}

/// Puts links into a group, so that they can be removed together.
pub(super) fn set_group(batch: &mut Batch, name: &str, group: u32) {
    batch.push(("grouping", name), (libc::RTM_NEWLINK, 0), &link_header(0, 0, 0), |link| {
        link.put_str(libc::IFLA_IFNAME, name).put_u32(libc::IFLA_GROUP, group);
    });
}

/// Opens or closes a port of a bridge. What the bridge has learned stays.
///
/// Asked for as a change of the bridge's: asked for as a change of the link, the kernel announces the link as changed
/// afterwards, and the bridge opens a closed port whose link has changed and has a carrier.
pub(super) fn set_port(batch: &mut Batch, (name, index): (&str, u32), state: PortState) {
    let mut header = link_header(index, 0, 0);
    header[0] = libc::PF_BRIDGE as u8;
    batch.push(("setting the port", name), (libc::RTM_SETLINK, 0), &header, |link| {
        link.nest(libc::IFLA_PROTINFO, |port| {
            port.put(IFLA_BRPORT_STATE, &[state as u8]);
        });
    });
}

/// Gives a link an address that no bridge prefers to its own, and room for this many packets.
pub(super) fn set_aside(batch: &mut Batch, name: &str, mac: [u8; 6], packets: u32) {
    batch.push(("preparing", name), (libc::RTM_NEWLINK, 0), &link_header(0, 0, 0), |link| {
        link.put_str(libc::IFLA_IFNAME, name)
            .put(libc::IFLA_ADDRESS, &[&[0xfe], &mac[1..]].concat())
            .put_u32(libc::IFLA_TXQLEN, packets);
    });
}

/// Has a port get nothing but what is led to it, and the bridge learn nothing from it.
pub(super) fn set_deaf(batch: &mut Batch, (name, index): (&str, u32)) {
    let mut header = link_header(index, 0, 0);
    header[0] = libc::PF_BRIDGE as u8;
    batch.push(("setting the port", name), (libc::RTM_SETLINK, 0), &header, |link| {
        link.nest(libc::IFLA_PROTINFO, |port| {
            for what in
                [IFLA_BRPORT_LEARNING, IFLA_BRPORT_UNICAST_FLOOD, IFLA_BRPORT_MCAST_FLOOD, IFLA_BRPORT_BCAST_FLOOD]
            {
                port.put(what, &[0]);
            }
        });
    });
}

/// How firmly a bridge believes where an address is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lead {
    /// Whatever it sees.
    Fixed,
    /// As if it had learnt it.
    Learnt,
}

/// Tells the bridge behind which of its ports an address is.
pub(super) fn lead_to(batch: &mut Batch, mac: [u8; 6], index: u32, lead: Lead) {
    let (state, flags) = match lead {
        Lead::Fixed => (libc::NUD_NOARP, libc::NTF_MASTER | NTF_STICKY),
        Lead::Learnt => (NUD_REACHABLE, libc::NTF_MASTER),
    };
    let create = libc::NLM_F_CREATE | libc::NLM_F_REPLACE;
    batch.push(("leading packets", "to the pod"), (libc::RTM_NEWNEIGH, create), &entry(index, state, flags), |entry| {
        entry.put(libc::NDA_LLADDR, &mac);
    });
}

/// Has the bridge forget that an address is behind this port of its.
pub(super) fn forget(batch: &mut Batch, mac: [u8; 6], index: u32) {
    let header = entry(index, 0, libc::NTF_MASTER);
    batch.push(("forgetting", "where the pod was"), (libc::RTM_DELNEIGH, 0), &header, |entry| {
        entry.put(libc::NDA_LLADDR, &mac);
    });
}

fn entry(index: u32, state: u16, flags: u8) -> Vec<u8> {
    // struct ndmsg: family, padding, index, state, flags, type.
    let mut header = vec![libc::PF_BRIDGE as u8, 0, 0, 0];
    header.extend(index.to_ne_bytes());
    header.extend(state.to_ne_bytes());
    header.extend([flags, 0]);
    header
}

/// Removes a link.
pub(super) fn delete(batch: &mut Batch, name: &str) {
    batch.push(("removing the link", name), (libc::RTM_DELLINK, 0), &link_header(0, 0, 0), |link| {
        link.put_str(libc::IFLA_IFNAME, name);
    });
}

/// Removes every link of a group: one wait of the kernel's for all of them, not one for each.
pub(super) fn delete_group(batch: &mut Batch, group: u32) {
    batch.push(("removing the links", "of the bridge"), (libc::RTM_DELLINK, 0), &link_header(0, 0, 0), |link| {
        link.put_u32(libc::IFLA_GROUP, group);
    });
}

/// Gives a link an address. IPv6 addresses are usable at once: nobody else can have them.
pub(super) fn add_address(batch: &mut Batch, link: (&str, u32), address: IpAddr, prefix: u8) {
    add_address_with(batch, link, address, prefix, 0);
}

/// The same without a route to the others of its network.
pub(super) fn add_address_alone(batch: &mut Batch, link: (&str, u32), address: IpAddr, prefix: u8) {
    const NO_ROUTE: u32 = 0x200;
    add_address_with(batch, link, address, prefix, NO_ROUTE);
}

fn add_address_with(batch: &mut Batch, (name, index): (&str, u32), address: IpAddr, prefix: u8, more: u32) {
    const FLAGS: u16 = 8;
    let flags = if address.is_ipv6() { libc::IFA_F_NODAD } else { 0 };
    let scope = match address {
        IpAddr::V6(v6) if v6.is_unicast_link_local() => libc::RT_SCOPE_LINK,
        _ => libc::RT_SCOPE_UNIVERSE,
    };
    // struct ifaddrmsg: family, prefix length, flags, scope, index.
    let mut header = vec![family(address), prefix, flags as u8, scope];
    header.extend(index.to_ne_bytes());
    batch.push(("giving an address to", name), (libc::RTM_NEWADDR, CREATE), &header, |request| {
        if more != 0 {
            request.put_u32(FLAGS, flags | more);
        }
        request.put(libc::IFA_LOCAL, &octets(address)).put(libc::IFA_ADDRESS, &octets(address));
        if let IpAddr::V4(v4) = address {
            let broadcast = Ipv4Addr::from_bits(v4.to_bits() | u32::MAX.checked_shr(prefix.into()).unwrap_or(0));
            request.put(libc::IFA_BROADCAST, &broadcast.octets());
        }
    });
}

/// Adds a default route.
pub(super) fn add_default_route(batch: &mut Batch, index: u32, gateway: IpAddr) {
    let header = route_header(gateway, 0, OWN_ROUTE);
    batch.push(("adding a route through", &gateway.to_string()), (libc::RTM_NEWROUTE, CREATE), &header, |route| {
        route.put(libc::RTA_GATEWAY, &octets(gateway)).put_u32(libc::RTA_OIF, index);
    });
}

/// How packets for an address leave this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Way {
    index: u32,
    /// The next router, if they are not for a neighbour.
    gateway: Option<IpAddr>,
}

/// How packets for this address leave, if they do.
pub(super) fn way_to(channel: &Channel, address: IpAddr) -> io::Result<Option<Way>> {
    Ok(ask_for_way(channel, address)?.and_then(|body| way(&body)))
}

/// The route that packets for this address take, as the kernel tells it, if there is one.
fn ask_for_way(channel: &Channel, address: IpAddr) -> io::Result<Option<Vec<u8>>> {
    let mut question = Attributes::default();
    question.put(libc::RTA_DST, &octets(address));
    let header = route_header(address, host_prefix(address), [0; 3]);
    match channel.ask(libc::RTM_GETROUTE, 0, &[&header, question.bytes()].concat()) {
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENETUNREACH | libc::EHOSTUNREACH | libc::EAFNOSUPPORT)) => {
            Ok(None)
        }
        shown => Ok(shown?.into_iter().next()),
    }
}

/// Waits until packets for an address of this network namespace stay in it, if they soon do. An IPv6 address that was just
/// added is there at once, but the kernel adds its route from a work queue (`addrconf_dad_work`), which takes a while on a busy
/// machine.
pub(crate) fn await_local(address: Ipv6Addr) -> io::Result<()> {
    const SOON: Duration = Duration::from_secs(2);
    let channel = Channel::route()?;
    let is_local = || {
        let shown = ask_for_way(&channel, address.into())?;
        Ok::<_, io::Error>(shown.is_some_and(|body| kind_of(&body) == Some(libc::RTN_LOCAL)))
    };
    if is_local()? {
        return Ok(());
    }
    let deadline = Instant::now() + SOON;
    // Subscribed before asking, so that the change cannot fall between the two.
    let news = Channel::news(libc::RTMGRP_IPV6_ROUTE)?;
    while !is_local()? {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || !news.wait(left.try_into().unwrap_or(PollTimeout::ZERO))? {
            break;
        }
    }
    Ok(())
}

fn kind_of(route: &[u8]) -> Option<u8> {
    const KIND: usize = 7;
    route.get(KIND).copied()
}

fn way(body: &[u8]) -> Option<Way> {
    if kind_of(body)? != libc::RTN_UNICAST {
        return None;
    }
    let shown = || attributes(body.get(ROUTE_HEADER..).unwrap_or(&[]));
    let get = |wanted: u16| shown().find(|(kind, _)| *kind == wanted).map(|(_, value)| value);
    let index = u32::from_ne_bytes(get(libc::RTA_OIF)?.try_into().ok()?);
    let gateway = get(libc::RTA_GATEWAY).and_then(|value| match value.len() {
        4 => Some(IpAddr::from(<[u8; 4]>::try_from(value).ok()?)),
        _ => Some(IpAddr::from(<[u8; 16]>::try_from(value).ok()?)),
    });
    Some(Way { index, gateway })
}

/// Has packets for `address` leave as those for `like` do, whose way that is.
pub(super) fn add_route(batch: &mut Batch, address: IpAddr, like: IpAddr, way: Way) {
    let header = route_header(address, host_prefix(address), OWN_ROUTE);
    let create = libc::NLM_F_CREATE | libc::NLM_F_REPLACE;
    batch.push(("adding a route to", &address.to_string()), (libc::RTM_NEWROUTE, create), &header, |route| {
        route.put(libc::RTA_DST, &octets(address)).put_u32(libc::RTA_OIF, way.index);
        route.put(libc::RTA_GATEWAY, &octets(way.gateway.unwrap_or(like)));
    });
}

/// Adds a route to the neighbours on a link.
pub(super) fn add_network_route(batch: &mut Batch, (name, index): (&str, u32), network: IpAddr, prefix: u8) {
    let [table, protocol, _] = OWN_ROUTE;
    let header = route_header(network, prefix, [table, protocol, libc::RT_SCOPE_LINK]);
    batch.push(("adding a route by", name), (libc::RTM_NEWROUTE, CREATE), &header, |route| {
        route.put(libc::RTA_DST, &octets(network)).put_u32(libc::RTA_OIF, index);
    });
}

/// Removes what [`add_route`] has added.
pub(super) fn delete_route(batch: &mut Batch, address: IpAddr) {
    let [table, protocol, _] = OWN_ROUTE;
    let header = route_header(address, host_prefix(address), [table, protocol, libc::RT_SCOPE_NOWHERE]);
    batch.push(("removing the route to", &address.to_string()), (libc::RTM_DELROUTE, 0), &header, |route| {
        route.put(libc::RTA_DST, &octets(address));
    });
}

/// Table, protocol and scope of a route that zap has added.
const OWN_ROUTE: [u8; 3] = [libc::RT_TABLE_MAIN, libc::RTPROT_BOOT, libc::RT_SCOPE_UNIVERSE];
const ROUTE_HEADER: usize = 12;

/// struct rtmsg: family, dst_len, src_len, tos, table, protocol, scope, type, flags.
fn route_header(to: IpAddr, prefix: u8, [table, protocol, scope]: [u8; 3]) -> [u8; ROUTE_HEADER] {
    [family(to), prefix, 0, 0, table, protocol, scope, libc::RTN_UNICAST, 0, 0, 0, 0]
}

fn host_prefix(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

/// Every link of the namespace.
pub(super) fn list(channel: &Channel) -> io::Result<Vec<Link>> {
    let answers = channel.ask(libc::RTM_GETLINK, libc::NLM_F_DUMP, &with_mask(link_header(0, 0, 0)))?;
    Ok(answers.iter().filter_map(|body| parse(body)).collect())
}

/// Waits until the kernel has taken notice that the far end is on: only then does the bridge open the port, and it would
/// open it again if it were closed before.
pub(super) fn await_carrier(channel: &Channel, index: u32) -> io::Result<()> {
    // Subscribed before asking, so that the change cannot fall between the two.
    let news = Channel::news(libc::RTMGRP_LINK)?;
    while !get(channel, index)?.carries {
        news.wait(PollTimeout::NONE)?;
    }
    Ok(())
}

/// One link. Asking for one makes the kernel (6.8 and later) catch up with changes of its carrier first.
fn get(channel: &Channel, index: u32) -> io::Result<Link> {
    let answers = channel.ask(libc::RTM_GETLINK, 0, &with_mask(link_header(index, 0, 0)))?;
    answers.first().and_then(|body| parse(body)).ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV))
}

fn with_mask(header: Vec<u8>) -> Vec<u8> {
    let mut mask = vec![8, 0, libc::IFLA_EXT_MASK as u8, 0];
    mask.extend(SKIP_STATISTICS.to_ne_bytes());
    [header, mask].concat()
}

fn parse(body: &[u8]) -> Option<Link> {
    let word = |at: usize| Some(u32::from_ne_bytes(body.get(at..at + 4)?.try_into().ok()?));
    let text = |value: &[u8]| String::from_utf8_lossy(value.strip_suffix(&[0]).unwrap_or(value)).into_owned();
    let mut link = Link { index: word(4)?, up: word(8)? & UP != 0, ..Link::default() };
    for (kind, value) in attributes(body.get(16..)?) {
        match kind {
            libc::IFLA_IFNAME => link.name = text(value),
            libc::IFLA_IFALIAS => link.alias = text(value),
            libc::IFLA_ADDRESS => link.address = value.to_vec(),
            libc::IFLA_MASTER => link.master = value.try_into().ok().map(u32::from_ne_bytes),
            libc::IFLA_OPERSTATE => link.carries = value == [OPERSTATE_UP],
            _ => {}
        }
    }
    Some(link)
}

fn family(address: IpAddr) -> u8 {
    if address.is_ipv4() { libc::AF_INET as u8 } else { libc::AF_INET6 as u8 }
}

/// The bytes of an address, as packets have them.
pub(super) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// The link-local address that goes with a MAC address.
pub(super) fn link_local(mac: [u8; 6]) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac;
    let low = [a ^ 2, b, c, 0xff, 0xfe, d, e, f];
    Ipv6Addr::from_bits((0xfe80u128 << 112) | u128::from(u64::from_be_bytes(low)))
}

/// Reads some bytes as a link.
pub(super) fn try_answer(bytes: &[u8]) {
    drop((parse(bytes), way(bytes)));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In a network namespace of its own, whose loopback is up.
    #[test]
    fn packets_for_a_new_address_stay_here() {
        std::thread::spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            let channel = Channel::route().unwrap();
            let run = |fill: &dyn Fn(&mut Batch)| {
                let mut batch = Batch::default();
                fill(&mut batch);
                channel.run(&batch).unwrap();
            };
            run(&|batch| set_up(batch, "lo"));
            for last in 1..=100 {
                let address = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, last);
                run(&|batch| add_address(batch, ("lo", 1), address.into(), 64));
                await_local(address).unwrap();
                let route = ask_for_way(&channel, address.into()).unwrap().unwrap();
                assert_eq!(kind_of(&route), Some(libc::RTN_LOCAL), "{address}");
            }
        })
        .join()
        .unwrap();
    }
}
