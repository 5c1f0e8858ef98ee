//! What `sock_diag` tells of unix sockets, and only it: who is whose peer, who waits to be accepted.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use super::tcp_pairs::Pairs;
use super::unix_backlog::Backlog;
use super::waiting::Listeners;
use crate::error::CaptureError;
use crate::files::Descriptor;
use crate::ids::HostPid;
use crate::look::Subject;
use crate::sys::socket;

/// A unix socket as `sock_diag` shows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct UnixFacts {
    /// `SOCK_STREAM`, `SOCK_DGRAM`, `SOCK_SEQPACKET`.
    pub(super) kind: u8,
    /// 1 connected, 7 unconnected, 10 listening.
    pub(super) state: u8,
    /// Its name, the bytes of `sun_path`.
    pub(super) name: Vec<u8>,
    /// The peer's inode; zero if the peer is nobody's (closed, or not accepted yet).
    pub(super) peer: Option<u32>,
    /// Of a listener: the inodes of those that wait to be accepted.
    pub(super) waiting: Vec<u32>,
    /// Of a listener: how many may wait. Of another: what it has sent and its peer has not read, in the kernel's bytes.
    pub(super) backlog: u32,
    /// Bit 0 reading, bit 1 writing.
    pub(super) shutdown: u8,
}

/// How many sockets have a name, by type.
pub(super) type Names = HashMap<(u8, Vec<u8>), usize>;

impl UnixFacts {
    /// Whether those that wait to be accepted have said nothing yet, so that nothing but they themselves waits there.
    pub(super) fn waiting_say_nothing(&self, all: &HashMap<u32, UnixFacts>) -> bool {
        self.waiting.iter().all(|waiting| *waiting != 0 && all.get(waiting).is_some_and(|client| client.backlog == 0))
    }

    /// Its type and name.
    pub(super) fn whose(&self) -> (u8, Vec<u8>) {
        (self.kind, self.name.clone())
    }
}

/// What a checkpoint has learnt about sockets so far.
#[derive(Debug, Default)]
pub struct Sightings {
    /// The network namespaces beside the pod's own.
    pub elsewhere: Vec<OwnedFd>,
    unix: Option<(HashMap<u32, UnixFacts>, Names)>,
    groups: Option<Vec<(u32, IpAddr)>>,
    awaits_neighbour: Option<bool>,
    /// The PIDs of the pod behind those of the host, and how deep the pod's namespace is.
    pids: HashMap<i32, i32>,
    /// Of processes that are gone, the PIDs that the pod knew them by: found out ahead of the hold.
    pub(crate) gone: HashMap<i32, i32>,
    /// The names of sockets' files that have several, by device and inode: found ahead of the hold.
    pub(crate) names: HashMap<(u64, u64), Vec<PathBuf>>,
    depth: Option<usize>,
    met: HashSet<u32>,
    signed: Option<HashSet<u64>>,
    /// Whether any of them may hear from outside the pod at any time.
    pub(crate) hear: bool,
    /// Sockets that listen.
    pub(crate) listeners: Listeners,
    /// Connections whose peers may be in the pod, too.
    pub(super) pairs: Pairs,
    expected: Vec<(u32, Subject, String)>,
    /// Unix sockets at which connections wait that have said something.
    pub(super) backlogs: Vec<Backlog>,
}

impl Sightings {
    /// The facts about the unix socket of that inode in the network namespaces of the pod of `init`, asked once per checkpoint.
    pub(super) fn unix(&mut self, init: HostPid) -> io::Result<&(HashMap<u32, UnixFacts>, Names)> {
        if self.unix.is_none() {
            let mut all = dump_unix(std::fs::File::open(init.proc("ns/net"))?)?;
            for namespace in &self.elsewhere {
                all.extend(dump_unix(namespace)?);
            }
            let mut names = Names::new();
            all.values().for_each(|facts| *names.entry(facts.whose()).or_default() += 1);
            self.unix = Some((all, names));
        }
        self.unix.as_ref().ok_or_else(|| io::Error::other("no facts"))
    }

    /// The multicast groups that the pod's interfaces are in, asked once per checkpoint.
    pub(super) fn groups(&mut self, init: HostPid) -> io::Result<&[(u32, IpAddr)]> {
        if self.groups.is_none() {
            self.groups = Some(super::multicast::groups(init)?);
        }
        Ok(self.groups.as_deref().unwrap_or_default())
    }

