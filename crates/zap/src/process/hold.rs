//! Holding a whole pod: every thread of every process stands still, and each process has ground to act on.

use std::ops::Range;

use crate::error::CaptureError;
use crate::ids::HostPid;
use crate::process::discover::{self, Found, Zombie};
use crate::sys::ptrace;
use crate::tracee::{Ground, Held, Seized, TraceeError, left_behind, seize};

/// A process, all of its threads held.
pub struct HeldProcess {
    /// Who it is, as it was found.
    pub found: Found,
    /// Its threads, the leader first.
    pub threads: Vec<Held>,
    /// Where batches run in it.
    pub ground: Ground,
}

/// A pod, all of its processes held. Belongs to the thread that held it.
pub struct HeldPod {
    /// Live processes, by PID.
    pub processes: Vec<HeldProcess>,
    /// Processes that have ended and wait to be reaped.
    pub zombies: Vec<Zombie>,
}

/// Why a pod could not be held. What was held already is let go when the calling thread ends.
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
    processes: Vec<(Found, Vec<Seized>)>,
    zombies: Vec<Zombie>,
}

/// Seizes every thread. The cgroup must be frozen, so that nobody comes or goes meanwhile.
pub fn seize_all(init: HostPid, members: &[HostPid]) -> Result<SeizedPod, HoldError> {
    let population = discover::discover(init, members)?;
    let depth = discover::depth_of(init)?;
    let mut processes = Vec::with_capacity(population.live.len());
    for found in population.live {
        let threads = discover::threads(&found, depth)?;
        let seized = threads.into_iter().map(seize_one).collect::<Result<_, _>>()?;
        processes.push((found, seized));
    }
    Ok(SeizedPod { processes, zombies: population.zombies })
}

pub(super) fn seize_one(name: crate::tracee::ThreadName) -> Result<Seized, TraceeError> {
    // Suspending filters is refused to a tracer that is under one itself; most pods' batches pass their filters anyway.
    match seize(name, ptrace::SUSPEND_SECCOMP) {
        Err(TraceeError::Kernel { source, .. }) if source.raw_os_error() == Some(libc::EPERM) => seize(name, 0),
        other => other,
    }
}

impl SeizedPod {
    /// Waits until every thread has stopped, and prepares the ground of each process. The cgroup must be thawed.
    pub fn wait(self) -> Result<HeldPod, HoldError> {
        let mut stopped = Vec::with_capacity(self.processes.len());
        for (found, seized) in self.processes {
            let threads = seized.into_iter().map(Seized::wait).collect::<Result<Vec<Held>, _>>()?;
            stopped.push((found, threads));
        }
        let mut processes = Vec::with_capacity(stopped.len());
        for (found, mut threads) in stopped {
            let ground = prepare(&found, &mut threads)?;
            processes.push(HeldProcess { found, threads, ground });
        }
        Ok(HeldPod { processes, zombies: self.zombies })
    }
}

/// Bytes of a seat during a checkpoint, where a thread is asked a handful of questions.
const QUESTIONS: usize = 1 << 10;
/// Bytes for the leader's batch, which asks for every signal action and descriptor flag.
const LEADER: usize = 64 << 10;

pub(super) fn prepare(found: &Found, threads: &mut Vec<Held>) -> Result<Ground, HoldError> {
    let pod = found.subject.pod;
    let text = std::fs::read(found.subject.host.proc("maps")).map_err(|_| CaptureError::Vanished(pod))?;
    let ranges = mapped_ranges(&text);
    let vdso = find(&text, &ranges, b"[vdso]").ok_or(TraceeError::NoRoom(pod))?;
    if let Some(stub) = left_behind(found.subject.host, &vdso) {
        let held = std::mem::take(threads).into_iter().map(|held| held.finish_way_home(&stub));
        *threads = held.collect::<Result<_, _>>()?;
    }
    let size = (threads.len() * QUESTIONS + LEADER).next_multiple_of(4096) as u64;
    let scratch = gap(&ranges, size).ok_or(TraceeError::NoRoom(pod))?;
    let marker = marker(found).ok_or(TraceeError::NoRoom(pod))?;
    let process = (found.subject.host, pod);
    let leader = threads.first_mut().ok_or(CaptureError::Vanished(pod))?;
    Ok(Ground::prepare(leader, process, vdso, scratch, QUESTIONS, marker)?)
}

