//! Whether what an image says can be: before anything is made of it. Checksums show damage; what somebody wrote on purpose,
//! or a defect did, they cover as well. What is not looked at here the kernel refuses when it is asked for.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::ops::Range;

use crate::files::FileState;
use crate::ids::{FileId, PodPid};
use crate::memory::{Backing, MemoryState, PAGE};
use crate::pod::{PodSpec, is_name};
use crate::process::state::{EndedState, Place, ProcessState};

/// The kernel's own bound of PIDs (`PID_MAX_LIMIT`).
const HIGHEST_PID: i32 = 1 << 22;
/// The kernel lets nobody have more (`sysctl_nr_open_max`).
const HIGHEST_DESCRIPTOR: i32 = (i32::MAX & -64) - 1;
/// Above it is no program's, also with five levels of page tables.
const HIGHEST_ADDRESS: u64 = 1 << 56;

/// What cannot be, in a few words.
pub(crate) fn check(
    spec: &PodSpec,
    processes: &[ProcessState],
    zombies: &[EndedState],
    files: &[FileState],
    data: u64,
) -> Result<(), String> {
    check_spec(spec)?;
    let places = processes.iter().map(|process| &process.place).chain(zombies.iter().map(|zombie| &zombie.place));
    check_tree(&places.collect::<Vec<_>>())?;
    check_threads(processes)?;
    check_sharing(processes)?;
    let known = distinct("a file", files.iter().map(|file| file.id))?;
    for process in processes {
        check_files(process, &known).and_then(|()| check_memory(&process.memory, data)).map_err(|what| {
            let pid = process.place.pid;
            format!("process {pid}: {what}")
        })?;
    }
    Ok(())
}

fn check_spec(spec: &PodSpec) -> Result<(), String> {
    if !is_name(&spec.name) {
        return Err(format!("{:?} is no name of a pod", spec.name));
    }
    let straight = |path: &std::path::Path| {
        path.is_absolute() && !path.components().any(|part| part == std::path::Component::ParentDir)
    };
    let paths = spec.binds.iter().flat_map(|bind| [&bind.source, &bind.target]).chain([&spec.root]);
    match paths.into_iter().find(|path| !straight(path)) {
        Some(path) => Err(format!("the path {path:?} is not absolute, or leads back")),
        None => Ok(()),
    }
}

/// All different, as a set.
fn distinct<T: Ord + Copy + Display>(what: &str, all: impl Iterator<Item = T>) -> Result<BTreeSet<T>, String> {
    let mut seen = BTreeSet::new();
    for one in all {
        if !seen.insert(one) {
            return Err(format!("{what} is there twice: {one}"));
        }
    }
    Ok(seen)
}

fn check_tree(places: &[&Place]) -> Result<(), String> {
    let pids = distinct("a process", places.iter().map(|place| place.pid))?;
    let possible = |pid: &PodPid| (2..=HIGHEST_PID).contains(&pid.0);
    if let Some(pid) = pids.iter().find(|pid| !possible(pid)) {
        return Err(format!("no process is called {pid}"));
    }
    let bounded = |pid: PodPid| (0..=HIGHEST_PID).contains(&pid.0);
    if let Some(place) = places.iter().find(|place| !bounded(place.group) || !bounded(place.session)) {
        return Err(format!("process {} is in group {} and session {}", place.pid, place.group, place.session));
    }
    let numbers = |place: &Place| {
        [&place.inner.pids, &place.inner.groups, &place.inner.sessions].map(|numbers| numbers.clone()).concat()
    };
    let wrong = |place: &&&Place| {
        let inner = &place.inner;
        let same = inner.pids.len() == inner.groups.len() && inner.pids.len() == inner.sessions.len();
        !same || numbers(place).iter().any(|number| !(0..=HIGHEST_PID).contains(number)) || inner.pids.contains(&0)
    };
    if let Some(place) = places.iter().find(wrong) {
        return Err(format!("process {} has numbers in namespaces that cannot be: {:?}", place.pid, place.inner));
    }
    check_ancestors(places)
}

/// Everybody descends from PID 1.
fn check_ancestors(places: &[&Place]) -> Result<(), String> {
    let parents: BTreeMap<PodPid, PodPid> = places.iter().map(|place| (place.pid, place.parent)).collect();
    let mut settled = BTreeSet::from([PodPid(1)]);
    for place in places {
        let mut path = Vec::new();
        let mut pid = place.pid;
        while settled.insert(pid) {
            path.push(pid);
            pid = *parents.get(&pid).ok_or_else(|| format!("process {pid}, a parent, is not there"))?;
        }
        if path.contains(&pid) {
            return Err(format!("process {pid} descends from itself"));
        }
    }
    Ok(())
}

fn check_threads(processes: &[ProcessState]) -> Result<(), String> {
    let threads = processes.iter().flat_map(|process| process.threads.iter().map(|thread| thread.tid));
    let tids = distinct("a thread", threads)?;
    let of_others = |process: &&ProcessState| {
        tids.contains(&process.place.pid) && !process.threads.iter().any(|thread| thread.tid == process.place.pid)
    };
    if let Some(process) = processes.iter().find(of_others) {
        return Err(format!("process {} is a thread of another", process.place.pid));
    }
    if let Some(process) = processes.iter().find(|process| process.threads.is_empty()) {
        return Err(format!("process {} has no threads", process.place.pid));
    }
    match tids.iter().find(|tid| !(2..=HIGHEST_PID).contains(&tid.0)) {
        Some(tid) => Err(format!("no thread is called {tid}")),
        None => Ok(()),
    }
}

