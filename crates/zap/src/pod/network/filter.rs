//! Rules of the packet filter (nf_tables), as requests to the kernel: no `nft` program is needed, and none is waited for.

use std::io;
use std::net::IpAddr;

use super::netlink::{Attributes, Batch, Channel, Failed, attribute};
use super::{NetworkError, kernel};

mod rule;

pub(super) use rule::{Base, Checksum, Rule};

const NFNL_MSG_BATCH_BEGIN: u16 = 0x10;
const NFNL_MSG_BATCH_END: u16 = 0x11;
const SUBSYSTEM: u16 = libc::NFNL_SUBSYS_NFTABLES as u16;
const CREATE: i32 = libc::NLM_F_CREATE;
const LIST_ELEMENT: u16 = 1;
const DATA_VALUE: u16 = 1;

/// The kinds of attributes (`NFTA_…` of linux/netfilter/nf_tables.h).
mod kind {
    pub(super) const TABLE_NAME: u16 = 1;
    pub(super) const TABLE_USERDATA: u16 = 6;
    pub(super) const CHAIN_TABLE: u16 = 1;
    pub(super) const CHAIN_NAME: u16 = 3;
    pub(super) const CHAIN_HOOK: u16 = 4;
    pub(super) const CHAIN_TYPE: u16 = 7;
    pub(super) const HOOK_HOOKNUM: u16 = 1;
    pub(super) const HOOK_PRIORITY: u16 = 2;
    pub(super) const HOOK_DEV: u16 = 3;
    pub(super) const RULE_TABLE: u16 = 1;
    pub(super) const RULE_CHAIN: u16 = 2;
    pub(super) const RULE_EXPRESSIONS: u16 = 4;
    pub(super) const EXPR_NAME: u16 = 1;
    pub(super) const EXPR_DATA: u16 = 2;
    pub(super) const CMP_SREG: u16 = 1;
    pub(super) const CMP_OP: u16 = 2;
    pub(super) const CMP_DATA: u16 = 3;
    pub(super) const META_DREG: u16 = 1;
    pub(super) const META_KEY: u16 = 2;
    pub(super) const PAYLOAD_DREG: u16 = 1;
    pub(super) const PAYLOAD_BASE: u16 = 2;
    pub(super) const PAYLOAD_OFFSET: u16 = 3;
    pub(super) const PAYLOAD_LEN: u16 = 4;
    pub(super) const PAYLOAD_SREG: u16 = 5;
    pub(super) const PAYLOAD_CSUM_TYPE: u16 = 6;
    pub(super) const PAYLOAD_CSUM_OFFSET: u16 = 7;
    pub(super) const PAYLOAD_CSUM_FLAGS: u16 = 8;
    pub(super) const IMMEDIATE_DREG: u16 = 1;
    pub(super) const IMMEDIATE_DATA: u16 = 2;
    pub(super) const NAT_TYPE: u16 = 1;
    pub(super) const NAT_FAMILY: u16 = 2;
    pub(super) const NAT_REG_ADDR_MIN: u16 = 3;
    pub(super) const NAT_REG_PROTO_MIN: u16 = 5;
    pub(super) const NAT_FLAGS: u16 = 7;
    pub(super) const REJECT_TYPE: u16 = 1;
    pub(super) const REJECT_ICMP_CODE: u16 = 2;
    pub(super) const VERDICT_CODE: u16 = 1;
    pub(super) const VERDICT_CHAIN: u16 = 2;
    pub(super) const SET_TABLE: u16 = 1;
    pub(super) const SET_NAME: u16 = 2;
    pub(super) const SET_FLAGS: u16 = 3;
    pub(super) const SET_KEY_TYPE: u16 = 4;
    pub(super) const SET_KEY_LEN: u16 = 5;
    pub(super) const SET_DESCRIPTION: u16 = 9;
    pub(super) const SET_ID: u16 = 10;
    pub(super) const SET_SIZE: u16 = 1;
    pub(super) const ELEMENTS_TABLE: u16 = 1;
    pub(super) const ELEMENTS_SET: u16 = 2;
    pub(super) const ELEMENTS_LIST: u16 = 3;
    pub(super) const ELEMENT_KEY: u16 = 1;
    pub(super) const LOOKUP_SET: u16 = 1;
    pub(super) const LOOKUP_SREG: u16 = 2;
    pub(super) const FORWARD_DEVICE: u16 = 1;
    pub(super) const DYNSET_NAME: u16 = 1;
    pub(super) const DYNSET_OPERATION: u16 = 3;
    pub(super) const DYNSET_KEY: u16 = 4;
    pub(super) const DYNSET_TIMEOUT: u16 = 6;
    pub(super) const FIB_DREG: u16 = 1;
    pub(super) const FIB_RESULT: u16 = 2;
    pub(super) const FIB_FLAGS: u16 = 3;
    pub(super) const BITWISE_SREG: u16 = 1;
    pub(super) const BITWISE_DREG: u16 = 2;
    pub(super) const BITWISE_LEN: u16 = 3;
    pub(super) const BITWISE_MASK: u16 = 4;
    pub(super) const BITWISE_XOR: u16 = 5;
}

