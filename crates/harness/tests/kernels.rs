//! Pods on other kernels than this machine's, and moving between them and this one. Guests are booted from Debian's packages;
//! a machine that cannot have them says so, and tries nothing.
//!
//! In the ordinary suite Linux 6.1 is tried; with `ZAP_KERNELS=all` (`just test-kernels`), or names of some (`6.12,7`), the newer
//! ones, a desktop that moves, and on the first of them guests of every sort (`ZAP_GUESTS=plain,tree` names some, for all).

#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use harness::kernels::{Kernel, Machine, SERIES, Series, Unavailable, Visitor, World, fetch};
use harness::lab::{PATIENCE, PodOptions, wait_until};
use harness::viewer::{Picture, Viewer};
use harness::workload::Desktop;

const CLOCK_SERVER: &str = env!("CARGO_BIN_EXE_clock-server");

/// The kernels to try, unless there are none here.
fn kernels() -> Vec<Kernel> {
    let named = std::env::var("ZAP_KERNELS").unwrap_or_else(|_| SERIES[0].name.into());
    let is_named = |series: &Series| named.split(',').any(|name| name == "all" || name == series.name);
    let mut found = Vec::new();
    for series in SERIES.into_iter().filter(is_named) {
        match fetch(series) {
            Ok(kernel) => found.push(kernel),
            Err(error) if error.is::<Unavailable>() => println!("Linux {} is not tried: {error}", series.name),
            Err(error) => panic!("{error:#}"),
        }
    }
    found
}

/// What a guest has to say when something failed there.
fn said(visitor: &Visitor<'_>) -> String {
    let log = visitor.guest.run(&["dmesg"]).unwrap_or_default();
    let last: Vec<&str> = log.lines().rev().take(20).collect();
    format!("{}{}", visitor.guest.console(), last.into_iter().rev().collect::<Vec<_>>().join("\n"))
}

/// A connection to a clock server in a pod, which must live as long as the pod.
struct Connection {
    stream: BufReader<TcpStream>,
    asked: u32,
    reads: u64,
}

impl Connection {
    fn open(world: &World, address: SocketAddr) -> Result<Self> {
        let connect = || TcpStream::connect_timeout(&address, PATIENCE);
        let stream = world.here.client().enter(connect)?.with_context(|| format!("connecting to {address}"))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self { stream: BufReader::new(stream), asked: 0, reads: 0 })
    }

    /// Asks until clocks have been read again: each answer is to its question, and they have been right all the while.
    fn check(&mut self) -> Result<()> {
        let before = self.reads;
        let deadline = Instant::now() + PATIENCE;
        while self.reads <= before {
            ensure!(Instant::now() < deadline, "nobody reads clocks any more: {before} times");
            self.reads = self.ask()?;
        }
        Ok(())
    }

    /// How often clocks have been read.
    fn ask(&mut self) -> Result<u64> {
        self.asked += 1;
        writeln!(self.stream.get_mut(), "{}", self.asked)?;
        let mut line = String::new();
        self.stream.read_line(&mut line).context("waiting for an answer")?;
        let words: Vec<&str> = line.trim().splitn(3, ' ').collect();
        let [asked, reads, verdict] = words[..] else { anyhow::bail!("the answer is {line:?}") };
        ensure!(asked == self.asked.to_string(), "question {} is answered by {line:?}", self.asked);
        ensure!(verdict == "right", "{verdict}");
        Ok(reads.parse()?)
    }
}

fn address_of(listed: &[harness::lab::Listed], pod: &str) -> Result<SocketAddr> {
    let listed = listed.iter().find(|listed| listed.name == pod).with_context(|| format!("there is no pod {pod}"))?;
    let address = listed.address.as_deref().with_context(|| format!("it has no address: {listed:?}"))?;
    Ok((address.parse::<std::net::IpAddr>()?, 80).into())
}

