//! How tasks come to be: cloned by batches, with their numbers, in PID namespaces of their own.
//!
//! A task is given a number in each PID namespace that it is in. Where its cloner has no right to choose one, because the
//! namespace belongs to a user namespace around its own, the builder sees to it that the next one is the right one.

use std::collections::BTreeMap;

use crate::error::RebuildError;
use crate::ids::{HostPid, PodPid};
use crate::namespaces::enter::{enter, enter_user};
use crate::namespaces::{Kind, NamespaceId};
use crate::process::credentials::{self, CredentialsState};
use crate::process::grow::ends::end;
use crate::process::grow::{Abroad, Grove, GrowError, Grown, PATIENTLY};
use crate::process::proc_files::Status;
use crate::process::state::Place;
use crate::process::tree::{Plan, Role};
use crate::sys::ptrace::{self, Stop};
use crate::tracee::{Batch, Held, Seized, ThreadName, TraceeError};

/// A task that is to be cloned.
pub(in crate::process) struct Newborn<'n> {
    pub(super) pid: PodPid,
    /// Its numbers in PID namespaces made inside the pod, the outermost first.
    pub(super) inner: &'n [i32],
    pub(super) flags: i32,
    pub(super) exit_signal: u64,
    /// What it is, in messages.
    pub(super) what: &'static str,
}

/// Who numbers a task.
pub(in crate::process) struct Numbering {
    /// The numbers that its cloner may choose, the innermost first.
    chosen: Vec<i32>,
    /// The others, the innermost first: the first process of the PID namespace (0: the pod's), and the number.
    asked: Vec<(PodPid, i32)>,
}

impl Numbering {
    /// Whether its cloner may choose every number.
    pub(super) fn is_free(&self) -> bool {
        self.asked.is_empty()
    }

    /// Numbers that are asked for, beside others that do not matter.
    pub(super) fn asking(asked: Vec<(PodPid, i32)>) -> Numbering {
        Numbering { chosen: Vec::new(), asked }
    }

    /// How many numbers are to be asked for.
    pub(super) fn asked(&self) -> usize {
        self.asked.len()
    }
}

