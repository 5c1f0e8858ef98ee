//! Images that somebody made to do harm: right in all their checksums, and wrong in what they say. Whatever that is, a command
//! ends in time and in one sentence, no process is started from an image that is found wrong, and nothing is left or made
//! outside.

#![allow(missing_docs)]

mod common;
mod hostile {
    pub(crate) mod mutation;
}

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use common::{Counts, ENOUGH, Host, PATIENCE, done, eventually, forget_peak, peak};
use hostile::mutation::{Change, Parts, change};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use zap::restart::{self, Options};

/// Some of everything that a small program can hold.
const RICH: &str = "
import os, socket, select, threading, time, mmap, signal, fcntl
r, w = os.pipe(); os.write(w, b'contents of a pipe')
a, b = socket.socketpair(); a.send(b'queued')
listener = socket.socket(); listener.bind(('127.0.0.1', 0)); listener.listen()
client = socket.create_connection(listener.getsockname()); server, _ = listener.accept(); client.send(b'unread')
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); udp.bind(('127.0.0.1', 0))
epoll = select.epoll(); epoll.register(r); epoll.register(a)
path = '/tmp/file'; f = open(path, 'w+'); f.write('text'); f.flush(); fcntl.lockf(f, fcntl.LOCK_EX)
gone = open('/tmp/gone', 'w+'); gone.write('x' * 9000); gone.flush(); os.unlink('/tmp/gone')
os.mkfifo('/tmp/fifo'); fifo = os.open('/tmp/fifo', os.O_RDWR)
master, slave = os.openpty()
shared = mmap.mmap(-1, 8192); shared[0:4] = b'abcd'
signal.setitimer(signal.ITIMER_REAL, 5000); signal.signal(signal.SIGUSR1, lambda *_: None)
if os.fork() == 0: os._exit(3)
if os.fork() == 0:
    os.setsid()
    time.sleep(1000)
threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
print('ready', flush=True)
time.sleep(1000)
";

fn image(host: &Host, name: &str, command: &[&str]) -> std::path::PathBuf {
    host.ok([&["run", "-d", "-n", name, "--net", "private", "--"], command].concat());
    eventually("it is ready", || host.ok(["logs", name]).contains("ready"));
    let image = host.path(name);
    host.ok(["checkpoint", name, "-o", image.to_str().unwrap()]);
    image
}

/// The suite tries the same cases every time, so that a change is judged by what it changes; `just soak` tries others.
const SEED: u64 = 20_021_209;

/// Tries `property` on as many cases as `PROPTEST_CASES` says, from the seed that `ZAP_SEED` says, or a new one if that is
/// `random`; the cases and the seed, which is printed.
fn check<S: Strategy>(
    cases: u32,
    strategy: S,
    property: impl Fn(S::Value) -> Result<(), TestCaseError>,
) -> [(String, u64); 2] {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let is_random = std::env::var("ZAP_SEED").is_ok_and(|wish| wish == "random");
    let seed = number("ZAP_SEED").unwrap_or_else(|| if is_random { rand::random() } else { SEED });
    let cases = number("PROPTEST_CASES").map_or(cases, |cases| cases as u32);
    // Tests are threads that are called so, but where there is one at a time.
    let thread = std::thread::current();
    let test = thread.name().filter(|name| *name != "main").unwrap_or_default();
    let again = format!("ZAP_SEED={seed} PROPTEST_CASES={cases} cargo test -p zap --test hostile {test}");
    println!("{again}");
    let config = Config { cases, max_shrink_iters: 60, failure_persistence: None, ..Config::default() };
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &seed.to_ne_bytes().repeat(4));
    if let Err(error) = TestRunner::new_with_rng(config, rng).run(&strategy, property) {
        panic!("{error}\nTry it again: {again}");
    }
    [("cases".into(), cases.into()), (format!("seed {seed}"), cases.into())]
}

fn verify(image: &Path) -> Result<(), restart::RestartError> {
    let (binds, root) = (Vec::new(), None);
    restart::verify(&Options {
        image: image.into(),
        name: None,
        address: None,
        publish: None,
        binds,
        root,
        former: None,
        trail: None,
        fault: None,
    })
}

/// What was changed, and the image of it.
fn changed(parts: &Parts, at: &Path, changes: &[Change]) -> String {
    let _ = std::fs::remove_dir_all(at);
    let mut records = parts.records.clone();
    let said: Vec<String> = changes
        .iter()
        .filter(|_| true)
        .map_while(|change| (!records.is_empty()).then(|| change.apply(&mut records)))
        .collect();
    parts.write(at, &records);
    said.join("; ")
}

