//! Threads: registers, names, signal masks, what the kernel keeps for each.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::error::{CaptureError, Context};
use crate::ids::{HostPid, PodPid};
use crate::kernel::threads::Told;
use crate::look::Subject;
use crate::process::controls::{self, ThreadControls};
use crate::process::credentials::{self, CredentialsState};
use crate::process::filters::{self, FilterState};
use crate::process::own_directories::OwnDirectories;
use crate::process::proc_files::Status;
use crate::process::signals::{self, AlternateStack, QueuedSignal};
use crate::process::timers::TimersState;
use crate::sys::memory;
use crate::sys::ptrace::{self, DispatchConfiguration, RseqConfiguration};
use crate::sys::sched::{self, SchedulingAttributes};
use crate::tracee::{Batch, Call, Held, Output, Results, TraceeError, interrupted};

/// Everything that belongs to one thread.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ThreadState {
    /// TID in the pod.
    pub tid: PodPid,
    /// TID in its innermost PID namespace.
    pub own_tid: i32,
    /// TIDs in all PID namespaces made inside the pod in which it is, the outermost first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub inner: Vec<i32>,
    /// `comm`, raw.
    #[serde(with = "serde_bytes")]
    pub command: Vec<u8>,
    /// General registers, 27 words as the kernel orders them.
    pub registers: [u64; 27],
    /// Extended state (XSAVE, uncompacted) without trailing zeros.
    #[serde(with = "serde_bytes")]
    pub extended: Vec<u8>,
    /// Blocked signals.
    pub mask: u64,
    /// Signals queued to the thread.
    pub pending: Vec<QueuedSignal>,
    /// The alternate signal stack.
    pub alternate_stack: AlternateStack,
    /// `set_tid_address`.
    pub clear_tid: u64,
    /// Robust futex list: head and length.
    pub robust_list: (u64, u64),
    /// Restartable sequences.
    pub rseq: RseqConfiguration,
    /// How it sees to some of its own system calls.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dispatch: Option<DispatchConfiguration>,
    /// Parent-death signal.
    pub death_signal: i32,
    /// Timer slack in ns.
    pub timer_slack: u64,
    /// Credentials.
    pub credentials: CredentialsState,
    /// `personality`, where it is not that of the process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub personality: Option<u32>,
    /// Where it is, if that is not where its process is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub directories: Option<OwnDirectories>,
    /// Scheduling policy, nice value, priority.
    pub scheduling: SchedulingAttributes,
    /// Switches that it has set.
    #[serde(default)]
    pub controls: ThreadControls,
    /// CPU affinity.
    pub affinity: Vec<u64>,
    /// I/O priority.
    pub io_priority: i32,
    /// How many seccomp filters apply.
    pub filters: u32,
    /// Which, oldest first, where they are not those of the process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub own_filters: Option<Vec<FilterState>>,
    /// Whether it may only read, write and end (`SECCOMP_MODE_STRICT`).
    #[serde(default)]
    pub strict: bool,
}

/// What a restart, the kernel, or the first instructions of these threads touch.
pub fn needed_at_once(threads: &[ThreadState]) -> Vec<Range<u64>> {
    const RSP: usize = 19;
    const FS_BASE: usize = 21;
    /// What a thread is likely to use of its stack, and below it.
    const STACK: Range<u64> = 0..32 << 10;
    const RED_ZONE: u64 = 4096;
    let near = |address: u64, length: u64| address..address.saturating_add(length.max(1));
    let of_thread = |thread: &ThreadState| {
        let stack = thread.registers[RSP];
        [
            stack.saturating_sub(RED_ZONE)..stack.saturating_add(STACK.end),
            near(thread.registers[FS_BASE].saturating_sub(4096), 8192),
            near(thread.rseq.address, 4096),
            near(thread.clear_tid, 8),
            near(thread.robust_list.0, thread.robust_list.1),
        ]
    };
    threads.iter().flat_map(of_thread).filter(|range| range.start != 0).collect()
}

/// What only the thread can tell.
pub struct Asked {
    stack: Output,
    clear_tid: Output,
    death_signal: Output,
    timer_slack: Call,
    personality: Call,
    securebits: Call,
    name: Output,
    controls: controls::AskedThread,
}