impl Grove<'_> {
    /// Who numbers a task with these numbers in these PID namespaces, when somebody who has every capability in the user
    /// namespace `user` clones it.
    pub(in crate::process) fn numbering(
        &self,
        user: Option<NamespaceId>,
        line: &[NamespaceId],
        (pid, inner): (PodPid, &[i32]),
    ) -> Result<Numbering, RebuildError> {
        let levels = self.around.levels;
        let inside = line.iter().zip(inner).rev().map(|(id, number)| (Some(*id), *number));
        let (mut chosen, mut asked) = (Vec::new(), Vec::new());
        for (namespace, number) in inside.chain([(None, pid.0)]) {
            let owner = namespace.and_then(|id| levels.owner(id));
            match namespace {
                _ if asked.is_empty() && levels.rules(user, owner) => chosen.push(number),
                None => asked.push((PodPid(0), number)),
                Some(id) => asked.push((self.first_of(id)?, number)),
            }
        }
        Ok(Numbering { chosen, asked })
    }

    /// The first processes of all PID namespaces made inside the pod.
    pub fn firsts(&self) -> Vec<(NamespaceId, PodPid)> {
        self.first.iter().map(|(namespace, first)| (*namespace, *first)).collect()
    }

    /// The first process of a PID namespace.
    pub(super) fn first_of(&self, namespace: NamespaceId) -> Result<PodPid, RebuildError> {
        let missing = || RebuildError::Damaged(format!("the first process of namespace {} is not in it", namespace.0));
        self.first.get(&namespace).copied().ok_or_else(missing)
    }

    /// What a process or thread is called in a PID namespace; 0: nothing.
    pub(super) fn seen_from(&self, namespace: Option<NamespaceId>, pid: PodPid) -> i32 {
        let Some(namespace) = namespace else { return pid.0 };
        let number = |own: Option<NamespaceId>, inner: &[i32]| {
            let line = self.around.levels.line(own);
            let level = line.iter().position(|id| *id == namespace);
            level.and_then(|level| inner.get(level).copied()).unwrap_or(0)
        };
        if let Some(node) = self.plan.nodes.get(&pid) {
            return number(node.namespace, &node.numbers);
        }
        let mut threads =
            self.states.values().flat_map(|state| state.threads.iter().map(move |thread| (state, thread)));
        let found = threads.find(|(_, thread)| thread.tid == pid);
        found.map_or(0, |(state, thread)| number(state.place.inner.namespace, &thread.inner))
    }

    /// Clones one task, which stands still before its first instruction.
    pub(super) fn clone_one(
        &mut self,
        cloner: PodPid,
        line: &[NamespaceId],
        newborn: &Newborn<'_>,
    ) -> Result<Held, GrowError> {
        let numbering = self.numbering(self.user_of(cloner), line, (newborn.pid, newborn.inner))?;
        self.ask_numbers(&numbering)?;
        let mut batch = Batch::new();
        clone_into(&mut batch, newborn, &numbering);
        self.run(cloner, &batch)?;
        let (held, numbers) = named_newborn(self.common.depth)?;
        check_numbers(newborn, &numbers)?;
        Ok(held)
    }

    /// Sees to it that the next task gets the numbers that its cloner may not choose.
    pub(super) fn ask_numbers(&self, numbering: &Numbering) -> Result<(), RebuildError> {
        if numbering.is_free() { Ok(()) } else { (self.around.number)(&numbering.asked) }
    }

    /// Has a process fork children; those that go into a PID namespace which exists already are left for
    /// [`Grove::grow_entered`].
    pub(super) fn fork(&mut self, pid: PodPid, children: &[PodPid]) -> Result<(), GrowError> {
        let plan = self.plan;
        let own = plan.nodes[&pid].namespace;
        let (mut batch, mut count) = (Batch::new(), 0);
        for child in children {
            let node = &plan.nodes[child];
            if node.is_first() {
                self.run_births(pid, &mut batch, &mut count)?;
                self.fork_first(pid, *child)?;
            } else if node.namespace != own {
                self.entering.push((pid, *child));
            } else {
                let newborn = self.newborn(*child, &node.numbers);
                let line = self.around.levels.line(own);
                let numbering = self.numbering(self.user_of(pid), &line, (*child, &node.numbers))?;
                if !numbering.is_free() || count == 256 {
                    self.run_births(pid, &mut batch, &mut count)?;
                }
                self.ask_numbers(&numbering)?;
                clone_into(&mut batch, &newborn, &numbering);
                count += 1;
                if !numbering.is_free() {
                    self.run_births(pid, &mut batch, &mut count)?;
                }
            }
        }
        self.run_births(pid, &mut batch, &mut count)
    }

    pub(in crate::process) fn newborn<'n>(&self, pid: PodPid, inner: &'n [i32]) -> Newborn<'n> {
        let state = self.states.get(&pid);
        let shared = state.map_or(0, |state| state.sharing.flags());
        // The signal of a sibling's end is its cloner's.
        let (sibling, exit_signal) = match state.and_then(|state| state.place.cloner) {
            Some(_) => (libc::CLONE_PARENT, 0),
            None => (0, self.exit_signal(pid)),
        };
        Newborn { pid, inner, flags: libc::CLONE_PTRACE | shared | sibling, exit_signal, what: "process" }
    }

    fn run_births(&mut self, cloner: PodPid, batch: &mut Batch, count: &mut usize) -> Result<(), GrowError> {
        if *count == 0 {
            return Ok(());
        }
        self.run(cloner, &std::mem::take(batch))?;
        for _ in 0..std::mem::take(count) {
            let (held, numbers) = named_newborn(self.common.depth)?;
            let pid = held.name.pod;
            match self.plan.nodes.get(&pid) {
                Some(node) => check_numbers(&self.newborn(pid, &node.numbers), &numbers)?,
                None => return Err(misnumbered("process", PodPid(0), &numbers).into()),
            }
            self.settle_in(cloner, held)?;
        }
        Ok(())
    }

    /// Keeps a task that was just born, which is who its cloner is.
    fn settle_in(&mut self, cloner: PodPid, held: Held) -> Result<(), GrowError> {
        let pid = held.name.pod;
        if let Some(abroad) = self.abroad.get(&cloner).cloned() {
            self.abroad.insert(pid, abroad);
        }
        let ground = self.ground(held.name.host, pid)?;
        self.grown.insert(pid, Grown { threads: vec![held], ground });
        Ok(())
    }

    /// The signal that tells the parent of a process's end.
    fn exit_signal(&self, pid: PodPid) -> u64 {
        self.place(pid).map_or(libc::SIGCHLD, |place| place.exit_signal) as u64
    }

    /// Where a process of the image stands.
    pub(super) fn place(&self, pid: PodPid) -> Option<&Place> {
        let living = self.states.get(&pid).map(|state| &state.place);
        living.or_else(|| self.ended.get(&pid).map(|ended| &ended.place))
    }

    /// Who a process of the image is.
    fn credentials(&self, pid: PodPid) -> Option<&CredentialsState> {
        let living = self.states.get(&pid).and_then(|state| Some(&state.threads.first()?.credentials));
        living.or_else(|| self.ended.get(&pid).map(|ended| &ended.credentials))
    }

    /// Has a child make a PID namespace. It belongs to the user namespace of whoever makes it: if that is not where the
    /// parent is, a helper goes there, and clones the child for the parent.
    fn fork_first(&mut self, parent: PodPid, child: PodPid) -> Result<(), GrowError> {
        let node = &self.plan.nodes[&child];
        let line = self.around.levels.line(node.namespace);
        let owner = node.namespace.and_then(|id| self.around.levels.owner(id));
        if self.place(child).is_some_and(|place| place.own_group() == 0) {
            // It cannot join the group from where it is.
            self.join_group(parent)?;
        }
        let mut newborn = self.newborn(child, &node.numbers);
        newborn.flags |= libc::CLONE_NEWPID;
        if owner == self.user_of(parent) {
            let held = self.clone_one(parent, &line, &newborn)?;
            return self.settle_in(parent, held);
        }
        let Some((number, inside)) = node.helper.split_first() else {
            return Err(RebuildError::Damaged(format!("process {child} has no helper")).into());
        };
        let own = self.around.levels.line(self.plan.nodes[&parent].namespace);
        let helper =
            Newborn { pid: PodPid(*number), inner: inside, flags: libc::CLONE_PTRACE, what: "helper", ..newborn };
        let held = self.clone_one(parent, &own, &helper)?;
        self.settle_in(parent, held)?;
        self.go_to_owner(helper.pid, child, owner)?;
        // The kernel takes the signal from the helper.
        newborn.flags |= libc::CLONE_PARENT;
        newborn.exit_signal = 0;
        let held = self.clone_one(helper.pid, &line, &newborn)?;
        self.settle_in(helper.pid, held)?;
        let reaped = self.seen_from_level(parent, &helper);
        if let Some(mut grown) = self.grown.remove(&helper.pid) {
            end(&mut grown, 0)?;
        }
        self.abroad.remove(&helper.pid);
        let mut batch = Batch::new();
        batch.call(libc::SYS_wait4, [reaped.into(), 0u64.into(), PATIENTLY.into(), 0u64.into()], "reaping a helper");
        Ok(self.run(parent, &batch).map(drop)?)
    }

    /// What the parent of a helper calls it: both are in the same PID namespace.
    fn seen_from_level(&self, parent: PodPid, helper: &Newborn<'_>) -> i32 {
        match self.plan.nodes[&parent].numbers.len() {
            0 => helper.pid.0,
            level => helper.inner.get(level - 1).copied().unwrap_or(0),
        }
    }

    /// Takes a helper into the user namespace `owner`, as whoever `child` is, and before that into those of the child's
    /// namespaces that cannot be entered from there.
    fn go_to_owner(&mut self, helper: PodPid, child: PodPid, owner: Option<NamespaceId>) -> Result<(), GrowError> {
        let (levels, user) = (self.around.levels, self.user_of(helper));
        let Some(owner) = owner else {
            return Err(RebuildError::Damaged(format!("process {child} is in a PID namespace further out")).into());
        };
        let mut batch = Batch::new();
        if let Some(state) = self.states.get(&child) {
            let outside = |id| !levels.rules(Some(owner), levels.owner(id)) && levels.rules(user, levels.owner(id));
            enter(&state.namespaces, &outside, &|id| self.common.namespace(id), &mut batch);
        }
        let mut who = self.abroad.get(&helper).map(|abroad| abroad.who.clone()).unwrap_or_default();
        if let Some(credentials) = self.credentials(child).filter(|who| self.pass_for(helper, who, &mut batch)) {
            who = credentials.clone();
        }
        enter_user(self.common.namespace(owner), &mut batch);
        self.run(helper, &batch)?;
        self.abroad.insert(helper, Abroad { user: owner, who });
        Ok(())
    }

    /// The user namespace in which a growing process is.
    pub(super) fn user_of(&self, pid: PodPid) -> Option<NamespaceId> {
        self.abroad.get(&pid).map(|abroad| abroad.user)
    }

    /// Makes a growing process another user, where it is; it keeps its capabilities. False if that user has no name there.
    pub(super) fn pass_for(&self, pid: PodPid, who: &CredentialsState, batch: &mut Batch) -> bool {
        let Some(abroad) = self.abroad.get(&pid) else {
            credentials::identify(who, batch);
            return true;
        };
        if abroad.who.is_same_user(who) {
            return true;
        }
        let Some(named) = self.around.names.inside(abroad.user, who) else { return false };
        match abroad.who.groups == who.groups {
            // It may not have the right to set them.
            true => credentials::name(&named, batch),
            false => credentials::identify(&named, batch),
        }
        true
    }

    /// Grows, one after the other, those that grow by themselves; all others have grown.
    pub(in crate::process) fn grow_apart(&mut self) -> Result<(), GrowError> {
        let plan = self.plan;
        let seeds: Vec<PodPid> = plan.seeds.iter().copied().filter(|seed| self.apart.contains(seed)).collect();
        let parents: Vec<PodPid> = self.grown.keys().copied().filter(|pid| !seeds.contains(pid)).collect();
        for seed in seeds {
            self.grow_all(vec![(seed, None)])?;
        }
        for parent in parents {
            let node = &plan.nodes[&parent];
            let inherited = (node.role == Role::Live).then_some(parent);
            let children = node.before.iter().chain(&node.after).copied();
            for child in children.filter(|child| self.apart.contains(child)).collect::<Vec<_>>() {
                self.fork(parent, &[child])?;
                if self.grown.contains_key(&child) {
                    self.grow_all(vec![(child, inherited)])?;
                }
            }
        }
        self.grow_entered()
    }

    fn grow_all(&mut self, mut waiting: Vec<(PodPid, Option<PodPid>)>) -> Result<(), GrowError> {
        while let Some((pid, inherited)) = waiting.pop() {
            let node = &self.plan.nodes[&pid];
            if node.role == Role::Live {
                for memory in self.memory_batches(pid, inherited)? {
                    let results = self.run(pid, &memory.batch)?;
                    memory.check(&results)?;
                }
            }
            self.fork(pid, &node.before)?;
            if node.leads_session {
                let batch = self.session(pid);
                self.run(pid, &batch)?;
            }
            self.fork(pid, &node.after)?;
            let grown = &self.grown;
            let children = node.before.iter().chain(&node.after).rev().filter(|child| grown.contains_key(*child));
            waiting.extend(children.map(|child| (*child, (node.role == Role::Live).then_some(pid))));
        }
        Ok(())
    }

    /// Grows those that go into a PID namespace which somebody else has made: all are there now.
    fn grow_entered(&mut self) -> Result<(), GrowError> {
        while let Some((parent, child)) = self.entering.pop() {
            let node = &self.plan.nodes[&child];
            let line = self.around.levels.line(node.namespace);
            let newborn = self.newborn(child, &node.numbers);
            self.bear_in(parent, node.namespace)?;
            let held = self.clone_one(parent, &line, &newborn)?;
            self.settle_in(parent, held)?;
            self.bear_in(parent, self.plan.nodes[&parent].namespace)?;
            let inherited = self.states.contains_key(&parent).then_some(parent);
            self.grow_all(vec![(child, inherited)])?;
        }
        Ok(())
    }

    /// Sees to it that new processes get numbers behind those of the image: some were asked for, out of turn.
    pub fn number_on(&self) -> Result<(), RebuildError> {
        if self.first.is_empty() {
            return Ok(());
        }
        let mut last: BTreeMap<(usize, PodPid), i32> = BTreeMap::new();
        let tasks = self.plan.nodes.values().map(|node| (node.namespace, node.pid, &node.numbers));
        let threads = self.states.values().flat_map(|state| {
            state.threads.iter().map(|thread| (state.place.inner.namespace, thread.tid, &thread.inner))
        });
        for (namespace, pid, numbers) in tasks.chain(threads) {
            let line = self.around.levels.line(namespace);
            let inside = line.iter().zip(numbers).enumerate();
            for (level, (id, number)) in inside {
                let most = last.entry((level + 1, self.first_of(*id)?)).or_default();
                *most = (*most).max(*number);
            }
            let most = last.entry((0, PodPid(0))).or_default();
            *most = (*most).max(pid.0);
        }
        let asked: Vec<_> = last.into_iter().rev().map(|((_, first), number)| (first, number + 1)).collect();
        asked.chunks(16).try_for_each(|some| (self.around.number)(some))
    }

    /// Has the next children of a process be born in that PID namespace, which exists.
    pub(super) fn bear_in(&mut self, parent: PodPid, namespace: Option<NamespaceId>) -> Result<(), GrowError> {
        let own = self.plan.nodes[&parent].namespace;
        let member = match namespace {
            namespace if namespace == own => parent,
            Some(id) => self.first_of(id)?,
            None => return Err(RebuildError::Damaged(format!("process {parent} has children further out")).into()),
        };
        let mut batch = Batch::new();
        let number = self.seen_from(own, member);
        let handle = batch.call(libc::SYS_pidfd_open, [number.into(), 0u64.into()], "opening a first process");
        let handle = crate::tracee::Arg::ResultOf(handle);
        batch.call(libc::SYS_setns, [handle, Kind::Pid.flag().into()], "entering a PID namespace");
        batch.call(libc::SYS_close, [handle], "closing a first process");
        Ok(self.run(parent, &batch).map(drop)?)
    }
}

