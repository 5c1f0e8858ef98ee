//! Which processes and threads a pod has.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::error::{CaptureError, Context};
use crate::ids::{HostPid, PodPid};
use crate::look::Subject;
use crate::process::proc_files::{Stat, Status, parse_stat};
use crate::process::statuses::Statuses;
use crate::procfs;
use crate::tracee::ThreadName;

/// The pod's own `/proc`, seen from the host: numbers in it are the pod's.
#[derive(Clone, Debug)]
pub struct PodProc(PathBuf);

impl PodProc {
    /// The `/proc` of the pod whose PID 1 is `init`.
    pub fn new(init: HostPid) -> PodProc {
        PodProc(init.proc("root/proc"))
    }

    /// The path of a file of a process.
    pub fn path(&self, pid: PodPid, name: &str) -> PathBuf {
        self.0.join(pid.0.to_string()).join(name)
    }

    /// Reads and parses `stat`.
    pub fn stat(&self, pid: PodPid) -> Result<Stat, CaptureError> {
        parsed(&read(&self.path(pid, "stat"), pid)?, pid)
    }

    /// Every process of the pod but PID 1, zombies too.
    pub fn processes(&self) -> Result<Vec<PodPid>, CaptureError> {
        let entries = fs::read_dir(&self.0).capturing("listing", "the pod's /proc")?;
        let numbers = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        let mut pids: Vec<PodPid> = numbers.filter(|pid| *pid != 1).map(PodPid).collect();
        pids.sort();
        Ok(pids)
    }
}

fn parsed(stat: &[u8], pid: PodPid) -> Result<Stat, CaptureError> {
    parse_stat(stat).ok_or_else(|| CaptureError::Unexpected {
        object: format!("/proc/{pid}/stat"),
        what: String::from_utf8_lossy(stat).into_owned(),
    })
}

fn read(path: &Path, pid: PodPid) -> Result<Vec<u8>, CaptureError> {
    procfs::read_record(path).map_err(|e| match is_gone(&e) {
        true => CaptureError::Vanished(pid),
        false => CaptureError::Kernel { step: "reading", object: path.display().to_string(), source: e },
    })
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH))
}

/// A live process of the pod.
#[derive(Clone, Debug)]
pub struct Found {
    /// Who it is.
    pub subject: Subject,
    /// `stat`, in the pod's numbers.
    pub stat: Stat,
    /// `status`, in the host's numbers.
    pub status: Status,
    /// Its numbers from the pod's PID namespace inwards; more than one if it is in a nested one.
    pub namespace_pids: Vec<i32>,
    /// Its first thread, if that has ended while others run: one of those stands for the process then, and what is the
    /// host's of `subject`, `stat` and `status` is that thread's.
    pub ended: Option<EndedLeader>,
}

/// The first thread of a process, which has ended.
#[derive(Clone, Debug)]
pub struct EndedLeader {
    /// What is left of it.
    pub zombie: Zombie,
    /// The thread that stands for the process.
    pub substitute: ThreadName,
}

impl Found {
    /// How many PID namespaces lie between the pod's and this process.
    pub fn level(&self) -> usize {
        self.namespace_pids.len().saturating_sub(1)
    }

    /// What it is called that many PID namespaces below the pod's.
    pub fn seen_from(&self, level: usize) -> i32 {
        self.namespace_pids.get(level).copied().unwrap_or(0)
    }
}

/// A process that has ended and that its parent has not waited for.
#[derive(Clone, Debug)]
pub struct Zombie {
    /// Its PID.
    pub pid: PodPid,
    /// `stat`, in the pod's numbers.
    pub stat: Stat,
    /// `status`, in the pod's numbers.
    pub status: Status,
}

impl Zombie {
    /// How many PID namespaces lie between the pod's and this process.
    pub fn level(&self) -> usize {
        self.status.namespace_pids().len().saturating_sub(1)
    }
}

/// Everybody in a pod.
#[derive(Clone, Debug, Default)]
pub struct Population {
    /// Live processes, by PID in the pod.
    pub live: Vec<Found>,
    /// Zombies, by PID in the pod.
    pub zombies: Vec<Zombie>,
}

