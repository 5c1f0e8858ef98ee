//! Where an inode that inotify or fanotify watches is found in the pod: the kernel tells its number and a handle on it.
//!
//! A handle leads to a path where the file system can open by handle; overlays cannot, but theirs hold the handle of the
//! file in the layer below. Every path is tried: a watch of our own there must show the same inode.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use super::mounts::Mount;
use super::{Descriptor, reopen};
use crate::error::{CaptureError, Context};
use crate::ids::FileId;
use crate::look::Look;
use crate::pod::rootfs::layer_name;
use crate::sys::file::fstat;
use crate::sys::watch::{self, Handle};

pub(super) mod layers;
mod walk;

use layers::{Decoded, Layers};

/// A watched inode as `fdinfo` names it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Mark {
    /// The device of its file system.
    pub device: u64,
    /// Its number there.
    pub inode: u64,
    /// A handle on it, where the file system makes them.
    pub handle: Option<Handle>,
}

/// Where a watched inode is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// Under this path of the pod.
    Path(Vec<u8>),
    /// It has none, but somebody has it open.
    Open(FileId),
    /// Nobody can reach it.
    Gone,
    /// It was not found: what it is, for a message.
    Unknown(String),
}

/// A hexadecimal number of a line, behind its label.
pub(super) fn hexadecimal(line: &str, label: &str) -> Option<u64> {
    let (_, rest) = line.split_once(label)?;
    u64::from_str_radix(rest.split_whitespace().next()?, 16).ok()
}

impl Mark {
    /// `ino:98c152 sdev:27 … fhandle-bytes:8 fhandle-type:1 f_handle:52c198006d1b8269`
    pub(super) fn parse(line: &str) -> Option<Mark> {
        Some(Mark { device: device(line)?, inode: hexadecimal(line, "ino:")?, handle: handle(line) })
    }
}

/// The device of a line.
pub(super) fn device(line: &str) -> Option<u64> {
    // The kernel's own encoding of a device number: twelve bits and twenty.
    let device = hexadecimal(line, "sdev:")?;
    Some(libc::makedev((device >> 20) as u32, (device & 0xf_ffff) as u32))
}

fn handle(line: &str) -> Option<Handle> {
    let kind = hexadecimal(line, "fhandle-type:")? as i32;
    let (_, text) = line.split_once("f_handle:")?;
    let text = text.split_whitespace().next()?.as_bytes();
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    Some(Handle { kind, bytes: text.chunks(2).map(byte).collect::<Option<_>>()? })
}

/// Where a mark was found, and what was there then: looked at again before it is believed.
struct Known {
    path: Vec<u8>,
    device: u64,
    inode: u64,
}

/// What this process has found: most is found while the pod runs.
static KNOWN: Mutex<Option<HashMap<Mark, Known>>> = Mutex::new(None);
/// More are hardly of use.
const MOST_KNOWN: usize = 1 << 17;

/// Finds every mark.
pub fn find(look: &mut Look<'_>, descriptor: &Descriptor, marks: &[Mark]) -> Result<Vec<Place>, CaptureError> {
    if marks.is_empty() {
        return Ok(Vec::new());
    }
    let mut search = Search { look, descriptor, found: HashMap::new(), layers: Layers::default() };
    search.recall(marks);
    let failed = |e: io::Error| Err(e).capturing("finding what is watched by", descriptor.object());
    search.by_handle(marks).or_else(failed)?;
    search.by_layer(marks).or_else(failed)?;
    search.among_open(marks).or_else(failed)?;
    search.by_walk(marks).or_else(failed)?;
    search.give_up(marks).or_else(failed)?;
    search.remember();
    let Search { mut found, .. } = search;
    let unknown = |mark: &Mark| Place::Unknown(format!("inode {}", mark.inode));
    Ok(marks.iter().map(|mark| found.get_mut(mark).map_or_else(|| unknown(mark), |place| place.clone())).collect())
}

struct Search<'l, 'a> {
    look: &'l mut Look<'a>,
    descriptor: &'l Descriptor,
    found: HashMap<Mark, Place>,
    layers: Layers,
}

