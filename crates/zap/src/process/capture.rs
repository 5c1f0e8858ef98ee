//! What a held process is: all of its parts, captured.

use std::fs;
use std::os::fd::OwnedFd;

use crate::error::{CaptureError, Context};
use crate::files::{self, DescriptorState, PosixLock};
use crate::ids::{FileId, HostPid, PodPid};
use crate::look::{Look, Subject};
use crate::memory::{self, MemoryState};
use crate::pod::Seccomp;
use crate::process::discover::{Found, PodProc, Population, Zombie};
use crate::process::hold::{HeldProcess, HoldError};
use crate::process::limits;
use crate::process::sharing;
use crate::process::signals::{self, QueuedSignal};
use crate::process::state::{EndedState, Place, ProcessState, TerminalState};
use crate::process::threads::{self, ThreadState};
use crate::process::timers::{self, TimersState, parse_timers};
use crate::process::{credentials, filters};
use crate::sys::file::open_path;
use crate::sys::pidfd::PidFd;
use crate::sys::ptrace;
use crate::tracee::{Batch, Call, Output};

const P_PID: i32 = 1;
/// Bytes of `siginfo_t`; the first word, the signal's number, is zero if there is no news.
const SIGNAL_INFO: usize = 128;

/// What the batches of one process are asking.
pub struct Asked {
    batches: Vec<Batch>,
    threads: Vec<threads::Asked>,
    actions: Vec<(i32, Output)>,
    timers: timers::Asked,
    brk: Call,
    limits: Vec<Output>,
    dumpable: Call,
    subreaper: Output,
    thp_disable: Call,
    close_on_exec: files::CloseOnExec,
    stops: Vec<(PodPid, Output)>,
}

/// What the batches of one process answered.
pub struct Answers {
    threads: Vec<ThreadState>,
    actions: Vec<signals::ActionState>,
    timers: TimersState,
    /// What `brk(0)` said.
    pub brk: u64,
    limits: Vec<(u64, u64)>,
    dumpable: i32,
    subreaper: bool,
    thp_disable: i32,
    /// Stopped children of whose stop it has yet to be told.
    pub news: Vec<PodPid>,
}

/// Starts the batches of a process: every thread is asked what only it can tell. They run while others are looked at.
/// `stopped` are its children that are stopped.
pub fn ask(
    process: &mut HeldProcess,
    proc: &PodProc,
    descriptors: &[DescriptorState],
    stopped: &[PodPid],
) -> Result<Asked, HoldError> {
    let pod = process.found.subject.pod;
    let last = process.threads.len() - 1;
    let mut batches: Vec<Batch> = process.threads.iter().map(|_| Batch::new()).collect();
    let asked_threads = batches.iter_mut().map(threads::ask).collect();
    let leader = &mut batches[0];
    let posix = fs::read_to_string(proc.path(pod, "timers")).map_or(Vec::new(), |text| parse_timers(&text));
    let actions = signals::ask_actions(leader);
    let timers = timers::ask(posix, leader);
    let brk = leader.attempt(libc::SYS_brk, [0u64.into()]);
    let limits = limits::ask(leader);
    let dumpable = leader.attempt(libc::SYS_prctl, [libc::PR_GET_DUMPABLE.into()]);
    let subreaper = leader.output(8);
    leader.attempt(libc::SYS_prctl, [libc::PR_GET_CHILD_SUBREAPER.into(), subreaper.into()]);
    let thp_disable = leader.attempt(libc::SYS_prctl, [libc::PR_GET_THP_DISABLE.into()]);
    let close_on_exec = files::ask_close_on_exec(leader, descriptors);
    let stops = stopped.iter().map(|child| (*child, ask_stop(leader, *child))).collect();
    for (index, (held, batch)) in process.threads.iter_mut().zip(&batches).enumerate() {
        held.begin(&process.ground, seat(index, last), batch)?;
    }
    Ok(Asked {
        batches,
        threads: asked_threads,
        actions,
        timers,
        brk,
        limits,
        dumpable,
        subreaper,
        thp_disable,
        close_on_exec,
        stops,
    })
}

