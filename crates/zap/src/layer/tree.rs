//! Walking a tree that somebody else may be changing: by descriptors, never following a link.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{FileStat, Mode, fstatat};

/// A file met on the walk.
pub(super) struct Met<'a> {
    /// Relative to the top; empty for the top itself.
    pub(super) path: &'a [u8],
    /// The directory that it is in, and its name there.
    pub(super) directory: BorrowedFd<'a>,
    pub(super) name: &'a CString,
    pub(super) stat: FileStat,
}

const DIRECTORY: OFlag = OFlag::O_DIRECTORY.union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC).union(OFlag::O_RDONLY);

/// Calls `visit` for every file below `top` and for `top` itself, directories before what is in them. What lies on another
/// file system is left out; what vanishes meanwhile too.
pub(super) fn walk(top: BorrowedFd<'_>, visit: &mut dyn FnMut(&Met<'_>) -> io::Result<()>) -> io::Result<()> {
    let here = CString::from(c".");
    let stat = fstatat(top, here.as_c_str(), AtFlags::AT_SYMLINK_NOFOLLOW)?;
    visit(&Met { path: b"", directory: top, name: &here, stat })?;
    let top = openat(top, here.as_c_str(), DIRECTORY, Mode::empty())?;
    descend(top, &mut Vec::new(), stat.st_dev, visit)
}

fn descend(
    directory: OwnedFd,
    path: &mut Vec<u8>,
    device: u64,
    visit: &mut dyn FnMut(&Met<'_>) -> io::Result<()>,
) -> io::Result<()> {
    for name in names(&directory)? {
        let Some(stat) = unless_gone(fstatat(&directory, name.as_c_str(), AtFlags::AT_SYMLINK_NOFOLLOW))? else {
            continue;
        };
        if stat.st_dev != device {
            continue;
        }
        let length = path.len();
        if length > 0 {
            path.push(b'/');
        }
        path.extend_from_slice(name.as_bytes());
        visit(&Met { path, directory: directory.as_fd(), name: &name, stat })?;
        if stat.st_mode & libc::S_IFMT == libc::S_IFDIR
            && let Some(inner) = unless_gone(openat(&directory, name.as_c_str(), DIRECTORY, Mode::empty()))?
        {
            descend(inner, path, device, visit)?;
        }
        path.truncate(length);
    }
    Ok(())
}

fn names(directory: &OwnedFd) -> io::Result<Vec<CString>> {
    let mut names = Vec::new();
    for entry in Dir::from_fd(directory.try_clone()?)?.iter() {
        let name = entry?.file_name().to_owned();
        if name.as_c_str() != c"." && name.as_c_str() != c".." {
            names.push(name);
        }
    }
    // a tmpfs lists the newest first: made again in this order, they are listed as before
    names.reverse();
    Ok(names)
}

/// `None` for what is not there any more, or is something else by now.
pub(super) fn unless_gone<T>(result: nix::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP | Errno::ESTALE) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// A path that leads to a file in `directory` whatever happens to the names above it. The last component is not followed by
/// calls that do not follow links.
pub(super) fn magic_path(directory: BorrowedFd<'_>, name: &CString) -> std::path::PathBuf {
    let name = <std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(name.as_bytes());
    std::path::Path::new("/proc/self/fd").join(directory.as_raw_fd().to_string()).join(name)
}
