//! What people, disks and power cuts do to zap: it says so in one sentence, and harms nobody.

#![allow(missing_docs)]

mod common;
#[path = "bad_input/counter.rs"]
mod counter;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use common::{Done, Host, finish};
use counter::Counter;

/// The command failed with that code, and said why in one line.
fn refused(done: &Done, code: i32, words: &[&str]) {
    assert_eq!(done.code, code, "{done:?}");
    assert!(done.stderr.starts_with("zap: ") && done.stderr.lines().count() == 1, "{done:?}");
    assert!(words.iter().all(|word| done.stderr.contains(word)), "{words:?}: {done:?}");
}

/// The image of a counter, which is gone.
fn image_of_a_counter(host: &Host) -> PathBuf {
    let counter = Counter::start(host, "counter", &["--net", "private"]);
    counter.goes_on();
    let image = host.path("image");
    host.ok(["checkpoint", "counter", "-o", image.to_str().unwrap()]);
    image
}

/// The files of an image.
fn parts(image: &Path) -> Vec<PathBuf> {
    fs::read_dir(image).unwrap().map(|entry| entry.unwrap().path()).collect()
}

/// Puts a file back as it was when this is dropped.
struct Changed {
    path: PathBuf,
    was: Vec<u8>,
}

fn change(path: &Path, how: impl FnOnce(&mut Vec<u8>)) -> Changed {
    let was = fs::read(path).unwrap();
    let mut bytes = was.clone();
    how(&mut bytes);
    fs::write(path, bytes).unwrap();
    Changed { path: path.into(), was }
}

impl Drop for Changed {
    fn drop(&mut self) {
        let _ = fs::write(&self.path, &self.was);
    }
}

fn verify_and_restart_refuse(host: &Host, image: &Path, words: &[&str]) {
    let path = image.to_str().unwrap();
    let run = |words: &[&str]| finish(host.frugal(words).stdin(Stdio::null()));
    refused(&run(&["verify", path]), 5, words);
    refused(&run(&["restart", path, "-d"]), 5, words);
}

#[test]
fn damaged_images_are_refused() {
    let host = Host::new();
    let image = image_of_a_counter(&host);
    let path = image.to_str().unwrap();
    for part in parts(&image) {
        {
            let _short = change(&part, |bytes| bytes.truncate(bytes.len() / 2));
            verify_and_restart_refuse(&host, &image, &[path]);
        }
        {
            let _long = change(&part, |bytes| bytes.extend(b"junk"));
            verify_and_restart_refuse(&host, &image, &[path]);
        }
        let length = fs::metadata(&part).unwrap().len() as usize;
        // A step that meets every position modulo a page sooner or later.
        for at in (0..length).step_by((length / 12).max(1) | 1) {
            let _flipped = change(&part, |bytes| bytes[at] ^= 1 << (at % 8));
            verify_and_restart_refuse(&host, &image, &[path]);
        }
        fs::rename(&part, host.path("aside")).unwrap();
        verify_and_restart_refuse(&host, &image, &[path]);
        fs::rename(host.path("aside"), &part).unwrap();
    }
    assert_eq!(host.json(["ls", "--json"]), serde_json::json!([]));
    assert!(host.cgroups().is_empty());
    host.ok(["restart", path, "-d"]);
    Counter::of(&host, "counter").goes_on();
}

/// Rewrites the manifest, with a checksum that is right.
fn rewrite(image: &Path, from: &str, to: &str) -> Changed {
    change(&image.join("manifest"), |bytes| {
        let text = String::from_utf8(bytes.clone()).unwrap();
        let (body, _) = text.rsplit_once("crc32 ").unwrap();
        assert!(body.contains(from), "{body}");
        let body = body.replacen(from, to, 1);
        *bytes = format!("{body}crc32 {:08x}\n", crc32fast::hash(body.as_bytes())).into_bytes();
    })
}

#[test]
fn foreign_images_are_refused() {
    let host = Host::new();
    let image = image_of_a_counter(&host);
    {
        let _version = rewrite(&image, "zap image, format 1\n", "zap image, format 4711\n");
        verify_and_restart_refuse(&host, &image, &["4711"]);
    }
    {
        let machine = format!("\"machine\": \"{}\"", std::env::consts::ARCH);
        let _machine = rewrite(&image, &machine, "\"machine\": \"pdp11\"");
        verify_and_restart_refuse(&host, &image, &["pdp11"]);
    }
    let directory = host.path("directory");
    fs::create_dir(&directory).unwrap();
    verify_and_restart_refuse(&host, &directory, &["not an image"]);
    verify_and_restart_refuse(&host, Path::new("/etc/passwd"), &["not an image"]);
    verify_and_restart_refuse(&host, &host.path("missing"), &["missing"]);
    assert_eq!(host.run(["restart", image.to_str().unwrap(), "--no-such-flag"]).code, 2);
    refused(&host.run(["checkpoint", "nobody", "-o", image.to_str().unwrap()]), 6, &["nobody"]);
}

