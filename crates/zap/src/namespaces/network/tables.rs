//! What is listed and given back entry by entry, as the kernel's own messages: addresses, routes, rules for routes,
//! neighbours, labels of addresses, entries of bridges, queueing disciplines.
//!
//! A restart compares what there is with what there was, takes away what is too much and adds what is missing. What the kernel
//! adds by itself needs no care then, nor what zap set up.

use std::collections::{HashMap, HashSet};
use std::io;

use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

use super::groups;
use super::requests::{Requests, index_of, text, word};
use crate::pod::network::netlink::{Attributes, Channel, attributes};

/// A kind of entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Table {
    /// Addresses of interfaces.
    Addresses,
    /// Neighbours that were given by hand.
    Neighbours,
    /// Those that are answered for.
    Proxies,
    /// Behind which port of a bridge somebody is, given by hand.
    Bridged,
    /// Labels of addresses.
    Labels,
    /// Rules for routes.
    Rules,
    /// Routes of every table.
    Routes,
    /// Queueing disciplines.
    Queues,
    /// Addresses that an interface was made to listen to beside its own.
    Heard,
    /// Groups of which ports of a bridge are members for good.
    Groups,
}

/// Entries of one kind: headers and attributes, without what only says how things are.
pub type Entries = Vec<ByteBuf>;

const V4: u8 = libc::AF_INET as u8;
const V6: u8 = libc::AF_INET6 as u8;
const RTM_ADDR_LABEL: u16 = 72;
const NUD_PERMANENT: u16 = 0x80;
const NUD_NOARP: u16 = 0x40;
const NUD_STALE: u16 = 0x04;
const NUD_NONE: u16 = 0;
const NTF_SELF: u8 = libc::NTF_SELF;
const NTF_EXT_LEARNED: u8 = 0x10;
const NTF_EXT_MANAGED: u32 = 1;
const NDA_FLAGS_EXT: u16 = 15;
const NDA_DST: u16 = 1;
const NTF_MASTER: u8 = libc::NTF_MASTER;
const NTF_PROXY: u8 = libc::NTF_PROXY;
const NDA_LLADDR: u16 = 2;
const NDA_MASTER: u16 = 9;
const IFA_FLAGS: u16 = 8;
const IFA_CACHEINFO: u16 = 6;
/// `NODAD`, `HOMEADDRESS`, `MANAGETEMPADDR`, `NOPREFIXROUTE`, `MCAUTOJOIN`: those that can be given.
const ADDRESS_FLAGS: u32 = 0x712;
const NO_DETECTION: u32 = libc::IFA_F_NODAD;
const RTPROT_KERNEL: u8 = 2;
const RTPROT_RA: u8 = 9;
const RTA_CACHEINFO: u16 = 12;
const RTA_ENCAP: u16 = 22;
const RTA_EXPIRES: u16 = 23;
const RTA_NEXTHOP: u16 = 30;
/// `RTNH_F_PERVASIVE`, `RTNH_F_ONLINK`.
const NEXTHOP_FLAGS: u8 = 2 | 4;
/// `FIB_RULE_INVERT`, `FIB_RULE_FIND_SADDR`.
const RULE_FLAGS: u32 = 0x2 | 0x10000;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TC_ROOT: u32 = 0xffff_ffff;
/// Queueing disciplines that take back what they show.
const QUEUES: [&str; 4] = ["bfifo", "pfifo", "pfifo_fast", "tbf"];
const CLOCK_TICKS: u32 = 100;

/// An entry, taken apart.
struct Entry {
    header: Vec<u8>,
    attributes: Vec<(u16, Vec<u8>)>,
}

impl Entry {
    fn of(body: &[u8], header: usize) -> Option<Entry> {
        let (header, rest) = body.split_at_checked(header)?;
        let attributes = attributes(rest).map(|(kind, value)| (kind, value.to_vec())).collect();
        Some(Entry { header: header.to_vec(), attributes })
    }

