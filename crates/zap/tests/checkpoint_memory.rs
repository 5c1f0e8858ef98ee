//! Memory through a checkpoint: a program in a pod checks its own memory all the time, while it is copied, held, and
//! started again.

#![allow(missing_docs, clippy::unwrap_used, dead_code)]

#[path = "files/host.rs"]
mod host;

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use host::Host;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

type Check = Box<dyn FnOnce()>;

/// Not a test of its own: what the tests below run in their pods is this very program, with `ZAP_PROBE` set.
#[test]
fn probe_in_pod() {
    let probe: fn() -> Check = match std::env::var("ZAP_PROBE").as_deref() {
        Ok("writers") => writers,
        Ok("memfd") => memfd,
        Ok("churn") => churn,
        _ => return,
    };
    host::probe(probe);
}

/// Numbers in a page: a page has one that is looked at, the others are there to make it a page.
const IN_PAGE: usize = 4096 / 8;

/// Writes page after page, and looks each time whether the page has what was written there last: a page that came back as
/// it was earlier, or not at all, is found.
fn write_round(memory: &[AtomicU64], stop: &AtomicBool) {
    let pages = (memory.len() / IN_PAGE) as u64;
    let mut count = 0;
    while !stop.load(Ordering::Relaxed) {
        let page = &memory[(count % pages) as usize * IN_PAGE];
        let expected = if count < pages { 0 } else { count - pages + 1 };
        assert_eq!(page.load(Ordering::Relaxed), expected, "page {} of {pages}", count % pages);
        page.store(count + 1, Ordering::Relaxed);
        count += 1;
    }
    for page in 0..pages {
        let value = memory[page as usize * IN_PAGE].load(Ordering::Relaxed);
        assert!(value == 0 && count <= page || (value - 1) % pages == page && value + pages > count, "page {page}");
    }
}

fn writers() -> Check {
    let stop = Arc::new(AtomicBool::new(false));
    // one over much memory, one over little: pages that change between two looks, and pages that change all the time
    let sizes = [64 << 20, 256 << 10];
    let start = |bytes: usize| {
        let stop = stop.clone();
        let memory: Vec<AtomicU64> = (0..bytes / 8).map(|_| AtomicU64::new(0)).collect();
        thread::spawn(move || write_round(&memory, &stop))
    };
    let threads = sizes.map(start);
    Box::new(move || {
        thread::sleep(std::time::Duration::from_millis(300));
        stop.store(true, Ordering::Relaxed);
        threads.into_iter().for_each(|t| t.join().unwrap());
    })
}

/// Memory that comes and goes: mappings made, grown, moved and given back while they are followed.
fn churn() -> Check {
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = stop.clone();
    let still: Vec<u8> = (0..32 << 20).map(|i: u32| i.wrapping_mul(31) as u8).collect();
    let thread = thread::spawn(move || {
        let mut blocks: Vec<Vec<u8>> = Vec::new();
        let mut count = 0usize;
        while !stopped.load(Ordering::Relaxed) {
            count += 1;
            let byte = count as u8;
            match count % 3 {
                0 if blocks.len() > 20 => {
                    let block = blocks.swap_remove(count % 20);
                    assert!(block.iter().all(|b| *b == block[0]), "a block changed");
                }
                1 if !blocks.is_empty() => {
                    // grows in place or is moved (mremap)
                    let place = count % blocks.len();
                    let (fill, length) = (blocks[place][0], blocks[place].len());
                    blocks[place].resize((length + 300_000).min(2 << 20), fill);
                }
                _ => blocks.push(vec![byte; 200_000 + count % 7 * 100_000]),
            }
            blocks.truncate(60);
        }
        assert!(blocks.iter().all(|block| block.iter().all(|b| *b == block[0])), "a block changed");
    });
    Box::new(move || {
        stop.store(true, Ordering::Relaxed);
        thread.join().unwrap();
        assert!(still.iter().zip(0u32..).all(|(b, i)| *b == i.wrapping_mul(31) as u8), "still memory changed");
    })
}

