//! Looking at the processes of a pod that is held: their tracers ask them, while files and memory are looked at from here.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use crate::error::CaptureError;
use crate::files;
use crate::ids::{HostPid, PodPid};
use crate::look::Look;
use crate::memory::{self, LeftBehind, MemoryState, pages_of};
use crate::migrate::strategies::Strategy;
use crate::namespaces::Kind;
use crate::pod::Seccomp;
use crate::process::ahead::MemoryAhead;
use crate::process::capture::{self, Questions};
use crate::process::discover::{Found, PodProc};
use crate::process::hold::{HeldPod, HoldError, OwnLayout, Share, Standing};
use crate::process::own_directories;
use crate::process::sharing::Kinship;
use crate::process::state::ProcessState;
use crate::process::statuses::Statuses;

/// What is sent while more is read.
pub(super) const MUCH: usize = 32 << 20;

/// Everything about the processes that is known once all have answered.
pub(super) struct Looked {
    answers: Vec<capture::Answers>,
    directories: Vec<capture::Directories>,
    /// Of each process that has an address space of its own.
    memories: Vec<Option<memory::Captured>>,
    /// In whose place among them the address space of each process is.
    owners: Vec<usize>,
    kinship: Kinship,
}

/// Asks every process, and looks at its files and at the layout of its memory.
pub(super) fn processes(
    look: &mut Look<'_>,
    held: &HeldPod,
    ahead: Arc<MemoryAhead>,
    statuses: Arc<Statuses>,
) -> Result<Looked, HoldError> {
    capture::meet_namespaces(look, held.processes.iter().map(|process| &process.found.subject))?;
    let found: Vec<&Found> = held.processes.iter().map(|process| &process.found).collect();
    let kinship = Kinship::of_held(look.init, &found, &mut held.groups.clone())?;
    let forkers = capture::forkers(look, held, &kinship)?;
    let owners = owners(held, &forkers, &kinship);
    capture::check_births(look, held.processes.iter().map(|process| &process.found))?;
    let surveys = held.each(ahead, survey);
    let anybody = !matches!(look.spec.seccomp, Seccomp::Default);
    let rings = held.each(anybody, capture::refuse_registered_rings);
    let threads = held.each(statuses, capture::ask_threads);
    let looked = look_at_files(look, held);
    // Whatever went wrong, the tracers must have done what they were told.
    let (questions, directories) = match looked {
        Ok(looked) => looked,
        Err(error) => {
            let _ = (surveys.wait(), rings.wait(), threads.wait());
            return Err(error);
        }
    };
    let inherited = u32::from(!matches!(look.spec.seccomp, Seccomp::Unconfined));
    let answers = held.each((PodProc::new(look.init), inherited, Arc::new(questions)), capture::ask_processes);
    let memories = surveys.wait().and_then(|surveys| look_at_memory(look, held, surveys, (&forkers, &owners)));
    let (rings, threads, answers) = (rings.wait(), threads.wait(), answers.wait());
    let wanderers = rings.and(threads)?;
    let (mut answers, mut memories) = (answers?, memories?);
    for ((process, answers), wanderers) in held.processes.iter().zip(&mut answers).zip(wanderers) {
        let subject = &process.found.subject;
        let has_table = !kinship.state_of(subject.pod).files;
        let all = held.processes.iter().map(|process| process.found.subject.host);
        answers.place_threads(own_directories::look_at(look, (subject, has_table), &wanderers, all)?);
    }
    for (memory, answers) in memories.iter_mut().zip(&answers) {
        let Some(memory) = memory else { continue };
        memory.state.fields.brk = answers.brk;
        memory.state.keys = answers.keys;
        memory.state.note_policies(&answers.policies);
    }
    Ok(Looked { answers, directories, memories, owners, kinship })
}

/// Surveys the memory of the processes of a tracer.
fn survey(share: &mut Share, ahead: Arc<MemoryAhead>) -> Result<Vec<(PodPid, Option<memory::Survey>)>, HoldError> {
    let survey = |(host, pod, own): (HostPid, PodPid, Option<OwnLayout>)| {
        let Some((layout, scratch)) = own else { return Ok((pod, None)) };
        let survey = memory::survey(host, &layout, &[scratch], (ahead.of(host), ahead.untouched_by(host, &layout)))?;
        Ok((pod, Some(survey.with_touched(ahead.touched_by(host)))))
    };
    share.layouts().map(survey).collect()
}