/// Asks, without taking it, whether there is news of a child's stop.
fn ask_stop(batch: &mut Batch, child: PodPid) -> Output {
    let news = batch.output(SIGNAL_INFO);
    let flags = libc::WSTOPPED | libc::WNOHANG | libc::WNOWAIT;
    batch.attempt(libc::SYS_waitid, [P_PID.into(), child.0.into(), news.into(), flags.into(), 0u64.into()]);
    news
}

/// The leader has the last seat, behind which there is the most room.
fn seat(index: usize, last: usize) -> usize {
    if index == 0 { last } else { index - 1 }
}

/// Gathers the answers, and what can be seen of each thread from outside.
pub fn answers(
    process: &mut HeldProcess,
    asked: Asked,
    descriptors: &mut [DescriptorState],
    buffer: &mut Vec<u8>,
) -> Result<Answers, HoldError> {
    let last = process.threads.len() - 1;
    let host = process.found.subject.host;
    let mut states = Vec::with_capacity(process.threads.len());
    let mut of_leader = None;
    for (index, held) in process.threads.iter_mut().enumerate() {
        let results = held.finish(&process.ground, seat(index, last), &asked.batches[index])?;
        states.push(threads::capture(held, host, &asked.threads[index], &results, buffer)?);
        of_leader.get_or_insert(results);
    }
    let results = of_leader.ok_or(CaptureError::Vanished(process.found.subject.pod))?;
    asked.close_on_exec.fill(&results, descriptors);
    let subreaper = results.output(asked.subreaper)[0] != 0;
    let is_news = |stop: &Output| results.output(*stop)[0] != 0;
    let news = asked.stops.iter().filter(|(_, stop)| is_news(stop)).map(|(child, _)| *child).collect();
    Ok(Answers {
        threads: states,
        actions: signals::actions(&asked.actions, &results),
        timers: timers::capture(asked.timers, &results),
        brk: results.get(asked.brk) as u64,
        limits: limits::capture(&asked.limits, &results),
        dumpable: results.get(asked.dumpable) as i32,
        subreaper,
        thp_disable: results.get(asked.thp_disable).max(0) as i32,
        news,
    })
}

/// Puts the parts of a process together.
pub fn assemble(
    look: &mut Look<'_>,
    process: &HeldProcess,
    answers: Answers,
    descriptors: Vec<DescriptorState>,
    locks: Vec<PosixLock>,
    memory: MemoryState,
) -> Result<ProcessState, CaptureError> {
    let (subject, stat) = (&process.found.subject, &process.found.stat);
    let (cwd, root) = directories(look, subject)?;
    // Asked now, not when the process was found: signals from outside arrived until it stopped.
    let pending = ptrace::pending_signals(subject.host, true).capturing("reading queued signals", subject.object())?;
    let hosts = process.threads.iter().map(|held| held.name.host);
    let inherited = u32::from(!matches!(look.spec.seccomp, Seccomp::Unconfined));
    let mut threads = answers.threads;
    let filters = filters::capture_all(&mut threads, hosts, inherited)?;
    Ok(ProcessState {
        place: place(subject.pod, stat, None),
        terminal: terminal(stat, subject.pod),
        umask: process.found.status.field("Umask").and_then(|m| u32::from_str_radix(m, 8).ok()).unwrap_or(0o22),
        cwd,
        root,
        descriptors,
        locks,
        memory,
        actions: answers.actions,
        timers: answers.timers,
        limits: answers.limits,
        pending: pending.into_iter().map(QueuedSignal::new).collect(),
        stopped: process.threads.first().and_then(|leader| leader.group_stop),
        stop_is_news: false,
        oom_score_adj: number_in(subject, "oom_score_adj", 10),
        coredump_filter: number_in(subject, "coredump_filter", 16),
        personality: number_in(subject, "personality", 16),
        dumpable: answers.dumpable,
        subreaper: answers.subreaper,
        thp_disable: answers.thp_disable,
        filters,
        threads,
        namespaces: look.namespaces.of(subject.host),
    })
}

/// What is left of a process that has ended.
pub fn zombie(zombie: &Zombie) -> EndedState {
    EndedState {
        place: place(zombie.pid, &zombie.stat, Some(zombie.stat.exit_code)),
        command: zombie.stat.command.clone(),
        credentials: credentials::of_status(&zombie.status),
    }
}

