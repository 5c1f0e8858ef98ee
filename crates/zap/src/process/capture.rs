//! What a held process is: all of its parts, captured.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::error::{CaptureError, Context};
use crate::files::{self, DescriptorState, PosixLock};
use crate::ids::{FileId, HostPid, PodPid};
use crate::look::{Look, Subject};
use crate::memory::policy::{self, PolicyState};
use crate::memory::{self, MemoryState};
use crate::namespaces::{Births, Kind, Membership, NamespaceId};
use crate::process::ahead::Layouts;
use crate::process::controls::{self, ProcessControls};
use crate::process::credentials;
use crate::process::discover::{Found, PodProc, Population, Zombie};
use crate::process::filters::{self, FilterState};
use crate::process::hold::{self, HeldPod, HeldProcess, HoldError, Likes, Share, Standing};
use crate::process::limits;
use crate::process::own_directories::{OwnDirectories, Wanderer};
use crate::process::proc_files::{Stat, Status};
use crate::process::segments::{self, SegmentState};
use crate::process::sharing::{self, Groups, Kinship};
use crate::process::signals::{self, QueuedSignal};
use crate::process::state::{EndedState, Inner, Place, ProcessState, TerminalState};
use crate::process::statuses::Statuses;
use crate::process::threads::{self, Learned, ThreadState};
use crate::process::timers::{self, TimersState, parse_timers};
use crate::process::tree::{self, Role, TreeError};
use crate::procfs;
use crate::sys::file::open_path;
use crate::sys::pidfd::PidFd;
use crate::sys::ptrace;
use crate::tracee::{Batch, Call, Ground, Held, Output, Results};

const P_PID: i32 = 1;
/// Bytes of `siginfo_t`; the first word, the signal's number, is zero if there is no news.
const SIGNAL_INFO: usize = 128;

/// What is asked of a process as a whole.
pub struct Questions {
    /// Its descriptors; whether `execve` closes them is to be filled in.
    pub descriptors: Vec<DescriptorState>,
    /// Its children that are stopped, and what it calls them.
    pub stopped: Vec<(PodPid, i32)>,
}

/// What a process answered.
pub struct Answers {
    threads: Vec<ThreadState>,
    pending: Vec<QueuedSignal>,
    filters: Vec<FilterState>,
    actions: Vec<signals::ActionState>,
    timers: TimersState,
    /// What `brk(0)` said.
    pub brk: u64,
    /// The protection keys that it has, as bits.
    pub keys: u16,
    /// The memory policies of its mappings, by their first addresses.
    pub policies: HashMap<u64, PolicyState>,
    limits: Vec<(u64, u64)>,
    dumpable: i32,
    subreaper: bool,
    thp_disable: i32,
    controls: ProcessControls,
    segments: Vec<SegmentState>,
    numbers: Numbers,
    /// Stopped children of whose stop it has yet to be told.
    pub news: Vec<PodPid>,
    /// Its descriptors, complete.
    pub descriptors: Vec<DescriptorState>,
}

impl Answers {
    /// Notes where threads are by themselves.
    pub fn place_threads(&mut self, places: Vec<(PodPid, OwnDirectories)>) {
        for (tid, own) in places {
            if let Some(thread) = self.threads.iter_mut().find(|thread| thread.tid == tid) {
                thread.directories = Some(own);
            }
        }
    }

    /// What a restart, the kernel, or the first instructions of its threads touch.
    pub fn needed_at_once(&self) -> Vec<Range<u64>> {
        threads::needed_at_once(&self.threads)
    }
}

/// What `/proc/PID` has a file for.
struct Numbers {
    oom_score_adj: i32,
    autogroup: i32,
    coredump_filter: u32,
    login: Option<u32>,
    personality: u32,
}

