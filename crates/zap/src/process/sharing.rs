//! What processes share that are not threads of one: an address space, signal actions, a descriptor table, root and working
//! directory.
//!
//! Each is shared with whoever cloned the process, which is its parent, or a sibling (`CLONE_PARENT`; or a relative that was
//! adopted by the same process).

use std::cmp::Ordering;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;

use serde::{Deserialize, Serialize};

use crate::error::CaptureError;
use crate::ids::{HostPid, PodPid};
use crate::look::Subject;
use crate::process::discover::{Found, Population};
use crate::process::own_directories::Wanderer;
use crate::process::proc_files::parse_stat;
use crate::process::state::ProcessState;
use crate::process::vfork;
use crate::procfs;
use crate::sys::kcmp::{self, Shared};

/// What is shared, and what it is called. Handlers are never shared without memory.
const KINDS: [(Shared, &str); 4] = [
    (Shared::Memory, "its address space"),
    (Shared::Handlers, "its signal actions"),
    (Shared::Files, "its descriptor table"),
    (Shared::Fs, "its root and working directory"),
];
const MEMORY: usize = 0;
const HANDLERS: usize = 1;

/// What a process shares with whoever cloned it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharingState {
    /// The descriptor table (`CLONE_FILES`).
    pub files: bool,
    /// Root, working directory and umask (`CLONE_FS`).
    pub directories: bool,
    /// The address space (`CLONE_VM`): the process has none of its own in the image.
    #[serde(default)]
    pub memory: bool,
    /// Signal actions (`CLONE_SIGHAND`).
    #[serde(default)]
    pub handlers: bool,
}

impl SharingState {
    /// Whether it shares nothing.
    pub fn is_nothing(&self) -> bool {
        *self == SharingState::default()
    }

    /// The flags of the `clone(2)` that makes such a child.
    pub fn flags(self) -> i32 {
        let flag = |shared: bool, flag| if shared { flag } else { 0 };
        flag(self.files, libc::CLONE_FILES)
            | flag(self.directories, libc::CLONE_FS)
            | flag(self.memory, libc::CLONE_VM)
            | flag(self.handlers, libc::CLONE_SIGHAND)
    }

    fn note(&mut self, what: Shared) {
        match what {
            Shared::Memory => self.memory = true,
            Shared::Handlers => self.handlers = true,
            Shared::Files => self.files = true,
            _ => self.directories = true,
        }
    }
}

/// Refuses threads that have something of their own which is their process's ordinarily (`unshare(2)`), but for directories:
/// returns whoever has some. They stand still: one that ends has nothing any more.
pub fn check_threads(
    subject: &Subject,
    threads: impl Iterator<Item = Wanderer>,
) -> Result<Vec<Wanderer>, CaptureError> {
    const COMMON: [(Shared, &str); 2] = [
        (Shared::Files, "a descriptor table of its own (CLONE_FILES)"),
        (Shared::SemUndo, "a semaphore undo list of its own (CLONE_SYSVSEM)"),
    ];
    let mut wanderers = Vec::new();
    for (tid, thread) in threads {
        let is_own = |what| kcmp::shares(subject.host.0, thread.0, what).is_ok_and(|same| !same);
        if let Some((_, what)) = COMMON.into_iter().find(|(what, _)| is_own(*what)) {
            return Err(subject.refuse("a thread", format!("has {what}, which cannot be checkpointed yet")));
        }
        if is_own(Shared::Fs) {
            wanderers.push((tid, thread));
        }
    }
    Ok(wanderers)
}

/// Processes by what they share, those of each kind in the kernel's own order: so each is compared with a few.
#[derive(Clone, Debug, Default)]
pub struct Groups([Vec<Vec<HostPid>>; KINDS.len()]);

