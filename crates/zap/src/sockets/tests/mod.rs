//! Sockets captured and made again, in network namespaces of the tests' own.

mod netlink;
mod tcp;
mod udp;
mod unix;

use std::os::fd::OwnedFd;
use std::time::Duration;

use crate::files::{FileState, awaken_all, connect_all, finish, intern_file, open_all, settle_all, unsettled};
use crate::ids::{FileId, HostPid};
use crate::image::{DataSink, ImageReader};
use crate::look::{Console, Look};
use crate::rebuild::Rebuild;

use crate::files::testing::{spec, subject};

/// Runs a test in a thread with a network namespace of its own, in which loopback is up.
fn in_private_network<T: Send + 'static>(test: impl FnOnce() -> T + Send + 'static) -> T {
    std::thread::spawn(|| {
        fresh_network();
        test()
    })
    .join()
    .unwrap()
}

fn fresh_network() {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
    ip("link set lo up");
}

fn ip(arguments: &str) {
    let status = std::process::Command::new("ip").args(arguments.split(' ')).status().unwrap();
    assert!(status.success(), "ip {arguments}");
}

/// Whose namespaces are the test's: threads have their own.
fn this_thread() -> HostPid {
    HostPid(nix::unistd::gettid().as_raw())
}

fn wait_until(condition: impl Fn() -> bool) {
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(std::time::Instant::now() < deadline, "it never came true");
        std::thread::yield_now();
    }
}

struct Captured {
    ids: Vec<FileId>,
    states: Vec<FileState>,
    image: ImageReader,
}

fn capture(files: &[&OwnedFd]) -> Captured {
    capture_while(files, |_| {})
}

/// Captures files one after the other, with something happening after each: its place is given.
fn capture_while(files: &[&OwnedFd], mut happening: impl FnMut(usize)) -> Captured {
    let (spec, mut sink) = (spec(), DataSink::default());
    let mut look = Look::new(&spec, this_thread(), &mut sink, Console::None, false);
    let mut ids = Vec::new();
    for (place, file) in files.iter().enumerate() {
        ids.push(intern_file(&mut look, &subject(), place as i32, file.try_clone().unwrap()).unwrap());
        happening(place);
    }
    finish(&mut look).unwrap();
    let states = look.files.states().cloned().collect();
    drop(look);
    Captured { ids, states, image: ImageReader::of_sink(sink).unwrap() }
}

fn rebuild(captured: &Captured) -> Vec<OwnedFd> {
    let spec = spec();
    let mut rebuild = Rebuild::new(&captured.image, &spec, Vec::new());
    open_all(&mut rebuild, &captured.states).unwrap();
    connect_all(&mut rebuild, &captured.states).unwrap();
    let files = rebuild.into_files();
    let unsettled = unsettled(&captured.states, &|id| files[&id].try_clone()).unwrap();
    settle_all(&unsettled, &|_| None).unwrap();
    awaken_all(unsettled).unwrap();
    captured.ids.iter().map(|id| files[id].try_clone().unwrap()).collect()
}

/// Captures the sockets and makes them again in another network namespace, without the originals.
fn move_all(files: Vec<OwnedFd>) -> Vec<OwnedFd> {
    let captured = capture(&files.iter().collect::<Vec<_>>());
    fresh_network();
    rebuild(&captured)
}
