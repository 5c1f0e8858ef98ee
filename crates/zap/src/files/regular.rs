//! Regular files: by path where the path leads to the same file after a restart, by contents where it does not.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use nix::fcntl::{AtFlags, OFlag};
use nix::sys::stat::{Mode, fstatat};
use nix::unistd::{Whence, lseek};
use serde::{Deserialize, Serialize};

use super::mounts::{Origin, home_of, in_layer, mount_of, origin};
use super::unlinked::{self, UnlinkedState};
use super::{Contents, Descriptor, FileIdentity, FileKind, FileState, decoded, identity, reopen};
use crate::error::{CaptureError, Context, RebuildError};
use crate::ids::FileId;
use crate::image::encode;
use crate::look::Look;
use crate::parallel;
use crate::rebuild::Rebuild;

/// An open regular file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegularState {
    /// The path in the pod; for a file without a name, the last one it had.
    #[serde(with = "serde_bytes")]
    pub path: Vec<u8>,
    /// The path under which the pod was born with it, if it is shown elsewhere by a mount of the pod's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub home: Option<serde_bytes::ByteBuf>,
    /// Access mode and status flags.
    pub flags: i32,
    /// The offset.
    pub position: u64,
    /// Where its contents come from at a restart.
    pub source: Source,
}

/// Mode, user and group of a file.
pub type Rights = (u32, u32, u32);

/// Where the contents of a regular file come from at a restart.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Source {
    /// A layer of the image, or a file system of the kernel's own: it is there under its path.
    Path,
    /// A bind mount: whatever is there under its path.
    External,
    /// The root of the pod, which must not have changed.
    Root(FileIdentity),
    /// The root, or the image where the root has changed.
    Carried(FileIdentity, Contents, #[serde(default)] Option<Rights>),
    /// It has no name under which it could be found.
    Unlinked(UnlinkedState),
}

impl RegularState {
    /// The path under which the pod was born with it.
    fn at_home(&self) -> &[u8] {
        self.home.as_ref().map_or(&self.path, |home| home)
    }
}

pub(super) struct Regular;

/// Links of files that look like paths but belong to memory.
const OF_MEMORY: [&[u8]; 5] = [b"/memfd:", b"/SYSV", b"/dev/zero (deleted)", b"/anon_hugepage", b"/secretmem"];

impl FileKind for Regular {
    fn name(&self) -> &'static str {
        "regular"
    }

    fn recognizes(&self, descriptor: &Descriptor) -> bool {
        descriptor.stat.st_mode & libc::S_IFMT == libc::S_IFREG
            && descriptor.link.starts_with(b"/")
            && !OF_MEMORY.iter().any(|m| descriptor.link.starts_with(m))
            && !super::of_proc(descriptor)
    }

    fn look_ahead(&self, look: &mut Look<'_>, descriptor: &Descriptor) -> Result<(), CaptureError> {
        let path = reopen::as_path(&descriptor.link);
        if !unlinked::is_named(look, descriptor, &descriptor.link) || origin(look, descriptor, path)? != Origin::Lower {
            return Ok(());
        }
        let home = home_of(look, descriptor, path)?.unwrap_or_else(|| descriptor.link.clone());
        if !look.used.contains_key(&home) {
            // Whatever is wrong with the file is for the capture to say.
            let found = identity::identity_of(&identity::in_root(&look.spec.root, &home)).ok();
            let found = found.filter(|found| found.size == descriptor.stat.st_size as u64);
            look.used.extend(found.map(|found| (home, found)));
        }
        Ok(())
    }

    fn capture(&self, look: &mut Look<'_>, descriptor: &Descriptor) -> Result<Vec<u8>, CaptureError> {
        let (path, source) = source(look, descriptor)?;
        let home = match source {
            Source::Root(_) | Source::Carried(..) => home_of(look, descriptor, reopen::as_path(&path))?,
            _ => None,
        };
        let home = home.map(serde_bytes::ByteBuf::from);
        Ok(encode(&RegularState { path, home, flags: descriptor.flags(), position: descriptor.position(), source }))
    }

    fn open(&self, rebuild: &mut Rebuild<'_>, _id: FileId, state: &[u8]) -> Result<OwnedFd, RebuildError> {
        let state: RegularState = decoded(state)?;
        let file = open(rebuild, &state)?;
        if state.position != 0 && state.position != lseek(&file, 0, Whence::SeekCur).unwrap_or(-1) as u64 {
            let shown = reopen::as_path(&state.path).display();
            lseek(&file, state.position as i64, Whence::SeekSet).rebuilding("seeking in", shown)?;
        }
        Ok(file)
    }
}