/// Which packets a table sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Family {
    /// IPv4 and IPv6 packets of the host.
    Inet = 1,
    /// Frames of one device.
    Device = 5,
}

/// Where a chain sits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hook {
    /// Before routing.
    Prerouting,
    /// Neither from this host nor for it.
    Forward,
    /// Made by the host itself.
    Output,
    /// After routing.
    Postrouting,
    /// Come in by a device.
    Ingress,
    /// About to leave by a device.
    Egress,
}

impl Hook {
    fn number(self) -> u32 {
        match self {
            Hook::Prerouting | Hook::Ingress => 0,
            Hook::Egress => 1,
            Hook::Forward => 2,
            Hook::Output => 3,
            Hook::Postrouting => 4,
        }
    }
}

/// A table that is made in one transaction.
pub(super) struct Ruleset {
    batch: Batch,
    family: Family,
    table: String,
}

impl Ruleset {
    /// A table of that name, which must not be there yet.
    pub(super) fn new(family: Family, table: &str) -> Ruleset {
        Ruleset::described(family, table, "")
    }

    /// The same with a comment, for whoever lists it and for [`tables`].
    pub(super) fn described(family: Family, table: &str, comment: &str) -> Ruleset {
        let mut batch = Batch::default();
        begin(&mut batch);
        let flags = CREATE | libc::NLM_F_EXCL;
        request(&mut batch, family, libc::NFT_MSG_NEWTABLE, flags, table, |attributes| {
            attributes.put_str(kind::TABLE_NAME, table);
            if let (false, Ok(length)) = (comment.is_empty(), u8::try_from(comment.len() + 1)) {
                attributes.put(kind::TABLE_USERDATA, &[&COMMENT, &[length][..], comment.as_bytes(), &[0]].concat());
            }
        });
        Ruleset { batch, family, table: table.to_owned() }
    }

    /// A chain of it that packets come to: of type `filter` or `nat`.
    pub(super) fn chain(&mut self, name: &str, kind: &str, hook: Hook, priority: i32, device: Option<&str>) {
        let table = self.table.clone();
        request(&mut self.batch, self.family, libc::NFT_MSG_NEWCHAIN, CREATE, &table, |chain| {
            chain.put_str(kind::CHAIN_TABLE, &table).put_str(kind::CHAIN_NAME, name);
            chain.nest(kind::CHAIN_HOOK, |at| {
                at.put_be32(kind::HOOK_HOOKNUM, hook.number());
                at.put_be32(kind::HOOK_PRIORITY, priority as u32);
                if let Some(device) = device {
                    at.put_str(kind::HOOK_DEV, device);
                }
            });
            chain.put_str(kind::CHAIN_TYPE, kind);
        });
    }

    /// A chain of it that packets come to from another one ([`Rule::go_to`]).
    pub(super) fn side_chain(&mut self, name: &str) {
        let table = self.table.clone();
        request(&mut self.batch, self.family, libc::NFT_MSG_NEWCHAIN, CREATE, &table, |chain| {
            chain.put_str(kind::CHAIN_TABLE, &table).put_str(kind::CHAIN_NAME, name);
        });
    }

