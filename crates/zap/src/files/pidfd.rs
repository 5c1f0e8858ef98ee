//! Handles on processes of the pod.

use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};

use super::late::Late;
use super::{Descriptor, FileKind, decoded};
use crate::error::{CaptureError, RebuildError};
use crate::ids::{FileId, PodPid};
use crate::image::encode;
use crate::look::Look;
use crate::rebuild::Rebuild;

/// A handle on a process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PidfdState {
    /// The process, or thread.
    pub pid: PodPid,
    /// Flags as `pidfd_open(2)` takes them.
    pub flags: i32,
}

pub(super) struct Pidfd;

impl FileKind for Pidfd {
    fn name(&self) -> &'static str {
        "pidfd"
    }

    fn recognizes(&self, descriptor: &Descriptor) -> bool {
        descriptor.link.starts_with(b"anon_inode:[pidfd]") || descriptor.link.starts_with(b"pidfd:")
    }

    fn capture(&self, _look: &mut Look<'_>, descriptor: &Descriptor) -> Result<Vec<u8>, CaptureError> {
        // As seen from the host: the last number is the one in the pod; -1 when the process has been reaped.
        let pids = descriptor.field("NSpid:").unwrap_or("-1");
        match pids.split_whitespace().last().and_then(|p| p.parse().ok()) {
            Some(pid @ 1..) => {
                let flags = descriptor.flags() & (libc::O_NONBLOCK | libc::O_EXCL);
                Ok(encode(&PidfdState { pid: PodPid(pid), flags }))
            }
            _ => Err(descriptor.refuse("is a handle on a process that is gone, which cannot be checkpointed yet")),
        }
    }

    fn late(&self, state: &[u8]) -> Result<Option<Late>, RebuildError> {
        let PidfdState { pid, flags } = decoded(state)?;
        Ok(Some(Late::Process { pid, flags }))
    }

    fn open(&self, _rebuild: &mut Rebuild<'_>, id: FileId, _state: &[u8]) -> Result<OwnedFd, RebuildError> {
        Err(RebuildError::Damaged(format!("{id} is a pidfd, which is opened by its holder")))
    }
}
