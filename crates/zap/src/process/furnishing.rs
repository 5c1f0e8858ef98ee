//! What live processes are given once all exist: directories, descriptors, signal actions, threads, timers. They work at
//! it beside each other: each stage is begun in all of them before the first is waited for.

use std::collections::HashMap;

use super::grow::{Grove, GrowError, Grown, SEAT, attached, clone_into, named_newborn};
use crate::error::RebuildError;
use crate::files;
use crate::ids::{HostPid, PodPid};
use crate::memory;
use crate::namespaces::Kind;
use crate::process::state::ProcessState;
use crate::process::threads::ThreadState;
use crate::process::timers;
use crate::sys::ptrace;
use crate::tracee::{Batch, Held, TraceeError};

/// Threads that a process is cloning: the batch, where it lies in the scratch area, and those that have been born.
struct Brood<'s> {
    pid: PodPid,
    batch: Batch,
    seat: usize,
    threads: &'s [ThreadState],
    born: Vec<Option<Held>>,
}

/// The most threads that one batch clones.
const MOST: usize = 256;

impl<'a> Grove<'a> {
    /// Gives every live process its directories, descriptors, signal actions, threads and timers. Nothing of the pool is
    /// open in it afterwards.
    pub fn furnish(&mut self) -> Result<(), GrowError> {
        let all: Vec<&'a ProcessState> = self.states.values().copied().collect();
        for shares_table in [true, false] {
            // Who shares its table gets its descriptors with its parent, after it: the pool goes then.
            self.furnish_some(all.iter().copied().filter(|state| state.sharing.files == shares_table))?;
        }
        self.clone_threads(&all)?;
        // A timer may notify any thread.
        let batches = all.iter().map(|state| {
            let mut batch = Batch::new();
            timers::create(&state.timers, &mut batch);
            (state.place.pid, batch)
        });
        let batches: Vec<_> = batches.filter(|(_, batch)| !batch.is_empty()).collect();
        batches.iter().try_for_each(|(pid, batch)| self.begin_leader(*pid, 0, batch))?;
        Ok(batches.iter().try_for_each(|(pid, batch)| self.finish_leader(*pid, batch))?)
    }

    fn furnish_some(&mut self, some: impl Iterator<Item = &'a ProcessState>) -> Result<(), GrowError> {
        // Some take a helper to get to their root: nobody else may stop meanwhile.
        let (alone, together): (Vec<_>, Vec<_>) = some.partition(|state| self.nowhere(state).is_some());
        for state in alone {
            let last = self.begin_furnishing(state)?;
            self.finish_leader(state.place.pid, &last)?;
        }
        let mut begun = Vec::with_capacity(together.len());
        for state in together {
            begun.push((state.place.pid, self.begin_furnishing(state)?));
        }
        Ok(begun.iter().try_for_each(|(pid, last)| self.finish_leader(*pid, last))?)
    }

    /// Begins the last of the batches that furnish a process, which is returned.
    fn begin_furnishing(&mut self, state: &ProcessState) -> Result<Batch, GrowError> {
        let places = self.places(state)?;
        let pool = |file| (!self.around.late.contains(file)).then(|| self.common.number(file));
        let range = self.common.pool..=self.common.last;
        let own = (!state.sharing.files).then(|| files::restart_descriptors(&state.descriptors, &pool, range));
        let late = memory::late_batch(&state.memory).into_iter().map(|memory| memory.batch);
        let parts = [places].into_iter().chain(own.transpose()?).chain(late).chain([self.attributes(state)]);
        Ok(self.begin_together(state.place.pid, parts)?)
    }

    /// Runs batches one after the other, in as few goes as there is room for, of which the last is only begun.
    fn begin_together(&mut self, pid: PodPid, parts: impl IntoIterator<Item = Batch>) -> Result<Batch, TraceeError> {
        let room = (self.common.scratch.end - self.common.scratch.start) as usize;
        let mut whole = Batch::new();
        for part in parts {
            if whole.size() + part.size() > room {
                self.run(pid, &std::mem::take(&mut whole))?;
            }
            whole.append(part);
        }
        self.begin_leader(pid, 0, &whole)?;
        Ok(whole)
    }

