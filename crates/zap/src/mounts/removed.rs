//! Mounted files that have no name any more: a sandbox that gives its program a file of its own makes one, mounts it where
//! it is to be seen, and removes it (`bwrap --ro-bind-data`).

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::sys::stat::futimens;
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, fchown};
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

use super::FileSystem;
use super::capture::{COVERED, path_of};
use super::table::{Entry, below};
use crate::files::mounts::relative;
use crate::namespaces::NamespaceId;
use crate::sys::mount;

/// Where the file system of a file is found that has no name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Holder {
    /// A mount of that namespace, which has no higher number, shows it: by its place in the list.
    Mount(NamespaceId, usize),
    /// Nothing else is left of it.
    Nobody(FileSystem),
}

/// A file that is mounted and has no name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemovedFile {
    /// Where it was, seen from the mount in whose file system it is, or only what it was called.
    pub name: ByteBuf,
    /// What is in it.
    pub contents: ByteBuf,
    /// Permissions.
    pub mode: u32,
    /// User and group.
    pub owner: (u32, u32),
    /// When it was changed last: seconds, nanoseconds.
    pub modified: (i64, i64),
}

pub(super) const REMOVED: &str = "shows what was removed, which cannot be checkpointed yet";
const DELETED: &[u8] = b"//deleted";
/// What it is called if it cannot be called what it was.
const OTHERWISE: &str = ".zap-removed";
/// It is read while the pod is held, and has its place in the state.
const LARGEST: u64 = 1 << 20;

/// Whether what a mount shows was removed: the kernel says so in the path.
pub(super) fn is_removed(entry: &Entry) -> bool {
    entry.root.ends_with(DELETED)
}

/// What the mount shows that is seen at `path`, of a file system that is found from `root` on, or why it cannot be kept.
pub(super) fn capture(path: &Path, entry: &Entry, root: &[u8]) -> io::Result<Result<RemovedFile, &'static str>> {
    let there = crate::sys::file::open_path(path)?;
    if mount::id_of(&there)? != entry.id {
        return Ok(Err(COVERED));
    }
    let facts = fs::metadata(path)?;
    if !facts.is_file() || facts.len() > LARGEST || entry.kind != "tmpfs" {
        return Ok(Err(REMOVED));
    }
    let mut contents = Vec::new();
    File::open(path)?.take(LARGEST).read_to_end(&mut contents)?;
    let was = entry.root.strip_suffix(DELETED).unwrap_or(&entry.root);
    let alone = was.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
    Ok(Ok(RemovedFile {
        name: ByteBuf::from(below(was, root).unwrap_or(alone)),
        contents: ByteBuf::from(contents),
        mode: facts.mode() & 0o7777,
        owner: (facts.uid(), facts.gid()),
        modified: (facts.mtime(), facts.mtime_nsec()),
    }))
}

/// The name of such a file, which it has until it is mounted: the kernel mounts nothing anew that has none.
#[derive(Debug)]
pub(super) struct Name {
    whole: OwnedFd,
    name: PathBuf,
}

impl Name {
    fn path(&self) -> PathBuf {
        path_of(&self.whole).join(&self.name)
    }
}

impl Drop for Name {
    fn drop(&mut self) {
        let _ = fs::remove_file(self.path());
    }
}

/// A mount of such a file, in the file system of another mount, which nobody has if it is `alone` there; and its name.
pub(super) fn make(state: &RemovedFile, whole: &OwnedFd, alone: bool) -> io::Result<(OwnedFd, Name)> {
    // That one may be read-only already.
    let writable = mount::copy_mount(&path_of(whole), false)?;
    mount::shape(writable.as_fd(), 0, 0)?;
    let top = path_of(&writable);
    let wanted = relative(&state.name);
    if let Some(above) = wanted.parent().filter(|_| alone) {
        fs::create_dir_all(top.join(above))?;
    }
    let create =
        |name: &Path| File::options().write(true).create_new(true).open(top.join(name)).map(|file| (file, name.into()));
    // What it is called is still to be seen in tables of mounts.
    let (mut file, name) = create(wanted).or_else(|_| create(Path::new(OTHERWISE)))?;
    let name = Name { whole: writable, name };
    file.write_all(&state.contents)?;
    fchown(&file, Some(Uid::from_raw(state.owner.0)), Some(Gid::from_raw(state.owner.1)))?;
    file.set_permissions(fs::Permissions::from_mode(state.mode & 0o7777))?;
    let modified = TimeSpec::new(state.modified.0, state.modified.1);
    futimens(&file, &modified, &modified)?;
    Ok((mount::copy_mount(&name.path(), false)?, name))
}
