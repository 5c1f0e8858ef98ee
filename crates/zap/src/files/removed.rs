//! Directories that were removed while they are open, or somebody's working directory.

use std::os::fd::OwnedFd;
use std::path::Path;

use nix::sys::stat::{Mode, fchmod};
use nix::unistd::{Gid, Uid, fchown};
use serde::{Deserialize, Serialize};

use super::unlinked::borrow_name;
use super::{Descriptor, FileKind, decoded, reopen};
use crate::error::{CaptureError, Context, RebuildError};
use crate::ids::FileId;
use crate::image::encode;
use crate::look::Look;
use crate::rebuild::Rebuild;

/// A directory without a name. There is nothing in it, and nothing can be put there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemovedState {
    /// The path that it had in the pod.
    #[serde(with = "serde_bytes")]
    pub path: Vec<u8>,
    /// Status flags.
    pub flags: i32,
    /// The directory: its inode when it was captured. Descriptions of one directory have the same.
    pub inode: u64,
    /// The file system in which it was, likewise.
    #[serde(default)]
    pub device: u64,
    /// Permissions.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

pub(super) struct Removed;

struct Made(OwnedFd);

impl FileKind for Removed {
    fn name(&self) -> &'static str {
        "removed-directory"
    }

    fn recognizes(&self, descriptor: &Descriptor) -> bool {
        let directory = descriptor.stat.st_mode & libc::S_IFMT == libc::S_IFDIR;
        directory && descriptor.stat.st_nlink == 0 && descriptor.link.starts_with(b"/")
    }

    fn capture(&self, _look: &mut Look<'_>, descriptor: &Descriptor) -> Result<Vec<u8>, CaptureError> {
        let stat = &descriptor.stat;
        let path = descriptor.link.strip_suffix(b" (deleted)").unwrap_or(&descriptor.link).to_vec();
        let (flags, inode, device) = (descriptor.flags(), stat.st_ino, stat.st_dev);
        let mode = stat.st_mode & 0o7777;
        Ok(encode(&RemovedState { path, flags, inode, device, mode, uid: stat.st_uid, gid: stat.st_gid }))
    }

    fn open(&self, rebuild: &mut Rebuild<'_>, _id: FileId, state: &[u8]) -> Result<OwnedFd, RebuildError> {
        let state: RemovedState = decoded(state)?;
        let path = reopen::as_path(&state.path);
        let shown = || format!("{} (deleted)", path.display());
        if rebuild.object::<Made>("removed", (state.device, state.inode)).is_none() {
            let made = borrow_name(path, |path| make(path, &state)).rebuilding("making", shown())?;
            rebuild.keep_object("removed", (state.device, state.inode), Made(made));
        }
        match rebuild.object::<Made>("removed", (state.device, state.inode)) {
            Some(made) => reopen::again(&made.0, state.flags).rebuilding("opening", shown()),
            None => Err(RebuildError::Damaged(format!("{} is of two kinds", shown()))),
        }
    }
}

fn make(path: &Path, state: &RemovedState) -> std::io::Result<OwnedFd> {
    std::fs::create_dir(path)?;
    let directory = reopen::path(path, libc::O_DIRECTORY)?;
    fchown(&directory, Some(Uid::from_raw(state.uid)), Some(Gid::from_raw(state.gid)))?;
    fchmod(&directory, Mode::from_bits_truncate(state.mode))?;
    Ok(directory)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::testing::round_trip;
    use crate::look::Console;

    #[test]
    fn a_removed_directory_comes_back_without_a_name() {
        let parent = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = parent.path().join("gone");
        std::fs::create_dir(&path).unwrap();
        let files = [libc::O_DIRECTORY, libc::O_PATH].map(|flags| reopen::path(&path, flags).unwrap());
        std::fs::remove_dir(&path).unwrap();
        let (_, states, again) = round_trip(&[&files[0], &files[1]], Console::None);
        assert_eq!(states.iter().map(|s| s.kind.as_str()).collect::<Vec<_>>(), ["removed-directory"; 2]);
        assert!(!path.exists());
        let stats: Vec<_> = again.iter().map(|file| nix::sys::stat::fstat(file).unwrap()).collect();
        assert_eq!((stats[0].st_nlink, stats[0].st_ino), (0, stats[1].st_ino));
    }
}
