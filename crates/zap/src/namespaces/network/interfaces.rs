//! Interfaces: those that a namespace is born with, and those that were made in it.

use std::collections::HashMap;
use std::io;

use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

use super::Place;
use super::requests::{index_of, text, word};
use crate::pod::network::netlink::{Attributes, Channel, attribute, attributes};

const HEADER: usize = 16;
pub(super) const UP: u32 = libc::IFF_UP as u32;
/// Flags that can be set; the others say how things are.
const FLAGS: i32 = libc::IFF_UP
    | libc::IFF_DEBUG
    | libc::IFF_NOTRAILERS
    | libc::IFF_NOARP
    | libc::IFF_PROMISC
    | libc::IFF_ALLMULTI
    | libc::IFF_MULTICAST
    | libc::IFF_DYNAMIC;
const GROUPS: &str = "/proc/thread-self/net/dev_mcast";
const SKIP_STATISTICS: u32 = 1 << 3;
const PROTO_DOWN: u16 = 39;
const PROTO_DOWN_REASON: u16 = 55;
const XDP: u16 = 43;
const XDP_ATTACHED: u16 = 2;
const GSO_MAX_SEGMENTS: u16 = 40;
const GSO_MAX_SIZE: u16 = 41;
pub(super) const OTHER_NAMES: u16 = 52;
pub(super) const OTHER_NAME: u16 = 53;
const GRO_MAX_SIZE: u16 = 58;
const GSO_IPV4_MAX_SIZE: u16 = 63;
const GRO_IPV4_MAX_SIZE: u16 = 64;
pub(super) const PORT_DATA: u16 = 5;
const INET6_TOKEN: u16 = 7;
pub(super) const INET6_GENERATION: u16 = 8;

/// What an interface is made with, and what it is given afterwards where that is not so already.
pub(super) const MADE_WITH: [u16; 2] = [libc::IFLA_NUM_TX_QUEUES, libc::IFLA_NUM_RX_QUEUES];
pub(super) const GIVEN: [u16; 13] = [
    libc::IFLA_ADDRESS,
    libc::IFLA_MTU,
    libc::IFLA_TXQLEN,
    libc::IFLA_IFALIAS,
    libc::IFLA_GROUP,
    GSO_MAX_SEGMENTS,
    GSO_MAX_SIZE,
    GRO_MAX_SIZE,
    GSO_IPV4_MAX_SIZE,
    GRO_IPV4_MAX_SIZE,
    libc::IFLA_LINKMODE,
    PROTO_DOWN_REASON,
    PROTO_DOWN,
];
/// What says that it is in operation, where somebody has to; and what keeps it from that.
pub(super) const IN_OPERATION: &[u16] = &[libc::IFLA_OPERSTATE];
pub(super) const KEPT_DOWN: &[u16] = &[PROTO_DOWN_REASON, PROTO_DOWN];

/// Kinds of interfaces, and those of their settings (`IFLA_INFO_DATA`) that can be given to new ones.
const KINDS: [(&str, &[u16]); 7] = [
    ("bridge", BRIDGE),
    ("dummy", &[]),
    ("ifb", &[]),
    ("macvlan", &[1, 2, 7, 9]),
    ("tun", &[1, 2, 3, 4, 5, 6, 7]),
    ("veth", &[]),
    ("vlan", &[1, 2, 3, 4, 5]),
];
const BRIDGE: &[u16] = &[
    1, 2, 3, 4, 5, 6, 7, 8, 9, 20, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 41, 42, 43,
    44, 45, 46, 49,
];
/// Settings of a port of a bridge (`IFLA_BRPORT_…`) that can be given.
pub(super) const PORT: &[u16] = &[2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 25, 27, 28, 29, 30, 31, 32, 33, 39, 40];
const BRIDGE_VLAN_FILTERING: u16 = 7;
const BRIDGE_FIRST_VLAN: u16 = 39;
const DUMMY: &str = "dummy";
const TUN: &str = "tun";
const TUN_OWNER: u16 = 1;
const TUN_GROUP: u16 = 2;
const TUN_TYPE: u16 = 3;
const TUN_INFORMATION: u16 = 4;
const TUN_HEADERS: u16 = 5;
const TUN_QUEUES: u16 = 7;
const MACVLAN_MODE: u16 = 1;
const MACVLAN_SOURCE: u32 = 16;

