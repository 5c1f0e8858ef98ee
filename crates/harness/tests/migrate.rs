//! Guests that move to another host while they are at it (see `pod-guest`), by every strategy: each checks itself from inside,
//! at once, while some of its memory may still be on its way.

#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::io::Read;
use std::net::{Ipv4Addr, UdpSocket};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use harness::client::{Crowd, Prober};
use harness::lab::{
    Lab, PATIENCE, Pair, Pod, PodOptions, Way, options_of as options, served_at, wait_until, zap_binary,
};
use harness::viewer::Viewer;
use harness::workload::{Apache, Desktop, Mpm, Workload};
use nix::pty::{Winsize, openpty};

/// The way to a host: at most so many bytes a second, if it is slow.
fn way(to: &Lab, rate: Option<u64>) -> String {
    let slow = rate.map_or_else(String::new, |rate| format!("{} {rate} ", env!("CARGO_BIN_EXE_slow-pipe")));
    format!("{slow}{}", to.way_in())
}

fn start<'a>(lab: &'a Lab, kind: &str) -> Result<Pod<'a>> {
    lab.zap(&["run", "-d", "-n", "guest", "--cap-add", "sys_nice", "--", env!("CARGO_BIN_EXE_pod-guest"), kind])?;
    let pod = lab.pod("guest")?;
    wait_until("the guest to be ready", || {
        ensure!(pod.log().contains("ready\n"), "it has printed {:?}", pod.log());
        Ok(())
    })?;
    Ok(pod)
}

fn state(lab: &Lab) -> Result<Option<String>> {
    Ok(lab.pods()?.into_iter().find(|pod| pod.name == "guest").map(|pod| pod.state))
}

/// Lets the guest check itself.
fn check(lab: &Lab) -> Result<()> {
    let pod = lab.pod("guest")?;
    pod.exec(&["touch", "/tmp/go"])?;
    wait_until("the guest to end", || {
        ensure!(state(lab)?.as_deref() == Some("stopped"), "it is {:?} and has printed {:?}", state(lab)?, pod.log());
        Ok(())
    })?;
    ensure!(pod.log().ends_with("ok\n"), "it has printed {:?}", pod.log());
    Ok(())
}

/// A guest moves, over a way so slow that it goes on long before all has come, and checks itself there.
fn moves(kind: &str, strategy: &str, rate: Option<u64>) -> Result<()> {
    let (a, b) = (Lab::new()?, Lab::new()?);
    start(&a, kind)?;
    let via = way(&b, rate);
    let store = a.directory().join("store");
    std::fs::create_dir(&store)?;
    let options = options(strategy, &store);
    std::thread::scope(|scope| {
        let moving = scope.spawn(|| a.zap(&[&["migrate", "guest", "--via", &via][..], &options].concat()));
        wait_until("the guest to have moved", || {
            ensure!(state(&b)?.as_deref() == Some("running") || moving.is_finished(), "it is {:?}", state(&b)?);
            Ok(())
        })?;
        let checked = check(&b);
        let (stats, _) = moving.join().unwrap().context(kind.to_owned())?;
        eprintln!("{kind}, {strategy}: {stats}");
        checked
    })?;
    ensure!(a.pods()?.is_empty(), "something is left: {:?}", a.pods()?);
    ensure!(std::fs::read_dir(&store)?.next().is_none(), "something is left in the store");
    Ok(())
}

/// A guest that has left, most of whose memory is still where it was. `zap migrate` runs on; the way is slow.
fn leave(a: &Lab, b: &Lab, fault: &str) -> Result<Child> {
    let child = leaves(a, b, fault, Stdio::piped())?;
    wait_until("the guest to have moved", || {
        ensure!(!b.pods()?.is_empty(), "it has not");
        Ok(())
    })?;
    Ok(child)
}

/// The same while it leaves, with what `zap migrate` says.
fn leaves(a: &Lab, b: &Lab, fault: &str, says: Stdio) -> Result<Child> {
    start(a, "moving-threads")?;
    // Long enough for all that a test does before the rest has come.
    let via = way(b, Some(8 << 20));
    let words = ["migrate", "guest", "--via", &via, "--strategy", "copy-on-reference"];
    let mut command = Command::new(zap_binary()?);
    command.arg("--state").arg(a.state()).args(words).env("ZAP_FAULT", fault).stderr(says);
    a.host().spawn(command.env_remove("NO_COLOR").env_remove("CI"))
}