    fn get(&self, wanted: u16) -> Option<&[u8]> {
        self.attributes.iter().find(|(kind, _)| *kind == wanted).map(|(_, value)| &value[..])
    }

    fn keep(&mut self, wanted: &[u16]) {
        self.attributes.retain(|(kind, _)| wanted.contains(kind));
    }

    fn set(&mut self, wanted: u16, value: Vec<u8>) {
        match self.attributes.iter_mut().find(|(kind, _)| *kind == wanted) {
            Some((_, old)) => *old = value,
            None => self.attributes.push((wanted, value)),
        }
    }

    /// Keeps some of the flags that are the number at `at` of the header.
    fn mask(&mut self, at: usize, flags: u32) {
        let now = self.header.get(at..).and_then(word).unwrap_or(0);
        self.header[at..at + 4].copy_from_slice(&(now & flags).to_ne_bytes());
    }

    fn bytes(&self) -> ByteBuf {
        let mut all = Attributes::default();
        for (kind, value) in &self.attributes {
            all.put(*kind, value);
        }
        ByteBuf::from([&self.header, all.bytes()].concat())
    }
}

impl Table {
    /// In the order in which they are given back: routes need addresses and rules nothing.
    pub(super) const ALL: [Table; 10] = [
        Table::Labels,
        Table::Addresses,
        Table::Neighbours,
        Table::Proxies,
        Table::Bridged,
        Table::Heard,
        Table::Groups,
        Table::Rules,
        Table::Routes,
        Table::Queues,
    ];

    /// The messages by which one is added, taken away, listed.
    fn messages(self) -> [u16; 3] {
        let first = match self {
            Table::Addresses => libc::RTM_NEWADDR,
            Table::Neighbours | Table::Proxies | Table::Bridged | Table::Heard => libc::RTM_NEWNEIGH,
            Table::Labels => RTM_ADDR_LABEL,
            Table::Rules => libc::RTM_NEWRULE,
            Table::Routes => libc::RTM_NEWROUTE,
            Table::Queues => libc::RTM_NEWQDISC,
            Table::Groups => groups::NEW,
        };
        [first, first + 1, first + 2]
    }

    /// The length of what precedes the attributes.
    fn header(self) -> usize {
        match self {
            Table::Addresses | Table::Groups => 8,
            Table::Queues => 20,
            _ => 12,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Table::Addresses => "an address",
            Table::Neighbours | Table::Proxies => "a neighbour",
            Table::Bridged => "an entry of a bridge",
            Table::Labels => "a label of addresses",
            Table::Rules => "a rule for routes",
            Table::Routes => "a route",
            Table::Queues => "a queueing discipline",
            Table::Heard => "an address of an interface",
            Table::Groups => "a group of a bridge",
        }
    }

    fn question(self) -> Vec<u8> {
        let mut asked = vec![0; self.header()];
        match self {
            Table::Proxies => asked[10] = NTF_PROXY,
            Table::Bridged | Table::Heard | Table::Groups => asked[0] = libc::AF_BRIDGE as u8,
            // Nobody lists them for all families.
            Table::Labels => asked[0] = V6,
            _ => {}
        }
        asked
    }

    /// What there is in the caller's namespace, of the interfaces that are `known`.
    pub(super) fn list(self, route: &Channel, known: &dyn Fn(u32) -> bool) -> io::Result<Result<Entries, String>> {
        let bodies = route.ask(self.messages()[2], libc::NLM_F_DUMP, &self.question());
        let bodies = match bodies {
            // The host has no IPv6, or no bridges.
            Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => Vec::new(),
            other => other?,
        };
        if self == Table::Groups {
            return Ok(bodies.iter().flat_map(|body| groups::kept(body)).collect());
        }
        let entries = bodies.iter().filter_map(|body| Entry::of(body, self.header()));
        Ok(entries.filter_map(|entry| self.kept(entry, known).transpose()).collect())
    }