/// The path of a file, and where its contents come from.
fn source(look: &mut Look<'_>, descriptor: &Descriptor) -> Result<(Vec<u8>, Source), CaptureError> {
    let mut path = descriptor.link.clone();
    let removed = descriptor.link.strip_suffix(b" (deleted)");
    // One without any name is still found where it is mounted itself.
    let mounted = removed.filter(|_| descriptor.stat.st_nlink == 0);
    if let Some(mounted) = mounted.filter(|path| unlinked::is_named(look, descriptor, path)) {
        path = mounted.to_vec();
    } else if !unlinked::is_named(look, descriptor, &path) {
        let Some(path) = removed else {
            return Err(descriptor.refuse("is hidden by another file or mount, so that a restart could not find it"));
        };
        let state = unlinked::capture(look, descriptor, path)?;
        return Ok((path.to_vec(), Source::Unlinked(state)));
    }
    let source = match origin(look, descriptor, reopen::as_path(&path))? {
        Origin::Layer | Origin::Kernel => Source::Path,
        Origin::External => Source::External,
        Origin::Lower => {
            let home = home_of(look, descriptor, reopen::as_path(&path))?;
            lower(look, descriptor, home.as_deref().unwrap_or(&path))?
        }
        Origin::Unknown(what) => {
            return Err(descriptor.refuse(format!("is on {what}, which does not travel with a pod")));
        }
    };
    Ok((path, source))
}

fn lower(look: &mut Look<'_>, descriptor: &Descriptor, path: &[u8]) -> Result<Source, CaptureError> {
    let size = descriptor.stat.st_size as u64;
    match identity::identity_of(&identity::in_root(&look.spec.root, path)) {
        Ok(found) if found.size == size && !look.carry_files => Ok(Source::Root(found)),
        // Not under its path on the host, or asked to be carried.
        found => {
            let reader = reopen::again(descriptor, libc::O_RDONLY).capturing("opening", descriptor.object())?;
            let contents = Contents::take(&reader, size, look.data).capturing("reading", descriptor.object())?;
            let other = FileIdentity { size, blake3: [0; 32] };
            let stat = &descriptor.stat;
            let rights = Some((stat.st_mode & 0o7777, stat.st_uid, stat.st_gid));
            Ok(Source::Carried(found.unwrap_or(other), contents, rights))
        }
    }
}

/// A file of the root that zap opened, captured while the pod runs. In the hold it is enough to see that it still is the
/// file under its path.
pub struct RootFile {
    pub(super) descriptor: Descriptor,
    pub(super) state: Vec<u8>,
    /// Where it would be if the pod had written it since.
    written: Option<PathBuf>,
}

impl RootFile {
    /// Captures it, if it is one that the image need not carry.
    pub(crate) fn capture(look: &mut Look<'_>, descriptor: Descriptor) -> Option<RootFile> {
        let path = descriptor.link.clone();
        let here = reopen::as_path(&path);
        let can_be = !look.carry_files && Regular.recognizes(&descriptor);
        if !can_be || !unlinked::is_named(look, &descriptor, &path) {
            return None;
        }
        let mount = mount_of(look, &descriptor).ok()??;
        let is_elsewhere = home_of(look, &descriptor, here).ok()?.is_some();
        if is_elsewhere || origin(look, &descriptor, here).ok()? != Origin::Lower {
            return None;
        }
        let written = (mount.file_system == "overlay").then(|| in_layer(&mount, here, &look.upper));
        let identity = identity::identity_of(&identity::in_root(&look.spec.root, &path)).ok()?;
        if identity.size != descriptor.stat.st_size as u64 {
            return None;
        }
        let source = Source::Root(identity);
        let state = encode(&RegularState { path, home: None, flags: descriptor.flags(), position: 0, source });
        Some(RootFile { descriptor, state, written })
    }

    /// The open file.
    pub(crate) fn descriptor(&self) -> &Descriptor {
        &self.descriptor
    }

    /// Whether it is what it was.
    pub(crate) fn is_current(&self, look: &mut Look<'_>) -> bool {
        let path = look.path_from_host(&self.descriptor, &self.descriptor.link);
        let (directories, stat) = (&mut look.directories, &self.descriptor.stat);
        let is_it = |found: libc::stat| (found.st_dev, found.st_ino) == (stat.st_dev, stat.st_ino);
        directories.look_up(&path).is_some_and(is_it)
            && self.written.as_ref().is_none_or(|path| directories.look_up(path).is_none())
    }
}

