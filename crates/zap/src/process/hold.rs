//! Holding a whole pod: every thread of every process stands still, and each process has ground to act on.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

use crate::error::CaptureError;
use crate::files;
use crate::ids::{HostPid, PodPid};
use crate::kernel::{self, threads::Told};
use crate::memory::{self, Mapping, policy};
use crate::process::ahead::MemoryAhead;
use crate::process::capture::without_vdso;
use crate::process::crew::{Crew, Pending};
use crate::process::discover::{self, Found, PodProc, Zombie};
use crate::process::sharing::{self, Groups};
use crate::process::signals;
use crate::process::statuses::Statuses;
use crate::process::threads::Learned;
use crate::process::timers;
use crate::sys::{self, ptrace};
use crate::tracee::{Ground, Held, Preparing, Seized, Site, TraceeError, seize};

/// A process, all of its threads held by the calling thread.
pub struct HeldProcess {
    /// Who it is, as it was found.
    pub found: Found,
    /// Its threads, the leader first.
    pub threads: Vec<Held>,
    /// Where batches run in it.
    pub ground: Ground,
    /// Whether its address space is another process's as well, which stands for it.
    shares: bool,
    /// Whether it has an `io_uring` mapped.
    pub has_rings: bool,
    /// Its mappings; none if it shares them.
    layout: Layout,
    /// Those that may have a memory policy of their own, by their first addresses.
    pub asked_about: Vec<u64>,
    /// What was learned of its threads, but for the leader.
    pub learned: Vec<Learned>,
}

/// Mappings, the very ones that were noted ahead if they still are what they were, and the range of addresses among them that
/// is zap's.
pub type OwnLayout = (Layout, Range<u64>);

/// The mappings of a process.
type Layout = Arc<Vec<Mapping>>;

/// A process that its tracer holds, as everybody else sees it.
pub struct Standing {
    /// Who it is, as it was found.
    pub found: Found,
    /// How many threads it has.
    pub threads: usize,
    /// The stop signal of the group stop that it was found in.
    pub group_stop: Option<i32>,
}

/// What one tracer holds.
#[derive(Default)]
pub struct Share {
    seized: Vec<(Found, Vec<Seized>)>,
    /// The processes of each address space that several have.
    sharers: Vec<Vec<HostPid>>,
    pub(crate) held: Vec<HeldProcess>,
}

impl Share {
    /// The processes, and of each that has an address space of its own the mappings with their flags, and the range of
    /// addresses that is zap's. To be asked once.
    pub fn layouts(&mut self) -> impl Iterator<Item = (HostPid, PodPid, Option<OwnLayout>)> {
        self.held.iter_mut().map(|process| {
            let (subject, layout) = (&process.found.subject, std::mem::take(&mut process.layout));
            (subject.host, subject.pod, (!process.shares).then(|| (layout, process.ground.scratch())))
        })
    }
}

/// What a tracer does with the processes that it holds: something about each of them comes of it.
pub type Job<P, R> = fn(&mut Share, P) -> Result<Vec<(PodPid, R)>, HoldError>;

/// The tracers of a pod.
pub type Tracers = Crew<Share>;

/// A pod, all of its processes held by its tracers.
pub struct HeldPod {
    tracers: Tracers,
    /// Live processes, by PID.
    pub processes: Vec<Standing>,
    /// Processes that have ended and wait to be reaped.
    pub zombies: Vec<Zombie>,
    /// Who shares what with whom.
    pub groups: Groups,
}

