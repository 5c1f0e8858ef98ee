//! Handles on processes of the pod.

use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};

use super::late::Late;
use super::{Descriptor, FileKind, decoded, reopen};
use crate::error::{CaptureError, Context, RebuildError};
use crate::ids::{FileId, PodPid};
use crate::image::encode;
use crate::look::Look;
use crate::rebuild::Rebuild;
use crate::sys::clone;
use crate::sys::pidfd::exit_status;

/// A handle on a process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PidfdState {
    /// The process, or thread; 0 if it has been reaped.
    pub pid: PodPid,
    /// Flags as `pidfd_open(2)` takes them.
    pub flags: i32,
    /// Of one that has been reaped: its status, as `wait` told it.
    #[serde(default)]
    pub status: i32,
}

pub(super) struct Pidfd;

impl FileKind for Pidfd {
    fn name(&self) -> &'static str {
        "pidfd"
    }

    fn recognizes(&self, descriptor: &Descriptor) -> bool {
        descriptor.link.starts_with(b"anon_inode:[pidfd]") || descriptor.link.starts_with(b"pidfd:")
    }

    fn capture(&self, look: &mut Look<'_>, descriptor: &Descriptor) -> Result<Vec<u8>, CaptureError> {
        // As seen from the host; -1 when the process has been reaped.
        let pids = descriptor.field("NSpid:").unwrap_or("-1");
        match pids.split_whitespace().nth(look.depth).and_then(|p| p.parse().ok()) {
            Some(pid @ 1..) => {
                let flags = descriptor.flags() & (libc::O_NONBLOCK | libc::O_EXCL);
                Ok(encode(&PidfdState { pid: PodPid(pid), flags, status: 0 }))
            }
            _ => {
                let (flags, status) = (descriptor.flags() & libc::O_NONBLOCK, exit_status(descriptor).unwrap_or(0));
                Ok(encode(&PidfdState { pid: PodPid(0), flags, status }))
            }
        }
    }

    fn late(&self, state: &[u8]) -> Result<Option<Late>, RebuildError> {
        let PidfdState { pid, flags, .. } = decoded(state)?;
        Ok((pid != PodPid(0)).then_some(Late::Process { pid, flags }))
    }

    fn open(&self, _rebuild: &mut Rebuild<'_>, id: FileId, state: &[u8]) -> Result<OwnedFd, RebuildError> {
        let state: PidfdState = decoded(state)?;
        let file = clone::ended(state.status).rebuilding("making a handle on a process that is gone", id)?;
        reopen::set_flags(&file, state.flags).rebuilding("setting the flags of", id)?;
        Ok(file)
    }
}