    /// Whether packets of the pod may be waiting for the address of a neighbour, asked once per checkpoint.
    pub(super) fn awaits_neighbour(&mut self, init: HostPid) -> bool {
        let incomplete = || {
            let table = std::fs::read_to_string(init.proc("net/arp")).unwrap_or_default();
            table.lines().any(|line| line.split_whitespace().nth(2) == Some("0x0"))
        };
        *self.awaits_neighbour.get_or_insert_with(incomplete)
    }

    /// The inodes of TCP sockets whose packets are signed, in the network namespaces of the pod of `init` and in `others`,
    /// asked once per checkpoint.
    pub(super) fn signed<'n>(
        &mut self,
        init: HostPid,
        others: impl Iterator<Item = &'n OwnedFd>,
    ) -> io::Result<&HashSet<u64>> {
        if self.signed.is_none() {
            let mut found = HashSet::new();
            add_signed(std::fs::File::open(init.proc("ns/net"))?, &mut found)?;
            for namespace in others {
                add_signed(namespace, &mut found)?;
            }
            self.signed = Some(found);
        }
        self.signed.as_ref().ok_or_else(|| io::Error::other("no facts"))
    }

    /// The PID that the pod knows a process of the host by; zero if the process is gone.
    pub(super) fn pod_pid(&mut self, init: HostPid, pid: i32) -> i32 {
        if let Some(known) = self.gone.get(&pid) {
            return *known;
        }
        let depth = *self.depth.get_or_insert_with(|| namespace_pids(init.0).len());
        let inner = || namespace_pids(pid).get(depth.saturating_sub(1)).copied().unwrap_or(0);
        *self.pids.entry(pid).or_insert_with(inner)
    }

    /// The pod knows a process by that PID that is gone.
    pub(super) fn learn_pid(&mut self, pid: i32, in_pod: i32) {
        self.gone.insert(pid, in_pod);
    }

    /// The unix socket of that inode is being captured.
    pub(super) fn meet_unix(&mut self, inode: u32) {
        self.met.insert(inode);
    }

    /// The unix socket of that inode is the peer of `descriptor`, and must be captured, too.
    pub(super) fn expect_unix(&mut self, inode: u32, descriptor: &Descriptor) {
        self.expected.push((inode, descriptor.subject.clone(), descriptor.object()));
    }

    /// Refuses a socket whose peer is held by nobody of the pod. For when every file has been captured.
    pub fn complete(&self) -> Result<(), CaptureError> {
        match self.expected.iter().find(|(inode, ..)| !self.met.contains(inode)) {
            None => Ok(()),
            Some((_, subject, object)) => Err(subject.refuse(object, "is connected to a socket outside the pod")),
        }
    }
}

/// The PIDs of a process, from the outermost namespace that we see to its own.
fn namespace_pids(pid: i32) -> Vec<i32> {
    let status = std::fs::read(format!("/proc/{pid}/status")).unwrap_or_default();
    let status = String::from_utf8_lossy(&status);
    let line = status.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap_or_default();
    line.split_whitespace().filter_map(|word| word.parse().ok()).collect()
}

/// The older of two requests for a list of TCP sockets: it answers for IPv4 and IPv6 in one walk over all that there are.
pub(super) const TCPDIAG_GETSOCK: u16 = 18;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const REQUEST_DUMP: u16 = 0x301;
const DONE: u16 = 3;
const ERROR: u16 = 2;

pub(super) fn dump_unix(namespace: impl AsFd + Send) -> io::Result<HashMap<u32, UnixFacts>> {
    let mut request = vec![libc::AF_UNIX as u8, 0, 0, 0];
    request.extend(u32::MAX.to_ne_bytes());
    request.extend(0u32.to_ne_bytes());
    // Name, peer, who waits, queue lengths.
    request.extend((1u32 | 4 | 8 | 16).to_ne_bytes());
    request.extend([0xff; 8]);
    let mut facts = HashMap::new();
    let mut broken = false;
    dump(namespace, &request, |message| match parse_unix(message) {
        Some((inode, fact)) => drop(facts.insert(inode, fact)),
        None => broken = true,
    })?;
    if broken { Err(io::Error::other("sock_diag gave an answer that is cut off")) } else { Ok(facts) }
}

