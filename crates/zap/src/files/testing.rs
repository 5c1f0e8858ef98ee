//! Captures files of the test's own process and opens them again in it.

use std::os::fd::OwnedFd;

use super::{FileState, connect_all, finish, intern_file, open_all};
use crate::ids::{FileId, HostPid, PodPid};
use crate::image::{DataSink, ImageReader};
use crate::look::{Console, Look, Subject};
use crate::pod::PodSpec;
use crate::rebuild::Rebuild;

pub(crate) fn spec() -> PodSpec {
    serde_json::from_value(serde_json::json!({
        "name": "test", "hostname": "test", "root": "/", "binds": [], "network": "private", "address": null,
        "publish": [], "command": [], "environment": [], "user": null, "workdir": "/", "tty": false,
        "interactive": false, "limits": {"memory": null, "cpus": null, "pids": null}, "capabilities": [],
        "seccomp": "default", "remove": false,
    }))
    .unwrap()
}

pub(crate) fn subject() -> Subject {
    let pid = std::process::id() as i32;
    Subject { host: HostPid(pid), pod: PodPid(pid), command: "test".into() }
}

/// Files that were captured: the numbers they got, their states, and the data.
pub(crate) struct Captured {
    pub(crate) ids: Vec<FileId>,
    pub(crate) states: Vec<FileState>,
    sink: DataSink,
}

/// Captures copies of `files` by the root of the thread that calls.
pub(crate) fn captured(files: &[&OwnedFd], console: Console) -> Captured {
    let (spec, mut sink) = (spec(), DataSink::default());
    let init = HostPid(nix::unistd::gettid().as_raw());
    let mut look = Look::new(&spec, init, &mut sink, console, false);
    let copies = files.iter().map(|f| f.try_clone().unwrap());
    let ids: Vec<FileId> = copies.zip(0..).map(|(f, n)| intern_file(&mut look, &subject(), n, f).unwrap()).collect();
    finish(&mut look).unwrap();
    let states: Vec<FileState> = look.files.states().cloned().collect();
    drop(look);
    Captured { ids, states, sink }
}

/// The same files made again, and the master of the console if there is one.
pub(crate) fn rebuilt(captured: Captured) -> (Vec<OwnedFd>, Option<OwnedFd>) {
    let (image, spec) = (ImageReader::of_sink(captured.sink).unwrap(), spec());
    let mut rebuild = Rebuild::new(&image, &spec, Vec::new());
    open_all(&mut rebuild, &captured.states).unwrap();
    connect_all(&mut rebuild, &captured.states).unwrap();
    let console = rebuild.console_master.take();
    let opened = rebuild.into_files();
    (captured.ids.iter().map(|id| opened[id].try_clone().unwrap()).collect(), console)
}

/// Copies of `files` are captured; what comes back are the numbers they got, the states, and the same files made again.
pub(crate) fn round_trip(files: &[&OwnedFd], console: Console) -> (Vec<FileId>, Vec<FileState>, Vec<OwnedFd>) {
    let captured = captured(files, console);
    let (ids, states) = (captured.ids.clone(), captured.states.clone());
    (ids, states, rebuilt(captured).0)
}

/// Waits until nobody has the other end: a child that another test has just forked may, for a moment.
pub(crate) fn wait_for_hangup(file: &OwnedFd) {
    use nix::poll::{PollFd, PollFlags, poll};
    let mut ends = [PollFd::new(std::os::fd::AsFd::as_fd(file), PollFlags::empty())];
    assert_eq!(poll(&mut ends, 10_000u16).unwrap(), 1);
}
