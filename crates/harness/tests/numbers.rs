//! Clocks and numbers across a checkpoint and a restart: what a peer's wire shows of a connection, and what sleeps take.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use harness::lab::{Lab, served_at, wait_until};
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, setsockopt, socket, sockopt};
use nix::sys::time::TimeVal;

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

/// A segment in an Ethernet frame with an IPv4 packet, if that is what it is.
fn segment(frame: &[u8]) -> Option<Segment> {
    const ETHERNET: usize = 14;
    let packet = frame.get(ETHERNET..).filter(|_| frame[12..14] == [8, 0])?;
    let header = usize::from(packet.first()? & 15) * 4;
    let total = usize::from(u16::from_be_bytes([*packet.get(2)?, *packet.get(3)?]));
    let tcp = packet.get(header..total).filter(|_| packet[9] == libc::IPPROTO_TCP as u8)?;
    let half = |at: usize| Some(u16::from_be_bytes([*tcp.get(at)?, *tcp.get(at + 1)?]));
    let word = |at: usize| Some(u32::from(half(at)?) << 16 | u32::from(half(at + 2)?));
    let length = (tcp.len() - usize::from(tcp.get(12)? >> 4) * 4) as u32;
    let (sequence, acknowledged, flags) = (word(4)?, word(8)?, *tcp.get(13)?);
    Some(Segment { from: half(0)?, to: half(2)?, sequence, acknowledged, length, flags })
}

/// Every segment that the calling thread's network namespace sends and receives until it is told to end.
fn trace(end: &AtomicBool, begun: &std::sync::mpsc::Sender<()>) -> Result<Vec<Segment>> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let wire = socket(AddressFamily::Packet, SockType::Raw, flags, SockProtocol::EthAll).context("a packet socket")?;
    setsockopt(&wire, sockopt::ReceiveTimeout, &TimeVal::new(0, 50_000))?;
    setsockopt(&wire, sockopt::RcvBufForce, &(8 << 20))?;
    begun.send(())?;
    let mut seen = Vec::new();
    let mut frame = vec![0; 1 << 16];
    while !end.load(Ordering::SeqCst) {
        match recv(wire.as_raw_fd(), &mut frame, MsgFlags::empty()) {
            Ok(length) => seen.extend(segment(&frame[..length])),
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(error) => return Err(error).context("receiving what is on the wire"),
        }
    }
    Ok(seen)
}

const SERVER: &str = "
import socket, time
s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); s.bind(('0.0.0.0', 80)); s.listen(1)
print('ready', flush=True)
c, _ = s.accept()
for n in range(100000):
    c.sendall(b'%09d\\n' % n * 100)
    time.sleep(0.002)
";

/// Numbers come in order, with none left out.
fn numbers(stream: &mut TcpStream, next: &mut u64, many: u64) -> Result<()> {
    let mut line = [0; 1000];
    for _ in 0..many {
        stream.read_exact(&mut line).context("reading from the pod")?;
        let number: u64 = std::str::from_utf8(&line[..9])?.parse()?;
        ensure!(number == *next, "{number} came after {}", next.wrapping_sub(1));
        *next += 1;
    }
    Ok(())
}