/// A `struct inet_diag_req` for TCP sockets in these states (a bit for each), with what else is to be told of them.
pub(super) fn tcp_request(states: u32, more: u8) -> Vec<u8> {
    [&[0, 0, 0, more][..], &[0; 48], &states.to_ne_bytes(), &[0; 4]].concat()
}

/// How long a `struct inet_diag_msg` is, and where it has the inode.
pub(super) const TCP_ANSWER: usize = 72;
const INODE: usize = 68;

/// Adds the inodes of the TCP sockets of a network namespace that have keys to sign with.
fn add_signed(namespace: impl AsFd + Send, found: &mut HashSet<u64>) -> io::Result<()> {
    const KEYS: u16 = 18;
    /// `INET_DIAG_INFO`, with which they come.
    const INFO: u8 = 1 << 1;
    ask(&netlink_in(namespace)?, TCPDIAG_GETSOCK, &tcp_request(u32::MAX, INFO), |message| {
        let Some((answer, rest)) = message.split_at_checked(TCP_ANSWER) else { return };
        let inode = answer[INODE..].first_chunk::<4>().map_or(0, |word| u32::from_ne_bytes(*word));
        if crate::pod::network::netlink::attributes(rest).any(|(kind, _)| kind == KEYS) {
            found.insert(inode.into());
        }
    })
}

/// A packet socket as `sock_diag` shows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct PacketFacts {
    /// What it listens to: interface, kind, address. Several of one kind are one here, and are listed so often.
    pub(super) memberships: Vec<(i32, u16, Vec<u8>)>,
    /// Its rings, for what it receives and what it sends: `struct packet_diag_ring`.
    pub(super) received: Option<[u32; 7]>,
    pub(super) sent: Option<[u32; 7]>,
}

/// The facts about one packet socket of a network namespace.
pub(super) fn packet(namespace: OwnedFd, inode: u32) -> io::Result<PacketFacts> {
    let mut request = vec![libc::AF_PACKET as u8, 0, 0, 0];
    request.extend(inode.to_ne_bytes());
    // What it listens to, rings.
    request.extend((2u32 | 4).to_ne_bytes());
    request.extend([0xff; 8]);
    let mut found = None;
    dump(namespace, &request, |message| {
        if message.get(4..8) == Some(&inode.to_ne_bytes()) {
            found = parse_packet(message);
        }
    })?;
    found.ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// A `struct packet_diag_msg` and its attributes.
fn parse_packet(message: &[u8]) -> Option<PacketFacts> {
    const MEMBERSHIPS: u16 = 1;
    const RECEIVED: u16 = 2;
    const SENT: u16 = 3;
    const MEMBERSHIP: usize = 44;
    let word = |bytes: &[u8]| bytes.first_chunk::<4>().map(|w| u32::from_ne_bytes(*w));
    let half = |bytes: &[u8]| bytes.first_chunk::<2>().map(|w| u16::from_ne_bytes(*w));
    let ring = |value: &[u8]| {
        let mut words = [0; 7];
        words.iter_mut().zip(value.as_chunks::<4>().0).for_each(|(to, from)| *to = u32::from_ne_bytes(*from));
        (words[1] != 0).then_some(words)
    };
    let mut facts = PacketFacts::default();
    for (kind, value) in crate::pod::network::netlink::attributes(message.get(16..)?) {
        match kind {
            RECEIVED => facts.received = ring(value),
            SENT => facts.sent = ring(value),
            MEMBERSHIPS => {
                for one in value.chunks_exact(MEMBERSHIP) {
                    let length = usize::from(half(&one[10..])?).min(32);
                    let membership = (word(one)? as i32, half(&one[8..])?, one[12..12 + length].to_vec());
                    let count = word(&one[4..])? as usize;
                    facts.memberships.extend(std::iter::repeat_n(membership, count.min(1000)));
                }
            }
            _ => {}
        }
    }
    Some(facts)
}

/// Asks `sock_diag` in a network namespace for all that fits a request.
fn dump(namespace: impl AsFd + Send, body: &[u8], each: impl FnMut(&[u8])) -> io::Result<()> {
    ask(&netlink_in(namespace)?, SOCK_DIAG_BY_FAMILY, body, each)
}

/// Asks through a `sock_diag` socket for all that fits a request.
pub(super) fn ask(netlink: &OwnedFd, message: u16, body: &[u8], mut each: impl FnMut(&[u8])) -> io::Result<()> {
    let mut request = (16 + body.len() as u32).to_ne_bytes().to_vec();
    request.extend(message.to_ne_bytes());
    request.extend(REQUEST_DUMP.to_ne_bytes());
    request.extend([0; 8]);
    request.extend(body);
    socket::send(netlink, &request, 0)?;
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let length = socket::receive(netlink, &mut buffer, 0)?;
        if parse_dump(&buffer[..length], &mut each)? {
            return Ok(());
        }
    }
}