    fn begin_leader(&mut self, pid: PodPid, seat: usize, batch: &Batch) -> Result<(), TraceeError> {
        let Grown { threads, ground } = self.grown.get_mut(&pid).ok_or(TraceeError::Died(pid))?;
        threads[0].begin(ground, seat, batch)
    }

    fn finish_leader(&mut self, pid: PodPid, batch: &Batch) -> Result<(), TraceeError> {
        let Grown { threads, ground } = self.grown.get_mut(&pid).ok_or(TraceeError::Died(pid))?;
        threads[0].finish(ground, 0, batch).map(drop)
    }

    fn clone_threads(&mut self, all: &[&'a ProcessState]) -> Result<(), GrowError> {
        // Where a process may choose the numbers of its threads, and where it may not.
        let (free, bound): (Vec<&'a ProcessState>, Vec<&'a ProcessState>) =
            all.iter().copied().partition(|s| s.namespaces.of(Kind::User).is_none());
        let pieces_of = |state: &&'a ProcessState| {
            let pid = state.place.pid;
            state.further_threads().chunks(MOST).enumerate().map(move |(number, some)| (number, pid, some))
        };
        let mut pieces: Vec<_> = free.iter().flat_map(pieces_of).collect();
        // One after the other in each process.
        pieces.sort_by_key(|(number, ..)| *number);
        for round in pieces.chunk_by(|a, b| a.0 == b.0) {
            let mut left = round.iter().map(|(_, pid, some)| (*pid, *some)).peekable();
            while left.peek().is_some() {
                let broods = self.begin_broods(&mut left)?;
                self.await_broods(broods)?;
            }
        }
        for state in bound {
            self.clone_numbered(state)?;
        }
        let ended = all.iter().filter_map(|state| Some((state.place.pid, state.ended_leader.as_ref()?)));
        ended.into_iter().try_for_each(|(pid, ended)| self.end_leader(pid, ended))
    }

