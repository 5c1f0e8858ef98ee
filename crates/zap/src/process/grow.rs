//! Growing a process tree again, out of seeds, by batches alone.
//!
//! A process is given its memory, then forks its children, so that pages which both still share are shared again.
//! Children are attached by the kernel (`CLONE_PTRACE`) and stop before their first instruction.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::error::RebuildError;
use crate::files::{self, LateFiles};
use crate::ids::{FileId, HostPid, PodPid};
use crate::namespaces::NamespaceId;
use crate::namespaces::enter::{self, Names};
use crate::process::proc_files::Status;
use crate::process::state::{EndedState, ProcessState};
use crate::process::tree::{Plan, Role};
use crate::process::{filters, limits};
use crate::sys::ptrace::{self, Stop};
use crate::tracee::{Batch, Ground, Held, Seized, ThreadName, TraceeError, seize};

/// What every process of a restart has in common.
#[derive(Clone, Debug)]
pub struct Common {
    /// Where the stub lies in every seed: one page.
    pub code: Range<u64>,
    /// Where batches go in every seed.
    pub scratch: Range<u64>,
    /// The first descriptor of the pool.
    pub pool: i32,
    /// The descriptor of the image's data, behind which come those of the namespaces.
    pub data: i32,
    /// The last descriptor of the pool.
    pub last: i32,
    /// How many PID namespaces lie around the pod's.
    pub depth: usize,
    /// How many seccomp filters all processes have in common.
    pub filters: usize,
}

/// The signal that ends batches in a restart: the seeds handle none.
pub const MARKER: i32 = libc::SIGURG;

impl Common {
    /// The number of a file in the pool.
    pub fn number(&self, file: FileId) -> i32 {
        self.pool + file.0 as i32
    }

    /// The number of a namespace in the pool.
    fn namespace(&self, namespace: NamespaceId) -> i32 {
        self.data + 1 + namespace.0 as i32
    }
}

/// What a growing tree needs of others.
pub struct Surroundings<'a> {
    /// Files that are opened when every process exists.
    pub late: LateFiles,
    /// What users are called in user namespaces.
    pub names: Names<'a>,
    /// Sees to it that the next process of the pod gets a number.
    pub number: &'a dyn Fn(PodPid) -> Result<(), RebuildError>,
}

/// Why a tree could not be grown.
#[derive(Debug, thiserror::Error)]
pub enum GrowError {
    /// Something of the image could not be made.
    #[error(transparent)]
    Rebuild(#[from] RebuildError),
    /// A process could not be made or used.
    #[error(transparent)]
    Tracee(#[from] TraceeError),
}

/// A process that has been made.
pub struct Grown {
    /// Its threads, the leader first.
    pub threads: Vec<Held>,
    /// Where batches run in it.
    pub ground: Ground,
}

/// A tree that is growing. Belongs to the thread that made it.
pub struct Grove<'a> {
    /// What all have in common.
    pub common: Common,
    pub(super) plan: &'a Plan,
    pub(super) states: BTreeMap<PodPid, &'a ProcessState>,
    ended: BTreeMap<PodPid, &'a EndedState>,
    pub(super) around: Surroundings<'a>,
    /// The processes made so far and held.
    pub(super) grown: BTreeMap<PodPid, Grown>,
    /// The processes that are stopped again: nobody holds them.
    stopped: BTreeMap<PodPid, HostPid>,
}

/// Bytes of a seat: a batch takes as many as it needs.
pub(super) const SEAT: usize = 256;
const PATIENTLY: u64 = 0x4000_0000; // __WALL

impl<'a> Grove<'a> {
    /// A grove in which nothing has grown.
    pub fn new(
        common: Common,
        plan: &'a Plan,
        states: &'a [ProcessState],
        ended: &'a [EndedState],
        around: Surroundings<'a>,
    ) -> Grove<'a> {
        let states = states.iter().map(|state| (state.place.pid, state)).collect();
        let ended = ended.iter().map(|ended| (ended.place.pid, ended)).collect();
        Grove { common, plan, states, ended, around, grown: BTreeMap::new(), stopped: BTreeMap::new() }
    }

