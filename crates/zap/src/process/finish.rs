//! The last steps of a restarted process: what is set once its children exist.

use std::fs;

use crate::error::RebuildError;
use crate::ids::HostPid;
use crate::ipc::undo;
use crate::namespaces::Kind;
use crate::namespaces::enter::Names;
use crate::process::grow::{GrowError, Grown};
use crate::process::state::{EndedState, ProcessState};
use crate::process::threads::{Identity, ThreadState};
use crate::process::{controls, credentials, own_directories, segments, signals, threads, timers};
use crate::tracee::{Arg, Batch, Ground, Held, TraceeError};

/// Attributes of the process that it sets itself while it is still root.
pub fn attributes(state: &ProcessState, batch: &mut Batch) {
    batch.call(libc::SYS_umask, [state.umask.into()], "setting the umask");
    batch.call(libc::SYS_personality, [state.personality.into()], "setting the personality");
    let subreaper = i32::from(state.subreaper);
    batch.call(libc::SYS_prctl, [libc::PR_SET_CHILD_SUBREAPER.into(), subreaper.into()], "setting the subreaper flag");
    // Bit 0 says whether; the others are flags (PR_THP_DISABLE_EXCEPT_ADVISED, since Linux 6.18).
    let (off, flags) = (state.thp_disable & 1, state.thp_disable & !1);
    let thp = [libc::PR_SET_THP_DISABLE.into(), off.into(), flags.into(), 0u64.into(), 0u64.into()];
    batch.call(libc::SYS_prctl, thp, "setting the huge page policy");
    undo::restart(&state.undo, batch);
    controls::restart_process(&state.controls, !state.sharing.memory, batch);
    if !state.threads.is_empty() {
        credentials::restrict(state.bounding(), batch);
    }
}

/// What is seen of a process after its end; `identify` makes it who it was.
pub fn remains(state: &EndedState, batch: &mut Batch, identify: impl FnOnce(&mut Batch)) {
    threads::set_name(&state.command, batch);
    credentials::restrict(state.credentials.bounding(), batch);
    identify(batch);
    credentials::empower(&state.credentials, batch);
}

/// Attributes that are set from outside.
pub fn from_outside(state: &ProcessState, host: HostPid) -> Result<(), TraceeError> {
    let pid = state.place.pid;
    let write = |name: &'static str, text: String| {
        fs::write(host.proc(name), text).map_err(TraceeError::kernel("writing to /proc of", pid))
    };
    write("oom_score_adj", state.oom_score_adj.to_string())?;
    if state.autogroup != 0 {
        write("autogroup", state.autogroup.to_string())?;
    }
    write("coredump_filter", format!("{:#x}", state.coredump_filter))
}

/// Notes who logged in, which a process may do for itself, and once only unless it may do more.
pub fn log_in(state: &ProcessState, batch: &mut Batch) {
    let Some(login) = state.login else { return };
    let path = batch.bytes(b"/proc/self/loginuid\0");
    let opened = batch.attempt(libc::SYS_openat, [libc::AT_FDCWD.into(), path, libc::O_WRONLY.into()]);
    let text = login.to_string();
    let bytes = batch.bytes(text.as_bytes());
    batch.attempt(libc::SYS_write, [Arg::ResultOf(opened), bytes, text.len().into()]);
    batch.attempt(libc::SYS_close, [Arg::ResultOf(opened)]);
}

/// Every thread: what the kernel keeps for it, then its registers (which it goes home with).
pub fn threads(
    state: &ProcessState,
    grown: &mut Grown,
    names: Names<'_>,
    buffer: &mut Vec<u8>,
) -> Result<(), GrowError> {
    let Grown { threads: all, ground } = grown;
    let mut waiting: Vec<(&ThreadState, &mut Held, usize, Batch)> = Vec::new();
    let mut next = 0;
    let inherited = state.bounding();
    let mut steps = own_directories::steps(state).into_iter();
    for (place, (thread, held)) in state.threads.iter().zip(all).enumerate() {
        let mut batch = Batch::new();
        if let Some(own) = &thread.directories {
            own_directories::restart(own, &mut steps, &mut batch);
        }
        if thread.credentials.bounding() != inherited {
            credentials::restrict(thread.credentials.bounding(), &mut batch);
        }
        threads::restart(thread, &identity(state, thread, names)?, state.filters_of(thread), &mut batch);
        // What the first has pending comes last.
        if place > 0 {
            signals::requeue(&thread.pending, held.name.own, false, &mut batch);
        }
        let seats = ground.seats_of(&batch);
        if next + seats > ground.seats() {
            finish_threads(&mut waiting, ground, buffer)?;
            next = 0;
        }
        held.begin(ground, next, &batch)?;
        threads::restart_from_outside(thread, held.name.host)?;
        waiting.push((thread, held, next, batch));
        next += seats;
    }
    finish_threads(&mut waiting, ground, buffer)
}

