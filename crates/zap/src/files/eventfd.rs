//! Event counters.

use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};

use super::{Descriptor, FileKind, decoded, reopen};
use crate::error::{CaptureError, Context, RebuildError};
use crate::ids::FileId;
use crate::image::encode;
use crate::look::Look;
use crate::rebuild::Rebuild;
use crate::sys::anonymous;

/// An eventfd.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventfdState {
    /// The count.
    pub count: u64,
    /// Whether a read takes one (`EFD_SEMAPHORE`).
    pub semaphore: bool,
    /// Status flags.
    pub flags: i32,
}

pub(super) struct Eventfd;

impl FileKind for Eventfd {
    fn name(&self) -> &'static str {
        "eventfd"
    }

    fn recognizes(&self, descriptor: &Descriptor) -> bool {
        descriptor.link == b"anon_inode:[eventfd]"
    }

    fn capture(&self, _look: &mut Look<'_>, descriptor: &Descriptor) -> Result<Vec<u8>, CaptureError> {
        let count = descriptor.hexadecimal("eventfd-count:")?;
        // Kernels before 6.5 do not say; there the only way to know is to try, which would change it.
        let Some(semaphore) = descriptor.field("eventfd-semaphore:") else {
            return Err(descriptor.refuse("does not say whether it is a semaphore; that needs Linux 6.5 or later"));
        };
        Ok(encode(&EventfdState { count, semaphore: semaphore == "1", flags: descriptor.flags() }))
    }

    fn open(&self, _rebuild: &mut Rebuild<'_>, id: FileId, state: &[u8]) -> Result<OwnedFd, RebuildError> {
        let state: EventfdState = decoded(state)?;
        let file = anonymous::eventfd(state.semaphore).rebuilding("making the eventfd", id)?;
        if state.count > 0 {
            nix::unistd::write(&file, &state.count.to_ne_bytes()).rebuilding("counting up the eventfd", id)?;
        }
        reopen::set_flags(&file, state.flags).rebuilding("setting the flags of", id)?;
        Ok(file)
    }
}

#[cfg(test)]
mod tests {
    use nix::unistd::{read, write};

    use super::*;
    use crate::files::testing::round_trip;
    use crate::look::Console;
    use crate::sys::descriptor;

    #[test]
    fn count_and_flags_come_back() {
        let (counter, semaphore) = (anonymous::eventfd(false).unwrap(), anonymous::eventfd(true).unwrap());
        write(&counter, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        write(&semaphore, &2u64.to_ne_bytes()).unwrap();
        reopen::set_flags(&semaphore, libc::O_NONBLOCK).unwrap();
        let (_, _, again) = round_trip(&[&counter, &semaphore], Console::None);
        assert_eq!(descriptor::flags(&again[1]).unwrap(), descriptor::flags(&semaphore).unwrap());
        let mut value = [0; 8];
        read(&again[0], &mut value).unwrap();
        assert_eq!(u64::from_ne_bytes(value), u64::MAX - 1);
        read(&again[1], &mut value).unwrap();
        assert_eq!(u64::from_ne_bytes(value), 1);
    }
}
