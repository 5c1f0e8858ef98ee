//! How commands reach monitors, and start them.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::frame::{self, Kind};
use super::protocol::{Answer, Failure, Request, Start};
use crate::pod::registry::{PodState, ProcessId};
use crate::pod::{PodError, Store, cgroup};
use crate::sys::pidfd::PidFd;
use crate::sys::{channel, namespace};

fn broken(what: &str, e: impl std::fmt::Display) -> Failure {
    Failure { message: format!("{what}: {e}"), code: 1 }
}

/// Starts a monitor and tells it how to begin. Returns what it says, and the connection.
pub fn launch<T: DeserializeOwned>(start: &Start) -> Result<(T, UnixStream), Failure> {
    let (ours, theirs) = UnixStream::pair().map_err(|e| broken("making a socket", e))?;
    spawn_monitor(theirs.into()).map_err(|e| broken("starting the pod's monitor", e))?;
    let answer = converse(&ours, start)?;
    Ok((answer, ours))
}

fn spawn_monitor(socket: OwnedFd) -> io::Result<()> {
    let program = program()?;
    let args = [CString::new("zap")?, CString::new(super::ARGUMENT)?];
    let wanted = |key: &str| key.starts_with("ZAP_") || key.starts_with("RUST_") || key == "PATH";
    let environment: Vec<CString> = std::env::vars()
        .filter(|(key, _)| wanted(key))
        .filter_map(|(key, value)| CString::new(format!("{key}={value}")).ok())
        .collect();
    match program {
        Program::Own if is_as_new() => namespace::fork_apart(&args, &environment, &socket, || {
            super::main();
        }),
        program => {
            let path = CString::new(program.path().as_os_str().as_bytes())?;
            namespace::spawn_apart(&path, &args, &environment, &socket)
        }
    }
}

/// Whether a copy of this process would be as good a monitor as one that is started: starting a program costs milliseconds.
fn is_as_new() -> bool {
    let is_alone = || std::fs::read_dir("/proc/self/task").is_ok_and(|threads| threads.count() == 1);
    !tracing::dispatcher::has_been_set() && cgroup::is_unknown_or_mounted() && is_alone()
}

/// What runs as a monitor.
enum Program {
    /// This program.
    Own,
    /// Another.
    At(PathBuf),
}

impl Program {
    fn path(&self) -> &Path {
        match self {
            // A program that was replaced since it was started is still there under this name.
            Program::Own => Path::new("/proc/self/exe"),
            Program::At(path) => path,
        }
    }
}

/// The `zap` to run as a monitor: `ZAP_PROGRAM`, or this program if it is zap, or the `zap` near it (for programs that
/// use the library), or the one in `PATH`.
fn program() -> io::Result<Program> {
    if let Some(path) = std::env::var_os("ZAP_PROGRAM") {
        return Ok(Program::At(path.into()));
    }
    let own = std::fs::read_link("/proc/self/exe")?;
    if own.file_name().is_some_and(|n| n == "zap" || n.as_bytes().starts_with(b"zap (deleted)")) {
        return Ok(Program::Own);
    }
    let near = own.ancestors().skip(1).take(3).map(|dir| dir.join("zap"));
    let path = std::env::var_os("PATH").unwrap_or_default();
    near.chain(std::env::split_paths(&path).map(|dir| dir.join("zap")))
        .find(|p| p.is_file())
        .map(Program::At)
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no zap program found; set ZAP_PROGRAM"))
}

fn say<Q: Serialize>(mut socket: &UnixStream, question: &Q) -> io::Result<()> {
    frame::write(&mut socket, Kind::Request, &serde_json::to_vec(question)?)
}

/// Sends one question and reads its answer.
pub fn converse<Q: Serialize, T: DeserializeOwned>(socket: &UnixStream, question: &Q) -> Result<T, Failure> {
    say(socket, question).map_err(|e| broken("asking the pod's monitor", e))?;
    hear_answer(socket).map_err(Failure::from)
}

