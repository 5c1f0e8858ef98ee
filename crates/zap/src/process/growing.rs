//! The order in which processes grow: several at once. Each is given its memory, then forks its children, who grow when
//! it is done; their tracer begins what it can and goes on with whoever stops first.

use std::collections::{BTreeMap, BinaryHeap, HashMap, VecDeque};
use std::ops::Range;

use super::grow::births::{clone_into, named};
use super::grow::{Grove, GrowError, Grown};
use crate::files;
use crate::ids::{HostPid, PodPid};
use crate::memory::{self, MemoryBatch};
use crate::process::tree::{Plan, Role};
use crate::sys::ptrace::{self, Stop};
use crate::tracee::{Batch, TraceeError};

/// What a process does next.
enum Step {
    /// Makes something of its memory.
    Memory(MemoryBatch),
    /// Makes a session.
    Session(Batch),
    /// Forks children. Those that have not been heard of, the first one last.
    Fork(Batch, Vec<PodPid>),
}

impl Step {
    fn batch(&self) -> &Batch {
        match self {
            Step::Memory(memory) => &memory.batch,
            Step::Session(batch) | Step::Fork(batch, _) => batch,
        }
    }
}

/// A process that grows: its steps, the first of which it does now.
struct Growing {
    pid: PodPid,
    steps: VecDeque<Step>,
}

/// Who grows, and who is to.
struct Nursery {
    /// How much there is to do for each process and all that descend from it.
    weights: BTreeMap<PodPid, u64>,
    /// Not begun, whoever has most before it first: it would be the last to be done. With the parent whose memory it has.
    waiting: BinaryHeap<(u64, PodPid, Option<PodPid>)>,
    running: HashMap<HostPid, Growing>,
    /// They have forked children that have not been heard of.
    expecting: Vec<Growing>,
}