fn memfd() -> Check {
    let file = File::from(memfd_create("in a pod", MFdFlags::MFD_ALLOW_SEALING).unwrap());
    file.write_all_at(b"start", 0).unwrap();
    file.write_all_at(b"end", 9 << 20).unwrap();
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_FUTURE_WRITE | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).unwrap();
    Box::new(move || {
        let mut bytes = vec![0; (9 << 20) + 3];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes.starts_with(b"start\0") && bytes.ends_with(b"\0end"));
        assert_eq!(fcntl(file.as_fd(), FcntlArg::F_GET_SEALS).unwrap(), seals.bits());
    })
}

/// The probe is content after two checkpoints that leave it running, and after a restart from each image.
fn survives(probe: &str, compression: &str) {
    let host = Host::new();
    host.start_probe(probe, &[]);
    let image = host.image();
    let images = ["first", "second"].map(|name| image.with_extension(name).to_str().unwrap().to_owned());
    for image in &images {
        host.must(&["checkpoint", "probe", "-o", image, "--leave-running", "--compress", compression]);
        host.must(&["verify", image]);
    }
    for (image, name) in images.iter().zip(["one", "two"]) {
        host.must(&["restart", image, "-d", "-n", name]);
        host.must_be_content(name);
    }
    host.must_be_content("probe");
}

/// An image relative to an earlier one is small, restarts like any other, finds what it needs by content, and says what
/// is missing.
#[test]
fn images_relative_to_earlier_ones() {
    let host = Host::new();
    host.start_probe("churn", &[]);
    let path = |name: &str| host.image().with_extension(name).to_str().unwrap().to_owned();
    let write = |image: &str, options: &[&str]| {
        let mut arguments = vec!["checkpoint", "probe", "-o", image, "--leave-running"];
        arguments.extend(options);
        host.must(&arguments);
        let all: serde_json::Value = serde_json::from_str(&host.must(&["inspect", "--json", image])).unwrap();
        let data = all["parts"].as_array().unwrap().iter().find(|part| part["name"] == "data").unwrap();
        data["bytes"].as_u64().unwrap() - data["stored_bytes"].as_u64().unwrap()
    };
    let [base, child, grandchild, moved] = ["base", "child", "grandchild", "moved"].map(path);
    // what does not change is 32 MiB
    assert_eq!(write(&base, &[]), 0);
    assert!(write(&child, &["--parent", &base]) >= 32 << 20);
    assert!(write(&grandchild, &["--parent", &child, "--compress", "zstd"]) >= 32 << 20);
    for (image, name) in [(&child, "one"), (&grandchild, "two")] {
        host.must(&["verify", image]);
        host.must(&["restart", image, "-d", "-n", name]);
        host.must_be_content(name);
    }
    std::fs::rename(&base, &moved).unwrap();
    host.must(&["restart", &grandchild, "-d", "-n", "three"]);
    host.must_be_content("three");
    std::fs::remove_dir_all(&moved).unwrap();
    for arguments in [&["verify", &*child][..], &["restart", &child, "-d"]] {
        let refused = host.run(arguments);
        assert_eq!(refused.status.code(), Some(5));
        assert!(String::from_utf8_lossy(&refused.stderr).contains("parts of it are in image"), "{refused:?}");
    }
    for parent in [&child, &base] {
        let refused = host.run(&["checkpoint", "probe", "-o", &moved, "--leave-running", "--parent", parent]);
        assert_eq!(refused.status.code(), Some(5), "{refused:?}");
    }
    host.must_be_content("probe");
}

#[test]
fn memory_that_is_written_all_the_time() {
    survives("writers", "none");
}

#[test]
fn memory_that_comes_and_goes() {
    survives("churn", "none");
}

#[test]
fn memory_in_a_compressed_image() {
    survives("churn", "lz4");
    survives("memfd", "zstd");
}

#[test]
fn a_sealed_memfd() {
    survives("memfd", "none");
}
