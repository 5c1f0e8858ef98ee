//! Opening files again: by path, or by a descriptor of ours.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sys::stat::Mode;
use nix::unistd::{Whence, lseek};

/// Flags that act at the moment of opening and must not act again.
const ONCE: i32 = libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC;

/// Opens `path` with the flags of a description that was captured; `O_ASYNC` is left to the owner's restoration.
pub(crate) fn path(path: impl AsRef<Path>, flags: i32) -> nix::Result<OwnedFd> {
    // A file born without a name has O_TMPFILE, with O_DIRECTORY in it, for life.
    let born = if flags & libc::O_TMPFILE == libc::O_TMPFILE { libc::O_TMPFILE } else { 0 };
    let flags = flags & !ONCE & !born & !libc::O_ASYNC | libc::O_CLOEXEC | libc::O_NOCTTY;
    open(path.as_ref(), OFlag::from_bits_retain(flags), Mode::empty())
}

/// The same, at an offset.
pub(crate) fn path_at(path: impl AsRef<Path>, flags: i32, position: u64) -> io::Result<OwnedFd> {
    let file = self::path(path, flags)?;
    if position != 0 {
        lseek(&file, position as i64, Whence::SeekSet)?;
    }
    Ok(file)
}

/// Sets the status flags that can be set later, among them those that some files refuse when they are opened.
pub(crate) fn set_flags(file: impl AsFd, flags: i32) -> nix::Result<()> {
    fcntl(file, FcntlArg::F_SETFL(OFlag::from_bits_retain(flags & !libc::O_ASYNC))).map(drop)
}

/// A new description of the file behind `file`, which may have no name any more.
pub(crate) fn again(file: impl AsFd, flags: i32) -> nix::Result<OwnedFd> {
    path(format!("/proc/self/fd/{}", file.as_fd().as_raw_fd()), flags & !libc::O_NOFOLLOW)
}

/// Bytes of a link as a path.
pub(crate) fn as_path(bytes: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(bytes))
}

/// A path from a root as one from wherever that root is.
pub(crate) fn relative(path: &[u8]) -> &Path {
    as_path(path.strip_prefix(b"/").unwrap_or(path))
}

/// A path of the pod as it is reached from the host, through the root of one of its processes.
pub(crate) fn from_host(init: crate::ids::HostPid, path: &[u8]) -> std::path::PathBuf {
    init.proc("root").join(relative(path))
}
