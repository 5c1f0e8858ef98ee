//! The story of a checkpoint: look ahead → hold → look → let go → write.
//!
//! It runs on a thread of its own: ptrace belongs to threads, and whatever goes wrong, the end of the thread lets go of
//! every process that it held, which then walks home by itself (see `tracee`).

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::error::CaptureError;
use crate::fault;
use crate::files::{self, DescriptorState};
use crate::ids::PodPid;
use crate::image::{Compression, ImageError, ImageWriter};
use crate::ipc::{self, IpcState};
use crate::look::Look;
use crate::memory;
use crate::namespaces::NamespaceState;
use crate::pod::journal::Undo;
use crate::pod::network::NetworkError;
use crate::pod::trees::{self, Trees, TreesError};
use crate::pod::{LivePod, PodError};
use crate::process::ahead::MemoryAhead;
use crate::process::capture;
use crate::process::discover::{self, PodProc};
use crate::process::hold::{self, Cleared, HeldPod, HoldError};
use crate::process::state::{EndedState, ProcessState};
use crate::process::vfork;
use crate::record::PodRecord;
use crate::sockets::Listeners;
use crate::tracee::TraceeError;

/// What becomes of the pod after its checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Afterwards {
    /// It is gone, as after `rm`.
    Gone,
    /// It goes on running.
    Running,
    /// It stays suspended.
    Suspended,
}

/// How a checkpoint is to be taken.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Options {
    /// Absolute path of the image; must not exist.
    pub output: PathBuf,
    /// What becomes of the pod.
    pub afterwards: Afterwards,
    /// How bulk bytes are compressed.
    pub compress: Compression,
    /// An image of the same pod, relative to which only changes are written.
    pub parent: Option<PathBuf>,
    /// Carry the contents of the root's files that the pod has open or mapped.
    pub carry_files: bool,
    /// Copy memory in the hold alone, and nothing of it while the pod runs.
    #[serde(default)]
    pub stop_and_copy: bool,
    /// The fault point at which the monitor is to die ([`crate::fault`]).
    #[serde(default)]
    pub fault: Option<String>,
}

/// How long a phase took.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Phase {
    /// Its name, as `--stats` prints it.
    pub name: String,
    /// Microseconds.
    pub us: u64,
}

/// Figures of a finished checkpoint. Times are whole microseconds, sizes bytes.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Stats {
    /// The sum of `holds_us`.
    pub downtime_us: u64,
    /// Each time that the pod was held, from the first process held to the last let go.
    pub holds_us: Vec<u64>,
    /// From the request to the finished image.
    pub total_us: u64,
    /// hold, look, memory, files, write, let-go.
    pub phases: Vec<Phase>,
    /// Size of the image.
    pub bytes: u64,
    /// Pages of memory in it.
    pub pages: u64,
    /// Processes in it.
    pub processes: u64,
    /// Threads in it.
    pub threads: u64,
    /// Times that memory was looked through: the last one with the pod held.
    #[serde(default)]
    pub rounds: u64,
}

/// Why a checkpoint was not taken. The pod runs on.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// Something could not be captured.
    #[error("pod {pod}: {source}")]
    Capture {
        /// The pod's name.
        pod: String,
        /// What and why.
        source: CaptureError,
    },
    /// A process could not be held or used.
    #[error("pod {pod}: {source}")]
    Tracee {
        /// The pod's name.
        pod: String,
        /// What and why.
        source: TraceeError,
    },
    /// It was to be given away, and nobody took it.
    #[error("pod {pod} goes on here: {why}")]
    Kept {
        /// The pod's name.
        pod: String,
        /// Why.
        why: String,
    },
    /// It was given away, and nobody can tell whether it arrived.
    #[error(
        "pod {pod} is held, for it may be running at the destination: {why}; look there, then say \
        `zap migrate --resolve {pod} keep` or `drop`"
    )]
    InDoubt {
        /// The pod's name.
        pod: String,
        /// Why.
        why: String,
    },
    /// The image could not be written.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The pod could not be stopped, or put back as it was.
    #[error(transparent)]
    Pod(#[from] PodError),
}

impl CheckpointError {
    /// The exit code of the command (CLI.md).
    pub fn exit_code(&self) -> u8 {
        match self {
            CheckpointError::Capture { source: CaptureError::Refused { .. }, .. } => 3,
            _ => 1,
        }
    }
}

