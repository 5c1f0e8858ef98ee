//! The pod's monitor is killed at every named point of a birth, a checkpoint and a restart, and what it does fails there.

#![allow(missing_docs)]

mod common;
#[path = "bad_input/counter.rs"]
mod counter;

use std::path::Path;
use std::process::Stdio;

use common::{Done, Host, Outcomes, eventually, fault_points, finish, kill};
use counter::{COUNT, Counter, SERVE};

/// A command whose monitor dies, or fails, at a point.
fn die_at(host: &Host, point: &str, words: &[&str]) -> Done {
    let mut command = host.zap(words);
    finish(command.env("ZAP_FAULT", point).stdin(Stdio::null()))
}

/// Everything in a directory but what `known` says.
fn others(directory: &Path, known: &[&str]) -> Vec<String> {
    let entries = std::fs::read_dir(directory).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    entries.filter(|name| !known.contains(&name.as_str())).collect()
}

fn checkpoint_dies(options: &[&str]) {
    let mut outcomes = Outcomes::of(if options.is_empty() { "checkpoint" } else { "checkpoint-left-running" });
    let mut note = |point: &str, outcome: &str| outcomes.note_at(point, outcome);
    for point in fault_points("checkpoint-") {
        let point = &*point;
        if point == "checkpoint-let-go" && options.is_empty() {
            continue; // A pod that is to be gone is not let go.
        }
        let host = Host::new();
        let counter = Counter::start(&host, "counter", &[]);
        let images = host.path("images");
        std::fs::create_dir(&images).unwrap();
        let image = images.join("image");
        let died = die_at(&host, point, &[&["checkpoint", "counter", "-o", image.to_str().unwrap()], options].concat());
        assert_eq!(died.code, 1, "{point}: {died:?}");
        assert!(died.stderr.starts_with("zap: ") && died.stderr.lines().count() == 1, "{point}: {died:?}");
        if point == "checkpoint-written" && options.is_empty() {
            // The pod has ended, its image is whole.
            eventually("it is known to have ended", || host.row("counter")["state"] == "stopped");
            host.ok(["rm", "counter"]);
            host.ok(["restart", image.to_str().unwrap(), "-d"]);
            Counter::of(&host, "counter").goes_on();
            note(point, "the pod has ended and its image is whole");
            continue;
        }
        assert_eq!(host.row("counter")["state"], "running", "{point}");
        note(point, "the pod runs on");
        counter.goes_on();
        if image.exists() {
            // It was killed after the image got its name: then it is whole.
            assert_eq!(point, "checkpoint-written");
            host.ok(["verify", image.to_str().unwrap()]);
        }
        assert_eq!(others(&images, &["image"]), Vec::<String>::new(), "{point}: a partial image is left");
        let again = images.join("again");
        host.ok(["checkpoint", "counter", "-o", again.to_str().unwrap()]);
        host.ok(["restart", again.to_str().unwrap(), "-d"]);
        Counter::of(&host, "counter").goes_on();
    }
    outcomes.write();
}

#[test]
fn a_pod_outlives_a_checkpoint_that_is_killed() {
    checkpoint_dies(&[]);
}

#[test]
fn a_pod_outlives_a_checkpoint_left_running_that_is_killed() {
    checkpoint_dies(&["--leave-running"]);
}

/// Interfaces and rules of the host's.
fn network(host: &Host) -> String {
    let run = |words: &[&str]| finish(host.command(words[0]).args(&words[1..])).stdout;
    [&["ip", "-o", "link"][..], &["ip", "-o", "route"], &["nft", "list", "ruleset"]].map(run).concat()
}

/// Processes that zap has started for this host.
fn processes(host: &Host) -> Vec<String> {
    let state = format!("ZAP_STATE={}", host.state().display());
    let of = |entry: std::fs::DirEntry| {
        let environment = std::fs::read(entry.path().join("environ")).ok()?;
        let is_ours = environment.split(|byte| *byte == 0).any(|one| one == state.as_bytes());
        is_ours.then(|| format!("{:?} {:?}", entry.file_name(), std::fs::read_to_string(entry.path().join("comm"))))
    };
    std::fs::read_dir("/proc").unwrap().filter_map(|entry| of(entry.unwrap())).collect()
}

/// No pod is listed, and nothing of one is there: a host as `before`.
fn nothing_is_left(host: &Host, before: &str, point: &str) {
    assert_eq!(host.json(["ls", "--json"]), serde_json::json!([]), "{point}");
    eventually("no process is left", || processes(host).is_empty());
    assert!(host.cgroups().is_empty(), "{point}: {:?}", host.cgroups());
    eventually("the network is as before", || network(host) == before);
    for place in ["pods", "storage/pods"] {
        assert_eq!(others(&host.state().join(place), &[]), Vec::<String>::new(), "{point}");
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(host.state().to_str().unwrap()), "{point}");
}

