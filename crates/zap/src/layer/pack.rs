//! Tree → archive.

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat, readlinkat};
use nix::sys::stat::{FileStat, Mode};
use nix::unistd::{Whence, lseek};
use serde_bytes::ByteBuf;

use super::blocks::{self, Blocks, LARGE, blocks_of};
use super::format::{self, Entry, Facts, Kind, TITLE, What};
use super::tree::{self, Met, magic_path, unless_gone};
use crate::error::{CaptureError, Context};

/// Files by device and inode.
pub type Inodes = HashSet<(u64, u64)>;

/// What was packed, and how it looked then.
#[derive(Clone, Debug, Default)]
pub struct Index {
    seen: HashMap<Vec<u8>, Option<Look>>,
    /// Of large files.
    blocks: HashMap<Vec<u8>, Arc<Followed>>,
}

/// What was in a large file when it was packed last.
#[derive(Debug)]
struct Followed {
    inode: u64,
    blocks: Blocks,
}

impl Index {
    /// Whether there is any file of which blocks are followed.
    pub fn has_large(&self) -> bool {
        !self.blocks.is_empty()
    }
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
    let mut packer = Packer { follows: true, ..Packer::new(out) };
    packer.out.write_all(TITLE).capturing("packing", top.display())?;
    packer.walk(top, &mut |_, _| true)?;
    Ok(packer.index)
}

/// Packs what has changed since the tree was packed, while it may change again; how many bytes of files that were.
pub fn follow(top: &Path, index: &mut Index, out: &mut dyn Write) -> Result<u64, CaptureError> {
    let mut packer = Packer { earlier: std::mem::take(index), follows: true, ..Packer::new(out) };
    packer.changes(top, &Inodes::new())?;
    *index = packer.index;
    Ok(packer.added)
}

/// Packs what has changed since the tree was packed (`earlier`), and ends the archive. `always` are files that may have
/// changed without a trace: mapped shared and writable.
pub fn pack_changes(top: &Path, earlier: Index, always: &Inodes, out: &mut dyn Write) -> Result<(), CaptureError> {
    let mut packer = Packer { earlier, ..Packer::new(out) };
    packer.changes(top, always)?;
    let end = Entry { path: Vec::new(), what: What::End };
    format::write(packer.out, &end).capturing("packing", top.display())
}

/// Blocks of a file that are compared before those that differ are written.
const WINDOW: usize = 1024;

struct Packer<'a> {
    out: &'a mut dyn Write,
    index: Index,
    /// What was packed before.
    earlier: Index,
    /// Whether changes are to follow.
    follows: bool,
    /// Bytes of files that were packed.
    added: u64,
    /// The path under which a file with several names was packed.
    first_names: HashMap<u64, Vec<u8>>,
    buffer: Vec<u8>,
}