/// A `sock_diag` socket in a network namespace. A socket stays in the namespace that it was made in.
fn netlink_in(namespace: impl AsFd + Send) -> io::Result<OwnedFd> {
    let make = || socket::socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_SOCK_DIAG);
    crate::sys::clone::in_thread(move || {
        nix::sched::setns(namespace.as_fd(), nix::sched::CloneFlags::CLONE_NEWNET)?;
        make()
    })
}

/// Reads some bytes as an answer, and as what answers are about.
pub(super) fn try_answer(bytes: &[u8]) {
    let _ = parse_dump(bytes, &mut |message| drop((parse_unix(message), parse_packet(message))));
}

/// Gives out the answers of one datagram; whether it was the last.
fn parse_dump(mut bytes: &[u8], each: &mut impl FnMut(&[u8])) -> io::Result<bool> {
    let broken = || io::Error::other("sock_diag gave an answer that is cut off");
    while let Some((length, _)) = bytes.split_first_chunk::<4>() {
        let length = u32::from_ne_bytes(*length) as usize;
        let message = bytes.get(..length).filter(|m| m.len() >= 16).ok_or_else(broken)?;
        match u16::from_ne_bytes([message[4], message[5]]) {
            DONE => return Ok(true),
            ERROR => return Err(netlink_error(message.get(16..20).ok_or_else(broken)?)),
            _ => each(&message[16..]),
        }
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(false)
}

fn netlink_error(code: &[u8]) -> io::Error {
    let code = code.first_chunk::<4>().map_or(-libc::EIO, |c| i32::from_ne_bytes(*c));
    io::Error::from_raw_os_error(code.wrapping_neg())
}

/// A `struct unix_diag_msg` and its attributes.
fn parse_unix(message: &[u8]) -> Option<(u32, UnixFacts)> {
    const NAME: u16 = 0;
    const PEER: u16 = 2;
    const WAITING: u16 = 3;
    const LENGTHS: u16 = 4;
    const SHUTDOWN: u16 = 6;
    let (head, mut rest) = message.split_at_checked(16)?;
    let word = |bytes: &[u8]| bytes.first_chunk::<4>().map(|w| u32::from_ne_bytes(*w));
    let mut fact = UnixFacts { kind: head[1], state: head[2], ..UnixFacts::default() };
    while rest.len() >= 4 {
        let length = usize::from(u16::from_ne_bytes([rest[0], rest[1]]));
        let value = rest.get(4..length)?;
        match u16::from_ne_bytes([rest[2], rest[3]]) {
            NAME => fact.name = value.to_vec(),
            PEER => fact.peer = Some(word(value)?),
            WAITING => fact.waiting = value.as_chunks::<4>().0.iter().map(|w| u32::from_ne_bytes(*w)).collect(),
            LENGTHS => fact.backlog = word(value.get(4..)?)?,
            SHUTDOWN => fact.shutdown = *value.first()?,
            _ => {}
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Some((word(&head[4..])?, fact))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_understood() {
        let mut message = vec![libc::AF_UNIX as u8, 1, 1, 0];
        message.extend(77u32.to_ne_bytes());
        message.extend([0; 8]);
        message.extend([7, 0, 0, 0, 0, b'a', b'b', 0]);
        message.extend([8, 0, 2, 0, 5, 0, 0, 0]);
        message.extend([5, 0, 6, 0, 2, 0, 0, 0]);
        let (inode, fact) = parse_unix(&message).unwrap();
        assert_eq!((inode, fact.name.as_slice(), fact.peer, fact.shutdown), (77, &b"\0ab"[..], Some(5), 2));
        assert!(parse_unix(&message[..18]).is_some());
        message[16] = 200;
        assert!(parse_unix(&message).is_none());
    }

    #[test]
    fn a_cut_answer_is_an_error() {
        assert!(parse_dump(&[40, 0, 0, 0, 20, 0], &mut |_| {}).is_err());
        assert!(!parse_dump(&[], &mut |_| {}).unwrap());
    }
}