/// Without a process: `zap verify` of whatever comes.
#[test]
fn no_record_makes_verify_panic_hang_or_take_much_memory() {
    let counts = Counts::of("hostile-verify");
    let host = Host::new();
    let parts = Parts::of(&image(&host, "rich", &["python3", "-c", RICH])).with_little_data(256 << 10);
    let at = host.path("changed");
    let slowest = std::cell::Cell::new(Duration::ZERO);
    let tally = std::cell::RefCell::new(std::collections::BTreeMap::new());
    let tried = check(600, proptest::collection::vec(change(), 1..3), |changes| {
        let said = changed(&parts, &at, &changes);
        let begun = Instant::now();
        forget_peak();
        let before = peak();
        let verified = std::panic::catch_unwind(|| verify(&at).map_err(|error| (error.exit_code(), error.to_string())));
        slowest.set(slowest.get().max(begun.elapsed()));
        prop_assert!(begun.elapsed() < PATIENCE, "{}: {:?}", said, begun.elapsed());
        prop_assert!(peak() < before + ENOUGH, "{}: it took {} KiB", said, peak() - before);
        let code = verified.as_ref().map_or(0, |verified| verified.as_ref().map_or_else(|(code, _)| *code, |()| 0));
        *tally.borrow_mut().entry(format!("exit code {code}")).or_insert(0) += 1;
        match verified {
            Err(_) => prop_assert!(false, "{}: it panicked", said),
            Ok(Err((code, message))) => {
                // 4: a file of the root, say, that is not what the image says.
                prop_assert!([4, 5].contains(&code), "{}: {} {}", said, code, message);
                prop_assert!(!message.contains('\n') && message.len() < 2000, "{}: {}", said, message);
            }
            Ok(Ok(())) => {}
        }
        Ok(())
    });
    eprintln!("the slowest took {:?}", slowest.get());
    counts.write(&tried.into_iter().chain(tally.into_inner()).collect::<Vec<_>>());
}

/// Everything of a host that a restart could leave something in.
fn remains(host: &Host) -> Vec<String> {
    let mut seen = Vec::new();
    for place in ["pods", "storage/pods"] {
        let entries = std::fs::read_dir(host.state().join(place)).into_iter().flatten().flatten();
        seen.extend(entries.map(|entry| entry.path().display().to_string()));
    }
    seen.extend(host.cgroups().iter().map(|group| group.display().to_string()));
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    seen.extend(mounts.lines().filter(|l| l.contains(host.state().to_str().unwrap())).map(str::to_owned));
    seen.extend(Path::new("/tmp/zap-hostile").exists().then(|| "/tmp/zap-hostile".to_owned()));
    seen
}

/// `zap restart` of whatever comes: it ends, in one sentence if it fails, and then nothing is left.
#[test]
fn no_record_makes_restart_panic_hang_take_much_memory_or_leave_something() {
    let counts = Counts::of("hostile-restart");
    let host = Host::new();
    let parts = Parts::of(&image(&host, "rich", &["python3", "-c", RICH]));
    let at = host.path("changed");
    let before = remains(&host);
    let tally = std::cell::RefCell::new(std::collections::BTreeMap::new());
    let tried = check(80, proptest::collection::vec(change(), 1..3), |changes| {
        let said = changed(&parts, &at, &changes);
        let mut command = host.frugal(["restart", at.to_str().unwrap(), "-d"]);
        let begun = Instant::now();
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (pid, (sender, receiver)) = (child.id(), std::sync::mpsc::channel());
        std::thread::spawn(move || sender.send(child.wait_with_output()));
        let Ok(output) = receiver.recv_timeout(Duration::from_secs(60)) else {
            prop_assert!(false, "{}: {} hangs", said, pid);
            unreachable!()
        };
        let ended = done(output.unwrap());
        *tally.borrow_mut().entry(format!("exit code {}", ended.code)).or_insert(0) += 1;
        prop_assert!(begun.elapsed() < PATIENCE, "{}: {:?}", said, begun.elapsed());
        prop_assert!(
            !ended.stderr.contains("panicked") && !ended.stderr.contains("unexpectedly"),
            "{}: {:?}",
            said,
            ended
        );
        if ended.code == 0 {
            host.ok(["rm", "-f", ended.stdout.trim()]);
        } else {
            prop_assert!(
                ended.stderr.starts_with("zap: ") && ended.stderr.lines().count() == 1,
                "{}: {:?}",
                said,
                ended
            );
        }
        let deadline = Instant::now() + PATIENCE;
        while remains(&host) != before && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        prop_assert_eq!(remains(&host), before.clone(), "{}: {:?}", said, ended);
        Ok(())
    });
    counts.write(&tried.into_iter().chain(tally.into_inner()).collect::<Vec<_>>());
}

