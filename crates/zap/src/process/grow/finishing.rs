//! The last of live processes, once everybody is furnished: each is then held where it was when it was captured.

use std::collections::HashMap;

use super::furnish::MANY;
use super::{Grove, GrowError, Grown};
use crate::files;
use crate::ids::PodPid;
use crate::memory;
use crate::process::state::ProcessState;
use crate::process::{finish, limits, threads};
use crate::tracee::{Batch, Held, TraceeError};

impl<'a> Grove<'a> {
    /// Files that name other processes, locks, limits, credentials, registers, signals, timers. Each stage is begun in many
    /// processes before the first is waited for.
    pub fn finish(&mut self) -> Result<(), GrowError> {
        let (stopped, others): (Vec<&'a ProcessState>, Vec<_>) =
            self.states.values().copied().partition(|state| state.stopped.is_some());
        for state in self.deepest_first(stopped) {
            self.finish_some(&[state])?;
            self.let_stop(state.place.pid)?;
        }
        others.chunks(MANY).try_for_each(|some| self.finish_some(some))
    }

    /// Each before its parent, which takes the news of the stop that it had taken before.
    fn deepest_first(&self, mut some: Vec<&'a ProcessState>) -> Vec<&'a ProcessState> {
        let depth = |state: &&ProcessState| {
            let parent = |pid: &PodPid| self.states.get(pid).map(|state| state.place.parent);
            std::iter::successors(Some(state.place.pid), parent).count()
        };
        some.sort_by_key(|state| std::cmp::Reverse(depth(state)));
        some
    }

    fn finish_some(&mut self, some: &[&'a ProcessState]) -> Result<(), GrowError> {
        self.beside(some, Self::late_files_and_limits)?;
        let mut buffer = Vec::new();
        for state in some {
            let pid = state.place.pid;
            finish::from_outside(state, self.host(pid)?)?;
            let written = memory::write_patches(&state.memory.patches, self.grown[&pid].ground.memory());
            written.map_err(TraceeError::kernel("patching the vDSO of", pid))?;
            let Some(grown) = self.grown.get_mut(&pid) else { return Err(TraceeError::Died(pid).into()) };
            finish::threads(state, grown, self.around.names, &mut buffer)?;
        }
        self.beside(some, |grove, state| {
            let own = grove.grown.get(&state.place.pid).ok_or(TraceeError::Died(state.place.pid))?.threads[0].name.own;
            let children = grove.children.get(&state.place.pid).into_iter().flatten().copied();
            let sought = (!state.sharing.files).then(|| grove.around.late.seek_in(&state.descriptors)).flatten();
            let batches = sought.into_iter().chain(finish::last_batches(state, children, own));
            Ok(grove.all_but_last(state.place.pid, batches)?)
        })?;
        self.clear(some)
    }

    fn late_files_and_limits(&mut self, state: &'a ProcessState) -> Result<Batch, GrowError> {
        let mut numbers = HashMap::new();
        for pid in self.around.late.processes(&state.descriptors) {
            numbers.insert(pid, self.seen_from(state.place.inner.namespace, pid));
        }
        let seen = |pid: PodPid| numbers.get(&pid).copied().unwrap_or(pid.0);
        let late = &mut self.around.late;
        let directory = (!state.sharing.directories).then(|| late.change_to(state.cwd)).flatten();
        let early = state.root.is_some();
        let opened = (!state.sharing.files).then(|| late.open_in(&state.descriptors, &seen, early)).flatten();
        let asked = late.ask_in(state.place.pid, &state.descriptors);
        let mut last = Batch::new();
        files::take_posix_locks(&mut last, &state.locks);
        limits::restart(&state.limits, &mut last);
        Ok(self.all_but_last(state.place.pid, directory.into_iter().chain(opened).chain(asked).chain([last]))?)
    }

    /// Unmaps stub and scratch: the address spaces are then the pod's own. Of those that share one the last does.
    fn clear(&mut self, some: &[&'a ProcessState]) -> Result<(), GrowError> {
        let mut leaving = Vec::with_capacity(some.len());
        for state in some {
            let pid = state.place.pid;
            let owner = self.owner(pid).ok_or(TraceeError::Died(pid))?;
            let left = self.sharers.entry(owner.place.pid).or_default();
            *left = left.saturating_sub(1);
            if *left > 0 {
                restart_dispatch(state, self.grown.get(&pid).map_or(&[], |grown| &grown.threads))?;
                continue;
            }
            let Grown { mut threads, ground } = self.grown.remove(&pid).ok_or(TraceeError::Died(pid))?;
            let vdso = owner.memory.vdso.as_ref().and_then(|vdso| vdso.code()).ok_or(TraceeError::NoRoom(pid))?;
            ground.begin_to_leave(&mut threads[0], self.common.code.start, &vdso)?;
            leaving.push((pid, threads));
        }
        // Each stops when the call begins, and when it has been made.
        leaving.iter_mut().try_for_each(|(_, threads)| threads[0].reach_call())?;
        for (pid, mut threads) in leaving {
            threads[0].finish_leaving()?;
            restart_dispatch(self.states[&pid], &threads)?;
            let ground = self.ground(threads[0].name.host, pid)?;
            self.grown.insert(pid, Grown { threads, ground });
        }
        Ok(())
    }

    /// Lets go of a process that stops before it does anything.
    fn let_stop(&mut self, pid: PodPid) -> Result<(), GrowError> {
        let Some(mut grown) = self.grown.remove(&pid) else { return Ok(()) };
        self.stopped.insert(pid, grown.threads[0].name.host);
        grown.threads.iter_mut().try_for_each(Held::go_home)?;
        Ok(grown.threads.into_iter().try_for_each(Held::let_go)?)
    }
}

/// Has the threads of a process see to their system calls again: they make no more of ours.
fn restart_dispatch(state: &ProcessState, held: &[Held]) -> Result<(), TraceeError> {
    state.threads.iter().zip(held).try_for_each(|(state, held)| threads::restart_dispatch(state, held))
}
