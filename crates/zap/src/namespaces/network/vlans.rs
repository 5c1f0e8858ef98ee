//! VLANs of bridges, which are there also while a bridge does not filter them.

use std::io;

use super::interfaces::{InterfaceState, header};
use super::requests::index_of;
use crate::pod::network::netlink::{Attributes, Channel, attributes_of};

const HEADER: usize = 16;
const WITH_VLANS: u32 = 1 << 1;
const VLAN: u16 = 2;
/// `struct bridge_vlan_info`: the flags of the one that a port has at first (`PVID`, `UNTAGGED`).
const FIRST: u16 = 2 | 4;

/// Why VLANs of bridges in the caller's namespace cannot be given back: they are not those of new ones.
pub(super) fn refusal(route: &Channel, all: &[InterfaceState]) -> io::Result<Option<String>> {
    if !all.iter().any(InterfaceState::is_bridge) {
        return Ok(None);
    }
    let mut asked = Attributes::default();
    asked.put_u32(libc::IFLA_EXT_MASK, WITH_VLANS);
    let mut question = header(0, 0, 0);
    question[0] = libc::AF_BRIDGE as u8;
    let bodies = route.ask(libc::RTM_GETLINK, libc::NLM_F_DUMP, &[&question[..], asked.bytes()].concat())?;
    let found: Vec<_> = bodies.iter().filter_map(|body| Some((index_of(body)?, vlans(body)))).collect();
    Ok(changed(&found, all).map(|state| format!("has VLANs at {}, of a bridge", state.name)))
}

/// Flags and number of each.
type Vlan = (u16, u16);

fn vlans(body: &[u8]) -> Vec<Vlan> {
    let half = |bytes: &[u8]| bytes.first_chunk().map(|number| u16::from_ne_bytes(*number));
    let all = attributes_of(body.get(HEADER..).unwrap_or_default(), libc::IFLA_AF_SPEC);
    all.flat_map(|all| attributes_of(all, VLAN)).filter_map(|vlan| Some((half(vlan)?, half(vlan.get(2..)?)?))).collect()
}

/// The first interface whose VLANs are not those that it had as it came to its bridge.
fn changed<'a>(found: &[(u32, Vec<Vlan>)], all: &'a [InterfaceState]) -> Option<&'a InterfaceState> {
    // A kernel that knows none shows none.
    if found.iter().all(|(_, vlans)| vlans.is_empty()) {
        return None;
    }
    let with = |index: u32| all.iter().find(|state| state.index == index);
    found.iter().find_map(|(index, vlans)| {
        let state = with(*index)?;
        let bridge = state.bridge.and_then(with).unwrap_or(state);
        let usual: Vec<_> =
            Some(bridge.first_vlan()).filter(|vlan| *vlan != 0).map(|vlan| (FIRST, vlan)).into_iter().collect();
        (*vlans != usual).then_some(state)
    })
}

#[cfg(test)]
mod tests {
    use serde_bytes::ByteBuf;

    use super::*;

    #[test]
    fn vlans_that_a_port_has_not_had_at_first_are_noticed() {
        let first = vec![(39, ByteBuf::from(vec![1, 0]))];
        let bridge = InterfaceState { index: 2, kind: Some("bridge".into()), data: first, ..InterfaceState::default() };
        let port = InterfaceState { index: 3, name: "port".into(), bridge: Some(2), ..InterfaceState::default() };
        let all = [bridge, port];
        let name = |vlans: &[Vlan]| {
            changed(&[(2, vec![(FIRST, 1)]), (3, vlans.to_vec())], &all).map(|state| state.name.as_str())
        };
        assert_eq!(name(&[(FIRST, 1)]), None);
        assert_eq!(name(&[(FIRST, 1), (0, 5)]), Some("port"));
        assert_eq!(name(&[(FIRST, 5)]), Some("port"));
        assert_eq!(name(&[]), Some("port"));
        assert!(changed(&[(2, Vec::new()), (3, Vec::new())], &all).is_none());
    }

    #[test]
    fn they_are_read_beside_other_settings() {
        let mut told = Attributes::default();
        told.put_str(libc::IFLA_IFNAME, "port").nest(libc::IFLA_AF_SPEC, |all| {
            all.put(0, &[1, 0]).put(VLAN, &[6, 0, 1, 0]).put(VLAN, &[0, 0, 5, 0]);
        });
        assert_eq!(vlans(&[&[0; HEADER], told.bytes()].concat()), [(6, 1), (0, 5)]);
    }
}
