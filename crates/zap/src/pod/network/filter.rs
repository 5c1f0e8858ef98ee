//! Rules of the packet filter (nf_tables), as requests to the kernel: no `nft` program is needed, and none is waited for.

use std::io;
use std::net::IpAddr;

use super::netlink::{Attributes, Batch, Channel, Failed, attribute};
use super::{NetworkError, kernel};

const NFNL_MSG_BATCH_BEGIN: u16 = 0x10;
const NFNL_MSG_BATCH_END: u16 = 0x11;
const SUBSYSTEM: u16 = libc::NFNL_SUBSYS_NFTABLES as u16;
const CREATE: i32 = libc::NLM_F_CREATE;
const REGISTER: u32 = 1;
const SECOND_REGISTER: u32 = 2;
/// The first of the registers of four bytes, in which the parts of a key lie side by side.
const KEY_REGISTER: u32 = 8;
const LIST_ELEMENT: u16 = 1;
const DATA_VALUE: u16 = 1;
const DATA_VERDICT: u16 = 2;

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

/// Where in a packet an offset counts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Base {
    /// The Ethernet header.
    Link = 0,
    /// The ARP, IPv4 or IPv6 header.
    Network = 1,
    /// The TCP, UDP or ICMP header.
    Transport = 2,
}

/// Which checksums a change of a packet has to be carried over to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Checksum {
    /// None.
    None,
    /// The one at this offset, of the same header.
    At(u32),
    /// That of the header after it, which counts the addresses in.
    Pseudo,
    /// Both.
    AtAndPseudo(u32),
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

/// One rule: conditions, then what is done.
#[derive(Default)]
pub(super) struct Rule(Attributes);

impl Rule {
    fn expression(mut self, name: &str, fill: impl FnOnce(&mut Attributes)) -> Rule {
        self.0.nest(LIST_ELEMENT, |element| {
            element.put_str(kind::EXPR_NAME, name).nest(kind::EXPR_DATA, fill);
        });
        self
    }

    fn compare(self, operation: libc::c_int, value: &[u8]) -> Rule {
        self.expression("cmp", |e| {
            e.put_be32(kind::CMP_SREG, REGISTER).put_be32(kind::CMP_OP, operation as u32);
            e.nest(kind::CMP_DATA, |data| {
                data.put(DATA_VALUE, value);
            });
        })
    }

    fn meta(self, key: libc::c_int, operation: libc::c_int, value: &[u8]) -> Rule {
        let loaded = self.expression("meta", |e| {
            e.put_be32(kind::META_DREG, REGISTER).put_be32(kind::META_KEY, key as u32);
        });
        loaded.compare(operation, value)
    }

    /// If the frame carries this protocol (an EtherType).
    pub(super) fn ether_type(self, number: u16) -> Rule {
        self.meta(libc::NFT_META_PROTOCOL, libc::NFT_CMP_EQ, &number.to_be_bytes())
    }

    /// If it is of the address family of `address`, in a table that sees both.
    pub(super) fn family_of(self, address: IpAddr) -> Rule {
        let family = if address.is_ipv4() { libc::NFPROTO_IPV4 } else { libc::NFPROTO_IPV6 };
        self.meta(libc::NFT_META_NFPROTO, libc::NFT_CMP_EQ, &[family as u8])
    }

    /// If it carries this protocol (TCP, UDP, ICMP).
    pub(super) fn transport(self, number: i32) -> Rule {
        self.meta(libc::NFT_META_L4PROTO, libc::NFT_CMP_EQ, &[number as u8])
    }

    /// If it carries another one.
    pub(super) fn not_transport(self, number: i32) -> Rule {
        self.meta(libc::NFT_META_L4PROTO, libc::NFT_CMP_NEQ, &[number as u8])
    }

    /// If it came in by this device.
    pub(super) fn in_by(self, device: &str) -> Rule {
        self.meta(libc::NFT_META_IIFNAME, libc::NFT_CMP_EQ, &padded(device))
    }