impl Groups {
    /// Of everybody that lives.
    pub fn of(population: &Population) -> Groups {
        let mut groups = Groups::default();
        let live = population.live.iter().filter(|found| found.stat.state != b'Z').map(|found| found.subject.host);
        for process in live {
            (0..KINDS.len()).filter(|kind| *kind != HANDLERS).for_each(|kind| groups.insert(kind, process));
        }
        groups.sort_handlers();
        groups
    }

    fn insert(&mut self, kind: usize, process: HostPid) {
        let groups = &mut self.0[kind];
        let compare = |group: &Vec<HostPid>| kcmp::compare(group[0].0, process.0, KINDS[kind].0).ok();
        // Whoever has ended meanwhile shares nothing.
        match groups.binary_search_by(|group| compare(group).unwrap_or(Ordering::Less)) {
            Ok(place) => groups[place].push(process),
            Err(place) => groups.insert(place, vec![process]),
        }
    }

    /// Handlers are compared among those alone that share memory.
    fn sort_handlers(&mut self) {
        self.0[HANDLERS].clear();
        let sharers: Vec<HostPid> = self.memory().flatten().copied().collect();
        sharers.into_iter().for_each(|process| self.insert(HANDLERS, process));
    }

    /// The processes of each address space that several have.
    pub fn memory(&self) -> impl Iterator<Item = &Vec<HostPid>> {
        self.shared(MEMORY)
    }

    fn shared(&self, kind: usize) -> impl Iterator<Item = &Vec<HostPid>> {
        self.0[kind].iter().filter(|group| group.len() > 1)
    }

    /// Brings the groups of address spaces up to date. `members` stand still; nobody of them waits in vfork(2). An address
    /// space comes to be shared by somebody who is new and has not executed a program.
    pub fn meet(&mut self, members: &[HostPid]) {
        let known: HashSet<HostPid> = self.0[MEMORY].iter().flatten().copied().collect();
        let is_new = |member: &&HostPid| !known.contains(member) && vfork::is_forked(**member);
        if members.iter().any(|member| is_new(&member)) || self.memory().next().is_some() {
            self.0[MEMORY].clear();
            members.iter().for_each(|member| self.insert(MEMORY, *member));
        }
    }

    /// Brings all the other groups up to date; those that stood alone are asked only if they are new.
    fn renew(&mut self, held: &[&Found]) {
        let hosts: HashMap<PodPid, HostPid> =
            held.iter().map(|found| (found.subject.pod, found.subject.host)).collect();
        let there: HashSet<HostPid> = hosts.values().copied().collect();
        for kind in (0..KINDS.len()).filter(|kind| ![MEMORY, HANDLERS].contains(kind)) {
            self.0[kind].retain(|group| group.len() == 1 && there.contains(&group[0]));
            let known: HashSet<HostPid> = self.0[kind].iter().flatten().copied().collect();
            for found in held.iter().filter(|found| !known.contains(&found.subject.host)) {
                self.insert_beside(kind, found.subject.host, hosts.get(&found.stat.parent).copied());
            }
        }
        self.sort_handlers();
    }

    /// The parent may have other things than when the groups were put in order.
    fn insert_beside(&mut self, kind: usize, process: HostPid, parent: Option<HostPid>) {
        let shares = |parent: &HostPid| kcmp::shares(process.0, parent.0, KINDS[kind].0).unwrap_or(false);
        let parent = parent.filter(shares);
        match self.0[kind].iter_mut().find(|group| parent.is_some_and(|parent| group.contains(&parent))) {
            Some(group) => group.push(process),
            None => self.insert(kind, process),
        }
    }

    /// Those that share something of a kind, as they were found.
    fn found<'f>(&self, kind: usize, found: &HashMap<HostPid, &'f Found>) -> Vec<Vec<&'f Found>> {
        let of = |group: &Vec<HostPid>| group.iter().filter_map(|process| found.get(process).copied()).collect();
        self.shared(kind).map(of).filter(|group: &Vec<&Found>| group.len() > 1).collect()
    }
}