/// Asks every thread but the leaders what only it can tell, unless the kernel does, and looks at it from outside. Says which have
/// directories of their own. A job of a tracer.
pub fn ask_threads(share: &mut Share, statuses: Arc<Statuses>) -> Result<Vec<(PodPid, Vec<Wanderer>)>, HoldError> {
    let mut batch = Batch::new();
    let questions = threads::ask(&mut batch);
    let likes: Vec<Likes> =
        share.held.iter().map(|process| hold::likes_of_leader(&process.found, &process.threads)).collect();
    for (HeldProcess { threads, ground, .. }, likes) in share.held.iter_mut().zip(&likes) {
        Held::begin_all(&mut unlike(threads, likes), ground, 0, &batch)?;
    }
    // Meanwhile they answer.
    let wanderers = share.held.iter_mut().zip(&likes).map(|(HeldProcess { found, threads, .. }, likes)| {
        let others = unlike(threads, likes);
        let others = others.iter().map(|held| (held.name.pod, held.name.host));
        Ok((found.subject.pod, sharing::check_threads(&found.subject, others)?))
    });
    let wanderers: Result<_, CaptureError> = wanderers.collect();
    let mut buffer = Vec::new();
    for (HeldProcess { found, threads, ground, learned, .. }, likes) in share.held.iter_mut().zip(&likes) {
        let results = Held::finish_all(&mut unlike(threads, likes), ground, 0, &batch)?;
        let mut results = results.iter();
        for held in threads.iter().skip(1) {
            if let Some(told) = likes.get(&held.name.host) {
                learned.push(threads::capture_told(held, told, &mut buffer)?);
                continue;
            }
            let vanished = || CaptureError::Vanished(held.name.pod);
            let status = statuses.read(found.subject.host, held.name.host).map_err(|_| vanished())?;
            let results = results.next().ok_or_else(vanished)?;
            let state = threads::capture(held, found.level(), &status, &questions, results, &mut buffer)?;
            learned.push(Learned::Whole(state));
        }
    }
    Ok(wanderers?)
}

/// The threads but for the leader that it does not speak for.
fn unlike<'t>(threads: &'t mut [Held], likes: &Likes) -> Vec<&'t mut Held> {
    threads.iter_mut().skip(1).filter(|held| !likes.contains_key(&held.name.host)).collect()
}

/// Refuses threads with which rings of `io_uring` are registered (`IORING_REGISTER_RING_FDS`): which, the kernel does not say.
/// Where `anybody` may make some, nothing else may lead to one. A job of a tracer.
pub fn refuse_registered_rings(share: &mut Share, anybody: bool) -> Result<Vec<(PodPid, ())>, HoldError> {
    /// `IO_RINGFD_REG_MAX`, and `IORING_ENTER_REGISTERED_RING`.
    const MOST: i32 = 16;
    const REGISTERED: i32 = 1 << 4;
    let mut batch = Batch::new();
    let enter = |number: i32| {
        batch.attempt(libc::SYS_io_uring_enter, [number.into(), 0u64.into(), 0u64.into(), REGISTERED.into()])
    };
    let calls: Vec<Call> = (0..MOST).map(enter).collect();
    let may_have = |process: &HeldProcess| anybody || process.has_rings;
    for HeldProcess { threads, ground, .. } in share.held.iter_mut().filter(|process| may_have(process)) {
        Held::begin_all(&mut threads.iter_mut().collect::<Vec<_>>(), ground, 0, &batch)?;
    }
    let is_there = |results: &Results, call: Call| [0, -i64::from(libc::EBADFD)].contains(&results.get(call));
    let mut refused = None;
    for HeldProcess { found, threads, ground, .. } in share.held.iter_mut().filter(|process| may_have(process)) {
        let results = Held::finish_all(&mut threads.iter_mut().collect::<Vec<_>>(), ground, 0, &batch)?;
        if results.iter().any(|results| calls.iter().any(|call| is_there(results, *call))) {
            refused = Some(found.subject.clone());
        }
    }
    let why = "is registered with one of its threads (IORING_REGISTER_RING_FDS), which cannot be checkpointed yet";
    refused.map_or(Ok(Vec::new()), |subject| Err(subject.refuse("an io_uring", why).into()))
}

