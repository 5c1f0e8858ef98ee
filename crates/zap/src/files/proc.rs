//! Files of `/proc`: opened again by their path, those of a process once that process exists.

use std::os::fd::OwnedFd;

use nix::unistd::{Whence, lseek};
use serde::{Deserialize, Serialize};

use super::late::Late;
use super::{Descriptor, FileKind, decoded, reopen};
use crate::error::{CaptureError, Context, RebuildError};
use crate::ids::FileId;
use crate::image::encode;
use crate::look::Look;
use crate::rebuild::Rebuild;

/// An open file or directory of `/proc`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcState {
    /// The path in the pod.
    #[serde(with = "serde_bytes")]
    pub path: Vec<u8>,
    /// Access mode and status flags.
    pub flags: i32,
    /// The offset.
    pub position: u64,
}

pub(super) struct Proc;

/// Whether a path is below `/proc/PID`.
fn of_process(path: &[u8]) -> bool {
    path.strip_prefix(b"/proc/").and_then(|p| p.first()).is_some_and(u8::is_ascii_digit)
}

impl FileKind for Proc {
    fn name(&self) -> &'static str {
        "proc"
    }

    fn recognizes(&self, descriptor: &Descriptor) -> bool {
        descriptor.link.starts_with(b"/") && super::of_proc(descriptor)
    }

    fn capture(&self, look: &mut Look<'_>, descriptor: &Descriptor) -> Result<Vec<u8>, CaptureError> {
        let path = descriptor.link.clone();
        if !reopen::from_host(look.init, &path).exists() {
            return Err(descriptor.refuse("belongs to a process that is gone, so that a restart could not open it"));
        }
        Ok(encode(&ProcState { path, flags: descriptor.flags(), position: descriptor.position() }))
    }

    fn late(&self, state: &[u8]) -> Result<Option<Late>, RebuildError> {
        let ProcState { path, flags, position } = decoded(state)?;
        Ok(of_process(&path).then_some(Late::Path { path, flags, position }))
    }

    fn open(&self, _rebuild: &mut Rebuild<'_>, _id: FileId, state: &[u8]) -> Result<OwnedFd, RebuildError> {
        let state: ProcState = decoded(state)?;
        let path = reopen::as_path(&state.path);
        let file = reopen::path(path, state.flags).rebuilding("opening", path.display())?;
        if state.position != 0 {
            lseek(&file, state.position as i64, Whence::SeekSet).rebuilding("seeking in", path.display())?;
        }
        Ok(file)
    }
}
