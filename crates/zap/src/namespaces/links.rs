//! Network namespaces: the loopback interface, on or off. Sandboxes have no more; what has is refused.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};

use crate::pod::network::netlink::{Batch, Channel, attributes};
use crate::sys::{clone, nsfs};

/// The loopback interface of a namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinksState {
    /// Whether it is on.
    pub up: bool,
    /// Its addresses, with the lengths of their prefixes.
    pub addresses: Vec<(IpAddr, u8)>,
}

pub(super) const LOOPBACK: u32 = 1;
/// What modules put into every new namespace, as long as nobody uses it.
const EVERYWHERE: [&str; 10] =
    ["tunl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0", "sit0", "ip6tnl0", "ip6gre0", "teql0"];
const DUMP: i32 = libc::NLM_F_DUMP;
const PROTOCOL_KERNEL: u8 = 2;

/// What is in a namespace, or a reason to refuse it.
pub(super) fn capture(namespace: &OwnedFd) -> io::Result<Result<LinksState, String>> {
    clone::in_thread(|| {
        nsfs::enter(namespace, libc::CLONE_NEWNET)?;
        let route = Channel::route()?;
        Ok(look(&route)?.and_then(|state| match has_tables() {
            true => Err("has packet filters, which cannot be checkpointed yet".into()),
            false => Ok(state),
        }))
    })
}

fn look(route: &Channel) -> io::Result<Result<LinksState, String>> {
    let mut state = LinksState::default();
    for body in route.ask(libc::RTM_GETLINK, DUMP, &[0; 16])? {
        let Some(link) = Link::parse(&body) else { continue };
        match link.index {
            LOOPBACK => state.up = link.up,
            _ if link.is_everywhere() => {}
            _ => return Ok(Err(format!("has the interface {}, which cannot be checkpointed yet", link.name))),
        }
    }
    for body in route.ask(libc::RTM_GETADDR, DUMP, &[0; 8])? {
        state.addresses.extend(address(&body));
    }
    for body in route.ask(libc::RTM_GETROUTE, DUMP, &[0; 12])? {
        if body.get(5).is_some_and(|protocol| *protocol != PROTOCOL_KERNEL) {
            return Ok(Err("has routes, which cannot be checkpointed yet".into()));
        }
    }
    Ok(Ok(state))
}

/// Whether there are tables of nftables. A host without them has none.
pub(super) fn has_tables() -> bool {
    const GET_TABLES: u16 = 10 << 8 | 1;
    let tables = Channel::filter().and_then(|filter| filter.ask(GET_TABLES, DUMP, &[0; 4]));
    tables.is_ok_and(|tables| !tables.is_empty())
}

pub(super) struct Link {
    pub(super) index: u32,
    pub(super) up: bool,
    pub(super) name: String,
}

impl Link {
    /// A `struct ifinfomsg` and its attributes.
    pub(super) fn parse(body: &[u8]) -> Option<Link> {
        let word = |at: usize| body.get(at..)?.first_chunk().map(|w| u32::from_ne_bytes(*w));
        let name = attributes(body.get(16..)?).find(|(kind, _)| *kind == libc::IFLA_IFNAME)?.1;
        let name = String::from_utf8_lossy(name).trim_end_matches('\0').to_owned();
        Some(Link { index: word(4)?, up: word(8)? & libc::IFF_UP as u32 != 0, name })
    }

    /// Whether a module has put it there, and nobody uses it.
    pub(super) fn is_everywhere(&self) -> bool {
        !self.up && EVERYWHERE.contains(&self.name.as_str())
    }
}

/// A `struct ifaddrmsg` and its attributes.
pub(super) fn address(body: &[u8]) -> Option<(IpAddr, u8)> {
    let local = |kind: u16| attributes(body.get(8..)?).find(|(k, _)| *k == kind).map(|(_, value)| value);
    let value = local(libc::IFA_LOCAL).or_else(|| local(libc::IFA_ADDRESS))?;
    let address = match value.len() {
        4 => IpAddr::from(Ipv4Addr::from(*value.first_chunk::<4>()?)),
        _ => IpAddr::from(Ipv6Addr::from(*value.first_chunk::<16>()?)),
    };
    Some((address, *body.get(1)?))
}

/// Switches the loopback interface of the caller's namespace on and gives it its addresses.
pub(super) fn restart(state: &LinksState) -> io::Result<()> {
    if !state.up && state.addresses.is_empty() {
        return Ok(());
    }
    let mut batch = Batch::default();
    if state.up {
        let up = libc::IFF_UP as u32;
        let header: Vec<u8> = [0, LOOPBACK, up, up].iter().flat_map(|w| w.to_ne_bytes()).collect();
        batch.push(("switching on", "lo"), (libc::RTM_NEWLINK, 0), &header, |_| {});
    }
    for (address, prefix) in &state.addresses {
        let (family, bytes) = match address {
            IpAddr::V4(v4) => (libc::AF_INET, v4.octets().to_vec()),
            IpAddr::V6(v6) => (libc::AF_INET6, v6.octets().to_vec()),
        };
        let header = [&[family as u8, *prefix, 0, libc::RT_SCOPE_HOST][..], &LOOPBACK.to_ne_bytes()].concat();
        let create = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
        let object = address.to_string();
        batch.push(("adding", &object), (libc::RTM_NEWADDR, create), &header, |attributes| {
            attributes.put(libc::IFA_LOCAL, &bytes).put(libc::IFA_ADDRESS, &bytes);
        });
        // The kernel gives it 127.0.0.1 and ::1 by itself.
        batch.optional();
    }
    Ok(Channel::route()?.run(&batch)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loopback_interface_comes_back() {
        let namespace = || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)?;
            Ok(OwnedFd::from(std::fs::File::open("/proc/thread-self/ns/net")?))
        };
        let other = (IpAddr::from([10, 1, 2, 3]), 24);
        let made = clone::in_thread(|| {
            let made = namespace()?;
            restart(&LinksState { up: true, addresses: vec![other] })?;
            Ok(made)
        });
        let made = made.unwrap();
        let state = capture(&made).unwrap().unwrap();
        assert!(state.up && state.addresses.contains(&other));
        assert!(state.addresses.contains(&(IpAddr::from([127, 0, 0, 1]), 8)));
        let off = clone::in_thread(namespace).unwrap();
        assert_eq!(capture(&off).unwrap().unwrap(), LinksState::default());
    }
}