/// Reads memory that the kernel shows tracers alone. A job of a tracer.
pub fn read_as_tracer(
    share: &mut Share,
    wanted: Arc<Vec<memory::Piece>>,
) -> Result<Vec<(PodPid, memory::ReadPiece)>, HoldError> {
    let mut read = Vec::new();
    for HeldProcess { found, threads, .. } in &share.held {
        let subject = &found.subject;
        let Some(thread) = threads.first() else { continue };
        let thread = nix::unistd::Pid::from_raw(thread.name.host.0);
        for piece in wanted.iter().filter(|piece| piece.process == subject.host) {
            let bytes = memory::read_traced(subject.host, thread, &piece.pages);
            let bytes = bytes.capturing("reading the memory", format!("process {}", subject.pod))?;
            read.push((subject.pod, (piece.clone(), bytes)));
        }
    }
    Ok(read)
}

/// Has every leader answer for its process; `inherited` is how many seccomp filters are the pod's own. A job of a tracer, to which [`ask_threads`] was given before.
pub fn ask_processes(
    share: &mut Share,
    (proc, inherited, questions): (PodProc, u32, Arc<HashMap<PodPid, Questions>>),
) -> Result<Vec<(PodPid, Answers)>, HoldError> {
    let of = |process: &HeldProcess| {
        let pod = process.found.subject.pod;
        questions.get(&pod).ok_or(CaptureError::Vanished(pod))
    };
    let mut asked = Vec::with_capacity(share.held.len());
    for process in &mut share.held {
        let questions = of(process)?;
        asked.push(ask(process, &proc, questions)?);
    }
    let mut buffer = Vec::new();
    let mut all = Vec::with_capacity(asked.len());
    for (process, asked) in share.held.iter_mut().zip(asked) {
        let questions = of(process)?;
        all.push((process.found.subject.pod, answers(process, asked, questions, inherited, &mut buffer)?));
    }
    Ok(all)
}

/// What the batch of a leader is asking.
struct Asked {
    batch: Batch,
    thread: threads::Asked,
    actions: Vec<(i32, Output)>,
    timers: timers::Asked,
    brk: Call,
    keys: Option<(memory::keys::Asked, Vec<u8>)>,
    policies: policy::Asked,
    limits: Vec<Output>,
    dumpable: Call,
    subreaper: Output,
    thp_disable: Call,
    controls: controls::AskedProcess,
    close_on_exec: files::CloseOnExec,
    stops: Vec<(PodPid, Output)>,
}

/// Starts the batch of a leader. It runs while others are looked at.
fn ask(process: &mut HeldProcess, proc: &PodProc, questions: &Questions) -> Result<Asked, HoldError> {
    let pod = process.found.subject.pod;
    let last = process.threads.len() - 1;
    let leader = process.threads.first_mut().ok_or(CaptureError::Vanished(pod))?;
    let mut batch = Batch::new();
    let thread = threads::ask(&mut batch);
    let posix = procfs::read_text(proc.path(pod, "timers")).map_or(Vec::new(), |text| parse_timers(&text));
    let actions = signals::ask_actions(&mut batch);
    let timers = timers::ask(posix, &mut batch);
    let brk = batch.attempt(libc::SYS_brk, [0u64.into()]);
    let keys = ask_keys(leader, &mut batch)?;
    let policies = policy::ask(&process.asked_about, &mut batch);
    let limits = limits::ask(&mut batch);
    let dumpable = batch.attempt(libc::SYS_prctl, [libc::PR_GET_DUMPABLE.into()]);
    let subreaper = batch.output(8);
    batch.attempt(libc::SYS_prctl, [libc::PR_GET_CHILD_SUBREAPER.into(), subreaper.into()]);
    let thp_disable = batch.attempt(libc::SYS_prctl, [libc::PR_GET_THP_DISABLE.into()]);
    let controls = controls::ask_process(&mut batch);
    let close_on_exec = files::ask_close_on_exec(&mut batch, &questions.descriptors);
    let stops = questions.stopped.iter().map(|(child, own)| (*child, ask_stop(&mut batch, *own))).collect();
    // The leader has the last seat, behind which there is the most room.
    leader.begin(&process.ground, last, &batch)?;
    Ok(Asked {
        batch,
        thread,
        actions,
        timers,
        brk,
        keys,
        policies,
        limits,
        dumpable,
        subreaper,
        thp_disable,
        controls,
        close_on_exec,
        stops,
    })
}