/// Has a command, which begins a pod that counts, be cut off at these points. The last of all finds the pod begun.
fn births_are_cut_off(host: &Host, table: &str, words: &[&str], points: impl Iterator<Item = String>, last: &str) {
    let mut outcomes = Outcomes::of(table);
    let before = network(host);
    for point in points {
        let died = die_at(host, &point, words);
        assert_eq!(died.code, 125, "{point}: {died:?}");
        assert!(died.stderr.starts_with("zap: ") && died.stderr.lines().count() == 1, "{point}: {died:?}");
        let lives = point == last && host.json(["ls", "--json"]) != serde_json::json!([]);
        outcomes.note_at(&point, if lives { "the pod lives" } else { "nothing is left" });
        if lives {
            // All was done.
            Counter::of(host, "counter").begins();
            host.ok(["rm", "-f", "counter"]);
        }
        nothing_is_left(host, &before, &point);
        host.ok(words);
        Counter::of(host, "counter").begins();
        host.ok(["rm", "-f", "counter"]);
    }
    outcomes.write();
}

#[test]
fn nothing_is_left_of_a_birth_that_is_killed() {
    let host = Host::new();
    let command = format!("{SERVE} {COUNT}");
    let limits = ["--memory", "512m", "--pids", "100"];
    let run = [&["run", "-d", "-n", "counter", "-p", "8080:80"][..], &limits, &["--", "sh", "-c", &command]].concat();
    let points = fault_points("birth-").chain(fault_points("run-"));
    births_are_cut_off(&host, "birth", &run, points, "run-done");
}

#[test]
fn nothing_is_left_of_a_restart_that_is_killed() {
    let host = Host::new();
    let before = network(&host);
    Counter::start(&host, "counter", &["-p", "8080:80"]);
    let image = host.path("image");
    let image = image.to_str().unwrap();
    host.ok(["checkpoint", "counter", "-o", image]);
    eventually("the network is as before", || network(&host) == before);
    let points = fault_points("restart-").chain(fault_points("birth-"));
    births_are_cut_off(&host, "restart", &["restart", image, "-d"], points, "restart-done");
}

/// Whoever has the address of a pod that was killed, with its monitor, before anybody took note: nothing is taken from it, and
/// what led to the other does not lead to it.
#[test]
fn a_killed_pod_takes_nothing_from_who_has_its_address() {
    let host = Host::new();
    let before = network(&host);
    Counter::start(&host, "gone", &["-p", "8080:80"]);
    let (address, known) = (host.row("gone")["address"].clone(), host.json(["inspect", "--json", "gone"]));
    [&known["monitor"], &known["init"]].iter().for_each(|process| kill(process["pid"].as_i64().unwrap() as i32));
    eventually("its link is gone", || !network(&host).contains("zap 02:"));
    assert!(network(&host).contains("8080"), "somebody has taken note");
    host.ok(["run", "-d", "-n", "heir", "--", "sh", "-c", &format!("{SERVE} {COUNT}")]);
    assert!(!network(&host).contains("8080"), "{}", network(&host));
    let heir = Counter::of(&host, "heir");
    // To list them is to take note.
    heir.begins();
    assert_eq!((&host.row("gone")["state"], &host.row("heir")["address"]), (&"stopped".into(), &address));
    host.ok(["rm", "gone"]);
    heir.goes_on();
    host.ok(["rm", "-f", "heir"]);
    nothing_is_left(&host, &before, "in the end");
}

/// A destination that says so many bytes and then nothing more: whoever interrupts the command has the pod as it was, also
/// where the destination had put it together already.
#[test]
fn a_pod_outlives_a_peer_that_stalls() {
    let (host, other) = (Host::new(), Host::new());
    let counter = Counter::start(&host, "counter", &["--net", "private"]);
    let receive = other.zap(["receive"]);
    let words: Vec<&str> =
        std::iter::once(receive.get_program()).chain(receive.get_args()).map(|w| w.to_str().unwrap()).collect();
    let mut outcomes = Outcomes::of("stalled");
    for bytes in [0, 8, 30, 60, 90] {
        let state = other.state();
        let way =
            format!("ZAP_STATE={} {} | (stdbuf -o0 head -c {bytes}; exec sleep 20)", state.display(), words.join(" "));
        let mut migrate = host.zap(["migrate", "counter", "--via", &way]);
        let mut child = migrate.stdin(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(700));
        assert_eq!(child.try_wait().unwrap(), None, "{bytes} bytes: it has not stalled");
        child.kill().unwrap();
        child.wait().unwrap();
        eventually("the pod runs here", || host.row("counter")["state"] == "running");
        counter.goes_on();
        eventually("nothing is there", || other.json(["ls", "--json"]) == serde_json::json!([]));
        outcomes.note(format!("destination stalls after {bytes} bytes; command killed"), "the pod runs on here alone");
    }
    outcomes.write();
}
