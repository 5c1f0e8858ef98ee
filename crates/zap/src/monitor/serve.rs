//! Serving commands while the pod lives.

use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::frame::{self, Kind};
use super::protocol::{Exec, Failure, Request, Watch};
use super::session::{self, End, Session};
use super::start::{answer, keep_hashes};
use super::watcher::Watcher;
use crate::checkpoint::Afterwards;
use crate::fetch::Fetching;
use crate::files::HashCache;
use crate::ids::PodPid;
use crate::migrate::followers::Followers;
use crate::migrate::progress::Track;
use crate::migrate::wire::Wire;
use crate::pod::console::Ends;
use crate::pod::control::{Control, exit_code};
use crate::pod::journal::Undo;
use crate::pod::registry::PodState;
use crate::pod::{Cgroup, Command, LivePod, PodError};
use crate::sys::pidfd::PidFd;

/// A monitor at work.
pub(super) struct Monitor {
    shared: Arc<Shared>,
    listener: Option<UnixListener>,
    main: PodPid,
    /// How the first command ended, if it had when the pod was taken over.
    status: Option<i32>,
    /// The thread that waits until all of its memory has come.
    filling: Option<JoinHandle<()>>,
}

struct Shared {
    name: String,
    control: Control,
    cgroup: Cgroup,
    console: Option<Session>,
    /// `None` once it has ended or was taken away.
    pod: Mutex<Option<LivePod>>,
    /// While some of its memory has yet to come.
    fetching: Mutex<Option<Fetching>>,
    /// Whether it is to be removed rather than remembered.
    progress: Mutex<Progress>,
    changed: Condvar,
}

#[derive(Default)]
struct Progress {
    end: Option<End>,
    remove: bool,
    /// Everything of the pod's is gone from the host.
    finished: Option<Result<(), Failure>>,
    /// Clients that are still owed an answer.
    busy: usize,
}

/// How long clients may take to read their last answers.
const LAST_WORDS: Duration = Duration::from_secs(2);

type Reply = Result<serde_json::Value, Failure>;

impl Monitor {
    /// The monitor of this pod.
    pub(super) fn new(mut pod: LivePod, status: Option<i32>) -> Monitor {
        let listener = pod.listener.take();
        let shared = Shared {
            name: pod.spec.name.clone(),
            control: pod.control().clone(),
            cgroup: pod.cgroup.clone(),
            console: pod.session().cloned(),
            progress: Mutex::new(Progress { remove: pod.spec.remove, ..Progress::default() }),
            changed: Condvar::new(),
            fetching: Mutex::new(None),
            // A pod without a first command has ended as soon as it is looked at.
            pod: Mutex::new(None),
        };
        let main = pod.main.unwrap_or(PodPid(0));
        *lock(&shared.pod) = Some(pod);
        Monitor { shared: Arc::new(shared), listener, main, status, filling: None }
    }

    /// Some of the pod's memory has yet to come.
    pub(super) fn fetching(mut self, fetching: Option<Fetching>) -> Monitor {
        *lock(&self.shared.fetching) = fetching.clone();
        let shared = self.shared.clone();
        self.filling = fetching.map(|fetching| {
            std::thread::spawn(move || {
                let is_whole = fetching.wait().is_ok();
                let mut pod = lock(&shared.pod);
                let done = |pod: &mut LivePod| {
                    nothing_is_hoarded(pod);
                    [Undo::Fetching, Undo::Filling].iter().try_for_each(|undo| pod.journal.done(undo))
                };
                let noted = pod.as_mut().filter(|_| is_whole).map(done);
                drop(pod);
                if let Some(Err(error)) = noted {
                    tracing::error!("{error}");
                }
                *lock(&shared.fetching) = None;
            })
        });
        self
    }

    /// Serves until the pod ends, and takes it down.
    pub(super) fn live(self) {
        let shared = self.shared.clone();
        let Some(listener) = self.listener else { return };
        let accepting = std::thread::Builder::new().name("accept".to_owned()).spawn(move || shared.accept(&listener));
        if let Err(e) = accepting {
            tracing::error!("starting a thread: {e}");
        }
        let status = self.status.or_else(|| self.shared.control.wait_exit(self.main));
        let code = status.map_or(128 + libc::SIGKILL, exit_code);
        self.shared.finish(End::Exited(code));
        // The host that it left is to hear that nothing more is needed.
        if let Some(filling) = self.filling {
            let _ = filling.join();
        }
        self.shared.dismiss_clients();
    }
}

