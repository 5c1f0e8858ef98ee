//! One rule of the packet filter, expression by expression, as the kernel reads it.

use std::net::IpAddr;

use super::{DATA_VALUE, LIST_ELEMENT, kind};
use crate::pod::network::netlink::Attributes;

const REGISTER: u32 = 1;
const SECOND_REGISTER: u32 = 2;
/// The first of the registers of four bytes, in which the parts of a key lie side by side.
const KEY_REGISTER: u32 = 8;
const DATA_VERDICT: u16 = 2;

/// Where in a packet an offset counts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(in crate::pod::network) enum Base {
    /// The Ethernet header.
    Link = 0,
    /// The ARP, IPv4 or IPv6 header.
    Network = 1,
    /// The TCP, UDP or ICMP header.
    Transport = 2,
}

/// Which checksums a change of a packet has to be carried over to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::pod::network) enum Checksum {
    /// None.
    None,
    /// The one at this offset, of the same header.
    At(u32),
    /// That of the header after it, which counts the addresses in.
    Pseudo,
    /// Both.
    AtAndPseudo(u32),
}

/// One rule: conditions, then what is done.
#[derive(Default)]
pub(in crate::pod::network) struct Rule(pub(super) Attributes);

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
    pub(in crate::pod::network) fn ether_type(self, number: u16) -> Rule {
        self.meta(libc::NFT_META_PROTOCOL, libc::NFT_CMP_EQ, &number.to_be_bytes())
    }

    /// If it is of the address family of `address`, in a table that sees both.
    pub(in crate::pod::network) fn family_of(self, address: IpAddr) -> Rule {
        let family = if address.is_ipv4() { libc::NFPROTO_IPV4 } else { libc::NFPROTO_IPV6 };
        self.meta(libc::NFT_META_NFPROTO, libc::NFT_CMP_EQ, &[family as u8])
    }

    /// If it carries this protocol (TCP, UDP, ICMP).
    pub(in crate::pod::network) fn transport(self, number: i32) -> Rule {
        self.meta(libc::NFT_META_L4PROTO, libc::NFT_CMP_EQ, &[number as u8])
    }

    /// If it carries another one.
    pub(in crate::pod::network) fn not_transport(self, number: i32) -> Rule {
        self.meta(libc::NFT_META_L4PROTO, libc::NFT_CMP_NEQ, &[number as u8])
    }

    /// If it came in by this device.
    pub(in crate::pod::network) fn in_by(self, device: &str) -> Rule {
        self.meta(libc::NFT_META_IIFNAME, libc::NFT_CMP_EQ, &padded(device))
    }

    /// If it leaves by this device.
    pub(in crate::pod::network) fn out_by(self, device: &str) -> Rule {
        self.meta(libc::NFT_META_OIFNAME, libc::NFT_CMP_EQ, &padded(device))
    }

    /// If it leaves by another device.
    pub(in crate::pod::network) fn not_out_by(self, device: &str) -> Rule {
        self.meta(libc::NFT_META_OIFNAME, libc::NFT_CMP_NEQ, &padded(device))
    }

    /// If it is for an address of the host itself.
    pub(in crate::pod::network) fn for_this_host(self) -> Rule {
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
    pub(in crate::pod::network) fn has(self, base: Base, offset: u32, value: &[u8]) -> Rule {
        self.load(base, offset, value.len()).compare(libc::NFT_CMP_EQ, value)
    }

    /// If other bytes are there.
    pub(in crate::pod::network) fn has_not(self, base: Base, offset: u32, value: &[u8]) -> Rule {
        self.load(base, offset, value.len()).compare(libc::NFT_CMP_NEQ, value)
    }

    /// If these bytes are there, as far as the bits of `mask` go.
    pub(in crate::pod::network) fn has_masked(self, base: Base, offset: u32, value: &[u8], mask: &[u8]) -> Rule {
        self.masked(base, offset, mask).compare(libc::NFT_CMP_EQ, value)
    }

    /// If one of these bits is set.
    pub(in crate::pod::network) fn has_any(self, base: Base, offset: u32, bits: &[u8]) -> Rule {
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
    pub(in crate::pod::network) fn found_in(
        self,
        set: &str,
        address: (Base, u32, usize),
        mark: Option<(Base, u32)>,
    ) -> Rule {
        self.key(address, mark).expression("lookup", |e| {
            e.put_str(kind::LOOKUP_SET, set).put_be32(kind::LOOKUP_SREG, KEY_REGISTER);
        })
    }

    /// Adds that to a set for so long, from now on.
    pub(in crate::pod::network) fn remember(
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
    pub(in crate::pod::network) fn put(self, base: Base, offset: u32, value: &[u8], checksum: Checksum) -> Rule {
        self.immediate(REGISTER, value).write(REGISTER, (base, offset, value.len()), checksum)
    }

    /// Puts the bytes there that are elsewhere in the packet, `from`.
    pub(in crate::pod::network) fn copy(
        self,
        from: (Base, u32),
        (base, offset, length): (Base, u32, usize),
        checksum: Checksum,
    ) -> Rule {
        self.load(from.0, from.1, length).write(REGISTER, (base, offset, length), checksum)
    }

    /// Exchanges bytes that are in two places of a header.
    pub(in crate::pod::network) fn exchange(self, base: Base, [one, other]: [u32; 2], length: usize) -> Rule {
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
    pub(in crate::pod::network) fn redirect(self, address: IpAddr, port: u16) -> Rule {
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
    pub(in crate::pod::network) fn masquerade(self) -> Rule {
        self.expression("masq", |_| {})
    }

    /// Gives its connection this address to come from.
    pub(in crate::pod::network) fn come_from(self, address: IpAddr) -> Rule {
        let rule = match address {
            IpAddr::V4(v4) => self.immediate(REGISTER, &v4.octets()),
            IpAddr::V6(v6) => self.immediate(REGISTER, &v6.octets()),
        };
        rule.source_from_register(address.is_ipv4())
    }

    /// Leaves its connection the address that it comes from, `source`.
    pub(in crate::pod::network) fn keep_source(self, (base, offset, length): (Base, u32, usize)) -> Rule {
        self.load(base, offset, length).source_from_register(length == 4)
    }

    fn source_from_register(self, is_ipv4: bool) -> Rule {
        let family = if is_ipv4 { libc::NFPROTO_IPV4 } else { libc::NFPROTO_IPV6 };
        self.expression("nat", |e| {
            e.put_be32(kind::NAT_TYPE, libc::NFT_NAT_SNAT as u32);
            e.put_be32(kind::NAT_FAMILY, family as u32);
            e.put_be32(kind::NAT_REG_ADDR_MIN, REGISTER);
        })
    }

    /// Has it leave by this device, at once.
    pub(in crate::pod::network) fn leave_by(self, device: u32) -> Rule {
        self.immediate(REGISTER, &device.to_ne_bytes()).expression("fwd", |e| {
            e.put_be32(kind::FORWARD_DEVICE, REGISTER);
        })
    }

    /// Lets it through; the rest of the chain does not see it.
    pub(in crate::pod::network) fn accept(self) -> Rule {
        self.verdict(1)
    }

    /// Tells the sender that nobody is there: a reset for TCP, an error message otherwise.
    pub(in crate::pod::network) fn refuse(self, protocol: i32) -> Rule {
        let (reset, unreachable, port) = (1, 2, 1);
        self.expression("reject", |e| {
            e.put_be32(kind::REJECT_TYPE, if protocol == libc::IPPROTO_TCP { reset } else { unreachable });
            e.put(kind::REJECT_ICMP_CODE, &[port]);
        })
    }

    /// Keeps it out of connection tracking, and so out of any translation.
    pub(in crate::pod::network) fn untracked(self) -> Rule {
        self.expression("notrack", |_| {})
    }

    /// Goes on in another chain, and does not come back.
    pub(in crate::pod::network) fn go_to(self, chain: &str) -> Rule {
        const GOTO: i32 = -4;
        self.verdict_to(GOTO, Some(chain))
    }

    /// Drops it.
    pub(in crate::pod::network) fn drop(self) -> Rule {
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
