//! Threads with a root, a working directory and a umask of their own (`unshare(CLONE_FS)`), as file servers have them: each
//! looks paths up for the client that it works for.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

use crate::error::CaptureError;
use crate::files::DescriptorState;
use crate::ids::{FileId, HostPid, PodPid};
use crate::look::{Look, Subject};
use crate::namespaces::Kind;
use crate::process::capture;
use crate::process::proc_files::Status;
use crate::process::state::ProcessState;
use crate::procfs;
use crate::sys::kcmp::{self, Shared};
use crate::tracee::Batch;

/// Where a thread is, if it is somewhere by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnDirectories {
    /// Its working directory.
    pub cwd: FileId,
    /// Its root directory, if it is not the pod's.
    pub root: Option<FileId>,
    /// Its file mode creation mask.
    pub umask: u32,
}

impl OwnDirectories {
    /// The directories in the order in which a thread goes to them.
    pub fn files(&self) -> impl Iterator<Item = FileId> + use<> {
        self.root.into_iter().chain([self.cwd])
    }
}

/// A thread that has some, by its number in the pod and here.
pub type Wanderer = (PodPid, HostPid);

/// Looks where threads of a held process are by themselves, which has a descriptor table of its own or not; `processes` are all
/// of the pod's.
pub fn look_at(
    look: &mut Look<'_>,
    (process, has_table): (&Subject, bool),
    wanderers: &[Wanderer],
    processes: impl Iterator<Item = HostPid> + Clone,
) -> Result<Vec<(PodPid, OwnDirectories)>, CaptureError> {
    if wanderers.is_empty() {
        return Ok(Vec::new());
    }
    let refuse = |why: &str| {
        let why =
            format!("has a root and working directory of its own (CLONE_FS) {why}, which cannot be checkpointed yet");
        Err(process.refuse("a thread", why))
    };
    let namespaces = look.namespaces.of(process.host);
    if [Kind::User, Kind::Mount].iter().any(|kind| namespaces.of(*kind).is_some()) {
        return refuse("in namespaces of its own");
    }
    if !has_table {
        return refuse("and descriptors that are another process's");
    }
    let mut sorted: Vec<HostPid> = wanderers.iter().map(|(_, host)| *host).collect();
    sorted.sort_by(|a, b| kcmp::compare(a.0, b.0, Shared::Fs).unwrap_or(std::cmp::Ordering::Equal));
    let share = |a: HostPid, b: HostPid| kcmp::shares(a.0, b.0, Shared::Fs).unwrap_or(false);
    if sorted.windows(2).any(|pair| share(pair[0], pair[1])) {
        return refuse("together with another");
    }
    if sorted.iter().any(|thread| processes.clone().any(|process| share(*thread, process))) {
        return refuse("together with another process");
    }
    let mut found = Vec::with_capacity(wanderers.len());
    for (tid, host) in wanderers {
        if ["cwd", "root"].iter().any(|name| procfs::has(&host.proc(name))) {
            return refuse("in /proc");
        }
        let subject = Subject { host: *host, pod: *tid, command: process.command.clone() };
        let (cwd, root) = capture::directories(look, &subject)?;
        let status = procfs::read_record(host.proc("status")).map_err(|_| CaptureError::Vanished(*tid))?;
        let umask = Status::new(status).umask();
        found.push((*tid, OwnDirectories { cwd, root, umask }));
    }
    Ok(found)
}

/// Descriptors by which the threads of a process come to their directories: where it has none. The thread closes them.
pub fn steps(state: &ProcessState) -> Vec<DescriptorState> {
    let mut files = state.directories_of_threads().peekable();
    if files.peek().is_none() {
        return Vec::new();
    }
    let taken: HashSet<i32> = state.descriptors.iter().map(|descriptor| descriptor.number).collect();
    let free = (0..).filter(|number| !taken.contains(number));
    files.zip(free).map(|(file, number)| DescriptorState { number, file, close_on_exec: true }).collect()
}

/// Has a thread go to its own directories by the first of `steps`, which are then gone. It may do anything still.
pub fn restart(own: &OwnDirectories, steps: &mut impl Iterator<Item = DescriptorState>, batch: &mut Batch) {
    batch.call(libc::SYS_unshare, [libc::CLONE_FS.into()], "giving a thread directories of its own");
    let to_root = own.root.map(|_| change_root as fn(i32, &mut Batch));
    for (go, step) in to_root.into_iter().chain([change_directory as fn(i32, &mut Batch)]).zip(steps) {
        go(step.number, batch);
        batch.call(libc::SYS_close, [step.number.into()], "closing a directory");
    }
    batch.call(libc::SYS_umask, [own.umask.into()], "setting the umask of a thread");
}

/// Goes to the directory of a descriptor.
pub(super) fn change_directory(number: i32, batch: &mut Batch) {
    batch.call(libc::SYS_fchdir, [number.into()], "changing directory");
}

/// Makes the directory of a descriptor the root, and goes there.
pub(super) fn change_root(number: i32, batch: &mut Batch) {
    change_directory(number, batch);
    let dot = batch.bytes(b".\0");
    batch.call(libc::SYS_chroot, [dot], "changing the root directory");
}
