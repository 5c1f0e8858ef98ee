//! Regular files that are open but have lost the name they were opened by.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::FileType;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, open as open_file};
use nix::sys::stat::{Mode, fchmod, futimens};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, Whence, fchown, lseek};
use serde::{Deserialize, Serialize};

use super::attributes::{self, Attributes};
use super::mounts::{Mount, in_layer, mount_of};
use super::{Contents, Descriptor, from_host, reopen};
use crate::error::{CaptureError, Context, RebuildError};
use crate::look::Look;
use crate::rebuild::Rebuild;
use crate::sys::capability;

/// A file without its name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnlinkedState {
    /// The file: device and inode when it was captured. Descriptions of one file have the same.
    pub device: u64,
    /// See `device`.
    pub inode: u64,
    /// What it is made of; with the description that was met first.
    pub body: Option<Body>,
}

/// What a file without its name is made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Body {
    /// It has no name at all: everything about it.
    Whole {
        /// What is in it.
        contents: Contents,
        /// Permissions.
        mode: u32,
        /// Owner.
        uid: u32,
        /// Group.
        gid: u32,
        /// Last access: seconds, nanoseconds.
        accessed: (i64, i64),
        /// Last change of contents.
        modified: (i64, i64),
        /// Whether it was born without a name (`O_TMPFILE`).
        nameless: bool,
        /// Extended attributes.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        attributes: Attributes,
    },
    /// It has another name in the same file system.
    OtherName(#[serde(with = "serde_bytes")] Vec<u8>),
}

/// Whether `path` leads, in the pod, to the file of `descriptor`.
pub(super) fn is_named(look: &Look<'_>, descriptor: &Descriptor, path: &[u8]) -> bool {
    is_at(&look.path_from_host(descriptor, path), &descriptor.stat)
}

/// Whether the file of `stat` itself, not something that leads to it, is at a path of the host.
pub(crate) fn is_at(path: &Path, stat: &libc::stat) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|found| (found.dev(), found.ino()) == (stat.st_dev, stat.st_ino))
}

/// A name of the file of `stat` in a directory of the host.
pub(crate) fn name_in(directory: &Path, stat: &libc::stat) -> Option<OsString> {
    let entries = std::fs::read_dir(directory).ok()?;
    entries.flatten().find(|entry| is_at(&entry.path(), stat)).map(|entry| entry.file_name())
}

/// Captures the file of `descriptor`, which `path` does not lead to any more.
pub(super) fn capture(
    look: &mut Look<'_>,
    descriptor: &Descriptor,
    path: &[u8],
) -> Result<UnlinkedState, CaptureError> {
    let (device, inode) = (descriptor.stat.st_dev, descriptor.stat.st_ino);
    let first = look.first_sight("unlinked", device, inode);
    let body = first.then(|| body(look, descriptor, path)).transpose()?;
    Ok(UnlinkedState { device, inode, body })
}

fn body(look: &mut Look<'_>, descriptor: &Descriptor, path: &[u8]) -> Result<Body, CaptureError> {
    if descriptor.stat.st_nlink > 0 {
        if let Some(other) = other_name(look, descriptor, path) {
            return Ok(Body::OtherName(other));
        }
        match elsewhere(look, descriptor)? {
            Elsewhere::Named(other) => return Ok(Body::OtherName(other)),
            Elsewhere::Nowhere => {}
            Elsewhere::Unknown => {
                let why = "lost the name it was opened by and has another one elsewhere, which cannot be followed yet";
                return Err(descriptor.refuse(why));
            }
        }
    }
    let file = reopen::again(descriptor, libc::O_RDONLY | libc::O_NOATIME).capturing("opening", descriptor.object())?;
    let stat = descriptor.stat;
    let contents = Contents::take(&file, stat.st_size as u64, look.data).capturing("reading", descriptor.object())?;
    Ok(Body::Whole {
        contents,
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        accessed: (stat.st_atime, stat.st_atime_nsec),
        modified: (stat.st_mtime, stat.st_mtime_nsec),
        nameless: descriptor.flags() & libc::O_TMPFILE == libc::O_TMPFILE,
        attributes: attributes::take(file.as_fd()).capturing("reading the attributes of", descriptor.object())?,
    })
}

