//! What live processes are given once all exist: namespaces, directories, users, descriptors, threads.

use std::borrow::Cow;
use std::collections::HashMap;

use crate::error::{Context, RebuildError};
use crate::files;
use crate::ids::{FileId, PodPid};
use crate::memory;
use crate::namespaces::{Births, Kind, enter};
use crate::process::grow::births::{Newborn, check_numbers, clone_into, named_newborn};
use crate::process::grow::broods::{MOST, THREAD};
use crate::process::grow::ends::end;
use crate::process::grow::{Grove, GrowError, Grown, PART, PATIENTLY};
use crate::process::state::{EndedState, ProcessState};
use crate::process::threads::ThreadState;
use crate::process::{credentials, finish, own_directories, timers};
use crate::tracee::{Batch, TraceeError};

/// How many processes are at work beside each other.
pub(super) const MANY: usize = 64;

impl<'a> Grove<'a> {
    /// Gives every live process its directories, descriptors, signal actions, threads and timers. Nothing of the pool is
    /// open in it afterwards. They work at it beside each other: each stage is begun in many before the first is waited for.
    pub fn furnish(&mut self) -> Result<(), GrowError> {
        // Who shares its table gets its descriptors with its parent, after it: the pool goes then.
        let (sharing, others): (Vec<&'a ProcessState>, Vec<_>) =
            self.states.values().copied().partition(|state| state.sharing.files);
        for some in sharing.chunks(MANY).chain(others.chunks(MANY)) {
            self.furnish_some(some)?;
            self.clone_threads(some)?;
            for state in some {
                self.prepare_births(state)?;
            }
            // A timer may notify any thread.
            self.beside(some, |grove, state| Ok(grove.all_but_last(state.place.pid, timers::create(&state.timers))?))?;
        }
        Ok(())
    }

    /// Where they are, and what a process has.
    fn furnish_some(&mut self, some: &[&'a ProcessState]) -> Result<(), GrowError> {
        // Some take a helper to get to their root: nobody else may stop meanwhile.
        let (alone, together): (Vec<&'a ProcessState>, Vec<_>) = some
            .iter()
            .copied()
            .partition(|state| state.root.is_some_and(|root| self.around.late.nowhere(root).is_some()));
        for state in alone {
            self.beside(&[state], Self::furniture)?;
        }
        self.beside(&together, Self::furniture)
    }

    /// The last of the batches that furnish a process: those before it have been run.
    fn furniture(&mut self, state: &'a ProcessState) -> Result<Batch, GrowError> {
        let pid = state.place.pid;
        self.leave_out(state)?;
        let early = self.open_early(state)?;
        let mut places = self.places(state)?;
        if !memory::Contexts::of(&state.memory).is_empty() {
            self.make_contexts(state, std::mem::take(&mut places))?;
        }
        let source = |file| match early.get(&file) {
            Some(number) => files::Source::Pool(*number),
            None if self.around.late.contains(file) => files::Source::Late,
            None => self.common.source(file),
        };
        let steps = own_directories::steps(state);
        let descriptors = || match steps.is_empty() {
            true => Cow::Borrowed(&state.descriptors[..]),
            false => [&state.descriptors[..], &steps].concat().into(),
        };
        let own = (!state.sharing.files).then(|| files::restart_descriptors(&descriptors(), &source));
        let late = memory::late_batch(&state.memory).into_iter().map(|memory| memory.batch);
        let own = own.transpose()?.into_iter().flatten();
        let parts: Vec<Batch> = [places].into_iter().chain(own).chain(late).chain([self.attributes(state)]).collect();
        Ok(self.all_but_last(pid, parts)?)
    }

    /// Runs a batch in each of these processes beside each other.
    pub(super) fn beside(
        &mut self,
        some: &[&'a ProcessState],
        mut batch_of: impl FnMut(&mut Self, &'a ProcessState) -> Result<Batch, GrowError>,
    ) -> Result<(), GrowError> {
        let mut begun = Vec::with_capacity(some.len());
        for state in some {
            let (pid, batch) = (state.place.pid, batch_of(self, state)?);
            if !batch.is_empty() {
                let Grown { threads, ground } = self.grown.get_mut(&pid).ok_or(TraceeError::Died(pid))?;
                threads[0].begin(ground, 0, &batch)?;
                begun.push((pid, batch));
            }
        }
        for (pid, batch) in begun {
            let Grown { threads, ground } = self.grown.get_mut(&pid).ok_or(TraceeError::Died(pid))?;
            threads[0].finish(ground, 0, &batch)?;
        }
        Ok(())
    }

    /// Puts batches together, in as few as there is room for, and runs all but the last.
    pub(super) fn all_but_last(
        &mut self,
        pid: PodPid,
        parts: impl IntoIterator<Item = Batch>,
    ) -> Result<Batch, TraceeError> {
        let room = PART as usize;
        let mut whole = Batch::new();
        for part in parts {
            if whole.size() + part.size() > room {
                self.run(pid, &std::mem::take(&mut whole))?;
            }
            whole.append(part);
        }
        Ok(whole)
    }

    /// Its contexts of asynchronous I/O, after what `before` has. The pool is open still.
    fn make_contexts(&mut self, state: &ProcessState, before: Batch) -> Result<(), GrowError> {
        let contexts = memory::Contexts::of(&state.memory);
        let (pid, data) = (state.place.pid, self.common.pool.data);
        self.run(pid, &before)?;
        let mut batch = Batch::new();
        let mut made = contexts.make(&mut batch);
        let results = self.run(pid, &batch)?;
        let mut batch = Batch::new();
        contexts.move_and_fill(&mut made, &results, data, &mut batch);
        let results = self.run(pid, &batch)?;
        let object = || format!("the asynchronous I/O of process {pid}");
        Ok(contexts.complete(&made, &results, self.host(pid)?).rebuilding("filling", object())?)
    }

    /// Its namespaces and its directories. What comes last has not been run.
    fn places(&mut self, state: &ProcessState) -> Result<Batch, GrowError> {
        let pid = state.place.pid;
        let mut batch = Batch::new();
        // While `/proc` is where it is.
        finish::log_in(state, &mut batch);
        let (levels, born) = (self.around.levels, self.user_of(pid));
        // Others it was born in.
        let reached = |id| levels.rules(born, levels.owner(id));
        enter::enter(&state.namespaces, &reached, &|id| self.common.namespace(id), &mut batch);
        if !state.sharing.directories {
            self.directories(state, &mut batch)?;
        }
        self.enter_user(state, &mut batch);
        Ok(batch)
    }

    /// Its root and its working directory; what `batch` has is run before.
    fn directories(&mut self, state: &ProcessState, batch: &mut Batch) -> Result<(), GrowError> {
        let pid = state.place.pid;
        let nowhere = state.root.and_then(|root| self.around.late.nowhere(root)).map(<[u8]>::to_vec);
        if let Some(path) = &nowhere {
            self.run(pid, &std::mem::take(batch))?;
            self.lead_nowhere(pid, path)?;
        } else if let Some(root) = state.root {
            own_directories::change_root(self.common.number(root), batch);
        }
        let is_nowhere = nowhere.is_some() && self.around.late.nowhere(state.cwd).is_some();
        if !self.around.late.contains(state.cwd) && !is_nowhere {
            own_directories::change_directory(self.common.number(state.cwd), batch);
        }
        Ok(())
    }

    /// Its user namespace, and who it is there.
    fn enter_user(&self, state: &ProcessState, batch: &mut Batch) {
        let (Some(leader), Some(user)) = (state.threads.first(), state.namespaces.of(Kind::User)) else { return };
        self.pass_for(state.place.pid, &leader.credentials, batch);
        if self.user_of(state.place.pid) != Some(user) {
            enter::enter_user(self.common.namespace(user), batch);
        }
    }

    /// Opens files of processes for one that could not any more once its root is another directory: they come behind the
    /// pool.
    pub(super) fn open_early(&mut self, state: &ProcessState) -> Result<HashMap<FileId, i32>, GrowError> {
        let mut opened = HashMap::new();
        if state.root.is_none() || state.sharing.files {
            return Ok(opened);
        }
        let free = self.common.pool.end();
        let mut batch = Batch::new();
        for descriptor in &state.descriptors {
            let number = free + opened.len() as i32;
            if !opened.contains_key(&descriptor.file)
                && self.around.late.open_early(descriptor.file, number, &mut batch)
            {
                opened.insert(descriptor.file, number);
            }
        }
        if !batch.is_empty() {
            self.run(state.place.pid, &batch)?;
        }
        Ok(opened)
    }

    /// Makes a directory of a process that has ended the root: a helper with its number, which shares root and working
    /// directory, makes its own the root, and ends.
    fn lead_nowhere(&mut self, pid: PodPid, path: &[u8]) -> Result<(), GrowError> {
        let damaged = || RebuildError::Damaged(format!("{} is of no process", String::from_utf8_lossy(path)));
        let (ended, path) = files::proc::own_path(path).ok_or_else(damaged)?;
        let is_free = !self.grown.values().flat_map(|grown| &grown.threads).any(|held| held.name.pod == ended);
        let newborn = Newborn {
            pid: ended,
            inner: &[],
            flags: libc::CLONE_PTRACE | libc::CLONE_FS,
            exit_signal: 0,
            what: "helper",
        };
        // Only its number in the pod shows.
        let any = if is_free { vec![(PodPid(0), ended.0)] } else { Vec::new() };
        let mut numbering = crate::process::grow::births::Numbering::asking(any);
        if self.user_of(pid).is_none() && self.plan.nodes[&pid].numbers.is_empty() && is_free {
            numbering = self.numbering(None, &[], (ended, &[]))?;
        }
        self.ask_numbers(&numbering)?;
        let mut batch = Batch::new();
        clone_into(&mut batch, &newborn, &numbering);
        self.run(pid, &batch)?;
        let (held, numbers) = named_newborn(self.common.depth)?;
        let (helper, host) = (held.name.pod, held.name.host);
        let mut grown = Grown { threads: vec![held], ground: self.ground(host, helper)? };
        let mut batch = Batch::new();
        let root = batch.bytes(&path);
        batch.call(libc::SYS_chroot, [root], "making a directory of /proc the root");
        let slash = batch.bytes(b"/\0");
        batch.call(libc::SYS_chdir, [slash], "changing directory");
        grown.threads[0].run(&grown.ground, 0, &batch)?;
        end(&mut grown, 0)?;
        let mut batch = Batch::new();
        let own = numbers.get(self.plan.nodes[&pid].numbers.len()).copied().unwrap_or(0);
        batch.call(libc::SYS_wait4, [own.into(), 0u64.into(), PATIENTLY.into(), 0u64.into()], "reaping a helper");
        Ok(self.run(pid, &batch).map(drop)?)
    }

    fn clone_threads(&mut self, some: &[&'a ProcessState]) -> Result<(), GrowError> {
        let (mut free, mut bound) = (Vec::new(), Vec::new());
        for state in some {
            let line = self.around.levels.line(state.place.inner.namespace);
            let own = (state.place.pid, &state.place.inner.pids[..]);
            match self.numbering(state.namespaces.of(Kind::User), &line, own)?.is_free() {
                true => free.push(*state),
                false => bound.push(*state),
            }
        }
        self.clone_threads_beside(&free)?;
        for state in bound {
            self.clone_numbered(state)?;
        }
        let ended = some.iter().filter_map(|state| Some((*state, state.ended_leader.as_ref()?)));
        ended.into_iter().try_for_each(|(state, ended)| self.end_leader(state, ended))
    }

    /// Clones the threads of a process that must leave their numbers to others.
    fn clone_numbered(&mut self, state: &'a ProcessState) -> Result<(), GrowError> {
        let pid = state.place.pid;
        let line = self.around.levels.line(state.place.inner.namespace);
        let user = state.namespaces.of(Kind::User);
        let newborn_of = |thread: &'a ThreadState| Newborn {
            pid: thread.tid,
            inner: &thread.inner,
            flags: THREAD,
            exit_signal: 0,
            what: "thread",
        };
        let runs: Vec<&[ThreadState]> = match self.numbering(user, &line, (pid, &state.place.inner.pids))?.asked() {
            1 => consecutive(state.further_threads()).collect(),
            _ => state.further_threads().chunks(1).collect(),
        };
        for some in runs {
            let mut batch = Batch::new();
            for (place, thread) in some.iter().enumerate() {
                let numbering = self.numbering(user, &line, (thread.tid, &thread.inner))?;
                if place == 0 {
                    self.ask_numbers(&numbering)?;
                }
                clone_into(&mut batch, &newborn_of(thread), &numbering);
            }
            self.run(pid, &batch)?;
            let depth = self.common.depth;
            let Some(grown) = self.grown.get_mut(&pid) else { return Err(TraceeError::Died(pid).into()) };
            grown.threads[0].alone = false;
            for _ in some {
                let (mut held, numbers) = named_newborn(depth)?;
                // It stands behind the call that made it.
                let call = grown.ground.call_at(0, held.registers.r12);
                let thread = call.and_then(|call| some.get(call)).ok_or(TraceeError::Died(pid))?;
                check_numbers(&newborn_of(thread), &numbers)?;
                held.alone = false;
                (held.name.pod, held.name.own) = (thread.tid, (grown.threads[0].name.own.0, thread.own_tid));
                grown.threads.push(held);
            }
        }
        if let Some(grown) = self.grown.get_mut(&pid) {
            let order: HashMap<PodPid, usize> = state.threads.iter().enumerate().map(|(i, t)| (t.tid, i)).collect();
            grown.threads.sort_by_key(|held| order.get(&held.name.pod).copied());
        }
        Ok(())
    }

    /// Ends the first thread of a process, which has others that go on.
    fn end_leader(&mut self, state: &ProcessState, ended: &EndedState) -> Result<(), GrowError> {
        let pid = state.place.pid;
        let Some(grown) = self.grown.get_mut(&pid) else { return Err(TraceeError::Died(pid).into()) };
        let mut leader = grown.threads.remove(0);
        let mut batch = Batch::new();
        // In a user namespace it is who its process is.
        let is_home = state.namespaces.of(Kind::User).is_none();
        finish::remains(ended, &mut batch, |batch| {
            if is_home {
                credentials::identify(&ended.credentials, batch);
            }
        });
        let status = ended.place.ended.unwrap_or(0);
        batch.attempt(libc::SYS_exit, [((status >> 8) & 0xff).into()]);
        leader.begin(&grown.ground, 0, &batch)?;
        Ok(leader.ends_alone()?)
    }

    /// Where its next children will be born. It has its threads: those could not be cloned any more.
    pub(super) fn prepare_births(&mut self, state: &ProcessState) -> Result<(), GrowError> {
        match state.births {
            Births::Here => Ok(()),
            Births::In(namespace) => self.bear_in(state.place.pid, Some(namespace)),
            Births::New => {
                let mut batch = Batch::new();
                batch.call(libc::SYS_unshare, [Kind::Pid.flag().into()], "making a PID namespace for its children");
                Ok(self.run(state.place.pid, &batch).map(drop)?)
            }
        }
    }
}

/// Threads in pieces whose numbers follow each other.
fn consecutive(threads: &[ThreadState]) -> impl Iterator<Item = &[ThreadState]> {
    threads.chunk_by(|a, b| a.tid.0 + 1 == b.tid.0).flat_map(|run| run.chunks(MOST))
}