/// An interface.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterfaceState {
    /// Its number.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Other names that it goes by.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub other_names: Vec<String>,
    /// Those of its flags that can be set.
    pub flags: u32,
    /// What it is (`veth`, `bridge` …); `None`: the namespace is born with it.
    pub kind: Option<String>,
    /// Settings of its kind, as the kernel's attributes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub data: Vec<(u16, ByteBuf)>,
    /// The other end of a veth; the interface on top of which a VLAN is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub other: Option<Other>,
    /// The bridge of which it is a port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bridge: Option<u32>,
    /// Its settings as a port.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub port: Vec<(u16, ByteBuf)>,
    /// Its other settings: addresses, sizes, names for people.
    pub settings: Vec<(u16, ByteBuf)>,
    /// Groups that it was made to listen to by hand, by their hardware addresses.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<ByteBuf>,
    /// How it comes by link-local addresses (`IN6_ADDR_GEN_MODE_…`).
    pub generation: Option<u8>,
}

/// Another interface, somewhere in the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Other {
    /// Its network namespace.
    pub place: Place,
    /// Its number there.
    pub index: u32,
}

/// An interface whose other end is in another namespace, of which this one has a number.
pub(super) struct Abroad {
    /// The interface.
    pub(super) index: u32,
    /// The number of the namespace.
    pub(super) namespace: i32,
    /// The number of the other end there.
    pub(super) other: u32,
}

/// The settings of a kind that can be given.
pub(super) fn data_of(kind: &str) -> Option<&'static [u16]> {
    KINDS.iter().find(|(name, _)| *name == kind).map(|(_, data)| *data)
}

/// What was found of one interface: a reason to refuse it, or what it is.
pub(super) type Found = Result<(InterfaceState, Option<Abroad>), String>;

/// Every interface of the caller's namespace, but those that modules put everywhere. `born_with` says which need not be made.
pub(super) fn list(
    route: &Channel,
    place: Place,
    born_with: &dyn Fn(&InterfaceState) -> bool,
) -> io::Result<Vec<Found>> {
    let bodies = route.ask(libc::RTM_GETLINK, libc::NLM_F_DUMP, &question(0))?;
    let parsed = bodies.iter().filter_map(|body| parse(body, place));
    let mut groups = groups(&std::fs::read_to_string(GROUPS)?);
    Ok(parsed
        .filter(|(state, ..)| !super::is_everywhere(&state.name, state.flags & UP != 0))
        .map(|(mut state, abroad, refusal)| {
            state.groups = groups.remove(&state.index).unwrap_or_default();
            if born_with(&state) {
                (state.kind, state.other, state.data) = (None, None, Vec::new());
                return Ok((state, None));
            }
            refusal.or_else(|| state.refusal()).map_or(Ok((state, abroad)), Err)
        })
        .collect())
}

/// Groups that somebody has made interfaces listen to, by their numbers: a line has number, name, by how many, whether so,
/// address.
fn groups(table: &str) -> HashMap<u32, Vec<ByteBuf>> {
    let mut all: HashMap<u32, Vec<ByteBuf>> = HashMap::new();
    for line in table.lines() {
        let words: Vec<_> = line.split_ascii_whitespace().collect();
        let [index, _, _, by_hand, address] = words[..] else { continue };
        let byte = |at| u8::from_str_radix(address.get(at..at + 2)?, 16).ok();
        let address: Option<Vec<u8>> = (0..address.len()).step_by(2).map(byte).collect();
        if let (Ok(index), Some(address)) = (index.parse(), address.filter(|_| by_hand != "0")) {
            all.entry(index).or_default().push(ByteBuf::from(address));
        }
    }
    all
}

/// A request for interfaces without their statistics.
pub(super) fn question(index: u32) -> Vec<u8> {
    let mut asked = Attributes::default();
    asked.put_u32(libc::IFLA_EXT_MASK, SKIP_STATISTICS);
    [header(index, 0, 0), asked.bytes().to_vec()].concat()
}

pub(super) fn header(index: u32, flags: u32, change: u32) -> Vec<u8> {
    [[0; 4], index.to_ne_bytes(), flags.to_ne_bytes(), change.to_ne_bytes()].concat()
}

