//! Getting at a running process's address space to follow its writes: one thread is held for a fraction of a
//! millisecond while it opens a `userfaultfd`, of which zap keeps a copy.

use std::os::fd::OwnedFd;

use crate::error::CaptureError;
use crate::process::capture::pidfd;
use crate::process::discover::{self, Found};
use crate::process::hold::{self, HoldError};
use crate::tracee::{Batch, Held, TraceeError};

const UFFD_USER_MODE_ONLY: i32 = 1;

/// A `userfaultfd` of that process, which has no descriptor of it itself. `None` if it is about to end.
///
/// # Errors
///
/// The process cannot have one: it has no descriptor left, or its filter forbids it.
pub fn userfaultfd(found: &Found, depth: usize) -> Result<Option<OwnedFd>, HoldError> {
    let threads = match discover::threads(found, depth) {
        Err(CaptureError::Vanished(_)) => return Ok(None),
        other => other?,
    };
    let Some(leader) = threads.first() else { return Ok(None) };
    match hold::seize_one(*leader).and_then(crate::tracee::Seized::wait) {
        Err(TraceeError::Died(_)) => Ok(None),
        Err(e) => Err(e.into()),
        Ok(held) => open_in(found, held),
    }
}

fn open_in(found: &Found, held: Held) -> Result<Option<OwnedFd>, HoldError> {
    let mut held = vec![held];
    let ground = hold::prepare(found, &mut held)?;
    let mut batch = Batch::new();
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | UFFD_USER_MODE_ONLY;
    let opened = batch.call(libc::SYS_userfaultfd, [flags.into()], "opening a userfaultfd");
    let copy = held[0].run(&ground, 0, &batch).and_then(|results| {
        let number = results.get(opened) as i32;
        let failed = TraceeError::kernel("fetching the userfaultfd of", found.subject.pod);
        let copy = pidfd(&found.subject).map_err(|_| TraceeError::Died(found.subject.pod))?.get(number).map_err(failed);
        let mut batch = Batch::new();
        batch.call(libc::SYS_close, [number.into()], "closing the userfaultfd");
        held[0].run(&ground, 0, &batch)?;
        copy
    });
    let mut held = held.remove(0);
    ground.clear(&mut held, None)?;
    held.let_go()?;
    Ok(Some(copy?))
}
