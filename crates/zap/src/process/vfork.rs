//! Waiting in vfork(2): whoever does cannot be held before the child has executed a program or ended, and the child gets
//! there only while it is not held itself.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::error::CaptureError;
use crate::ids::HostPid;
use crate::process::discover;
use crate::process::proc_files::{Stat, parse_stat};
use crate::procfs;

/// How long a child may take until its parent can be held.
const PATIENCE: Duration = Duration::from_secs(1);

/// A thread that waits for a child of its own.
pub struct Waiting {
    process: HostPid,
    stat: PathBuf,
}

/// The first thread of a frozen pod that waits in vfork(2). In a control group that counts as frozen it is the one call
/// that leaves a thread in an uninterruptible sleep.
pub fn waiting(members: &[HostPid]) -> Option<Waiting> {
    parents_of_forked(members).into_iter().find_map(|process| {
        let threads = fs::read_dir(process.proc("task")).ok()?.flatten();
        let mut waiting = threads.map(|thread| Waiting { process, stat: thread.path().join("stat") });
        waiting.find(Waiting::sleeps_in_vfork)
    })
}

/// The parents of processes that have not executed a program since they were forked: nobody else waits for a child so.
fn parents_of_forked(members: &[HostPid]) -> BTreeSet<HostPid> {
    let parent = |process: &HostPid| forked(*process).map(|stat| HostPid(stat.parent.0));
    let mut parents: BTreeSet<HostPid> = members.iter().filter_map(parent).collect();
    parents.retain(|parent| members.contains(parent));
    parents
}

/// What is known of a process that has not executed a program since it was forked.
fn forked(process: HostPid) -> Option<Stat> {
    const PF_FORKNOEXEC: u64 = 0x40;
    let stat = parse_stat(&procfs::read_record(process.proc("stat")).ok()?)?;
    (stat.flags & PF_FORKNOEXEC != 0).then_some(stat)
}

/// Whether a process has not executed a program since it was forked.
pub fn is_forked(process: HostPid) -> bool {
    forked(process).is_some()
}

/// Whether a thread of a running process waits in vfork(2), or in a call that makes children like it.
pub fn waits(process: HostPid) -> bool {
    let calls = [libc::SYS_vfork, libc::SYS_clone, libc::SYS_clone3].map(|number| number.to_string());
    let threads = fs::read_dir(process.proc("task")).into_iter().flatten().flatten();
    threads.map(|thread| thread.path()).any(|thread| {
        let call = fs::read_to_string(thread.join("syscall")).unwrap_or_default();
        let number = call.split(' ').next().unwrap_or_default();
        Waiting { process, stat: thread.join("stat") }.goes_on() && calls.iter().any(|call| call == number)
    })
}

impl Waiting {
    fn goes_on(&self) -> bool {
        self.state() == Some(b'D')
    }

    fn state(&self) -> Option<u8> {
        let stat = procfs::read_record(&self.stat).ok()?;
        let name_end = stat.iter().rposition(|byte| *byte == b')')?;
        stat.get(name_end + 2).copied()
    }

    /// A thread counts as frozen a moment before it sleeps: only then its state tells in what.
    fn sleeps_in_vfork(&self) -> bool {
        while self.state() == Some(b'R') {
            std::thread::yield_now();
        }
        self.goes_on()
    }

    /// Returns when it waits no more; the pod runs meanwhile. A child that takes its time is a reason to refuse.
    pub fn finish(&self, init: HostPid, begun: Instant) -> Result<(), CaptureError> {
        while self.goes_on() {
            if begun.elapsed() > PATIENCE {
                return Err(self.refused(init));
            }
            std::thread::sleep(Duration::from_micros(50));
        }
        Ok(())
    }

    fn refused(&self, init: HostPid) -> CaptureError {
        let found = discover::discover(init, &[self.process]).ok().and_then(|found| found.live.into_iter().next());
        match found {
            Some(found) => found.subject.refuse(
                "a child made with vfork",
                "has not executed a program yet, for which its parent waits; try again when it has",
            ),
            None => {
                CaptureError::Unexpected { object: "a process".into(), what: "end while it waited in vfork".into() }
            }
        }
    }
}