fn some(value: &[u8], wanted: &[u16]) -> Vec<(u16, ByteBuf)> {
    let kept = attributes(value).filter(|(kind, _)| wanted.contains(kind));
    kept.map(|(kind, value)| (kind, ByteBuf::from(value))).collect()
}

pub(super) fn parse(body: &[u8], place: Place) -> Option<(InterfaceState, Option<Abroad>, Option<String>)> {
    let rest = body.get(HEADER..)?;
    let find = |wanted: u16| attribute(rest, wanted);
    let info = |wanted: u16| attribute(find(libc::IFLA_LINKINFO)?, wanted);
    let index = index_of(body)?;
    let kind = info(libc::IFLA_INFO_KIND).map(text);
    let known = kind.as_deref().and_then(data_of);
    let v6 = find(libc::IFLA_AF_SPEC).and_then(|all| attribute(all, libc::AF_INET6 as u16));
    let v6 = |wanted: u16| attribute(v6?, wanted);
    let names = attributes(find(OTHER_NAMES).unwrap_or_default()).filter(|(kind, _)| *kind == OTHER_NAME);
    let abroad = find(libc::IFLA_LINK_NETNSID).and_then(word);
    // Elsewhere another interface may have the same number.
    let is_another = |other: &u32| *other != 0 && (abroad.is_some() || *other != index);
    let other = find(libc::IFLA_LINK).and_then(word).filter(is_another);
    let switched = matches!(kind.as_deref(), Some(TUN | DUMMY));
    // Else the kernel sees to it.
    let waits = find(libc::IFLA_LINKMODE).is_some_and(|mode| mode != [0]);
    let wanted = [
        &MADE_WITH[..],
        &GIVEN,
        if switched { &[libc::IFLA_CARRIER] } else { &[] },
        if waits { &[libc::IFLA_OPERSTATE] } else { &[] },
    ];
    let state = InterfaceState {
        index,
        name: text(find(libc::IFLA_IFNAME)?),
        other_names: names.map(|(_, name)| text(name)).collect(),
        flags: word(body.get(8..)?)? & FLAGS as u32,
        data: some(info(libc::IFLA_INFO_DATA).unwrap_or_default(), known.unwrap_or_default()),
        other: other.filter(|_| abroad.is_none()).map(|index| Other { place, index }),
        bridge: find(libc::IFLA_MASTER).and_then(word),
        port: some(info(PORT_DATA).unwrap_or_default(), PORT),
        settings: some(rest, &wanted.concat()),
        groups: Vec::new(),
        generation: v6(INET6_GENERATION).and_then(|mode| mode.first().copied()),
        kind,
    };
    let has_program = find(XDP)
        .is_some_and(|xdp| attributes(xdp).any(|(kind, value)| kind == XDP_ATTACHED && value.iter().any(|b| *b != 0)));
    let refusal = if has_program {
        Some(format!("has a program (XDP) at the interface {}", state.name))
    } else if v6(INET6_TOKEN).is_some_and(|token| token.iter().any(|byte| *byte != 0)) {
        Some(format!("has a token for addresses at the interface {}", state.name))
    } else {
        None
    };
    let abroad = abroad.zip(other).map(|(namespace, other)| Abroad { index, namespace: namespace as i32, other });
    Some((state, abroad, refusal))
}

impl InterfaceState {
    /// Why it could not be made anew.
    fn refusal(&self) -> Option<String> {
        let kind = self.kind.as_deref().unwrap_or("unknown");
        let is = |attribute: u16, value: u32| {
            let found = self.data.iter().find(|(known, _)| *known == attribute);
            found.is_some_and(|(_, bytes)| bytes.iter().rev().fold(0, |sum, byte| sum << 8 | u32::from(*byte)) == value)
        };
        if data_of(kind).is_none() {
            Some(format!("has the interface {}, of the kind {kind}", self.name))
        } else if kind == "bridge" && is(BRIDGE_VLAN_FILTERING, 1) {
            Some(format!("has the bridge {}, which filters VLANs", self.name))
        } else if kind == "macvlan" && is(MACVLAN_MODE, MACVLAN_SOURCE) {
            Some(format!("has the interface {}, which chooses by the source of packets", self.name))
        } else {
            None
        }
    }