/// `struct clone_args`: a child or thread, attached to the tracer, with the numbers that its cloner may choose.
pub(in crate::process) fn clone_into(batch: &mut Batch, newborn: &Newborn<'_>, numbering: &Numbering) {
    let chosen: Vec<u8> = numbering.chosen.iter().flat_map(|number| number.to_ne_bytes()).collect();
    let count = numbering.chosen.len() as u64;
    let set_tid = batch.bytes(&chosen);
    let words: [u64; 11] = [newborn.flags as u64, 0, 0, 0, newborn.exit_signal, 0, 0, 0, 0, count, 0];
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let args = batch.bytes(&bytes);
    if count > 0 {
        batch.pointer(args, 8 * 8, set_tid);
    }
    let what = format!("making {} {}", newborn.what, newborn.pid);
    batch.call(libc::SYS_clone3, [args, size_of_val(&words).into()], what);
}

/// Refuses a task that got other numbers than it was to have; `numbers` begin with the pod's.
pub(super) fn check_numbers(newborn: &Newborn<'_>, numbers: &[i32]) -> Result<(), RebuildError> {
    match numbers.split_first() {
        Some((pid, inner)) if *pid == newborn.pid.0 && inner == newborn.inner => Ok(()),
        _ => Err(misnumbered(newborn.what, newborn.pid, numbers)),
    }
}