/// What is known of a file that has a name, though not where it was opened.
enum Elsewhere {
    /// Another name.
    Named(Vec<u8>),
    /// None: the links that it has are those of the root below, where it is still there.
    Nowhere,
    /// It may have one.
    Unknown,
}

/// Looks for another name of a file of the pod's root: whatever has been linked there is in the pod's own layer.
fn elsewhere(look: &mut Look<'_>, descriptor: &Descriptor) -> Result<Elsewhere, CaptureError> {
    let Some(mount) = mount_of(look, descriptor)? else { return Ok(Elsewhere::Unknown) };
    if mount.file_system != "overlay" || look.upper.as_os_str().is_empty() || look.nests.of(descriptor).is_some() {
        return Ok(Elsewhere::Unknown);
    }
    if !look.files.names.contains_key(&mount.id) {
        let layer = in_layer(&mount, &mount.point, &look.upper);
        let mut names = HashMap::new();
        let met = |place: &Path| {
            let path = mount.point.join(place).into_os_string().into_encoded_bytes();
            if let Ok(found) = std::fs::symlink_metadata(look.path_from_host(descriptor, &path)) {
                names.insert((found.dev(), found.ino()), path);
            }
        };
        every_file(&layer, FileType::is_file, met).capturing("looking through the layer for", descriptor.object())?;
        look.files.names.insert(mount.id, names);
    }
    let names = look.files.names.get(&mount.id);
    let name = names.and_then(|names| names.get(&(descriptor.stat.st_dev, descriptor.stat.st_ino)));
    Ok(name.cloned().map_or(Elsewhere::Nowhere, Elsewhere::Named))
}

/// Every name, in the pod, of the socket of `stat` on `mount`: in the pod's own layer, if that is an overlay.
pub(crate) fn names(look: &Look<'_>, mount: &Mount, stat: &libc::stat) -> std::io::Result<Vec<PathBuf>> {
    let on_host = |path: &Path| from_host(look.init, path.as_os_str().as_bytes());
    let top = match mount.file_system.as_str() {
        "overlay" => in_layer(mount, &mount.point, &look.upper),
        _ => on_host(&mount.point),
    };
    let mut names = Vec::new();
    every_file(&top, FileTypeExt::is_socket, |place| {
        let path = mount.point.join(place);
        names.extend(is_at(&on_host(&path), stat).then_some(path));
    })?;
    Ok(names)
}

/// Calls `met` with the path, below `top`, of every file there that is of a kind.
fn every_file(top: &Path, wanted: fn(&FileType) -> bool, mut met: impl FnMut(&Path)) -> std::io::Result<()> {
    let mut directories = vec![PathBuf::new()];
    while let Some(directory) = directories.pop() {
        let entries = match std::fs::read_dir(top.join(&directory)) {
            // Nothing was written there, or it is gone by now.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            let kind = entry.file_type()?;
            let place = directory.join(entry.file_name());
            if kind.is_dir() {
                directories.push(place);
            } else if wanted(&kind) {
                met(&place);
            }
        }
    }
    Ok(())
}

/// Another name of the file, in the directory of `path`.
fn other_name(look: &Look<'_>, descriptor: &Descriptor, path: &[u8]) -> Option<Vec<u8>> {
    let directory = reopen::as_path(path).parent()?;
    let there = look.path_from_host(descriptor, directory.as_os_str().as_bytes());
    let name = name_in(&there, &descriptor.stat)?;
    Some(directory.join(name).into_os_string().into_encoded_bytes())
}