/// Whose address space each process has, by their places.
fn owners(held: &HeldPod, forkers: &HashMap<PodPid, PodPid>, kinship: &Kinship) -> Vec<usize> {
    let places: HashMap<PodPid, usize> =
        held.processes.iter().enumerate().map(|(place, process)| (process.found.subject.pod, place)).collect();
    let shares = |pid: &PodPid| kinship.state_of(*pid).memory;
    let owner = |process: &Standing| {
        let pid = process.found.subject.pod;
        let line = std::iter::successors(Some(pid), |pid| forkers.get(pid).copied().filter(|_| shares(pid)));
        line.last().and_then(|owner| places.get(&owner).copied()).unwrap_or_default()
    };
    held.processes.iter().map(owner).collect()
}

type Seen = (HashMap<PodPid, Questions>, Vec<capture::Directories>);

/// Descriptors and directories, from outside.
fn look_at_files(look: &mut Look<'_>, held: &HeldPod) -> Result<Seen, HoldError> {
    let mut stopped = stopped_children(held);
    let mut questions = HashMap::with_capacity(held.processes.len());
    let mut directories = Vec::with_capacity(held.processes.len());
    files::put_apart(look);
    for process in &held.processes {
        let subject = &process.found.subject;
        let descriptors = files::process_descriptors(look, subject, &capture::pidfd(subject)?)?;
        let stopped = stopped.remove(&subject.pod).unwrap_or_default();
        questions.insert(subject.pod, Questions { descriptors, stopped });
        directories.push(capture::directories(look, subject)?);
    }
    files::read_apart(look)?;
    Ok((questions, directories))
}

/// The stopped children of each process, and what it calls them.
fn stopped_children(held: &HeldPod) -> HashMap<PodPid, Vec<(PodPid, i32)>> {
    let mut children: HashMap<PodPid, Vec<(PodPid, i32)>> = HashMap::new();
    let mut stopped = held.processes.iter().filter(|process| process.group_stop.is_some()).peekable();
    if stopped.peek().is_none() {
        return children;
    }
    let levels: HashMap<PodPid, usize> =
        held.processes.iter().map(|process| (process.found.subject.pod, process.found.level())).collect();
    for Standing { found, .. } in stopped {
        let own = found.seen_from(levels.get(&found.stat.parent).copied().unwrap_or(0));
        children.entry(found.stat.parent).or_default().push((found.subject.pod, own));
    }
    children
}

/// Captures the layouts of every process, after whoever will fork it: pages that they share are stored once.
fn look_at_memory(
    look: &mut Look<'_>,
    held: &HeldPod,
    mut surveys: Vec<Option<memory::Survey>>,
    (forkers, owners): (&HashMap<PodPid, PodPid>, &[usize]),
) -> Result<Vec<Option<memory::Captured>>, HoldError> {
    let places: HashMap<PodPid, usize> =
        held.processes.iter().enumerate().map(|(place, process)| (process.found.subject.pod, place)).collect();
    let forker = |process: &Standing| places.get(forkers.get(&process.found.subject.pod)?).copied();
    let parents: Vec<Option<usize>> =
        held.processes.iter().map(|process| forker(process).map(|forker| owners[forker])).collect();
    let mut captured: Vec<Option<memory::Captured>> = surveys.iter().map(|_| None).collect();
    for place in in_order(&parents) {
        let Some(survey) = surveys[place].take() else { continue };
        let parent = parents[place].and_then(|parent| captured[parent].as_ref());
        let request = memory::Request { subject: &held.processes[place].found.subject, brk: 0, parent };
        captured[place] = Some(memory::capture(look, &request, survey)?);
    }
    Ok(captured)
}

/// Indexes such that parents come before their children.
fn in_order(parents: &[Option<usize>]) -> Vec<usize> {
    let mut children: Vec<Vec<usize>> = vec![Vec::new(); parents.len()];
    let mut order: Vec<usize> = Vec::with_capacity(parents.len());
    for (child, parent) in parents.iter().enumerate() {
        match parent {
            Some(parent) => children[*parent].push(child),
            None => order.push(child),
        }
    }
    let mut next = 0;
    while next < order.len() {
        order.extend_from_slice(&children[order[next]]);
        next += 1;
    }
    order
}