pub(super) fn misnumbered(what: &str, pid: PodPid, numbers: &[i32]) -> RebuildError {
    let source = std::io::Error::other(format!("it got the numbers {numbers:?}"));
    RebuildError::Kernel { step: "numbering", object: format!("{what} {pid}"), source }
}

/// Waits for a task that the kernel attached for us, and looks its numbers up: the pod's first.
pub(super) fn named_newborn(depth: usize) -> Result<(Held, Vec<i32>), TraceeError> {
    let (host, stop) = ptrace::wait_any().map_err(TraceeError::kernel("waiting for", PodPid(0)))?;
    named(host, stop, depth)
}

/// A task that the kernel attached for us, with its numbers: the pod's first.
pub(in crate::process) fn named(host: HostPid, stop: Stop, depth: usize) -> Result<(Held, Vec<i32>), TraceeError> {
    let mut held = attached(host, stop)?;
    let status = std::fs::read(host.proc("status"));
    let status = status.map_err(TraceeError::kernel("reading about", held.name.pod))?;
    let mut numbers = Status::new(status).namespace_pids();
    let numbers = numbers.split_off(depth.min(numbers.len()));
    let own = numbers.last().copied().unwrap_or(0);
    held.alone = true;
    (held.name.pod, held.name.own) = (PodPid(numbers.first().copied().unwrap_or(0)), (own, own));
    Ok((held, numbers))
}

/// A task that the kernel attached for us. Only its number on the host is known.
pub(super) fn attached(host: HostPid, stop: Stop) -> Result<Held, TraceeError> {
    let nobody = PodPid(0);
    if let Stop::Ended(_) = stop {
        return Err(TraceeError::Died(nobody));
    }
    Seized::newborn(ThreadName { host, pod: nobody, own: (0, 0) }).already_stopped()
}

/// Whether a process grows by itself: it is in a PID namespace of its own, or forks such a one before it makes a session.
pub(super) fn is_apart(plan: &Plan, pid: PodPid) -> bool {
    plan.nodes
        .get(&pid)
        .is_some_and(|node| node.namespace.is_some() || node.before.iter().any(|child| is_apart(plan, *child)))
}