/// What the C library must not find, for it would use it, and the emulator does not have it.
const AS_EMULATED: &str =
    "GLIBC_TUNABLES=glibc.cpu.hwcaps=-AVX512F,-AVX512VL,-AVX512BW,-AVX512DQ,-AVX512CD,-XSAVEC,-RTM";

/// Guests of pods (see `pod-guest`) of every sort, tried where there is time for that.
const KINDS: &[&str] = &[
    "plain",
    "tree",
    "zombies",
    "groups",
    "threads",
    "thread-ids",
    "rseq",
    "robust-list",
    "vector-registers",
    "x87",
    "actions",
    "pending",
    "posix-timers",
    "interval-timers",
    "clocks",
    "clock-watchers",
    "credentials",
    "private",
    "shared-anonymous",
    "file-private",
    "file-shared",
    "file-deleted",
    "copy-on-write",
    "heap",
    "big",
    "protections",
    "grows-down",
    "locked",
    "vdso",
    "memfd",
    "pipe-resized",
    "inotify",
    "user-namespace",
    "network-namespace",
    "pid-namespace",
    "time-namespace",
    "cgroup-namespace",
    "mqueue",
    "semaphores-undo",
    "locks-waiting",
    "connecting",
    "fast-open",
    "corked-stream",
    "echo-unread",
    "unix-names",
    "unix-backlog",
    "unix-backlog-messages",
    "corked-datagram",
    "mqueue-notify",
    "own-segments",
    "rights-cycle",
    "raw-socket",
    "packet-socket",
    "many-descriptors",
    "asynchronous-io",
    "sandbox",
    "terminal-full",
    "pidfd",
    "proc-files",
    "sleeps",
    "long-sleep",
    "waiting-calls",
    "sealed",
    "named-memory",
    "multicast-groups",
    "netlink-groups",
    "port-shared",
    "udp-lite",
    "alternate-stack",
    "sigsuspend",
    "background-job",
    "daemon",
    "umask",
    "chroot",
    "cwd-deleted",
    "timer-slack",
    "capabilities",
    "no-new-privileges",
    "limits",
    "names",
    "advice",
    "executable-memory",
    "low-address",
    "many-mappings",
    "program-replaced",
    "moving-memory",
    "moving-threads",
    "browser-sandbox",
];

fn everything_is_wanted() -> bool {
    std::env::var("ZAP_KERNELS").is_ok()
}

/// Lets the guest in a pod check itself, and removes the pod.
fn check_guest(visitor: &Visitor<'_>, pod: &str) -> Result<()> {
    visitor.zap(&["exec", pod, "touch", "/tmp/go"])?;
    let (code, ..) = visitor.try_zap(&["wait", pod])?;
    let log = visitor.zap(&["logs", pod])?;
    ensure!(code == 0 && log.ends_with("ok\n"), "{pod} ended with {code} and has printed {log:?}");
    visitor.zap(&["rm", pod]).map(drop)
}

/// A guest is checkpointed and goes on, and is restarted.
fn keeps(visitor: &Visitor<'_>, kind: &str) -> Result<()> {
    let program = env!("CARGO_BIN_EXE_pod-guest");
    visitor.guest.run(&["rm", "-rf", "/run/image"])?;
    visitor.zap(&["run", "-d", "-n", "original", "--net", "private", "--cap-add", "sys_nice", "--", program, kind])?;
    visitor.await_log("original", "ready\n")?;
    visitor.zap(&["checkpoint", "original", "-o", "/run/image", "--leave-running"])?;
    check_guest(visitor, "original")?;
    visitor.zap(&["restart", "/run/image", "-d", "-n", "copy"])?;
    check_guest(visitor, "copy")
}

/// Those tried on every kernel.
const FEW: &[&str] = &["vector-registers", "moving-memory", "pipe-resized"];