/// Questions about protection keys, where there are any, and the registers that they change.
fn ask_keys(leader: &Held, batch: &mut Batch) -> Result<Option<(memory::keys::Asked, Vec<u8>)>, HoldError> {
    if !memory::keys::are_offered() {
        return Ok(None);
    }
    let mut before = Vec::new();
    ptrace::extended_state(leader.name.host, &mut before)
        .capturing("reading the extended registers of", format!("thread {}", leader.name.pod))?;
    Ok(Some((memory::keys::ask(batch), before)))
}

/// The memory policies at these addresses, of which there are few, if any.
fn policies(
    leader: &mut Held,
    ground: &Ground,
    seat: usize,
    addresses: Vec<u64>,
) -> Result<HashMap<u64, PolicyState>, HoldError> {
    const MANY: usize = 128;
    let mut policies = HashMap::new();
    for some in addresses.chunks(MANY) {
        let mut batch = Batch::new();
        let asked = policy::ask_whole(some, &mut batch);
        policies.extend(asked.answers(&leader.run(ground, seat, &batch)?));
    }
    Ok(policies)
}

/// The segments of a process that has some.
fn read_segments(leader: &mut Held, ground: &Ground, seat: usize) -> Result<Vec<SegmentState>, HoldError> {
    let mut batch = Batch::new();
    let asked = segments::ask(&mut batch);
    Ok(segments::answer(asked, &leader.run(ground, seat, &batch)?))
}

/// Asks, without taking it, whether there is news of a child's stop.
fn ask_stop(batch: &mut Batch, child: i32) -> Output {
    let news = batch.output(SIGNAL_INFO);
    let flags = libc::WSTOPPED | libc::WNOHANG | libc::WNOWAIT;
    batch.attempt(libc::SYS_waitid, [P_PID.into(), child.into(), news.into(), flags.into(), 0u64.into()]);
    news
}

