//! Shared memory without a name or a descriptor: `mmap` with `MAP_SHARED | MAP_ANONYMOUS`. It is known from mappings only.

use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};

use super::{Contents, Descriptor, FileKind, decoded, reopen};
use crate::error::{CaptureError, Context, RebuildError};
use crate::ids::FileId;
use crate::image::encode;
use crate::look::Look;
use crate::rebuild::Rebuild;
use crate::sys::memory::shared_anonymous;

/// Shared memory of a process and its relatives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedMemoryState {
    /// Which memory it is: descriptions of the same have the same.
    pub inode: u64,
    /// Access mode.
    pub flags: i32,
    /// Bytes.
    pub size: u64,
    /// What is in it; with the description that was met first.
    pub contents: Option<Contents>,
}

pub(super) struct SharedMemory;

impl FileKind for SharedMemory {
    fn name(&self) -> &'static str {
        "shared-memory"
    }

    fn recognizes(&self, descriptor: &Descriptor) -> bool {
        let regular = descriptor.stat.st_mode & libc::S_IFMT == libc::S_IFREG;
        // the kernel's own mount of shared memory has no block device; /dev/zero itself is a character device
        regular && descriptor.link == b"/dev/zero (deleted)" && libc::major(descriptor.stat.st_dev) == 0
    }

    fn capture(&self, look: &mut Look<'_>, descriptor: &Descriptor) -> Result<Vec<u8>, CaptureError> {
        let stat = descriptor.stat;
        let size = stat.st_size as u64;
        let first = look.first_sight("shared-memory", stat.st_dev, stat.st_ino);
        let contents = first.then(|| contents(look, descriptor, size)).transpose()?;
        Ok(encode(&SharedMemoryState { inode: stat.st_ino, flags: descriptor.flags(), size, contents }))
    }

    fn open(&self, rebuild: &mut Rebuild<'_>, _id: FileId, state: &[u8]) -> Result<OwnedFd, RebuildError> {
        let state: SharedMemoryState = decoded(state)?;
        let shown = format!("shared memory of {} bytes", state.size);
        if rebuild.object::<Made>("shared-memory", state.inode).is_none() {
            let made = shared_anonymous(state.size).rebuilding("making", &shown)?;
            let Some(contents) = &state.contents else {
                return Err(RebuildError::Damaged(format!("the contents of {shown} are not in it")));
            };
            contents.put(&made, rebuild.image).rebuilding("filling", &shown)?;
            rebuild.keep_object("shared-memory", state.inode, Made(made));
        }
        let made = rebuild.object::<Made>("shared-memory", state.inode);
        let made = made.ok_or_else(|| RebuildError::Damaged(format!("{shown} is of two kinds")))?;
        reopen::again(&made.0, state.flags).rebuilding("opening", &shown)
    }
}

fn contents(look: &mut Look<'_>, descriptor: &Descriptor, size: u64) -> Result<Contents, CaptureError> {
    let reader = reopen::again(descriptor, libc::O_RDONLY).capturing("opening", descriptor.object())?;
    Contents::take(&reader, size, look.data).capturing("reading", descriptor.object())
}

struct Made(OwnedFd);

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::files::testing::round_trip;
    use crate::look::Console;

    #[test]
    fn contents_and_kind_come_back() {
        let memory = File::from(shared_anonymous(3 << 20).unwrap());
        memory.write_all_at(b"here", 1 << 20).unwrap();
        let (_, states, again) = round_trip(&[&memory.into()], Console::None);
        assert_eq!(states[0].kind, "shared-memory");
        let link = std::fs::read_link(format!("/proc/self/fd/{}", again[0].as_raw_fd())).unwrap();
        assert_eq!(link.to_str(), Some("/dev/zero (deleted)"));
        let again = File::from(again[0].try_clone().unwrap());
        assert_eq!(again.metadata().unwrap().len(), 3 << 20);
        let mut bytes = [0; 4];
        again.read_exact_at(&mut bytes, 1 << 20).unwrap();
        assert_eq!(&bytes, b"here");
    }
}
