//! Where a process is, and its threads: namespaces, directories, users.

use std::collections::HashMap;

use crate::error::RebuildError;
use crate::files;
use crate::ids::{FileId, PodPid};
use crate::namespaces::{Births, Kind, enter};
use crate::process::grow::births::{Newborn, check_numbers, clone_into, named_newborn, newborn};
use crate::process::grow::ends::end;
use crate::process::grow::{Grove, GrowError, Grown, PATIENTLY};
use crate::process::state::{EndedState, ProcessState};
use crate::process::threads::ThreadState;
use crate::process::{credentials, finish};
use crate::tracee::{Batch, TraceeError};

impl Grove<'_> {
    /// Its namespaces and its directories.
    pub(super) fn places(&mut self, state: &ProcessState) -> Result<(), GrowError> {
        let pid = state.place.pid;
        let mut batch = Batch::new();
        let (levels, born) = (self.around.levels, self.user_of(pid));
        // Others it was born in.
        let reached = |id| levels.rules(born, levels.owner(id));
        enter::enter(&state.namespaces, &reached, &|id| self.common.namespace(id), &mut batch);
        if !state.sharing.directories {
            self.directories(state, &mut batch)?;
        }
        self.enter_user(state, &mut batch);
        Ok(self.run(pid, &batch).map(drop)?)
    }

    /// Its root and its working directory; what `batch` has is run before.
    fn directories(&mut self, state: &ProcessState, batch: &mut Batch) -> Result<(), GrowError> {
        let pid = state.place.pid;
        let nowhere = state.root.and_then(|root| self.around.late.nowhere(root)).map(<[u8]>::to_vec);
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
        let mut batch = Batch::new();
        for descriptor in &state.descriptors {
            let number = self.free + opened.len() as i32;
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

    pub(super) fn clone_threads(&mut self, state: &ProcessState) -> Result<(), GrowError> {
        let flags = libc::CLONE_VM
            | libc::CLONE_FS
            | libc::CLONE_FILES
            | libc::CLONE_SIGHAND
            | libc::CLONE_THREAD
            | libc::CLONE_SYSVSEM
            | libc::CLONE_PTRACE;
        let pid = state.place.pid;
        let newborn_of = |thread: &ThreadState| (thread.tid, thread.inner.clone());
        let line = self.around.levels.line(state.place.inner.namespace);
        let user = state.namespaces.of(Kind::User);
        let asked = self.numbering(user, &line, (pid, &state.place.inner.pids))?.asked();
        let is_free = asked == 0;
        let runs: Vec<&[ThreadState]> = match asked {
            0 => state.further_threads().chunks(256).collect(),
            1 => consecutive(state.further_threads()).collect(),
            _ => state.further_threads().chunks(1).collect(),
        };
        for some in runs {
            let mut batch = Batch::new();
            for (place, thread) in some.iter().enumerate() {
                let (tid, inner) = newborn_of(thread);
                let numbering = self.numbering(user, &line, (tid, &inner))?;
                if place == 0 {
                    self.ask_numbers(&numbering)?;
                }
                let newborn = Newborn { pid: tid, inner: &inner, flags, exit_signal: 0, what: "thread" };
                clone_into(&mut batch, &newborn, &numbering);
            }
            self.run(pid, &batch)?;
            let depth = self.common.depth;
            let Some(grown) = self.grown.get_mut(&pid) else { return Err(TraceeError::Died(pid).into()) };
            grown.threads[0].alone = false;
            for _ in some {
                let (mut held, numbers) = if is_free { (newborn()?, Vec::new()) } else { named_newborn(depth)? };
                // It stands behind the call that made it.
                let call = grown.ground.call_at(0, held.registers.r12);
                let thread = call.and_then(|call| some.get(call)).ok_or(TraceeError::Died(pid))?;
                if !is_free {
                    let (tid, inner) = newborn_of(thread);
                    check_numbers(
                        &Newborn { pid: tid, inner: &inner, flags, exit_signal: 0, what: "thread" },
                        &numbers,
                    )?;
                }
                held.alone = false;
                (held.name.pod, held.name.own) = (thread.tid, (grown.threads[0].name.own.0, thread.own_tid));
                grown.threads.push(held);
            }
        }
        if let Some(grown) = self.grown.get_mut(&pid) {
            let order: HashMap<PodPid, usize> = state.threads.iter().enumerate().map(|(i, t)| (t.tid, i)).collect();
            grown.threads.sort_by_key(|held| order.get(&held.name.pod).copied());
        }
        match &state.ended_leader {
            Some(ended) => self.end_leader(state, ended),
            None => Ok(()),
        }
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

fn change_directory(number: i32, batch: &mut Batch) {
    batch.call(libc::SYS_fchdir, [number.into()], "changing directory");
}

/// Threads in pieces whose numbers follow each other.
fn consecutive(threads: &[ThreadState]) -> impl Iterator<Item = &[ThreadState]> {
    threads.chunk_by(|a, b| a.tid.0 + 1 == b.tid.0).flat_map(|run| run.chunks(256))
}
