//! The life of a monitor.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use serde::Serialize;

use super::frame::{self, Kind};
use super::protocol::{Answer, Born, Failure, Start, Watch};
use super::serve::Monitor;
use crate::fault;
use crate::files::HashCache;
use crate::ids::HostPid;
use crate::migrate::destination;
use crate::migrate::wire::Wire;
use crate::pod::registry::ProcessId;
use crate::pod::takeover::{Found, take_over};
use crate::pod::{Birth, LivePod, PodSpec, Store};
use crate::restart::Restarted;
use crate::sys::{descriptor, exec, heap};

/// Descriptors for which there is room from the start: copies of a pod's files, and its threads' `status`.
const ROOM: u64 = 4096;

/// Is a monitor, from its first instruction to its last. The socket on which it is told how to begin is descriptor 3.
pub fn main() -> ExitCode {
    heap::keep_freed();
    // Now, before there are threads.
    if let Err(error) = descriptor::make_room(ROOM) {
        tracing::info!(%error, "the table of descriptors grows as it is needed");
    }
    let Ok(socket) = exec::inherited(3) else { return ExitCode::from(2) };
    let socket = UnixStream::from(socket);
    let Ok(Some((Kind::Request, request))) = frame::read(&socket) else { return ExitCode::from(2) };
    let Ok(start) = serde_json::from_slice::<Start>(&request) else { return ExitCode::from(2) };
    let _ = nix::sys::prctl::set_name(c"zap-monitor");
    match begin(start, &socket) {
        Ok(Some(monitor)) => monitor.live(),
        Ok(None) => {}
        Err(failure) => {
            tracing::error!("{failure}");
            let _ = answer::<()>(&socket, Err(failure));
        }
    }
    ExitCode::SUCCESS
}

/// Writes an answer.
pub(super) fn answer<T: Serialize>(socket: &UnixStream, result: Result<T, Failure>) -> std::io::Result<()> {
    let answer = match result {
        Ok(value) => Answer::Done(serde_json::to_value(value)?),
        Err(failure) => Answer::Failed(failure),
    };
    frame::write(socket, Kind::Answer, &serde_json::to_vec(&answer)?)
}

fn begin(start: Start, socket: &UnixStream) -> Result<Option<Monitor>, Failure> {
    match start {
        Start::Run { store, spec, address, mac, watch, fault } => {
            fault::arm(fault.as_deref());
            let birth = Birth { address, mac, ..Birth::default() };
            let pod = run(store, *spec, birth, watch)?;
            fault::point("run-done");
            let born = born(&pod, None);
            Ok(Some(welcome(pod, socket, &born, watch)))
        }
        Start::Restart { store, options, watch } => {
            Ok(Some(welcome_back(crate::restart::restart(store, &options)?, socket, watch)))
        }
        Start::Receive { store, options } => {
            let broken = |e: std::io::Error| Failure { message: format!("the stream from the source: {e}"), code: 1 };
            let ([from, to], _) = super::client::files_behind(socket).map_err(broken)?;
            let wire = Wire::new(from, to).map_err(broken)?.tried(&options.stream);
            Ok(Some(welcome_back(destination::receive(store, &options, wire)?, socket, Watch::default())))
        }
        Start::TakeOver { store, name } => {
            let claim = store.claim(&name)?;
            let found = claim.map(|claim| take_over(store, &name, claim)).transpose()?;
            let Some(Found::Alive(pod, status, fetching)) = found else {
                let _ = answer(socket, Ok(()));
                return Ok(None);
            };
            log_to_file(&pod);
            pod.save()?;
            let _ = answer(socket, Ok(()));
            Ok(Some(Monitor::new(*pod, status).fetching(fetching)))
        }
    }
}

fn born(pod: &LivePod, stats: Option<crate::restart::Stats>) -> Born {
    let monitor = ProcessId::of(HostPid(std::process::id() as i32));
    Born { name: pod.spec.name.clone(), monitor, stats }
}

fn run(store: Store, spec: PodSpec, birth: Birth<'_>, watch: Watch) -> Result<LivePod, Failure> {
    let mut pod = LivePod::create(store, spec, birth)?;
    match pod.start_main(watch.window) {
        Ok(()) => Ok(pod),
        Err(e) => {
            // A pod whose command cannot run is not left behind.
            pod.abandon();
            Err(e.into())
        }
    }
}

/// Answers whoever asked for the pod, shows it the console if it stays, and is the pod's monitor from then on.
fn welcome(mut pod: LivePod, socket: &UnixStream, born: &Born, watch: Watch) -> Monitor {
    log_to_file(&pod);
    // A command that was killed meanwhile harms nothing.
    let _ = answer(socket, Ok(born));
    if let (Some(session), true) = (pod.session(), watch.attached) {
        if let Some(window) = watch.window {
            session.resize(window);
        }
        if let Ok(copy) = socket.try_clone() {
            session.attach(copy, pod.spec.interactive);
        }
    }
    let _ = socket.shutdown_unless(watch.attached);
    pod.open_console();
    keep_hashes(&pod);
    Monitor::new(pod, None)
}

/// The same for a pod of an image, some of whose memory may come later.
fn welcome_back(restarted: Restarted, socket: &UnixStream, watch: Watch) -> Monitor {
    let Restarted { pod, stats, fetching } = restarted;
    let born = born(&pod, Some(stats));
    welcome(pod, socket, &born, watch).fetching(fetching)
}

/// What was learned of the root's files is for the next monitors, too.
pub(super) fn keep_hashes(pod: &LivePod) {
    if let Err(error) = HashCache::save(pod.store.state()) {
        tracing::warn!("keeping hashes of files: {error}");
    }
}

trait ShutdownUnless {
    fn shutdown_unless(&self, stays: bool) -> std::io::Result<()>;
}

impl ShutdownUnless for UnixStream {
    /// Ends a connection whose other side does not stay.
    fn shutdown_unless(&self, stays: bool) -> std::io::Result<()> {
        if stays { Ok(()) } else { self.shutdown(std::net::Shutdown::Both) }
    }
}

/// What goes wrong in a monitor is told to its log; PID 1 was forked before and keeps the null device.
fn log_to_file(pod: &LivePod) {
    let path = pod.store.pod_dir(&pod.spec.name).join("monitor.log");
    if let Ok(log) = File::options().append(true).create(true).mode(0o600).open(path) {
        let _ = exec::duplicate_to(log.as_raw_fd(), 2);
        let filter = tracing_subscriber::EnvFilter::from_env("ZAP_LOG");
        let _ =
            tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).with_env_filter(filter).try_init();
    }
}
