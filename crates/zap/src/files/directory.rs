//! Open directories.

use std::os::fd::OwnedFd;

use nix::unistd::{Whence, lseek};
use serde::{Deserialize, Serialize};

use super::{Descriptor, FileKind, decoded, reopen};
use crate::error::{CaptureError, Context, RebuildError};
use crate::ids::FileId;
use crate::image::encode;
use crate::look::Look;
use crate::rebuild::Rebuild;

/// An open directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirectoryState {
    /// The path in the pod.
    #[serde(with = "serde_bytes")]
    pub path: Vec<u8>,
    /// Status flags.
    pub flags: i32,
    /// Where reading it is: a cookie of the file system's, not a count.
    pub position: u64,
}

pub(super) struct Directory;

impl FileKind for Directory {
    fn name(&self) -> &'static str {
        "directory"
    }

    fn recognizes(&self, descriptor: &Descriptor) -> bool {
        descriptor.stat.st_mode & libc::S_IFMT == libc::S_IFDIR && descriptor.link.starts_with(b"/")
    }

    fn check(&self, descriptor: &Descriptor) -> Result<(), CaptureError> {
        if descriptor.stat.st_nlink > 0 {
            return Ok(());
        }
        Err(descriptor.refuse("is a directory that was removed, which cannot be checkpointed yet"))
    }

    fn capture(&self, _look: &mut Look<'_>, descriptor: &Descriptor) -> Result<Vec<u8>, CaptureError> {
        self.check(descriptor)?;
        let (path, flags, position) = (descriptor.link.clone(), descriptor.flags(), descriptor.position());
        Ok(encode(&DirectoryState { path, flags, position }))
    }

    fn open(&self, _rebuild: &mut Rebuild<'_>, _id: FileId, state: &[u8]) -> Result<OwnedFd, RebuildError> {
        let state: DirectoryState = decoded(state)?;
        let path = reopen::as_path(&state.path);
        let file = reopen::path(path, state.flags | libc::O_DIRECTORY).rebuilding("opening", path.display())?;
        if state.position != 0 {
            lseek(&file, state.position as i64, Whence::SeekSet).rebuilding("seeking in", path.display())?;
        }
        Ok(file)
    }
}
