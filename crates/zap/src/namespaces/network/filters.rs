//! Packet filters (nf_tables) that were made in a namespace, as the kernel's own messages. What zap makes itself it makes in
//! `pod::network::filter`.

use std::io;

use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

use super::connections;
use super::requests::{pieces, text};
use crate::pod::network::filter::{self, Message};
use crate::pod::network::netlink::{Attributes, Channel, attribute, attributes, attributes_of};

/// Packet filters, and the connections that they know.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilterState {
    /// Tables, chains, objects, sets, elements, rules: each can be made when those before it are there.
    pub parts: Vec<Part>,
    /// Connections that are followed, as the kernel takes them.
    pub connections: Vec<ByteBuf>,
}

/// A part of a filter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// The message that makes it.
    pub message: u16,
    /// Which packets its table sees.
    pub family: u8,
    /// What it is, as the kernel's attributes.
    pub attributes: ByteBuf,
}

/// A kind of parts: the messages that make one and list them, and the attributes that are given back.
struct Kind {
    make: u16,
    list: u16,
    kept: &'static [u16],
}

const KINDS: [Kind; 5] = [
    Kind { make: 0, list: 1, kept: &[1, 2, 6] },
    Kind { make: 3, list: 4, kept: &[1, 3, 4, 5, 7, 8, 10, 12] },
    Kind { make: 18, list: 19, kept: &[1, 2, 3, 4, 8] },
    Kind { make: SET, list: 10, kept: &[1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 15, 17, 18] },
    Kind { make: RULE, list: 7, kept: &[1, 2, 4, 7] },
];
const TABLE: u16 = 0;
const CHAIN: u16 = 3;
const RULE: u16 = 6;
const SET: u16 = 9;
const ELEMENTS: u16 = 12;
const GET_ELEMENTS: u16 = 13;
const OBJECT: u16 = 18;
const GET_FLOWTABLES: u16 = 23;
/// `NFTA_TABLE_FLAGS` and `NFT_TABLE_F_OWNER`; `NFTA_CHAIN_FLAGS` and `NFT_CHAIN_BINDING`.
const OWNED: (u16, u16, u32) = (TABLE, 2, 2);
const WITHIN_RULE: (u16, u16, u32) = (CHAIN, 10, 4);
const SET_TABLE: u16 = 1;
const SET_NAME: u16 = 2;
const SET_ID: u16 = 10;
const ELEMENT_LIST: u16 = 3;
const ONE: u16 = 1;
const RULE_EXPRESSIONS: u16 = 4;
const EXPRESSION_NAME: u16 = 1;
/// What iptables made, and what belongs to tables of flows.
const NOT_KEPT: [&str; 3] = ["match", "target", "flow_offload"];
const NESTED: u16 = libc::NLA_F_NESTED as u16;
/// Bytes of elements that go together: an attribute holds less than 64 KiB.
const MOST_BYTES: usize = 32 << 10;
const DUMP: i32 = libc::NLM_F_DUMP;

/// What there is in the caller's namespace, or why it could not be made anew. A host without packet filters has none.
pub(super) fn capture() -> io::Result<Result<FilterState, String>> {
    let Ok(channel) = Channel::filter() else { return Ok(Ok(FilterState::default())) };
    let mut parts = match list(&channel, &KINDS[0]) {
        Err(_) => return Ok(Ok(FilterState::default())),
        Ok(tables) if tables.is_empty() => return Ok(Ok(FilterState::default())),
        Ok(tables) => tables,
    };
    if channel.ask(filter::of_tables(GET_FLOWTABLES), DUMP, &[0; 4]).is_ok_and(|found| !found.is_empty()) {
        return Ok(Err("has tables of flows (flowtable)".into()));
    }
    for kind in &KINDS[1..] {
        if kind.make == RULE {
            let sets: Vec<Part> = parts.iter().filter(|part| part.message == SET).cloned().collect();
            for set in sets {
                parts.extend(elements(&channel, &set)?);
            }
        }
        parts.extend(list(&channel, kind)?);
    }
    number_sets(&mut parts);
    if let Some(why) = parts.iter().find_map(Part::refusal) {
        return Ok(Err(why));
    }
    Ok(Ok(FilterState { parts, connections: connections::capture(&channel)? }))
}

fn list(channel: &Channel, kind: &Kind) -> io::Result<Vec<Part>> {
    let found = channel.ask(filter::of_tables(kind.list), DUMP, &[0; 4])?;
    Ok(found.iter().filter_map(|body| kind.part(body)).collect())
}

