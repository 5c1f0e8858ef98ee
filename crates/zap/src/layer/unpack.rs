//! Archive → tree. An archive may be hostile: nothing is ever made outside the directory that is given.

use std::collections::BTreeMap;
use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::rc::Rc;

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, FallocateFlags, OFlag, OpenHow, ResolveFlag, fallocate, openat, openat2};
use nix::sys::stat::{
    FchmodatFlags, Mode, SFlag, UtimensatFlags, fchmod, fchmodat, fstatat, futimens, mkdirat, mknodat, utimensat,
};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchown, fchownat, linkat, symlinkat, unlinkat};
use xattr::FileExt as _;

use super::format::{self, Entry, Facts, Kind, TITLE, What};
use super::tree::magic_path;
use crate::error::{Context, RebuildError};

/// Unpacks an archive into the directory `into`, which keeps what the archive does not name.
pub fn unpack(from: &mut dyn Read, into: &Path) -> Result<(), RebuildError> {
    let shown = into.display();
    let flags = OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let top = nix::fcntl::open(into, flags, Mode::empty()).rebuilding("opening", &shown)?;
    let mut title = [0; TITLE.len()];
    from.read_exact(&mut title).rebuilding("unpacking", &shown)?;
    if title != *TITLE {
        return Err(RebuildError::Damaged("a layer does not begin as one".into()));
    }
    let mut unpacker = Unpacker { top, near: None, directories: BTreeMap::new(), buffer: vec![0; 256 << 10] };
    loop {
        let entry = format::read(from).map_err(damaged)?;
        if entry.what == What::End {
            break;
        }
        let path = into.join(OsStr::from_bytes(&entry.path));
        unpacker.add(entry, from).rebuilding("unpacking", path.display())?;
    }
    unpacker.finish().rebuilding("unpacking", &shown)
}

fn damaged(error: io::Error) -> RebuildError {
    RebuildError::Damaged(format!("a layer: {error}"))
}

