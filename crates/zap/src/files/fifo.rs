//! Named pipes.

use std::os::fd::OwnedFd;

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use serde::{Deserialize, Serialize};

use super::mounts::{Origin, origin};
use super::pipe::{self, SharedState};
use super::{Descriptor, FileKind, decoded, reopen, unlinked};
use crate::error::{CaptureError, Context, RebuildError};
use crate::ids::FileId;
use crate::image::encode;
use crate::look::Look;
use crate::rebuild::Rebuild;

/// An end of a named pipe.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FifoState {
    /// The path in the pod, also of one that was removed.
    #[serde(with = "serde_bytes")]
    pub path: Vec<u8>,
    /// The pipe: its inode number when it was captured. Ends of one pipe have the same.
    pub pipe: u64,
    /// The file system in which it is, likewise.
    #[serde(default)]
    pub device: u64,
    /// Access mode and status flags.
    pub flags: i32,
    /// Whether it has lost its name.
    pub removed: bool,
    /// Permissions.
    pub mode: u32,
    /// What the ends share; with the end that was met first.
    pub shared: Option<SharedState>,
}

pub(super) struct Fifo;

/// Both ends at once: while it is open, no other opening waits for a partner.
struct Anchor(OwnedFd);

impl FileKind for Fifo {
    fn name(&self) -> &'static str {
        "fifo"
    }

    fn recognizes(&self, descriptor: &Descriptor) -> bool {
        descriptor.stat.st_mode & libc::S_IFMT == libc::S_IFIFO && descriptor.link.starts_with(b"/")
    }

    fn capture(&self, look: &mut Look<'_>, descriptor: &Descriptor) -> Result<Vec<u8>, CaptureError> {
        let removed = !unlinked::is_named(look, descriptor, &descriptor.link);
        let path = match removed {
            true => descriptor.link.strip_suffix(b" (deleted)").unwrap_or(&descriptor.link).to_vec(),
            false => descriptor.link.clone(),
        };
        let external = !removed && origin(look, descriptor, reopen::as_path(&path))? == Origin::External;
        let first = look.first_sight("fifo", descriptor.stat.st_dev, descriptor.stat.st_ino);
        // What is in a pipe that others outside may read stays there.
        let shared = (first && !external).then(|| pipe::shared(descriptor)).transpose()?;
        let (pipe, device, mode) = (descriptor.stat.st_ino, descriptor.stat.st_dev, descriptor.stat.st_mode & 0o7777);
        Ok(encode(&FifoState { path, pipe, device, flags: descriptor.flags(), removed, mode, shared }))
    }

    fn open(&self, rebuild: &mut Rebuild<'_>, _id: FileId, state: &[u8]) -> Result<OwnedFd, RebuildError> {
        let state: FifoState = decoded(state)?;
        let path = reopen::as_path(&state.path);
        if rebuild.object::<Anchor>("fifo", (state.device, state.pipe)).is_none() {
            let anchor = anchor(&state).rebuilding("opening", path.display())?;
            rebuild.keep_object("fifo", (state.device, state.pipe), Anchor(anchor));
        }
        let Some(Anchor(anchor)) = rebuild.object("fifo", (state.device, state.pipe)) else {
            return Err(RebuildError::Damaged(format!("{} is of two kinds", path.display())));
        };
        if let Some(shared) = &state.shared {
            pipe::restore_shared(anchor, shared).rebuilding("filling", path.display())?;
        }
        let file = match state.removed {
            true => reopen::again(&*anchor, state.flags & !libc::O_DIRECT),
            false => reopen::path(path, state.flags & !libc::O_DIRECT),
        };
        let file = file.rebuilding("opening", path.display())?;
        reopen::set_flags(&file, state.flags).rebuilding("setting the flags of", path.display())?;
        Ok(file)
    }
}

fn anchor(state: &FifoState) -> std::io::Result<OwnedFd> {
    let path = reopen::as_path(&state.path);
    let both = libc::O_RDWR | libc::O_NONBLOCK;
    if !state.removed {
        return Ok(reopen::path(path, both)?);
    }
    unlinked::borrow_name(path, |path| {
        mkfifo(path, Mode::from_bits_truncate(state.mode))?;
        Ok(reopen::path(path, both)?)
    })
}

#[cfg(test)]
mod tests {
    use nix::unistd::{read, write};

    use super::*;
    use crate::look::Console;

    fn round(remove: bool) {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = directory.path().join("fifo");
        mkfifo(&path, Mode::S_IRWXU).unwrap();
        let from = reopen::path(&path, libc::O_RDONLY | libc::O_NONBLOCK).unwrap();
        let to = reopen::path(&path, libc::O_WRONLY).unwrap();
        write(&to, b"waiting").unwrap();
        // A pipe that has a name is the same pipe after a restart of this sort: take out what is in it.
        if remove {
            std::fs::remove_file(&path).unwrap();
        }
        let captured = crate::files::testing::captured(&[&to, &from], Console::None);
        let mut buffer = [0; 99];
        assert_eq!(read(&from, &mut buffer).unwrap(), 7);
        let (again, _) = crate::files::testing::rebuilt(captured);
        assert_eq!(read(&again[1], &mut buffer).unwrap(), 7);
        assert_eq!(&buffer[..7], b"waiting");
        drop((to, again));
        crate::files::testing::wait_for_hangup(&from);
        assert_eq!(read(&from, &mut buffer).unwrap(), 0);
    }

    #[test]
    fn what_waits_in_a_named_pipe_comes_back() {
        round(false);
    }

    #[test]
    fn also_when_its_name_is_gone() {
        round(true);
    }
}