fn wire_shows_a_pause(lab: &Lab) -> Result<()> {
    lab.zap(&["run", "-d", "-n", "server", "--", "python3", "-c", SERVER])?;
    lab.attach_client()?;
    wait_until("the server", || {
        ensure!(lab.pod("server")?.log().contains("ready"), "it is not ready");
        Ok(())
    })?;
    let address: Ipv4Addr = lab.pods()?[0].address.clone().context("it has no address")?.parse()?;
    let address: SocketAddr = served_at(address);
    let end = AtomicBool::new(false);
    let (begun, has_begun) = std::sync::mpsc::channel();
    let (seen, port) = std::thread::scope(|scope| -> Result<_> {
        let tracer = scope.spawn(|| lab.client().enter(|| trace(&end, &begun)));
        has_begun.recv()?;
        let talked = (|| -> Result<u16> {
            let mut stream = lab.client().enter(|| TcpStream::connect(address))??;
            stream.set_read_timeout(Some(Duration::from_secs(30)))?;
            let mut next = 0;
            numbers(&mut stream, &mut next, 50)?;
            for round in 0..2 {
                let image = lab.directory().join(format!("image-{round}"));
                let image = image.to_str().unwrap();
                lab.zap(&["checkpoint", "server", "-o", image, "--leave-running"])?;
                numbers(&mut stream, &mut next, 50)?;
                let gone = format!("{image}-gone");
                lab.zap(&["checkpoint", "server", "-o", &gone])?;
                lab.zap(&["restart", &gone, "-d"])?;
                lab.attach_client()?;
                numbers(&mut stream, &mut next, 100)?;
            }
            Ok(stream.local_addr()?.port())
        })();
        end.store(true, Ordering::SeqCst);
        let seen = tracer.join().unwrap()?;
        Ok((seen?, talked?))
    })?;
    check(&seen.into_iter().filter(|s| s.from == port || s.to == port).collect::<Vec<_>>())
}

/// No reset, no end, no gap: what was lost while the pod was held is sent again, so that in the end every byte of each side
/// was on the wire; nothing is acknowledged that was not sent, or taken back.
fn check(seen: &[Segment]) -> Result<()> {
    ensure!(seen.len() > 300, "only {} segments were seen", seen.len());
    let mut ends: BTreeMap<u16, u32> = BTreeMap::new();
    let mut sent: BTreeMap<u16, (u32, Vec<(i32, i32)>)> = BTreeMap::new();
    let mut acknowledged: BTreeMap<u16, u32> = BTreeMap::new();
    let after = |one: u32, other: u32| one.wrapping_sub(other) as i32;
    for (place, segment) in seen.iter().enumerate() {
        ensure!(segment.flags & RESET == 0, "a reset: {segment:?}");
        ensure!(segment.flags & FIN == 0 || place + 10 > seen.len(), "an end: {segment:?}");
        let begin = segment.sequence;
        let end = begin.wrapping_add(segment.length + u32::from(segment.flags & (SYN | FIN) != 0));
        let known = *ends.entry(segment.from).or_insert(begin);
        let (first, ranges) = sent.entry(segment.from).or_insert((begin, Vec::new()));
        ranges.push((after(begin, *first), after(end, *first)));
        if after(end, known) > 0 {
            ends.insert(segment.from, end);
        }
        if segment.flags & ACK != 0 {
            let theirs = ends.get(&segment.to).copied().unwrap_or(segment.acknowledged);
            ensure!(after(segment.acknowledged, theirs) <= 0, "{segment:?} acknowledges what was never sent");
            let before = *acknowledged.entry(segment.from).or_insert(segment.acknowledged);
            ensure!(after(segment.acknowledged, before) >= 0, "{segment:?} takes an acknowledgement of {before} back");
            acknowledged.insert(segment.from, segment.acknowledged);
        }
    }
    for (port, (_, mut ranges)) in sent {
        ranges.sort_unstable();
        let mut reached = 0;
        for (begin, end) in ranges {
            ensure!(begin <= reached, "bytes {reached} to {begin} from port {port} were never on the wire");
            reached = reached.max(end);
        }
    }
    Ok(())
}

#[test]
fn a_peer_sees_no_reset_and_no_gap() {
    let lab = Lab::new().unwrap();
    wire_shows_a_pause(&lab).map_err(|error| panic!("{error:#}")).unwrap();
}

const SLEEPER: &str = "
import time, select
before = time.monotonic()
print('ready', flush=True)
time.sleep(2)
slept = time.monotonic() - before
select.select([], [], [], 0.2)
print('%.3f %.3f' % (slept, time.monotonic() - before), flush=True)
";

