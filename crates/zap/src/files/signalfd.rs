//! Files that read signals. The signals themselves are the queues of the process that reads.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use serde::{Deserialize, Serialize};

use super::{Descriptor, FileKind, decoded, reopen};
use crate::error::{CaptureError, Context, RebuildError};
use crate::ids::FileId;
use crate::image::encode;
use crate::look::Look;
use crate::rebuild::Rebuild;
use crate::sys::anonymous;

/// A signalfd.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignalfdState {
    /// The signals that it reads: bit 0 is signal 1.
    pub mask: u64,
    /// Status flags.
    pub flags: i32,
}

pub(super) struct Signalfd;

const LINK: &[u8] = b"anon_inode:[signalfd]";

/// Whether a file of ours is one.
pub(super) fn is_one(file: impl AsRawFd) -> bool {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
    link.is_ok_and(|link| link.as_os_str().as_bytes() == LINK)
}

impl FileKind for Signalfd {
    fn name(&self) -> &'static str {
        "signalfd"
    }

    fn recognizes(&self, descriptor: &Descriptor) -> bool {
        descriptor.link == LINK
    }

    fn capture(&self, _look: &mut Look<'_>, descriptor: &Descriptor) -> Result<Vec<u8>, CaptureError> {
        Ok(encode(&SignalfdState { mask: descriptor.hexadecimal("sigmask:")?, flags: descriptor.flags() }))
    }

    fn open(&self, _rebuild: &mut Rebuild<'_>, id: FileId, state: &[u8]) -> Result<OwnedFd, RebuildError> {
        let state: SignalfdState = decoded(state)?;
        let file = anonymous::signalfd(state.mask).rebuilding("making the signalfd", id)?;
        reopen::set_flags(&file, state.flags).rebuilding("setting the flags of", id)?;
        Ok(file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::{describe, testing};
    use crate::look::Console;

    #[test]
    fn the_mask_comes_back() {
        let file = anonymous::signalfd(1 << (libc::SIGUSR1 - 1) | 1 << 40).unwrap();
        let (_, _, mut again) = testing::round_trip(&[&file], Console::None);
        let again = describe(&testing::subject(), 0, again.remove(0)).unwrap();
        assert_eq!(again.hexadecimal("sigmask:").unwrap(), 1 << (libc::SIGUSR1 - 1) | 1 << 40);
    }
}