impl Kind {
    /// A part that the kernel shows.
    fn part(&self, body: &[u8]) -> Option<Part> {
        let kept = pieces(body.get(4..)?).filter(|(number, ..)| self.kept.contains(number));
        let attributes: Vec<u8> = kept.flat_map(|(_, _, whole)| whole.to_vec()).collect();
        Some(Part { message: self.make, family: *body.first()?, attributes: attributes.into() })
    }
}

/// Reads some bytes as parts that the kernel shows, and as ones of an image.
pub(super) fn try_answer(bytes: &[u8]) {
    for kind in &KINDS {
        let told = Part { message: kind.make, family: 0, attributes: ByteBuf::from(bytes) };
        let mut parts: Vec<Part> = kind.part(bytes).into_iter().chain([told]).collect();
        parts.iter().for_each(|part| drop(part.refusal()));
        for part in parts.clone() {
            parts.extend(elements_of(&part, &[bytes.to_vec()]));
        }
        number_sets(&mut parts);
    }
}

/// The elements of a set. The ends of ranges are listed before their beginnings, and are to come after them.
fn elements(channel: &Channel, set: &Part) -> io::Result<Vec<Part>> {
    let name = set.name();
    let question = [&[set.family, 0, 0, 0], name.bytes()].concat();
    Ok(elements_of(set, &channel.ask(filter::of_tables(GET_ELEMENTS), DUMP, &question)?))
}

fn elements_of(set: &Part, shown: &[Vec<u8>]) -> Vec<Part> {
    let name = set.name();
    let mut all = Vec::new();
    for body in shown {
        let lists = attributes_of(body.get(4..).unwrap_or_default(), ELEMENT_LIST);
        all.extend(lists.flat_map(|list| attributes(list).map(|(_, one)| one.to_vec()).collect::<Vec<_>>()));
    }
    let (mut parts, mut some) = (Vec::new(), Attributes::default());
    for (at, one) in all.iter().rev().enumerate() {
        some.put(ONE | NESTED, one);
        if some.bytes().len() > MOST_BYTES || at + 1 == all.len() {
            let mut list = Attributes::default();
            list.put(ELEMENT_LIST | NESTED, some.bytes());
            let attributes = [name.bytes(), list.bytes()].concat();
            parts.push(Part { message: ELEMENTS, family: set.family, attributes: attributes.into() });
            some = Attributes::default();
        }
    }
    parts
}

/// Each set of a transaction has a number.
fn number_sets(parts: &mut [Part]) {
    for (part, number) in parts.iter_mut().filter(|part| part.message == SET).zip(1..) {
        let mut id = Attributes::default();
        id.put_be32(SET_ID, number);
        part.attributes.extend(id.bytes());
    }
}

impl Part {
    fn get(&self, wanted: u16) -> Option<&[u8]> {
        attribute(&self.attributes, wanted)
    }

    /// What a set is named by.
    fn name(&self) -> Attributes {
        let mut name = Attributes::default();
        for wanted in [SET_TABLE, SET_NAME] {
            name.put(wanted, self.get(wanted).unwrap_or_default());
        }
        name
    }

    /// Why it could not be made anew.
    fn refusal(&self) -> Option<String> {
        let has = |(message, kind, flag): (u16, u16, u32)| {
            let flags =
                self.get(kind).and_then(|flags| flags.first_chunk()).map_or(0, |flags| u32::from_be_bytes(*flags));
            self.message == message && flags & flag != 0
        };
        if has(OWNED) {
            return Some("has a table of packet filters that belongs to a socket".into());
        }
        if has(WITHIN_RULE) {
            return Some("has a packet filter with a chain within a rule".into());
        }
        let expressions = self.get(RULE_EXPRESSIONS).filter(|_| self.message == RULE).unwrap_or_default();
        let mut names = attributes(expressions).filter_map(|(_, expression)| {
            let name = attribute(expression, EXPRESSION_NAME)?;
            Some(text(name))
        });
        let name = names.find(|name| NOT_KEPT.contains(&name.as_str()))?;
        Some(format!("has a packet filter of the kind {name}"))
    }
}

/// Makes them in the caller's namespace, whole or not at all, and has it know the connections that it knew.
pub(super) fn restart(state: &FilterState) -> io::Result<()> {
    if state.parts.is_empty() {
        return Ok(());
    }
    let known = |part: &&Part| [TABLE, CHAIN, RULE, SET, ELEMENTS, OBJECT].contains(&part.message);
    let messages = state.parts.iter().filter(known).map(|part| Message {
        kind: part.message,
        family: part.family,
        appends: part.message == RULE,
        attributes: &part.attributes,
    });
    filter::make(messages).map_err(|failed| failed.in_words())?;
    connections::restart(&Channel::filter()?, &state.connections)
}
