//! Limits of an IPC namespace below `/proc/sys`, which root of a pod can set that may mount a proc of its own.

use std::fs::{self, File};
use std::io;
use std::sync::OnceLock;

use crate::error::{CaptureError, Context};
use crate::ids::{HostPid, PodPid};
use crate::pod::{PodSpec, capabilities};
use crate::sys::{clone, namespace, nsfs};

const LIMITS: [&str; 13] = [
    "kernel/msgmax",
    "kernel/msgmnb",
    "kernel/msgmni",
    "kernel/sem",
    "kernel/shm_rmid_forced",
    "kernel/shmall",
    "kernel/shmmax",
    "kernel/shmmni",
    "fs/mqueue/msg_default",
    "fs/mqueue/msg_max",
    "fs/mqueue/msgsize_default",
    "fs/mqueue/msgsize_max",
    "fs/mqueue/queues_max",
];

type Values = [Option<String>; LIMITS.len()];

/// Those of the caller's namespace: the kernel shows everybody his own.
fn values() -> Values {
    LIMITS.map(|name| fs::read_to_string(format!("/proc/sys/{name}")).ok())
}

/// Those of a new namespace.
fn usual() -> io::Result<&'static Values> {
    static USUAL: OnceLock<Values> = OnceLock::new();
    if let Some(usual) = USUAL.get() {
        return Ok(usual);
    }
    let read = clone::in_thread(|| {
        namespace::unshare(libc::CLONE_NEWIPC)?;
        Ok(values())
    })?;
    Ok(USUAL.get_or_init(|| read))
}

/// Refuses a pod in which some have been set.
pub fn check(spec: &PodSpec, init: HostPid) -> Result<(), CaptureError> {
    if !capabilities::includes(&spec.capabilities, "SYS_ADMIN") {
        return Ok(());
    }
    let now = || {
        let pod = File::open(init.proc("ns/ipc"))?;
        clone::in_thread(|| {
            nsfs::enter(&pod, libc::CLONE_NEWIPC)?;
            Ok(values())
        })
    };
    let now = now().capturing("reading", "the limits of the pod's IPC namespace")?;
    let usual = usual().capturing("reading", "the limits of a new IPC namespace")?;
    let set = LIMITS.iter().zip(now.iter().zip(usual)).find(|(_, (now, usual))| now != usual);
    set.map_or(Ok(()), |(name, _)| {
        Err(CaptureError::Refused {
            process: PodPid(1),
            command: "init".into(),
            object: format!("the limit {}", name.replace('/', ".")),
            why: "has been set in the pod, which cannot be checkpointed yet; undo that first".into(),
        })
    })
}