    /// What of an entry is to be given back, if anything.
    fn kept(self, mut entry: Entry, known: &dyn Fn(u32) -> bool) -> Result<Option<ByteBuf>, String> {
        let of_known = index_of(&entry.header).is_some_and(known);
        let (family, is_ip) = (entry.header[0], [V4, V6].contains(&entry.header[0]));
        let kept = match self {
            Table::Addresses => of_known && is_ip && keep_address(&mut entry),
            Table::Neighbours => of_known && is_ip && keep_neighbour(&mut entry),
            Table::Proxies => is_ip && entry.header[10] & NTF_PROXY != 0 && keep_who(&mut entry),
            Table::Bridged => of_known && keep_bridged(&mut entry),
            Table::Heard => of_known && keep_heard(&mut entry),
            Table::Labels => {
                entry.mask(8, 0);
                true
            }
            Table::Rules => {
                entry.mask(8, RULE_FLAGS);
                is_ip
            }
            Table::Groups => false,
            Table::Routes if !is_ip => return Err(format!("has a route of the family {family}")),
            Table::Routes => return keep_route(entry),
            Table::Queues => return if of_known { keep_queue(entry) } else { Ok(None) },
        };
        Ok(kept.then(|| entry.bytes()))
    }

    /// Makes what there is in the caller's namespace what there was.
    pub(super) fn restart(self, route: &Channel, wanted: &Entries, known: &dyn Fn(u32) -> bool) -> io::Result<()> {
        let now = self.list(route, known)?.map_err(io::Error::other)?;
        let [add, take, _] = self.messages();
        let mut requests = Requests::new(route);
        let (mut kept, surplus): (Vec<_>, Vec<_>) = match self {
            // The first is the one that packets come from.
            Table::Addresses if !comes_first(&now, wanted) => (Vec::new(), now),
            _ => now.into_iter().partition(|one| wanted.contains(one)),
        };
        let take_away = |requests: &mut Requests<'_>, these: &[ByteBuf]| {
            for one in these {
                requests.push(("removing", self.name()), (take, 0), one, |_| {})?;
                // It may have gone with another.
                requests.optional();
            }
            requests.run()
        };
        if self == Table::Routes {
            // Those that came with addresses came in the order of these.
            let misplaced;
            (kept, misplaced) = in_their_places(kept, wanted);
            take_away(&mut requests, &misplaced)?;
        } else if self != Table::Heard {
            // Interfaces listen to more on behalf of others.
            take_away(&mut requests, &surplus)?;
        }
        let how = match self {
            Table::Routes => libc::NLM_F_APPEND,
            // The kernel gives an interface one by itself when it notices its carrier, perhaps now.
            Table::Addresses => libc::NLM_F_REPLACE,
            _ => libc::NLM_F_EXCL,
        };
        for one in self.in_order(wanted, &kept) {
            let flags = libc::NLM_F_CREATE | how;
            requests.push(("adding", self.name()), (add, flags), &self.without_delay(one), |_| {})?;
        }
        requests.run()?;
        // What leads to a gateway may have been taken away since it was added.
        if self == Table::Routes {
            take_away(&mut requests, &surplus)?;
        }
        if self == Table::Addresses {
            // As it was added it is not asked for whether anybody else has it; that it was asked for then is to be seen.
            for one in wanted.iter().filter(|one| one.first() == Some(&V6) && self.without_delay(one) != ***one) {
                requests.push(("changing", self.name()), (add, libc::NLM_F_REPLACE), one, |_| {})?;
            }
        }
        requests.run()
    }

    /// What is to be added: routes through gateways after those that lead there; of an interface's IPv6 addresses the last is
    /// the first.
    fn in_order<'w>(self, wanted: &'w Entries, kept: &[ByteBuf]) -> Vec<&'w ByteBuf> {
        let mut missing: Vec<_> = wanted.iter().filter(|one| !kept.contains(one)).collect();
        match self {
            Table::Addresses => {
                let (v4, v6): (Vec<&ByteBuf>, Vec<_>) = missing.into_iter().partition(|one| one.first() == Some(&V4));
                let of_interfaces = v6.chunk_by(|one, next| index_of(one) == index_of(next));
                missing = v4.into_iter().chain(of_interfaces.flat_map(|of_one| of_one.iter().rev().copied())).collect();
            }
            Table::Routes => missing.sort_by_key(|one| {
                let leads_on = [libc::RTA_GATEWAY, libc::RTA_MULTIPATH, libc::RTA_VIA];
                attributes(one.get(self.header()..).unwrap_or_default()).any(|(kind, _)| leads_on.contains(&kind))
            }),
            _ => {}
        }
        missing
    }

    /// An IPv6 address is usable at once: it was the pod's already.
    fn without_delay(self, one: &ByteBuf) -> ByteBuf {
        match Entry::of(one, self.header()) {
            Some(mut entry) if self == Table::Addresses && entry.header.first() == Some(&V6) => {
                let flags = entry.get(IFA_FLAGS).and_then(word).unwrap_or(0) | NO_DETECTION;
                entry.header[2] = flags as u8;
                entry.set(IFA_FLAGS, flags.to_ne_bytes().to_vec());
                entry.bytes()
            }
            _ => one.clone(),
        }
    }

    /// What it says of an entry when it is refused.
    pub(super) fn is_default(self, entries: &Entries, fresh: &Entries) -> bool {
        match self {
            // Those of `lo` are seen to elsewhere, and the kernel's own routes come with addresses.
            Table::Addresses => true,
            Table::Routes => entries.iter().all(|one| one.get(5) == Some(&RTPROT_KERNEL)),
            _ => entries == fresh,
        }
    }
}