/// Writes a pod down. On an error the pod goes on as it was.
pub fn checkpoint(pod: &mut LivePod, options: &Options) -> Result<Stats, CheckpointError> {
    on_a_thread(pod, |pod| {
        let image = Undo::Image(options.output.clone());
        pod.journal.record(image.clone())?;
        let writer = ImageWriter::create(&options.output, options.compress);
        let told = writer.map_err(CheckpointError::from).and_then(|writer| tell(pod, options, writer, None));
        pod.journal.done(&image)?;
        told
    })
}

/// Sends a pod to whoever puts the parts of its image together; `give` is called when all of them are there, with the pod
/// still held. On an error the pod goes on as it was, unless [`Given::InDoubt`] is what came of it.
pub fn send(
    pod: &mut LivePod,
    options: &Options,
    writer: ImageWriter,
    give: &mut Give<'_>,
) -> Result<Stats, CheckpointError> {
    on_a_thread(pod, |pod| tell(pod, options, writer, Some(give)))
}

/// Gives a held pod away.
pub type Give<'a> = dyn FnMut(&mut LivePod) -> Given + Send + 'a;

/// What came of giving a pod away.
pub enum Given {
    /// It runs elsewhere.
    Away,
    /// It does not: it goes on here.
    Kept(String),
    /// Nobody can tell: it stays held, and the network blocked.
    InDoubt(String),
}

fn on_a_thread(
    pod: &mut LivePod,
    tell: impl FnOnce(&mut LivePod) -> Result<Stats, CheckpointError> + Send,
) -> Result<Stats, CheckpointError> {
    let name = pod.spec.name.clone();
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| tell(pod));
        thread.join().unwrap_or_else(|_| {
            let source = CaptureError::Unexpected { object: "the tracer".into(), what: "panic".into() };
            Err(CheckpointError::Capture { pod: name, source })
        })
    })
}

/// Whatever happens, no part of an image stays, and on an error the pod is as suspended as it was.
fn tell(
    pod: &mut LivePod,
    options: &Options,
    writer: ImageWriter,
    give: Option<&mut Give<'_>>,
) -> Result<Stats, CheckpointError> {
    let was_suspended = pod.cgroup.is_frozen();
    let told = tell_stages(pod, options, writer, give);
    let goes_on = !matches!(told, Ok(_) | Err(CheckpointError::InDoubt { .. }));
    if goes_on && !was_suspended {
        pod.cgroup.thaw()?;
    }
    told
}

fn tell_stages(
    pod: &mut LivePod,
    options: &Options,
    mut writer: ImageWriter,
    give: Option<&mut Give<'_>>,
) -> Result<Stats, CheckpointError> {
    let mut checkpoint = Checkpoint {
        was_suspended: pod.cgroup.is_frozen(),
        memory: MemoryAhead::default(),
        listeners: Listeners::default(),
        newcomers_dropped: false,
        pod,
        options,
        clock: Clock::start(),
    };
    fault::arm(options.fault.as_deref());
    fault::point("checkpoint-begin");
    let trees = checkpoint.look_ahead(&mut writer)?;
    fault::point("checkpoint-looked-ahead");
    let held = checkpoint.hold()?;
    fault::point("checkpoint-held");
    let mut stats =
        Stats { processes: held.processes.len() as u64, threads: held.threads() as u64, ..Stats::default() };
    let (held, captured) = checkpoint.look(held, &mut writer, trees)?;
    fault::point("checkpoint-captured");
    if options.afterwards == Afterwards::Gone {
        // The pod stays held until its image is whole, and ends while it is held: should writing fail, it goes on.
        let held_for = checkpoint.clock.held();
        if let Err(error) = checkpoint.write(captured, writer, &mut stats) {
            checkpoint.let_go(held)?;
            return Err(error);
        }
        stats.holds_us.push(match give {
            Some(give) => checkpoint.give(held, give)?,
            None => checkpoint.end(held).map(|()| held_for)?,
        });
    } else {
        checkpoint.let_go(held)?;
        stats.holds_us.push(checkpoint.clock.held());
        fault::point("checkpoint-let-go");
        checkpoint.write(captured, writer, &mut stats)?;
    }
    fault::point("checkpoint-written");
    Ok(checkpoint.clock.into_stats(stats))
}

/// A checkpoint in progress.
struct Checkpoint<'a> {
    pod: &'a mut LivePod,
    options: &'a Options,
    clock: Clock,
    /// Whether the pod was suspended already.
    was_suspended: bool,
    /// Its listening sockets.
    listeners: Listeners,
    /// Whether requests for new connections are being dropped.
    newcomers_dropped: bool,
    /// What was copied of its memory while it ran.
    memory: MemoryAhead,
}