/// Directories of the host, each opened once, however many files in it are looked up while everything stands still.
#[derive(Default)]
pub struct Directories(HashMap<PathBuf, Option<OwnedFd>>);

impl Directories {
    /// What is at a path, not what it leads to.
    fn look_up(&mut self, path: &Path) -> Option<libc::stat> {
        let (above, name) = (path.parent()?, path.file_name()?);
        if !self.0.contains_key(above) {
            let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
            self.0.insert(above.to_owned(), nix::fcntl::open(above, flags, Mode::empty()).ok());
        }
        fstatat(self.0.get(above)?.as_ref()?, name, AtFlags::AT_SYMLINK_NOFOLLOW).ok()
    }
}

fn open(rebuild: &mut Rebuild<'_>, state: &RegularState) -> Result<OwnedFd, RebuildError> {
    let path = reopen::as_path(&state.path);
    match &state.source {
        Source::Unlinked(file) => return unlinked::open(rebuild, &state.path, state.flags, file),
        Source::Carried(identity, contents, rights) => {
            let place = rebuild.look_from(None)?;
            if identity::verify(Path::new("/"), state.at_home(), identity).is_err() {
                let home = reopen::as_path(state.at_home());
                put_there(rebuild, home, contents, *rights).rebuilding("writing", path.display())?;
            }
            rebuild.look_from(place)?;
        }
        _ => {}
    }
    let file = reopen::path(path, state.flags).map_err(|e| gone(path, e))?;
    if let Source::Root(expected) = &state.source {
        let size = crate::sys::file::fstat(&file).rebuilding("looking at", path.display())?.st_size as u64;
        if size != expected.size {
            let what = format!("it has {size} bytes, not {}", expected.size);
            return Err(RebuildError::Changed { path: path.display().to_string(), what });
        }
    }
    Ok(file)
}

/// Writes a file that the image carries. Where the root has none of that name its directories and rights are made as well.
fn put_there(rebuild: &Rebuild<'_>, home: &Path, contents: &Contents, rights: Option<Rights>) -> std::io::Result<()> {
    let is_new = home.symlink_metadata().is_err();
    if let Some(above) = home.parent().filter(|_| is_new) {
        std::fs::create_dir_all(above)?;
    }
    let written = std::fs::File::create(home)?;
    contents.put(&written, rebuild.image)?;
    if let Some((mode, uid, gid)) = rights.filter(|_| is_new) {
        std::os::unix::fs::fchown(&written, Some(uid), Some(gid))?;
        written.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(mode))?;
    }
    Ok(())
}

fn gone(path: &Path, error: nix::Error) -> RebuildError {
    let (path, what) = (path.display().to_string(), "it is gone".to_owned());
    match error {
        nix::Error::ENOENT => RebuildError::Changed { path, what },
        other => RebuildError::Kernel { step: "opening", object: path, source: other.into() },
    }
}

