//! Tree → archive.

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat, readlinkat};
use nix::sys::stat::{FileStat, Mode};
use nix::sys::uio::pread;
use nix::unistd::{Whence, lseek};
use serde_bytes::ByteBuf;

use super::format::{self, Entry, Facts, Kind, TITLE, What};
use super::tree::{self, Met, magic_path, unless_gone};
use crate::error::{CaptureError, Context};

/// Files by device and inode.
pub type Inodes = HashSet<(u64, u64)>;

/// What was packed, and how it looked then.
#[derive(Clone, Debug, Default)]
pub struct Index {
    seen: HashMap<Vec<u8>, Option<Look>>,
}

/// Type, owner and mode, inode, size, links, times of change: if none of these differ, nothing does.
type Look = (u32, u32, u32, u64, i64, u64, (i64, i64), (i64, i64));

/// Changes of a file that come so shortly after each other may have the same time: one tick of the slowest kernel clock.
const RACY: Duration = Duration::from_millis(20);

fn look(stat: &FileStat) -> Look {
    let modified = (stat.st_mtime, stat.st_mtime_nsec);
    let changed = (stat.st_ctime, stat.st_ctime_nsec);
    (stat.st_mode, stat.st_uid, stat.st_gid, stat.st_ino, stat.st_size, stat.st_nlink, modified, changed)
}

/// Packs the tree below `top` into `out`, whole. Complete unless changes are to follow.
pub fn pack(top: &Path, out: &mut dyn Write) -> Result<Index, CaptureError> {
    let mut packer = Packer::new(out);
    packer.out.write_all(TITLE).capturing("packing", top.display())?;
    packer.walk(top, &mut |_, _| true)?;
    Ok(packer.index)
}

/// Packs what has changed since the tree was packed (`earlier`), and ends the archive. `always` are files that may have
/// changed without a trace: mapped shared and writable.
pub fn pack_changes(top: &Path, earlier: &Index, always: &Inodes, out: &mut dyn Write) -> Result<Index, CaptureError> {
    let mut packer = Packer::new(out);
    packer.walk(top, &mut |met, look| {
        let known = earlier.seen.get(met.path);
        always.contains(&(met.stat.st_dev, met.stat.st_ino)) || known.is_none_or(|k| k.as_ref() != Some(look))
    })?;
    let gone = earlier.seen.keys().filter(|path| !packer.index.seen.contains_key(*path));
    for path in gone {
        let entry = Entry { path: path.clone(), what: What::Removed };
        format::write(packer.out, &entry).capturing("packing", top.display())?;
    }
    let end = Entry { path: Vec::new(), what: What::End };
    format::write(packer.out, &end).capturing("packing", top.display())?;
    Ok(packer.index)
}

struct Packer<'a> {
    out: &'a mut dyn Write,
    index: Index,
    /// The path under which a file with several names was packed.
    first_names: HashMap<u64, Vec<u8>>,
    buffer: Vec<u8>,
}

