//! Growing a process tree again, out of seeds, by batches alone.
//!
//! A process is given its memory, then forks its children, so that pages which both still share are shared again.
//! Children are attached by the kernel (`CLONE_PTRACE`) and stop before their first instruction.

pub(super) mod births;
mod broods;
mod ends;
mod finishing;
mod furnish;
mod incomplete;

pub use incomplete::Incomplete;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

use crate::error::RebuildError;
use crate::files::{self, LateFiles};
use crate::ids::{FileId, HostPid, PodPid};
use crate::keepers::Kept;
use crate::namespaces::enter::Names;
use crate::namespaces::{Levels, NamespaceId};
use crate::process::credentials::CredentialsState;
use crate::process::state::{EndedState, ProcessState};
use crate::process::tree::Plan;
use crate::process::{filters, sharing, signals};
use crate::sys::ptrace;
use crate::tracee::{Batch, Ground, Held, ThreadName, TraceeError, seize};

/// What every process of a restart has in common.
#[derive(Clone, Debug)]
pub struct Common {
    /// Where the stub lies in every seed: one page.
    pub code: Range<u64>,
    /// Where batches go in every seed. Those that share an address space have a [part](PART) each.
    pub scratch: Range<u64>,
    /// The descriptors that every seed has.
    pub pool: Arc<Pool>,
    /// How many PID namespaces lie around the pod's.
    pub depth: usize,
    /// How many seccomp filters all processes have in common.
    pub filters: usize,
}

/// Bytes of scratch for the batches of a process.
pub const PART: u64 = 1 << 20;

impl Common {
    /// Where batches go in the processes that are in that place among those of their address space.
    fn part(&self, place: usize) -> Range<u64> {
        let start = self.scratch.start + place as u64 * PART;
        start..start + PART
    }

    /// The number of a file in the pool; −1 if it is not there.
    pub fn number(&self, file: FileId) -> i32 {
        self.pool.files.get(&file).copied().unwrap_or(-1)
    }

    /// Where a process gets a file for a descriptor.
    pub fn source(&self, file: FileId) -> files::Source {
        match self.pool.kept.get(&file) {
            Some(kept) => {
                let keeper = self.pool.keepers.get(kept.keeper).copied().unwrap_or(-1);
                files::Source::Kept { keeper, number: kept.number }
            }
            None => files::Source::Pool(self.number(file)),
        }
    }

    /// The number of a namespace in the pool; −1 if it is not there.
    fn namespace(&self, namespace: NamespaceId) -> i32 {
        self.pool.namespaces.get(&namespace).copied().unwrap_or(-1)
    }
}

/// The descriptors that the builder has opened, and every seed has.
#[derive(Clone, Debug, Default)]
pub struct Pool {
    /// Of the files of the image.
    pub files: HashMap<FileId, i32>,
    /// Of the namespaces made inside the pod.
    pub namespaces: HashMap<NamespaceId, i32>,
    /// Of the image's data.
    pub data: i32,
    /// Files that others keep.
    pub kept: HashMap<FileId, Kept>,
    /// Of the handles on them.
    pub keepers: Vec<i32>,
}

impl Pool {
    /// The first number above all of them.
    pub fn end(&self) -> i32 {
        let all = self.files.values().chain(self.namespaces.values()).chain(&self.keepers);
        all.fold(self.data, |last, number| last.max(*number)) + 1
    }
}

/// What a growing tree needs of others.
pub struct Surroundings<'a> {
    /// Files that are opened when every process exists.
    pub late: LateFiles,
    /// What users are called in user namespaces.
    pub names: Names<'a>,
    /// Who may do what to the namespaces made inside the pod.
    pub levels: Levels<'a>,
    /// Sees to it that the next process gets numbers: in the PID namespace of which this is the first process (0: the pod's).
    pub number: &'a Numberer<'a>,
}

/// Gives numbers to the next process.
pub type Numberer<'a> = dyn Fn(&[(PodPid, i32)]) -> Result<(), RebuildError> + 'a;

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

/// Where a growing process is that was not born in the pod's own user namespace, and who it is, as the pod names users.
#[derive(Clone)]
struct Abroad {
    user: NamespaceId,
    who: CredentialsState,
}

