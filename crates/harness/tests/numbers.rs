//! Clocks and numbers across a checkpoint and a restart: what a peer's wire shows of a connection, and what sleeps take.

#![allow(clippy::unwrap_used)]

use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use harness::client::Trace;
use harness::lab::{Lab, PATIENCE, served_at, wait_until};

const SERVER: &str = "
import socket, time
s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); s.bind(('0.0.0.0', 80)); s.listen(1)
print('ready', flush=True)
c, _ = s.accept(); c.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
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
    let trace = Trace::start(lab.client())?;
    let mut stream = lab.client().enter(|| TcpStream::connect(address))??;
    stream.set_read_timeout(Some(PATIENCE))?;
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
    // Each is a segment, but where the kernel had to gather some.
    numbers(&mut stream, &mut next, 1000)?;
    let port = stream.local_addr()?.port();
    let segments = trace.finish()?.check_connection(port)?;
    ensure!(segments > 300, "only {segments} segments were seen");
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
slept = time.monotonic()
select.select([], [], [], 0.2)
print('%.6f %.6f' % (slept - before, time.monotonic() - slept), flush=True)
# Whoever is to write it down may come late.
time.sleep(1000)
";

/// How long the pod lies on a disk.
const AWAY: Duration = Duration::from_secs(6);

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
    let (_, checkpoint) = lab.zap(&["checkpoint", "sleeper", "-o", image]).unwrap();
    // Longer than it has left.
    std::thread::sleep(AWAY);
    let (_, restart) = lab.zap(&["restart", image, "-d"]).unwrap();
    let waits: Vec<f64> = wait_until("it to wake", || {
        let log = log()?;
        let line = log.lines().find(|line| line.contains('.')).context("it sleeps")?;
        Ok(line.split(' ').map(|number| number.parse().unwrap()).collect())
    })
    .unwrap();
    // Late by what a busy machine takes to hold it, write it down, let it go and have it run: not by where it lay meanwhile.
    let latest = 2.0 + (checkpoint + restart + AWAY / 2).as_secs_f64();
    assert!((2.0..latest).contains(&waits[0]), "{waits:?}, not before {latest}");
    // A wait that begins after it is one of the same clock.
    assert!(waits[1] >= 0.2, "{waits:?}");
}

const RECEIVER: &str = "
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('0.0.0.0', 80))
s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
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
                    // So few that the receiver's queue has room for those of some seconds.
                    std::thread::sleep(Duration::from_millis(5));
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
