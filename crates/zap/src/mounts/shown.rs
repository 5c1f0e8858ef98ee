//! File systems that show a namespace: proc its processes, sysfs its interfaces, mqueue its queues. Which one, nothing
//! says: it is found out.

use std::collections::HashMap;
use std::ffi::CStr;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::table::Entry;
use crate::error::{CaptureError, Context};
use crate::ids::HostPid;
use crate::namespaces::{Kind, NamespaceId, Sightings};
use crate::sys::{clone, file, mount, nsfs};

/// The kind of namespace that a file system shows.
pub(super) fn kind_shown(file_system: &str) -> Option<Kind> {
    match file_system {
        "proc" => Some(Kind::Pid),
        "sysfs" => Some(Kind::Network),
        "mqueue" => Some(Kind::Ipc),
        _ => None,
    }
}

/// The namespaces that file systems show, by device; `None`: the pod's own. Of one that is not here it is not known.
pub(super) type Shown = HashMap<Vec<u8>, Option<NamespaceId>>;

/// The PID namespace of the first process that a proc, seen at `path` on the host, shows.
pub(super) fn first_process(path: &Path) -> Option<u64> {
    fs::metadata(path.join("1/ns/pid")).map(|found| found.ino()).ok()
}

/// Notes which PID namespace a proc shows that is seen whole at `path` on the host.
pub(super) fn note_proc(
    shown: &mut Shown,
    entry: &Entry,
    path: &Path,
    (met, init): (&Sightings, HostPid),
) -> Result<(), CaptureError> {
    let is_whole = entry.kind == "proc" && entry.root == b"/" && !shown.contains_key(&entry.device);
    let seen = || file::open_path(path).and_then(|there| mount::id_of(&there)).is_ok_and(|id| id == entry.id);
    let Some(inode) = is_whole.then(|| seen().then(|| first_process(path)).flatten()).flatten() else { return Ok(()) };
    let home = fs::metadata(init.proc("ns/pid")).capturing("looking at", "the pod's PID namespace")?;
    match met.of_inode(inode) {
        Some(id) => drop(shown.insert(entry.device.clone(), Some(id))),
        None if inode == home.ino() => drop(shown.insert(entry.device.clone(), None)),
        None => {}
    }
    Ok(())
}

/// Notes which namespaces sysfs and mqueue show, of those that were met: of each namespace there is but one of them.
pub(super) fn note_views<'e>(
    shown: &mut Shown,
    entries: impl Iterator<Item = &'e Entry> + Clone,
    met: &Sightings,
) -> Result<(), CaptureError> {
    for (file_system, kind) in [(c"sysfs", Kind::Network), (c"mqueue", Kind::Ipc)] {
        let mut devices = entries.clone().filter(|entry| entry.kind.as_bytes() == file_system.to_bytes());
        if devices.next().is_none() {
            continue;
        }
        for (id, namespace) in met.of_kind(kind) {
            let what = || format!("a {} namespace made inside the pod", kind.name());
            let device = device_in(namespace, kind, file_system).capturing("looking into", what())?;
            shown.insert(device, Some(id));
        }
    }
    Ok(())
}

/// The device of the file system that shows a namespace, as `mountinfo` has it.
fn device_in(namespace: &OwnedFd, kind: Kind, file_system: &CStr) -> std::io::Result<Vec<u8>> {
    clone::in_thread(|| {
        nsfs::enter(namespace, kind.flag())?;
        let device = file::fstat(&mount::new_mount(file_system, &[], 0)?)?.st_dev;
        Ok(format!("{}:{}", libc::major(device), libc::minor(device)).into_bytes())
    })
}
