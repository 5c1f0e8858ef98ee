//! Network namespaces: the loopback interface, on or off. Sandboxes have no more; for what has see `network`.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};

use super::network::{LOOPBACK, index_of, inside, word};
use crate::pod::network::netlink::{Batch, Channel, attribute};

/// The loopback interface of a namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinksState {
    /// Whether it is on.
    pub up: bool,
    /// Its addresses, with the lengths of their prefixes.
    pub addresses: Vec<(IpAddr, u8)>,
}

const DUMP: i32 = libc::NLM_F_DUMP;

/// What the loopback interface of a namespace has.
pub(super) fn capture(namespace: &OwnedFd) -> io::Result<LinksState> {
    inside(namespace, || look(&Channel::route()?))
}

fn look(route: &Channel) -> io::Result<LinksState> {
    let mut state = LinksState::default();
    for body in route.ask(libc::RTM_GETLINK, DUMP, &[0; 16])? {
        if index_of(&body) == Some(LOOPBACK) {
            state.up = body.get(8..).and_then(word).is_some_and(|flags| flags & libc::IFF_UP as u32 != 0);
        }
    }
    let addresses = route.ask(libc::RTM_GETADDR, DUMP, &[0; 8])?;
    let own = addresses.iter().filter(|body| index_of(body) == Some(LOOPBACK));
    state.addresses.extend(own.filter_map(|body| address(body)));
    Ok(state)
}

/// A `struct ifaddrmsg` and its attributes.
fn address(body: &[u8]) -> Option<(IpAddr, u8)> {
    let local = |kind: u16| attribute(body.get(8..)?, kind);
    let value = local(libc::IFA_LOCAL).or_else(|| local(libc::IFA_ADDRESS))?;
    let address = match value.len() {
        4 => IpAddr::from(Ipv4Addr::from(*value.first_chunk::<4>()?)),
        _ => IpAddr::from(Ipv6Addr::from(*value.first_chunk::<16>()?)),
    };
    Some((address, *body.get(1)?))
}

/// Reads some bytes as an address of an interface.
pub(super) fn try_answer(bytes: &[u8]) {
    let _ = address(bytes);
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
    use crate::sys::clone;

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
        let state = capture(&made).unwrap();
        assert!(state.up && state.addresses.contains(&other));
        assert!(state.addresses.contains(&(IpAddr::from([127, 0, 0, 1]), 8)));
        let off = clone::in_thread(namespace).unwrap();
        assert_eq!(capture(&off).unwrap(), LinksState::default());
    }
}