/// Keeps guests of these kinds on a kernel, and says which were not kept, and how.
fn keep_all(kernel: &Kernel, kinds: &[&str]) -> Vec<String> {
    let world = World::new().unwrap();
    let visitor = world.invite(kernel, Machine { memory: 1024, ..Machine::ORDINARY }).unwrap();
    let mut failed = Vec::new();
    for kind in kinds {
        let result = keeps(&visitor, kind);
        let said = result.as_ref().map_or_else(|error| format!("{error:#}"), |()| "ok".to_owned());
        eprintln!("Linux {}, {kind}: {said}", kernel.release);
        if result.is_err() {
            failed.push(format!("Linux {}, {kind}: {said}", kernel.release));
            let _ = visitor.try_zap(&["rm", "-f", "original", "copy"]);
        }
    }
    failed
}

/// Of every sort on the first of the kernels that are wanted, where there is time for that.
#[test]
fn guests_are_kept_on_other_kernels() {
    let named = std::env::var("ZAP_GUESTS");
    let named: Option<Vec<&str>> = named.as_ref().ok().map(|names| names.split(',').collect());
    let kinds = |is_first: bool| match &named {
        Some(named) => named,
        None if is_first && everything_is_wanted() => KINDS,
        None => FEW,
    };
    let failed: Vec<String> =
        kernels().iter().enumerate().flat_map(|(place, kernel)| keep_all(kernel, kinds(place == 0))).collect();
    assert!(failed.is_empty(), "{failed:#?}");
}

/// A server with a connection moves in and out, and on.
fn moves(world: &World, visitor: &Visitor<'_>) -> Result<()> {
    visitor.zap(&["run", "-d", "-n", "clock", "--", CLOCK_SERVER])?;
    visitor.await_log("clock", "ready")?;
    let address = address_of(&visitor.pods()?, "clock")?;
    let mut connection = Connection::open(world, address)?;
    connection.check()?;
    for hop in 0..2 {
        let out = visitor.give("clock", &[]).with_context(|| format!("out, hop {hop}"))?;
        let log = world.here.try_zap(&["logs", "clock"])?.0;
        let here = address_of(&world.here.pods()?, "clock").with_context(|| format!("{log:?}"))?;
        ensure!(here == address, "it has another address here");
        connection.check().with_context(|| format!("here, hop {hop}"))?;
        let back = visitor.take("clock", &[]).with_context(|| format!("in, hop {hop}"))?;
        connection.check().with_context(|| format!("there, hop {hop}"))?;
        eprintln!("hop {hop}: out {out:?}, in {back:?}");
    }
    visitor.zap(&["rm", "-f", "clock"])?;
    Ok(())
}

/// What a pod uses of the processor, and the guest lacks, is named before the pod is held; what does not use it moves.
fn asks_ahead(world: &World, visitor: &Visitor<'_>) -> Result<()> {
    let here = &world.here;
    here.zap(&["run", "-d", "-n", "wide", "--", CLOCK_SERVER, "1"])?;
    here.attach_client()?;
    let mut connection = connected(world, address_of(&here.pods()?, "wide")?)?;
    if is_x86_feature_detected!("avx512vl") && is_x86_feature_detected!("avx512bw") {
        let (code, _, complaint) = visitor.try_to_take("wide", &[])?;
        ensure!(code == 4 && complaint.contains("AVX-512"), "it ended with {code}: {complaint}");
        connection.check().context("after a refusal")?;
        ensure!(visitor.pods()?.is_empty(), "something is left in the guest: {:?}", visitor.pods()?);
    }
    here.zap(&["rm", "-f", "wide"])?;
    here.zap(&["run", "-d", "-n", "narrow", "-e", AS_EMULATED, "--", CLOCK_SERVER, "1"])?;
    here.attach_client()?;
    let mut connection = connected(world, address_of(&here.pods()?, "narrow")?)?;
    visitor.take("narrow", &[])?;
    connection.check().context("there")?;
    visitor.give("narrow", &[])?;
    connection.check().context("here again")?;
    here.zap(&["rm", "-f", "narrow"]).map(drop)
}