/// Who is cloned by whom so that everybody shares what they share.
#[derive(Debug, Default)]
pub struct Kinship {
    /// Those that a sibling clones.
    cloners: BTreeMap<PodPid, PodPid>,
    shared: HashMap<PodPid, SharingState>,
}

impl Kinship {
    /// Of a pod that is held.
    pub fn of_held(init: HostPid, held: &[&Found], groups: &mut Groups) -> Result<Kinship, CaptureError> {
        groups.renew(held);
        Kinship::of(init, held.iter().copied(), groups)
    }

    /// Refuses those that share what a restart could not have them share.
    pub fn of<'f>(
        init: HostPid,
        live: impl Iterator<Item = &'f Found>,
        groups: &Groups,
    ) -> Result<Kinship, CaptureError> {
        let mut kinship = Kinship::default();
        if (0..KINDS.len()).all(|kind| groups.shared(kind).next().is_none()) {
            return Ok(kinship);
        }
        let found: HashMap<HostPid, &Found> = live.map(|found| (found.subject.host, found)).collect();
        let kinds: Vec<_> = (0..KINDS.len()).map(|kind| (kind, groups.found(kind, &found))).collect();
        for (kind, groups) in &kinds {
            groups.iter().try_for_each(|group| kinship.have_siblings_cloned(group, *kind))?;
        }
        for (kind, groups) in &kinds {
            groups.iter().try_for_each(|group| kinship.share(init, group, *kind))?;
        }
        Ok(kinship)
    }

    /// Whose parent is not one of those that it shares with is cloned by the eldest of them, its sibling.
    fn have_siblings_cloned(&mut self, group: &[&Found], kind: usize) -> Result<(), CaptureError> {
        let elders = elders(group);
        let Some((first, others)) = elders.split_first() else { return Ok(()) };
        for other in others {
            let alike = |found: &Found| (found.stat.parent, found.stat.exit_signal, found.level());
            if alike(other) == alike(first) && first.level() == 0 {
                self.cloners.entry(other.subject.pod).or_insert(first.subject.pod);
            } else {
                refuse(first, other, kind, ", which is no relative of its")?;
            }
        }
        Ok(())
    }

    fn share(&mut self, init: HostPid, group: &[&Found], kind: usize) -> Result<(), CaptureError> {
        let members: HashSet<PodPid> = group.iter().map(|found| found.subject.pod).collect();
        let is_cloned_by_one = |found: &&&Found| members.contains(&self.cloner(found));
        let (cloned, heads): (Vec<&Found>, Vec<&Found>) = group.iter().partition(is_cloned_by_one);
        let Some((first, others)) = heads.split_first() else { return Ok(()) };
        for other in others {
            refuse(first, other, kind, ", and other things with others")?;
        }
        // Nobody enters these together with others.
        let namespaces: &[&str] = match KINDS[kind].0 {
            Shared::Fs => &["ns/user", "ns/mnt"],
            Shared::Memory => &["ns/user", "ns/mnt", "ns/pid", "ns/time"],
            _ => &[],
        };
        let place = |process: HostPid| -> Vec<_> {
            namespaces.iter().map(|name| fs::read_link(process.proc(name)).ok()).collect()
        };
        let home = place(init);
        for found in group {
            if place(found.subject.host) != home {
                refuse(first, found, kind, " in namespaces of their own")?;
            }
            if found.ended.is_some() && kind == MEMORY {
                refuse(first, found, kind, ", and its first thread has ended")?;
            }
        }
        cloned.iter().for_each(|found| self.shared.entry(found.subject.pod).or_default().note(KINDS[kind].0));
        Ok(())
    }

    fn cloner(&self, found: &Found) -> PodPid {
        self.cloners.get(&found.subject.pod).copied().unwrap_or(found.stat.parent)
    }

    /// The sibling that clones a process; `None`: its parent does.
    pub fn cloner_of(&self, process: PodPid) -> Option<PodPid> {
        self.cloners.get(&process).copied()
    }

    /// What a process shares with whoever clones it.
    pub fn state_of(&self, process: PodPid) -> SharingState {
        self.shared.get(&process).copied().unwrap_or_default()
    }
}