const PR_GET_TID_ADDRESS: i32 = 40;
/// What personality(2) is called with to change nothing.
const ASK: u32 = u32::MAX;
const SECCOMP_MODE_STRICT: i32 = 1;
/// Bytes of what a list of robust futexes begins with.
const ROBUST_LIST: u64 = 24;

/// Adds the questions that only the thread can answer.
pub fn ask(batch: &mut Batch) -> Asked {
    let stack = signals::ask_alternate_stack(batch);
    let clear_tid = batch.output(8);
    batch.attempt(libc::SYS_prctl, [PR_GET_TID_ADDRESS.into(), clear_tid.into()]);
    let death_signal = batch.output(8);
    batch.attempt(libc::SYS_prctl, [libc::PR_GET_PDEATHSIG.into(), death_signal.into()]);
    let timer_slack = batch.attempt(libc::SYS_prctl, [libc::PR_GET_TIMERSLACK.into()]);
    let personality = batch.attempt(libc::SYS_personality, [ASK.into()]);
    let name = batch.output(16);
    batch.attempt(libc::SYS_prctl, [libc::PR_GET_NAME.into(), name.into()]);
    let controls = controls::ask_thread(batch);
    let securebits = credentials::ask(batch);
    Asked { stack, clear_tid, death_signal, timer_slack, personality, securebits, name, controls }
}

/// The signals that wait for a thread, or for its process (`shared`): as they are now, not when its status was read, since
/// signals from outside arrived until it stopped.
pub(super) fn queued_signals(
    host: HostPid,
    shared: bool,
    subject: impl Fn() -> Subject,
) -> Result<Vec<ptrace::SigInfo>, CaptureError> {
    match ptrace::pending_signals(host, shared) {
        Ok(pending) => Ok(pending),
        Err(e) if e.raw_os_error() == Some(libc::E2BIG) => {
            let what = format!("more than {} signals that wait", ptrace::MOST_PENDING);
            Err(subject().refuse(what, "take the kernel too long to show; try again when it has taken some"))
        }
        failed => failed.capturing("reading queued signals", subject().object()),
    }
}

/// What the tracer sees from outside of a thread of `process`, which is that many PID namespaces below the pod's; the extended state buffer is lent to save an allocation a thread.
pub fn capture(
    held: &Held,
    level: usize,
    status: &Status,
    asked: &Asked,
    results: &Results,
    buffer: &mut Vec<u8>,
) -> Result<ThreadState, CaptureError> {
    let (tid, pod) = (held.name.host, held.name.pod);
    let seen = Seen::of(held, buffer)?;
    let word = |out: Output| results.output(out).first_chunk().map_or(0, |word| u64::from_ne_bytes(*word));
    let command = until_zero(results.output(asked.name));
    Ok(ThreadState {
        tid: pod,
        own_tid: held.name.own.1,
        inner: status.innermost("NSpid", level),
        pending: pending(held, command)?,
        command: command.to_vec(),
        registers: seen.registers,
        extended: seen.extended,
        mask: held.mask,
        alternate_stack: signals::alternate_stack(asked.stack, results),
        clear_tid: word(asked.clear_tid),
        robust_list: sched::robust_list(tid).unwrap_or((0, ROBUST_LIST)),
        rseq: seen.rseq,
        dispatch: ptrace::dispatch(tid).unwrap_or_default(),
        death_signal: word(asked.death_signal) as i32,
        timer_slack: results.get(asked.timer_slack).max(0) as u64,
        credentials: credentials::capture(status, results, asked.securebits),
        personality: u32::try_from(results.get(asked.personality)).ok(),
        directories: None,
        scheduling: seen.scheduling,
        controls: asked.controls.answers(results),
        affinity: seen.affinity,
        io_priority: seen.io_priority,
        filters: status.field("Seccomp_filters").and_then(|n| n.parse().ok()).unwrap_or(0),
        own_filters: None,
        strict: status.field("Seccomp") == Some("1"),
    })
}

/// What was learned of a thread other than the first.
pub enum Learned {
    /// All that there is to know.
    Whole(ThreadState),
    /// What is its own; all else is as with the first thread of its process.
    Own(ThreadState),
}

