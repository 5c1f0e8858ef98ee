//! Descriptors that only name a file (`O_PATH`).

use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};

use super::{Descriptor, FileKind, decoded, reopen};
use crate::error::{CaptureError, Context, RebuildError};
use crate::ids::FileId;
use crate::image::encode;
use crate::look::Look;
use crate::rebuild::Rebuild;

/// A descriptor that only names a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NameOnlyState {
    /// The path in the pod.
    #[serde(with = "serde_bytes")]
    pub path: Vec<u8>,
    /// `O_PATH`, with `O_DIRECTORY` and `O_NOFOLLOW` as they were.
    pub flags: i32,
}

pub(super) struct NameOnly;

impl FileKind for NameOnly {
    fn name(&self) -> &'static str {
        "name-only"
    }

    fn recognizes(&self, descriptor: &Descriptor) -> bool {
        descriptor.flags() & libc::O_PATH != 0
    }

    fn check(&self, descriptor: &Descriptor) -> Result<(), CaptureError> {
        if descriptor.link.starts_with(b"/") && descriptor.stat.st_nlink > 0 {
            return Ok(());
        }
        Err(descriptor.refuse("names (O_PATH) a file that has no path any more, which cannot be checkpointed yet"))
    }

    fn capture(&self, _look: &mut Look<'_>, descriptor: &Descriptor) -> Result<Vec<u8>, CaptureError> {
        self.check(descriptor)?;
        Ok(encode(&NameOnlyState { path: descriptor.link.clone(), flags: descriptor.flags() }))
    }

    fn open(&self, _rebuild: &mut Rebuild<'_>, _id: FileId, state: &[u8]) -> Result<OwnedFd, RebuildError> {
        let state: NameOnlyState = decoded(state)?;
        let path = reopen::as_path(&state.path);
        reopen::path(path, state.flags).rebuilding("opening", path.display())
    }
}