/// Those of a group whose parents are not in it, by PID: the others descend from them.
fn elders<'f>(group: &[&'f Found]) -> Vec<&'f Found> {
    let members: HashSet<PodPid> = group.iter().map(|found| found.subject.pod).collect();
    let mut elders: Vec<&Found> = group.iter().copied().filter(|found| !members.contains(&found.stat.parent)).collect();
    elders.sort_by_key(|found| found.subject.pod);
    elders
}

/// Whose address space it is that a group has: who is made before the others.
pub fn eldest(group: &[&Found]) -> Option<PodPid> {
    elders(group).first().map(|found| found.subject.pod)
}

/// A child of vfork shares until it executes a program, and the hold waits for that. It may just have. Two processes that
/// are ending, and have given everything up already, share nothing: kcmp(2) finds their nothing the same.
fn refuse(one: &Found, other: &Found, kind: usize, how: &str) -> Result<(), CaptureError> {
    let (what, name) = KINDS[kind];
    let waits = [one, other].iter().any(|found| vfork::waits(found.subject.host));
    let is_same = kcmp::compare(one.subject.host.0, other.subject.host.0, what).ok() == Some(Ordering::Equal);
    // Asked after comparing: whoever has given something up was ending before.
    if waits || !is_same || [one, other].iter().any(|found| is_ending(found.subject.host)) {
        return Ok(());
    }
    let why = format!("is shared with process {}{how}, which cannot be checkpointed yet", one.subject.pod);
    Err(other.subject.refuse(name, why))
}

/// Whether a process is in exit(2) (`PF_EXITING` of the flags in `/proc/PID/stat`), or gone.
fn is_ending(process: HostPid) -> bool {
    const EXITING: u64 = 4;
    let stat = procfs::read_record(process.proc("stat")).ok().and_then(|bytes| parse_stat(&bytes));
    stat.is_none_or(|stat| stat.flags & EXITING != 0)
}

/// Whose address space each process of an image has: its own, unless it shares that of whoever cloned it.
pub fn owners(processes: &[ProcessState]) -> HashMap<PodPid, PodPid> {
    let cloners: HashMap<PodPid, PodPid> = processes
        .iter()
        .filter(|process| process.sharing.memory)
        .map(|process| (process.place.pid, process.place.cloner()))
        .collect();
    let owner = |process: &ProcessState| {
        let line = std::iter::successors(Some(process.place.pid), |pid| cloners.get(pid).copied());
        (process.place.pid, line.take(processes.len() + 1).last().unwrap_or(process.place.pid))
    };
    processes.iter().map(owner).collect()
}

/// How many processes have one address space at most.
pub fn most_sharers(processes: &[ProcessState]) -> usize {
    let mut counts: HashMap<PodPid, usize> = HashMap::new();
    owners(processes).into_values().for_each(|owner| *counts.entry(owner).or_default() += 1);
    counts.into_values().max().unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;

    /// A process that has ended, and that nobody has waited for.
    fn ended() -> Child {
        let child = Command::new("true").spawn().unwrap();
        let stat = HostPid(child.id() as i32).proc("stat");
        while parse_stat(&procfs::read_record(&stat).unwrap()).unwrap().state != b'Z' {
            std::thread::yield_now();
        }
        child
    }

    #[test]
    fn processes_that_have_nothing_left_share_nothing() {
        let mut children = [ended(), ended()];
        let [one, other] = children.each_ref().map(|child| HostPid(child.id() as i32));
        // The kernel compares pointers, and both are null.
        assert_eq!(kcmp::compare(one.0, other.0, Shared::Memory).unwrap(), Ordering::Equal);
        assert!(is_ending(one) && is_ending(other));
        assert!(!is_ending(HostPid(std::process::id() as i32)));
        children.iter_mut().for_each(|child| {
            child.wait().unwrap();
        });
        assert!(is_ending(one));
    }
}