/// A connection to a server that may be beginning still.
fn connected(world: &World, address: SocketAddr) -> Result<Connection> {
    let mut connection = wait_until("the server to listen", || Connection::open(world, address))?;
    connection.check()?;
    Ok(connection)
}

#[test]
fn what_the_guest_lacks_is_named_before_the_hold() {
    for kernel in kernels().iter().take(1) {
        let world = World::new().unwrap();
        let visitor = world.invite(kernel, Machine::ORDINARY).unwrap();
        asks_ahead(&world, &visitor).with_context(|| said(&visitor)).unwrap();
    }
}

#[test]
fn a_server_moves_between_kernels_with_its_connection() {
    for kernel in kernels() {
        let world = World::new().unwrap();
        let visitor = world.invite(&kernel, Machine::ORDINARY).unwrap();
        moves(&world, &visitor).with_context(|| said(&visitor)).unwrap();
    }
}

/// Long enough for anything drawn late to be seen.
const CALM: Duration = Duration::from_millis(400);

/// The screen is as it was, outside what moves by itself, and that moves.
fn screen_goes_on(viewer: &Viewer, before: &Picture) -> Result<()> {
    viewer.await_update().context("nothing moves on the screen")?;
    let moving = Desktop::Classic.moving();
    wait_until("the screen to be as it was", || {
        let now = viewer.refresh()?;
        ensure!(before.difference(&now, moving).is_none(), "it differs in {:?}", before.difference(&now, moving));
        Ok(())
    })
}

/// Kernels that do not say whether an eventfd is a semaphore: whoever has one is kept there (known failure 28).
const SILENT: &str = "6.1.";

/// It does not leave, says why, and goes on.
fn stays_there(visitor: &Visitor<'_>, viewer: &Viewer, before: &Picture) -> Result<()> {
    let (code, _, complaint) = visitor.try_to_give("desk", &[])?;
    ensure!(code == 3 && complaint.contains("eventfd"), "it ended with {code}: {complaint}");
    screen_goes_on(viewer, before).context("after a refusal")?;
    visitor.zap(&["rm", "-f", "desk"]).map(drop)
}

/// The classic desktop moves in and out, and on, while its viewer stays connected.
fn a_desktop_moves(world: &World, visitor: &Visitor<'_>) -> Result<()> {
    let options = PodOptions { options: vec!["-e".into(), AS_EMULATED.into()] };
    let pod = world.here.start_pod(&Desktop::Classic, "desk", &options)?;
    let viewer = Viewer::connect(world.here.client(), Desktop::screen_at(pod.served_at()?))?;
    let before = viewer.settled(Desktop::Classic.moving(), CALM)?;
    for hop in 0..2 {
        let taken = visitor.take("desk", &[]).with_context(|| format!("in, hop {hop}"))?;
        screen_goes_on(&viewer, &before).with_context(|| format!("there, hop {hop}"))?;
        if visitor.guest.run(&["uname", "-r"])?.starts_with(SILENT) {
            return stays_there(visitor, &viewer, &before);
        }
        let given = visitor.give("desk", &[]).with_context(|| format!("out, hop {hop}"))?;
        screen_goes_on(&viewer, &before).with_context(|| format!("here, hop {hop}"))?;
        eprintln!("hop {hop}: in {taken:?}, out {given:?}");
    }
    world.here.pod("desk")?.remove()
}

#[test]
fn a_desktop_moves_between_kernels_while_its_viewer_stays_connected() {
    if !everything_is_wanted() {
        println!("skipped: this takes minutes (just test-kernels)");
        return;
    }
    for kernel in kernels() {
        let world = World::new().unwrap();
        let visitor = world.invite(&kernel, Machine { memory: 1536, ..Machine::ORDINARY }).unwrap();
        let context = || format!("Linux {}: {}", kernel.release, said(&visitor));
        a_desktop_moves(&world, &visitor).with_context(context).unwrap();
    }
}