/// Gathers the answers, and what can be seen of the process from outside.
fn answers(
    process: &mut HeldProcess,
    asked: Asked,
    questions: &Questions,
    inherited: u32,
    buffer: &mut Vec<u8>,
) -> Result<Answers, HoldError> {
    let last = process.threads.len() - 1;
    let subject = &process.found.subject;
    let leader = process.threads.first_mut().ok_or(CaptureError::Vanished(subject.pod))?;
    let results = leader.finish(&process.ground, last, &asked.batch)?;
    if let Some((_, before)) = &asked.keys {
        // What the questions about keys have changed.
        ptrace::set_extended_state(leader.name.host, before)
            .capturing("putting back the extended registers of", subject.object())?;
    }
    let policies = policies(leader, &process.ground, last, asked.policies.unusual(&results))?;
    // Read when it was frozen: it has not run since.
    let (level, status) = (process.found.level(), &process.found.status);
    let state = threads::capture(leader, level, status, &asked.thread, &results, buffer)?;
    let timers = timers::capture(asked.timers, &results);
    let notified: HashSet<i32> = timers.notified().collect();
    let mut others: Vec<ThreadState> = process.learned.drain(..).map(|learned| learned.whole(&state)).collect();
    for (held, thread) in process.threads.iter().skip(1).zip(&mut others) {
        if notified.contains(&thread.tid.0) {
            threads::hear_timers(held, thread, &timers)?;
        }
    }
    let mut threads: Vec<ThreadState> = std::iter::once(state).chain(others).collect();
    let hosts = process.threads.iter().map(|held| held.name.host);
    let names: HashMap<i32, i32> = threads.iter().map(|thread| (thread.tid.0, thread.own_tid)).collect();
    let filters = filters::capture_all(&mut threads, hosts, inherited)?;
    let pending = threads::queued_signals(subject.host, true, || subject.clone())?;
    let pending = pending.into_iter().map(QueuedSignal::new);
    let mut descriptors = questions.descriptors.clone();
    asked.close_on_exec.fill(&results, &mut descriptors);
    let mut controls = asked.controls.answers(&results);
    let segments = if asked.controls.has_segments(&results) {
        read_segments(&mut process.threads[0], &process.ground, last)?
    } else {
        Vec::new()
    };
    // Whoever has nothing locked locks nothing.
    let locked = process.found.status.kilobytes("VmLck");
    if locked != 0 {
        controls.lock_future = controls::lock_future(subject.host, locked, &process.ground.scratch());
    }
    let is_news = |stop: &Output| results.output(*stop)[0] != 0;
    Ok(Answers {
        pending: pending.filter(|signal| !timers.will_send(signal)).collect(),
        filters,
        threads,
        actions: signals::actions(&asked.actions, &results),
        brk: results.get(asked.brk) as u64,
        policies,
        keys: asked.keys.as_ref().map_or(0, |(keys, _)| keys.answer(&results)),
        limits: limits::capture(&asked.limits, &results),
        dumpable: results.get(asked.dumpable) as i32,
        subreaper: results.output(asked.subreaper)[0] != 0,
        thp_disable: results.get(asked.thp_disable).max(0) as i32,
        controls,
        segments,
        news: asked.stops.iter().filter(|(_, stop)| is_news(stop)).map(|(child, _)| *child).collect(),
        timers: timers.named(&names),
        numbers: Numbers {
            oom_score_adj: number_in(subject, "oom_score_adj", 10),
            autogroup: if process.found.stat.session == subject.pod { autogroup(subject) } else { 0 },
            coredump_filter: number_in(subject, "coredump_filter", 16),
            login: login_of(subject.host),
            personality: number_in(subject, "personality", 16),
        },
        descriptors,
    })
}

/// Who logged in, as the kernel's audit notes it; `None` where it does not, or nobody did.
pub fn login_of(process: HostPid) -> Option<u32> {
    const NOBODY: u32 = u32::MAX;
    let text = procfs::read_record_text(process.proc("loginuid")).ok()?;
    text.trim().parse().ok().filter(|user| *user != NOBODY)
}

/// The working directory of a process, and its root if that is not the pod's.
pub type Directories = (FileId, Option<FileId>);

/// Puts the parts of a process together.
pub fn assemble(
    process: &Standing,
    answers: Answers,
    (cwd, root): Directories,
    locks: Vec<PosixLock>,
    memory: MemoryState,
    (namespaces, births): (Membership, Births),
    kinship: &Kinship,
) -> ProcessState {
    let Found { subject, stat, .. } = &process.found;
    let pid_namespace = namespaces.of(Kind::Pid);
    let inner = inner_of(&process.found, pid_namespace);
    let personality = answers.numbers.personality;
    let mut threads = answers.threads;
    for thread in &mut threads {
        thread.personality = thread.personality.filter(|own| *own != personality);
    }
    ProcessState {
        place: Place { cloner: kinship.cloner_of(subject.pod), ..place(subject.pod, stat, None, inner) },
        terminal: terminal(stat, subject.pod),
        no_terminal: stat.terminal == 0 && stat.session != subject.pod,
        umask: process.found.status.umask(),
        cwd,
        root,
        descriptors: answers.descriptors,
        locks,
        memory,
        actions: answers.actions,
        timers: answers.timers,
        limits: answers.limits,
        pending: answers.pending,
        stopped: process.group_stop,
        stop_is_news: false,
        oom_score_adj: answers.numbers.oom_score_adj,
        autogroup: answers.numbers.autogroup,
        coredump_filter: answers.numbers.coredump_filter,
        login: answers.numbers.login,
        personality,
        dumpable: answers.dumpable,
        subreaper: answers.subreaper,
        thp_disable: answers.thp_disable,
        controls: answers.controls,
        segments: answers.segments,
        ended_leader: process.found.ended.as_ref().map(|ended| zombie(&ended.zombie, pid_namespace)),
        sharing: kinship.state_of(subject.pod),
        undo: Vec::new(),
        filters: answers.filters,
        threads,
        namespaces,
        births,
    }
}