#[test]
fn what_is_taken_is_refused() {
    let host = Host::new();
    let counter = Counter::start(&host, "counter", &["-p", "8080:80"]);
    let image = host.path("image");
    let image = image.to_str().unwrap();
    host.ok(["checkpoint", "counter", "-o", image, "--leave-running"]);
    let address = host.row("counter")["address"].as_str().unwrap().to_owned();
    refused(&host.run(["restart", image, "-d", "-n", "counter"]), 6, &["counter"]);
    refused(&host.run(["restart", image, "-d", "-n", "new", "-p", "9090:80", "--ip", &address]), 6, &[&address]);
    refused(&host.run(["restart", image, "-d", "-n", "new", "-p", "8080:80"]), 6, &["8080"]);
    let address6 = host.row("counter")["address6"].as_str().unwrap().to_owned();
    refused(&host.run(["restart", image, "-d", "-n", "new", "-p", "9090:80", "--ip", &address6]), 6, &[&address]);
    refused(&host.run(["restart", image, "-d", "-n", "new", "--ip", "2001:db8::1"]), 2, &["2001:db8::1"]);
    refused(&host.run(["run", "-d", "-n", "new", "--ip", &address, "--", "true"]), 6, &[&address]);
    assert_eq!(host.json(["ls", "--json"]).as_array().unwrap().len(), 1);
    // Nothing is overwritten.
    refused(&host.run(["checkpoint", "counter", "-o", image]), 1, &[image]);
    host.ok(["verify", image]);
    counter.goes_on();
}

#[test]
fn an_ipv6_address_can_be_asked_for() {
    let host = Host::new();
    let _counter = Counter::start(&host, "counter", &[]);
    let image = host.path("image");
    let image = image.to_str().unwrap();
    host.ok(["checkpoint", "counter", "-o", image]);
    host.ok(["restart", image, "-d", "-n", "new", "--ip", "fd5a:4150::c612:0f05"]);
    assert_eq!(
        (&host.row("new")["address"], &host.row("new")["address6"]),
        (&"198.18.15.5".into(), &"fd5a:4150::c612:f05".into())
    );
    host.ok(["rm", "-f", "new"]);
}

/// A tiny file system.
struct Disk(PathBuf);

impl Disk {
    fn mount(at: PathBuf) -> Disk {
        fs::create_dir(&at).unwrap();
        let flags = nix::mount::MsFlags::empty();
        nix::mount::mount(Some("tiny"), &at, Some("tmpfs"), flags, Some("size=64k")).unwrap();
        Disk(at)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

#[test]
fn a_full_disk_harms_nobody() {
    let host = Host::new();
    let counter = Counter::start(&host, "counter", &["--net", "private"]);
    let disk = Disk::mount(host.path("disk"));
    let image = disk.0.join("image");
    for options in [&["--leave-running"][..], &["--leave-suspended"], &[]] {
        let command = [&["checkpoint", "counter", "-o", image.to_str().unwrap()], options].concat();
        refused(&host.run(command), 1, &["No space left on device"]);
        assert_eq!(fs::read_dir(&disk.0).unwrap().count(), 0, "{options:?}");
        counter.goes_on();
    }
}

/// A limit of the size of files (`ulimit -f`) that whoever started the pod had is its monitor's, too.
#[test]
fn a_limit_of_the_size_of_files_harms_nobody() {
    let host = Host::new();
    let counter = Counter::start(&host, "counter", &["--net", "private"]);
    let monitor = format!("--pid={}", host.monitor("counter"));
    let limited = finish(host.command("prlimit").args([&*monitor, "--fsize=4096"]));
    assert_eq!(limited.code, 0, "{limited:?}");
    let image = host.path("image");
    refused(&host.run(["checkpoint", "counter", "-o", image.to_str().unwrap()]), 1, &["File too large"]);
    assert!(!image.exists());
    counter.goes_on();
}

/// Not a test of its own: what a test below runs in its pod is this very program, with `ZAP_GUEST` set.
#[test]
fn guest_in_pod() {
    if std::env::var_os("ZAP_GUEST").is_none() {
        return;
    }
    // A group that is asked before a file is opened, which nobody opens.
    use nix::sys::fanotify::{EventFFlags, Fanotify, InitFlags, MarkFlags, MaskFlags};
    let group = Fanotify::init(InitFlags::FAN_CLASS_CONTENT, EventFFlags::O_RDONLY).unwrap();
    std::fs::write("/var/tmp/guarded", "").unwrap();
    group
        .mark(MarkFlags::FAN_MARK_ADD, MaskFlags::FAN_OPEN_PERM, nix::fcntl::AT_FDCWD, Some("/var/tmp/guarded"))
        .unwrap();
    for number in 1.. {
        println!("{number}");
        std::thread::sleep(std::time::Duration::from_millis(10));
        // The group is still there, and nothing happened to it.
        nix::fcntl::fcntl(&group, nix::fcntl::FcntlArg::F_GETFD).unwrap();
    }
}

#[test]
fn what_cannot_be_checkpointed_is_named_and_runs_on() {
    let host = Host::new();
    let program = std::env::current_exe().unwrap();
    let options = ["--net", "private", "--seccomp", "unconfined", "--cap-add", "all", "-e", "ZAP_GUEST=1"];
    let command = [program.to_str().unwrap(), "guest_in_pod", "--exact", "--nocapture", "--test-threads=1"];
    let counter = Counter::start_command(&host, "counter", &options, &command);
    let image = host.path("image");
    for options in [&["--leave-running"][..], &[]] {
        let done = host.run([&["checkpoint", "counter", "-o", image.to_str().unwrap()], options].concat());
        refused(&done, 3, &["pod counter", "process 2 ", "file descriptor ", "fanotify"]);
        assert!(!image.exists());
        counter.goes_on();
    }
}
