//! Directories of whose changes a process is told by a signal (`F_NOTIFY`): what of, only the kernel's memory tells.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use serde::{Deserialize, Serialize};

use super::{Descriptor, DescriptorState};
use crate::error::{CaptureError, Context};
use crate::ids::{Address, HostPid};
use crate::kernel::{self, Kernel};
use crate::sys::lock;
use crate::sys::pidfd::PidFd;
use crate::tracee::Batch;

/// What the owner of a directory is told of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChangesState {
    /// Its number for the directory.
    pub number: i32,
    /// `DN_*`.
    pub changes: u32,
}

/// The process that is told of the changes of a directory. To be told makes one its owner; nothing else that a directory
/// can do has use for one.
fn owner(descriptor: &Descriptor) -> Option<HostPid> {
    const PROCESS: i32 = 1;
    lock::owner(descriptor).ok().filter(|(kind, id)| *kind == PROCESS && *id > 0).map(|(_, id)| HostPid(id))
}

/// Refuses a directory of whose changes somebody is told, where that cannot be read. Ahead of the hold.
pub(super) fn check(descriptor: &Descriptor) -> Result<(), CaptureError> {
    let is_told = lock::owner(descriptor).is_ok_and(|(_, owner)| owner != 0);
    if is_told && !kernel::reader().is_ok_and(|kernel| kernel.has("dnotify_mark.dn")) {
        let why = "tells somebody of its changes (F_NOTIFY), of which the kernel shows nothing on this host";
        return Err(descriptor.refuse(why));
    }
    Ok(())
}

/// What its owner is told of.
pub(super) fn capture(descriptor: &Descriptor) -> Result<Option<ChangesState>, CaptureError> {
    check(descriptor)?;
    if lock::owner(descriptor).is_ok_and(|(_, owner)| owner == 0) {
        return Ok(None);
    }
    const READING: &str = "reading who is told of changes of";
    let mut kernel = kernel::reader().map_err(io::Error::other).capturing(READING, descriptor.object())?;
    let told = read(&mut kernel, descriptor.as_fd()).capturing(READING, descriptor.object())?;
    match told[..] {
        [] => Ok(None),
        [told] if owner(descriptor).is_some_and(|owner| is_held(&mut kernel, descriptor, owner, told.number)) => {
            Ok(Some(told))
        }
        _ => Err(descriptor.refuse("tells somebody of its changes (F_NOTIFY) who is not its owner, or not alone")),
    }
}

/// Whether a process has the directory at this number.
fn is_held(kernel: &mut Kernel, descriptor: &Descriptor, process: HostPid, number: i32) -> bool {
    let theirs = PidFd::open(process).and_then(|process| process.get(number));
    let same = theirs.and_then(|theirs| Ok(kernel.file(theirs.as_fd())? == kernel.file(descriptor.as_fd())?));
    same.unwrap_or(false)
}

/// All who are told of changes of a directory through this description.
fn read(kernel: &mut Kernel, directory: BorrowedFd<'_>) -> io::Result<Vec<ChangesState>> {
    /// Nobody has so many: the list has changed, or is something else.
    const MANY: usize = 1000;
    const NOWHERE: Address = Address(0);
    let (inode, file) = (kernel.inode(directory)?, kernel.file(directory)?);
    let watchers = kernel.pointer(inode, "inode.i_fsnotify_marks")?;
    let mut all = Vec::new();
    if watchers == NOWHERE {
        return Ok(all);
    }
    let mut next = kernel.pointer(watchers, "fsnotify_mark_connector.list")?;
    for _ in 0..MANY {
        if next == NOWHERE {
            return Ok(all);
        }
        let watcher = kernel.around(kernel.around(next, "fsnotify_mark.obj_list"), "dnotify_mark.fsn_mark");
        // Of another kind of watcher there is something else here, which leads nowhere, or to nothing of this file.
        let mut told = kernel.pointer(watcher, "dnotify_mark.dn")?;
        while all.len() < MANY && kernel.pointer(told, "dnotify_struct.dn_filp").is_ok_and(|of| of == file) {
            let number = kernel.word(told, "dnotify_struct.dn_fd")? as i32;
            let changes = changes(kernel.word(told, "dnotify_struct.dn_mask")?);
            all.push(ChangesState { number, changes });
            told = kernel.pointer(told, "dnotify_struct.dn_next")?;
        }
        next = kernel.pointer(next, "hlist_node.next")?;
    }
    Err(io::Error::other("those who are told of it change all the time"))
}

/// What the kernel notes, as programs ask for it: accesses, modifications, creations, deletions, renames, attributes,
/// and whether more than once.
fn changes(mask: u32) -> u32 {
    const NAMES: [(u32, u32); 7] =
        [(1, 1), (2, 2), (0x100, 4), (0x200, 8), (0x1000_0000, 0x10), (4, 0x20), (0x2000_0000, 0x8000_0000)];
    NAMES.iter().filter(|(noted, _)| mask & noted != 0).map(|(_, asked)| asked).sum()
}

impl ChangesState {
    /// The call by which the owner asks for it again, if this descriptor of it is the one.
    pub(super) fn ask(&self, descriptor: &DescriptorState, batch: &mut Batch) {
        if descriptor.number == self.number {
            let args = [self.number.into(), libc::F_NOTIFY.into(), self.changes.into()];
            batch.call(libc::SYS_fcntl, args, format!("asking to be told of changes by descriptor {}", self.number));
        }
    }
}
