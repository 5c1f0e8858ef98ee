//! Connections that the packet filter of a namespace follows (conntrack): without them it would take their packets for those
//! of strangers, and forget how their addresses are translated.

use std::io;

use serde_bytes::ByteBuf;

use super::requests::{Requests, pieces};
use crate::pod::network::netlink::{Attributes, Channel, attribute, attributes};

const NEW: u16 = (libc::NFNL_SUBSYS_CTNETLINK as u16) << 8;
const GET: u16 = NEW | 1;
const CREATE: i32 = libc::NLM_F_CREATE | libc::NLM_F_EXCL;

/// `CTA_…`.
const ORIGINAL: u16 = 1;
const REPLY: u16 = 2;
const STATUS: u16 = 3;
const PROTOCOL: u16 = 4;
const SOURCE_TRANSLATED: u16 = 6;
const DESTINATION_TRANSLATED: u16 = 13;
/// Its helper, time that it has left, mark, corrections of sequence numbers, zone, labels.
const AS_THEY_ARE: [u16; 7] = [5, 7, 8, 15, 16, 18, 22];
/// Parts of a direction: addresses, and what the protocol has.
const ADDRESSES: u16 = 1;
const PORTS: u16 = 2;
const SOURCE_PORT: u16 = 2;
const DESTINATION_PORT: u16 = 3;
const RANGE_OF_PORTS: u16 = 3;
/// `IPS_CONFIRMED`, which all have, and translations, which are given otherwise.
const CONFIRMED: u32 = 8;
const HAS_SOURCE: u32 = 0x10;
const HAS_DESTINATION: u32 = 0x20;
const OF_TRANSLATION: u32 = 0x10 | 0x20 | 0x40 | 0x80 | 0x100 | 0x200;
const TCP: u16 = 1;
/// Flags of both directions of a TCP connection, and `IP_CT_TCP_FLAG_BE_LIBERAL`: windows are not shown, and are learnt again.
const TCP_FLAGS: [u16; 2] = [4, 5];
const LIBERAL: u8 = 8;

/// Those that the caller's namespace follows, as it takes them.
pub(super) fn capture(filter: &Channel) -> io::Result<Vec<ByteBuf>> {
    match filter.ask(GET, libc::NLM_F_DUMP, &[0; 4]) {
        // The host follows none.
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(Vec::new()),
        found => Ok(found?.iter().filter_map(|body| taken(body)).collect()),
    }
}

/// Has the caller's namespace follow them.
pub(super) fn restart(filter: &Channel, all: &[ByteBuf]) -> io::Result<()> {
    let mut requests = Requests::new(filter);
    for one in all {
        requests.push(("adding", "a connection to the packet filter"), (NEW, CREATE), one, |_| {})?;
        // A packet may have come first, or a helper be missing: it is followed as one that was met on its way.
        requests.optional();
    }
    requests.run()
}

/// One direction of a connection.
struct Direction {
    addresses: Vec<(u16, Vec<u8>)>,
    ports: Vec<(u16, Vec<u8>)>,
}

fn all(bytes: &[u8]) -> Vec<(u16, Vec<u8>)> {
    attributes(bytes).map(|(kind, value)| (kind, value.to_vec())).collect()
}

fn find(all: &[(u16, Vec<u8>)], wanted: u16) -> Option<&Vec<u8>> {
    all.iter().find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
}

fn set(all: &mut [(u16, Vec<u8>)], wanted: u16, value: Option<Vec<u8>>) -> Option<Vec<u8>> {
    let (_, old) = all.iter_mut().find(|(kind, _)| *kind == wanted)?;
    value.map(|value| std::mem::replace(old, value))
}

fn put_all(attributes: &mut Attributes, all: &[(u16, Vec<u8>)]) {
    for (kind, value) in all {
        attributes.put(*kind, value);
    }
}