/// Why a pod could not be held. What was held already is let go when its tracers end.
#[derive(Debug, thiserror::Error)]
pub enum HoldError {
    /// Looking failed.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// Holding failed.
    #[error(transparent)]
    Tracee(#[from] TraceeError),
}

/// The threads of a pod, seized while its cgroup is frozen; they stop once it is thawed.
pub struct SeizedPod {
    tracers: Tracers,
    zombies: Vec<Zombie>,
    groups: Groups,
}

/// Seizes every thread. The cgroup must be frozen, so that nobody comes or goes meanwhile. `opened` is what was opened of the
/// processes before, `groups` who shared what then.
pub fn seize_all(
    tracers: Tracers,
    init: HostPid,
    members: &[HostPid],
    (opened, mut groups): (&Arc<Statuses>, Groups),
) -> Result<SeizedPod, HoldError> {
    let (proc, depth) = (PodProc::new(init), discover::depth_of(init)?);
    let members: Vec<HostPid> = members.iter().copied().filter(|pid| *pid != init).collect();
    groups.meet(&members);
    let sharers: Arc<Vec<Vec<HostPid>>> = Arc::new(groups.memory().cloned().collect());
    let part = |members| Part { members, proc: proc.clone(), depth, opened: opened.clone(), sharers: sharers.clone() };
    let households = households(members, &sharers);
    let seized = tracers.begin(dealt(households, tracers.size(), opened).into_iter().map(part), seize_share);
    let listed = proc.processes();
    let mut live = seized.wait()?;
    live.sort_unstable();
    let zombies = discover::zombies(&proc, &listed?, &live)?;
    Ok(SeizedPod { tracers, zombies, groups })
}

/// Processes by address space.
fn households(members: Vec<HostPid>, sharers: &[Vec<HostPid>]) -> Vec<Vec<HostPid>> {
    let together: HashSet<HostPid> = sharers.iter().flatten().copied().collect();
    let alone = members.into_iter().filter(|process| !together.contains(process));
    sharers.iter().cloned().chain(alone.map(|process| vec![process])).collect()
}

/// Processes for each of `tracers`, so that all have about as many threads. Who has one address space has one tracer.
fn dealt(mut households: Vec<Vec<HostPid>>, tracers: usize, opened: &Statuses) -> Vec<Vec<HostPid>> {
    let mut parts: Vec<(usize, Vec<HostPid>)> = (0..tracers).map(|_| (0, Vec::new())).collect();
    let threads_of =
        |household: &Vec<HostPid>| household.iter().map(|process| opened.threads_of(*process)).sum::<usize>();
    households.sort_by_key(|household| std::cmp::Reverse(threads_of(household)));
    for household in households {
        if let Some((load, part)) = parts.iter_mut().min_by_key(|(load, _)| *load) {
            *load += threads_of(&household);
            part.extend(household);
        }
    }
    parts.into_iter().map(|(_, part)| part).collect()
}

/// What a tracer is to find and seize.
struct Part {
    members: Vec<HostPid>,
    proc: PodProc,
    depth: usize,
    opened: Arc<Statuses>,
    sharers: Arc<Vec<Vec<HostPid>>>,
}

fn seize_share(share: &mut Share, part: Part) -> Result<Vec<PodPid>, HoldError> {
    let Part { members, proc, depth, opened, sharers } = part;
    share.sharers = sharers.to_vec();
    let mut live = Vec::with_capacity(members.len());
    for host in members {
        let Some(found) = discover::find(&proc, host, depth, &opened)? else { continue };
        let threads = discover::threads_of_frozen(&found, &proc, depth)?;
        let seized = threads.into_iter().map(seize_one).collect::<Result<_, _>>()?;
        live.push(found.subject.pod);
        share.seized.push((found, seized));
    }
    Ok(live)
}

pub(crate) fn seize_one(name: crate::tracee::ThreadName) -> Result<Seized, TraceeError> {
    // Suspending filters is refused to a tracer that is under one itself; most pods' batches pass their filters anyway.
    match seize(name, ptrace::SUSPEND_SECCOMP | ptrace::TELL_CALLS) {
        Err(TraceeError::Kernel { source, .. }) if source.raw_os_error() == Some(libc::EPERM) => {
            seize(name, ptrace::TELL_CALLS)
        }
        other => other,
    }
}

impl SeizedPod {
    /// Waits until every thread has stopped, and prepares the ground of each process. The cgroup must be thawed.
    ///
    /// `ahead` is what is known of their memory from when they ran.
    pub fn wait(self, ahead: &Arc<MemoryAhead>) -> Result<HeldPod, HoldError> {
        let mut processes = self.tracers.begin(std::iter::repeat(ahead.clone()), stop_share).wait()?;
        processes.sort_by_key(|standing| standing.found.subject.pod);
        Ok(HeldPod { tracers: self.tracers, processes, zombies: self.zombies, groups: self.groups })
    }
}

/// Processes are prepared beside each other.
fn stop_share(share: &mut Share, ahead: Arc<MemoryAhead>) -> Result<Vec<Standing>, HoldError> {
    let mut stopped = Vec::with_capacity(share.seized.len());
    for (found, seized) in share.seized.drain(..) {
        let mut threads = seized.into_iter().map(Seized::wait).collect::<Result<Vec<Held>, _>>()?;
        if let [only] = &mut threads[..] {
            only.alone = true;
        }
        let likes = likes_of_leader(&found, &threads);
        refuse_dispatch(&found, threads.iter().filter(|held| !likes.contains_key(&held.name.host)))?;
        stopped.push((found, threads));
    }
    let households = gathered(stopped, &share.sharers);
    let mut prepared = Vec::with_capacity(households.len());
    for (mut first, mut others) in households {
        let begun = begin_to_prepare(&mut first, &mut others, Some(&ahead))?;
        prepared.push((first, others, begun));
    }
    let mut standing = Vec::with_capacity(prepared.len());
    let mut stand = |(found, threads): Stopped, ground, layout: Option<Layout>, has_rings| {
        let (shares, layout) = (layout.is_none(), layout.unwrap_or_default());
        let asked_about = policy::worth_asking(&layout);
        let group_stop = threads.first().and_then(|leader: &Held| leader.group_stop);
        standing.push(Standing { found: found.clone(), threads: threads.len(), group_stop });
        let learned = Vec::new();
        share.held.push(HeldProcess { found, threads, ground, shares, has_rings, layout, asked_about, learned });
    };
    for (mut first, others, begun) in prepared {
        let (ground, beside, layout) = begun.finish(&mut first, &others, Some(&ahead))?;
        let has_rings = layout.iter().any(|mapping| mapping.path == files::io_uring::LINK);
        stand(first, ground, Some(layout), has_rings);
        others.into_iter().zip(beside).for_each(|(other, ground)| stand(other, ground, None, has_rings));
    }
    Ok(standing)
}

/// A process, all of whose threads have stopped.
type Stopped = (Found, Vec<Held>);

/// Each address space: the process that stands for it, and the others that have it.
fn gathered(stopped: Vec<Stopped>, sharers: &[Vec<HostPid>]) -> Vec<(Stopped, Vec<Stopped>)> {
    if sharers.is_empty() {
        return stopped.into_iter().map(|process| (process, Vec::new())).collect();
    }
    let group_of = |(found, _): &Stopped| sharers.iter().position(|group| group.contains(&found.subject.host));
    let (together, alone): (Vec<Stopped>, Vec<Stopped>) = stopped.into_iter().partition(|one| group_of(one).is_some());
    let mut groups: BTreeMap<Option<usize>, Vec<Stopped>> = BTreeMap::new();
    together.into_iter().for_each(|process| groups.entry(group_of(&process)).or_default().push(process));
    let mut households: Vec<(Stopped, Vec<Stopped>)> = alone.into_iter().map(|one| (one, Vec::new())).collect();
    for mut group in groups.into_values() {
        let eldest = sharing::eldest(&group.iter().map(|(found, _)| found).collect::<Vec<_>>());
        let place = group.iter().position(|(found, _)| Some(found.subject.pod) == eldest).unwrap_or(0);
        let first = group.remove(place);
        households.push((first, group));
    }
    households
}

/// Threads of a process that the leader speaks for in all that the kernel does not tell, which none of them has run since.
pub(crate) type Likes = HashMap<HostPid, Told>;

/// Threads that a process has at least for its leader to speak for others.
const SEVERAL: usize = 2;

/// The threads that [are like](Told::is_like) the leader, with what the kernel tells of them, where it does. The leader's
/// system calls are its own affair only if it sees to none of them.
pub(crate) fn likes_of_leader(found: &Found, threads: &[Held]) -> Likes {
    let is_usual = found.level() == 0 && found.ended.is_none();
    let (Some(leader), true) = (threads.first(), is_usual && threads.len() >= SEVERAL) else { return Likes::new() };
    if !matches!(ptrace::dispatch(leader.name.host), Ok(None)) {
        return Likes::new();
    }
    let told = kernel::threads::of(found.subject.host).unwrap_or_default();
    let Some(first) = told.iter().find(|told| told.thread == leader.name.host).copied() else { return Likes::new() };
    let is_like = |told: &Told| told.thread != first.thread && told.is_like(&first);
    told.into_iter().filter(is_like).map(|told| (told.thread, told)).collect()
}

/// A thread that sees to its own calls lets those of a batch be made while its selector says so. Otherwise they would come
/// back to it as signals. Nobody can tell before it is held.
fn refuse_dispatch<'h>(found: &Found, mut threads: impl Iterator<Item = &'h Held>) -> Result<(), CaptureError> {
    const ALLOW: u8 = 0;
    let comes_back = |held: &&Held| {
        let Ok(Some(dispatch)) = ptrace::dispatch(held.name.host) else { return false };
        let mut selector = [1];
        let there = dispatch.selector..dispatch.selector.saturating_add(1);
        !(dispatch.selector != 0
            && sys::memory::read(held.name.host, &[there], &mut selector).is_ok_and(|read| read == 1)
            && selector == [ALLOW])
    };
    let Some(held) = threads.find(comes_back) else { return Ok(()) };
    Err(found.subject.refuse(
        format!("thread {}", held.name.pod),
        "is in code whose system calls come back to it (PR_SET_SYSCALL_USER_DISPATCH, as in Wine), which cannot be \
         checkpointed yet",
    ))
}