impl Table {
    /// Reads some bytes as an entry that the kernel shows, and as one of an image.
    pub(super) fn try_entry(self, bytes: &[u8]) {
        let kept = Entry::of(bytes, self.header()).and_then(|entry| self.kept(entry, &|_| true).ok()?);
        let wanted = vec![ByteBuf::from(bytes.to_vec()), kept.unwrap_or_default()];
        self.in_order(&wanted, &[]).into_iter().for_each(|one| drop(self.without_delay(one)));
        let _ = (comes_first(&wanted, &wanted), in_their_places(wanted.clone(), &wanted));
    }
}

/// Whether what there is of IPv4 is the beginning of what is wanted.
fn comes_first(now: &Entries, wanted: &Entries) -> bool {
    let of = |entries: &Entries| -> Vec<ByteBuf> {
        entries.iter().filter(|one| one.first() == Some(&V4)).cloned().collect()
    };
    let (now, wanted) = (of(now), of(wanted));
    let interfaces: std::collections::BTreeSet<_> = now.iter().map(|one| index_of(one)).collect();
    interfaces.into_iter().all(|interface| {
        let of_it = |entries: &[ByteBuf]| -> Vec<ByteBuf> {
            entries.iter().filter(|one| index_of(one) == interface).cloned().collect()
        };
        of_it(&wanted).starts_with(&of_it(&now))
    })
}

/// What routes are for: family, length of the prefix, type of service; table, destination, metric.
#[derive(PartialEq, Eq, Hash)]
struct Purpose([u8; 3], [Option<Vec<u8>>; 3]);

/// What a route is for: of several for the same, packets take the first.
fn purpose(route: &ByteBuf) -> Option<Purpose> {
    let entry = Entry::of(route, Table::Routes.header())?;
    let of = |kind| entry.get(kind).map(<[u8]>::to_vec);
    let numbers = [entry.header[0], entry.header[1], entry.header[3]];
    Some(Purpose(numbers, [libc::RTA_TABLE, libc::RTA_DST, libc::RTA_PRIORITY].map(of)))
}