/// What was captured while the pod was held.
struct Captured {
    pod: PodRecord,
    processes: Vec<ProcessState>,
    zombies: Vec<EndedState>,
    files: Vec<files::FileState>,
    ipc: IpcState,
    namespaces: Vec<NamespaceState>,
    trees: Trees,
}

impl Checkpoint<'_> {
    /// While the pod runs: refuses what cannot be captured, before anything is disturbed, and copies its files.
    fn look_ahead(&mut self, writer: &mut ImageWriter) -> Result<Trees, CheckpointError> {
        let pod = &*self.pod;
        let population = discover::discover(pod.init, &pod.cgroup.pids()?).map_err(|e| refused(pod, e))?;
        let mut look = Look::new(&pod.spec, pod.init, &mut writer.data, pod.console()?, self.options.carry_files);
        look.upper = pod.upper();
        capture::check_all(&mut look, &population).map_err(|e| refused(pod, e))?;
        self.listeners = std::mem::take(&mut look.sockets.listeners);
        drop(look);
        let trees = Trees::look_ahead(pod, writer).map_err(|e| trees_failed(pod, e));
        if !self.was_suspended && !self.options.stop_and_copy {
            self.memory = MemoryAhead::look_ahead(pod.init, &population, &mut writer.data);
        }
        self.clock.lap("look-ahead");
        trees
    }

    /// Everybody stands still when this returns, and no packet reaches or leaves the pod.
    fn hold(&mut self) -> Result<HeldPod, CheckpointError> {
        // The first reader of /proc/locks waits for an RCU grace period (some 10 ms), one soon after it does not: the look
        // in the hold is to be the second.
        let _ = files::holders_of_posix_locks();
        let seized = self.stop().and_then(|()| {
            fault::point("checkpoint-frozen");
            let members = self.pod.cgroup.pids()?;
            hold::seize_all(self.pod.init, &members).map_err(|e| held_failed(self.pod, e))
        });
        // Tracees stay stopped when the group thaws.
        self.pod.cgroup.thaw()?;
        let held = seized.and_then(|seized| seized.wait().map_err(|e| held_failed(self.pod, e)));
        if held.is_err() {
            self.put_back()?;
        }
        self.clock.lap("hold");
        held
    }

    /// Blocks the network and freezes the pod, at a moment at which nobody waits in vfork(2) and no connection waits to be
    /// accepted.
    fn stop(&mut self) -> Result<(), CheckpointError> {
        if self.listeners.have_waiting() {
            self.drain()?;
        }
        loop {
            self.clock.begin_hold();
            if let Some(network) = &self.pod.network {
                self.pod.journal.record(Undo::Unblock)?;
                network.block().map_err(|source| network_failed(self.pod, source))?;
            }
            self.pod.journal.record(Undo::Sockets)?;
            self.pod.journal.record(Undo::Thaw)?;
            self.freeze()?;
            if !self.listeners.have_waiting() {
                return self.admit_newcomers();
            }
            // One came at the last moment.
            self.pod.cgroup.thaw()?;
            self.unblock()?;
            self.clock.end_hold();
            self.drain()?;
        }
    }

    /// Lets the pod accept the connections that wait, and has no new ones come meanwhile.
    fn drain(&mut self) -> Result<(), CheckpointError> {
        if self.was_suspended {
            return self.listeners.refuse().map_err(|e| refused(self.pod, e));
        }
        if let (Some(network), false) = (&self.pod.network, self.newcomers_dropped) {
            self.pod.journal.record(Undo::Newcomers)?;
            self.newcomers_dropped = true;
            network.drop_newcomers().map_err(|source| network_failed(self.pod, source))?;
        }
        self.listeners.drain().map_err(|e| refused(self.pod, e))
    }

    fn admit_newcomers(&mut self) -> Result<(), CheckpointError> {
        if let (Some(network), true) = (&self.pod.network, self.newcomers_dropped) {
            network.admit_newcomers().map_err(|source| network_failed(self.pod, source))?;
            self.pod.journal.done(&Undo::Newcomers)?;
            self.newcomers_dropped = false;
        }
        Ok(())
    }

    /// Freezes the pod at a moment at which nobody waits in vfork(2).
    fn freeze(&self) -> Result<(), CheckpointError> {
        let begun = Instant::now();
        loop {
            self.pod.cgroup.freeze()?;
            let Some(waiting) = vfork::waiting(&self.pod.cgroup.pids()?) else { return Ok(()) };
            self.pod.cgroup.thaw()?;
            waiting.finish(self.pod.init, begun).map_err(|e| refused(self.pod, e))?;
        }
    }

    /// Looks at everything, with the pod held: nothing is written to disk.
    fn look(
        &mut self,
        mut held: HeldPod,
        writer: &mut ImageWriter,
        trees: Trees,
    ) -> Result<(HeldPod, Captured), CheckpointError> {
        match self.capture(&mut held, writer, trees) {
            Ok(captured) => Ok((held, captured)),
            Err(error) => {
                self.let_go(held)?;
                Err(held_failed(self.pod, error))
            }
        }
    }

    fn capture(
        &mut self,
        held: &mut HeldPod,
        writer: &mut ImageWriter,
        mut trees: Trees,
    ) -> Result<Captured, HoldError> {
        let pod = &*self.pod;
        // What is in the console's pipes now is in the image; nobody reads it out meanwhile.
        let _hush = pod.hush_console();
        let console = pod.console().map_err(|e| unexpected("the console", &e))?;
        let mut look = Look::new(&pod.spec, pod.init, &mut writer.data, console, self.options.carry_files);
        look.upper = pod.upper();
        let (answers, descriptors) = look_at_processes(&mut look, held)?;
        self.clock.lap("look");
        let processes = capture_memory(&mut look, held, answers, descriptors, &self.memory)?;
        self.clock.lap("memory");
        files::finish(&mut look)?;
        let ipc = ipc::capture(&mut look, pod.init)?;
        for process in &held.processes {
            ipc::refuse_undo(&ipc, &process.found.subject, pod.init)?;
        }
        let memory = processes.iter().map(|process| &process.memory);
        trees.catch_up(&trees::mapped_for_writing(pod, &look, memory))?;
        let files = look.files.states().cloned().collect();
        let zombies = held.zombies.iter().map(capture::zombie).collect();
        let namespaces = look.namespaces.states()?;
        let captured = Captured { pod: PodRecord::of(pod)?, processes, zombies, files, ipc, namespaces, trees };
        self.clock.lap("files");
        Ok(captured)
    }

    fn let_go(&mut self, held: HeldPod) -> Result<(), CheckpointError> {
        let cleared = held.clear();
        if self.was_suspended || self.options.afterwards == Afterwards::Suspended {
            // Stopped tracees count as frozen, and stay so when they are let go.
            self.pod.cgroup.freeze()?;
        }
        let gone = cleared.and_then(Cleared::let_go);
        self.put_back()?;
        self.clock.lap("let-go");
        gone.map_err(|source| CheckpointError::Tracee { pod: self.pod.spec.name.clone(), source })
    }

    /// Gives the pod away, all of whose image has been sent. Returns for how long it ran nowhere, in microseconds.
    fn give(&mut self, held: HeldPod, give: &mut Give<'_>) -> Result<u64, CheckpointError> {
        // Cleared before it is frozen for good, which is part of giving it up: batches run no more then.
        let cleared = match held.clear() {
            Ok(cleared) => cleared,
            Err(source) => {
                self.put_back()?;
                return Err(self.tracee_failed(source));
            }
        };
        let pod = self.pod.spec.name.clone();
        match give(self.pod) {
            Given::Away => {
                let held_for = self.clock.held();
                self.pod.cgroup.kill()?;
                drop(cleared);
                self.clock.lap("let-go");
                Ok(held_for)
            }
            Given::Kept(why) => {
                let gone = cleared.let_go();
                self.put_back()?;
                gone.map_err(|source| self.tracee_failed(source))?;
                Err(CheckpointError::Kept { pod, why })
            }
            Given::InDoubt(why) => {
                // Stopped tracees count as frozen, and stay so when they are let go. The network stays blocked.
                let gone = cleared.let_go();
                self.pod.journal.done(&Undo::Thaw)?;
                self.pod.journal.done(&Undo::Sockets)?;
                gone.map_err(|source| self.tracee_failed(source))?;
                Err(CheckpointError::InDoubt { pod, why })
            }
        }
    }

    fn tracee_failed(&self, source: TraceeError) -> CheckpointError {
        CheckpointError::Tracee { pod: self.pod.spec.name.clone(), source }
    }

    /// Undoes what the hold did to the pod as a whole.
    fn put_back(&mut self) -> Result<(), CheckpointError> {
        if self.was_suspended {
            self.pod.cgroup.freeze()?;
        }
        self.pod.journal.done(&Undo::Thaw)?;
        self.pod.journal.done(&Undo::Sockets)?;
        self.unblock()?;
        self.admit_newcomers()
    }

    fn unblock(&mut self) -> Result<(), CheckpointError> {
        if let Some(network) = &self.pod.network {
            network.unblock().map_err(|source| network_failed(self.pod, source))?;
            self.pod.journal.done(&Undo::Unblock)?;
        }
        Ok(())
    }

    /// Ends the pod's processes, which are held: none runs again. Their last packets go nowhere.
    fn end(&mut self, held: HeldPod) -> Result<(), CheckpointError> {
        self.pod.cgroup.kill()?;
        drop(held);
        self.clock.lap("let-go");
        Ok(())
    }

    fn write(&mut self, captured: Captured, mut writer: ImageWriter, stats: &mut Stats) -> Result<(), CheckpointError> {
        let pages = captured.processes.iter().map(|process| process.memory.stored_bytes() / memory::PAGE);
        stats.pages = pages.sum();
        writer.record("pod", 1, &captured.pod);
        captured.processes.iter().for_each(|process| writer.record("process", 1, process));
        writer.record("zombies", 1, &captured.zombies);
        writer.record("ipc", 1, &captured.ipc);
        captured.files.iter().for_each(|file| writer.record("file", 1, file));
        captured.namespaces.iter().for_each(|namespace| writer.record("namespace", 1, namespace));
        captured.trees.finish(&mut writer).map_err(|e| trees_failed(self.pod, e))?;
        fault::point("checkpoint-before-rename");
        stats.bytes = writer.finish(&captured.pod.facts())?.bytes;
        self.clock.lap("write");
        Ok(())
    }
}