fn place(pid: PodPid, stat: &crate::process::proc_files::Stat, ended: Option<i32>) -> Place {
    Place { pid, parent: stat.parent, group: stat.group, session: stat.session, exit_signal: stat.exit_signal, ended }
}

/// A session leader knows its terminal: the device number is `pts` and an index.
fn terminal(stat: &crate::process::proc_files::Stat, pid: PodPid) -> Option<TerminalState> {
    let index = files::controlling_pty(stat.terminal as i32).filter(|_| stat.session == pid)?;
    Some(TerminalState { index, foreground: (stat.foreground > 0).then_some(PodPid(stat.foreground)) })
}

fn directories(look: &mut Look<'_>, subject: &Subject) -> Result<(FileId, Option<FileId>), CaptureError> {
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

fn number_in<T: TryFrom<i64> + Default>(subject: &Subject, name: &str, radix: u32) -> T {
    let text = fs::read_to_string(subject.host.proc(name)).unwrap_or_default();
    let number = i64::from_str_radix(text.trim().trim_start_matches("0x"), radix).unwrap_or(0);
    T::try_from(number).unwrap_or_default()
}

/// A handle on a process for copying its files.
pub fn pidfd(subject: &Subject) -> Result<PidFd, CaptureError> {
    PidFd::open(subject.host).map_err(|_| CaptureError::Vanished(subject.pod))
}

/// Looks at every process while they run.
pub fn check_all(look: &mut Look<'_>, population: &Population) -> Result<(), CaptureError> {
    let living = population.live.iter().filter(|found| found.stat.state != b'Z');
    for found in living {
        refuse_nested(found)?;
        look.namespaces.meet(&found.subject).or_else(unless_gone)?;
    }
    look.namespaces.states().map(drop).or_else(unless_gone)?;
    sharing::check(population)?;
    population.live.iter().try_for_each(|found| check(look, found))
}

/// Looks in which namespaces held processes are, before anything else of them.
pub fn meet_namespaces<'s>(
    look: &mut Look<'_>,
    subjects: impl Iterator<Item = &'s Subject>,
) -> Result<(), CaptureError> {
    for subject in subjects {
        look.namespaces.meet(subject)?;
    }
    for namespace in look.namespaces.networks() {
        look.sockets.elsewhere.push(namespace.try_clone().capturing("copying", "a namespace")?);
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

fn refuse_nested(found: &Found) -> Result<(), CaptureError> {
    if found.namespace_pids.len() > 1 {
        let why = "is nested in the pod's, which cannot be checkpointed yet";
        return Err(found.subject.refuse("its PID namespace", why));
    }
    Ok(())
}

/// Looks at a running process: refuses what cannot be captured, and does ahead what would make the hold long.
fn check(look: &mut Look<'_>, found: &Found) -> Result<(), CaptureError> {
    let subject = &found.subject;
    if found.stat.state == b'Z' {
        // It may have ended altogether since it was found.
        if fs::read_dir(subject.host.proc("task")).map_or(0, Iterator::count) < 2 {
            return Ok(());
        }
        return Err(subject.refuse("its first thread", "has ended while others run, which cannot be checkpointed yet"));
    }
    refuse_traced(found)?;
    look.namespaces.check_threads(subject).or_else(unless_gone)?;
    refuse_without_vdso(found)?;
    let pidfd = match pidfd(subject) {
        Err(CaptureError::Vanished(_)) => return Ok(()),
        other => other?,
    };
    memory::check(look, subject).and_then(|()| files::check_all(look, subject, &pidfd)).or_else(unless_gone)
}

fn unless_gone(error: CaptureError) -> Result<(), CaptureError> {
    if let CaptureError::Vanished(_) = error { Ok(()) } else { Err(error) }
}

/// Batches begin in the vDSO.
fn refuse_without_vdso(found: &Found) -> Result<(), CaptureError> {
    // Nothing at all is mapped in a process that is about to end.
    let maps = fs::read(found.subject.host.proc("maps")).unwrap_or_default();
    if maps.is_empty() || maps.split(|b| *b == b'\n').any(|line| line.ends_with(b"[vdso]")) {
        return Ok(());
    }
    Err(found.subject.refuse("its vDSO", "is not mapped any more, which cannot be checkpointed yet"))
}