/// Refuses a root whose files are not what the open files of an image need. For the monitor, before anything is made.
pub fn verify_root<'s>(root: &Path, states: impl IntoIterator<Item = &'s FileState>) -> Result<(), RebuildError> {
    let ours = states.into_iter().filter(|s| s.kind == Regular.name()).collect();
    let verify = |state: &FileState| {
        let state: RegularState = decoded(&state.state)?;
        match &state.source {
            Source::Root(expected) => identity::verify(root, state.at_home(), expected),
            _ => Ok(()),
        }
    };
    parallel::map(ours, verify).into_iter().collect()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::{FileExt, OpenOptionsExt};

    use nix::unistd::{read, write};

    use super::*;
    use crate::files::testing::round_trip;
    use crate::look::Console;
    use crate::sys::{descriptor, file::fstat};

    /// A directory on a tmpfs, as everything that travels in a layer.
    fn directory() -> tempfile::TempDir {
        tempfile::tempdir_in("/dev/shm").unwrap()
    }

    fn link(file: &OwnedFd) -> String {
        fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap().to_str().unwrap().to_owned()
    }

    #[test]
    fn offset_and_flags_come_back() {
        let directory = directory();
        let file = fs::File::options().create(true).append(true).read(true).open(directory.path().join("log")).unwrap();
        let file = OwnedFd::from(file);
        write(&file, b"four").unwrap();
        lseek(&file, 2, Whence::SeekSet).unwrap();
        let (_, _, again) = round_trip(&[&file], Console::None);
        assert_eq!(descriptor::flags(&again[0]).unwrap(), descriptor::flags(&file).unwrap());
        assert_eq!(lseek(&again[0], 0, Whence::SeekCur).unwrap(), 2);
        assert_eq!(link(&again[0]), link(&file));
    }

    #[test]
    fn an_unlinked_file_is_made_anew_with_its_holes() {
        let directory = directory();
        let path = directory.path().join("gone (deleted)");
        let file =
            fs::File::options().create(true).truncate(true).write(true).read(true).mode(0o640).open(&path).unwrap();
        file.write_at(b"start", 0).unwrap();
        file.write_at(b"end", 10 << 20).unwrap();
        let reader = OwnedFd::from(fs::File::open(&path).unwrap());
        fs::remove_file(&path).unwrap();
        fs::write(&path, "another").unwrap();
        let file = OwnedFd::from(file);
        let (_, _, again) = round_trip(&[&file, &reader], Console::None);
        let (old, new) = (fstat(&file).unwrap(), fstat(&again[0]).unwrap());
        assert_eq!((old.st_size, old.st_mode, old.st_mtime_nsec), (new.st_size, new.st_mode, new.st_mtime_nsec));
        assert_eq!((new.st_nlink, new.st_ino), (0, fstat(&again[1]).unwrap().st_ino));
        assert!(new.st_blocks < 1000 && old.st_ino != new.st_ino);
        assert_eq!(link(&again[0]), link(&file));
        assert_eq!(fs::read(&path).unwrap(), b"another");
        write(&again[0], b"S").unwrap();
        let mut bytes = [0; 5];
        read(&again[1], &mut bytes).unwrap();
        assert_eq!(&bytes, b"Start");
    }

    #[test]
    fn a_file_in_a_directory_that_is_gone() {
        let directory = directory();
        let inner = directory.path().join("a/b");
        fs::create_dir_all(&inner).unwrap();
        fs::write(inner.join("file"), "kept").unwrap();
        let file = OwnedFd::from(fs::File::open(inner.join("file")).unwrap());
        fs::remove_dir_all(directory.path().join("a")).unwrap();
        let (_, _, again) = round_trip(&[&file], Console::None);
        assert_eq!(link(&again[0]), link(&file));
        assert!(!directory.path().join("a").exists());
    }

    #[test]
    fn a_file_with_another_name_is_the_same_file() {
        let directory = directory();
        let (path, other) = (directory.path().join("one"), directory.path().join("two"));
        fs::write(&path, "shared").unwrap();
        fs::hard_link(&path, &other).unwrap();
        let file = OwnedFd::from(fs::File::open(&path).unwrap());
        fs::remove_file(&path).unwrap();
        let (_, _, again) = round_trip(&[&file], Console::None);
        assert_eq!(fstat(&again[0]).unwrap().st_ino, fstat(&file).unwrap().st_ino);
        assert_eq!(link(&again[0]), link(&file));
    }

    #[test]
    fn a_temporary_file_without_a_name() {
        let directory = directory();
        let options = |o: &mut fs::OpenOptions| o.custom_flags(libc::O_TMPFILE).write(true).open(directory.path());
        let file = OwnedFd::from(options(&mut fs::File::options()).unwrap());
        write(&file, b"12345").unwrap();
        let (_, _, again) = round_trip(&[&file], Console::None);
        assert_eq!(fstat(&again[0]).unwrap().st_size, 5);
        assert_eq!(lseek(&again[0], 0, Whence::SeekCur).unwrap(), 5);
    }

    #[test]
    fn a_changed_root_is_refused() {
        let root = directory();
        fs::write(root.path().join("program"), "old").unwrap();
        let identity = identity::identity_of(&root.path().join("program")).unwrap();
        let state = RegularState {
            path: b"/program".into(),
            home: None,
            flags: 0,
            position: 0,
            source: Source::Root(identity),
        };
        let state = FileState::new(FileId(0), "regular", encode(&state));
        verify_root(root.path(), [&state]).unwrap();
        fs::write(root.path().join("program"), "new").unwrap();
        assert!(matches!(verify_root(root.path(), [&state]), Err(RebuildError::Changed { .. })));
        fs::remove_file(root.path().join("program")).unwrap();
        assert!(matches!(verify_root(root.path(), [&state]), Err(RebuildError::Changed { .. })));
    }
}
