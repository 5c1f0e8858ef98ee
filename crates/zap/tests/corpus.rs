//! What the fuzzers try for hours, for seconds: every example of `fuzz/corpus`, and what becomes of it by cuts and changes.
//! With `ZAP_CORPUS=write` the examples that can be made are made anew.

#![allow(missing_docs)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use common::peak;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use zap::fuzzing::TARGETS;

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus")
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
    let counts = common::Counts::of("corpus");
    let before = peak();
    let mut tried = Vec::new();
    for (name, target) in TARGETS {
        let mut random = StdRng::seed_from_u64(4711);
        let entries = fs::read_dir(corpus().join(name)).unwrap_or_else(|error| panic!("fuzz/corpus/{name}: {error}"));
        let examples: Vec<Vec<u8>> = entries.map(|entry| fs::read(entry.unwrap().path()).unwrap()).collect();
        assert!(!examples.is_empty(), "fuzz/corpus/{name} is empty");
        // Those that write files, or make a megabyte of a few bytes, take longer.
        let rounds: u64 = if ["archive", "chunk"].contains(name) { 100 } else { 600 };
        let mut count = 0;
        for example in &examples {
            for round in 0..rounds {
                let mut bytes = example.clone();
                (0..round % 5).for_each(|_| change(&mut bytes, &mut random));
                let begun = Instant::now();
                target(&bytes);
                assert!(begun.elapsed() < common::PATIENCE, "{name}, round {round}: {:?}", begun.elapsed());
            }
            for cut in 0..example.len().min(400) {
                target(&example[..cut]);
            }
            count += rounds + example.len().min(400) as u64;
        }
        tried.push(((*name).to_owned(), count));
    }
    assert!(peak() < before + common::ENOUGH, "it took {} KiB", peak() - before);
    counts.write(&tried);
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
    for kind in ["pod", "ipc", "network"] {
        reader.records(kind).enumerate().for_each(|(number, (_, body))| {
            put("others", &format!("{kind}-{number}"), body);
        });
    }
    put("others", "processor", &zap::image::encode(zap::processor::Processor::here()));
    let megabyte: Vec<u8> = (0..1u32 << 20).map(|at| (at >> 12) as u8).collect();
    put("chunk", "lz4", &lz4_flex::block::compress(&megabyte));
    put("chunk", "zstd", &zstd::bulk::compress(&megabyte, 1).unwrap());
    for layer in reader.layers() {
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut reader.layer(layer).unwrap(), &mut bytes).unwrap();
        put("archive", layer, &bytes);
    }
    let mut frames = Vec::new();
    zap::migrate::protocol::write_bytes(&mut frames, 3, b"bytes of a part").unwrap();
    zap::migrate::protocol::write_pages(&mut frames, 8192, &[7; 64]).unwrap();
    put("migration", "bytes-and-pages", &frames);
    put("message", "begin", &zap::image::encode(&zap::migrate::protocol::Message::Begin { name: "data".into() }));
    put("message", "manifest", &zap::image::encode(&zap::migrate::protocol::Message::Manifest(vec![7; 9])));
    put("request", "stop", br#"{"Stop":{"seconds":3}}"#);
    put("request", "exec", REQUEST_TO_EXEC);
    put("request", "answer", br#"{"Done":{"code":0}}"#);
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
    write_examples_of_the_kernels(&put);
}

const REQUEST_TO_EXEC: &[u8] = br#"{"Exec":{"command":["true"],"environment":["A=B"],"user":"1:2","workdir":"/",
"tty":false,"interactive":true,"watch":{"stdin":false,"size":null}}}"#;

