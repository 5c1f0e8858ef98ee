//! Groups of which ports of a bridge were made members by hand (`bridge mdb`): the kernel lists them by bridges, and takes
//! them one by one.

use serde_bytes::ByteBuf;

use crate::pod::network::netlink::{Attributes, attribute, attributes_of};

/// The message that makes one; those that remove and list come next.
pub(super) const NEW: u16 = 84;
const HEADER: usize = 8;
/// `struct br_mdb_entry`.
const LENGTH: usize = 28;
const STATE: usize = 4;
const FLAGS: usize = 5;
const PERMANENT: u8 = 1;
/// Made for the sources of another.
const OF_ANOTHER: u8 = 1 << 2;
/// All of these are the first of their kind.
const LIST: u16 = 1;
const ENTRY: u16 = 1;
const ATTRIBUTES: u16 = 2 | libc::NLA_F_NESTED as u16;
/// How it is shown from where members hear it, and who has said so, and how that is told.
const SOURCES: u16 = 2;
const TOLD: [(u16, u16); 2] = [(4, 1), (5, 4)];

/// The members in a list that are so for good, as the kernel takes them.
pub(super) fn kept(body: &[u8]) -> Vec<Result<ByteBuf, String>> {
    let Some((header, rest)) = body.split_at_checked(HEADER) else { return Vec::new() };
    let inside = |all| attributes_of(all, LIST);
    let entries = inside(rest).flat_map(inside).flat_map(inside);
    entries.filter_map(|one| member(header, one).transpose()).collect()
}

fn member(header: &[u8], one: &[u8]) -> Result<Option<ByteBuf>, String> {
    let Some((entry, rest)) = one.split_at_checked(LENGTH) else { return Ok(None) };
    if entry[STATE] != PERMANENT || entry[FLAGS] & OF_ANOTHER != 0 {
        return Ok(None);
    }
    if attributes_of(rest, SOURCES).any(|sources| !sources.is_empty()) {
        return Err("has a group of a bridge with a list of sources".to_owned());
    }
    let mut entry = entry.to_vec();
    entry[FLAGS] = 0;
    let mut told = Attributes::default();
    told.put(ENTRY, &entry).nest(ATTRIBUTES, |inside| {
        for (shown, taken) in TOLD {
            if let Some(value) = attribute(rest, shown) {
                inside.put(taken, value);
            }
        }
    });
    let mut bytes = [header, told.bytes()].concat();
    // Listed, it is of no family.
    bytes[0] = libc::AF_BRIDGE as u8;
    Ok(Some(ByteBuf::from(bytes)))
}