/// Of the golden image, which is small, every byte is changed, and every file cut at every length. What is left is never
/// taken for an image.
#[test]
fn bytes_and_lengths_of_a_small_image_count() {
    let counts = Counts::of("hostile-bytes");
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/format-{}", zap::image::FORMAT));
    let directory = tempfile::tempdir().unwrap();
    let mut tried = (0, 0);
    let is_refused = |at: &Path, what: &str| match std::panic::catch_unwind(|| verify(at)) {
        Ok(Err(error)) => assert_eq!(error.exit_code(), 5, "{what}: {error}"),
        Ok(Ok(())) => panic!("{what}: it is taken for an image"),
        Err(_) => panic!("{what}: it panicked"),
    };
    for entry in std::fs::read_dir(&golden).unwrap() {
        let name = entry.unwrap().file_name();
        std::fs::copy(golden.join(&name), directory.path().join(&name)).unwrap();
    }
    for entry in std::fs::read_dir(&golden).unwrap() {
        let file = directory.path().join(entry.unwrap().file_name());
        let whole = std::fs::read(&file).unwrap();
        for place in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[place] ^= 1 << (place % 8);
            std::fs::write(&file, bytes).unwrap();
            is_refused(directory.path(), &format!("byte {place} of {}", file.display()));
            std::fs::write(&file, &whole[..place]).unwrap();
            is_refused(directory.path(), &format!("the first {place} bytes of {}", file.display()));
            tried = (tried.0 + 1, tried.1 + 1);
        }
        std::fs::write(&file, whole).unwrap();
    }
    counts.write(&[("bytes changed".into(), tried.0), ("lengths cut".into(), tried.1)]);
}

/// An image whose pod is called by a path, or whose binds lead back: refused before anything is made.
#[test]
fn names_and_paths_that_lead_elsewhere_are_refused() {
    use ciborium::Value;
    let host = Host::new();
    let parts = Parts::of(&image(&host, "small", &["sh", "-c", "echo ready; exec sleep 1000"]));
    let at = host.path("changed");
    let path = at.to_str().unwrap();
    let with = |field: &str, value: Value| {
        let _ = std::fs::remove_dir_all(&at);
        let mut records = parts.records.clone();
        let pod = records.iter_mut().find(|record| record.0 == "pod").unwrap();
        let spec = pod.2.as_map_mut().unwrap().iter_mut().find(|(key, _)| key.as_text() == Some("spec")).unwrap();
        let found = spec.1.as_map_mut().unwrap().iter_mut().find(|(key, _)| key.as_text() == Some(field)).unwrap();
        found.1 = value;
        parts.write(&at, &records);
    };
    let text = |text: &str| Value::Text(text.into());
    let bind = |source: &str, target: &str| {
        let fields = [("source", text(source)), ("target", text(target)), ("read_only", Value::Bool(false))];
        Value::Array(vec![Value::Map(fields.map(|(name, value)| (text(name), value)).into())])
    };
    let outside = [
        ("name", text("../../elsewhere")),
        ("name", text("")),
        ("root", text("/srv/../etc")),
        ("binds", bind("/srv/../etc", "/mnt")),
        ("binds", bind("/etc", "/mnt/../../../etc")),
        ("binds", bind("/etc", "../etc")),
        ("binds", bind("etc", "/mnt")),
    ];
    for (field, value) in outside {
        with(field, value);
        for words in [&["verify", path][..], &["restart", path, "-d"]] {
            let refused = host.run(words);
            assert_eq!((refused.code, refused.stderr.lines().count()), (5, 1), "{field}: {refused:?}");
        }
    }
    assert_eq!(host.json(["ls", "--json"]), serde_json::json!([]));
    assert!(!host.path("elsewhere").exists() && !host.state().join("elsewhere").exists());
    // One that leads nowhere else is what it says.
    with("binds", bind("/etc", "/mnt"));
    host.ok(["restart", path, "-d", "-n", "bound"]);
    host.ok(["exec", "bound", "test", "-e", "/mnt/passwd"]);
    with("name", text("else.where"));
    host.ok(["restart", path, "-d"]);
    assert_eq!(host.row("else.where")["state"], "running");
}