/// What comes to a terminal up to a word, or to its end.
fn shown(terminal: &mut File, word: &str) -> String {
    let (mut shown, mut part) = (String::new(), [0; 4096]);
    while !shown.contains(word) {
        match terminal.read(&mut part) {
            Ok(bytes) if bytes > 0 => shown += &String::from_utf8_lossy(&part[..bytes]),
            // Nobody has its other end any more.
            _ => break,
        }
    }
    shown
}

/// What `zap migrate` said in the end, and with what code it ended.
fn ended(child: Child) -> Result<(Option<i32>, String)> {
    let output = child.wait_with_output()?;
    Ok((output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned()))
}

/// Half of its memory is lost: it has been killed there, and says why; here it is as it was when it left.
fn lost_and_kept(a: &Lab, b: &Lab, says_why: bool) -> Result<()> {
    wait_until("the guest to be killed", || {
        ensure!(state(b)?.as_deref() == Some("stopped"), "it is {:?}", state(b)?);
        Ok(())
    })?;
    ensure!(b.try_zap(&["wait", "guest"])?.0.status.code() == Some(137), "it ended with another code");
    let log = b.pod("guest")?.log_of_errors();
    ensure!(log.contains("is lost: the rest of its memory") == says_why, "it has printed {log:?}");
    ensure!(state(a)?.as_deref() == Some("suspended"), "it is {:?}", state(a)?);
    a.zap(&["migrate", "--resolve", "guest", "keep"])?;
    check(a)
}

