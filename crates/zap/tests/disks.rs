//! Disks that are full, writes that are short and wires that are cut or stall, at every stage: wherever it comes, the pod
//! lives at one place and counts on, and nothing is left where it was to be made.

#![allow(missing_docs)]

mod common;
#[path = "bad_input/counter.rs"]
mod counter;

use std::path::{Path, PathBuf};
use std::process::Stdio;

use common::{Done, Host, Outcomes, finish};
use counter::Counter;

/// A file system of a size that can be changed.
struct Disk(PathBuf);

impl Disk {
    fn mount(at: PathBuf) -> Disk {
        std::fs::create_dir_all(&at).unwrap();
        Disk::set(&at, 4096, nix::mount::MsFlags::empty());
        Disk(at)
    }

    fn set(at: &Path, bytes: u64, flags: nix::mount::MsFlags) {
        nix::mount::mount(Some("disk"), at, Some("tmpfs"), flags, Some(&*format!("size={bytes}"))).unwrap();
    }

    /// It has room for so much more, in pages.
    fn leave(&self, bytes: u64) {
        // Of a file system without a limit nobody can say what is used.
        Disk::set(&self.0, 1 << 30, nix::mount::MsFlags::MS_REMOUNT);
        let facts = nix::sys::statvfs::statvfs(&self.0).unwrap();
        let used = (facts.blocks() - facts.blocks_free()) * facts.block_size();
        Disk::set(&self.0, used + bytes, nix::mount::MsFlags::MS_REMOUNT);
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

/// Amounts that grow, slowly at first.
fn amounts() -> impl Iterator<Item = u64> {
    std::iter::successors(Some(4096), |bytes: &u64| Some((bytes + bytes / 2).next_multiple_of(4096)))
}

/// What a pod has of its own in files: enough for a disk to be full in the middle of it.
const FILES: &str = "for place in /root /dev/shm /tmp; do head -c 300000 /dev/urandom >$place/file; done";

fn furnished(host: &Host) -> Counter<'_> {
    let counter = Counter::start(host, "counter", &["--net", "private"]);
    host.ok(["exec", "counter", "sh", "-c", FILES]);
    counter
}

/// It failed, in one sentence.
fn failed(done: &Done, codes: &[i32]) {
    assert!(codes.contains(&done.code), "{done:?}");
    assert!(done.stderr.starts_with("zap: ") && done.stderr.lines().count() == 1, "{done:?}");
}

fn is_empty(directory: &Path) -> bool {
    std::fs::read_dir(directory).map_or(true, |mut entries| entries.next().is_none())
}

/// Tries it with more and more until it succeeds; how often it did not.
fn until_it_succeeds(mut attempt: impl FnMut(u64) -> bool) -> (usize, u64) {
    amounts().enumerate().find(|(_, amount)| attempt(*amount)).unwrap()
}

fn noted(what: &str, (failures, enough): (usize, u64)) -> String {
    assert!(failures > 5, "{what}: it failed {failures} times only");
    format!("{what} at {failures} places of {} KiB", enough >> 10)
}

#[test]
fn a_checkpoint_outlives_a_full_disk_and_short_writes() {
    let host = Host::new();
    let counter = furnished(&host);
    let disk = Disk::mount(host.path("disk"));
    let image = disk.0.join("image");
    let mut outcomes = Outcomes::of("disks-checkpoint");
    for options in [&[][..], &["--leave-running"], &["--leave-suspended"]] {
        let words = [&["checkpoint", "counter", "-o", image.to_str().unwrap()], options].concat();
        let full = until_it_succeeds(|bytes| {
            disk.leave(bytes);
            let done = host.run(&words);
            if done.code != 0 {
                failed(&done, &[1]);
                assert!(done.stderr.contains("No space left"), "{done:?}");
                assert!(is_empty(&disk.0), "{bytes}: a part of an image is left");
                counter.goes_on();
            }
            done.code == 0
        });
        outcomes.note(noted(&format!("ENOSPC in checkpoint {}", options.join(" ")), full), "the pod runs on");
        match options {
            [] => drop(host.ok(["restart", image.to_str().unwrap(), "-d"])),
            ["--leave-suspended"] => drop(host.ok(["resume", "counter"])),
            _ => {}
        }
        counter.goes_on();
        std::fs::remove_dir_all(&image).unwrap();
    }
    disk.leave(64 << 20);
    let monitor = format!("--pid={}", host.monitor("counter"));
    let short = until_it_succeeds(|bytes| {
        assert_eq!(finish(host.command("prlimit").arg(&monitor).arg(limited(bytes))).code, 0);
        let done = host.run(["checkpoint", "counter", "-o", image.to_str().unwrap(), "--leave-running"]);
        if done.code != 0 {
            failed(&done, &[1]);
            assert!(is_empty(&disk.0), "{bytes}: a part of an image is left");
        }
        counter.goes_on();
        done.code == 0
    });
    host.ok(["verify", image.to_str().unwrap()]);
    outcomes.note(noted("short write in checkpoint --leave-running", short), "the pod runs on");
    outcomes.write();
}

/// What there is of pods on a host.
fn remains(host: &Host) -> Vec<String> {
    let shown = |path: PathBuf| path.display().to_string();
    let listed = host.json(["ls", "--json"]);
    let mut seen: Vec<String> = listed.as_array().unwrap().iter().map(ToString::to_string).collect();
    seen.extend(host.cgroups().into_iter().map(shown));
    for place in ["pods", "storage/pods"] {
        let entries = std::fs::read_dir(host.state().join(place)).into_iter().flatten().flatten();
        seen.extend(entries.map(|entry| shown(entry.path())));
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let below = format!("{}/", host.state().display());
    seen.extend(mounts.lines().filter(|line| line.contains(&below)).map(str::to_owned));
    seen
}

fn is_clean(host: &Host) {
    assert_eq!(remains(host), Vec::<String>::new());
}

/// The same of a destination, which hears of the end of a migration in its own time.
fn comes_clean(host: &Host) {
    common::eventually("nothing is there", || remains(host).is_empty());
}

#[test]
fn nothing_is_left_of_a_restart_on_a_full_disk() {
    let host = Host::new();
    let disk = Disk::mount(host.state());
    disk.leave(64 << 20);
    let _counter = furnished(&host);
    let image = host.path("image");
    host.ok(["checkpoint", "counter", "-o", image.to_str().unwrap()]);
    let mut outcomes = Outcomes::of("disks-restart");
    let full = until_it_succeeds(|bytes| {
        disk.leave(bytes);
        let done = host.run(["restart", image.to_str().unwrap(), "-d"]);
        if done.code != 0 {
            failed(&done, &[1, 5, 125]);
            is_clean(&host);
        }
        done.code == 0
    });
    disk.leave(64 << 20);
    Counter::of(&host, "counter").goes_on();
    outcomes.note(noted("ENOSPC in restart", full), "nothing is left");
    host.ok(["rm", "-f", "counter"]);
    let short = until_it_succeeds(|bytes| {
        let restart = host.zap(["restart", image.to_str().unwrap(), "-d"]);
        let done = finish(host.command("prlimit").arg(limited(bytes)).args(words_of(&restart)));
        if done.code != 0 {
            failed(&done, &[1, 5, 125]);
            is_clean(&host);
        }
        done.code == 0
    });
    Counter::of(&host, "counter").goes_on();
    outcomes.note(noted("short write in restart", short), "nothing is left");
    outcomes.write();
}

/// The word that limits the size of files: a write does what it can then, and the next is refused.
fn limited(bytes: u64) -> String {
    format!("--fsize={}:", bytes - 1)
}

fn words_of(command: &std::process::Command) -> Vec<&str> {
    std::iter::once(command.get_program()).chain(command.get_args()).map(|word| word.to_str().unwrap()).collect()
}

/// The command that leads to `zap receive` on a host, by way of these.
fn way(host: &Host, before: &str, after: &str) -> String {
    let receive = host.zap(["receive"]);
    format!("{before} env ZAP_STATE={} {} {after}", host.state().display(), words_of(&receive).join(" "))
}

/// The source writes no files: what becomes of its stream is tried with wires.
#[test]
fn a_pod_outlives_short_writes_at_the_destination() {
    let (a, b) = (Host::new(), Host::new());
    b.ok(["ls"]);
    let counter = furnished(&a);
    let mut outcomes = Outcomes::of("short-migrate");
    let short = until_it_succeeds(|bytes| {
        let done = a.run(["migrate", "counter", "--via", &way(&b, &format!("prlimit {}", limited(bytes)), "")]);
        if done.code != 0 {
            assert_eq!(done.code, 1, "{done:?}");
            counter.goes_on();
            comes_clean(&b);
        }
        done.code == 0
    });
    Counter::of(&b, "counter").goes_on();
    outcomes.note(noted("short write at the destination of migrate", short), "it lives at the source alone");
    outcomes.write();
}

#[test]
fn a_pod_outlives_a_destination_with_a_full_disk() {
    let (a, b) = (Host::new(), Host::new());
    let disk = Disk::mount(b.state());
    disk.leave(64 << 20);
    b.ok(["ls"]);
    let counter = furnished(&a);
    let to = way(&b, "", "");
    let mut outcomes = Outcomes::of("disks-migrate");
    let full = until_it_succeeds(|bytes| {
        disk.leave(bytes);
        let done = a.run(["migrate", "counter", "--via", &to]);
        if done.code != 0 {
            // Where it is known ahead that there is no room, that is said as what the host lacks.
            assert!([1, 4].contains(&done.code), "{done:?}");
            counter.goes_on();
            comes_clean(&b);
        }
        done.code == 0
    });
    disk.leave(64 << 20);
    Counter::of(&b, "counter").goes_on();
    assert_eq!(a.json(["ls", "--json"]), serde_json::json!([]));
    outcomes.note(noted("ENOSPC at the destination of migrate", full), "it lives at the source alone");
    outcomes.write();
}

/// Until the last bytes are on their way only the source's copy lives, and later the destination's alone.
#[test]
fn a_pod_outlives_a_wire_that_is_cut_anywhere() {
    let (a, b) = (Host::new(), Host::new());
    b.ok(["ls"]);
    let counter = furnished(&a);
    let mut outcomes = Outcomes::of("disks-wire");
    let cut = until_it_succeeds(|bytes| {
        // What comes after so many bytes is thrown away, and the destination hears the end.
        let done = a.run(["migrate", "counter", "--via", &way(&b, &format!("stdbuf -o0 head -c {bytes} |"), "")]);
        let lives = |host: &Host| host.row("counter")["state"] == "running";
        if lives(&b) {
            assert!(!lives(&a), "{done:?}");
            return true;
        }
        assert_eq!(done.code, 1, "{done:?}");
        counter.goes_on();
        comes_clean(&b);
        false
    });
    outcomes.note(noted("wire to the destination cut", cut), "it lives at the source alone");
    Counter::of(&b, "counter").goes_on();
    outcomes.write();
}

/// A source that says so many bytes and then nothing more.
#[test]
fn nothing_is_left_of_a_migration_whose_source_stalls() {
    let (a, b) = (Host::new(), Host::new());
    let counter = furnished(&a);
    let mut outcomes = Outcomes::of("disks-stalled");
    for bytes in [0, 8, 200, 5_000, 100_000, 600_000] {
        let to = way(&b, &format!("(stdbuf -o0 head -c {bytes}; exec sleep 3) |"), "");
        let mut child =
            a.zap(["migrate", "counter", "--via", &to]).stdin(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(500));
        child.kill().unwrap();
        child.wait().unwrap();
        common::eventually("the pod runs here", || a.row("counter")["state"] == "running");
        counter.goes_on();
        common::eventually("nothing is there", || b.json(["ls", "--json"]) == serde_json::json!([]));
        outcomes.note(format!("source stalls after {bytes} bytes; command killed"), "the pod runs on here alone");
    }
    outcomes.write();
}
