//! Open directories.

use std::collections::HashSet;
use std::io;
use std::os::fd::OwnedFd;

use nix::unistd::{Whence, lseek};
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

use super::directory_notice::{self, ChangesState};
use super::{Descriptor, FileKind, decoded, reopen};
use crate::error::{CaptureError, Context, RebuildError};
use crate::ids::FileId;
use crate::image::encode;
use crate::look::Look;
use crate::rebuild::Rebuild;
use crate::sys::file;

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
    /// If it is neither at the beginning nor too long: the names that are still to be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rest: Option<Vec<ByteBuf>>,
    /// What its owner is told of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changes: Option<ChangesState>,
}

/// More names than that are not kept.
const MANY: usize = 1 << 20;

pub(super) struct Directory;

impl FileKind for Directory {
    fn name(&self) -> &'static str {
        "directory"
    }

    fn recognizes(&self, descriptor: &Descriptor) -> bool {
        descriptor.stat.st_mode & libc::S_IFMT == libc::S_IFDIR && descriptor.link.starts_with(b"/")
    }

    fn check(&self, descriptor: &Descriptor) -> Result<(), CaptureError> {
        directory_notice::check(descriptor)
    }

    fn capture(&self, _look: &mut Look<'_>, descriptor: &Descriptor) -> Result<Vec<u8>, CaptureError> {
        let (path, flags, position) = (descriptor.link.clone(), descriptor.flags(), descriptor.position());
        // Our copy shares the offset; one that is opened anew does not.
        let rest = match position {
            0 => None,
            _ => rest_of(descriptor, position).capturing("reading", descriptor.object())?,
        };
        let changes = directory_notice::capture(descriptor)?;
        Ok(encode(&DirectoryState { path, flags, position, rest, changes }))
    }

    fn open(&self, _rebuild: &mut Rebuild<'_>, _id: FileId, state: &[u8]) -> Result<OwnedFd, RebuildError> {
        let state: DirectoryState = decoded(state)?;
        let path = reopen::as_path(&state.path);
        let directory = reopen::path(path, state.flags).rebuilding("opening", path.display())?;
        let stat = file::fstat(&directory).rebuilding("looking at", path.display())?;
        if stat.st_mode & libc::S_IFMT != libc::S_IFDIR {
            let what = "it is no directory any more".to_owned();
            return Err(RebuildError::Changed { path: path.display().to_string(), what });
        }
        if state.position != 0 {
            let position = match &state.rest {
                Some(rest) => {
                    place_before(&directory, state.position as i64, rest).rebuilding("reading", path.display())?
                }
                None => state.position as i64,
            };
            lseek(&directory, position, Whence::SeekSet).rebuilding("seeking in", path.display())?;
        }
        Ok(directory)
    }
}

/// The names from a position on.
fn rest_of(descriptor: &Descriptor, position: u64) -> io::Result<Option<Vec<ByteBuf>>> {
    if descriptor.stat.st_nlink == 0 {
        return Ok(None);
    }
    let again = reopen::again(&descriptor.file, libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NOATIME)?;
    lseek(&again, position as i64, Whence::SeekSet)?;
    let names = file::entries(&again)?.into_iter().map(|(_, name)| ByteBuf::from(name));
    Ok(Some(names.collect()).filter(|names: &Vec<_>| names.len() <= MANY))
}

/// The place from which on every name of `rest` is read, and as few others as can be: another file system, or the same
/// one made anew, counts otherwise, and may have another order.
fn place_before(directory: &OwnedFd, position: i64, rest: &[ByteBuf]) -> io::Result<i64> {
    let again = reopen::again(directory, libc::O_RDONLY | libc::O_DIRECTORY)?;
    let from_there = lseek(&again, position, Whence::SeekSet).map(|_| file::entries(&again));
    if let Ok(Ok(same)) = from_there
        && same.iter().map(|(_, name)| name).eq(rest.iter().map(|name| &**name))
    {
        return Ok(position);
    }
    lseek(&again, 0, Whence::SeekSet)?;
    let entries = file::entries(&again)?;
    let rest: HashSet<&[u8]> = rest.iter().map(|name| name.as_slice()).collect();
    let first = entries.iter().position(|(_, name)| rest.contains(name.as_slice())).unwrap_or(entries.len());
    Ok(first.checked_sub(1).map_or(0, |before| entries[before].0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::testing::round_trip;
    use crate::look::Console;

    #[test]
    fn devices_directories_and_names_come_back() {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        for name in ["a", "b", "c"] {
            std::fs::write(directory.path().join(name), "").unwrap();
        }
        let open = |path: &std::path::Path, flags| reopen::path(path, flags).unwrap();
        let null = std::path::Path::new("/dev/null");
        let files = [open(directory.path(), libc::O_DIRECTORY), open(null, libc::O_RDWR), open(null, libc::O_PATH)];
        lseek(&files[0], 2, Whence::SeekSet).unwrap();
        let (_, states, again) = round_trip(&[&files[0], &files[1], &files[2]], Console::None);
        assert_eq!(states.iter().map(|s| s.kind.as_str()).collect::<Vec<_>>(), ["directory", "device", "name-only"]);
        assert_eq!(lseek(&again[0], 0, Whence::SeekCur).unwrap(), 2);
        for (old, new) in files.iter().zip(&again) {
            let flags = crate::sys::descriptor::flags;
            assert_eq!(flags(old).unwrap(), flags(new).unwrap());
        }
    }
}
