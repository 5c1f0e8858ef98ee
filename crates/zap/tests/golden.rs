//! Images of released versions of the format must restart for ever: one of each is kept in `tests/golden/`, of a program that
//! needs nothing of the host (`witness.c`), which it carries itself.
//!
//! With `ZAP_GOLDEN=write` the image of the present version is made anew, which changes what is promised: do so only when
//! the version of the format has changed.

#![allow(missing_docs)]

mod common;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Host, eventually, finish};
use serde::Serialize;
use serde::de::DeserializeOwned;
use zap::image::{ImageReader, decode, encode};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

fn present() -> PathBuf {
    golden().join(format!("format-{}", zap::image::FORMAT))
}

fn write(image: &Path) {
    let host = Host::new();
    let root = Path::new("/var/tmp/zap-golden");
    let _ = std::fs::remove_dir_all(root);
    std::fs::create_dir(root).unwrap();
    let flags = "-static -nostdlib -nostartfiles -ffreestanding -fno-stack-protector -fno-pie -no-pie -Os -o";
    let mut compile = Command::new("gcc");
    compile.args(flags.split(' ')).arg(root.join("witness")).arg(golden().join("witness.c"));
    assert_eq!(finish(&mut compile).code, 0);
    host.start(["-n", "golden", "--root", root.to_str().unwrap(), "--", "/witness"]);
    eventually("it is ready", || host.ok(["logs", "golden"]) == "ready");
    let _ = std::fs::remove_dir_all(image);
    host.ok(["checkpoint", "golden", "-o", image.to_str().unwrap(), "--carry-files", "--compress", "zstd"]);
    std::fs::remove_dir_all(root).unwrap();
}

#[test]
fn images_of_every_version_restart() {
    if std::env::var("ZAP_GOLDEN").is_ok_and(|wish| wish == "write") {
        write(&present());
    }
    assert!(present().exists(), "there is no image of the present version: see above");
    let host = Host::new();
    let root = host.path("root");
    let images = std::fs::read_dir(golden()).unwrap().map(|entry| entry.unwrap().path());
    for image in images.filter(|path| path.is_dir()) {
        std::fs::create_dir(&root).unwrap();
        let words = ["restart", image.to_str().unwrap(), "-d", "-n", "golden", "--root", root.to_str().unwrap()];
        host.ok(words);
        // What it finds is as it was, and so it is after a checkpoint by this version.
        let again = host.path("again");
        host.ok(["checkpoint", "golden", "-o", again.to_str().unwrap(), "--carry-files"]);
        host.ok(["restart", again.to_str().unwrap(), "-d", "--root", root.to_str().unwrap()]);
        host.ok(["kill", "-s", "USR1", "golden"]);
        let ended = host.run(["wait", "golden"]);
        assert_eq!((ended.code, host.ok(["logs", "golden"]).as_str()), (0, "ok"), "{}: {ended:?}", image.display());
        host.ok(["rm", "golden"]);
        std::fs::remove_dir_all(&root).unwrap();
        std::fs::remove_dir_all(&again).unwrap();
    }
}

/// A state that is read and written again is the same, byte for byte.
fn comes_back<T: DeserializeOwned + Serialize>(kind: &str, body: &[u8]) {
    let state: T = decode(body).unwrap_or_else(|error| panic!("{kind}: {error}"));
    assert!(encode(&state) == body, "a record of the kind {kind} comes back as another");
}

type Check = fn(&str, &[u8]);

/// All kinds of records, of a pod that has mounted something, with namespaces of its own making.
#[test]
fn every_record_comes_back() {
    const INNER: &str =
        "ip address add 10.7.0.1/32 dev lo; ip rule add to 10.8.0.0/16 lookup 7; echo ready; exec sleep 1000";
    let host = Host::new();
    let command = format!("mount -t tmpfs none /mnt; unshare -Urmnipf sh -c '{INNER}'");
    host.start(["-n", "nested", "--cap-add", "sys_admin", "--", "sh", "-c", &command]);
    eventually("it is ready", || host.ok(["logs", "nested"]).contains("ready"));
    let image = host.path("image");
    host.ok(["checkpoint", "nested", "-o", image.to_str().unwrap()]);
    let kinds: [(&str, Check); 8] = [
        ("pod", comes_back::<zap::record::PodRecord>),
        ("process", comes_back::<zap::process::state::ProcessState>),
        ("zombies", comes_back::<Vec<zap::process::state::EndedState>>),
        ("ipc", comes_back::<zap::ipc::IpcState>),
        ("file", comes_back::<zap::files::FileState>),
        ("namespace", comes_back::<zap::namespaces::NamespaceState>),
        ("network", comes_back::<zap::namespaces::network::NetworkState>),
        ("mount", comes_back::<zap::mounts::MountState>),
    ];
    let (reader, mut seen) = (ImageReader::open(&image).unwrap(), BTreeSet::new());
    for (kind, check) in kinds {
        seen.extend(reader.records(kind).map(|(_, body)| check(kind, body)).map(|()| kind));
    }
    let missing: Vec<&str> = kinds.iter().map(|(kind, _)| *kind).filter(|kind| !seen.contains(kind)).collect();
    assert!(missing.is_empty(), "no record of the kinds {missing:?} was seen");
}