/// Those of the routes that there are behind which the missing ones can be put, and those that are in the way.
fn in_their_places(now: Vec<ByteBuf>, wanted: &Entries) -> (Vec<ByteBuf>, Vec<ByteBuf>) {
    let mut all: HashMap<_, (Vec<&ByteBuf>, Vec<&ByteBuf>)> = HashMap::new();
    now.iter().for_each(|route| all.entry(purpose(route)).or_default().0.push(route));
    wanted.iter().for_each(|route| all.entry(purpose(route)).or_default().1.push(route));
    let misplaced: HashSet<_> =
        all.into_values().filter(|(now, wanted)| !wanted.starts_with(now)).flat_map(|(now, _)| now).cloned().collect();
    now.into_iter().partition(|route| !misplaced.contains(route))
}

fn state(entry: &Entry) -> u16 {
    u16::from_ne_bytes([entry.header[8], entry.header[9]])
}

fn keep_address(entry: &mut Entry) -> bool {
    let flags = entry.get(IFA_FLAGS).and_then(word).unwrap_or_else(|| u32::from(entry.header[2]));
    // The kernel makes such addresses, and others in their place.
    let temporary = entry.header[0] == V6 && flags & libc::IFA_F_TEMPORARY != 0;
    entry.header[2] = (flags & ADDRESS_FLAGS) as u8;
    // IFA_ADDRESS, IFA_LOCAL, IFA_LABEL, IFA_BROADCAST, IFA_CACHEINFO, IFA_RT_PRIORITY, IFA_PROTO.
    entry.keep(&[1, 2, 3, 4, IFA_CACHEINFO, 9, 11]);
    entry.set(IFA_FLAGS, (flags & ADDRESS_FLAGS).to_ne_bytes().to_vec());
    if let Some((_, times)) = entry.attributes.iter_mut().find(|(kind, _)| *kind == IFA_CACHEINFO) {
        // When it was made and last changed.
        times.iter_mut().skip(8).for_each(|byte| *byte = 0);
    }
    !temporary
}

/// Those that somebody has given; what was found out is found out again.
fn keep_neighbour(entry: &mut Entry) -> bool {
    let is_managed = entry.get(NDA_FLAGS_EXT).and_then(word).is_some_and(|flags| flags & NTF_EXT_MANAGED != 0);
    let is_learnt = entry.header[10] & NTF_EXT_LEARNED != 0;
    let has_address = entry.get(NDA_LLADDR).is_some();
    let now = if state(entry) & NUD_PERMANENT != 0 {
        state(entry)
    } else if is_managed {
        // The kernel is to find it out, and to go on doing so.
        entry.attributes.retain(|(kind, _)| *kind != NDA_LLADDR);
        NUD_NONE
    } else if is_learnt && has_address {
        NUD_STALE
    } else if state(entry) & NUD_NOARP != 0 && has_address && !is_without_asking(entry) {
        NUD_NOARP
    } else {
        return false;
    };
    entry.header[8..10].copy_from_slice(&now.to_ne_bytes());
    keep_who(entry)
}

/// Whether the kernel asks nobody about such a one in any case: everybody, groups, and oneself.
fn is_without_asking(entry: &Entry) -> bool {
    let first = |attribute| entry.get(attribute).and_then(|value| value.first().copied()).unwrap_or(0);
    let is_group = if entry.header[0] == V4 { first(NDA_DST) >= 224 } else { first(NDA_DST) == 0xff };
    is_group || first(NDA_LLADDR) & 1 != 0 || index_of(&entry.header) == Some(super::LOOPBACK)
}

fn keep_who(entry: &mut Entry) -> bool {
    // NDA_DST, NDA_LLADDR, NDA_PROTOCOL, NDA_FLAGS_EXT.
    entry.keep(&[NDA_DST, NDA_LLADDR, 12, NDA_FLAGS_EXT]);
    true
}