impl Population {
    /// How many threads they have, all together.
    pub fn threads(&self) -> u64 {
        let of = |found: &Found| found.status.field("Threads").and_then(|threads| threads.parse::<u64>().ok());
        self.live.iter().filter_map(of).sum()
    }
}

/// The namespaces' numbers of a task, the pod's first: what `NSpid` says without the numbers of namespaces around the pod.
fn pod_numbers(status: &Status, depth: usize) -> Vec<i32> {
    status.namespace_pids().split_off(depth.min(status.namespace_pids().len()))
}

/// How many PID namespaces lie around the pod's, seen from ours.
pub fn depth_of(init: HostPid) -> Result<usize, CaptureError> {
    let status = Status::new(read(&init.proc("status"), PodPid(1))?);
    Ok(status.namespace_pids().len().saturating_sub(1))
}

/// Finds everybody. `members` are the host PIDs in the pod's cgroup.
pub fn discover(init: HostPid, members: &[HostPid]) -> Result<Population, CaptureError> {
    let (proc, depth) = (PodProc::new(init), depth_of(init)?);
    let mut live = Vec::with_capacity(members.len());
    for &host in members.iter().filter(|pid| **pid != init) {
        live.extend(find(&proc, host, depth, &Statuses::default())?);
    }
    live.sort_by_key(|found| found.subject.pod);
    let pids: Vec<PodPid> = live.iter().map(|found| found.subject.pod).collect();
    let zombies = zombies(&proc, &proc.processes()?, &pids)?;
    Ok(Population { live, zombies })
}