fn interrupt(child: &Child) {
    let pid = nix::unistd::Pid::from_raw(child.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
}

/// Ctrl-C while most of its memory is on its way, before it runs there: it goes on here.
fn interrupted(strategy: &str) -> Result<()> {
    let (a, b) = (Lab::new()?, Lab::new()?);
    start(&a, "moving-threads")?;
    let [flows, gate] = ["flows", "gate"].map(|name| a.directory().join(name).display().to_string());
    // Nothing passes any more once some has.
    let valve = format!("(stdbuf -o0 head -c 4000000; touch {flows}; until [ -e {gate} ]; do sleep 0.02; done; cat)");
    let via = format!("{valve} | {}", b.way_in());
    let mut command = Command::new(zap_binary()?);
    command.arg("--state").arg(a.state()).args(["migrate", "guest", "--via", &via, "--strategy", strategy]);
    let mut child = a.host().spawn(command.stderr(Stdio::piped()))?;
    wait_until("memory to be on its way", || {
        ensure!(Path::new(&flows).exists(), "nothing is");
        Ok(())
    })?;
    interrupt(&child);
    // What leads there does not hear of it, and has its stderr, too.
    child.wait()?;
    std::fs::write(gate, "")?;
    let (code, said) = ended(child)?;
    ensure!(code == Some(1) && said.contains("goes on here"), "{code:?} {said}");
    ensure!(state(&a)?.as_deref() == Some("running"), "it is {:?}", state(&a)?);
    wait_until("nothing to be there", || {
        ensure!(b.pods()?.is_empty(), "{:?}", b.pods()?);
        Ok(())
    })?;
    check(&a)
}

#[test]
fn a_migration_that_is_interrupted_leaves_the_pod_where_it_is() {
    for strategy in ["pre-copy", "stop-and-copy"] {
        interrupted(strategy).with_context(|| strategy.to_owned()).unwrap();
    }
}

#[test]
fn while_memory_follows_an_interrupt_only_says_what_it_would_mean() {
    let (a, b) = (Lab::new().unwrap(), Lab::new().unwrap());
    let window = Winsize { ws_row: 24, ws_col: 200, ws_xpixel: 0, ws_ypixel: 0 };
    let pty = openpty(&window, None).unwrap();
    let child = leaves(&a, &b, "", pty.slave.into()).unwrap();
    let mut terminal = File::from(pty.master);
    // It says so once it has heard that the guest runs there.
    let follows = shown(&mut terminal, "memory follows");
    assert!(follows.contains("memory follows"), "{follows}");
    interrupt(&child);
    let said = shown(&mut terminal, "Ctrl-C once more");
    assert!(said.contains("Ctrl-C once more"), "{said}");
    // What nobody reads would keep it from going on.
    let _ = terminal.read_to_end(&mut Vec::new());
    assert_eq!(ended(child).unwrap().0, Some(0));
    check(&b).unwrap();
}

#[test]
fn a_source_that_dies_while_it_is_needed_is_a_loss() {
    let (a, b) = (Lab::new().unwrap(), Lab::new().unwrap());
    let (code, said) = ended(leave(&a, &b, "migrate-serving").unwrap()).unwrap();
    assert_eq!(code, Some(1), "{said}");
    lost_and_kept(&a, &b, true).unwrap();
}

#[test]
fn a_destination_that_dies_while_it_fetches_is_a_loss() {
    let (a, b) = (Lab::new().unwrap(), Lab::new().unwrap());
    let (code, said) = ended(leave(&a, &b, "receive-fetching").unwrap()).unwrap();
    assert!(code == Some(1) && said.contains("--resolve guest keep"), "{code:?} {said}");
    lost_and_kept(&a, &b, false).unwrap();
}

/// The destination's monitor dies while it puts memory in place: the next one goes on with that, and nothing is lost.
fn another_goes_on_filling(kind: &str, strategy: &str, point: &str) -> Result<()> {
    let (a, b) = (Lab::new()?, Lab::new()?);
    start(&a, kind)?;
    let store = a.directory().join("store");
    std::fs::create_dir(&store)?;
    let via = format!("ZAP_FAULT={point} {}", b.way_in());
    a.zap(&[&["migrate", "guest", "--via", &via][..], &options(strategy, &store)].concat())?;
    ensure!(a.pods()?.is_empty(), "something is left: {:?}", a.pods()?);
    lives_without_its_monitor(&b)
}

/// The monitor dies, and the guest finds all that it had.
fn lives_without_its_monitor(lab: &Lab) -> Result<()> {
    wait_until("the monitor to be dead", || {
        let record = std::fs::read(lab.state().join("pods/guest/pod.json"))?;
        let record: serde_json::Value = serde_json::from_slice(&record)?;
        let pid = record["monitor"]["pid"].as_u64().with_context(|| format!("{record}"))?;
        ensure!(!Path::new(&format!("/proc/{pid}")).exists(), "it lives");
        Ok(())
    })?;
    check(lab)?;
    lab.pod("guest")?.remove()
}

#[test]
fn a_destination_that_dies_while_it_fills_loses_nothing() {
    for (kind, strategy, point) in [
        ("moving-memory", "pre-copy", "receive-fetching"),
        ("moving-memory", "stop-and-copy", "half-filled"),
        ("moving-threads", "pre-copy", "half-filled"),
        ("moving-threads", "flush", "half-filled"),
    ] {
        let context = || format!("{kind}, {strategy}, {point}");
        another_goes_on_filling(kind, strategy, point).with_context(context).unwrap();
    }
}

/// Much memory of a pod that is restarted is put in place once it runs, by the next monitor if the first one dies. The image
/// need not be there any more by then.
fn a_restart_is_filled(kind: &str, point: &str) -> Result<()> {
    let lab = Lab::new()?;
    let image = lab.directory().join("image");
    start(&lab, kind)?.checkpoint(&image, &[])?;
    let mut restart = Command::new(zap_binary()?);
    restart.arg("--state").arg(lab.state()).args(["restart", "-d"]).arg(&image).env("ZAP_FAULT", point);
    ensure!(lab.host().spawn(&mut restart)?.wait()?.success(), "it is not restarted");
    std::fs::remove_dir_all(&image)?;
    if point.is_empty() {
        // It is suspended, goes on, and is written down again while it is being filled.
        lab.zap(&["suspend", "guest"])?;
        lab.zap(&["resume", "guest"])?;
        lab.pod("guest")?.checkpoint(&image, &[])?;
        lab.zap(&["restart", image.to_str().context("a path")?, "-d"])?;
        check(&lab)?;
        return lab.pod("guest")?.remove();
    }
    lives_without_its_monitor(&lab)
}

#[test]
fn a_restarted_pod_runs_before_its_memory_is_in_place_and_loses_none() {
    for kind in ["moving-memory", "moving-threads"] {
        for point in ["", "half-filled"] {
            a_restart_is_filled(kind, point).with_context(|| format!("{kind}, {point}")).unwrap();
        }
    }
}

#[test]
fn what_is_kept_for_a_pod_is_listed_and_a_checkpoint_waits_for_it() {
    let (a, b) = (Lab::new().unwrap(), Lab::new().unwrap());
    let child = leave(&a, &b, "").unwrap();
    let kept = wait_until("something to be listed", || {
        let kept: serde_json::Value = serde_json::from_str(&a.zap(&["ls", "--residual", "--json"])?.0)?;
        ensure!(kept[0]["pod"] == "guest", "{kept}");
        Ok(kept)
    });
    assert!(kept.unwrap()[0]["bytes"].as_u64().unwrap() >= 48 << 20);
    let image = b.directory().join("image");
    b.pod("guest").unwrap().checkpoint(&image, &[]).unwrap();
    assert_eq!(ended(child).unwrap().0, Some(0));
    b.zap(&["restart", image.to_str().unwrap(), "-d"]).unwrap();
    check(&b).unwrap();
    assert_eq!(a.zap(&["ls", "--residual", "--json"]).unwrap().0.trim(), "[]");
}

#[test]
fn a_pod_that_ends_while_its_memory_comes_needs_no_more_of_it() {
    let (a, b) = (Lab::new().unwrap(), Lab::new().unwrap());
    let child = leave(&a, &b, "").unwrap();
    b.zap(&["rm", "-f", "guest"]).unwrap();
    let (code, said) = ended(child).unwrap();
    assert_eq!((code, a.pods().unwrap().len(), b.pods().unwrap().len()), (Some(0), 0, 0), "{said}");
}

/// The strategies, and a link for each: megabits a second.
const BY_LINK: [(&str, u64); 4] =
    [("stop-and-copy", 10_000), ("pre-copy", 1000), ("copy-on-reference", 100), ("flush", 1000)];

/// A web server moves under load: every answer is right, no connection is lost.
fn a_server_moves(strategy: &str, rate: Option<u64>, hops: usize) -> Result<()> {
    let pair = Pair::new()?;
    pair.shape(rate)?;
    let apache = Apache { mpm: Mpm::Event };
    let pod = pair.first.start_pod(&apache, "web", &PodOptions::default())?;
    let address = pod.served_at()?;
    let mut crowd = Crowd::open(pair.first.client(), address, 20, 2, PATIENCE)?;
    let store = pair.first.directory().join("store");
    std::fs::create_dir(&store)?;
    let options = options(strategy, &store);
    for hop in 0..hops {
        let prober = Prober::start(pair.first.client(), address, PATIENCE)?;
        let (pod, stats) = pair.migrate(hop.is_multiple_of(2), "web", Way::Link, &options)?;
        ensure!(pod.served_at()? == address, "it has another address: {:?}", pod.served_at()?);
        crowd.use_once().with_context(|| format!("hop {hop}"))?;
        let gaps = prober.finish().with_context(|| format!("hop {hop}"))?;
        eprintln!("{strategy}, hop {hop}: longest gap {:?}, {stats:?}", gaps.longest);
    }
    crowd.finish()?;
    let (here, there) = if hops.is_multiple_of(2) { (&pair.first, &pair.second) } else { (&pair.second, &pair.first) };
    apache.health(here, address)?;
    ensure!(there.pods()?.is_empty(), "something is left: {:?}", there.pods()?);
    here.pod("web")?.remove()
}

#[test]
fn a_server_moves_under_load_by_every_strategy() {
    for (strategy, rate) in BY_LINK {
        a_server_moves(strategy, Some(rate), 1).with_context(|| strategy.to_owned()).unwrap();
    }
}

#[test]
fn a_server_hops_ten_times_back_and_forth() {
    a_server_moves("pre-copy", None, 10).unwrap();
}

/// Says which of the numbers below the one of the last datagram have not come.
const RECEIVER: &str = "
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('0.0.0.0', 80))
s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
came = set()
print('ready', flush=True)
while True:
    word, number = s.recv(100).decode().split()
    came.add(int(number))
    if word == 'last':
        print('missing', sorted(set(range(int(number))) - came), flush=True)