/// Bytes of a seat during a checkpoint, where a thread is asked a handful of questions.
pub(super) const QUESTIONS: usize = 2 << 10;
/// Bytes for the leader's batch, which asks for every signal action, and for 64 KiB of segments …
const LEADER: usize = 68 << 10;
/// … and for the flags of every descriptor, of which so many have room in that.
const FEW: usize = 256;
const DESCRIPTOR: usize = 80;

/// Prepares the ground of a process, of which these threads are held.
pub(super) fn prepare(process: &mut Stopped) -> Result<Ground, HoldError> {
    Ok(begin_to_prepare(process, &mut [], None)?.finish(process, &[], None)?.0)
}

/// A process whose ground is being prepared, and those that have the same address space.
struct Prepared {
    preparing: Preparing,
    layout: Layout,
    /// The parts of its scratch, the first process's first.
    parts: Vec<Range<u64>>,
    /// Whether a zap that died had been there.
    was_used: bool,
}

/// The mappings of a process, with their flags in a checkpoint: those that were noted `ahead`, if all of them are still there.
fn mappings_of(found: &Found, ahead: Option<&MemoryAhead>) -> Result<Layout, CaptureError> {
    let host = found.subject.host;
    let read = match ahead.map(|ahead| ahead.layout_of(host)) {
        None => memory::mappings(host),
        Some(Some(before)) if before.is_still(host) => return Ok(before.mappings.clone()),
        Some(_) => memory::layout_of(host),
    };
    read.map(Arc::new).map_err(|_| CaptureError::Vanished(found.subject.pod))
}