impl<'a> Packer<'a> {
    fn new(out: &'a mut dyn Write) -> Packer<'a> {
        Packer { out, index: Index::default(), first_names: HashMap::new(), buffer: vec![0; 256 << 10] }
    }

    fn walk(&mut self, top: &Path, wanted: &mut dyn FnMut(&Met<'_>, &Look) -> bool) -> Result<(), CaptureError> {
        let flags = OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let directory = nix::fcntl::open(top, flags, Mode::empty()).capturing("opening", top.display())?;
        let mut place = Vec::new();
        let walked = tree::walk(directory.as_fd(), &mut |met| {
            place.clear();
            place.extend_from_slice(met.path);
            let look = look(&met.stat);
            if wanted(met, &look) {
                self.add(met)?;
            }
            self.index.seen.insert(met.path.to_vec(), (!is_racy(&met.stat)).then_some(look));
            Ok(())
        });
        walked.capturing("packing", top.join(OsString::from_vec(place)).display())
    }

    fn add(&mut self, met: &Met<'_>) -> io::Result<()> {
        let stat = &met.stat;
        let kind = stat.st_mode & libc::S_IFMT;
        if kind == libc::S_IFREG && stat.st_nlink > 1 {
            if let Some(first) = self.first_names.get(&stat.st_ino) {
                let entry = Entry { path: met.path.to_vec(), what: What::Link(first.clone()) };
                return format::write(self.out, &entry);
            }
            self.first_names.insert(stat.st_ino, met.path.to_vec());
        }
        let Some(facts) = facts(met)? else { return Ok(()) };
        let file = |kind| Entry { path: met.path.to_vec(), what: What::File(kind, facts) };
        match kind {
            libc::S_IFDIR => format::write(self.out, &file(Kind::Directory)),
            libc::S_IFLNK => match unless_gone(readlinkat(met.directory, met.name.as_c_str()))? {
                Some(target) => format::write(self.out, &file(Kind::Symlink(target.into_vec()))),
                None => Ok(()),
            },
            libc::S_IFREG => {
                let flags =
                    OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_NOATIME | OFlag::O_NONBLOCK;
                match unless_gone(openat(met.directory, met.name.as_c_str(), flags, Mode::empty()))? {
                    Some(contents) => self.add_regular(&contents, stat.st_size as u64, file),
                    None => Ok(()),
                }
            }
            _ => format::write(self.out, &file(Kind::Node(kind, stat.st_rdev))),
        }
    }

    fn add_regular(&mut self, file: &OwnedFd, size: u64, entry: impl FnOnce(Kind) -> Entry) -> io::Result<()> {
        let stretches = stretches(file, size)?;
        format::write(self.out, &entry(Kind::Regular(size, stretches.clone())))?;
        for (offset, length) in stretches {
            let mut done = 0;
            while done < length {
                let now = (self.buffer.len() as u64).min(length - done) as usize;
                let read = pread(file, &mut self.buffer[..now], (offset + done) as i64)?;
                // cut meanwhile: it will be found changed
                let read = if read == 0 {
                    self.buffer[..now].fill(0);
                    now
                } else {
                    read
                };
                self.out.write_all(&self.buffer[..read])?;
                done += read as u64;
            }
        }
        Ok(())
    }
}

/// Whether a change right after this look could go unnoticed.
fn is_racy(stat: &FileStat) -> bool {
    let changed = Duration::new(stat.st_ctime.max(0) as u64, stat.st_ctime_nsec.max(0) as u32);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    now < changed + RACY
}

fn facts(met: &Met<'_>) -> io::Result<Option<Facts>> {
    let stat = &met.stat;
    let path = magic_path(met.directory, met.name);
    let names: Vec<OsString> = match xattr::list(&path) {
        Ok(names) => names.collect(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) if e.raw_os_error() == Some(libc::ENOTSUP) => Vec::new(),
        Err(e) => return Err(e),
    };
    let mut attributes = Vec::with_capacity(names.len());
    for name in names {
        if let Some(value) = xattr::get(&path, &name)? {
            attributes.push((ByteBuf::from(name.into_vec()), ByteBuf::from(value)));
        }
    }
    Ok(Some(Facts {
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        accessed: (stat.st_atime, stat.st_atime_nsec),
        modified: (stat.st_mtime, stat.st_mtime_nsec),
        attributes,
    }))
}

/// Where a file has bytes: offset and length.
fn stretches(file: &OwnedFd, size: u64) -> io::Result<Vec<(u64, u64)>> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < size {
        let start = match lseek(file, at as i64, Whence::SeekData) {
            Ok(start) => start as u64,
            Err(Errno::ENXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = (lseek(file, start as i64, Whence::SeekHole)? as u64).min(size);
        if start < end {
            found.push((start, end - start));
        }
        at = end.max(start + 1);
    }
    Ok(found)
}