/// Start and end of each line of `/proc/PID/maps`.
pub fn mapped_ranges(text: &[u8]) -> Vec<Range<u64>> {
    let lines = text.split(|b| *b == b'\n');
    lines
        .filter_map(|line| {
            let range = std::str::from_utf8(line.split(|b| *b == b' ').next()?).ok()?;
            let (start, end) = range.split_once('-')?;
            Some(u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?)
        })
        .collect()
}

/// The mapping with that name.
pub fn find(text: &[u8], ranges: &[Range<u64>], name: &[u8]) -> Option<Range<u64>> {
    let lines = text.split(|b| *b == b'\n').filter(|line| !line.is_empty());
    lines.zip(ranges).find(|(line, _)| line.ends_with(name)).map(|(_, range)| range.clone())
}

/// The lowest addresses that nothing of `ranges` (sorted) uses, with some distance to their neighbours: a stack grows down.
pub fn gap(ranges: &[Range<u64>], size: u64) -> Option<Range<u64>> {
    const FIRST: u64 = 0x1000_0000;
    const DISTANCE: u64 = 1 << 20;
    const TOP: u64 = 0x7fff_0000_0000;
    let mut start = FIRST;
    for range in ranges {
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

/// A signal that ends batches: ignored by default, and neither handled nor pending in this process.
fn marker(found: &Found) -> Option<i32> {
    let busy = found.status.mask("SigCgt") | found.status.mask("ShdPnd") | found.status.mask("SigPnd");
    let candidates = [libc::SIGURG, libc::SIGWINCH, libc::SIGCHLD];
    candidates.into_iter().find(|signal| busy & (1 << (signal - 1)) == 0)
}

impl HeldPod {
    /// How many threads there are.
    pub fn threads(&self) -> usize {
        self.processes.iter().map(|process| process.threads.len()).sum()
    }

    /// Clears every process of what a checkpoint put there; everybody is where they were, and still held.
    pub fn clear(self) -> Result<Cleared, TraceeError> {
        let mut threads = Vec::new();
        for mut process in self.processes {
            if let Some(leader) = process.threads.first_mut() {
                unless_dead(process.ground.clear(leader))?;
            }
            threads.append(&mut process.threads);
        }
        for held in &mut threads {
            unless_dead(held.go_home())?;
        }
        Ok(Cleared { threads })
    }
}

/// A pod whose threads are held where they were found.
#[must_use = "held threads must be let go"]
pub struct Cleared {
    threads: Vec<Held>,
}

impl Cleared {
    /// Lets everybody go on.
    pub fn let_go(self) -> Result<(), TraceeError> {
        self.threads.into_iter().try_for_each(Held::let_go)
    }
}

/// A process that somebody else killed meanwhile has nothing left to clear.
fn unless_dead(result: Result<(), TraceeError>) -> Result<(), TraceeError> {
    match result {
        Err(TraceeError::Died(_)) => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_keeps_its_distance() {
        let ranges = [0x1000_0000..0x1000_1000, 0x1000_2000..0x2000_0000];
        assert_eq!(gap(&ranges, 0x1000), Some(0x2010_0000..0x2010_1000));
        let high = std::iter::once(0x7000_0000_0000..0x7fff_ffff_f000).collect::<Vec<_>>();
        assert_eq!(gap(&high, 0x1000), Some(0x1000_0000..0x1000_1000));
    }

    #[test]
    fn maps_lines() {
        let text = b"00400000-00401000 r--p 00000000 00:00 0 /bin/a\n7fff0000-7fff2000 r-xp 00000000 00:00 0  [vdso]\n";
        let ranges = mapped_ranges(text);
        assert_eq!(ranges, [0x40_0000..0x40_1000, 0x7fff_0000..0x7fff_2000]);
        assert_eq!(find(text, &ranges, b"[vdso]"), Some(0x7fff_0000..0x7fff_2000));
    }
}