fn begin_to_prepare(
    first: &mut Stopped,
    others: &mut [Stopped],
    ahead: Option<&MemoryAhead>,
) -> Result<Prepared, HoldError> {
    let subject = &first.0.subject;
    let (host, pod) = (subject.host, subject.pod);
    let layout = mappings_of(&first.0, ahead)?;
    let vdso = vdso_of(&layout).ok_or_else(|| without_vdso(subject))?;
    let site = Site::find((host, pod), vdso.clone())?;
    for (_, threads) in std::iter::once(&mut *first).chain(&mut *others) {
        have_leave(threads, &site, &vdso)?;
    }
    let policies = policy::worth_asking(&layout).len() * policy::QUESTION;
    let sizes = [needs(first) + policies].into_iter().chain(others.iter().map(needs));
    let mut size = 0;
    let mut parts = Vec::with_capacity(1 + others.len());
    for part in sizes.map(|size| size.next_multiple_of(4096) as u64) {
        parts.push(size..size + part);
        size += part;
    }
    let scratch = gap(&layout, size).ok_or(TraceeError::NoRoom(pod))?;
    parts.iter_mut().for_each(|part| *part = scratch.start + part.start..scratch.start + part.end);
    let marker = marker(&first.0).ok_or(TraceeError::NoRoom(pod))?;
    let leader = first.1.first_mut().ok_or(CaptureError::Vanished(pod))?;
    let was_used = site.left_behind().is_some();
    let preparing = Ground::begin(leader, site, scratch, QUESTIONS, marker)?;
    Ok(Prepared { preparing, layout, parts, was_used })
}