    /// Holds a seed that the builder cloned.
    pub fn adopt(&mut self, pid: PodPid, host: HostPid) -> Result<(), GrowError> {
        let name = ThreadName { host, pod: pid, own: (pid.0, pid.0) };
        // Half a process must not run: it dies with its tracer, until the whole pod is ready.
        let options = ptrace::EXIT_KILL | ptrace::TELL_CALLS;
        let seized = match seize(name, options | ptrace::SUSPEND_SECCOMP) {
            Err(TraceeError::Kernel { source, .. }) if source.raw_os_error() == Some(libc::EPERM) => {
                seize(name, options)?
            }
            other => other?,
        };
        let mut held = seized.wait()?;
        held.alone = true;
        let ground = self.ground(host, pid)?;
        let rseq = ptrace::rseq_configuration(host).unwrap_or_default();
        let mut batch = Batch::new();
        if rseq.address != 0 {
            let args =
                [rseq.address.into(), u64::from(rseq.size).into(), 1i32.into(), u64::from(rseq.signature).into()];
            batch.call(libc::SYS_rseq, args, "unregistering the seed's rseq area");
        }
        // A helper's too: what it forks inherits them.
        if let Some(state) = self.states.values().next() {
            filters::restart(&state.filters[..self.common.filters], 0, &mut batch);
        }
        held.run(&ground, 0, &batch)?;
        self.grown.insert(pid, Grown { threads: vec![held], ground });
        Ok(())
    }

    pub(super) fn ground(&self, host: HostPid, pid: PodPid) -> Result<Ground, TraceeError> {
        let (code, scratch) = (self.common.code.start, self.common.scratch.clone());
        Ground::brought((host, pid), code, scratch, SEAT, MARKER)
    }

    pub(super) fn run(&mut self, pid: PodPid, batch: &Batch) -> Result<crate::tracee::Results, TraceeError> {
        let grown = self.grown.get_mut(&pid).ok_or(TraceeError::Died(pid))?;
        grown.threads[0].run(&grown.ground, 0, batch)
    }

    pub(super) fn host(&self, pid: PodPid) -> Result<HostPid, TraceeError> {
        self.grown.get(&pid).map(|grown| grown.threads[0].name.host).ok_or(TraceeError::Died(pid))
    }

    /// The signal that tells the parent of a process's end.
    pub(super) fn exit_signal(&self, pid: PodPid) -> u64 {
        let living = self.states.get(&pid).map(|state| &state.place);
        let place = living.or_else(|| self.ended.get(&pid).map(|ended| &ended.place));
        place.map_or(libc::SIGCHLD, |place| place.exit_signal) as u64
    }

    /// Puts everybody into their groups and sets the foreground group of each terminal.
    pub fn join_groups(&mut self) -> Result<(), GrowError> {
        for (pid, group) in &self.plan.groups {
            let mut batch = Batch::new();
            let what = format!("joining process group {group}");
            batch.call(libc::SYS_setpgid, [0i32.into(), group.0.into()], what);
            self.run(*pid, &batch)?;
        }
        let leaders: Vec<&ProcessState> = self.states.values().copied().filter(|s| s.terminal.is_some()).collect();
        for state in leaders {
            let Some(terminal) = state.terminal else { continue };
            let Some(group) = terminal.foreground else { continue };
            if !self.states.values().any(|other| other.place.group == group) {
                continue; // its last process has ended: the terminal has no foreground group, as before
            }
            let mut batch = Batch::new();
            files::set_foreground(&mut batch, terminal.index, group);
            self.run(state.place.pid, &batch)?;
        }
        Ok(())
    }

    /// Ends the helpers, and the processes that are zombies in the image. Helpers that a process of the pod forked are
    /// reaped by it; PID 1 reaps the others.
    pub fn end_the_ended(&mut self) -> Result<(), GrowError> {
        let ended: Vec<PodPid> =
            self.plan.nodes.values().filter(|node| node.role != Role::Live).map(|node| node.pid).collect();
        for pid in ended.iter().rev() {
            let Some(mut grown) = self.grown.remove(pid) else { continue };
            end(&mut grown, self.ended.get(pid).copied())?;
        }
        for node in self.plan.nodes.values().filter(|node| node.role == Role::Live) {
            let phantoms = node.before.iter().chain(&node.after);
            let mut batch = Batch::new();
            for phantom in phantoms.filter(|child| self.plan.nodes[child].role == Role::Phantom) {
                let args = [phantom.0.into(), 0u64.into(), PATIENTLY.into(), 0u64.into()];
                batch.call(libc::SYS_wait4, args, "reaping a helper");
            }
            if !batch.is_empty() {
                self.run(node.pid, &batch)?;
            }
        }
        Ok(())
    }

