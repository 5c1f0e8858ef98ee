//! Processes that clone their threads beside each other.

use std::collections::HashMap;

use super::births::{Newborn, attached, clone_into};
use super::{Grove, GrowError, Grown, PART, SEAT};
use crate::ids::{HostPid, PodPid};
use crate::process::state::ProcessState;
use crate::process::threads::ThreadState;
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
pub(super) const MOST: usize = 256;

/// How a thread comes to be.
pub(super) const THREAD: i32 = libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM
    | libc::CLONE_PTRACE;

impl<'a> Grove<'a> {
    /// Has processes clone their threads, all of whose numbers they may choose.
    pub(super) fn clone_threads_beside(&mut self, some: &[&'a ProcessState]) -> Result<(), GrowError> {
        let pieces_of = |state: &&'a ProcessState| {
            let state: &'a ProcessState = state;
            state.further_threads().chunks(MOST).enumerate().map(move |(number, some)| (number, state, some))
        };
        let mut pieces: Vec<_> = some.iter().flat_map(pieces_of).collect();
        // One after the other in each process.
        pieces.sort_by_key(|(number, ..)| *number);
        for round in pieces.chunk_by(|a, b| a.0 == b.0) {
            let mut left = round.iter().map(|(_, state, some)| (*state, *some)).peekable();
            while left.peek().is_some() {
                let broods = self.begin_broods(&mut left)?;
                self.await_broods(broods)?;
            }
        }
        Ok(())
    }

    /// Has processes begin to clone threads: as many as have room beside each other, each at a seat that nobody else has,
    /// for that is what tells their threads apart.
    fn begin_broods(
        &mut self,
        left: &mut std::iter::Peekable<impl Iterator<Item = (&'a ProcessState, &'a [ThreadState])>>,
    ) -> Result<Vec<Brood<'a>>, GrowError> {
        let room = PART as usize / SEAT;
        let mut broods: Vec<Brood<'a>> = Vec::new();
        let mut seat = 0;
        while let Some((state, threads)) = left.peek().copied() {
            let (pid, batch) = (state.place.pid, self.clones(state, threads)?);
            let seats = batch.size().div_ceil(SEAT);
            if seat + seats > room && !broods.is_empty() {
                break;
            }
            left.next();
            let Grown { threads: held, ground } = self.grown.get_mut(&pid).ok_or(TraceeError::Died(pid))?;
            held[0].begin(ground, seat, &batch)?;
            held[0].alone = false;
            broods.push(Brood { pid, batch, seat, threads, born: threads.iter().map(|_| None).collect() });
            seat += seats;
        }
        Ok(broods)
    }

    fn clones(&self, state: &ProcessState, threads: &[ThreadState]) -> Result<Batch, GrowError> {
        let line = self.around.levels.line(state.place.inner.namespace);
        let user = state.namespaces.of(crate::namespaces::Kind::User);
        let mut batch = Batch::new();
        for thread in threads {
            let numbering = self.numbering(user, &line, (thread.tid, &thread.inner))?;
            let newborn =
                Newborn { pid: thread.tid, inner: &thread.inner, flags: THREAD, exit_signal: 0, what: "thread" };
            clone_into(&mut batch, &newborn, &numbering);
        }
        Ok(batch)
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
                unborn = unborn.checked_sub(1).ok_or(TraceeError::Died(PodPid(0)))?;
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
        let died = || TraceeError::Died(held.name.pod);
        let at = held.registers.r12;
        let seat = (at.saturating_sub(self.common.scratch.start) % PART) as usize / SEAT;
        let place = broods.partition_point(|brood| brood.seat <= seat);
        let brood = place.checked_sub(1).and_then(|place| broods.get_mut(place)).ok_or_else(died)?;
        let Grown { threads, ground } = self.grown.get(&brood.pid).ok_or(TraceeError::Died(brood.pid))?;
        let call = ground.call_at(brood.seat, at).filter(|call| *call < brood.threads.len()).ok_or_else(died)?;
        let (leader, thread) = (threads[0].name, &brood.threads[call]);
        (held.name.pod, held.name.own) = (thread.tid, (leader.own.0, thread.own_tid));
        brood.born[call] = Some(held);
        Ok(())
    }
}