type Descriptors = Vec<Vec<DescriptorState>>;

/// Descriptors from outside, and a batch in every thread for what only it can tell.
fn look_at_processes(
    look: &mut Look<'_>,
    held: &mut HeldPod,
) -> Result<(Vec<capture::Answers>, Descriptors), HoldError> {
    let proc = PodProc::new(look.init);
    let mut descriptors = Vec::with_capacity(held.processes.len());
    capture::meet_namespaces(look, held.processes.iter().map(|process| &process.found.subject))?;
    for process in &held.processes {
        let subject = &process.found.subject;
        descriptors.push(files::process_descriptors(look, subject, &capture::pidfd(subject)?)?);
    }
    let stopped = stopped_children(held);
    let mut asked = Vec::with_capacity(held.processes.len());
    for (process, descriptors) in held.processes.iter_mut().zip(&descriptors) {
        let children = stopped.get(&process.found.subject.pod).map_or(&[][..], Vec::as_slice);
        asked.push(capture::ask(process, &proc, descriptors, children)?);
    }
    let mut answers = Vec::with_capacity(asked.len());
    let mut buffer = Vec::new();
    for ((process, asked), descriptors) in held.processes.iter_mut().zip(asked).zip(&mut descriptors) {
        answers.push(capture::answers(process, asked, descriptors, &mut buffer)?);
    }
    Ok((answers, descriptors))
}