/// Those that bridges have learnt they learn again; a bridge's own and its ports' addresses are there without being given.
fn keep_bridged(entry: &mut Entry) -> bool {
    let by_hand = state(entry) == NUD_NOARP && entry.get(NDA_MASTER).is_some();
    // NDA_LLADDR, NDA_VLAN.
    entry.keep(&[NDA_LLADDR, 5]);
    entry.header[10] |= NTF_MASTER;
    by_hand
}

/// Those of groups come and go with whoever listens to them.
fn keep_heard(entry: &mut Entry) -> bool {
    let is_one = entry.get(NDA_LLADDR).and_then(<[u8]>::first).is_some_and(|first| first & 1 == 0);
    let of_interface = entry.header[10] & NTF_SELF != 0 && entry.get(NDA_MASTER).is_none();
    entry.keep(&[NDA_LLADDR]);
    entry.header[10] = NTF_SELF;
    is_one && of_interface
}

fn keep_route(mut entry: Entry) -> Result<Option<ByteBuf>, String> {
    let (protocol, length) = (entry.header[5], entry.header[1]);
    let is_local = entry.get(libc::RTA_TABLE).and_then(word) == Some(libc::RT_TABLE_LOCAL.into());
    let cloned = entry.header[8..12].iter().rev().fold(0, |sum, byte| sum << 8 | u32::from(*byte)) & 0x200 != 0;
    if cloned || protocol == RTPROT_RA || (protocol == RTPROT_KERNEL && is_local) {
        return Ok(None);
    }
    if let Some(what) = [(RTA_ENCAP, "in which packets are wrapped"), (RTA_NEXTHOP, "to an object of its own")]
        .iter()
        .find_map(|(kind, what)| entry.get(*kind).map(|_| what))
    {
        return Err(format!("has a route {what} (its length is {length})"));
    }
    entry.mask(8, NEXTHOP_FLAGS.into());
    let expires = entry.get(RTA_CACHEINFO).and_then(|times| word(times.get(8..)?)).filter(|ticks| *ticks != 0);
    // RTA_DST, SRC, IIF, OIF, GATEWAY, PRIORITY, PREFSRC, METRICS, MULTIPATH, FLOW, TABLE, MARK, VIA, PREF.
    entry.keep(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 15, 16, 18, 20]);
    if let Some(ticks) = expires {
        entry.set(RTA_EXPIRES, ticks.div_ceil(CLOCK_TICKS).to_ne_bytes().to_vec());
    }
    if let Some((_, hops)) = entry.attributes.iter_mut().find(|(kind, _)| *kind == libc::RTA_MULTIPATH) {
        mask_hops(hops);
    }
    Ok(Some(entry.bytes()))
}

/// A list of `struct rtnexthop`: length, flags, weight, interface, attributes.
fn mask_hops(mut hops: &mut [u8]) {
    while let Some(length) = hops.first_chunk().map(|length| usize::from(u16::from_ne_bytes(*length))) {
        if length < 8 || length > hops.len() {
            return;
        }
        hops[2] &= NEXTHOP_FLAGS;
        let next = length.next_multiple_of(4).min(hops.len());
        hops = &mut hops[next..];
    }
}

/// Those without a number are the kernel's.
fn keep_queue(mut entry: Entry) -> Result<Option<ByteBuf>, String> {
    let number = |at: usize| entry.header.get(at..).and_then(word).unwrap_or(0);
    let kind = text(entry.get(TCA_KIND).unwrap_or_default());
    if number(8) == 0 || kind == "noqueue" {
        return Ok(None);
    }
    if number(12) != TC_ROOT || !QUEUES.contains(&kind.as_str()) {
        return Err(format!("has the queueing discipline {kind}"));
    }
    // How many hold it.
    entry.mask(16, 0);
    entry.keep(&[TCA_KIND, TCA_OPTIONS]);
    Ok(Some(entry.bytes()))
}