struct Unpacker {
    top: OwnedFd,
    /// The directory of the last entry.
    near: Option<(Vec<u8>, Rc<OwnedFd>)>,
    /// What directories will be when everything is in them.
    directories: BTreeMap<Vec<u8>, Facts>,
    buffer: Vec<u8>,
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// A path split into that of its directory and its name; an error if it is not plainly below the top.
fn split(path: &[u8]) -> io::Result<(&[u8], CString)> {
    let plain = |part: &[u8]| !part.is_empty() && part != b"." && part != b".." && !part.contains(&0);
    if !path.split(|b| *b == b'/').all(plain) {
        return Err(invalid("an entry has a path that leads elsewhere"));
    }
    let (directory, name) = match path.iter().rposition(|b| *b == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (&b""[..], path),
    };
    Ok((directory, CString::new(name)?))
}

impl Unpacker {
    fn open(&self, path: &[u8]) -> io::Result<OwnedFd> {
        if path.is_empty() {
            return self.top.try_clone();
        }
        let how = OpenHow::new()
            .flags(OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
        Ok(openat2(&self.top, OsStr::from_bytes(path), how)?)
    }

    /// The directory at `path`; the last one is kept at hand.
    fn directory(&mut self, path: &[u8]) -> io::Result<Rc<OwnedFd>> {
        match &self.near {
            Some((near, directory)) if near == path => Ok(directory.clone()),
            _ => {
                let directory = Rc::new(self.open(path)?);
                self.near = Some((path.to_vec(), directory.clone()));
                Ok(directory)
            }
        }
    }

    fn add(&mut self, entry: Entry, from: &mut dyn Read) -> io::Result<()> {
        if entry.path.is_empty() {
            return match entry.what {
                What::File(Kind::Directory, facts) => {
                    self.directories.insert(Vec::new(), facts);
                    Ok(())
                }
                _ => Err(invalid("the top is not a directory")),
            };
        }
        let (parent, name) = split(&entry.path)?;
        let directory = match (self.directory(parent), &entry.what) {
            (Ok(directory), _) => directory,
            // gone with its directory, or with what is in the directory's place
            (Err(_), What::Removed) => return Ok(()),
            (Err(error), _) => return Err(error),
        };
        match entry.what {
            What::File(Kind::Directory, facts) => {
                self.make_directory(&directory, &name)?;
                self.directories.insert(entry.path, facts);
                return Ok(());
            }
            What::File(Kind::Regular(size, stretches), facts) => {
                let file = self.make_regular(&directory, &name, &entry.path)?;
                within(size, &stretches)?;
                self.fill(&file, &stretches, from)?;
                if stretches.last().map_or(0, |(at, length)| at + length) != size {
                    file.set_len(size)?;
                }
                return settle_file(&file, &facts);
            }
            What::Patched { size, stretches, changed, facts } => {
                let file = open_regular(&directory, &name)?;
                within(size, &stretches)?;
                within(size, &changed)?;
                make_holes(&file, size, &stretches)?;
                self.fill(&file, &changed, from)?;
                file.set_len(size)?;
                return settle_file(&file, &facts);
            }
            _ => self.clear(&directory, &name, &entry.path)?,
        }
        match entry.what {
            What::File(Kind::Symlink(target), facts) => {
                symlinkat(OsStr::from_bytes(&target), &directory, name.as_c_str())?;
                settle(&directory, &name, &facts, true)
            }
            What::File(Kind::Node(kind, device), facts) => {
                let kind =
                    SFlag::from_bits(kind & libc::S_IFMT).ok_or_else(|| invalid("a node is of no known type"))?;
                mknodat(&directory, name.as_c_str(), kind, Mode::empty(), device)?;
                settle(&directory, &name, &facts, false)
            }
            What::Link(first) => {
                let (there, first) = split(&first)?;
                let there = self.open(there)?;
                Ok(linkat(&there, first.as_c_str(), &directory, name.as_c_str(), AtFlags::empty())?)
            }
            What::File(..) | What::Patched { .. } | What::Removed | What::End => Ok(()),
        }
    }

    fn make_directory(&mut self, directory: &OwnedFd, name: &CString) -> io::Result<()> {
        match mkdirat(directory, name.as_c_str(), Mode::S_IRWXU) {
            Err(Errno::EEXIST) if is_directory(directory, name)? => Ok(()),
            Err(Errno::EEXIST) => {
                unlinkat(directory, name.as_c_str(), UnlinkatFlags::NoRemoveDir)?;
                Ok(mkdirat(directory, name.as_c_str(), Mode::S_IRWXU)?)
            }
            other => Ok(other?),
        }
    }

    /// Makes room for an entry: what has its name goes.
    fn clear(&mut self, directory: &OwnedFd, name: &CString, path: &[u8]) -> io::Result<()> {
        match unlinkat(directory, name.as_c_str(), UnlinkatFlags::NoRemoveDir) {
            Err(Errno::EISDIR) => {
                let below = |other: &[u8]| other.strip_prefix(path).is_some_and(|r| r.is_empty() || r[0] == b'/');
                self.directories.retain(|other, _| !below(other));
                self.near = None;
                remove_tree(directory, name)
            }
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Most names are free: whether this one is comes out by making the file.
    fn make_regular(&mut self, directory: &OwnedFd, name: &CString, path: &[u8]) -> io::Result<File> {
        let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let make = || openat(directory, name.as_c_str(), flags, Mode::S_IRUSR | Mode::S_IWUSR);
        let file = match make() {
            Err(Errno::EEXIST) => {
                self.clear(directory, name, path)?;
                make()
            }
            made => made,
        };
        Ok(File::from(file?))
    }

    fn fill(&mut self, file: &File, stretches: &[(u64, u64)], from: &mut dyn Read) -> io::Result<()> {
        for (offset, length) in stretches {
            let mut done = 0;
            while done < *length {
                let now = (self.buffer.len() as u64).min(length - done) as usize;
                from.read_exact(&mut self.buffer[..now])?;
                file.write_all_at(&self.buffer[..now], offset + done)?;
                done += now as u64;
            }
        }
        Ok(())
    }

    /// Directories get their facts when nothing is put into them any more, the inner ones first.
    fn finish(self) -> io::Result<()> {
        for (path, facts) in self.directories.iter().rev() {
            let directory = self.open(path)?;
            settle(&directory, &CString::from(c"."), facts, false)?;
        }
        Ok(())
    }
}

/// Refuses stretches that do not lie in a file of that size.
fn within(size: u64, stretches: &[(u64, u64)]) -> io::Result<()> {
    let lies = |(offset, length): &(u64, u64)| offset.checked_add(*length).is_some_and(|end| end <= size);
    match stretches.iter().all(lies) {
        true => Ok(()),
        false => Err(invalid("a file has bytes behind its end")),
    }
}

/// A regular file that was made before.
fn open_regular(directory: &OwnedFd, name: &CString) -> io::Result<File> {
    let stat = fstatat(directory, name.as_c_str(), AtFlags::AT_SYMLINK_NOFOLLOW)?;
    if stat.st_mode & libc::S_IFMT != libc::S_IFREG {
        return Err(invalid("bytes of what is no file differ"));
    }
    let flags = OFlag::O_WRONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    Ok(File::from(openat(directory, name.as_c_str(), flags, Mode::empty())?))
}

/// Makes holes where a file has no stretch.
fn make_holes(file: &File, size: u64, stretches: &[(u64, u64)]) -> io::Result<()> {
    let (mode, mut at) = (FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE, 0);
    for (offset, length) in stretches.iter().copied().chain([(size, 0)]) {
        if at < offset {
            fallocate(file, mode, at as i64, (offset - at) as i64)?;
        }
        at = offset + length;
    }
    Ok(())
}

fn is_directory(directory: &OwnedFd, name: &CString) -> io::Result<bool> {
    let stat = fstatat(directory, name.as_c_str(), AtFlags::AT_SYMLINK_NOFOLLOW)?;
    Ok(stat.st_mode & libc::S_IFMT == libc::S_IFDIR)
}

fn remove_tree(directory: &OwnedFd, name: &CString) -> io::Result<()> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let inner = openat(directory, name.as_c_str(), flags, Mode::empty())?;
    let mut names = Vec::new();
    for entry in Dir::from_fd(inner.try_clone()?)?.iter() {
        names.push(entry?.file_name().to_owned());
    }
    for below in names.iter().filter(|n| n.as_c_str() != c"." && n.as_c_str() != c"..") {
        match unlinkat(&inner, below.as_c_str(), UnlinkatFlags::NoRemoveDir) {
            Err(Errno::EISDIR) => remove_tree(&inner, below)?,
            other => other?,
        }
    }
    Ok(unlinkat(directory, name.as_c_str(), UnlinkatFlags::RemoveDir)?)
}

/// Owner, mode, attributes and times, in the order in which one does not undo the other.
fn settle(directory: &OwnedFd, name: &CString, facts: &Facts, link: bool) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(facts.uid), Gid::from_raw(facts.gid));
    fchownat(directory, name.as_c_str(), Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW)?;
    if !link {
        // everything below the top was made by us and is no link
        let mode = Mode::from_bits_truncate(facts.mode);
        fchmodat(directory, name.as_c_str(), mode, FchmodatFlags::FollowSymlink)?;
    }
    let path = magic_path(directory.as_fd(), name);
    for (attribute, value) in &facts.attributes {
        labelled(attribute, xattr::set(&path, OsStr::from_bytes(attribute), value))?;
    }
    let (accessed, modified) = (facts.accessed, facts.modified);
    let times = (TimeSpec::new(accessed.0, accessed.1), TimeSpec::new(modified.0, modified.1));
    Ok(utimensat(directory, name.as_c_str(), &times.0, &times.1, UtimensatFlags::NoFollowSymlink)?)
}

/// The same for a file that is open: what it has already is not given to it again.
fn settle_file(file: &File, facts: &Facts) -> io::Result<()> {
    let now = file.metadata()?;
    if (now.uid(), now.gid()) != (facts.uid, facts.gid) {
        fchown(file, Some(Uid::from_raw(facts.uid)), Some(Gid::from_raw(facts.gid)))?;
    }
    fchmod(file, Mode::from_bits_truncate(facts.mode))?;
    for (attribute, value) in &facts.attributes {
        labelled(attribute, file.set_xattr(OsStr::from_bytes(attribute), value))?;
    }
    let (accessed, modified) = (facts.accessed, facts.modified);
    Ok(futimens(file, &TimeSpec::new(accessed.0, accessed.1), &TimeSpec::new(modified.0, modified.1))?)
}

/// Labels of a security module are the host's: without it they cannot be set, nor missed.
pub(crate) fn labelled(name: &[u8], set: io::Result<()>) -> io::Result<()> {
    let label = name.starts_with(b"security.") && name != b"security.capability";
    match set {
        Err(e) if label && e.raw_os_error() == Some(libc::ENOTSUP) => Ok(()),
        other => other,
    }
}