    fn datum(&self, wanted: u16) -> Option<&ByteBuf> {
        self.data.iter().find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
    }

    /// Whether it is a tun or tap device.
    pub(super) fn is_tun(&self) -> bool {
        self.kind.as_deref() == Some(TUN)
    }

    /// Whether a file has it, which is what its carrier is.
    pub(super) fn is_had(&self) -> bool {
        self.setting(libc::IFLA_CARRIER) == Some(&[1])
    }

    /// The flags with which a file becomes one of a tun or tap device.
    pub(super) fn tun_flags(&self) -> i32 {
        let byte = |wanted: u16| self.datum(wanted).and_then(|value| value.first().copied()).unwrap_or(0);
        let flag = |wanted: u16, flag: i32| if byte(wanted) != 0 { flag } else { 0 };
        let information = if byte(TUN_INFORMATION) == 0 { libc::IFF_NO_PI } else { 0 };
        let others = flag(TUN_HEADERS, libc::IFF_VNET_HDR) | flag(TUN_QUEUES, libc::IFF_MULTI_QUEUE);
        i32::from(byte(TUN_TYPE)) | information | others
    }

    /// The user and the group that may have files of it.
    pub(super) fn tun_owners(&self) -> [Option<u32>; 2] {
        [TUN_OWNER, TUN_GROUP].map(|wanted| self.datum(wanted).and_then(|value| word(value)))
    }

    /// What it is given afterwards: the carrier of some is whatever they are told.
    pub(super) fn given(&self) -> Vec<u16> {
        let carrier = (self.kind.as_deref() == Some(DUMMY)).then_some(libc::IFLA_CARRIER);
        GIVEN.into_iter().chain(carrier).collect()
    }

    /// Whether it is a bridge.
    pub(super) fn is_bridge(&self) -> bool {
        self.kind.as_deref() == Some("bridge")
    }

    /// Which VLAN ports of the bridge have at first.
    pub(super) fn first_vlan(&self) -> u16 {
        let number = self.datum(BRIDGE_FIRST_VLAN).and_then(|value| value.first_chunk());
        number.map_or(0, |number| u16::from_ne_bytes(*number))
    }

    /// Whether it is a veth.
    pub(super) fn is_veth(&self) -> bool {
        self.kind.as_deref() == Some("veth")
    }

    pub(super) fn is_up(&self) -> bool {
        self.flags & UP != 0
    }

    pub(super) fn setting(&self, wanted: u16) -> Option<&[u8]> {
        self.settings.iter().find(|(kind, _)| *kind == wanted).map(|(_, value)| &value[..])
    }
}

/// Whether an interface has a carrier and is off still in the kernel's eyes.
pub(super) fn has_unnoticed_carrier(body: &[u8]) -> bool {
    const OPERSTATES: [u8; 2] = [2, 3];
    let get = |wanted: u16| attribute(body.get(HEADER..)?, wanted)?.first().copied();
    let up = body.get(8..).and_then(word).is_some_and(|flags| flags & UP != 0);
    up && get(libc::IFLA_CARRIER) == Some(1)
        && get(libc::IFLA_OPERSTATE).is_some_and(|state| OPERSTATES.contains(&state))
}

/// The address of an interface of the caller's namespace, if it is there.
pub(super) fn address(route: &Channel, index: u32) -> io::Result<Option<Vec<u8>>> {
    match route.ask(libc::RTM_GETLINK, 0, &question(index)) {
        Ok(found) => {
            let state = found.first().and_then(|body| parse(body, Place::default()));
            Ok(state.and_then(|(state, ..)| state.setting(libc::IFLA_ADDRESS).map(<[u8]>::to_vec)))
        }
        Err(e) if e.raw_os_error() == Some(libc::ENODEV) => Ok(None),
        Err(e) => Err(e),
    }
}

/// The flags of the tun or tap device of that name in the caller's namespace.
pub(crate) fn flags_of_tun(name: &str) -> io::Result<i32> {
    let found = Channel::route()?.ask(libc::RTM_GETLINK, libc::NLM_F_DUMP, &question(0))?;
    let states = found.iter().filter_map(|body| parse(body, Place::default()));
    let mut named = states.filter(|(state, ..)| state.is_tun() && state.name == name);
    named.next().map(|(state, ..)| state.tun_flags()).ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV))
}
