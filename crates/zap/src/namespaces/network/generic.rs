//! What parts of the kernel that are spoken with through generic netlink keep for a namespace, as their own messages:
//! endpoints and limits of MPTCP, keys and tunnel sources of SRv6, namespaces and schemas of IOAM.

use std::collections::BTreeMap;
use std::io;

use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

use super::requests::{Requests, pieces};
use super::tables::Entries;
use crate::pod::network::netlink::{Attributes, Channel, attribute};

/// A kind of them, in the order in which they are given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Part {
    /// Addresses that MPTCP may use or tell of.
    MptcpEndpoints,
    /// How many of them a connection may have.
    MptcpLimits,
    /// Keys by which segment routing tells whose packets are whose.
    SegmentKeys,
    /// The address from which it sends.
    SegmentSource,
    /// Namespaces in which packets are measured (IOAM).
    MeasuredNamespaces,
    /// What is told of those beside numbers.
    MeasuredSchemas,
    /// Which of these a namespace has.
    MeasuredBy,
}

/// What is asked and told of each: attributes, as they are listed.
pub(super) type Parts = BTreeMap<Part, Entries>;

/// How a part is spoken with: its family, the commands that list (all at once, or the only one) and make, the attributes that
/// go from one to the other, and the one without which there is nothing to be told.
struct Words {
    family: &'static str,
    list: (u8, i32),
    make: u8,
    kept: &'static [u16],
    needed: u16,
}

const HEADER: usize = 4;
const VERSION: u8 = 1;
const CONTROL: u16 = libc::GENL_ID_CTRL as u16;
const GET_FAMILY: u8 = libc::CTRL_CMD_GETFAMILY as u8;
const FAMILY_ID: u16 = libc::CTRL_ATTR_FAMILY_ID as u16;
const FAMILY_NAME: u16 = libc::CTRL_ATTR_FAMILY_NAME as u16;
const ALL: i32 = libc::NLM_F_DUMP;
const MPTCP: &str = "mptcp_pm";
const SEGMENTS: &str = "SEG6";
const MEASURED: &str = "IOAM6";

impl Part {
    const ALL: [Part; 7] = [
        Part::MptcpEndpoints,
        Part::MptcpLimits,
        Part::SegmentKeys,
        Part::SegmentSource,
        Part::MeasuredNamespaces,
        Part::MeasuredSchemas,
        Part::MeasuredBy,
    ];

    fn words(self) -> Words {
        let words = |family, list, make, kept: &'static [u16], needed| Words { family, list, make, kept, needed };
        match self {
            Part::MptcpEndpoints => words(MPTCP, (3, ALL), 1, &[1], 1),
            Part::MptcpLimits => words(MPTCP, (6, 0), 5, &[2, 3], 2),
            // SEG6_ATTR_HMACKEYID, SECRET, SECRETLEN, ALGID.
            Part::SegmentKeys => words(SEGMENTS, (2, ALL), 1, &[3, 4, 5, 6], 3),
            Part::SegmentSource => words(SEGMENTS, (4, 0), 3, &[1], 1),
            // IOAM6_ATTR_NS_ID, NS_DATA, NS_DATA_WIDE; SC_ID, SC_DATA.
            Part::MeasuredNamespaces => words(MEASURED, (3, ALL), 1, &[1, 2, 3], 1),
            Part::MeasuredSchemas => words(MEASURED, (6, ALL), 4, &[4, 5], 4),
            Part::MeasuredBy => words(MEASURED, (3, ALL), 7, &[1, 4], 4),
        }
    }
}

/// All of the caller's namespace. A host may be without some of these parts of the kernel.
pub(super) fn list() -> io::Result<Parts> {
    let Ok(channel) = Channel::generic() else { return Ok(Parts::new()) };
    let mut found = Parts::new();
    for part in Part::ALL {
        let words = part.words();
        let Some(family) = family(&channel, words.family)? else { continue };
        let bodies = match channel.ask(family, words.list.1, &header(words.list.0)) {
            Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => continue,
            other => other?,
        };
        let entries: Entries = bodies.iter().filter_map(|body| kept(body, &words)).collect();
        if !entries.is_empty() {
            found.insert(part, entries);
        }
    }
    Ok(found)
}

/// Gives the caller's namespace what it does not have already; it is new.
pub(super) fn restart(wanted: &Parts) -> io::Result<()> {
    if wanted.is_empty() {
        return Ok(());
    }
    let (channel, now) = (Channel::generic()?, list()?);
    let mut requests = Requests::new(&channel);
    for (part, entries) in wanted {
        let words = part.words();
        let lacks = || io::Error::new(io::ErrorKind::Unsupported, format!("{} (generic netlink)", words.family));
        let family = family(&channel, words.family)?.ok_or_else(lacks)?;
        for entry in entries.iter().filter(|entry| now.get(part).is_none_or(|now| !now.contains(entry))) {
            let message = [&header(words.make)[..], entry].concat();
            requests.push(("setting up", words.family), (family, 0), &message, |_| {})?;
        }
    }
    requests.run()
}

pub(super) fn header(command: u8) -> [u8; HEADER] {
    [command, VERSION, 0, 0]
}

/// What a part of the kernel goes by today, if it is there.
pub(super) fn family(channel: &Channel, name: &str) -> io::Result<Option<u16>> {
    let mut asked = Attributes::default();
    asked.put_str(FAMILY_NAME, name);
    let answers = match channel.ask(CONTROL, 0, &[&header(GET_FAMILY), asked.bytes()].concat()) {
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
        other => other?,
    };
    let id =
        |body: &Vec<u8>| attribute(body.get(HEADER..)?, FAMILY_ID)?.first_chunk().map(|id| u16::from_ne_bytes(*id));
    Ok(answers.first().and_then(id))
}

fn kept(body: &[u8], words: &Words) -> Option<ByteBuf> {
    let all = || pieces(body.get(HEADER..).unwrap_or_default());
    all().find(|(kind, ..)| *kind == words.needed)?;
    let kept = all().filter(|(kind, ..)| words.kept.contains(kind));
    Some(ByteBuf::from(kept.map(|(.., whole)| whole).collect::<Vec<_>>().concat()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_only_says_how_things_are_is_left_out() {
        let mut told = Attributes::default();
        told.put_u32(2, 7).put_u32(9, 8).put_u32(3, 9);
        let body = [&header(6)[..], told.bytes()].concat();
        let limits = kept(&body, &Part::MptcpLimits.words()).unwrap();
        assert_eq!(limits.len(), 16);
        // A namespace without a schema.
        assert_eq!(kept(&body, &Part::MeasuredBy.words()), None);
    }
}