impl Looked {
    /// Reads the pages that are needed, of all processes at once. `sends`: the pod is held until they have arrived elsewhere.
    pub(super) fn read_pages(&mut self, look: &mut Look<'_>, held: &HeldPod, sends: bool) -> Result<(), HoldError> {
        let much = sends && memory::unread(self.memories.iter().flatten()) > MUCH;
        let all = self.memories.iter_mut().flatten();
        let unreadable = if much { memory::stream_all(look.data, all)? } else { memory::read_all(look.data, all)? };
        if !unreadable.is_empty() {
            let read = held.each(Arc::new(unreadable), capture::read_as_tracer).wait()?;
            memory::append_all(look.data, self.memories.iter_mut().flatten(), read);
        }
        Ok(())
    }

    /// Leaves pages behind that nobody needs at once.
    pub(super) fn leave_pages(
        &mut self,
        look: &Look<'_>,
        held: &HeldPod,
        left: &mut LeftBehind,
    ) -> Result<(), HoldError> {
        self.each_patient(look, held, |memory, at_once| Ok(memory.leave(at_once, left)?))
    }

    /// Has pages be put in place later that nobody needs at once, where that is worth it.
    pub(super) fn put_off_pages(
        &mut self,
        look: &Look<'_>,
        held: &HeldPod,
        strategy: &dyn Strategy,
    ) -> Result<(), HoldError> {
        let little = if strategy.needs_store() { memory::LITTLE } else { memory::LITTLE_IN_PLACE };
        self.each_patient(look, held, |memory, at_once| {
            memory.state.put_off(at_once, little);
            Ok(())
        })
    }

    /// The memory of every process that can wait for pages, and what of it must be there at once: what anybody shares with
    /// whoever forks it, and what a restart touches. In a user namespace of its own nobody may have the kernel wait.
    fn each_patient(
        &mut self,
        look: &Look<'_>,
        held: &HeldPod,
        mut act: impl FnMut(&mut memory::Captured, &[Range<u64>]) -> Result<(), HoldError>,
    ) -> Result<(), HoldError> {
        let inherited = pages_of(self.memories.iter().flatten().flat_map(|memory| memory.state.inherited()));
        let mut needed: Vec<Vec<Range<u64>>> = vec![Vec::new(); self.memories.len()];
        for (owner, answers) in self.owners.iter().zip(&self.answers) {
            needed[*owner].extend(answers.needed_at_once());
        }
        for ((memory, needed), process) in self.memories.iter_mut().zip(needed).zip(&held.processes) {
            let Some(memory) = memory else { continue };
            if look.namespaces.of(process.found.subject.host).of(Kind::User).is_none() {
                act(memory, &pages_of(inherited.iter().cloned().chain(needed)))?;
            }
        }
        Ok(())
    }

    /// Puts the parts of every process together.
    pub(super) fn assemble(self, look: &Look<'_>, held: &HeldPod) -> Result<Vec<ProcessState>, HoldError> {
        let news: Vec<PodPid> = self.answers.iter().flat_map(|answers| answers.news.iter().copied()).collect();
        let (locked, login) = (files::locked(look), capture::login_of(look.init));
        let parts = self.answers.into_iter().zip(self.directories).zip(self.memories);
        let mut states = Vec::with_capacity(held.processes.len());
        for (process, ((answers, directories), memory)) in held.processes.iter().zip(parts) {
            let locks = files::posix_locks(look, &process.found.subject, &answers.descriptors, &locked)?;
            let host = process.found.subject.host;
            let namespaces = (look.namespaces.of(host), look.namespaces.births_of(host));
            let pid = process.found.subject.pod;
            let memory = match memory {
                Some(memory) => memory.state,
                None if self.kinship.state_of(pid).memory => MemoryState::default(),
                None => return Err(CaptureError::Vanished(pid).into()),
            };
            let mut state = capture::assemble(process, answers, directories, locks, memory, namespaces, &self.kinship);
            // What zap's own processes have, a restart's have too.
            state.login = state.login.filter(|_| state.login != login);
            state.stop_is_news = news.contains(&state.place.pid);
            states.push(state);
        }
        Ok(states)
    }
}
