//! The pod's monitor is killed at every named point of a checkpoint and of a restart, and what it does fails there.

#![allow(missing_docs)]

mod common;
#[path = "bad_input/counter.rs"]
mod counter;

use std::path::Path;
use std::process::Stdio;

use common::{Done, Host, Outcomes, eventually, fault_points, finish};
use counter::Counter;

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

#[test]
fn nothing_is_left_of_a_restart_that_is_killed() {
    let host = Host::new();
    let before = network(&host);
    Counter::start(&host, "counter", &["-p", "8080:80"]);
    let image = host.path("image");
    let image = image.to_str().unwrap();
    host.ok(["checkpoint", "counter", "-o", image]);
    eventually("the network is as before", || network(&host) == before);
    let mut outcomes = Outcomes::of("restart");
    for point in fault_points("restart-") {
        let point = &*point;
        let died = die_at(&host, point, &["restart", image, "-d"]);
        assert_eq!(died.code, 125, "{point}: {died:?}");
        assert!(died.stderr.starts_with("zap: ") && died.stderr.lines().count() == 1, "{point}: {died:?}");
        let listed = host.json(["ls", "--json"]);
        let lives = point == "restart-done" && listed != serde_json::json!([]);
        let outcome = if lives { "the pod lives" } else { "nothing is left" };
        outcomes.note_at(point, outcome);
        if lives {
            // All was done: the pod lives.
            Counter::of(&host, "counter").goes_on();
            host.ok(["rm", "-f", "counter"]);
        } else {
            assert_eq!(listed, serde_json::json!([]), "{point}");
        }
        assert!(host.cgroups().is_empty(), "{point}");
        eventually("the network is as before", || network(&host) == before);
        for place in ["pods", "storage/pods"] {
            assert_eq!(others(&host.state().join(place), &[]), Vec::<String>::new(), "{point}");
        }
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(host.state().to_str().unwrap()), "{point}");
        host.ok(["restart", image, "-d"]);
        Counter::of(&host, "counter").goes_on();
        host.ok(["rm", "-f", "counter"]);
    }
    outcomes.write();
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