impl Learned {
    /// All of it. `first` is the first thread of the process.
    pub fn whole(self, first: &ThreadState) -> ThreadState {
        match self {
            Learned::Whole(state) => state,
            Learned::Own(own) => ThreadState {
                dispatch: first.dispatch,
                credentials: first.credentials.clone(),
                personality: first.personality,
                controls: first.controls.clone(),
                filters: first.filters,
                strict: first.strict,
                ..own
            },
        }
    }
}

/// What is a thread's own, where the kernel has told of it and it [is like](Told::is_like) the first thread of its process, which
/// is in no PID namespace made inside the pod.
pub(crate) fn capture_told(held: &Held, told: &Told, buffer: &mut Vec<u8>) -> Result<Learned, CaptureError> {
    let command = until_zero(&told.name);
    let seen = Seen::of(held, buffer)?;
    Ok(Learned::Own(ThreadState {
        tid: held.name.pod,
        own_tid: held.name.own.1,
        inner: Vec::new(),
        command: command.to_vec(),
        registers: seen.registers,
        extended: seen.extended,
        mask: held.mask,
        pending: if told.has_signals { pending(held, command)? } else { Vec::new() },
        alternate_stack: told.alternate_stack,
        clear_tid: told.clear_tid,
        robust_list: (told.robust_list, ROBUST_LIST),
        rseq: seen.rseq,
        dispatch: None,
        death_signal: told.death_signal,
        timer_slack: told.timer_slack,
        credentials: CredentialsState::default(),
        personality: None,
        directories: None,
        scheduling: seen.scheduling,
        controls: ThreadControls::default(),
        affinity: seen.affinity,
        io_priority: seen.io_priority,
        filters: 0,
        own_filters: None,
        strict: false,
    }))
}

/// What is seen of a thread from outside, whoever tells of the rest.
struct Seen {
    registers: [u64; 27],
    extended: Vec<u8>,
    rseq: RseqConfiguration,
    scheduling: SchedulingAttributes,
    affinity: Vec<u64>,
    io_priority: i32,
}

impl Seen {
    fn of(held: &Held, buffer: &mut Vec<u8>) -> Result<Seen, CaptureError> {
        let tid = held.name.host;
        let object = || format!("thread {}", held.name.pod);
        ptrace::extended_state(tid, buffer).capturing("reading the extended registers", object())?;
        Ok(Seen {
            registers: ptrace::registers_to_words(&interrupted::named(&held.registers, &|at, into| {
                let place = at..at.saturating_add(into.len() as u64);
                memory::read(tid, std::slice::from_ref(&place), into).is_ok_and(|read| read == into.len())
            })),
            extended: trimmed(buffer).to_vec(),
            rseq: ptrace::rseq_configuration(tid).unwrap_or_default(),
            scheduling: sched::scheduling(tid).capturing("reading the scheduling policy", object())?,
            affinity: sched::affinity(tid).capturing("reading the affinity", object())?,
            io_priority: sched::io_priority(tid).unwrap_or(0),
        })
    }
}

/// Adds what timers have sent to a thread since it was captured: they go on while it is held. What a timer of `timers` has
/// sent that had not expired when they were captured, it sends again after a restart.
pub fn hear_timers(held: &Held, state: &mut ThreadState, timers: &TimersState) -> Result<(), CaptureError> {
    let since = pending(held, &state.command)?.into_iter().skip(state.pending.len());
    state.pending.extend(since.filter(|signal| !timers.will_send(signal)));
    Ok(())
}

/// The signals that wait for a thread that is called so.
fn pending(held: &Held, command: &[u8]) -> Result<Vec<QueuedSignal>, CaptureError> {
    let (host, pod) = (held.name.host, held.name.pod);
    let subject = || Subject { host, pod, command: String::from_utf8_lossy(command).into_owned() };
    Ok(queued_signals(host, false, subject)?.into_iter().map(QueuedSignal::new).collect())
}

fn until_zero(name: &[u8]) -> &[u8] {
    name.split(|byte| *byte == 0).next().unwrap_or_default()
}

fn trimmed(bytes: &[u8]) -> &[u8] {
    let used = bytes.iter().rposition(|b| *b != 0).map_or(0, |last| last + 1);
    &bytes[..used]
}

/// Gives the thread its name.
pub fn set_name(command: &[u8], batch: &mut Batch) {
    let name = batch.bytes(&[&command[..command.len().min(15)], &[0]].concat());
    batch.call(libc::SYS_prctl, [libc::PR_SET_NAME.into(), name], "setting the name");
}