    /// A set of it, of addresses of a family with ports or other marks, to which rules add and which forgets.
    pub(super) fn set(&mut self, name: &str, family: IpAddr) {
        // For whoever lists it with `nft`: ipv4_addr or ipv6_addr, and behind it inet_service.
        let (kind, length) = if family.is_ipv4() { (7 << 6 | 13, 8) } else { (8 << 6 | 13, 20) };
        self.set_of(name, kind, length);
    }

    /// Likewise of pairs of ports.
    pub(super) fn set_of_ports(&mut self, name: &str) {
        self.set_of(name, 13 << 6 | 13, 8);
    }

    fn set_of(&mut self, name: &str, kind: u32, length: u32) {
        const MOST: u32 = 65_535;
        let table = self.table.clone();
        request(&mut self.batch, self.family, libc::NFT_MSG_NEWSET, CREATE, &table, |set| {
            set.put_str(kind::SET_TABLE, &table).put_str(kind::SET_NAME, name);
            set.put_be32(kind::SET_FLAGS, (libc::NFT_SET_TIMEOUT | libc::NFT_SET_EVAL) as u32);
            set.put_be32(kind::SET_KEY_TYPE, kind).put_be32(kind::SET_KEY_LEN, length).put_be32(kind::SET_ID, 1);
            set.nest(kind::SET_DESCRIPTION, |description| {
                description.put_be32(kind::SET_SIZE, MOST);
            });
        });
    }

    /// A rule at the end of a chain.
    pub(super) fn rule(&mut self, chain: &str, rule: Rule) {
        let table = self.table.clone();
        let flags = CREATE | libc::NLM_F_APPEND;
        request(&mut self.batch, self.family, libc::NFT_MSG_NEWRULE, flags, &table, |attributes| {
            attributes.put_str(kind::RULE_TABLE, &table).put_str(kind::RULE_CHAIN, chain);
            attributes.put(kind::RULE_EXPRESSIONS | libc::NLA_F_NESTED as u16, rule.0.bytes());
        });
    }

    /// Makes it, whole or not at all.
    pub(super) fn make(mut self) -> Result<(), NetworkError> {
        end(&mut self.batch);
        Ok(open()?.run(&self.batch)?)
    }
}

/// Adds keys to a set, for as long as it is there.
pub(super) fn add_keys(family: Family, table: &str, set: &str, keys: &[Vec<u8>]) -> Result<(), NetworkError> {
    // An attribute has room for 65,531 bytes.
    const TOGETHER: usize = 1000;
    if keys.is_empty() {
        return Ok(());
    }
    let mut batch = Batch::default();
    begin(&mut batch);
    for keys in keys.chunks(TOGETHER) {
        request(&mut batch, family, libc::NFT_MSG_NEWSETELEM, CREATE, table, |attributes| {
            attributes.put_str(kind::ELEMENTS_TABLE, table).put_str(kind::ELEMENTS_SET, set);
            attributes.nest(kind::ELEMENTS_LIST, |list| {
                for key in keys {
                    list.nest(LIST_ELEMENT, |element| {
                        element.nest(kind::ELEMENT_KEY, |value| {
                            value.put(DATA_VALUE, key);
                        });
                    });
                }
            });
        });
    }
    end(&mut batch);
    let channel = Channel::filter_with_room(&batch).map_err(kernel("opening", "the packet filter"))?;
    Ok(channel.run(&batch)?)
}

/// The tables of a family: their names, and what they have as a comment.
pub(super) fn tables(family: Family) -> Result<Vec<(String, String)>, NetworkError> {
    let question = header(family as u8, 0);
    let shown = open()?.ask(SUBSYSTEM << 8 | libc::NFT_MSG_GETTABLE as u16, libc::NLM_F_DUMP, &question);
    let shown = shown.map_err(kernel("listing", "the packet filter's tables"))?;
    Ok(shown.iter().filter_map(|body| name_and_comment(body.get(question.len()..)?)).collect())
}

fn name_and_comment(shown: &[u8]) -> Option<(String, String)> {
    let get = |wanted: u16| attribute(shown, wanted);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes.strip_suffix(&[0]).unwrap_or(bytes)).into_owned();
    // Kind, length, text.
    let comment = get(kind::TABLE_USERDATA).and_then(|data| data.strip_prefix(&COMMENT)?.get(1..));
    Some((text(get(kind::TABLE_NAME)?), comment.map(text).unwrap_or_default()))
}