/// The stopped children of each process.
fn stopped_children(held: &HeldPod) -> HashMap<PodPid, Vec<PodPid>> {
    let mut children: HashMap<PodPid, Vec<PodPid>> = HashMap::new();
    for process in &held.processes {
        if process.threads.first().is_some_and(|leader| leader.group_stop.is_some()) {
            children.entry(process.found.stat.parent).or_default().push(process.found.subject.pod);
        }
    }
    children
}

/// Captures the memory of every process, parents before their children: pages that they share are stored once.
fn capture_memory(
    look: &mut Look<'_>,
    held: &HeldPod,
    answers: Vec<capture::Answers>,
    descriptors: Vec<Vec<DescriptorState>>,
    ahead: &MemoryAhead,
) -> Result<Vec<ProcessState>, HoldError> {
    let news: Vec<PodPid> = answers.iter().flat_map(|answers| answers.news.iter().copied()).collect();
    let parent_of = |i: usize| {
        let parent = held.processes[i].found.stat.parent;
        held.processes.iter().position(|process| process.found.subject.pod == parent)
    };
    let parents: Vec<Option<usize>> = (0..held.processes.len()).map(parent_of).collect();
    let mut captured: Vec<Option<memory::Captured>> = held.processes.iter().map(|_| None).collect();
    for i in in_order(&parents) {
        let process = &held.processes[i];
        let subject = &process.found.subject;
        let survey = memory::survey(subject.host, &[process.ground.scratch()], ahead.of(subject.host))?;
        let request = memory::Request {
            subject,
            brk: answers[i].brk,
            parent: parents[i].and_then(|parent| captured[parent].as_ref()),
        };
        captured[i] = Some(memory::capture(look, &request, survey)?);
    }
    let lockers = files::holders_of_posix_locks()?;
    let mut states = Vec::with_capacity(held.processes.len());
    for (((process, answers), descriptors), memory) in held.processes.iter().zip(answers).zip(descriptors).zip(captured)
    {
        let memory = memory.map(|captured| captured.state).unwrap_or_default();
        let locks = match lockers.contains(&process.found.subject.host) {
            true => files::posix_locks(look, &process.found.subject, &descriptors)?,
            false => Vec::new(),
        };
        states.push(capture::assemble(look, process, answers, descriptors, locks, memory)?);
    }
    for state in &mut states {
        state.stop_is_news = news.contains(&state.place.pid);
    }
    Ok(states)
}