impl<'a> Packer<'a> {
    fn new(out: &'a mut dyn Write) -> Packer<'a> {
        Packer {
            out,
            index: Index::default(),
            earlier: Index::default(),
            follows: false,
            added: 0,
            first_names: HashMap::new(),
            buffer: vec![0; 256 << 10],
        }
    }

    fn changes(&mut self, top: &Path, always: &Inodes) -> Result<(), CaptureError> {
        let mut earlier = std::mem::take(&mut self.earlier.seen);
        self.walk(top, &mut |met, look| {
            let known = earlier.remove(met.path);
            always.contains(&(met.stat.st_dev, met.stat.st_ino)) || known.is_none_or(|k| k.as_ref() != Some(look))
        })?;
        for path in earlier.into_keys() {
            let entry = Entry { path, what: What::Removed };
            format::write(self.out, &entry).capturing("packing", top.display())?;
        }
        Ok(())
    }

    fn walk(&mut self, top: &Path, wanted: &mut dyn FnMut(&Met<'_>, &Look) -> bool) -> Result<(), CaptureError> {
        let flags = OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let directory = nix::fcntl::open(top, flags, Mode::empty()).capturing("opening", top.display())?;
        let mut place = Vec::new();
        let walked = tree::walk(directory.as_fd(), &mut |met| {
            place.clear();
            place.extend_from_slice(met.path);
            let look = look(&met.stat);
            let followed = self.earlier.blocks.remove(met.path).filter(|followed| followed.inode == met.stat.st_ino);
            match wanted(met, &look) {
                true => self.add(met, followed)?,
                false => self.index.blocks.extend(followed.map(|followed| (met.path.to_vec(), followed))),
            }
            if self.follows {
                self.index.seen.insert(met.path.to_vec(), (!is_racy(&met.stat)).then_some(look));
            }
            Ok(())
        });
        walked.capturing("packing", top.join(OsString::from_vec(place)).display())
    }

    fn add(&mut self, met: &Met<'_>, followed: Option<Arc<Followed>>) -> io::Result<()> {
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
        let file = |kind| Entry { path: met.path.to_vec(), what: What::File(kind, facts.clone()) };
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
                    Some(contents) => match followed.filter(|_| is_large(stat)) {
                        Some(followed) => self.add_blocks(&contents, met, facts, &followed.blocks),
                        None => self.add_regular(&contents, met, facts),
                    },
                    None => Ok(()),
                }
            }
            _ => format::write(self.out, &file(Kind::Node(kind, stat.st_rdev))),
        }
    }

    fn add_regular(&mut self, file: &OwnedFd, met: &Met<'_>, facts: Facts) -> io::Result<()> {
        let size = met.stat.st_size as u64;
        let stretches = stretches(file, size)?;
        let kind = Kind::Regular(size, stretches.clone());
        format::write(self.out, &Entry { path: met.path.to_vec(), what: What::File(kind, facts) })?;
        self.added += stretches.iter().map(|(_, length)| length).sum::<u64>();
        if self.follows && is_large(&met.stat) {
            let mut blocks = Blocks::default();
            for (at, length) in blocks_of(&stretches) {
                let bytes = &mut self.buffer[..length as usize];
                blocks::read(file, at, bytes)?;
                blocks.note(at, bytes);
                self.out.write_all(bytes)?;
            }
            self.keep(met, blocks);
            return Ok(());
        }
        for (offset, length) in stretches {
            let mut done = 0;
            while done < length {
                let now = (self.buffer.len() as u64).min(length - done);
                let bytes = &mut self.buffer[..now as usize];
                blocks::read(file, offset + done, bytes)?;
                self.out.write_all(bytes)?;
                done += now;
            }
        }
        Ok(())
    }

    /// Of a file that was packed before, what differs: window by window, of which each is whole in itself.
    fn add_blocks(&mut self, file: &OwnedFd, met: &Met<'_>, facts: Facts, before: &Blocks) -> io::Result<()> {
        let size = met.stat.st_size as u64;
        let stretches = stretches(file, size)?;
        let all: Vec<_> = blocks_of(&stretches).collect();
        let mut now = Blocks::default();
        let mut windows = all.chunks(WINDOW).peekable();
        loop {
            let (blocks, differ) = before.compare(file, windows.next().unwrap_or_default())?;
            now.extend(blocks);
            let is_last = windows.peek().is_none();
            if is_last || !differ.is_empty() {
                let changed = differ.iter().map(|block| (block.at, block.bytes.len() as u64)).collect();
                let what = What::Patched { size, stretches: stretches.clone(), changed, facts: facts.clone() };
                format::write(self.out, &Entry { path: met.path.to_vec(), what })?;
            }
            for block in &differ {
                self.out.write_all(&block.bytes)?;
                self.added += block.bytes.len() as u64;
            }
            if is_last {
                break;
            }
        }
        if self.follows {
            self.keep(met, now);
        }
        Ok(())
    }

    fn keep(&mut self, met: &Met<'_>, blocks: Blocks) {
        self.index.blocks.insert(met.path.to_vec(), Arc::new(Followed { inode: met.stat.st_ino, blocks }));
    }
}

/// Whether it pays to look for the blocks of a file that have changed.
fn is_large(stat: &FileStat) -> bool {
    stat.st_mode & libc::S_IFMT == libc::S_IFREG && stat.st_size as u64 >= LARGE && stat.st_nlink == 1
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