/// Those of the processes `listed` that have ended: `live` (sorted) have not.
pub fn zombies(proc: &PodProc, listed: &[PodPid], live: &[PodPid]) -> Result<Vec<Zombie>, CaptureError> {
    let mut zombies = Vec::new();
    for &pid in listed.iter().filter(|pid| live.binary_search(pid).is_err()) {
        match proc.stat(pid) {
            Ok(stat) if stat.state == b'Z' => match read(&proc.path(pid, "status"), pid) {
                Ok(status) => zombies.push(Zombie { pid, stat, status: Status::new(status) }),
                Err(CaptureError::Vanished(_)) => {}
                Err(e) => return Err(e),
            },
            Ok(_) | Err(CaptureError::Vanished(_)) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(zombies)
}

/// Finds a member of the pod's cgroup, unless it has gone. `opened` is what was opened of it before.
pub fn find(proc: &PodProc, host: HostPid, depth: usize, opened: &Statuses) -> Result<Option<Found>, CaptureError> {
    let status = match opened.read(host, host) {
        Err(e) if is_gone(&e) => return Ok(None),
        other => other.capturing("reading the status of", format!("process {host} of the host"))?,
    };
    let namespace_pids = pod_numbers(&status, depth);
    let (Some(&pid), Some(&own)) = (namespace_pids.first(), namespace_pids.last()) else { return Ok(None) };
    let pod = PodPid(pid);
    let stat = opened.stat(host).map_or_else(|| read(&proc.path(pod, "stat"), pod), Ok);
    let stat = match stat.and_then(|bytes| parsed(&bytes, pod)) {
        Err(CaptureError::Vanished(_)) => return Ok(None),
        other => other?,
    };
    let command = String::from_utf8_lossy(&stat.command).into_owned();
    let found = Found { subject: Subject { host, pod, command }, stat, status, namespace_pids, ended: None };
    if found.stat.state != b'Z' || found.status.field("Threads") == Some("1") {
        return Ok(Some(found));
    }
    with_substitute(found, proc, own, depth)
}

/// A process whose first thread has ended, with another that stands for it, if there is one.
fn with_substitute(
    mut found: Found,
    proc: &PodProc,
    own_pid: i32,
    depth: usize,
) -> Result<Option<Found>, CaptureError> {
    let pod = found.subject.pod;
    let mut others = numbers_in(&found.subject.host.proc("task"));
    others.sort_unstable();
    for host in others.into_iter().map(HostPid).filter(|host| *host != found.subject.host) {
        let (stat, status) = (procfs::read_record(host.proc("stat")), procfs::read_record(host.proc("status")));
        let (Some(stat), Ok(status)) = (stat.ok().and_then(|bytes| parse_stat(&bytes)), status) else { continue };
        let status = Status::new(status);
        let numbers = pod_numbers(&status, depth);
        let (Some(&tid), Some(&own_tid), false) = (numbers.first(), numbers.last(), is_over(stat.state)) else {
            continue;
        };
        let left = Status::new(read(&proc.path(pod, "status"), pod)?);
        let zombie = Zombie { pid: pod, stat: found.stat.clone(), status: left };
        let substitute = ThreadName { host, pod: PodPid(tid), own: (own_pid, own_tid) };
        found.ended = Some(EndedLeader { zombie, substitute });
        (found.subject.host, found.stat.state, found.status) = (host, stat.state, status);
        return Ok(Some(found));
    }
    Ok(None)
}

fn is_over(state: u8) -> bool {
    matches!(state, b'Z' | b'X')
}

/// The leader of a process, or who stands for it.
pub fn leader(found: &Found) -> ThreadName {
    if let Some(ended) = &found.ended {
        return ended.substitute;
    }
    let pid = found.subject.pod;
    let own = found.namespace_pids.last().copied().unwrap_or(pid.0);
    ThreadName { host: found.subject.host, pod: pid, own: (own, own) }
}

/// The threads of a process that stands still, the leader first: the kernel lists them in the same order whatever numbers
/// a `/proc` gives them, which saves reading the status of each.
pub fn threads_of_frozen(found: &Found, proc: &PodProc, depth: usize) -> Result<Vec<ThreadName>, CaptureError> {
    let leader = leader(found);
    if found.namespace_pids.len() > 1 || found.ended.is_some() || found.status.field("Threads") == Some("1") {
        return threads(found, depth);
    }
    let hosts = numbers_in(&found.subject.host.proc("task"));
    let pods = numbers_in(&proc.path(found.subject.pod, "task"));
    if hosts.len() != pods.len() || (hosts.first(), pods.first()) != (Some(&leader.host.0), Some(&leader.pod.0)) {
        return threads(found, depth);
    }
    let name = |(host, pod)| ThreadName { host: HostPid(host), pod: PodPid(pod), own: (leader.own.0, pod) };
    let mut threads: Vec<ThreadName> = hosts.into_iter().zip(pods).map(name).collect();
    threads[1..].sort_by_key(|name| name.host.0);
    Ok(threads)
}

/// The threads of a process, as the host numbers them.
pub fn thread_numbers(process: HostPid) -> Vec<HostPid> {
    numbers_in(&process.proc("task")).into_iter().map(HostPid).collect()
}

fn numbers_in(directory: &Path) -> Vec<i32> {
    let entries = fs::read_dir(directory).into_iter().flatten();
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect()
}

/// The threads of a process, the leader first.
pub fn threads(found: &Found, depth: usize) -> Result<Vec<ThreadName>, CaptureError> {
    let pid = found.subject.pod;
    let only = leader(found);
    let own_pid = only.own.0;
    if found.status.field("Threads") == Some("1") {
        return Ok(vec![only]);
    }
    let mut hosts = numbers_in(&found.subject.host.proc("task"));
    if found.ended.is_some() {
        let runs = |tid: &i32| {
            let stat = fs::read(HostPid(*tid).proc("stat")).ok().and_then(|bytes| parse_stat(&bytes));
            stat.is_some_and(|stat| !is_over(stat.state))
        };
        hosts.retain(runs);
    }
    if hosts.is_empty() {
        return Err(CaptureError::Vanished(pid));
    }
    hosts.sort_by_key(|tid| (*tid != found.subject.host.0, *tid));
    let mut threads = Vec::with_capacity(hosts.len());
    for tid in hosts {
        if tid == found.subject.host.0 {
            threads.push(only);
            continue;
        }
        let status = match procfs::read_record(format!("/proc/{}/task/{tid}/status", found.subject.host)) {
            Ok(bytes) => Status::new(bytes),
            Err(_) => continue,
        };
        let numbers = pod_numbers(&status, depth);
        if let (Some(first), Some(last)) = (numbers.first(), numbers.last()) {
            threads.push(ThreadName { host: HostPid(tid), pod: PodPid(*first), own: (own_pid, *last) });
        }
    }
    Ok(threads)
}