/// Indexes such that parents come before their children.
fn in_order(parents: &[Option<usize>]) -> Vec<usize> {
    let mut children: Vec<Vec<usize>> = vec![Vec::new(); parents.len()];
    let mut order: Vec<usize> = Vec::with_capacity(parents.len());
    for (child, parent) in parents.iter().enumerate() {
        match parent {
            Some(parent) => children[*parent].push(child),
            None => order.push(child),
        }
    }
    let mut next = 0;
    while next < order.len() {
        order.extend_from_slice(&children[order[next]]);
        next += 1;
    }
    order
}

fn network_failed(pod: &LivePod, source: NetworkError) -> PodError {
    PodError::Network { pod: pod.spec.name.clone(), source }
}

fn trees_failed(pod: &LivePod, error: TreesError) -> CheckpointError {
    match error {
        TreesError::Capture(source) => refused(pod, source),
        TreesError::Image(source) => source.into(),
    }
}

fn refused(pod: &LivePod, source: CaptureError) -> CheckpointError {
    CheckpointError::Capture { pod: pod.spec.name.clone(), source }
}

fn held_failed(pod: &LivePod, error: HoldError) -> CheckpointError {
    let pod = pod.spec.name.clone();
    match error {
        HoldError::Capture(source) => CheckpointError::Capture { pod, source },
        HoldError::Tracee(source) => CheckpointError::Tracee { pod, source },
    }
}

fn unexpected(object: &str, error: &PodError) -> CaptureError {
    CaptureError::Unexpected { object: object.to_owned(), what: error.to_string() }
}

/// Laps of a checkpoint or restart.
pub(crate) struct Clock {
    start: Instant,
    last: Instant,
    hold: Option<Instant>,
    /// Holds that ended before anything was looked at, in microseconds.
    cut_short: Vec<u64>,
    phases: Vec<Phase>,
}

impl Clock {
    pub(crate) fn start() -> Clock {
        let now = Instant::now();
        Clock { start: now, last: now, hold: None, cut_short: Vec::new(), phases: Vec::new() }
    }

    fn begin_hold(&mut self) {
        let now = Instant::now();
        (self.last, self.hold) = (now, Some(now));
    }

    /// The pod runs again, nothing having been looked at.
    fn end_hold(&mut self) {
        self.cut_short.push(self.held());
        self.hold = None;
    }

    /// Microseconds since the hold began.
    fn held(&self) -> u64 {
        self.hold.map_or(0, |begin| begin.elapsed().as_micros() as u64)
    }

    /// Ends the phase of that name.
    pub(crate) fn lap(&mut self, name: &str) {
        let now = Instant::now();
        let us = (now - self.last).as_micros() as u64;
        tracing::debug!(phase = name, us);
        self.phases.push(Phase { name: name.to_owned(), us });
        self.last = now;
    }

    pub(crate) fn finish(self) -> (Vec<Phase>, u64) {
        (self.phases, self.start.elapsed().as_micros() as u64)
    }

    fn into_stats(self, mut stats: Stats) -> Stats {
        stats.holds_us.splice(..0, self.cut_short.iter().copied());
        (stats.phases, stats.total_us) = self.finish();
        stats.downtime_us = stats.holds_us.iter().sum();
        stats
    }
}