/// Whoever shares memory has none of its own, and was cloned by somebody who has some; siblings are cloned by elder ones.
fn check_sharing(processes: &[ProcessState]) -> Result<(), String> {
    let parents: BTreeMap<PodPid, PodPid> =
        processes.iter().map(|process| (process.place.pid, process.place.parent)).collect();
    for ProcessState { place, sharing, memory, .. } in processes {
        let pid = place.pid;
        let is_sibling = |cloner: PodPid| parents.get(&cloner) == Some(&place.parent) && cloner < pid;
        if let Some(cloner) = place.cloner.filter(|cloner| !is_sibling(*cloner)) {
            return Err(format!("process {pid} was cloned by {cloner}"));
        }
        if sharing.memory && (!parents.contains_key(&place.cloner()) || *memory != MemoryState::default()) {
            return Err(format!("process {pid} shares memory with nobody, or has some of its own"));
        }
    }
    Ok(())
}

fn check_files(process: &ProcessState, known: &BTreeSet<FileId>) -> Result<(), String> {
    let numbers = distinct("a descriptor", process.descriptors.iter().map(|descriptor| descriptor.number))?;
    if let Some(number) = numbers.iter().find(|number| !(0..=HIGHEST_DESCRIPTOR).contains(*number)) {
        return Err(format!("no descriptor is called {number}"));
    }
    let mapped = process.memory.vmas.iter().filter_map(|vma| match vma.backing {
        Backing::Private { file, .. } | Backing::Shared { file, .. } | Backing::Ring { file, .. } => Some(file),
        _ => None,
    });
    let used = process.descriptors.iter().map(|descriptor| descriptor.file).chain(mapped);
    let used = used.chain([process.cwd]).chain(process.root).chain(process.directories_of_threads());
    let used = used.chain(process.memory.fields.exe);
    match { used }.find(|file| !known.contains(file)) {
        Some(file) => Err(format!("it has {file}, which is not there")),
        None => Ok(()),
    }
}

fn check_memory(memory: &MemoryState, data: u64) -> Result<(), String> {
    let mappings = memory.vmas.iter().map(|vma| vma.start..vma.end);
    in_order("mapping", mappings)?;
    in_order("run of pages", memory.pages.iter().map(|run| run.start..run.end))?;
    in_order("run of pages left behind", memory.left.iter().map(|run| run.start..run.end))?;
    in_order("guard", memory.guards.iter().cloned())?;
    let stored = |run: &crate::memory::PageRun| match run.source {
        crate::memory::PageSource::Data(offset) => {
            offset.checked_add(run.end - run.start).is_some_and(|end| end <= data.next_multiple_of(PAGE))
        }
        crate::memory::PageSource::Parent => true,
    };
    match memory.pages.iter().find(|run| !stored(run)) {
        Some(run) => Err(format!("pages at {:#x} are behind the end of the data", run.start)),
        None => Ok(()),
    }
}

/// Ranges of whole pages that follow on each other.
fn in_order(what: &str, ranges: impl Iterator<Item = Range<u64>>) -> Result<(), String> {
    let mut behind = 0;
    for Range { start, end } in ranges {
        let whole = start.is_multiple_of(PAGE) && end.is_multiple_of(PAGE);
        if !whole || start < behind || end <= start || end > HIGHEST_ADDRESS {
            return Err(format!("a {what} from {start:#x} to {end:#x}, after one that ends at {behind:#x}"));
        }
        behind = end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(pid: i32, parent: i32) -> Place {
        let [pid, parent] = [pid, parent].map(PodPid);
        Place {
            pid,
            parent,
            group: pid,
            session: pid,
            exit_signal: 17,
            ended: None,
            cloner: None,
            inner: Default::default(),
        }
    }

    fn tree(pairs: &[(i32, i32)]) -> Result<(), String> {
        let places: Vec<Place> = pairs.iter().map(|(pid, parent)| place(*pid, *parent)).collect();
        check_tree(&places.iter().collect::<Vec<_>>())
    }

    #[test]
    fn trees_that_cannot_be() {
        assert_eq!(tree(&[(2, 1), (3, 2), (9, 3), (4, 1)]), Ok(()));
        assert_eq!(tree(&[(2, 1), (2, 1)]), Err("a process is there twice: 2".into()));
        assert_eq!(tree(&[(3, 4), (4, 3)]), Err("process 3 descends from itself".into()));
        assert_eq!(tree(&[(3, 3)]), Err("process 3 descends from itself".into()));
        assert_eq!(tree(&[(3, 7)]), Err("process 7, a parent, is not there".into()));
        assert_eq!(tree(&[(-3, 1)]), Err("no process is called -3".into()));
        assert_eq!(tree(&[(1, 1)]), Err("no process is called 1".into()));
    }

    #[test]
    fn ranges_that_cannot_be() {
        let check = |ranges: &[(u64, u64)]| in_order("mapping", ranges.iter().map(|(start, end)| *start..*end)).is_ok();
        assert!(check(&[(0x1000, 0x2000), (0x2000, 0x4000)]));
        for wrong in [[(0x1000, 0x3000), (0x2000, 0x4000)], [(0x3000, 0x4000), (0x1000, 0x2000)]] {
            assert!(!check(&wrong));
        }
        for wrong in [(0x1000, 0x1000), (0x2000, 0x1000), (0x1001, 0x2000), (0x1000, !0xfff)] {
            assert!(!check(&[wrong]));
        }
    }

    #[test]
    fn names_and_paths_that_cannot_be() {
        let spec = |name: &str, root: &str| PodSpec { root: root.into(), ..PodSpec::new(name, &[]) };
        assert_eq!(check_spec(&spec("web", "/srv")), Ok(()));
        for (name, root) in [("../web", "/"), ("", "/"), (".", "/"), ("a/b", "/"), ("web", "srv"), ("web", "/srv/../x")]
        {
            assert!(check_spec(&spec(name, root)).is_err(), "{name} {root}");
        }
    }
}