    /// The last of a live process, once everybody is furnished: files that name other processes, locks, limits,
    /// credentials, registers, signals, timers. It is then held where it was when it was captured.
    pub fn finish(&mut self, pid: PodPid, buffer: &mut Vec<u8>) -> Result<(), GrowError> {
        let state = self.states[&pid];
        let late = &mut self.around.late;
        let directory = (!state.sharing.directories).then(|| late.change_to(state.cwd)).flatten();
        let opened = (!state.sharing.files).then(|| late.open_in(&state.descriptors)).flatten();
        for batch in directory.into_iter().chain(opened) {
            self.run(pid, &batch)?;
        }
        let mut batch = Batch::new();
        files::take_posix_locks(&mut batch, &state.locks);
        limits::restart(&state.limits, &mut batch);
        self.run(pid, &batch)?;
        super::finish::from_outside(state, self.host(pid)?)?;
        let Some(grown) = self.grown.get_mut(&pid) else { return Err(TraceeError::Died(pid).into()) };
        super::finish::threads(state, grown, self.around.names, buffer)?;
        self.clear(pid, state)?;
        if state.stopped.is_some() {
            self.let_stop(pid)?;
        }
        Ok(())
    }

    /// Stopped processes first, and each before its parent, which takes the news of the stop that it had taken before.
    pub fn order_of_finish(&self) -> Vec<PodPid> {
        let depth = |pid: &PodPid| {
            let parent = |pid: &PodPid| self.states.get(pid).map(|state| state.place.parent);
            std::iter::successors(Some(*pid), parent).count()
        };
        let is_stopped = |pid: &PodPid| self.states[pid].stopped.is_some();
        let (mut order, others): (Vec<PodPid>, Vec<PodPid>) = self.states.keys().copied().partition(is_stopped);
        order.sort_by_key(|pid| std::cmp::Reverse(depth(pid)));
        order.extend(others);
        order
    }

    /// Lets go of a process that stops before it does anything.
    fn let_stop(&mut self, pid: PodPid) -> Result<(), GrowError> {
        let Some(mut grown) = self.grown.remove(&pid) else { return Ok(()) };
        self.stopped.insert(pid, grown.threads[0].name.host);
        grown.threads.iter_mut().try_for_each(Held::go_home)?;
        Ok(grown.threads.into_iter().try_for_each(Held::let_go)?)
    }

    /// The host's PID of a process.
    pub fn host_of(&self, pid: PodPid) -> Option<HostPid> {
        let held = self.grown.get(&pid).map(|grown| grown.threads[0].name.host);
        held.or_else(|| self.stopped.get(&pid).copied())
    }

    /// Its namespaces and its directories. What comes last is not done yet.
    pub(super) fn places(&mut self, state: &ProcessState) -> Result<Batch, GrowError> {
        let mut batch = Batch::new();
        enter::enter(&state.namespaces, &|id| self.common.namespace(id), &mut batch);
        if !state.sharing.directories {
            self.directories(state, &mut batch)?;
        }
        if let Some(leader) = state.threads.first() {
            let namespace = |id| self.common.namespace(id);
            enter::enter_user(&state.namespaces, &leader.credentials, &namespace, &mut batch);
        }
        Ok(batch)
    }

    /// The root of a process, if it is a directory of a process that has ended.
    pub(super) fn nowhere(&self, state: &ProcessState) -> Option<Vec<u8>> {
        state.root.and_then(|root| self.around.late.nowhere(root)).map(<[u8]>::to_vec)
    }

    /// Its root and its working directory; what `batch` has is run before.
    fn directories(&mut self, state: &ProcessState, batch: &mut Batch) -> Result<(), GrowError> {
        let pid = state.place.pid;
        let nowhere = self.nowhere(state);
        if let Some(path) = &nowhere {
            self.run(pid, &std::mem::take(batch))?;
            self.lead_nowhere(pid, path)?;
        } else if let Some(root) = state.root {
            change_directory(self.common.number(root), batch);
            let dot = batch.bytes(b".\0");
            batch.call(libc::SYS_chroot, [dot], "changing the root directory");
        }
        let is_nowhere = nowhere.is_some() && self.around.late.nowhere(state.cwd).is_some();
        if !self.around.late.contains(state.cwd) && !is_nowhere {
            change_directory(self.common.number(state.cwd), batch);
        }
        Ok(())
    }

