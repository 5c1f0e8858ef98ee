//! What is on the wire of a network namespace, and what a connection looks like there.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context, Result, anyhow, ensure};
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, setsockopt, socket, sockopt};
use nix::sys::time::TimeVal;

use crate::lab::Netns;

/// A segment of TCP as it was on the wire.
#[derive(Clone, Copy, Debug)]
struct Segment {
    from: u16,
    to: u16,
    sequence: u32,
    acknowledged: u32,
    length: u32,
    flags: u8,
}

const FIN: u8 = 1;
const SYN: u8 = 2;
const RESET: u8 = 4;
const ACK: u8 = 16;

const ETHERNET: usize = 14;
const IPV4: [u8; 2] = [8, 0];
const ARP: [u8; 2] = [8, 6];
const IPV6: [u8; 2] = [0x86, 0xdd];

/// A segment in an Ethernet frame with an IPv4 packet, if that is what it is.
fn segment(frame: &[u8]) -> Option<Segment> {
    let packet = frame.get(ETHERNET..).filter(|_| frame[12..14] == IPV4)?;
    let header = usize::from(packet.first()? & 15) * 4;
    let total = usize::from(u16::from_be_bytes([*packet.get(2)?, *packet.get(3)?]));
    let tcp = packet.get(header..total).filter(|_| packet[9] == libc::IPPROTO_TCP as u8)?;
    let half = |at: usize| Some(u16::from_be_bytes([*tcp.get(at)?, *tcp.get(at + 1)?]));
    let word = |at: usize| Some(u32::from(half(at)?) << 16 | u32::from(half(at + 2)?));
    let length = (tcp.len() - usize::from(tcp.get(12)? >> 4) * 4) as u32;
    let (sequence, acknowledged, flags) = (word(4)?, word(8)?, *tcp.get(13)?);
    Some(Segment { from: half(0)?, to: half(2)?, sequence, acknowledged, length, flags })
}

/// Whose address a frame announces unasked, if it does, and at which hardware address: a gratuitous ARP.
fn gratuitous_arp(frame: &[u8]) -> Option<(Ipv4Addr, [u8; 6])> {
    let packet = frame.get(ETHERNET..).filter(|_| frame[12..14] == ARP)?;
    let address = |at: usize| Some(Ipv4Addr::from(<[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?));
    let sender = address(14)?;
    (sender == address(24)?).then_some((sender, packet.get(8..14)?.try_into().ok()?))
}

/// The same of IPv6: an unsolicited neighbour advertisement.
fn unsolicited_advertisement(frame: &[u8]) -> Option<Ipv6Addr> {
    const ADVERTISEMENT: u8 = 136;
    const SOLICITED: u8 = 0x40;
    let packet = frame.get(ETHERNET..).filter(|_| frame[12..14] == IPV6)?;
    let message = packet.get(40..).filter(|_| packet[6] == libc::IPPROTO_ICMPV6 as u8)?;
    let is_one = *message.first()? == ADVERTISEMENT && message.get(4)? & SOLICITED == 0;
    let target = <[u8; 16]>::try_from(message.get(8..24)?).ok()?;
    is_one.then(|| Ipv6Addr::from(target))
}

/// Something that writes down what a network namespace sends and receives.
#[derive(Debug)]
pub struct Trace {
    end: Arc<AtomicBool>,
    thread: JoinHandle<Result<Seen>>,
}

/// What was on the wire.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    segments: Vec<Segment>,
    announced: Vec<(Ipv4Addr, [u8; 6])>,
    advertised: Vec<Ipv6Addr>,
}

impl Trace {
    /// Begins with a namespace. What comes after this returns is written down.
    pub fn start(of: &Netns) -> Result<Self> {
        let wire = of.enter(|| -> Result<OwnedFd> {
            let flags = SockFlag::SOCK_CLOEXEC;
            let wire = socket(AddressFamily::Packet, SockType::Raw, flags, SockProtocol::EthAll)?;
            setsockopt(&wire, sockopt::ReceiveTimeout, &TimeVal::new(0, 50_000))?;
            setsockopt(&wire, sockopt::RcvBufForce, &(64 << 20))?;
            Ok(wire)
        })?;
        let wire = wire.context("a packet socket")?;
        let end = Arc::new(AtomicBool::new(false));
        let ended = end.clone();
        Ok(Self { end, thread: std::thread::spawn(move || trace(&wire, &ended)) })
    }

    /// Ends; what was seen.
    pub fn finish(self) -> Result<Seen> {
        self.end.store(true, Ordering::SeqCst);
        self.thread.join().map_err(|_| anyhow!("the thread that traces panicked"))?
    }
}

fn trace(wire: &OwnedFd, end: &AtomicBool) -> Result<Seen> {
    let mut seen = Seen::default();
    let mut frame = vec![0; 1 << 16];
    loop {
        // What waits when it is to end has been seen, too; what comes later is not waited for.
        let is_over = end.load(Ordering::SeqCst);
        let wait = if is_over { MsgFlags::MSG_DONTWAIT } else { MsgFlags::empty() };
        match recv(wire.as_raw_fd(), &mut frame, wait) {
            Ok(length) => {
                let frame = frame.get(..length).filter(|frame| frame.len() >= ETHERNET).unwrap_or_default();
                seen.note(frame);
            }
            Err(Errno::EAGAIN) if is_over => return Ok(seen),
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(error) => return Err(error).context("receiving what is on the wire"),
        }
    }
}

impl Seen {
    fn note(&mut self, frame: &[u8]) {
        if frame.is_empty() {
            return;
        }
        self.segments.extend(segment(frame));
        self.announced.extend(gratuitous_arp(frame));
        self.advertised.extend(unsolicited_advertisement(frame));
    }