/// Of what the kernel shows.
fn write_examples_of_the_kernels(put: &dyn Fn(&str, &str, &[u8])) {
    let mut packet = vec![0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
    packet.extend([0x1f, 0x90, 0, 80, 0, 0, 0, 1, 0, 0, 0, 2, 5 << 4, 16, 1, 0, 0, 0, 0, 0]);
    put("packets", "ip4", &packet);
    put("packets", "frame", &[&[2; 12][..], &[8, 0], &packet].concat());
    put("packets", "ip6", &[&[0x60, 0, 0, 0, 0, 20, 6, 64][..], &[0xfd; 32], &packet[20..]].concat());
    let mut link = vec![0, 0, 1, 0, 3, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 9, 0, 3, 0, b'e', b't', b'h', b'0', 0, 0, 0, 0];
    // IFLA_LINKINFO with the kind of a bridge.
    link.extend([16, 0, 18, 0x80, 11, 0, 1, 0, b'b', b'r', b'i', b'd', b'g', b'e', 0, 0]);
    put("interfaces", "bridge", &link);
    write_examples_of_entries(put);
    put("interfaces", "map", b"         0       1000          1\n         1     100000      65536\n");
    put(
        "tables",
        "igmp",
        b"Idx\tDevice    : Count Querier\n2\teth0      :     1      V3\n\t\t\t\tFB0000E0     1 0:0 0\n",
    );
    put("tables", "igmp6", b"2    eth0            ff0200000000000000000000000000fb     1 0000000C 0\n");
    put("tables", "sockstat", b"sockets: used 9\nTCP: inuse 3 orphan 0 tw 0 alloc 4 mem 1\n");
    put("tables", "sysv", b"       key      shmid perms\n      1000      32768   600\n");
    put("tables", "address", b"0100007F:1F90");
    put(
        "descriptors",
        "epoll",
        b"pos:\t0\ntfd:        5 events:       19 data:                7  pos:0 ino:3d sdev:d\n",
    );
    let mark =
        "ino:98c152 sdev:800027 mask:80000fff ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:52c198006d1b8269";
    put("descriptors", "inotify", format!("inotify wd:7 {mark}\n").as_bytes());
    let group = format!(
        "fanotify flags:0 event-flags:8000\nfanotify mnt_id:12 mflags:40 mask:38 ignored_mask:4\nfanotify {mark}\n"
    );
    put("descriptors", "fanotify", group.as_bytes());
    put(
        "descriptors",
        "locks",
        b"lock:\t1: POSIX  ADVISORY  READ 77 00:1a:5 10 19\nlock:\t2: FLOCK  ADVISORY  WRITE 77 00:1a:5 0 EOF\n",
    );
    put("memory", "stat", &fs::read("/proc/self/stat").unwrap());
    put("memory", "elf", &example_of_elf());
    put("hashes", "none", &example_of_hashes());
    let types: Vec<u32> = vec![1, 1 << 24, 4, 32, 0, 5 << 24 | 1, 4, 5, 1, 0, 8, 4 << 24 | 2, 12, 5, 1, 0, 0, 2, 64];
    let names = b"\0int\0in\0outer\0";
    let mut bytes = vec![0x9f, 0xeb, 1, 0];
    let head = [24, 0, 4 * types.len() as u32, 4 * types.len() as u32, names.len() as u32];
    head.iter().chain(&types).for_each(|word| bytes.extend(word.to_ne_bytes()));
    bytes.extend(names);
    put("kernel-types", "one", &bytes);
}

/// What the kernel lists of a network, one by one.
fn write_examples_of_entries(put: &dyn Fn(&str, &str, &[u8])) {
    let attribute = |kind: u8, value: &[u8]| {
        let mut bytes = vec![4 + value.len() as u8, 0, kind, 0];
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    };
    // To 10.1.0.0/16 by 10.0.0.1 and interface 2, and so by two of them.
    let hop = [&[16, 0, 0, 0, 2, 0, 0, 0][..], &attribute(5, &[10, 0, 0, 1])].concat();
    let parts =
        [attribute(1, &[10, 1, 0, 0]), attribute(15, &[254, 0, 0, 0]), attribute(9, &[&hop[..], &hop].concat())];
    put("entries", "route", &[&[2, 16, 0, 0, 254, 3, 0, 1, 0, 0, 0, 0][..], &parts.concat()].concat());
    let parts = [attribute(1, &[0xfd; 16]), attribute(6, &[255; 16]), attribute(8, &[0x80, 0, 0, 0])];
    put("entries", "address", &[&[10, 64, 0x80, 0, 2, 0, 0, 0][..], &parts.concat()].concat());
    let parts = [attribute(1, &[10, 0, 0, 9]), attribute(2, &[2, 0, 0, 0, 0, 9])];
    put("entries", "neighbour", &[&[2, 0, 0, 0, 2, 0, 0, 0, 0x80, 0, 0, 1][..], &parts.concat()].concat());
    let queue = [attribute(1, b"tbf\0"), attribute(2, &attribute(1, &[1; 36]))].concat();
    let header = [0, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 255, 255, 255, 255, 1, 0, 0, 0];
    put("entries", "queue", &[&header[..], &queue].concat());
    let expression = attribute(1, &[attribute(1, b"meta\0"), attribute(2, &attribute(1, &[0, 0, 0, 4]))].concat());
    let rule = [attribute(1, b"filter\0"), attribute(2, b"input\0"), attribute(4, &expression)].concat();
    put("entries", "rule", &[&[2, 0, 0, 0][..], &rule].concat());
    let element = attribute(1, &attribute(1, &attribute(1, &[10, 0, 0, 7])));
    let set = [attribute(1, b"filter\0"), attribute(2, b"blocked\0"), attribute(3, &element)].concat();
    put("entries", "elements", &[&[2, 0, 0, 0][..], &set].concat());
    put("interfaces", "route", &[&[2, 32, 0, 0, 254, 3, 0, 1, 0, 0, 0, 0][..], &attribute(4, &[2, 0, 0, 0])].concat());
    let ends =
        [attribute(1, &[attribute(1, &[10, 0, 0, 2]), attribute(2, &[10, 0, 0, 3])].concat()), ports(&attribute)];
    let connection = [attribute(1, &ends.concat()), attribute(2, &ends.concat()), attribute(3, &[0, 0, 1, 0x9e])];
    put("interfaces", "connection", &[&[2, 0, 0, 0][..], &connection.concat()].concat());
    put("tables", "tcp", b"   1: 020012C6:0050 0200020A:A5D2 01 00000000:00000000 00:00000000 00000000     0\n");
    put("tables", "route", b"Iface\tDestination\neth0\t00000000\t010011AC\t0003\t0\t0\t0\t00000000\t0\t0\t0\n");
    put("tables", "offsets", b"monotonic      -86400         7\nboottime        3600         0\n");
    put("tables", "groups", b"9:name=systemd:/\n4:memory:/a/b\n0::/\n");
    put("tables", "room", b"MemTotal:       24000000 kB\nMemAvailable:   16000000 kB\n");
    put("tables", "moved", b"web 10.0.0.2 10.9.0.7");
    put("tables", "followed", b"web to 10.9.0.7 for 0000002a");
    put("descriptors", "process", b"/proc/17/status");
    put("netlink", "refusal", &[20, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
}

/// Of a TCP connection, from port 8080 to port 80.
fn ports(attribute: &dyn Fn(u8, &[u8]) -> Vec<u8>) -> Vec<u8> {
    attribute(2, &[attribute(1, &[6]), attribute(2, &[0x1f, 0x90]), attribute(3, &[0, 80])].concat())
}

/// One dynamic symbol.
fn example_of_elf() -> Vec<u8> {
    let mut elf = vec![0; 64];
    let mut set = |at: usize, value: &[u8]| elf[at..at + value.len()].copy_from_slice(value);
    set(40, &128u64.to_le_bytes());
    set(58, &64u16.to_le_bytes());
    set(60, &2u16.to_le_bytes());
    elf.extend([1, 0, 0, 0, 18, 0, 11, 0, 8, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0]);
    elf.extend(b"\0time\0");
    elf.resize(128 + 128, 0);
    let mut header = |index: usize, place: usize, value: u64, bytes: usize| {
        let at = 128 + index * 64 + place;
        elf[at..at + bytes].copy_from_slice(&value.to_le_bytes()[..bytes]);
    };
    header(0, 4, 11, 4);
    header(0, 24, 64, 8);
    header(0, 32, 24, 8);
    header(0, 40, 1, 4);
    header(1, 24, 88, 8);
    elf
}

/// The hashes of no files.
fn example_of_hashes() -> Vec<u8> {
    let mut bytes = b"zap hashes v1\0\0\0".to_vec();
    bytes.extend([7; 32]);
    let sum = blake3::hash(&bytes);
    bytes.extend(sum.as_bytes());
    bytes
}