/// Waits for threads that were begun.
fn finish_threads(
    waiting: &mut Vec<(&ThreadState, &mut Held, usize, Batch)>,
    ground: &Ground,
    buffer: &mut Vec<u8>,
) -> Result<(), GrowError> {
    for (thread, held, seat, batch) in waiting.drain(..) {
        held.finish(ground, seat, &batch)?;
        threads::restart_registers(thread, held, buffer)?;
    }
    Ok(())
}

/// In a user namespace, a thread became the user of its process with it; another user has another name there.
fn identity(state: &ProcessState, thread: &ThreadState, names: Names<'_>) -> Result<Identity, RebuildError> {
    let Some(namespace) = state.namespaces.of(Kind::User) else { return Ok(Identity::Own) };
    let is_same = |leader: &ThreadState| leader.credentials.is_same_user(&thread.credentials);
    if state.threads.first().is_some_and(is_same) {
        return Ok(Identity::OfProcess);
    }
    let named = names.inside(namespace, &thread.credentials).map(Identity::Named);
    named.ok_or_else(|| RebuildError::Lacks(format!("a name of thread {}'s user in its user namespace", thread.tid)))
}

/// Waits until a child that is to be stopped is, of a process that many PID namespaces below the pod's, and takes the news of it if it was taken before.
fn await_stop(child: &ProcessState, level: usize, batch: &mut Batch) {
    const P_PID: i32 = 1;
    if child.stopped.is_some() {
        let flags = libc::WSTOPPED | if child.stop_is_news { libc::WNOWAIT } else { 0 };
        let args = [P_PID.into(), child.place.seen_from(level).into(), 0u64.into(), flags.into(), 0u64.into()];
        batch.call(libc::SYS_waitid, args, format!("waiting for the stop of process {}", child.place.pid));
    }
}

/// The last batches of a process, in its leader, which calls itself `own`: what the restart itself caused goes, what was
/// pending comes, timers run.
pub fn last_batches<'a>(
    state: &ProcessState,
    children: impl Iterator<Item = &'a ProcessState>,
    own: (i32, i32),
) -> Vec<Batch> {
    /// Signals, or segments, that one batch has at most.
    const MANY: usize = 1000;
    let mut first = Batch::new();
    children.for_each(|child| await_stop(child, state.place.level(), &mut first));
    signals::drain(&mut first);
    let mut batches = vec![first];
    let leader = state.threads.first().map_or(&[][..], |thread| &thread.pending);
    for (pending, of_process) in [(leader, false), (&state.pending[..], true)] {
        batches.extend(pending.chunks(MANY).map(|some| {
            let mut batch = Batch::new();
            signals::requeue(some, own, of_process, &mut batch);
            batch
        }));
    }
    let mut batch = Batch::new();
    let dumpable = i32::from(state.dumpable == 1);
    batch.call(libc::SYS_prctl, [libc::PR_SET_DUMPABLE.into(), dumpable.into()], "setting the dumpable flag");
    controls::restrict_process(&state.controls, &mut batch);
    batches.push(batch);
    // Its children exist, who would have copies.
    batches.extend(state.segments.chunks(MANY).map(segments::restarted));
    batches.extend(timers::arm(&state.timers));
    if let Some(signal) = state.stopped {
        let mut stop = Batch::new();
        stop.call(libc::SYS_kill, [own.0.into(), signal.into()], "stopping it again");
        batches.push(stop);
    }
    batches
}