    /// How often an address was announced unasked; an error if ever with another hardware address than before.
    pub fn announcements(&self, of: Ipv4Addr) -> Result<usize> {
        let own: Vec<_> = self.announced.iter().filter(|(address, _)| *address == of).collect();
        ensure!(own.windows(2).all(|pair| pair[0].1 == pair[1].1), "another hardware address: {own:?}");
        Ok(own.len())
    }

    /// How often addresses of IPv6 were advertised unasked.
    pub fn advertisements(&self) -> usize {
        self.advertised.len()
    }

    /// The connection with that port of ours has seen no reset, no end, and no gap: what was lost while the pod was away is
    /// sent again, so that in the end every byte of each side was on the wire; nothing is acknowledged that was not sent, or
    /// taken back. How many segments there were.
    pub fn check_connection(&self, port: u16) -> Result<usize> {
        let ours = |segment: &&Segment| segment.from == port || segment.to == port;
        let seen: Vec<Segment> = self.segments.iter().filter(ours).copied().collect();
        check(&seen).with_context(|| format!("the connection of port {port}, of {} segments", seen.len()))?;
        Ok(seen.len())
    }
}

/// What one side of a connection has said.
struct Side {
    /// The sequence number behind the furthest byte, and how many bytes from the first that is.
    furthest: u32,
    position: i64,
    /// The bytes that were on the wire, counted from the first.
    sent: Vec<(i64, i64)>,
    acknowledged: Option<u32>,
}

fn after(one: u32, other: u32) -> i32 {
    one.wrapping_sub(other) as i32
}

impl Side {
    fn beginning(at: u32) -> Side {
        Side { furthest: at, position: 0, sent: Vec::new(), acknowledged: None }
    }

    fn says(&mut self, segment: &Segment) -> Result<()> {
        let length = segment.length + u32::from(segment.flags & (SYN | FIN) != 0);
        let begin = self.position + i64::from(after(segment.sequence, self.furthest));
        let end = begin + i64::from(length);
        self.sent.push((begin, end));
        if end > self.position {
            (self.position, self.furthest) = (end, segment.sequence.wrapping_add(length));
        }
        if segment.flags & ACK != 0 {
            let before = self.acknowledged.unwrap_or(segment.acknowledged);
            let takes_back = after(segment.acknowledged, before) < 0;
            ensure!(!takes_back, "{segment:?} takes an acknowledgement of {before} back");
            self.acknowledged = Some(segment.acknowledged);
        }
        Ok(())
    }

    /// Every byte up to the furthest was on the wire.
    fn has_no_gap(mut self) -> Result<()> {
        self.sent.sort_unstable();
        let mut reached = 0;
        for (begin, end) in self.sent {
            ensure!(begin <= reached, "bytes {reached} to {begin} were never on the wire");
            reached = reached.max(end);
        }
        Ok(())
    }
}

fn check(seen: &[Segment]) -> Result<()> {
    let mut sides: BTreeMap<u16, Side> = BTreeMap::new();
    for (place, segment) in seen.iter().enumerate() {
        ensure!(segment.flags & RESET == 0, "a reset: {segment:?}");
        ensure!(segment.flags & FIN == 0 || place + 10 > seen.len(), "an end: {segment:?}");
        sides.entry(segment.from).or_insert_with(|| Side::beginning(segment.sequence)).says(segment)?;
        let unsent = |side: &Side| segment.flags & ACK != 0 && after(segment.acknowledged, side.furthest) > 0;
        ensure!(!sides.get(&segment.to).is_some_and(unsent), "{segment:?} acknowledges what was never sent");
    }
    for (port, side) in sides {
        side.has_no_gap().with_context(|| format!("from port {port}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(from: u16, sequence: u32, length: u32, acknowledged: u32) -> Segment {
        Segment { from, to: 3 - from, sequence, acknowledged, length, flags: ACK }
    }

    #[test]
    fn a_retransmission_is_no_gap_and_a_byte_that_nobody_saw_is() {
        // Sequence numbers begin anew on the way.
        let first = u32::MAX - 5;
        let begins = [said(1, first, 10, 70), said(2, 70, 0, 4)];
        let check = |rest: &[Segment]| check(&[&begins, rest].concat());
        assert!(check(&[said(1, 4, 10, 70), said(1, 4, 10, 70), said(2, 70, 0, 14)]).is_ok());
        assert!(check(&[said(1, 5, 10, 70)]).is_err(), "a gap");
        assert!(check(&[said(1, 5, 10, 70), said(1, 4, 1, 70)]).is_ok(), "one that was filled");
        assert!(check(&[said(2, 70, 0, 5)]).is_err(), "an acknowledgement of what was never sent");
        assert!(check(&[said(2, 70, 0, 3)]).is_err(), "one that is taken back");
        assert!(check(&[Segment { flags: RESET, ..said(2, 70, 0, 4) }]).is_err(), "a reset");
    }

    #[test]
    fn frames_say_what_they_are() {
        let ethernet = |kind: [u8; 2], packet: &[u8]| [&[0; 12][..], &kind, packet].concat();
        let arp = |target: [u8; 4]| {
            ethernet(ARP, &[&[0, 1, 8, 0, 6, 4, 0, 1][..], &[2; 6], &[198, 18, 0, 2], &[0; 6], &target].concat())
        };
        let address = Ipv4Addr::new(198, 18, 0, 2);
        assert_eq!(gratuitous_arp(&arp([198, 18, 0, 2])), Some((address, [2; 6])));
        assert_eq!(gratuitous_arp(&arp([198, 18, 0, 3])), None);
        for cut in ETHERNET..40 {
            assert_eq!(gratuitous_arp(&arp([198, 18, 0, 2])[..cut]), None);
        }
    }
}