/// A tree that is growing. Belongs to the thread that made it.
pub struct Grove<'a> {
    /// What all have in common.
    pub common: Common,
    pub(super) plan: &'a Plan,
    pub(super) states: BTreeMap<PodPid, &'a ProcessState>,
    /// Whose address space each has.
    owners: HashMap<PodPid, PodPid>,
    /// Their places among the processes that have the same address space, where there are others.
    parts: HashMap<PodPid, usize>,
    /// How many of those are not done yet.
    sharers: HashMap<PodPid, usize>,
    /// The live children of each.
    children: HashMap<PodPid, Vec<&'a ProcessState>>,
    ended: BTreeMap<PodPid, &'a EndedState>,
    around: Surroundings<'a>,
    /// The processes made so far and held.
    pub(super) grown: BTreeMap<PodPid, Grown>,
    /// The processes that are stopped again: nobody holds them.
    stopped: BTreeMap<PodPid, HostPid>,
    /// Those that were born in a user namespace.
    abroad: HashMap<PodPid, Abroad>,
    /// The first processes of PID namespaces made inside the pod.
    first: HashMap<NamespaceId, PodPid>,
    /// Those that grow by themselves when all others have grown, and whoever is to be forked by them.
    pub(super) apart: HashSet<PodPid>,
    /// Parents, and children that go into a PID namespace which somebody else makes.
    entering: Vec<(PodPid, PodPid)>,
    /// Address spaces whose pages come later.
    pub(super) incomplete: Vec<Incomplete>,
    /// Which group a process joins, and what it calls it; who has.
    groups: HashMap<PodPid, (PodPid, i32)>,
    joined: HashSet<PodPid>,
    /// Those who lead a group in which others are, and are in another themselves.
    leavers: BTreeSet<PodPid>,
    /// Those of them that have made their groups.
    leading: HashSet<PodPid>,
}