/// Who a thread becomes.
pub enum Identity {
    /// The user whom its state names.
    Own,
    /// The user that its process is already.
    OfProcess,
    /// This user.
    Named(CredentialsState),
}

/// Gives a thread what it keeps in the kernel; `filters` are those that it has beyond its process's. The last batch of a thread: nothing privileged works afterwards.
pub fn restart(state: &ThreadState, identity: &Identity, filters: &[FilterState], batch: &mut Batch) {
    batch.call(libc::SYS_set_tid_address, [state.clear_tid.into()], "setting the tid address");
    let (head, length) = state.robust_list;
    batch.attempt(libc::SYS_set_robust_list, [head.into(), length.into()]);
    if state.rseq.address != 0 {
        let rseq = state.rseq;
        let args = [rseq.address.into(), u64::from(rseq.size).into(), 0u64.into(), u64::from(rseq.signature).into()];
        batch.call(libc::SYS_rseq, args, "registering restartable sequences");
    }
    signals::restart_alternate_stack(&state.alternate_stack, batch);
    set_name(&state.command, batch);
    batch.call(libc::SYS_prctl, [libc::PR_SET_TIMERSLACK.into(), state.timer_slack.into()], "setting timer slack");
    controls::restart_thread(&state.controls, batch);
    if let Some(personality) = state.personality {
        batch.call(libc::SYS_personality, [personality.into()], "setting the personality");
    }
    match identity {
        Identity::Own => credentials::identify(&state.credentials, batch),
        Identity::OfProcess => {}
        Identity::Named(named) => credentials::identify(named, batch),
    }
    filters::restart(filters, 0, batch);
    credentials::empower(&state.credentials, batch);
    // Credentials reset it.
    batch.call(libc::SYS_prctl, [libc::PR_SET_PDEATHSIG.into(), state.death_signal.into()], "setting the death signal");
    if state.strict {
        batch.call(libc::SYS_prctl, [libc::PR_SET_SECCOMP.into(), SECCOMP_MODE_STRICT.into()], "restricting its calls");
    }
}

/// What is set from outside, once the thread exists. What this host cannot do (fewer CPUs) is left as it is.
pub fn restart_from_outside(state: &ThreadState, tid: HostPid) -> Result<(), TraceeError> {
    let plain = state.scheduling.policy == 0 && state.scheduling.nice == 0;
    if !plain {
        let failed = TraceeError::kernel("setting the scheduling policy of", state.tid);
        sched::set_scheduling(tid, &state.scheduling).map_err(failed)?;
    }
    if sched::affinity(tid).is_ok_and(|now| now != state.affinity) {
        let _ = sched::set_affinity(tid, &state.affinity);
    }
    if state.io_priority != 0 {
        sched::set_io_priority(tid, state.io_priority)
            .map_err(TraceeError::kernel("setting the I/O priority of", state.tid))?;
    }
    Ok(())
}

/// Has a thread see to its own system calls again: it makes no more of ours.
pub fn restart_dispatch(state: &ThreadState, held: &Held) -> Result<(), TraceeError> {
    let Some(dispatch) = &state.dispatch else { return Ok(()) };
    let failed = TraceeError::kernel("having its system calls come back to", state.tid);
    ptrace::set_dispatch(held.name.host, dispatch).map_err(failed)
}

/// Sets the extended registers and says with which registers and mask the thread goes home.
pub fn restart_registers(state: &ThreadState, held: &mut Held, buffer: &mut Vec<u8>) -> Result<(), TraceeError> {
    let failed = |step| TraceeError::kernel(step, state.tid);
    let size = ptrace::extended_size(held.name.host).map_err(failed("reading the extended registers of"))?;
    buffer.clear();
    // Of an image that does not say what the processor was, whatever there is no room for must be zeros.
    buffer.extend_from_slice(&state.extended[..state.extended.len().min(size)]);
    buffer.resize(size, 0);
    ptrace::set_extended_state(held.name.host, buffer).map_err(failed("setting the extended registers of"))?;
    let registers = interrupted::restarted(&ptrace::registers_from_words(&state.registers));
    held.set_home(registers, state.mask);
    Ok(())
}
