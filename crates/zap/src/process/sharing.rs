//! What processes share that are not threads of one: an address space, a descriptor table, root and working directory.

use std::cmp::Ordering;
use std::collections::HashSet;
use std::fs;

use serde::{Deserialize, Serialize};

use crate::error::CaptureError;
use crate::ids::{HostPid, PodPid};
use crate::process::discover::{Found, Population};
use crate::process::proc_files::parse_stat;
use crate::process::vfork;
use crate::procfs;
use crate::sys::kcmp::{self, Shared};

const KINDS: [(Shared, &str); 3] = [
    (Shared::Memory, "its address space"),
    (Shared::Files, "its descriptor table"),
    (Shared::Fs, "its root and working directory"),
];

/// What a process shares with its parent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharingState {
    /// The descriptor table (`CLONE_FILES`).
    pub files: bool,
    /// Root, working directory and umask (`CLONE_FS`).
    pub directories: bool,
}

impl SharingState {
    /// Whether it shares nothing.
    pub fn is_nothing(&self) -> bool {
        *self == SharingState::default()
    }

    /// The flags of the `clone(2)` that makes such a child.
    pub fn flags(self) -> i32 {
        let flag = |shared: bool, flag| if shared { flag } else { 0 };
        flag(self.files, libc::CLONE_FILES) | flag(self.directories, libc::CLONE_FS)
    }
}

/// What a held process shares with its parent, if that is in the pod.
pub fn capture(process: HostPid, parent: Option<HostPid>) -> SharingState {
    let shares = |what| parent.is_some_and(|parent| kcmp::shares(process.0, parent.0, what).unwrap_or(false));
    SharingState { files: shares(Shared::Files), directories: shares(Shared::Fs) }
}

/// Refuses processes that share what a restart could not have them share.
pub fn check(init: HostPid, population: &Population) -> Result<(), CaptureError> {
    for (what, name) in KINDS {
        // In the kernel's own order, so that each is compared with a few.
        let mut groups: Vec<Vec<&Found>> = Vec::with_capacity(population.live.len());
        for found in population.live.iter().filter(|found| found.stat.state != b'Z') {
            // Whoever has ended meanwhile shares nothing.
            match groups.binary_search_by(|group| compare(group[0], found, what).unwrap_or(Ordering::Less)) {
                Ok(place) => groups[place].push(found),
                Err(place) => groups.insert(place, vec![found]),
            }
        }
        let groups = groups.iter().filter(|group| group.len() > 1);
        groups.into_iter().try_for_each(|group| check_group(init, group, what, name))?;
    }
    Ok(())
}

/// A child is made so that it shares with its parent: the members of a group must be relatives without a gap.
fn check_group(init: HostPid, group: &[&Found], what: Shared, name: &str) -> Result<(), CaptureError> {
    let members: HashSet<PodPid> = group.iter().map(|found| found.subject.pod).collect();
    let mut eldest = group.iter().filter(|found| !members.contains(&found.stat.parent));
    let Some(first) = eldest.next() else { return Ok(()) };
    if let Shared::Memory = what {
        let mut others = group.iter().filter(|found| found.subject.pod != first.subject.pod);
        return others.try_for_each(|other| refuse(first, other, what, name, ""));
    }
    if let Some(other) = eldest.next() {
        return refuse(first, other, what, name, ", which is no relative of its");
    }
    // Nobody enters either kind together with others.
    let place = |process: HostPid| ["ns/user", "ns/mnt"].map(|name| fs::read_link(process.proc(name)).ok());
    match group.iter().find(|found| what == Shared::Fs && place(found.subject.host) != place(init)) {
        Some(found) => refuse(first, found, what, name, " in namespaces of their own"),
        None => Ok(()),
    }
}

/// A child of vfork shares until it executes a program, and the hold waits for that. It may just have. Two processes that
/// are ending, and have given everything up already, share nothing: kcmp(2) finds their nothing the same.
fn refuse(one: &Found, other: &Found, what: Shared, name: &str, how: &str) -> Result<(), CaptureError> {
    let waits = [one, other].iter().any(|found| vfork::waits(found.subject.host));
    let is_same = compare(one, other, what) == Some(Ordering::Equal);
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

fn compare(a: &Found, b: &Found, what: Shared) -> Option<Ordering> {
    kcmp::compare(a.subject.host.0, b.subject.host.0, what).ok()
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