/// The pod's clock stands still while it is away, so a sleep takes what it was to take, and what its process was held for.
#[test]
fn a_sleep_ends_neither_early_nor_late() {
    let lab = Lab::new().unwrap();
    let image = lab.directory().join("image");
    let image = image.to_str().unwrap();
    lab.zap(&["run", "-d", "-n", "sleeper", "--net", "private", "--", "python3", "-c", SLEEPER]).unwrap();
    let log = || Ok::<_, anyhow::Error>(lab.pod("sleeper")?.log());
    let ready = wait_until("it to sleep", || {
        ensure!(log()?.contains("ready"), "it is not ready");
        Ok(())
    });
    ready.unwrap();
    lab.zap(&["checkpoint", "sleeper", "-o", image]).unwrap();
    // Longer than it has left.
    std::thread::sleep(Duration::from_secs(3));
    lab.zap(&["restart", image, "-d"]).unwrap();
    let slept: Vec<f64> = wait_until("it to wake", || {
        let log = log()?;
        let line = log.lines().find(|line| line.contains('.')).context("it sleeps")?;
        Ok(line.split(' ').map(|number| number.parse().unwrap()).collect())
    })
    .unwrap();
    // Late by what a busy machine takes to hold it, write it down and let it go.
    assert!((2.0..3.5).contains(&slept[0]), "{slept:?}");
    assert!(slept[1] - slept[0] >= 0.2, "{slept:?}");
}

const RECEIVER: &str = "
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('0.0.0.0', 80))
print('ready', flush=True)
while True:
    print(s.recv(100).decode(), flush=True)
";

fn datagrams_wait(lab: &Lab) -> Result<()> {
    lab.zap(&["run", "-d", "-n", "receiver", "--", "python3", "-c", RECEIVER])?;
    lab.attach_client()?;
    let log = || Ok::<_, anyhow::Error>(lab.pod("receiver")?.log());
    wait_until("the receiver", || {
        ensure!(log()?.contains("ready"), "it is not ready");
        Ok(())
    })?;
    let address: Ipv4Addr = lab.pods()?[0].address.clone().context("it has no address")?.parse()?;
    let end = AtomicBool::new(false);
    let sent = std::thread::scope(|scope| -> Result<u32> {
        let sender = scope.spawn(|| {
            lab.client().enter(|| -> Result<u32> {
                let socket = UdpSocket::bind("0.0.0.0:0")?;
                let mut sent = 0;
                while !end.load(Ordering::SeqCst) {
                    socket.send_to(sent.to_string().as_bytes(), served_at(address))?;
                    sent += 1;
                    std::thread::sleep(Duration::from_millis(2));
                }
                Ok(sent)
            })
        });
        let held = (0..10).try_for_each(|round| {
            let image = lab.directory().join(format!("image-{round}"));
            lab.zap(&["checkpoint", "receiver", "-o", image.to_str().unwrap(), "--leave-running"]).map(drop)
        });
        end.store(true, Ordering::SeqCst);
        let sent = sender.join().unwrap()?;
        held.and(sent)
    })?;
    wait_until("the last of them", || {
        let log = log()?;
        let mut came: Vec<u32> = log.lines().filter_map(|line| line.parse().ok()).collect();
        came.sort_unstable();
        ensure!(came == (0..sent).collect::<Vec<_>>(), "{} of {sent} came", came.len());
        Ok(())
    })
}

/// Nobody sends a datagram again: those that come while the pod is held wait for it on the host.
#[test]
fn datagrams_for_a_held_pod_wait() {
    if !Path::new("/dev/net/tun").exists() {
        println!("skipped: the host has no tap devices (/dev/net/tun)");
        return;
    }
    let lab = Lab::new().unwrap();
    datagrams_wait(&lab).map_err(|error| panic!("{error:#}")).unwrap();
}