/// Opens the file again, made anew by whoever comes first.
pub(super) fn open(
    rebuild: &mut Rebuild<'_>,
    path: &[u8],
    flags: i32,
    state: &UnlinkedState,
) -> Result<OwnedFd, RebuildError> {
    let shown = || format!("{} (deleted)", String::from_utf8_lossy(path));
    if rebuild.object::<Made>("unlinked", (state.device, state.inode)).is_none() {
        let Some(body) = &state.body else {
            return Err(RebuildError::Damaged(format!("the contents of {} are not in it", shown())));
        };
        let make = || make(rebuild, reopen::as_path(path), body, flags);
        let made = match body {
            // Its file system may be one of a user namespace.
            Body::Whole { uid, gid, .. } if rebuild.is_abroad() => {
                capability::making_as((*uid, *gid), make).and_then(|made| made)
            }
            _ => make(),
        };
        let file = made.rebuilding("making", shown())?;
        let born = flags & libc::O_TMPFILE == libc::O_TMPFILE;
        let born = born.then(|| file.try_clone()).transpose().rebuilding("copying", shown())?;
        rebuild.keep_object("unlinked", (state.device, state.inode), Made(file));
        if let Some(born) = born {
            reopen::set_flags(&born, flags).rebuilding("setting the flags", shown())?;
            return Ok(born);
        }
    }
    match rebuild.object::<Made>("unlinked", (state.device, state.inode)) {
        Some(made) => reopen::again(&made.0, flags).rebuilding("opening", shown()),
        None => Err(RebuildError::Damaged(format!("{} is of two kinds", shown()))),
    }
}

struct Made(OwnedFd);

fn make(rebuild: &Rebuild<'_>, path: &Path, body: &Body, flags: i32) -> std::io::Result<OwnedFd> {
    let file = match body {
        Body::OtherName(other) => borrow_name(path, |path| {
            std::fs::hard_link(reopen::as_path(other), path)?;
            Ok(reopen::path(path, libc::O_RDONLY)?)
        })?,
        // Always open for writing, so that the description itself can be filled.
        Body::Whole { nameless: true, .. } => {
            let flags = flags & !libc::O_ASYNC & !libc::O_APPEND & !libc::O_DIRECT;
            let flags = OFlag::from_bits_retain(flags) | OFlag::O_CLOEXEC;
            open_file(path.parent().unwrap_or(path), flags, Mode::S_IRWXU)?
        }
        Body::Whole { .. } => borrow_name(path, |path| {
            let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_RDWR | OFlag::O_CLOEXEC;
            Ok(open_file(path, flags, Mode::S_IRWXU)?)
        })?,
    };
    if let Body::Whole { contents, mode, uid, gid, accessed, modified, attributes, .. } = body {
        contents.put(&file, rebuild.image)?;
        attributes::put(file.as_fd(), attributes)?;
        fchown(&file, Some(Uid::from_raw(*uid)), Some(Gid::from_raw(*gid)))?;
        fchmod(&file, Mode::from_bits_truncate(*mode))?;
        lseek(&file, 0, Whence::SeekSet)?;
        futimens(&file, &TimeSpec::new(accessed.0, accessed.1), &TimeSpec::new(modified.0, modified.1))?;
    }
    Ok(file)
}

/// Runs `open`, which makes and opens `path`, and takes the name away again. What has the name now is moved aside
/// meanwhile, and directories that are gone come back meanwhile: nobody else is in the pod yet.
pub(super) fn borrow_name(
    path: &Path,
    open: impl FnOnce(&Path) -> std::io::Result<OwnedFd>,
) -> std::io::Result<OwnedFd> {
    let parent = path.parent().unwrap_or(path);
    let missing: Vec<&Path> = parent.ancestors().take_while(|d| !d.exists()).collect();
    std::fs::create_dir_all(parent)?;
    let aside = path.symlink_metadata().is_ok().then(|| aside_of(path));
    if let Some(aside) = &aside {
        std::fs::rename(path, aside)?;
    }
    let opened = open(path);
    let removed =
        if opened.is_ok() { std::fs::remove_file(path).or_else(|_| std::fs::remove_dir(path)) } else { Ok(()) };
    if let Some(aside) = &aside {
        std::fs::rename(aside, path)?;
    }
    for directory in missing {
        std::fs::remove_dir(directory)?;
    }
    removed.and(opened)
}

fn aside_of(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".zap-aside");
    path.with_file_name(name)
}