/// Has threads leave what a zap that died has left behind, and the vDSO.
fn have_leave(threads: &mut Vec<Held>, site: &Site, vdso: &Range<u64>) -> Result<(), TraceeError> {
    if let Some(stub) = site.left_behind() {
        let held = std::mem::take(threads).into_iter().map(|held| held.finish_way_home(&stub));
        *threads = held.collect::<Result<_, _>>()?;
    }
    // On another kernel what is there could not be gone on with.
    if threads.iter().any(|held| vdso.contains(&held.registers.rip)) {
        *threads = std::mem::take(threads).into_iter().map(|held| held.leave(vdso)).collect::<Result<_, _>>()?;
    }
    Ok(())
}

/// Bytes of scratch that the batches of a process take, but for questions about its memory.
fn needs((found, threads): &Stopped) -> usize {
    let host = found.subject.host;
    // The size of the table, which has room for more, is known already; most tables are small.
    let table = found.status.field("FDSize").and_then(|size| size.parse().ok()).unwrap_or(usize::MAX);
    let descriptors = match table {
        0..=FEW => 0,
        // At most as many as it has room for, where nobody says how many there are.
        table => files::count(host).ok().flatten().unwrap_or(table.min(1 << 20)),
    };
    let timers = timers::count(host, &found.status) * timers::QUESTION;
    threads.len() * QUESTIONS + LEADER + descriptors * DESCRIPTOR + timers
}

impl Prepared {
    /// Waits until the ground is prepared: that of the first, those of the others, and the mappings.
    fn finish(
        self,
        (found, threads): &mut Stopped,
        others: &[Stopped],
        ahead: Option<&MemoryAhead>,
    ) -> Result<(Ground, Vec<Ground>, Layout), HoldError> {
        let leader = threads.first_mut().ok_or(CaptureError::Vanished(found.subject.pod))?;
        let mut ground = self.preparing.finish(leader)?;
        let beside = |((found, _), part): (&Stopped, &Range<u64>)| {
            let (host, pod) = (found.subject.host, found.subject.pod);
            ground.beside((host, pod), part.clone(), marker(found).ok_or(TraceeError::NoRoom(pod))?)
        };
        let others = others.iter().zip(&self.parts[1..]).map(beside).collect::<Result<_, _>>()?;
        ground.narrow(self.parts[0].clone());
        // What that zap had left is gone now.
        Ok((ground, others, if self.was_used { mappings_of(found, ahead)? } else { self.layout }))
    }
}

/// Where the vDSO is.
pub fn vdso_of(layout: &[Mapping]) -> Option<Range<u64>> {
    layout.iter().find(|mapping| mapping.path == b"[vdso]").map(|mapping| mapping.start..mapping.end)
}

/// The lowest addresses that nothing of `layout` uses, with some distance to their neighbours: a stack grows down.
pub fn gap(layout: &[Mapping], size: u64) -> Option<Range<u64>> {
    const FIRST: u64 = 0x1000_0000;
    const DISTANCE: u64 = 1 << 20;
    const TOP: u64 = 0x7fff_0000_0000;
    let mut start = FIRST;
    for range in layout {
        if range.end + DISTANCE <= start {
            continue;
        }
        if start + size + DISTANCE <= range.start {
            break;
        }
        start = start.max(range.end + DISTANCE);
    }
    (start + size <= TOP).then_some(start..start + size)
}

/// A signal that ends batches: not pending in this process. Should zap die before it is taken, it is best one that is
/// ignored; a program that handles every signal (as those in Go do) gets one that means little to it.
fn marker(found: &Found) -> Option<i32> {
    let pending = found.status.mask("ShdPnd") | found.status.mask("SigPnd");
    let ignored = signals::ignored_marker(pending | found.status.mask("SigCgt"));
    ignored.or_else(|| signals::handled_marker(pending))
}