/// Reads some bytes as a table of the packet filter.
pub(super) fn try_answer(bytes: &[u8]) {
    drop(name_and_comment(bytes));
}

/// What begins a comment among what users note about a table.
const COMMENT: [u8; 1] = [0];

/// A message that makes part of a filter, as the kernel shows it.
pub(crate) struct Message<'a> {
    /// `NFT_MSG_NEW…`.
    pub(crate) kind: u16,
    /// Which packets its table sees.
    pub(crate) family: u8,
    /// Whether it comes after those that are there.
    pub(crate) appends: bool,
    /// What it is.
    pub(crate) attributes: &'a [u8],
}

/// The number of a message about tables.
pub(crate) fn of_tables(message: u16) -> u16 {
    SUBSYSTEM << 8 | message
}

/// Makes everything that the messages say, or nothing.
pub(crate) fn make<'a>(messages: impl Iterator<Item = Message<'a>>) -> Result<(), Failed> {
    let mut batch = Batch::default();
    begin(&mut batch);
    for message in messages {
        let body = [&header(message.family, 0), message.attributes].concat();
        let flags = CREATE | if message.appends { libc::NLM_F_APPEND } else { libc::NLM_F_EXCL };
        batch.push(("making", "a packet filter"), (of_tables(message.kind), flags), &body, |_| {});
    }
    end(&mut batch);
    let failed = |source| Failed { step: "opening", object: "the packet filter".into(), source };
    Channel::filter_with_room(&batch).map_err(failed)?.run(&batch)
}

/// Whether there is a table of that name.
pub(super) fn has_table(family: Family, table: &str) -> Result<bool, NetworkError> {
    let mut asked = Attributes::default();
    asked.put_str(kind::TABLE_NAME, table);
    let question = [&header(family as u8, 0), asked.bytes()].concat();
    match open()?.ask(SUBSYSTEM << 8 | libc::NFT_MSG_GETTABLE as u16, 0, &question) {
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        other => other.map(|_| true).map_err(kernel("looking for the packet filter's table", table)),
    }
}

/// Removes a table, if it is there. That is asked first: to give up a transaction the kernel waits for all readers of its
/// tables, many milliseconds.
pub(super) fn delete_table(family: Family, table: &str) -> Result<(), NetworkError> {
    if !has_table(family, table)? {
        return Ok(());
    }
    let mut batch = Batch::default();
    begin(&mut batch);
    request(&mut batch, family, libc::NFT_MSG_DELTABLE, 0, table, |attributes| {
        attributes.put_str(kind::TABLE_NAME, table);
    });
    end(&mut batch);
    match open()?.run(&batch) {
        Err(failed) if failed.source.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        other => Ok(other?),
    }
}

fn open() -> Result<Channel, NetworkError> {
    Channel::filter().map_err(|e| match e.raw_os_error() {
        Some(libc::EPROTONOSUPPORT) => NetworkError::Lacks("nftables in its kernel".to_owned()),
        _ => kernel("opening", "the packet filter")(e),
    })
}

fn begin(batch: &mut Batch) {
    batch.mark(NFNL_MSG_BATCH_BEGIN, &header(0, SUBSYSTEM));
}

fn end(batch: &mut Batch) {
    batch.mark(NFNL_MSG_BATCH_END, &header(0, SUBSYSTEM));
}

/// struct nfgenmsg: family, version, resource (in network byte order).
fn header(family: u8, resource: u16) -> [u8; 4] {
    let [high, low] = resource.to_be_bytes();
    [family, 0, high, low]
}

fn request(
    batch: &mut Batch,
    family: Family,
    message: libc::c_int,
    flags: i32,
    table: &str,
    fill: impl FnOnce(&mut Attributes),
) {
    let message = SUBSYSTEM << 8 | message as u16;
    batch.push(("changing the packet filter's table", table), (message, flags), &header(family as u8, 0), fill);
}

/// Whether the kernel has a packet filter that this thread may use.
pub(super) fn is_there() -> io::Result<()> {
    const NFT_MSG_GETGEN: u16 = 16;
    Channel::filter()?.ask(SUBSYSTEM << 8 | NFT_MSG_GETGEN, 0, &header(0, 0)).map(drop)
}