/// What a live process is called in PID namespaces made inside the pod.
fn inner_of(found: &Found, namespace: Option<NamespaceId>) -> Inner {
    // Its status may be that of a thread which stands for it.
    let pids = found.namespace_pids.iter().skip(1).copied().collect();
    Inner { pids, ..inner(&found.status, namespace, found.level()) }
}

/// What a process is called `level` PID namespaces below the pod's, and above that.
fn inner(status: &Status, namespace: Option<NamespaceId>, level: usize) -> Inner {
    let numbers = |label| status.innermost(label, level);
    Inner { namespace, pids: numbers("NSpid"), groups: numbers("NSpgid"), sessions: numbers("NSsid") }
}

/// Who will fork whom at a restart, of those that live. What cannot be grown again is refused.
pub fn forkers(
    look: &mut Look<'_>,
    held: &HeldPod,
    kinship: &Kinship,
) -> Result<HashMap<PodPid, PodPid>, CaptureError> {
    let place_of = |found: &Found, look: &Look<'_>| {
        let namespace = look.namespaces.of(found.subject.host).of(Kind::Pid);
        let place = place(found.subject.pod, &found.stat, None, inner_of(found, namespace));
        Place { cloner: kinship.cloner_of(place.pid), ..place }
    };
    let mut places: Vec<Place> = held.processes.iter().map(|process| place_of(&process.found, look)).collect();
    places.extend(zombies(look, &held.zombies)?.into_iter().map(|zombie| zombie.place));
    let init_session = PodProc::new(look.init).stat(tree::INIT)?.session;
    let plan = tree::plan(&places, init_session).map_err(|error| {
        let who = if let TreeError::Session(pid, _) = error { Some(pid) } else { None };
        let found = held.processes.iter().find(|process| Some(process.found.subject.pod) == who);
        match found {
            Some(process) => process.found.subject.refuse("it", format!("cannot be checkpointed yet: {error}")),
            None => CaptureError::Unexpected { object: "the process tree".into(), what: error.to_string() },
        }
    })?;
    let live = plan.nodes.values().filter(|node| node.role == Role::Live);
    Ok(live.flat_map(|node| node.before.iter().chain(&node.after).map(|child| (*child, node.pid))).collect())
}

/// What is left of processes that have ended.
pub fn zombies(look: &mut Look<'_>, zombies: &[Zombie]) -> Result<Vec<EndedState>, CaptureError> {
    let proc = PodProc::new(look.init);
    let mut states = Vec::with_capacity(zombies.len());
    for ended in zombies {
        let namespace = if ended.level() == 0 { None } else { look.namespaces.of_zombie(ended, &proc)? };
        states.push(zombie(ended, namespace));
    }
    Ok(states)
}

fn zombie(zombie: &Zombie, namespace: Option<NamespaceId>) -> EndedState {
    let inner = inner(&zombie.status, namespace, zombie.level());
    EndedState {
        place: place(zombie.pid, &zombie.stat, Some(zombie.stat.exit_code), inner),
        command: zombie.stat.command.clone(),
        credentials: credentials::of_status(&zombie.status),
    }
}