/// Why there is no answer to be had.
enum NoAnswer {
    /// The monitor ended.
    Ended,
    /// It could not do what it was asked for, or its answer makes no sense.
    Failed(Failure),
}

impl From<NoAnswer> for Failure {
    fn from(why: NoAnswer) -> Failure {
        match why {
            NoAnswer::Ended => broken("the pod's monitor", "it ended before it answered; try again"),
            NoAnswer::Failed(failure) => failure,
        }
    }
}

fn hear_answer<T: DeserializeOwned>(socket: &UnixStream) -> Result<T, NoAnswer> {
    hear_on(socket, &mut |_| {})
}

/// Hears how far it is, and then the answer.
fn hear_on<T: DeserializeOwned>(mut socket: &UnixStream, told: &mut dyn FnMut(&[u8])) -> Result<T, NoAnswer> {
    let payload = loop {
        match frame::read(&mut socket) {
            Ok(Some((Kind::Progress, payload))) => told(&payload),
            Ok(Some((Kind::Answer, payload))) => break payload,
            _ => return Err(NoAnswer::Ended),
        }
    };
    let senseless = |e| NoAnswer::Failed(broken("the monitor's answer", e));
    match serde_json::from_slice(&payload).map_err(senseless)? {
        Answer::Done(value) => serde_json::from_value(value).map_err(senseless),
        Answer::Failed(failure) => Err(NoAnswer::Failed(failure)),
    }
}

/// As [`launch`], with the two ends of a stream that the monitor is to use.
pub fn launch_with<T: DeserializeOwned>(start: &Start, stream: [OwnedFd; 2]) -> Result<(T, UnixStream), Failure> {
    let (ours, theirs) = UnixStream::pair().map_err(|e| broken("making a socket", e))?;
    spawn_monitor(theirs.into()).map_err(|e| broken("starting the pod's monitor", e))?;
    let answer = hear_behind(&ours, start, stream.into(), &mut |_| {})?;
    Ok((answer, ours))
}

/// Asks the monitor of a pod on a connection that there is, with files behind the question, which are closed here once they
/// are on their way. What is said before the answer goes to `told`.
pub fn ask_with<Q: Serialize, T: DeserializeOwned>(
    (socket, monitor): (&UnixStream, Option<ProcessId>),
    question: &Q,
    files: Vec<OwnedFd>,
    told: &mut dyn FnMut(&[u8]),
) -> Result<T, Failure> {
    found_gone(hear_behind(socket, question, files, told), monitor)
}

fn hear_behind<Q: Serialize, T: DeserializeOwned>(
    socket: &UnixStream,
    question: &Q,
    files: Vec<OwnedFd>,
    told: &mut dyn FnMut(&[u8]),
) -> Result<T, NoAnswer> {
    let unheard = |e| NoAnswer::Failed(broken("asking the pod's monitor", e));
    say(socket, question).map_err(unheard)?;
    let borrowed: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    channel::send(socket, &[0], &borrowed, true).map_err(unheard)?;
    drop(files);
    hear_on(socket, told)
}

/// The files behind a question: the two ends of a stream, and others.
pub(super) fn files_behind(socket: &UnixStream) -> io::Result<([OwnedFd; 2], Vec<OwnedFd>)> {
    let (_, mut files) = channel::receive(socket, &mut [0])?;
    let others = files.split_off(files.len().min(2));
    let too_few = |_| io::Error::new(io::ErrorKind::InvalidData, "two files were expected");
    Ok((files.try_into().map_err(too_few)?, others))
}

/// Asks the monitor of a pod; the connection goes on where the request says so.
pub fn ask<T: DeserializeOwned>(store: &Store, name: &str, request: &Request) -> Result<(T, UnixStream), Failure> {
    let socket = connect(store, name)?;
    let monitor = store.load(name).ok().and_then(|record| record.monitor);
    // Who does not listen has ended.
    let answer = say(&socket, request).map_err(|_| NoAnswer::Ended).and_then(|()| hear_answer(&socket));
    Ok((found_gone(answer, monitor)?, socket))
}