impl HeldPod {
    /// How many threads there are.
    pub fn threads(&self) -> usize {
        self.processes.iter().map(|process| process.threads).sum()
    }

    /// Those that a stop signal has stopped.
    pub fn stopped(&self) -> Vec<HostPid> {
        let in_stop = |process: &&Standing| process.group_stop.is_some();
        self.processes.iter().filter(in_stop).map(|process| process.found.subject.host).collect()
    }

    /// Has every tracer do something with the processes that it holds.
    pub fn each<P: Clone + Send + 'static, R: Send + 'static>(&self, part: P, job: Job<P, R>) -> Answers<R> {
        Answers(self.tracers.begin(std::iter::repeat(part), job))
    }

    /// Clears every process of what a checkpoint put there; everybody is where they were, and still held.
    pub fn clear(self) -> Result<Cleared, HoldError> {
        self.tracers.begin(std::iter::repeat(()), clear_share).wait()?;
        Ok(Cleared { tracers: self.tracers })
    }
}

/// Answers about each process.
#[must_use = "the job is not done before its answers are here"]
pub struct Answers<R>(Pending<(PodPid, R)>);

impl<R> Answers<R> {
    /// Waits for them; in the order of [`HeldPod::processes`].
    pub fn wait(self) -> Result<Vec<R>, HoldError> {
        let mut all = self.0.wait()?;
        all.sort_by_key(|(pid, _)| *pid);
        Ok(all.into_iter().map(|(_, answer)| answer).collect())
    }
}

/// Should zap die between two steps, nobody may stand where nothing is any more.
fn clear_share(share: &mut Share, (): ()) -> Result<Vec<()>, HoldError> {
    let mut begun = Vec::with_capacity(share.held.len());
    for held in share.held.iter_mut().filter(|process| process.shares).flat_map(|process| &mut process.threads) {
        unless_dead(held.go_home())?;
    }
    for process in share.held.iter_mut().filter(|process| !process.shares) {
        let Some((leader, others)) = process.threads.split_first_mut() else { continue };
        for held in others {
            unless_dead(held.go_home())?;
        }
        if unless_dead(process.ground.begin_to_unmap(leader))? {
            begun.push(process);
        }
    }
    for HeldProcess { threads, ground, .. } in begun {
        unless_dead(ground.finish_unmapping(&mut threads[0]))?;
        unless_dead(threads[0].go_home())?;
        unless_dead(ground.erase())?;
    }
    Ok(Vec::new())
}

/// A pod whose threads are held where they were found.
#[must_use = "held threads must be let go"]
pub struct Cleared {
    tracers: Tracers,
}

impl Cleared {
    /// Lets everybody go on. The tracers, who have nothing left to do, end when they are dropped.
    pub fn let_go(self) -> Result<Tracers, HoldError> {
        self.tracers.begin(std::iter::repeat(()), let_go_share).wait()?;
        Ok(self.tracers)
    }
}

fn let_go_share(share: &mut Share, (): ()) -> Result<Vec<()>, HoldError> {
    let mut threads = share.held.drain(..).flat_map(|process| process.threads);
    threads.try_for_each(Held::let_go)?;
    Ok(Vec::new())
}

/// A process that somebody else killed meanwhile has nothing left to clear. Whether it lives.
fn unless_dead(result: Result<(), TraceeError>) -> Result<bool, TraceeError> {
    match result {
        Err(TraceeError::Died(_)) => Ok(false),
        other => other.map(|()| true),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_keeps_its_distance() {
        let mapping = |start, end| Mapping { start, end, ..Mapping::default() };
        let layout = [mapping(0x1000_0000, 0x1000_1000), mapping(0x1000_2000, 0x2000_0000)];
        assert_eq!(gap(&layout, 0x1000), Some(0x2010_0000..0x2010_1000));
        assert_eq!(gap(&[mapping(0x7000_0000_0000, 0x7fff_ffff_f000)], 0x1000), Some(0x1000_0000..0x1000_1000));
    }
}
