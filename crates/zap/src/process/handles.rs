//! What the memory of processes is followed through: a userfaultfd that each makes, for which it must be held. Those of big
//! processes are made ahead of the hold, which would be long without.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;

use crate::error::{CaptureError, Context};
use crate::ids::HostPid;
use crate::memory::{Handle, ask_for_tracking};
use crate::process::capture::pidfd;
use crate::process::discover::{self, Found};
use crate::process::hold::{self, HoldError};
use crate::tracee::{Batch, Held};

/// Handles by PID on the host, kept from one checkpoint to the next. One of an address space that is gone says so.
#[derive(Debug, Default)]
pub struct Handles(HashMap<HostPid, Handle>);

impl Handles {
    /// That of a process.
    pub fn of(&self, process: HostPid) -> Option<&Handle> {
        self.0.get(&process)
    }

    /// Keeps one.
    pub fn insert(&mut self, process: HostPid, handle: Handle) {
        self.0.insert(process, handle);
    }

    /// Drops those of processes that have gone.
    pub fn retain(&mut self, lives: impl Fn(HostPid) -> bool) {
        self.0.retain(|process, _| lives(*process));
    }
}

/// Whether a process could be held: not if it is stopped, or in a wait that nothing interrupts.
pub(super) fn can_answer(found: &Found) -> bool {
    !matches!(found.stat.state, b'T' | b't' | b'D' | b'Z' | b'X')
}

fn object(found: &Found) -> String {
    format!("the memory of process {}", found.subject.pod)
}

/// Holds the leader of a process for as long as it takes to have it make one.
pub(super) fn make(found: &Found) -> Result<Handle, HoldError> {
    let mut process = (found.clone(), vec![hold::seize_one(discover::leader(found))?.wait()?]);
    let userfault = make_userfault(&mut process);
    for held in process.1 {
        held.let_go()?;
    }
    Ok(Handle::new(userfault?).capturing("following", object(found))?)
}

fn make_userfault(process: &mut (Found, Vec<Held>)) -> Result<OwnedFd, HoldError> {
    let ground = hold::prepare(process)?;
    let (found, threads) = process;
    let leader = threads.first_mut().ok_or(CaptureError::Vanished(found.subject.pod))?;
    let mut batch = Batch::new();
    let made = ask_for_tracking(&mut batch);
    let copy = match leader.run(&ground, 0, &batch)?.get(made) {
        error @ ..0 => Err(io::Error::from_raw_os_error(-error as i32)),
        number => {
            let copy = pidfd(&found.subject)?.get(number as i32);
            let mut close = Batch::new();
            close.attempt(libc::SYS_close, [(number as i32).into()]);
            leader.run(&ground, 0, &close)?;
            copy
        }
    };
    ground.clear(leader)?;
    Ok(copy.capturing("following", object(found))?)
}