    /// If it leaves by this device.
    pub(super) fn out_by(self, device: &str) -> Rule {
        self.meta(libc::NFT_META_OIFNAME, libc::NFT_CMP_EQ, &padded(device))
    }

    /// If it leaves by another device.
    pub(super) fn not_out_by(self, device: &str) -> Rule {
        self.meta(libc::NFT_META_OIFNAME, libc::NFT_CMP_NEQ, &padded(device))
    }

    /// If it is for an address of the host itself.
    pub(super) fn for_this_host(self) -> Rule {
        const RESULT_ADDRESS_TYPE: u32 = 3;
        const LOOK_AT_DESTINATION: u32 = 1 << 1;
        let loaded = self.expression("fib", |e| {
            e.put_be32(kind::FIB_DREG, REGISTER).put_be32(kind::FIB_RESULT, RESULT_ADDRESS_TYPE);
            e.put_be32(kind::FIB_FLAGS, LOOK_AT_DESTINATION);
        });
        loaded.compare(libc::NFT_CMP_EQ, &u32::from(libc::RTN_LOCAL).to_ne_bytes())
    }

    fn load(self, base: Base, offset: u32, length: usize) -> Rule {
        self.load_into(REGISTER, base, offset, length)
    }

    fn load_into(self, register: u32, base: Base, offset: u32, length: usize) -> Rule {
        self.expression("payload", |e| {
            e.put_be32(kind::PAYLOAD_DREG, register).put_be32(kind::PAYLOAD_BASE, base as u32);
            e.put_be32(kind::PAYLOAD_OFFSET, offset);
            e.put_be32(kind::PAYLOAD_LEN, length as u32);
        })
    }

    /// If these bytes are there.
    pub(super) fn has(self, base: Base, offset: u32, value: &[u8]) -> Rule {
        self.load(base, offset, value.len()).compare(libc::NFT_CMP_EQ, value)
    }

    /// If other bytes are there.
    pub(super) fn has_not(self, base: Base, offset: u32, value: &[u8]) -> Rule {
        self.load(base, offset, value.len()).compare(libc::NFT_CMP_NEQ, value)
    }

    /// If these bytes are there, as far as the bits of `mask` go.
    pub(super) fn has_masked(self, base: Base, offset: u32, value: &[u8], mask: &[u8]) -> Rule {
        self.masked(base, offset, mask).compare(libc::NFT_CMP_EQ, value)
    }

    /// If one of these bits is set.
    pub(super) fn has_any(self, base: Base, offset: u32, bits: &[u8]) -> Rule {
        self.masked(base, offset, bits).compare(libc::NFT_CMP_NEQ, &vec![0; bits.len()])
    }

    fn masked(self, base: Base, offset: u32, mask: &[u8]) -> Rule {
        let length = mask.len();
        self.load(base, offset, length).expression("bitwise", |e| {
            e.put_be32(kind::BITWISE_SREG, REGISTER).put_be32(kind::BITWISE_DREG, REGISTER);
            e.put_be32(kind::BITWISE_LEN, length as u32);
            for (part, bytes) in [(kind::BITWISE_MASK, mask), (kind::BITWISE_XOR, &vec![0; mask.len()][..])] {
                e.nest(part, |data| {
                    data.put(DATA_VALUE, bytes);
                });
            }
        })
    }

    /// With `length` bytes that are there, and behind them two others or zeros, as the key for what follows.
    fn key(self, (base, offset, length): (Base, u32, usize), mark: Option<(Base, u32)>) -> Rule {
        let behind = KEY_REGISTER + (length as u32).div_ceil(4);
        let begun = self.load_into(KEY_REGISTER, base, offset, length);
        match mark {
            Some((base, offset)) => begun.load_into(behind, base, offset, 2),
            None => begun.immediate(behind, &[0; 4]),
        }
    }