impl Search<'_, '_> {
    fn missing<'m>(&self, marks: &'m [Mark]) -> Vec<&'m Mark> {
        marks.iter().filter(|mark| !self.found.contains_key(*mark)).collect()
    }

    fn mount(&mut self, device: u64) -> io::Result<Option<Mount>> {
        let (init, process) = (self.look.init, self.descriptor.subject.host);
        self.look.files.mounts.of_device(device, init, process).map(|mount| mount.cloned())
    }

    fn on_host(&self, path: &[u8]) -> PathBuf {
        reopen::from_host(self.look.init, path)
    }

    /// What was found before and is still there.
    fn recall(&mut self, marks: &[Mark]) {
        let known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(known) = known.as_ref() else { return };
        for mark in marks {
            let Some(place) = known.get(mark) else { continue };
            let now = std::fs::symlink_metadata(self.on_host(&place.path));
            if now.is_ok_and(|now| (now.dev(), now.ino()) == (place.device, place.inode)) {
                self.found.insert(mark.clone(), Place::Path(place.path.clone()));
            }
        }
    }

    fn remember(&self) {
        let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        let known = known.get_or_insert_default();
        if known.len() > MOST_KNOWN {
            known.clear();
        }
        for (mark, place) in &self.found {
            let Place::Path(path) = place else { continue };
            if known.get(mark).is_some_and(|known| known.path == *path) {
                continue;
            }
            if let Ok(now) = std::fs::symlink_metadata(self.on_host(path)) {
                known.insert(mark.clone(), Known { path: path.clone(), device: now.dev(), inode: now.ino() });
            }
        }
    }

    /// Where the handle says.
    fn by_handle(&mut self, marks: &[Mark]) -> io::Result<()> {
        let mut candidates = Vec::new();
        for mark in self.missing(marks) {
            candidates.extend(self.decoded(mark)?.path().map(|path| (mark, path)));
        }
        self.verify(candidates)
    }

    /// What the handle of a mark leads to.
    fn decoded(&mut self, mark: &Mark) -> io::Result<Decoded<Vec<u8>>> {
        let (Some(handle), Some(mount)) = (&mark.handle, self.mount(mark.device)?) else { return Ok(Decoded::Unable) };
        if handle.kind == FILEID_INO64_GEN {
            return Ok(Decoded::Unable);
        }
        if mount.file_system == "overlay" {
            let upper = self.look.upper.join(layer_name(&mount.point));
            return self.layers.decode(&mount, &self.look.spec.root, &upper, handle);
        }
        let top = self.on_host(mount.point.as_os_str().as_bytes());
        // A mount of a single file is no place to start from.
        let Ok(top) = layers::open_top(&top) else { return Ok(Decoded::Unable) };
        Ok(layers::decode(&top, handle)?.and_then(|path| Some(path.into_os_string().into_encoded_bytes())))
    }

    /// For what has another name in an overlay than in its lower layer: the upper layer knows.
    fn by_layer(&mut self, marks: &[Mark]) -> io::Result<()> {
        let mut candidates = Vec::new();
        for mark in self.missing(marks) {
            let (Some(handle), Some(mount)) = (&mark.handle, self.mount(mark.device)?) else { continue };
            if mount.file_system == "overlay" {
                let upper = self.look.upper.join(layer_name(&mount.point));
                let others = self.layers.renamed(&mount, &self.look.spec.root, &upper, handle)?;
                candidates.extend(others.into_iter().map(|path| (mark, path)));
            }
        }
        self.verify(candidates)
    }

    /// Files without a name, among those that are open.
    fn among_open(&mut self, marks: &[Mark]) -> io::Result<()> {
        let missing: HashSet<&Mark> = self.missing(marks).into_iter().collect();
        if missing.is_empty() {
            return Ok(());
        }
        let probe = watch::inotify()?;
        let mut tried = HashMap::new();
        for (id, file) in self.look.files.all() {
            let stat = fstat(&file)?;
            let mode = stat.st_mode & libc::S_IFMT;
            if stat.st_nlink == 0 && (mode == libc::S_IFREG || mode == libc::S_IFDIR) {
                let path = format!("/proc/self/fd/{}", file.as_raw_fd());
                tried.insert(watch::add_watch(&probe, Path::new(&path), PROBED)?, id);
            }
        }
        for (number, mark) in shown(&probe)? {
            if let (Some(id), true) = (tried.get(&number), missing.contains(&mark)) {
                self.found.insert(mark, Place::Open(*id));
            }
        }
        Ok(())
    }

    /// Every file of its file system, where there is no handle to go by.
    fn by_walk(&mut self, marks: &[Mark]) -> io::Result<()> {
        let mut wanted: HashMap<u64, HashSet<u64>> = HashMap::new();
        for mark in self.missing(marks) {
            if mark.handle.as_ref().is_none_or(|handle| handle.kind == FILEID_INO64_GEN) {
                wanted.entry(mark.device).or_default().insert(mark.inode);
            }
        }
        for (device, inodes) in wanted {
            let Some(mount) = self.mount(device)? else { continue };
            let top = self.on_host(mount.point.as_os_str().as_bytes());
            let paths = walk::find(&top, &inodes);
            let inside = |path: PathBuf| mount.point.join(path.strip_prefix(&top).unwrap_or(Path::new("")));
            let paths: Vec<Vec<u8>> =
                paths.into_iter().map(|p| inside(p).into_os_string().into_encoded_bytes()).collect();
            let missing = self.missing(marks);
            let here = missing.into_iter().filter(|mark| mark.device == device);
            let all: Vec<_> = here.flat_map(|mark| paths.iter().map(move |path| (mark, path.clone()))).collect();
            self.verify(all)?;
        }
        Ok(())
    }

    /// What is left: files that only the watch keeps, and, on an overlay, those that were copied up behind its back.
    fn give_up(&mut self, marks: &[Mark]) -> io::Result<()> {
        for mark in self.missing(marks) {
            let mount = self.mount(mark.device)?;
            let place = match (self.decoded(mark)?, &mount) {
                // The overlay has made another inode for the path; the one that is watched reports nothing any more.
                (Decoded::Path(path), Some(mount))
                    if mount.file_system == "overlay" && self.on_host(&path).symlink_metadata().is_ok() =>
                {
                    Place::Path(path)
                }
                (Decoded::Path(path), _) => Place::Unknown(String::from_utf8_lossy(&path).into_owned()),
                (Decoded::Nameless | Decoded::Stale, _) => Place::Gone,
                (Decoded::Unable, Some(mount)) => {
                    Place::Unknown(format!("inode {} of {}", mark.inode, mount.point.display()))
                }
                (Decoded::Unable, None) => {
                    Place::Unknown(format!("inode {} of a file system that is mounted nowhere", mark.inode))
                }
            };
            self.found.insert(mark.clone(), place);
        }
        Ok(())
    }

    /// Keeps those candidates at which a watch of our own shows the mark.
    fn verify(&mut self, candidates: Vec<(&Mark, Vec<u8>)>) -> io::Result<()> {
        if candidates.is_empty() {
            return Ok(());
        }
        let probe = watch::inotify()?;
        let mut paths: HashMap<i32, Vec<u8>> = HashMap::new();
        let mut wanted = HashSet::new();
        for (mark, path) in candidates {
            let place = self.on_host(&path);
            match watch::add_watch(&probe, &place, PROBED | libc::IN_DONT_FOLLOW) {
                Ok(number) => drop(paths.insert(number, path)),
                // It was renamed or removed since.
                Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR | libc::EACCES)) => {}
                Err(error) => return Err(error),
            }
            wanted.insert(mark);
        }
        for (number, mark) in shown(&probe)? {
            if let (Some(path), true) = (paths.remove(&number), wanted.contains(&mark)) {
                self.found.insert(mark, Place::Path(path));
            }
        }
        Ok(())
    }
}

/// A handle that says no more than the number.
const FILEID_INO64_GEN: i32 = 0x81;
/// What our own watches wait for: something rare.
const PROBED: u32 = libc::IN_DELETE_SELF;

/// The watches of an instance of ours.
fn shown(probe: &OwnedFd) -> io::Result<Vec<(i32, Mark)>> {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", probe.as_raw_fd()))?;
    let of_line = |line: &str| Some((hexadecimal(line, "wd:")? as i32, Mark::parse(line)?));
    Ok(info.lines().filter_map(of_line).collect())
}
