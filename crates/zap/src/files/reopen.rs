//! Opening files again: by path, or by a descriptor of ours.

use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;

/// Flags that act at the moment of opening and must not act again.
const ONCE: i32 = libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC | libc::O_TMPFILE & !libc::O_DIRECTORY;

/// Opens `path` with the flags of a description that was captured; `O_ASYNC` is left to the owner's restoration.
pub(crate) fn path(path: impl AsRef<Path>, flags: i32) -> nix::Result<OwnedFd> {
    let flags = flags & !ONCE & !libc::O_ASYNC | libc::O_CLOEXEC | libc::O_NOCTTY;
    open(path.as_ref(), OFlag::from_bits_retain(flags), Mode::empty())
}

/// A new description of the file behind `file`, which may have no name any more.
pub(crate) fn again(file: impl AsFd, flags: i32) -> nix::Result<OwnedFd> {
    path(format!("/proc/self/fd/{}", file.as_fd().as_raw_fd()), flags & !libc::O_NOFOLLOW)
}

/// Bytes of a link as a path.
pub(crate) fn as_path(bytes: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(bytes))
}

/// A path of the pod as it is reached from the host, through the root of one of its processes.
pub(crate) fn from_host(init: crate::ids::HostPid, path: &[u8]) -> std::path::PathBuf {
    let inside = path.strip_prefix(b"/").unwrap_or(path);
    init.proc("root").join(as_path(inside))
}