    /// If the address that is there, with its port or another mark of two bytes (or none), is in a set.
    pub(super) fn found_in(self, set: &str, address: (Base, u32, usize), mark: Option<(Base, u32)>) -> Rule {
        self.key(address, mark).expression("lookup", |e| {
            e.put_str(kind::LOOKUP_SET, set).put_be32(kind::LOOKUP_SREG, KEY_REGISTER);
        })
    }

    /// Adds that to a set for so long, from now on.
    pub(super) fn remember(
        self,
        set: &str,
        address: (Base, u32, usize),
        mark: Option<(Base, u32)>,
        for_ms: u64,
    ) -> Rule {
        const UPDATE: u32 = 1;
        self.key(address, mark).expression("dynset", |e| {
            e.put_str(kind::DYNSET_NAME, set).put_be32(kind::DYNSET_OPERATION, UPDATE);
            e.put_be32(kind::DYNSET_KEY, KEY_REGISTER).put(kind::DYNSET_TIMEOUT, &for_ms.to_be_bytes());
        })
    }

    fn immediate(self, register: u32, value: &[u8]) -> Rule {
        self.expression("immediate", |e| {
            e.put_be32(kind::IMMEDIATE_DREG, register);
            e.nest(kind::IMMEDIATE_DATA, |data| {
                data.put(DATA_VALUE, value);
            });
        })
    }

    /// Puts these bytes there.
    pub(super) fn put(self, base: Base, offset: u32, value: &[u8], checksum: Checksum) -> Rule {
        self.immediate(REGISTER, value).write(REGISTER, (base, offset, value.len()), checksum)
    }

    /// Puts the bytes there that are elsewhere in the packet, `from`.
    pub(super) fn copy(
        self,
        from: (Base, u32),
        (base, offset, length): (Base, u32, usize),
        checksum: Checksum,
    ) -> Rule {
        self.load(from.0, from.1, length).write(REGISTER, (base, offset, length), checksum)
    }

    /// Exchanges bytes that are in two places of a header.
    pub(super) fn exchange(self, base: Base, [one, other]: [u32; 2], length: usize) -> Rule {
        let loaded = self.load(base, one, length).load_into(SECOND_REGISTER, base, other, length);
        let first = loaded.write(REGISTER, (base, other, length), Checksum::None);
        first.write(SECOND_REGISTER, (base, one, length), Checksum::None)
    }

    fn write(self, register: u32, (base, offset, length): (Base, u32, usize), checksum: Checksum) -> Rule {
        let (own, pseudo) = match checksum {
            Checksum::None => (None, 0),
            Checksum::At(offset) => (Some(offset), 0),
            Checksum::Pseudo => (None, 1),
            Checksum::AtAndPseudo(offset) => (Some(offset), 1),
        };
        self.expression("payload", |e| {
            e.put_be32(kind::PAYLOAD_SREG, register).put_be32(kind::PAYLOAD_BASE, base as u32);
            e.put_be32(kind::PAYLOAD_OFFSET, offset);
            e.put_be32(kind::PAYLOAD_LEN, length as u32);
            e.put_be32(kind::PAYLOAD_CSUM_TYPE, u32::from(own.is_some()));
            e.put_be32(kind::PAYLOAD_CSUM_OFFSET, own.unwrap_or(0));
            e.put_be32(kind::PAYLOAD_CSUM_FLAGS, pseudo);
        })
    }