    /// Makes a directory of a process that has ended the root: a helper with its number, which shares root and working
    /// directory, makes its own the root, and ends.
    fn lead_nowhere(&mut self, pid: PodPid, path: &[u8]) -> Result<(), GrowError> {
        let damaged = || RebuildError::Damaged(format!("{} is of no process", String::from_utf8_lossy(path)));
        let (ended, path) = files::proc::own_path(path).ok_or_else(damaged)?;
        let is_free = !self.grown.values().flat_map(|grown| &grown.threads).any(|held| held.name.pod == ended);
        let mut batch = Batch::new();
        clone_into(&mut batch, ended, (libc::CLONE_PTRACE | libc::CLONE_FS) as u64, 0, is_free, "helper");
        self.run(pid, &batch)?;
        for held in newborns(1, self.common.depth)? {
            let (helper, host) = (held.name.pod, held.name.host);
            let mut grown = Grown { threads: vec![held], ground: self.ground(host, helper)? };
            let mut batch = Batch::new();
            let root = batch.bytes(&path);
            batch.call(libc::SYS_chroot, [root], "making a directory of /proc the root");
            let slash = batch.bytes(b"/\0");
            batch.call(libc::SYS_chdir, [slash], "changing directory");
            grown.threads[0].run(&grown.ground, 0, &batch)?;
            end(&mut grown, None)?;
            let mut batch = Batch::new();
            let args = [helper.0.into(), 0u64.into(), PATIENTLY.into(), 0u64.into()];
            batch.call(libc::SYS_wait4, args, "reaping a helper");
            self.run(pid, &batch)?;
        }
        Ok(())
    }

    pub(super) fn attributes(&self, state: &ProcessState) -> Batch {
        let mut batch = Batch::new();
        super::signals::restart_actions(&state.actions, &mut batch);
        super::finish::attributes(state, &mut batch);
        filters::restart(&state.filters[..state.shared_filters()], self.common.filters, &mut batch);
        batch
    }

    /// Ends the first thread of a process, which has others that go on.
    pub(super) fn end_leader(&mut self, pid: PodPid, ended: &EndedState) -> Result<(), GrowError> {
        let Some(grown) = self.grown.get_mut(&pid) else { return Err(TraceeError::Died(pid).into()) };
        let mut leader = grown.threads.remove(0);
        let mut batch = Batch::new();
        super::finish::remains(ended, &mut batch);
        let status = ended.place.ended.unwrap_or(0);
        batch.attempt(libc::SYS_exit, [((status >> 8) & 0xff).into()]);
        leader.begin(&grown.ground, 0, &batch)?;
        Ok(leader.ends_alone()?)
    }

    /// Unmaps stub and scratch: the address space is then the pod's own.
    fn clear(&mut self, pid: PodPid, state: &ProcessState) -> Result<(), GrowError> {
        let Some(grown) = self.grown.remove(&pid) else { return Err(TraceeError::Died(pid).into()) };
        let Grown { mut threads, ground } = grown;
        let vdso = state.memory.vdso.as_ref().and_then(|vdso| vdso.code()).ok_or(TraceeError::NoRoom(pid))?;
        let children = self.states.values().copied().filter(|child| child.place.parent == pid);
        super::finish::last_batch(state, children, &mut threads[0], &ground)?;
        let again = self.ground(threads[0].name.host, pid)?;
        ground.leave(&mut threads[0], self.common.code.start, &vdso)?;
        self.grown.insert(pid, Grown { threads, ground: again });
        Ok(())
    }

    /// Everybody is whole: from now on the pod outlives its tracer. All threads are where they were captured.
    pub fn come_of_age(&mut self) -> Result<(), TraceeError> {
        let mut threads = self.grown.values_mut().flat_map(|grown| &mut grown.threads);
        threads.try_for_each(|held| held.go_home().and_then(|()| held.outlive_tracer()))
    }

    /// Lets everybody go.
    pub fn let_go(self) -> Result<(), TraceeError> {
        self.grown.into_values().flat_map(|grown| grown.threads).try_for_each(Held::let_go)
    }
}

