//! Mounts by file descriptor: `fsopen`, `fsmount`, `open_tree`, `move_mount`, `mount_setattr`, `pivot_root`.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::check;

const FSOPEN_CLOEXEC: u32 = 1;
const FSCONFIG_SET_FLAG: u32 = 0;
const FSCONFIG_SET_STRING: u32 = 1;
const FSCONFIG_CMD_CREATE: u32 = 6;
const FSMOUNT_CLOEXEC: u32 = 1;
const OPEN_TREE_CLONE: u32 = 1;
const MOVE_MOUNT_F_EMPTY_PATH: u32 = 4;
const MOVE_MOUNT_T_EMPTY_PATH: u32 = 0x40;

/// The mount cannot be written to.
pub const READ_ONLY: u64 = 1;
/// Set-user-ID bits have no effect there.
pub const NO_SUID: u64 = 2;
/// Device nodes do not work there.
pub const NO_DEV: u64 = 4;
/// Programs cannot be executed there.
pub const NO_EXEC: u64 = 8;

fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = check(result)?;
    // SAFETY: the calls below return a fresh descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

fn c_path(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

/// A new mount of a new file system, attached nowhere yet. Options without a value are flags.
pub fn new_mount(kind: &CStr, options: &[(&CStr, Option<&CStr>)], attributes: u64) -> io::Result<OwnedFd> {
    // SAFETY: the kernel reads one C string, which outlives the call.
    let context = owned(unsafe { libc::syscall(libc::SYS_fsopen, kind.as_ptr(), FSOPEN_CLOEXEC) })?;
    for (key, value) in options {
        match value {
            Some(value) => configure(&context, FSCONFIG_SET_STRING, key.as_ptr(), value.as_ptr())?,
            None => configure(&context, FSCONFIG_SET_FLAG, key.as_ptr(), std::ptr::null())?,
        }
    }
    configure(&context, FSCONFIG_CMD_CREATE, std::ptr::null(), std::ptr::null())?;
    // SAFETY: numbers only.
    owned(unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), FSMOUNT_CLOEXEC, attributes) })
}

fn configure(context: &OwnedFd, command: u32, key: *const i8, value: *const i8) -> io::Result<()> {
    // SAFETY: key and value are null or C strings that outlive the call (callers pass `CStr::as_ptr`).
    check(unsafe { libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), command, key, value, 0) }).map(drop)
}

/// A copy of the mount at `path`, attached nowhere yet; with what is mounted below if `recursive`.
pub fn copy_mount(path: &Path, recursive: bool) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let flags = OPEN_TREE_CLONE | libc::O_CLOEXEC as u32 | if recursive { libc::AT_RECURSIVE as u32 } else { 0 };
    // SAFETY: the kernel reads one C string, which outlives the call.
    owned(unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) })
}

/// The mount that is at `place` on another one.
pub fn open_mount(on: impl AsFd, place: &Path) -> io::Result<OwnedFd> {
    let place = c_path(place)?;
    let flags = libc::O_CLOEXEC as u32 | libc::AT_EMPTY_PATH as u32;
    // SAFETY: the kernel reads one C string, which outlives the call.
    owned(unsafe { libc::syscall(libc::SYS_open_tree, on.as_fd().as_raw_fd(), place.as_ptr(), flags) })
}

/// Attaches a mount at `target`.
pub fn attach(mount: impl AsFd, target: &Path) -> io::Result<()> {
    let target = c_path(target)?;
    // SAFETY: the kernel reads two C strings, which outlive the call.
    check(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            target.as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH,
        )
    })
    .map(drop)
}

/// Attaches a mount on another one, at `place` there (empty: on its top).
pub fn attach_on(mount: impl AsFd, on: impl AsFd, place: &Path) -> io::Result<()> {
    let place = c_path(place)?;
    // SAFETY: the kernel reads two C strings, which outlive the call.
    check(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            on.as_fd().as_raw_fd(),
            place.as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH | if place.is_empty() { MOVE_MOUNT_T_EMPTY_PATH } else { 0 },
        )
    })
    .map(drop)
}

#[repr(C)]
struct MountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    userns: u64,
}

fn set_attr(at: i32, path: &CStr, flags: i32, attr: &MountAttr) -> io::Result<()> {
    // SAFETY: the kernel reads a C string and one MountAttr, both of which outlive the call.
    check(unsafe {
        libc::syscall(libc::SYS_mount_setattr, at, path.as_ptr(), flags, &raw const *attr, size_of::<MountAttr>())
    })
    .map(drop)
}

/// Sets attributes of a mount, and of all below it if `recursive`.
pub fn set_attributes(mount: BorrowedFd<'_>, attributes: u64, recursive: bool) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    set_attr(mount.as_raw_fd(), c"", flags, &MountAttr { set: attributes, clear: 0, propagation: 0, userns: 0 })
}

/// Gives a mount exactly these attributes, and a propagation (`MS_SHARED` …) unless that is 0.
pub fn shape(mount: BorrowedFd<'_>, attributes: u64, propagation: u64) -> io::Result<()> {
    // Those that stand for a choice are cleared together.
    const ACCESS_TIMES: u64 = 0x70;
    let all = READ_ONLY | NO_SUID | NO_DEV | NO_EXEC | ACCESS_TIMES | 0x80 | 0x20_0000;
    let attr = MountAttr { set: attributes, clear: all & !attributes | ACCESS_TIMES, propagation, userns: 0 };
    set_attr(mount.as_raw_fd(), c"", libc::AT_EMPTY_PATH, &attr)
}

/// The number of the mount that a file was opened through.
pub fn id_of(file: impl AsFd) -> io::Result<u64> {
    const MOUNT_ID: u32 = 0x1000;
    // SAFETY: an all-zero statx is a valid one.
    let mut facts: libc::statx = unsafe { std::mem::zeroed() };
    let number = file.as_fd().as_raw_fd();
    // SAFETY: the kernel reads an empty C string and writes one statx, both of which outlive the call.
    check(unsafe { libc::statx(number, c"".as_ptr(), libc::AT_EMPTY_PATH, MOUNT_ID, &raw mut facts) }.into())?;
    Ok(facts.stx_mnt_id)
}

/// Cuts the whole mount tree of the caller's namespace off from that of other namespaces.
pub fn make_all_private() -> io::Result<()> {
    let attr = MountAttr { set: 0, clear: 0, propagation: libc::MS_PRIVATE, userns: 0 };
    set_attr(libc::AT_FDCWD, c"/", libc::AT_RECURSIVE, &attr)
}

/// Gives what is mounted at `path` a propagation (`MS_SHARED` …).
pub fn propagate(path: &Path, propagation: u64) -> io::Result<()> {
    set_attr(libc::AT_FDCWD, &c_path(path)?, 0, &MountAttr { set: 0, clear: 0, propagation, userns: 0 })
}

/// Makes the current directory (a mount point) the root, and detaches the old root.
pub fn pivot_here() -> io::Result<()> {
    // SAFETY: the kernel reads two C strings.
    check(unsafe { libc::syscall(libc::SYS_pivot_root, c".".as_ptr(), c".".as_ptr()) })?;
    nix::mount::umount2(".", nix::mount::MntFlags::MNT_DETACH)?;
    nix::unistd::chdir("/")?;
    Ok(())
}