/// Bytes of a seat: a batch takes as many as it needs.
const SEAT: usize = 256;
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
        let mut children: HashMap<PodPid, Vec<&ProcessState>> = HashMap::new();
        states.iter().for_each(|state| children.entry(state.place.parent).or_default().push(state));
        let owners = sharing::owners(states);
        let (mut parts, mut sharers): (HashMap<_, _>, HashMap<PodPid, usize>) = Default::default();
        for state in states {
            let count = sharers.entry(owners[&state.place.pid]).or_default();
            if *count > 0 {
                parts.insert(state.place.pid, *count);
            }
            *count += 1;
        }
        let states = states.iter().map(|state| (state.place.pid, state)).collect();
        let ended = ended.iter().map(|ended| (ended.place.pid, ended)).collect();
        let firsts = plan.nodes.values().filter(|node| node.is_first());
        Grove {
            common,
            plan,
            states,
            owners,
            parts,
            sharers,
            children,
            ended,
            around,
            grown: BTreeMap::new(),
            stopped: BTreeMap::new(),
            abroad: HashMap::new(),
            first: firsts.filter_map(|node| Some((node.namespace?, node.pid))).collect(),
            apart: plan.nodes.keys().copied().filter(|pid| births::is_apart(plan, *pid)).collect(),
            entering: Vec::new(),
            incomplete: Vec::new(),
            groups: plan.groups.iter().map(|(pid, group, own)| (*pid, (*group, *own))).collect(),
            joined: HashSet::new(),
            leavers: leavers(&plan.groups),
            leading: HashSet::new(),
        }
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
        let queued = self
            .states
            .get(&pid)
            .into_iter()
            .flat_map(|state| state.pending.iter().chain(state.threads.iter().flat_map(|thread| &thread.pending)));
        let mut ground = Ground::brought((host, pid), code, scratch, SEAT, signals::marker_beside(queued))?;
        ground.narrow(self.common.part(self.parts.get(&pid).copied().unwrap_or(0)));
        Ok(ground)
    }

    /// The process whose address space that of `pid` is, in the image.
    pub(super) fn owner(&self, pid: PodPid) -> Option<&'a ProcessState> {
        self.states.get(self.owners.get(&pid)?).copied()
    }

    fn run(&mut self, pid: PodPid, batch: &Batch) -> Result<crate::tracee::Results, TraceeError> {
        let grown = self.grown.get_mut(&pid).ok_or(TraceeError::Died(pid))?;
        grown.threads[0].run(&grown.ground, 0, batch)
    }

    pub(super) fn host(&self, pid: PodPid) -> Result<HostPid, TraceeError> {
        self.grown.get(&pid).map(|grown| grown.threads[0].name.host).ok_or(TraceeError::Died(pid))
    }

    /// Puts everybody into their groups, sets the foreground group of each terminal, and takes the terminal from those who
    /// were there before their session had it.
    pub fn join_groups(&mut self) -> Result<(), GrowError> {
        let members = self.plan.groups.iter().map(|(pid, ..)| *pid);
        let (leavers, others): (Vec<_>, Vec<_>) = members.partition(|pid| self.leavers.contains(pid));
        others.into_iter().chain(leavers).try_for_each(|pid| self.join_group(pid))?;
        let leaders: Vec<&ProcessState> = self.states.values().copied().filter(|s| s.terminal.is_some()).collect();
        for state in leaders {
            let Some(terminal) = state.terminal else { continue };
            let of_session = |other: &&&ProcessState| other.no_terminal && other.place.session == state.place.pid;
            let without: Vec<PodPid> = self.states.values().filter(of_session).map(|other| other.place.pid).collect();
            for pid in without {
                let mut batch = Batch::new();
                files::give_terminal_up(&mut batch, terminal.index);
                self.run(pid, &batch)?;
            }
            let Some(group) = terminal.foreground else { continue };
            let Some(member) = self.states.values().find(|other| other.place.group == group) else {
                continue; // its last process has ended: the terminal has no foreground group, as before
            };
            let inside = state.place.level().checked_sub(1).and_then(|level| member.place.inner.groups.get(level));
            let mut batch = Batch::new();
            files::set_foreground(&mut batch, terminal.index, inside.copied().unwrap_or(group.0));
            self.run(state.place.pid, &batch)?;
        }
        Ok(())
    }

    /// Has a process make the group of its number, which stays with others when it leaves.
    fn lead(&mut self, pid: PodPid) -> Result<(), GrowError> {
        if !self.leading.insert(pid) {
            return Ok(());
        }
        let mut batch = Batch::new();
        batch.call(libc::SYS_setpgid, [0i32.into(), 0i32.into()], format!("making process group {pid}"));
        Ok(self.run(pid, &batch).map(drop)?)
    }

    /// Puts a process into its group, unless it is there, after whoever leads the group.
    fn join_group(&mut self, pid: PodPid) -> Result<(), GrowError> {
        let Some(&(group, own)) = self.groups.get(&pid) else { return Ok(()) };
        if !self.joined.insert(pid) {
            return Ok(());
        }
        if self.leavers.contains(&group) {
            self.lead(group)?;
        } else if group != pid {
            self.join_group(group)?;
        }
        let mut batch = Batch::new();
        batch.call(libc::SYS_setpgid, [0i32.into(), own.into()], format!("joining process group {group}"));
        Ok(self.run(pid, &batch).map(drop)?)
    }

    /// The host's number of a process, thread, or process group whose leader has left.
    pub fn host_of(&self, pid: PodPid) -> Option<HostPid> {
        let process = |pid: PodPid| {
            let held = self.grown.get(&pid).map(|grown| grown.threads[0].name.host);
            held.or_else(|| self.stopped.get(&pid).copied())
        };
        let thread = || {
            let mut threads = self.grown.values().flat_map(|grown| &grown.threads);
            threads.find(|held| held.name.pod == pid).map(|held| held.name.host)
        };
        let group = || {
            let member = self.states.values().find(|state| state.place.group == pid)?;
            files::owner::group_of(process(member.place.pid)?)
        };
        process(pid).or_else(thread).or_else(group)
    }

    fn attributes(&self, state: &ProcessState) -> Batch {
        let mut batch = Batch::new();
        super::signals::restart_actions(&state.actions, &mut batch);
        super::finish::attributes(state, &mut batch);
        filters::restart(&state.filters[..state.shared_filters()], self.common.filters, &mut batch);
        batch
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

/// Those who have made a group, others of which are there, and have joined another.
fn leavers(groups: &[(PodPid, PodPid, i32)]) -> BTreeSet<PodPid> {
    let of: HashMap<PodPid, PodPid> = groups.iter().map(|(pid, group, _)| (*pid, *group)).collect();
    of.values().copied().filter(|leader| of.get(leader).is_some_and(|group| group != leader)).collect()
}