    /// Sends its connection to another address and port.
    pub(super) fn redirect(self, address: IpAddr, port: u16) -> Rule {
        let (family, octets) = match address {
            IpAddr::V4(v4) => (libc::NFPROTO_IPV4, v4.octets().to_vec()),
            IpAddr::V6(v6) => (libc::NFPROTO_IPV6, v6.octets().to_vec()),
        };
        let loaded = self.immediate(REGISTER, &octets).immediate(SECOND_REGISTER, &port.to_be_bytes());
        loaded.expression("nat", |e| {
            const SPECIFIED_PORT: u32 = 2;
            e.put_be32(kind::NAT_TYPE, libc::NFT_NAT_DNAT as u32);
            e.put_be32(kind::NAT_FAMILY, family as u32);
            e.put_be32(kind::NAT_REG_ADDR_MIN, REGISTER);
            e.put_be32(kind::NAT_REG_PROTO_MIN, SECOND_REGISTER);
            e.put_be32(kind::NAT_FLAGS, SPECIFIED_PORT);
        })
    }

    /// Gives its connection the address of the device by which it leaves.
    pub(super) fn masquerade(self) -> Rule {
        self.expression("masq", |_| {})
    }

    /// Leaves its connection the address that it comes from, `source`.
    pub(super) fn keep_source(self, (base, offset, length): (Base, u32, usize)) -> Rule {
        let family = if length == 4 { libc::NFPROTO_IPV4 } else { libc::NFPROTO_IPV6 };
        self.load(base, offset, length).expression("nat", |e| {
            e.put_be32(kind::NAT_TYPE, libc::NFT_NAT_SNAT as u32);
            e.put_be32(kind::NAT_FAMILY, family as u32);
            e.put_be32(kind::NAT_REG_ADDR_MIN, REGISTER);
        })
    }

    /// Has it leave by this device, at once.
    pub(super) fn leave_by(self, device: u32) -> Rule {
        self.immediate(REGISTER, &device.to_ne_bytes()).expression("fwd", |e| {
            e.put_be32(kind::FORWARD_DEVICE, REGISTER);
        })
    }

    /// Lets it through; the rest of the chain does not see it.
    pub(super) fn accept(self) -> Rule {
        self.verdict(1)
    }

    /// Tells the sender that nobody is there: a reset for TCP, an error message otherwise.
    pub(super) fn refuse(self, protocol: i32) -> Rule {
        let (reset, unreachable, port) = (1, 2, 1);
        self.expression("reject", |e| {
            e.put_be32(kind::REJECT_TYPE, if protocol == libc::IPPROTO_TCP { reset } else { unreachable });
            e.put(kind::REJECT_ICMP_CODE, &[port]);
        })
    }

    /// Keeps it out of connection tracking, and so out of any translation.
    pub(super) fn untracked(self) -> Rule {
        self.expression("notrack", |_| {})
    }

    /// Goes on in another chain, and does not come back.
    pub(super) fn go_to(self, chain: &str) -> Rule {
        const GOTO: i32 = -4;
        self.verdict_to(GOTO, Some(chain))
    }

    /// Drops it.
    pub(super) fn drop(self) -> Rule {
        self.verdict(0)
    }

    fn verdict(self, code: i32) -> Rule {
        self.verdict_to(code, None)
    }

    fn verdict_to(self, code: i32, chain: Option<&str>) -> Rule {
        self.expression("immediate", |e| {
            e.put_be32(kind::IMMEDIATE_DREG, 0);
            e.nest(kind::IMMEDIATE_DATA, |data| {
                data.nest(DATA_VERDICT, |verdict| {
                    verdict.put_be32(kind::VERDICT_CODE, code as u32);
                    if let Some(chain) = chain {
                        verdict.put_str(kind::VERDICT_CHAIN, chain);
                    }
                });
            });
        })
    }
}

/// A device's name as the kernel compares it.
fn padded(device: &str) -> [u8; 16] {
    let mut name = [0; 16];
    let length = device.len().min(15);
    name[..length].copy_from_slice(&device.as_bytes()[..length]);
    name
}

/// Whether the kernel has a packet filter that this thread may use.
pub(super) fn is_there() -> io::Result<()> {
    const NFT_MSG_GETGEN: u16 = 16;
    Channel::filter()?.ask(SUBSYSTEM << 8 | NFT_MSG_GETGEN, 0, &header(0, 0)).map(drop)
}