/// Returns when PID 1 has closed the userfaultfds that it was told to close, and so nothing is registered with them: it does
/// what it is told in order. That of a suspended pod does when the pod goes on.
fn nothing_is_hoarded(pod: &LivePod) {
    if !pod.cgroup.is_frozen() {
        let _ = pod.control().status();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// Takes the pod down, unless somebody has already; tells whoever waits.
    fn finish(&self, end: End) {
        let taken = lock(&self.pod).take();
        if let Some(pod) = taken {
            self.take_down(pod, end);
        }
    }

    fn take_down(&self, mut pod: LivePod, end: End) {
        let remove = lock(&self.progress).remove;
        let code = match &end {
            End::Exited(code) => *code,
            End::TakenAway(_) => 0,
        };
        let result = if remove {
            pod.destroy(end.clone())
        } else {
            let stopped = pod.stop(code);
            if let Some(console) = &self.console {
                console.end(end.clone());
            }
            stopped
        };
        if let Err(e) = &result {
            tracing::error!("{e}");
        }
        self.announce(end, result.map_err(Failure::from));
    }

    fn announce(&self, end: End, result: Result<(), Failure>) {
        let mut progress = lock(&self.progress);
        progress.end = Some(end);
        progress.finished = Some(result);
        self.changed.notify_all();
    }

    fn dismiss_clients(&self) {
        let deadline = Instant::now() + LAST_WORDS;
        let mut progress = lock(&self.progress);
        while progress.finished.is_none() || progress.busy > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() && progress.finished.is_some() {
                return;
            }
            progress = match self.changed.wait_timeout(progress, left.max(Duration::from_millis(1))) {
                Ok((guard, _)) => guard,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }

    fn accept(self: Arc<Self>, listener: &UnixListener) {
        for socket in listener.incoming().flatten() {
            let shared = self.clone();
            lock(&self.progress).busy += 1;
            let serving = std::thread::Builder::new().name("client".to_owned()).spawn(move || {
                shared.serve(&socket);
                lock(&shared.progress).busy -= 1;
                shared.changed.notify_all();
            });
            if let Err(e) = serving {
                tracing::error!("starting a thread: {e}");
                lock(&self.progress).busy -= 1;
            }
        }
    }

    fn serve(&self, socket: &UnixStream) {
        let Ok(Some((Kind::Request, bytes))) = frame::read(socket) else { return };
        let reply = match serde_json::from_slice(&bytes) {
            Ok(Request::Attach(watch)) => return self.attach(socket, watch),
            Ok(Request::Exec(exec)) => return self.exec(socket, &exec),
            Ok(Request::Migrate(options)) => self.migrate(socket, &options),
            Ok(request) => {
                let answered = answer(socket, self.act(request));
                // What a checkpoint gathered is freed by now.
                crate::sys::heap::release();
                return drop(answered);
            }
            Err(e) => Err(Failure { message: format!("a request of another version of zap: {e}"), code: 1 }),
        };
        let _ = answer(socket, reply);
    }

    fn act(&self, request: Request) -> Reply {
        let nothing = Ok(serde_json::Value::Null);
        match request {
            Request::Wait => {
                let end = self.wait_for_end(None).expect("waiting without a limit");
                Ok(serde_json::to_value(end).unwrap_or_default())
            }
            Request::Signal(signal) => self.signal(signal).and(nothing),
            Request::Stop { seconds } => self.stop(seconds).and(nothing),
            Request::Suspend => self.with_pod(|pod| match pod.state() {
                PodState::Suspended => Err(self.in_state("suspended already", "")),
                _ => pod.suspend(),
            }),
            Request::Resume => self.with_pod(|pod| match pod.state() {
                _ if pod.is_in_doubt() => Err(self.in_doubt()),
                PodState::Suspended => pod.resume(),
                _ => Err(self.in_state("not suspended", "")),
            }),
            Request::Remove => self.remove().and(nothing),
            Request::Checkpoint(options) => self.checkpoint(&options),
            Request::Resolve { keep } => self.resolve(keep),
            Request::Attach(_) | Request::Exec(_) | Request::Migrate(_) => nothing,
        }
    }

    fn in_state(&self, state: &str, hint: &'static str) -> PodError {
        PodError::State { pod: self.name.clone(), state: state.to_owned(), hint }
    }

    fn in_doubt(&self) -> PodError {
        let hint = "; look at the destination, then say `zap migrate --resolve` with `keep` or `drop`";
        self.in_state("held, for it may be running where it was being moved", hint)
    }

    fn ended(&self) -> Failure {
        PodError::Ended(self.name.clone()).into()
    }

    fn with_pod(&self, act: impl FnOnce(&mut LivePod) -> Result<(), PodError>) -> Reply {
        let mut pod = lock(&self.pod);
        act(pod.as_mut().ok_or_else(|| self.ended())?)?;
        Ok(serde_json::Value::Null)
    }

    /// Waits for the end of the pod, as long as `limit` says.
    fn wait_for_end(&self, limit: Option<Duration>) -> Option<End> {
        let deadline = limit.map(|l| Instant::now() + l);
        let mut progress = lock(&self.progress);
        loop {
            if let (Some(end), Some(_)) = (&progress.end, &progress.finished) {
                return Some(end.clone());
            }
            let left = deadline.map(|d| d.saturating_duration_since(Instant::now()));
            progress = match left {
                Some(left) if left.is_zero() => return None,
                Some(left) => match self.changed.wait_timeout(progress, left) {
                    Ok((guard, _)) => guard,
                    Err(poisoned) => poisoned.into_inner().0,
                },
                None => self.changed.wait(progress).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    fn signal(&self, signal: i32) -> Result<(), Failure> {
        let mut pod = lock(&self.pod);
        let pod = pod.as_mut().ok_or_else(|| self.ended())?;
        if signal == libc::SIGKILL {
            // Everything, also when it is suspended. The end is noticed as any other.
            return pod.end_all().map_err(Failure::from);
        }
        let failed = |source| PodError::Kernel { pod: self.name.clone(), step: "signalling".to_owned(), source };
        let main = pod.main.and_then(|main| pod.host_pid(main)).ok_or_else(|| self.ended())?;
        Ok(PidFd::open(main).and_then(|p| p.signal(signal)).map_err(failed)?)
    }

    fn stop(&self, seconds: u64) -> Result<(), Failure> {
        let polite = self.signal(libc::SIGTERM);
        if polite.is_ok() {
            // A suspended process could not act on it.
            let _ = self.cgroup.thaw();
            if self.wait_for_end(Some(Duration::from_secs(seconds))).is_some() {
                return Ok(());
            }
        }
        self.end_frozen();
        if lock(&self.pod).is_some() {
            self.cgroup.kill()?;
        }
        self.wait_for_end(None);
        Ok(())
    }

    /// Kills everybody if the pod's own processes have frozen it: whoever has the pod may be waiting for its PID 1.
    fn end_frozen(&self) {
        if self.cgroup.is_frozen_inside() {
            let _ = self.cgroup.begin_kill();
        }
    }

    fn remove(&self) -> Result<(), Failure> {
        lock(&self.progress).remove = true;
        self.end_frozen();
        self.finish(End::Exited(128 + libc::SIGKILL));
        self.wait_for_end(None);
        lock(&self.progress).finished.clone().unwrap_or(Ok(()))
    }

    /// The pod, once all of its memory has come.
    fn whole(&self) -> MutexGuard<'_, Option<LivePod>> {
        let fetching = lock(&self.fetching).clone();
        if let Some(fetching) = &fetching {
            let _ = fetching.wait();
        }
        let pod = lock(&self.pod);
        if let (Some(pod), Some(_)) = (&*pod, fetching) {
            nothing_is_hoarded(pod);
        }
        pod
    }

    fn checkpoint(&self, options: &crate::checkpoint::Options) -> Reply {
        let mut guard = self.whole();
        let pod = guard.as_mut().ok_or_else(|| self.ended())?;
        if pod.is_in_doubt() {
            return Err(self.in_doubt().into());
        }
        HashCache::load(pod.store.state());
        let stats = crate::checkpoint::checkpoint(pod, options)?;
        keep_hashes(pod);
        match options.afterwards {
            Afterwards::Running => {}
            Afterwards::Suspended => pod.suspend()?,
            Afterwards::Gone => {
                let words = format!("pod {} was written to {} and is gone", self.name, options.output.display());
                self.take_away(guard, words);
            }
        }
        serde_json::to_value(stats).map_err(|e| Failure { message: e.to_string(), code: 1 })
    }

    /// Removes a pod whose processes have ended because it is elsewhere now.
    fn take_away(&self, mut guard: MutexGuard<'_, Option<LivePod>>, words: String) {
        // Taken while the lock is held: the end of the first command is not the end that is told.
        let taken = guard.take();
        lock(&self.progress).remove = true;
        drop(guard);
        if let Some(pod) = taken {
            self.take_down(pod, End::TakenAway(words));
        }
    }

    fn migrate(&self, socket: &UnixStream, options: &crate::migrate::Options) -> Reply {
        let broken = |e: std::io::Error| Failure { message: format!("pod {}: the stream: {e}", self.name), code: 1 };
        let ([from, to], others) = super::client::files_behind(socket).map_err(broken)?;
        let followers = Followers::new(&options.tell, others);
        let wire = Arc::new(Wire::new(from, to).map_err(broken)?.tried(&options.stream));
        let mut guard = self.whole();
        let pod = guard.as_mut().ok_or_else(|| self.ended())?;
        if pod.is_in_doubt() {
            return Err(self.in_doubt().into());
        }
        let begun = Instant::now();
        let track = Track::default();
        let watched = socket.try_clone().map_err(broken)?;
        // A command that is interrupted takes its order back, as long as that can be done.
        let watcher = Watcher::start(watched, wire.clone(), track.clone(), options.progress).map_err(broken)?;
        let moved = crate::migrate::source::migrate(pod, options, wire, followers, &track);
        watcher.end();
        let mut stats = moved?;
        self.take_away(guard, format!("pod {} was moved to {} and is gone here", self.name, options.to));
        stats.total_us = begun.elapsed().as_micros() as u64;
        serde_json::to_value(stats).map_err(|e| Failure { message: e.to_string(), code: 1 })
    }

    fn resolve(&self, keep: bool) -> Reply {
        let mut guard = lock(&self.pod);
        let pod = guard.as_mut().ok_or_else(|| self.ended())?;
        if !pod.is_in_doubt() {
            return Err(self.in_state("not in doubt", "; there is nothing to resolve").into());
        }
        if keep {
            pod.keep()?;
        } else {
            self.take_away(guard, format!("pod {} lives elsewhere", self.name));
        }
        Ok(serde_json::Value::Null)
    }

    fn attach(&self, socket: &UnixStream, watch: Watch) {
        let attached = self.console.as_ref().ok_or_else(|| self.ended()).and_then(|console| {
            let copy = socket.try_clone().map_err(|e| Failure { message: e.to_string(), code: 1 })?;
            Ok((console, copy))
        });
        match attached {
            Ok((console, copy)) => {
                if answer(socket, Ok(())).is_ok() {
                    if let Some(window) = watch.window {
                        console.resize(window);
                    }
                    console.attach(copy, true);
                }
            }
            Err(failure) => drop(answer::<()>(socket, Err(failure))),
        }
    }

    fn exec(&self, socket: &UnixStream, exec: &Exec) {
        let (session, pid, hush) = match self.start_exec(exec) {
            Ok(started) => started,
            Err(failure) => return drop(answer::<()>(socket, Err(failure))),
        };
        let _ = answer(socket, Ok(()));
        if let Some(window) = exec.watch.window {
            session.resize(window);
        }
        if let Ok(copy) = socket.try_clone() {
            session.attach(copy, exec.interactive);
        }
        drop(hush);
        let status = self.control.wait_exit(pid);
        session.end(match status {
            Some(status) => End::Exited(exit_code(status)),
            None => self.wait_for_end(None).unwrap_or(End::Exited(128 + libc::SIGKILL)),
        });
    }

    fn start_exec(&self, exec: &Exec) -> Result<(Session, PodPid, session::Hush), Failure> {
        let guard = lock(&self.pod);
        let pod = guard.as_ref().ok_or_else(|| self.ended())?;
        if pod.state() == PodState::Suspended {
            return Err(self.in_state("suspended", "; `zap resume` lets it go on").into());
        }
        if pod.cgroup.is_frozen_inside() {
            // Nor could PID 1 answer.
            return Err(self.in_state("frozen by one of its own processes", "; `zap rm -f` ends it").into());
        }
        let failed = |source| PodError::Kernel { pod: self.name.clone(), step: "making a console".to_owned(), source };
        let made = if exec.tty { Ends::pty(pod.init) } else { Ends::pipes(exec.interactive) };
        let (ends, stdio) = made.map_err(failed)?;
        let session = Session::start(ends, session::Plan::default()).map_err(failed)?;
        let command = Command {
            argv: exec.command.clone(),
            environment: merge(&pod.spec.environment, &exec.environment),
            user: exec.user.clone().or_else(|| pod.spec.user.clone()),
            workdir: exec.workdir.clone().unwrap_or_else(|| pod.spec.workdir.clone()),
            capabilities: pod.spec.capabilities.clone(),
            seccomp: pod.spec.seccomp.clone(),
        };
        let hush = session.hush();
        match self.control.spawn(&command, &stdio, exec.tty, false) {
            Ok(pid) => {
                if let Some(process) = pod.host_pid(pid).and_then(|p| PidFd::open(p).ok()) {
                    session.set_target(process);
                }
                Ok((session, pid, hush))
            }
            Err(e) => {
                session.end(End::Exited(1));
                Err(e.into())
            }
        }
    }
}

/// `more` over `base`, key by key.
fn merge(base: &[String], more: &[String]) -> Vec<String> {
    let key = |entry: &str| entry.split('=').next().unwrap_or("").to_owned();
    let replaced: Vec<String> = more.iter().map(|e| key(e)).collect();
    base.iter().filter(|e| !replaced.contains(&key(e))).chain(more).cloned().collect()
}
