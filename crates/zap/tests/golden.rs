//! Images of released versions of the format must restart for ever: one of each is kept in `tests/golden/`, of a program that
//! needs nothing of the host (`witness.c`), which it carries itself.
//!
//! With `ZAP_GOLDEN=write` the image of the present version is made anew, which changes what is promised: do so only when
//! the version of the format has changed.

#![allow(missing_docs)]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Host, eventually, finish};

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
