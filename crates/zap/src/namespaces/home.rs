//! The pod's own network namespace. A restart makes it as `run` does: what the pod has added or changed there (with
//! `--cap-add net_admin`) would be gone, and is refused by name.

use std::io;
use std::net::IpAddr;

use super::links::{self, LOOPBACK, Link, address};
use crate::error::{CaptureError, Context};
use crate::ids::{HostPid, PodPid};
use crate::pod::network::netlink::{Channel, attributes};
use crate::pod::network::{link_local, pod_interface};
use crate::pod::{AddressPlan, NetworkMode, PodSpec, capabilities};
use crate::sys::{clone, nsfs};

const DUMP: i32 = libc::NLM_F_DUMP;
const NET_ADMIN: &str = "NET_ADMIN";
/// `IFA_F_PERMANENT`, `NUD_PERMANENT`: others are the kernel's, and go by themselves.
const PERMANENT: u8 = 0x80;
const RTPROT_KERNEL: u8 = 2;
const RTPROT_RA: u8 = 9;
/// `FRA_PRIORITY`, and those that every namespace begins with.
const PRIORITY: u16 = 6;
const RULES: [u32; 3] = [0, 32766, 32767];

/// Refuses a pod that has changed its own network.
pub fn check_home(spec: &PodSpec, init: HostPid) -> Result<(), CaptureError> {
    if !capabilities::includes(&spec.capabilities, NET_ADMIN) || spec.network == NetworkMode::Host {
        return Ok(());
    }
    let namespace = std::fs::File::open(init.proc("ns/net")).capturing("opening", "the pod's network namespace")?;
    let changed = clone::in_thread(|| {
        nsfs::enter(&namespace, libc::CLONE_NEWNET)?;
        changed(spec, &Channel::route()?)
    });
    match changed.capturing("looking into", "the pod's network namespace")? {
        None => Ok(()),
        Some(what) => Err(CaptureError::Refused {
            process: PodPid(1),
            command: "init".into(),
            object: "the pod's network".into(),
            why: format!("{what}, which cannot be checkpointed yet; undo that first"),
        }),
    }
}

/// What is not as `run` made it, in words.
fn changed(spec: &PodSpec, route: &Channel) -> io::Result<Option<String>> {
    let (name, index) = pod_interface();
    let plan = spec.address.as_ref();
    for body in route.ask(libc::RTM_GETLINK, DUMP, &[0; 16])? {
        let Some(link) = Link::parse(&body) else { continue };
        let is_own = link.index == LOOPBACK || (plan.is_some() && link.index == index && link.name == name);
        match (is_own, link.up) {
            (true, false) => return Ok(Some(format!("has the interface {} off", link.name))),
            (false, _) if !link.is_everywhere() => return Ok(Some(format!("has the interface {}", link.name))),
            (true, true) if let Some(what) = resized(&link, &body) => return Ok(Some(what)),
            _ => {}
        }
    }
    if let Some(what) = queued(route)? {
        return Ok(Some(what));
    }
    let mut own: Vec<IpAddr> = vec![IpAddr::from([127, 0, 0, 1]), std::net::Ipv6Addr::LOCALHOST.into()];
    let given = |plan: &AddressPlan| [plan.ipv4.into(), plan.ipv6.into(), IpAddr::from(link_local(plan.mac))];
    own.extend(plan.into_iter().flat_map(given));
    for body in route.ask(libc::RTM_GETADDR, DUMP, &[0; 8])? {
        let is_permanent = body.get(2).is_some_and(|flags| flags & PERMANENT != 0);
        if let Some((address, _)) = address(&body).filter(|(address, _)| is_permanent && !own.contains(address)) {
            return Ok(Some(format!("has the address {address}")));
        }
    }
    if let Some(what) = routes(route, plan.map(|plan| [plan.gateway4.into(), plan.gateway6.into()]))? {
        return Ok(Some(what));
    }
    for body in route.ask(libc::RTM_GETRULE, DUMP, &[0; 12])? {
        let priority = attributes(body.get(12..).unwrap_or_default()).find(|(kind, _)| *kind == PRIORITY);
        let priority = priority.and_then(|(_, value)| value.first_chunk()).map_or(0, |word| u32::from_ne_bytes(*word));
        if !RULES.contains(&priority) {
            return Ok(Some(format!("has a rule for routes (priority {priority})")));
        }
    }
    for body in route.ask(libc::RTM_GETNEIGH, DUMP, &[0; 12])? {
        if body.get(8).is_some_and(|state| state & PERMANENT != 0) {
            return Ok(Some("has a neighbour that was given by hand".into()));
        }
    }
    let old = std::fs::read_to_string("/proc/thread-self/net/ip_tables_names").unwrap_or_default();
    let old6 = std::fs::read_to_string("/proc/thread-self/net/ip6_tables_names").unwrap_or_default();
    let filters = links::has_tables() || !old.is_empty() || !old6.is_empty();
    Ok(filters.then(|| "has packet filters".into()))
}