fn place(pid: PodPid, stat: &Stat, ended: Option<i32>, inner: Inner) -> Place {
    let Stat { parent, group, session, exit_signal, .. } = *stat;
    Place { pid, parent, group, session, exit_signal, ended, cloner: None, inner }
}

/// A session leader knows its terminal: the device number is `pts` and an index.
fn terminal(stat: &crate::process::proc_files::Stat, pid: PodPid) -> Option<TerminalState> {
    let index = files::controlling_pty(stat.terminal as i32).filter(|_| stat.session == pid)?;
    Some(TerminalState { index, foreground: (stat.foreground > 0).then_some(PodPid(stat.foreground)) })
}

/// The directories of a process that is held.
pub fn directories(look: &mut Look<'_>, subject: &Subject) -> Result<Directories, CaptureError> {
    let open = |name: &str, host: HostPid| -> Result<OwnedFd, CaptureError> {
        open_path(&host.proc(name)).capturing("opening", format!("{name} of process {}", subject.pod))
    };
    let cwd = files::intern_file(look, subject, -1, open("cwd", subject.host)?)?;
    let own_root = fs::read_link(subject.host.proc("root")).unwrap_or_default();
    let pod_root = fs::read_link(look.init.proc("root")).unwrap_or_default();
    if own_root == pod_root {
        return Ok((cwd, None));
    }
    let root = files::intern_file(look, subject, -1, open("root", subject.host)?)?;
    Ok((cwd, Some(root)))
}

/// The niceness of the group that the kernel makes of a session: `/autogroup-12 nice 0`.
fn autogroup(subject: &Subject) -> i32 {
    let text = procfs::read_record_text(subject.host.proc("autogroup")).unwrap_or_default();
    text.rsplit_once("nice ").and_then(|(_, nice)| nice.trim().parse().ok()).unwrap_or(0)
}

fn number_in<T: TryFrom<i64> + Default>(subject: &Subject, name: &str, radix: u32) -> T {
    let text = procfs::read_record_text(subject.host.proc(name)).unwrap_or_default();
    let number = i64::from_str_radix(text.trim().trim_start_matches("0x"), radix).unwrap_or(0);
    T::try_from(number).unwrap_or_default()
}

/// A handle on a process for copying its files.
pub fn pidfd(subject: &Subject) -> Result<PidFd, CaptureError> {
    PidFd::open(subject.host).map_err(|_| CaptureError::Vanished(subject.pod))
}

/// Looks at every process while they run. `groups` are those that share something, `layouts` how their memory looks.
pub fn check_all(
    look: &mut Look<'_>,
    population: &Population,
    groups: &Groups,
    layouts: &Layouts,
) -> Result<(), CaptureError> {
    let living = population.live.iter().filter(|found| found.stat.state != b'Z');
    for found in living {
        look.namespaces.meet(&found.subject).or_else(unless_gone)?;
    }
    look.namespaces.states().map(drop).or_else(unless_gone)?;
    look.look_into_mount_namespaces()?;
    check_births(look, population.live.iter()).or_else(unless_gone)?;
    Kinship::of(look.init, population.live.iter(), groups)?;
    population.live.iter().try_for_each(|found| match layouts.get(&found.subject.host) {
        Some(layout) => check(look, found, &layout.mappings),
        None => Ok(()),
    })
}

/// Looks in which namespaces held processes are, before anything else of them.
pub fn meet_namespaces<'s>(
    look: &mut Look<'_>,
    subjects: impl Iterator<Item = &'s Subject>,
) -> Result<(), CaptureError> {
    for subject in subjects {
        look.namespaces.meet(subject)?;
    }
    look.look_into_mount_namespaces()?;
    for namespace in look.namespaces.networks() {
        look.sockets.elsewhere.push(namespace.try_clone().capturing("copying", "a namespace")?);
    }
    Ok(())
}

