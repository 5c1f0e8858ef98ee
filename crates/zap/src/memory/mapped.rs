//! The files behind mappings: one open file each, however many mappings and processes show it.

use std::collections::{HashMap, HashSet};
use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::sync::Arc;

use super::layout::{Mapping, flag};
use crate::error::{CaptureError, Context};
use crate::files::{self, RootFile};
use crate::ids::FileId;
use crate::look::{Look, Subject};

/// The files met so far.
#[derive(Default)]
pub struct MappedFiles {
    pub(super) met: HashMap<Key, FileId>,
    checked: HashSet<Key>,
    /// Files of the root that were captured while the pod ran.
    ahead: HashMap<Key, RootFile>,
}

impl MappedFiles {
    /// What was done ahead, for the hold.
    pub(crate) fn into_ahead(self) -> MappedFiles {
        MappedFiles { ahead: self.ahead, ..MappedFiles::default() }
    }

    /// What was opened ahead: zap's own, which nobody in the pod has, so that closing it can wait until the pod runs again.
    pub(crate) fn opened(&self) -> Vec<Arc<OwnedFd>> {
        self.ahead.values().map(|file| file.descriptor().file.clone()).collect()
    }
}

/// Device, inode, path, and whether it is open for writing.
type Key = (u64, u64, Vec<u8>, bool);

/// Refuses mapped files that cannot be captured, and looks at the others ahead, while the process runs.
pub(super) fn check(look: &mut Look<'_>, subject: &Subject, mapping: &Mapping) -> Result<(), CaptureError> {
    let key = key(mapping);
    if !look.mapped.checked.insert(key.clone()) {
        return Ok(());
    }
    if is_ring(mapping) || is_io_uring(mapping) {
        return Ok(());
    }
    // whatever vanished meanwhile is not there in the hold either, and what cannot be opened is for the hold to say
    let Ok(file) = open(subject, mapping) else { return Ok(()) };
    let descriptor = files::describe(subject, -1, file.into())?;
    files::check_one(look, &descriptor)?;
    if let Some(file) = RootFile::capture(look, descriptor) {
        look.mapped.ahead.insert(key, file);
    }
    Ok(())
}

fn key(mapping: &Mapping) -> Key {
    let (device, inode, path, writable) = parts_of_key(mapping);
    (device, inode, path.to_vec(), writable)
}

fn parts_of_key(mapping: &Mapping) -> (u64, u64, &[u8], bool) {
    (mapping.device, mapping.inode, &mapping.path, is_writable(mapping))
}

/// Whether two mappings show the same open file.
pub(super) fn is_of_one_file(one: &Mapping, other: &Mapping) -> bool {
    parts_of_key(one) == parts_of_key(other)
}

fn is_writable(mapping: &Mapping) -> bool {
    mapping.shared && mapping.flags.known & flag::MAY_WRITE != 0
}

/// Whether it is memory of an `io_uring`.
pub(super) fn is_io_uring(mapping: &Mapping) -> bool {
    mapping.shared && mapping.path == files::io_uring::LINK
}

/// The `io_uring` of a mapping: it cannot be opened by that; the descriptors have been met.
fn io_uring_of(look: &Look<'_>, subject: &Subject, mapping: &Mapping) -> Result<FileId, CaptureError> {
    let is_one = |(_, file): &(FileId, Arc<OwnedFd>)| {
        let link = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
        link.is_ok_and(|link| link.as_os_str().as_bytes() == files::io_uring::LINK)
    };
    let mut all = look.files.of_inode(mapping.device, mapping.inode).filter(is_one);
    match (all.next(), all.next()) {
        (Some((id, _)), None) => Ok(id),
        (None, _) => {
            Err(subject.refuse(object(mapping), "is an io_uring that is closed, which cannot be checkpointed"))
        }
        // Kernels that give all of them one inode.
        _ => Err(subject.refuse(object(mapping), "is an io_uring, and this kernel does not say which")),
    }
}

/// Whether it is the ring of a packet socket.
fn is_ring(mapping: &Mapping) -> bool {
    mapping.path.starts_with(b"socket:[")
}

fn open(subject: &Subject, mapping: &Mapping) -> std::io::Result<File> {
    let path = subject.host.proc(&format!("map_files/{:x}-{:x}", mapping.start, mapping.end));
    OpenOptions::new().read(true).write(is_writable(mapping)).custom_flags(libc::O_NOCTTY).open(path)
}

/// The file behind a mapping.
pub(super) fn file_of(look: &mut Look<'_>, subject: &Subject, mapping: &Mapping) -> Result<FileId, CaptureError> {
    let key = key(mapping);
    if let Some(id) = look.mapped.met.get(&key) {
        return Ok(*id);
    }
    if is_io_uring(mapping) {
        return io_uring_of(look, subject, mapping);
    }
    if is_ring(mapping) {
        // A socket cannot be opened by what it is mapped as; the descriptors have been met.
        let mut all = look.files.of_inode(mapping.device, mapping.inode);
        let closed = || subject.refuse(object(mapping), "is the ring of a socket that is closed");
        return all.next().map(|(id, _)| id).ok_or_else(closed);
    }
    if let Some(file) = look.mapped.ahead.remove(&key).filter(|file| file.is_current(look)) {
        let id = files::intern_root_file(look, file)?;
        look.mapped.met.insert(key, id);
        return Ok(id);
    }
    let file = open(subject, mapping).capturing("opening", object(mapping))?;
    intern(look, subject, key, file)
}

/// The executable of a process; `None` for a process without one.
pub(super) fn executable(look: &mut Look<'_>, subject: &Subject) -> Result<Option<FileId>, CaptureError> {
    let object = || format!("the executable of process {}", subject.pod);
    let link = match std::fs::read_link(subject.host.proc("exe")) {
        Ok(link) => link,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e).capturing("reading the link", object()),
    };
    let found = std::fs::metadata(subject.host.proc("exe")).capturing("looking at", object())?;
    let key = (found.dev(), found.ino(), link.as_os_str().as_bytes().to_vec(), false);
    if let Some(id) = look.mapped.met.get(&key) {
        return Ok(Some(*id));
    }
    let file = File::open(subject.host.proc("exe")).capturing("opening", object())?;
    intern(look, subject, key, file).map(Some)
}

fn intern(look: &mut Look<'_>, subject: &Subject, key: Key, file: File) -> Result<FileId, CaptureError> {
    let id = files::intern(look, files::describe(subject, -1, file.into())?)?;
    look.mapped.met.insert(key, id);
    Ok(id)
}

/// A mapping for messages.
pub(super) fn object(mapping: &Mapping) -> String {
    format!("mapping {:#x}-{:#x} ({})", mapping.start, mapping.end, String::from_utf8_lossy(&mapping.path))
}