/// What is not usual of an interface of the pod's own: the size of its packets, the length of its queue.
fn resized(link: &Link, body: &[u8]) -> Option<String> {
    let is_loopback = link.index == LOOPBACK;
    let usual =
        [(libc::IFLA_MTU, "packets", if is_loopback { 65536 } else { 1500 }), (libc::IFLA_TXQLEN, "a queue", 1000)];
    let number = |wanted: u16| {
        let (_, value) = attributes(body.get(16..)?).find(|(kind, _)| *kind == wanted)?;
        value.first_chunk().map(|word| u32::from_ne_bytes(*word))
    };
    usual.into_iter().find_map(|(kind, what, usual)| match number(kind) {
        Some(size) if size != usual => Some(format!("has {what} of another size at {}: {size}", link.name)),
        _ => None,
    })
}

/// A queueing discipline: by themselves the pod's interfaces have none.
fn queued(route: &Channel) -> io::Result<Option<String>> {
    /// `struct tcmsg`, and `TCA_KIND` behind it.
    const HEADER: usize = 20;
    const KIND: u16 = 1;
    for body in route.ask(libc::RTM_GETQDISC, DUMP, &[0; HEADER])? {
        let kind = attributes(body.get(HEADER..).unwrap_or_default()).find(|(kind, _)| *kind == KIND);
        let kind = kind.map_or_else(String::new, |(_, name)| String::from_utf8_lossy(name).into_owned());
        let kind = kind.trim_end_matches('\0');
        if kind != "noqueue" {
            return Ok(Some(format!("has the queueing discipline {kind}")));
        }
    }
    Ok(None)
}

/// A route that is neither the kernel's nor the way out.
fn routes(route: &Channel, gateways: Option<[IpAddr; 2]>) -> io::Result<Option<String>> {
    for body in route.ask(libc::RTM_GETROUTE, DUMP, &[0; 12])? {
        let (Some(length), Some(protocol)) = (body.get(1), body.get(5)) else { continue };
        let ip = |kind: u16| {
            let value = attributes(body.get(12..)?).find(|(k, _)| *k == kind)?.1;
            match value.len() {
                4 => value.first_chunk::<4>().map(|octets| IpAddr::from(*octets)),
                _ => value.first_chunk::<16>().map(|octets| IpAddr::from(*octets)),
            }
        };
        let is_way_out = *length == 0 && ip(libc::RTA_GATEWAY).zip(gateways).is_some_and(|(to, all)| all.contains(&to));
        if !is_way_out && ![RTPROT_KERNEL, RTPROT_RA].contains(protocol) {
            let to = ip(libc::RTA_DST).map_or("everywhere".into(), |to| format!("{to}/{length}"));
            return Ok(Some(format!("has a route to {to}")));
        }
    }
    Ok(None)
}