impl Grove<'_> {
    /// Grows everything that descends from the adopted seeds: memory, children, sessions.
    pub fn grow(&mut self) -> Result<(), GrowError> {
        let weights = self.weights();
        let mut nursery =
            Nursery { weights, waiting: BinaryHeap::new(), running: HashMap::new(), expecting: Vec::new() };
        nursery.welcome(self.plan.seeds.iter().copied().filter(|seed| !self.apart.contains(seed)), None);
        // One more than there are processors, or one would idle while their tracer thinks.
        let most = 1 + std::thread::available_parallelism().map_or(1, usize::from);
        loop {
            while nursery.running.len() < most {
                let Some((_, pid, inherited)) = nursery.waiting.pop() else { break };
                let steps = self.steps(pid, inherited)?;
                self.go_on(&mut nursery, Growing { pid, steps })?;
            }
            if nursery.running.is_empty() && nursery.expecting.is_empty() {
                return self.grow_apart();
            }
            let (host, stop) = ptrace::wait_any().map_err(TraceeError::kernel("waiting for", PodPid(0)))?;
            match nursery.running.remove(&host) {
                Some(growing) => self.heard(&mut nursery, host, growing, stop)?,
                None => self.born(&mut nursery, host, stop)?,
            }
        }
    }

    /// What there is to do for a process, in bytes to fill, and something for being there.
    fn weights(&self) -> BTreeMap<PodPid, u64> {
        const SOMETHING: u64 = 64 << 10;
        let mut order: Vec<PodPid> = self.plan.seeds.clone();
        let mut at = 0;
        while let Some(pid) = order.get(at) {
            order.extend(children(self.plan, *pid));
            at += 1;
        }
        let mut weights = BTreeMap::new();
        for pid in order.iter().rev() {
            let own = self.states.get(pid).map_or(0, |state| state.memory.stored_bytes());
            let theirs: u64 = children(self.plan, *pid).filter_map(|child| weights.get(&child)).sum();
            weights.insert(*pid, SOMETHING + own + theirs);
        }
        weights
    }

    /// All that a process does. `inherited` is the process that it was forked by, whose memory it has.
    fn steps(&self, pid: PodPid, inherited: Option<PodPid>) -> Result<VecDeque<Step>, GrowError> {
        let node = &self.plan.nodes[&pid];
        let mut steps = VecDeque::new();
        if node.role == Role::Live {
            steps.extend(self.memory_batches(pid, inherited)?.into_iter().map(Step::Memory));
        }
        steps.extend(self.forks(&node.before)?);
        if node.leads_session {
            steps.push_back(Step::Session(self.session(pid)));
        }
        steps.extend(self.forks(&node.after)?);
        Ok(steps)
    }

    pub(super) fn memory_batches(&self, pid: PodPid, forker: Option<PodPid>) -> Result<Vec<MemoryBatch>, GrowError> {
        let Some(state) = self.states.get(&pid).copied().filter(|state| !state.sharing.memory) else {
            return Ok(Vec::new());
        };
        let forker = forker.filter(|forker| state.place.cloner() == *forker);
        let inherited = forker.and_then(|pid| self.owner(pid)).map(|state| &state.memory);
        let host = self.host(pid)?;
        let current: Vec<Range<u64>> = match inherited {
            // Just forked: what its parent was given.
            Some(parent) => {
                let vdso = parent.vdso.iter().map(|vdso| vdso.range());
                // In order of addresses: the vDSO of a program can lie anywhere among its mappings.
                let mut mapped: Vec<_> = parent.vmas.iter().map(|vma| vma.range()).chain(vdso).collect();
                mapped.sort_by_key(|range| range.start);
                mapped
            }
            None => {
                let mapped = memory::mappings(host).map_err(|_| TraceeError::Died(pid))?;
                mapped.iter().map(|mapping| mapping.start..mapping.end).collect()
            }
        };
        let target = memory::Target {
            state: &state.memory,
            current: &current,
            inherited,
            keep: self.common.code.start..self.common.scratch.end,
            pool: &|file| self.common.number(file),
            data: self.common.pool.data,
        };
        Ok(memory::rebuild_batches(&target)?)
    }

    pub(super) fn session(&self, pid: PodPid) -> Batch {
        let mut batch = Batch::new();
        batch.call(libc::SYS_setsid, [], "making a session");
        if let Some(terminal) = self.states.get(&pid).and_then(|state| state.terminal) {
            files::take_terminal(&mut batch, terminal.index);
        }
        batch
    }

    /// Of those that do not grow apart.
    fn forks(&self, children: &[PodPid]) -> Result<Vec<Step>, GrowError> {
        let together: Vec<PodPid> = children.iter().copied().filter(|child| !self.apart.contains(child)).collect();
        let fork = |some: &[PodPid]| {
            let mut batch = Batch::new();
            for child in some {
                clone_into(&mut batch, &self.newborn(*child, &[]), &self.numbering(None, &[], (*child, &[]))?);
            }
            Ok(Step::Fork(batch, some.iter().rev().copied().collect()))
        };
        together.chunks(256).map(fork).collect()
    }

    /// Begins the next step of a process; after the last its children may grow.
    fn go_on(&mut self, nursery: &mut Nursery, growing: Growing) -> Result<(), GrowError> {
        let Some(step) = growing.steps.front() else {
            let inherited = (self.plan.nodes[&growing.pid].role == Role::Live).then_some(growing.pid);
            let together = children(self.plan, growing.pid).filter(|child| !self.apart.contains(child));
            nursery.welcome(together, inherited);
            return Ok(());
        };
        let Grown { threads, ground } = self.grown.get_mut(&growing.pid).ok_or(TraceeError::Died(growing.pid))?;
        threads[0].begin(ground, 0, step.batch())?;
        nursery.running.insert(threads[0].name.host, growing);
        Ok(())
    }

    /// A process that grows has stopped.
    fn heard(&mut self, nursery: &mut Nursery, host: HostPid, growing: Growing, stop: Stop) -> Result<(), GrowError> {
        let Grown { threads, ground } = self.grown.get_mut(&growing.pid).ok_or(TraceeError::Died(growing.pid))?;
        let Some(step) = growing.steps.front() else { return Err(TraceeError::Died(growing.pid).into()) };
        if !threads[0].is_marked(ground, stop)? {
            nursery.running.insert(host, growing);
            return Ok(());
        }
        let results = threads[0].results(ground, 0, step.batch())?;
        if let Step::Memory(memory) = step {
            memory.check(&results)?;
        }
        nursery.expecting.push(growing);
        self.go_on_if_done(nursery)
    }

    /// Somebody stopped who was not known: a child, before its first instruction.
    fn born(&mut self, nursery: &mut Nursery, host: HostPid, stop: Stop) -> Result<(), GrowError> {
        let (held, _) = named(host, stop, self.common.depth)?;
        let child = held.name.pod;
        let ground = self.ground(host, child)?;
        self.grown.insert(child, Grown { threads: vec![held], ground });
        self.go_on_if_done(nursery)
    }

    /// Whoever has done a step, and sees its children if it forked some, goes on.
    fn go_on_if_done(&mut self, nursery: &mut Nursery) -> Result<(), GrowError> {
        let is_done = |growing: &mut Growing| growing.steps.front_mut().is_none_or(|step| is_done(step, &self.grown));
        for mut growing in nursery.expecting.extract_if(.., is_done).collect::<Vec<_>>() {
            growing.steps.pop_front();
            self.go_on(nursery, growing)?;
        }
        Ok(())
    }
}

/// Whether everybody is there whom a step makes.
fn is_done(step: &mut Step, grown: &BTreeMap<PodPid, Grown>) -> bool {
    let Step::Fork(_, missing) = step else { return true };
    while missing.last().is_some_and(|child| grown.contains_key(child)) {
        missing.pop();
    }
    missing.is_empty()
}

fn children(plan: &Plan, pid: PodPid) -> impl Iterator<Item = PodPid> {
    let node = &plan.nodes[&pid];
    node.before.iter().chain(&node.after).copied()
}

impl Nursery {
    fn welcome(&mut self, some: impl Iterator<Item = PodPid>, inherited: Option<PodPid>) {
        let weights = &self.weights;
        self.waiting.extend(some.map(|pid| (weights.get(&pid).copied().unwrap_or(0), pid, inherited)));
    }
}