/// Until the last of its threads is gone a monitor that was killed holds what it held of the pod: the command after one that
/// had no answer is to find it gone.
fn found_gone<T>(answer: Result<T, NoAnswer>, monitor: Option<ProcessId>) -> Result<T, Failure> {
    if let (Err(NoAnswer::Ended), Some(process)) = (&answer, monitor.and_then(|monitor| monitor.handle())) {
        ended_within(&process, DYING);
    }
    Ok(answer?)
}

/// Connects to the monitor of a pod that has not stopped; starts a new one if the pod has lost its own.
pub fn connect(store: &Store, name: &str) -> Result<UnixStream, Failure> {
    if let Some(socket) = try_connect(store, name)? {
        return Ok(socket);
    }
    revive(store, name)?;
    match try_connect(store, name)? {
        Some(socket) => Ok(socket),
        None => Err(stopped(store, name)),
    }
}

fn stopped(store: &Store, name: &str) -> Failure {
    match store.load(name) {
        Ok(record) if record.state == PodState::Stopped => PodError::State {
            pod: name.to_owned(),
            state: "stopped".to_owned(),
            hint: "; `zap logs` has its output, `zap rm` removes it",
        }
        .into(),
        Ok(_) => broken(&format!("pod {name}"), "its monitor cannot be reached"),
        Err(e) => e.into(),
    }
}

/// Waits until a monitor that has nothing left to do is gone, so that nothing of zap's is left when a command returns.
pub fn await_end(monitor: Option<ProcessId>) {
    if let Some(process) = monitor.and_then(|monitor| monitor.handle()) {
        ended_within(&process, FAREWELL);
    }
}

/// Waits for the end of a process and all of its threads.
fn ended_within(process: &PidFd, milliseconds: u16) -> bool {
    let ended = poll(&mut [PollFd::new(process.as_fd(), PollFlags::POLLIN)], PollTimeout::from(milliseconds));
    ended.is_ok_and(|events| events > 0)
}

/// How long, in milliseconds: a monitor may still be telling a slow client the end.
const FAREWELL: u16 = 3000;
/// How long a killed one may take to be gone, or one that begins to answer, and how often to look for the latter.
const DYING: u16 = 10_000;
const BEGINNING: u16 = 20;

/// Sees to it that a pod has a living monitor, or is known to have stopped.
pub fn revive(store: &Store, name: &str) -> Result<(), Failure> {
    let _turn = store.lock_start(name)?;
    let record = store.load(name)?;
    if record.state == PodState::Stopped || answers_or_ends(store, name, record.monitor)? {
        return Ok(());
    }
    launch::<()>(&Start::TakeOver { store: store.clone(), name: name.to_owned() }).map(drop)
}

/// Waits until the monitor of a pod answers (true), or nothing is left of it (false): a pod belongs to its monitor until
/// the last thread of that has ended.
fn answers_or_ends(store: &Store, name: &str, monitor: Option<ProcessId>) -> Result<bool, Failure> {
    let begun = Instant::now();
    loop {
        // The socket of one that ends may be the last that it lets go of: who connects to it has no answer.
        if monitor.is_none_or(|monitor| monitor.lives()) && try_connect(store, name)?.is_some() {
            return Ok(true);
        }
        let Some(process) = monitor.and_then(|monitor| monitor.handle()) else { return Ok(false) };
        if ended_within(&process, BEGINNING) {
            return Ok(false);
        }
        if begun.elapsed() > Duration::from_millis(DYING.into()) {
            return Err(broken(&format!("pod {name}"), "its monitor neither answers nor ends; try again later"));
        }
    }
}

fn try_connect(store: &Store, name: &str) -> Result<Option<UnixStream>, Failure> {
    if !store.pod_dir(name).is_dir() {
        return Err(PodError::Unknown(name.to_owned()).into());
    }
    match store.connect(name) {
        Ok(socket) => Ok(Some(socket)),
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => Ok(None),
        Err(e) => Err(broken(&format!("pod {name}: connecting to its monitor"), e)),
    }
}