";

/// Nobody sends a datagram again: those that come for a pod while it is on its way go after it.
fn datagrams_go_after_a_pod() -> Result<()> {
    let pair = Pair::new()?;
    pair.first.zap(&["run", "-d", "-n", "receiver", "--", "python3", "-c", RECEIVER])?;
    pair.first.attach_client()?;
    wait_until("the receiver", || {
        ensure!(pair.first.pod("receiver")?.log().contains("ready"), "it is not ready");
        Ok(())
    })?;
    let address: Ipv4Addr = pair.first.pods()?[0].address.clone().context("it has no address")?.parse()?;
    let end = AtomicBool::new(false);
    let send = || -> Result<()> {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        for number in 0.. {
            let word = if end.load(Ordering::SeqCst) { "last" } else { "another" };
            socket.send_to(format!("{word} {number}").as_bytes(), served_at(address))?;
            if word == "last" {
                break;
            }
            // So few that the receiver's queue has room for those of some seconds.
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    };
    std::thread::scope(|scope| -> Result<()> {
        let sender = scope.spawn(|| pair.first.client().enter(send));
        let moved = (0..4).try_for_each(|hop: u32| {
            pair.migrate(hop.is_multiple_of(2), "receiver", Way::Link, &["--stats"]).map(drop).context(hop)
        });
        end.store(true, Ordering::SeqCst);
        moved.and(sender.join().unwrap()?)
    })?;
    wait_until("the last datagram", || {
        let log = pair.first.pod("receiver")?.log();
        ensure!(log.contains("missing []"), "it says {log:?}");
        Ok(())
    })
}

#[test]
fn datagrams_for_a_pod_on_its_way_go_after_it() {
    if !Path::new("/dev/net/tun").exists() {
        println!("skipped: the host has no tap devices (/dev/net/tun)");
        return;
    }
    datagrams_go_after_a_pod().unwrap();
}

/// Resets that the client's side of the network has seen or sent: RstIn is not counted by the kernel but in these.
fn resets(client: &harness::lab::Netns) -> Result<(u64, u64)> {
    let text = client.enter(|| std::fs::read_to_string("/proc/thread-self/net/snmp"))??;
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("Tcp: "));
    let (names, values) = (lines.next().context("names")?, lines.next().context("values")?);
    let value = |wanted: &str| {
        let found = names.split(' ').zip(values.split(' ')).find(|(name, _)| *name == wanted);
        found.context("a counter")?.1.parse::<u64>().context("a number")
    };
    Ok((value("EstabResets")?, value("OutRsts")?))
}

