//! IPC namespaces. Those of sandboxes are empty.

use std::io;
use std::os::fd::OwnedFd;

use crate::image::DataSink;
use crate::ipc::{self, IpcState};

/// What is in it: nothing, or a reason to refuse.
pub(super) fn capture(namespace: &OwnedFd) -> io::Result<Result<IpcState, &'static str>> {
    let state = ipc::capture_in(namespace, &mut DataSink::default())?;
    let refusal = "has System V objects in an IPC namespace of its own, which cannot be checkpointed yet";
    Ok(if state == IpcState::default() { Ok(state) } else { Err(refusal) })
}