fn change_directory(number: i32, batch: &mut Batch) {
    batch.call(libc::SYS_fchdir, [number.into()], "changing directory");
}

/// `struct clone_args`: a child or thread, attached to the tracer. It is given its number where that `is_free` to choose.
pub(super) fn clone_into(batch: &mut Batch, pid: PodPid, flags: u64, exit_signal: u64, is_free: bool, what: &str) {
    let set_tid = batch.bytes(&pid.0.to_ne_bytes());
    let words: [u64; 11] = [flags, 0, 0, 0, exit_signal, 0, 0, 0, 0, u64::from(is_free), 0];
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let args = batch.bytes(&bytes);
    if is_free {
        batch.pointer(args, 8 * 8, set_tid);
    }
    batch.call(libc::SYS_clone3, [args, size_of_val(&words).into()], format!("making {what} {pid}"));
}

/// Waits for `count` tasks that the kernel attached for us.
fn newborns(count: usize, depth: usize) -> Result<Vec<Held>, TraceeError> {
    (0..count).map(|_| named_newborn(depth)).collect()
}

/// Waits for a task that the kernel attached for us, and looks its numbers up.
pub(super) fn named_newborn(depth: usize) -> Result<Held, TraceeError> {
    let (host, stop) = ptrace::wait_any().map_err(TraceeError::kernel("waiting for", PodPid(0)))?;
    named(host, stop, depth)
}

/// A task that the kernel attached for us, with its numbers.
pub(super) fn named(host: HostPid, stop: Stop, depth: usize) -> Result<Held, TraceeError> {
    let mut held = attached(host, stop)?;
    let status = std::fs::read(host.proc("status"));
    let status = status.map_err(TraceeError::kernel("reading about", held.name.pod))?;
    let numbers = Status::new(status).namespace_pids();
    let own = numbers.last().copied().unwrap_or(0);
    held.alone = true;
    (held.name.pod, held.name.own) = (PodPid(numbers.get(depth).copied().unwrap_or(0)), (own, own));
    Ok(held)
}

/// A task that the kernel attached for us. Only its number on the host is known.
pub(super) fn attached(host: HostPid, stop: Stop) -> Result<Held, TraceeError> {
    let nobody = PodPid(0);
    if let Stop::Ended(_) = stop {
        return Err(TraceeError::Died(nobody));
    }
    Seized::newborn(ThreadName { host, pod: nobody, own: (0, 0) }).already_stopped()
}

/// Ends a helper, or a process as it ended the first time.
fn end(grown: &mut Grown, ended: Option<&EndedState>) -> Result<(), GrowError> {
    let held = &mut grown.threads[0];
    if let Some(ended) = ended {
        let mut batch = Batch::new();
        super::finish::remains(ended, &mut batch);
        held.run(&grown.ground, 0, &batch)?;
    }
    let status = ended.and_then(|ended| ended.place.ended).unwrap_or(0);
    let signal = status & 0x7f;
    let mut batch = Batch::new();
    if signal == 0 {
        batch.attempt(libc::SYS_exit_group, [((status >> 8) & 0xff).into()]);
    } else {
        // A core dump would be a file that was not there.
        let none = batch.bytes(&[0; 16]);
        batch.attempt(libc::SYS_setrlimit, [(libc::RLIMIT_CORE as i32).into(), none]);
        super::signals::restart_actions(&[], &mut batch);
        let mask = batch.bytes(&0u64.to_ne_bytes());
        batch.attempt(libc::SYS_kill, [held.name.own.0.into(), signal.into()]);
        batch.attempt(libc::SYS_rt_sigprocmask, [libc::SIG_SETMASK.into(), mask, 0u64.into(), 8u64.into()]);
    }
    held.begin(&grown.ground, 0, &batch)?;
    loop {
        let failed = TraceeError::kernel("ending", held.name.pod);
        match ptrace::wait(held.name.host).map_err(failed)? {
            Stop::Ended(_) => return Ok(()),
            Stop::Signal(marker) if marker == MARKER => return Err(TraceeError::Died(held.name.pod).into()),
            Stop::Signal(signal) => ptrace::cont(held.name.host, signal),
            Stop::Event(_) | Stop::Other(_) => ptrace::cont(held.name.host, 0),
        }
        .map_err(TraceeError::kernel("ending", held.name.pod))?;
    }
}