/// Refuses processes whose children are born where nobody lives.
pub fn check_births<'f>(look: &Look<'_>, live: impl Iterator<Item = &'f Found> + Clone) -> Result<(), CaptureError> {
    for found in live.clone() {
        let Births::In(namespace) = look.namespaces.births_of(found.subject.host) else { continue };
        let is_in = |other: &Found| look.namespaces.of(other.subject.host).of(Kind::Pid) == Some(namespace);
        if !live.clone().any(|other| other.namespace_pids.last() == Some(&1) && is_in(other)) {
            let why = "are to be born in a PID namespace whose first process has ended";
            return Err(found.subject.refuse("its next children", why));
        }
    }
    Ok(())
}

/// Nobody can be traced twice, and who traces whom is not restarted.
fn refuse_traced(found: &Found) -> Result<(), CaptureError> {
    match found.status.field("TracerPid").and_then(|pid| pid.parse::<i32>().ok()) {
        Some(0) | None => Ok(()),
        Some(_) => Err(found.subject.refuse("it", "is traced by another process (a debugger, strace); end that first")),
    }
}

/// Looks at a running process: refuses what cannot be captured, and does ahead what would make the hold long.
fn check(look: &mut Look<'_>, found: &Found, layout: &[memory::Mapping]) -> Result<(), CaptureError> {
    let subject = &found.subject;
    if found.stat.state == b'Z' {
        return Ok(());
    }
    refuse_traced(found)?;
    look.namespaces.check_threads(subject).or_else(unless_gone)?;
    refuse_without_vdso(found, layout)?;
    refuse_too_many_mappings(found, layout)?;
    let pidfd = match pidfd(subject) {
        Err(CaptureError::Vanished(_)) => return Ok(()),
        other => other?,
    };
    memory::check(look, subject, layout).and_then(|()| files::check_all(look, subject, &pidfd)).or_else(unless_gone)
}

/// A restart puts memory together beside a few mappings of its own, and cuts some in two on the way.
fn refuse_too_many_mappings(found: &Found, layout: &[memory::Mapping]) -> Result<(), CaptureError> {
    const FEW: usize = 30_000;
    const SPARE: usize = 16;
    if layout.len() < FEW {
        return Ok(());
    }
    let most = std::fs::read_to_string("/proc/sys/vm/max_map_count").ok().and_then(|text| text.trim().parse().ok());
    match most.unwrap_or(usize::MAX) {
        most if layout.len() + SPARE <= most => Ok(()),
        most => {
            let what = format!("{} mappings", layout.len());
            let why = format!("are as many as it may have (vm.max_map_count is {most}): a restart needs {SPARE} more");
            Err(found.subject.refuse(what, why))
        }
    }
}

fn unless_gone(error: CaptureError) -> Result<(), CaptureError> {
    if let CaptureError::Vanished(_) = error { Ok(()) } else { Err(error) }
}

/// Batches begin in the vDSO. Refused ahead only where it is certain: a process that is about to execute a program has
/// none either, and neither has one that is about to end (which has nothing at all). The hold sees to the rest.
fn refuse_without_vdso(found: &Found, layout: &[memory::Mapping]) -> Result<(), CaptureError> {
    let has_one = |layout: &[memory::Mapping]| layout.is_empty() || layout.iter().any(|m| m.path == b"[vdso]");
    if has_one(layout) {
        return Ok(());
    }
    let host = found.subject.host;
    let call = fs::read_to_string(host.proc("syscall")).unwrap_or_default();
    let call: Option<i64> = call.split(' ').next().and_then(|number| number.parse().ok());
    // Looked at again after it was found to wait in some other call.
    let waits = call.is_some_and(|call| ![libc::SYS_execve, libc::SYS_execveat].contains(&call));
    if !waits || memory::mappings(host).map_or(true, |layout| has_one(&layout)) {
        return Ok(());
    }
    Err(without_vdso(&found.subject))
}

/// The refusal of a process in which no batch can begin.
pub(super) fn without_vdso(subject: &Subject) -> CaptureError {
    subject.refuse("its vDSO", "is not mapped any more, which cannot be checkpointed yet")
}