    /// Has processes begin to clone threads: as many as have room beside each other, each at a seat that nobody else has,
    /// for that is what tells their threads apart.
    fn begin_broods<'s>(
        &mut self,
        left: &mut std::iter::Peekable<impl Iterator<Item = (PodPid, &'s [ThreadState])>>,
    ) -> Result<Vec<Brood<'s>>, GrowError> {
        let room = (self.common.scratch.end - self.common.scratch.start) as usize / SEAT;
        let mut broods: Vec<Brood<'s>> = Vec::new();
        let mut seat = 0;
        while let Some((pid, threads)) = left.peek().copied() {
            let batch = clones(threads, true);
            let seats = batch.size().div_ceil(SEAT);
            if seat + seats > room && !broods.is_empty() {
                break;
            }
            left.next();
            self.begin_leader(pid, seat, &batch)?;
            self.has_others(pid);
            broods.push(Brood { pid, batch, seat, threads, born: threads.iter().map(|_| None).collect() });
            seat += seats;
        }
        Ok(broods)
    }

    /// The first thread of a process is not alone any more.
    fn has_others(&mut self, pid: PodPid) {
        if let Some(grown) = self.grown.get_mut(&pid) {
            grown.threads[0].alone = false;
        }
    }

    /// Waits until everybody has cloned its threads, and each of them has been heard of.
    fn await_broods(&mut self, mut broods: Vec<Brood<'_>>) -> Result<(), GrowError> {
        let mut cloning: HashMap<HostPid, usize> = HashMap::new();
        for (place, brood) in broods.iter().enumerate() {
            cloning.insert(self.host(brood.pid)?, place);
        }
        let mut unborn: usize = broods.iter().map(|brood| brood.threads.len()).sum();
        while unborn > 0 || !cloning.is_empty() {
            let (host, stop) = ptrace::wait_any().map_err(TraceeError::kernel("waiting for", PodPid(0)))?;
            let Some(place) = cloning.get(&host).copied() else {
                self.born_into(&mut broods, attached(host, stop)?)?;
                unborn -= 1;
                continue;
            };
            let Brood { pid, batch, seat, .. } = &broods[place];
            let Grown { threads, ground } = self.grown.get_mut(pid).ok_or(TraceeError::Died(*pid))?;
            if threads[0].is_marked(ground, stop)? {
                threads[0].results(ground, *seat, batch)?;
                cloning.remove(&host);
            }
        }
        for brood in broods {
            let grown = self.grown.get_mut(&brood.pid).ok_or(TraceeError::Died(brood.pid))?;
            grown.threads.extend(brood.born.into_iter().flatten());
        }
        Ok(())
    }

    /// A thread stands behind the call that made it.
    fn born_into(&self, broods: &mut [Brood<'_>], mut held: Held) -> Result<(), GrowError> {
        let died = TraceeError::Died(held.name.pod);
        let at = held.registers.r12;
        let seat = at.saturating_sub(self.common.scratch.start) as usize / SEAT;
        let place = broods.partition_point(|brood| brood.seat <= seat);
        let brood = place.checked_sub(1).and_then(|place| broods.get_mut(place));
        let Some(brood) = brood else { return Err(died.into()) };
        let ground = &self.grown.get(&brood.pid).ok_or(TraceeError::Died(brood.pid))?.ground;
        let call = ground.call_at(brood.seat, at).filter(|call| *call < brood.threads.len());
        let Some(call) = call else { return Err(died.into()) };
        let thread = &brood.threads[call];
        (held.name.pod, held.name.own) = (thread.tid, (brood.pid.0, thread.own_tid));
        brood.born[call] = Some(held);
        Ok(())
    }

    /// Clones the threads of a process in a user namespace, which must leave their numbers to others.
    fn clone_numbered(&mut self, state: &ProcessState) -> Result<(), GrowError> {
        let (pid, depth) = (state.place.pid, self.common.depth);
        for some in consecutive(state.further_threads()) {
            (self.around.number)(some[0].tid)?;
            self.run(pid, &clones(some, false))?;
            self.has_others(pid);
            let Some(grown) = self.grown.get_mut(&pid) else { return Err(TraceeError::Died(pid).into()) };
            for _ in some {
                let mut held = named_newborn(depth)?;
                let call = grown.ground.call_at(0, held.registers.r12);
                let thread = call.and_then(|call| some.get(call)).ok_or(TraceeError::Died(pid))?;
                if held.name.pod != thread.tid {
                    let what = format!("thread {} got the number {}", thread.tid, held.name.pod);
                    let source = std::io::Error::other(what);
                    return Err(RebuildError::Kernel { step: "numbering", object: "a thread".into(), source }.into());
                }
                (held.name.pod, held.name.own) = (thread.tid, (pid.0, thread.own_tid));
                grown.threads.push(held);
            }
        }
        if let Some(grown) = self.grown.get_mut(&pid) {
            let order: HashMap<PodPid, usize> = state.threads.iter().enumerate().map(|(i, t)| (t.tid, i)).collect();
            grown.threads.sort_by_key(|held| order.get(&held.name.pod).copied());
        }
        Ok(())
    }
}

fn clones(threads: &[ThreadState], is_free: bool) -> Batch {
    let flags = libc::CLONE_VM
        | libc::CLONE_FS
        | libc::CLONE_FILES
        | libc::CLONE_SIGHAND
        | libc::CLONE_THREAD
        | libc::CLONE_SYSVSEM
        | libc::CLONE_PTRACE;
    let mut batch = Batch::new();
    for thread in threads {
        clone_into(&mut batch, thread.tid, flags as u64, 0, is_free, "thread");
    }
    batch
}

/// Threads in pieces whose numbers follow each other.
fn consecutive(threads: &[ThreadState]) -> impl Iterator<Item = &[ThreadState]> {
    threads.chunk_by(|a, b| a.tid.0 + 1 == b.tid.0).flat_map(|run| run.chunks(MOST))
}
