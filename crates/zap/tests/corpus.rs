//! What the fuzzers try for hours, for seconds: every example of `fuzz/corpus`, and what becomes of it by cuts and changes.
//! With `ZAP_CORPUS=write` the examples that can be made are made anew.

#![allow(missing_docs)]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use zap::fuzzing::TARGETS;

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus")
}

/// Peak of this process's memory, in KiB.
fn peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

fn change(bytes: &mut Vec<u8>, random: &mut StdRng) {
    if bytes.is_empty() {
        return bytes.push(random.random());
    }
    let at = random.random_range(0..bytes.len());
    match random.random_range(0..6) {
        0 => bytes[at] ^= 1 << random.random_range(0..8),
        1 => bytes.truncate(at),
        2 => bytes[at] = [0, 0xff, 0x7f, 0x80, b'-', b'9', b'\n', b' '][random.random_range(0..8)],
        3 => bytes.insert(at, random.random()),
        4 => {
            let piece = bytes[at..(at + 16).min(bytes.len())].to_vec();
            bytes.splice(at..at, piece);
        }
        _ => {
            let end = (at + 4).min(bytes.len());
            bytes[at..end].fill(0xff);
        }
    }
}

#[test]
fn nothing_panics_hangs_or_takes_much_memory() {
    let before = peak();
    for (name, target) in TARGETS {
        let mut random = StdRng::seed_from_u64(4711);
        let entries = fs::read_dir(corpus().join(name)).unwrap_or_else(|error| panic!("fuzz/corpus/{name}: {error}"));
        let examples: Vec<Vec<u8>> = entries.map(|entry| fs::read(entry.unwrap().path()).unwrap()).collect();
        assert!(!examples.is_empty(), "fuzz/corpus/{name} is empty");
        let rounds = if *name == "archive" { 100 } else { 600 };
        for example in &examples {
            for round in 0..rounds {
                let mut bytes = example.clone();
                (0..round % 5).for_each(|_| change(&mut bytes, &mut random));
                let begun = Instant::now();
                target(&bytes);
                assert!(begun.elapsed() < Duration::from_secs(5), "{name}, round {round}: {:?}", begun.elapsed());
            }
            for cut in 0..example.len().min(400) {
                target(&example[..cut]);
            }
        }
    }
    assert!(peak() < before + (512 << 10), "it took {} KiB", peak() - before);
}

#[test]
fn every_target_has_examples() {
    if std::env::var("ZAP_CORPUS").is_ok_and(|wish| wish == "write") {
        write_examples();
    }
    for (name, _) in TARGETS {
        assert!(corpus().join(name).is_dir(), "fuzz/corpus/{name} is not there");
    }
}

fn write_examples() {
    let golden =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(format!("format-{}", zap::image::FORMAT));
    let put = |target: &str, name: &str, bytes: &[u8]| {
        fs::create_dir_all(corpus().join(target)).unwrap();
        fs::write(corpus().join(target).join(name), bytes).unwrap();
    };
    let read = |path: &str| fs::read(path).unwrap();
    put("manifest", "golden", &fs::read(golden.join("manifest")).unwrap());
    put("state", "golden", &fs::read(golden.join("state")).unwrap());
    let reader = zap::image::ImageReader::open(&golden).unwrap();
    for kind in ["process", "file"] {
        reader.records(kind).enumerate().for_each(|(number, (_, body))| put(kind, &format!("golden-{number}"), body));
    }
    for layer in reader.layers() {
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut reader.layer(layer).unwrap(), &mut bytes).unwrap();
        put("archive", layer, &bytes);
    }
    let mut frames = Vec::new();
    zap::migrate::protocol::write_bytes(&mut frames, 3, b"bytes of a part").unwrap();
    zap::migrate::protocol::write_pages(&mut frames, 8192, &[7; 64]).unwrap();
    put("migration", "bytes-and-pages", &frames);
    put("command", "output", &zap::monitor::frame::encode(zap::monitor::frame::Kind::Output, b"what a pod prints"));
    let smaps = String::from_utf8(read("/proc/self/smaps")).unwrap();
    // Where this program lies is of no interest.
    let own = std::env::current_exe().unwrap();
    let smaps = smaps.replace(own.to_str().unwrap(), "/usr/bin/program");
    let smaps: String = smaps.lines().take(72).map(|line| format!("{line}\n")).collect();
    put("mappings", "smaps", smaps.as_bytes());
    put("stat", "self", &read("/proc/self/stat"));
    put("status", "self", &read("/proc/self/status"));
    put("timers", "one", b"ID: 3\nsignal: 12/00000000000000ab\nnotify: signal/pid.14\nClockID: 1\n");
    put(
        "mounts",
        "overlay",
        b"70 44 0:42 / / rw,relatime shared:3 master:1 - overlay overlay rw,lowerdir=/a\\040b,upperdir=/u\n",
    );
    put(
        "configuration",
        "all",
        b"bridge = \"zap1\"\naddress = \"10.9.0.1/16\"\npool = \"10.9.1.0/24\"\nuplink = \"eth1\"\n",
    );
    put("netlink", "attributes", &[8, 0, 1, 0, 1, 2, 3, 4, 5, 0, 2, 0x80, 9, 0, 0, 0]);
    let mut answer =
        vec![56, 0, 0, 0, 20, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 77, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    answer.extend([7, 0, 0, 0, 0, b'a', b'b', 0, 8, 0, 2, 0, 5, 0, 0, 0, 5, 0, 6, 0, 2, 0, 0, 0]);
    put("sockets", "unix", &answer);
}