impl Direction {
    fn of(bytes: &[u8]) -> Option<Direction> {
        let parts = all(bytes);
        Some(Direction { addresses: all(find(&parts, ADDRESSES)?), ports: all(find(&parts, PORTS)?) })
    }

    fn put(&self, kind: u16, attributes: &mut Attributes) {
        attributes.nest(kind, |direction| {
            direction.nest(ADDRESSES, |inside| put_all(inside, &self.addresses));
            direction.nest(PORTS, |inside| put_all(inside, &self.ports));
        });
    }
}

/// Where the addresses of a direction are, by the family.
struct Numbers {
    source: u16,
    destination: u16,
    /// The lowest and the highest of a translation.
    range: [u16; 2],
}

/// A connection as the kernel takes it, from one as it shows it.
///
/// It shows what comes back as it will look, and takes what would come back without translation, and the translation.
fn taken(body: &[u8]) -> Option<ByteBuf> {
    let (family, shown) = (*body.first()?, body.get(4..)?);
    let get = |wanted: u16| attribute(shown, wanted);
    let (original, mut reply) = (Direction::of(get(ORIGINAL)?)?, Direction::of(get(REPLY)?)?);
    let status = u32::from_be_bytes(*get(STATUS)?.first_chunk()?);
    let numbers = match i32::from(family) {
        libc::AF_INET => Numbers { source: 1, destination: 2, range: [1, 2] },
        libc::AF_INET6 => Numbers { source: 3, destination: 4, range: [4, 5] },
        _ => return None,
    };
    let mut translations = Attributes::default();
    let mut undo = |kind: u16, [ours, theirs]: [u16; 2], [our_port, their_port]: [u16; 2]| {
        let address = set(&mut reply.addresses, ours, find(&original.addresses, theirs).cloned());
        let port = set(&mut reply.ports, our_port, find(&original.ports, their_port).cloned());
        translations.nest(kind, |range| {
            if let Some(address) = &address {
                numbers.range.iter().for_each(|bound| {
                    range.put(*bound, address);
                });
            }
            if let Some(port) = &port {
                range.nest(RANGE_OF_PORTS, |ports| {
                    ports.put(1, port).put(2, port);
                });
            }
        });
    };
    let Numbers { source, destination, .. } = numbers;
    if status & HAS_SOURCE != 0 {
        undo(SOURCE_TRANSLATED, [destination, source], [DESTINATION_PORT, SOURCE_PORT]);
    }
    if status & HAS_DESTINATION != 0 {
        undo(DESTINATION_TRANSLATED, [source, destination], [SOURCE_PORT, DESTINATION_PORT]);
    }
    let mut given = Attributes::default();
    original.put(ORIGINAL, &mut given);
    reply.put(REPLY, &mut given);
    given.put_be32(STATUS, status & !OF_TRANSLATION | CONFIRMED);
    if let Some(tcp) = get(PROTOCOL).and_then(|protocol| attribute(protocol, TCP)) {
        given.nest(PROTOCOL, |protocol| {
            protocol.nest(TCP, |state| put_tcp(state, tcp));
        });
    }
    let others = pieces(shown).filter(|(kind, ..)| AS_THEY_ARE.contains(kind));
    let others: Vec<u8> = others.flat_map(|(_, _, whole)| whole.to_vec()).collect();
    let header = [family, 0, 0, 0];
    Some(ByteBuf::from([&header, given.bytes(), translations.bytes(), &others].concat()))
}

/// The state of a TCP connection. It shows flags, and takes them with a mask of those that are meant.
fn put_tcp(state: &mut Attributes, shown: &[u8]) {
    for (kind, value) in attributes(shown) {
        match value.first().filter(|_| TCP_FLAGS.contains(&kind)) {
            Some(flags) => state.put(kind, &[flags | LIBERAL; 2]),
            None => state.put(kind, value),
        };
    }
}

/// Reads some bytes as a connection that is followed.
pub(super) fn try_answer(bytes: &[u8]) {
    drop(taken(bytes));
}