/// A desktop moves, on links of that many megabits a second, while its viewer stays connected.
fn a_desktop_moves(desktop: Desktop, hops: &[(&'static str, u64)]) {
    let pair = Pair::new().unwrap();
    let pod = pair.first.start_pod(&desktop, "desk", &PodOptions::default()).unwrap();
    let address = pod.served_at().unwrap();
    let client = pair.first.client();
    let viewer = Viewer::connect(client, Desktop::screen_at(address)).unwrap();
    let before = resets(client).unwrap();
    let store = pair.first.directory().join("store");
    std::fs::create_dir(&store).unwrap();
    for (hop, &(strategy, rate)) in hops.iter().enumerate() {
        pair.shape(Some(rate)).unwrap();
        viewer.watch();
        let (pod, stats) = pair
            .migrate(hop.is_multiple_of(2), "desk", Way::Link, &options(strategy, &store))
            .context(strategy)
            .unwrap();
        assert_eq!(pod.served_at().unwrap(), address);
        viewer.await_update().context(strategy).unwrap();
        assert!(viewer.refresh().unwrap().shows_something(), "{strategy}: the screen is empty");
        eprintln!("{}, {strategy}: {:?}, {stats:?}", desktop.size(), viewer.watched().unwrap());
    }
    assert_eq!(resets(client).unwrap(), before, "a connection was reset");
    pair.first.pod("desk").unwrap().remove().unwrap();
}

#[test]
fn a_desktop_moves_by_every_strategy_while_its_viewer_stays_connected() {
    a_desktop_moves(Desktop::Classic, &BY_LINK);
}

#[test]
fn the_full_desktop_moves_by_every_strategy_while_its_viewer_stays_connected() {
    // What it has of memory takes long on slower links.
    a_desktop_moves(Desktop::Full, &BY_LINK.map(|(strategy, rate)| (strategy, rate.max(1000))));
}

const SLOW: Option<u64> = Some(30 << 20);

#[test]
fn memory_is_changed_in_every_way_while_it_comes() {
    moves("moving-memory", "copy-on-reference", SLOW).unwrap();
}

#[test]
fn threads_touch_what_has_not_come() {
    moves("moving-threads", "copy-on-reference", SLOW).unwrap();
}

#[test]
fn memory_comes_from_a_store() {
    moves("moving-memory", "flush", None).unwrap();
    moves("moving-threads", "flush", None).unwrap();
}

#[test]
fn what_a_guest_has_moves_by_every_strategy() {
    for kind in ["tree", "copy-on-write", "heap", "big", "protections", "locked", "robust-list", "rseq", "threads"] {
        for strategy in ["stop-and-copy", "pre-copy", "copy-on-reference", "flush"] {
            moves(kind, strategy, None).with_context(|| format!("{kind} by {strategy}")).unwrap();
        }
    }
}
