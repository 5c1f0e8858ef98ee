//! The open file descriptions met by a checkpoint, each once.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::sync::{Arc, OnceLock};

use crate::error::{CaptureError, Context};
use crate::files::mounts::{self, Mounts};
use crate::files::{Descriptor, FileKind, FileState, RootFile, kind_of, locks, owner, tun};
use crate::ids::{FileId, HostPid};
use crate::look::{Look, Subject};
use crate::namespaces::NamespaceId;
use crate::parallel;
use crate::sockets;
use crate::sys::pidfd::PidFd;
use crate::sys::{descriptor, file, kcmp};

/// Which open file descriptions have been met, and what was captured of each.
pub struct FileTable {
    met: Vec<Met>,
    /// So many of them are kept a copy of.
    most: usize,
    /// Candidates for identity: indexes into `met` of descriptions of one inode with the same flags, in kcmp's order.
    buckets: HashMap<Key, Vec<usize>>,
    /// Descriptions whose capture refers to others, put off until all have been met.
    late: Vec<(FileId, &'static dyn FileKind, Descriptor)>,
    /// Descriptions that are read beside each other; none before that is asked for.
    apart: Option<Vec<(FileId, &'static dyn FileKind, Descriptor)>>,
    /// What the descriptors of the processes led to, by process and number.
    numbers: HashMap<(HostPid, i32), FileId>,
    /// What a number led to in the process that was looked at last.
    latest: HashMap<i32, FileId>,
    /// The mounts of the pod, read when first asked for.
    pub(crate) mounts: Mounts,
    /// The regular files of the layer of a mount, by device and inode; looked through when first asked for.
    pub(super) names: HashMap<u64, HashMap<(u64, u64), Vec<u8>>>,
}

/// Device, inode, status flags.
type Key = (u64, u64, i32);

struct Met {
    place: Place,
    device: u64,
    inode: u64,
    captured: Option<FileState>,
}

/// Where a description that was met can be had.
pub(super) enum Place {
    /// We have a copy.
    Here(Arc<OwnedFd>),
    /// A process that is held has it under a number.
    There(HostPid, i32),
}

impl Place {
    /// The PID of a process that has it, and its number there.
    pub(super) fn number(&self) -> (i32, i32) {
        match self {
            Place::Here(file) => (std::process::id() as i32, file.as_raw_fd()),
            Place::There(process, number) => (process.0, *number),
        }
    }

    /// A copy; none if the process has ended.
    fn copy(&self) -> Option<Arc<OwnedFd>> {
        match self {
            Place::Here(file) => Some(file.clone()),
            Place::There(process, number) => {
                PidFd::open(*process).and_then(|process| process.get(*number)).map(Arc::new).ok()
            }
        }
    }
}

impl Default for FileTable {
    fn default() -> FileTable {
        FileTable {
            met: Vec::new(),
            // What captures and tracers have open besides is far less than the rest.
            most: descriptor::most().unwrap_or(1024) as usize / 2,
            buckets: HashMap::new(),
            late: Vec::new(),
            apart: None,
            numbers: HashMap::new(),
            latest: HashMap::new(),
            mounts: Mounts::default(),
            names: HashMap::new(),
        }
    }
}

impl FileTable {
    /// The states captured, in order of their numbers.
    pub fn states(&self) -> impl Iterator<Item = &FileState> {
        self.met.iter().filter_map(|m| m.captured.as_ref())
    }

    /// The state captured of one description.
    pub fn state(&self, id: FileId) -> Option<&FileState> {
        self.met.get(id.0 as usize)?.captured.as_ref()
    }

    /// A copy of a description that was met.
    pub fn file(&self, id: FileId) -> Option<Arc<OwnedFd>> {
        self.met.get(id.0 as usize)?.place.copy()
    }

    /// The description that a number of a process leads to, with a copy.
    pub fn numbered(&self, process: HostPid, number: i32) -> Option<(FileId, Arc<OwnedFd>)> {
        let id = *self.numbers.get(&(process, number))?;
        Some((id, self.file(id)?))
    }

    /// Notes where a number of a process leads to. Of more files than zap may have open at once no copy is kept: they are
    /// open there for as long as the process is held.
    pub(super) fn note(&mut self, process: HostPid, number: i32, id: FileId) {
        self.numbers.insert((process, number), id);
        self.latest.insert(number, id);
        if self.met.len() < self.most {
            return;
        }
        if let Some(place @ Place::Here(_)) = self.met.get_mut(id.0 as usize).map(|met| &mut met.place) {
            *place = Place::There(process, number);
        }
    }

    /// Where the description is that a number led to in the process that was looked at last.
    pub(super) fn latest(&self, number: i32) -> Option<(FileId, &Place)> {
        let id = *self.latest.get(&number)?;
        Some((id, &self.met.get(id.0 as usize)?.place))
    }

    /// Every description that was met, with a copy.
    pub fn all(&self) -> impl Iterator<Item = (FileId, Arc<OwnedFd>)> {
        self.met.iter().zip(0u32..).filter_map(|(m, n)| Some((FileId(n), m.place.copy()?)))
    }

    /// Every description of an inode that was met, with a copy.
    pub fn of_inode(&self, device: u64, inode: u64) -> impl Iterator<Item = (FileId, Arc<OwnedFd>)> {
        let same = move |m: &&Met| m.device == device && m.inode == inode;
        let numbered = self.met.iter().zip(0u32..);
        numbered.filter(move |(m, _)| same(m)).filter_map(|(m, n)| Some((FileId(n), m.place.copy()?)))
    }

    /// Where in the bucket of `key` this description is, or where it belongs: buckets are in the kernel's own order.
    fn find(&self, file: &OwnedFd, key: Key) -> std::io::Result<Result<usize, usize>> {
        let ours = std::process::id() as i32;
        let bucket = self.buckets.get(&key).map_or(&[][..], Vec::as_slice);
        let (mut low, mut high) = (0, bucket.len());
        while low < high {
            let middle = (low + high) / 2;
            let (who, other) = self.met[bucket[middle]].place.number();
            match kcmp::compare_files(who, other, ours, file.as_raw_fd())? {
                Ordering::Equal => return Ok(Ok(bucket[middle])),
                Ordering::Less => low = middle + 1,
                Ordering::Greater => high = middle,
            }
        }
        Ok(Err(low))
    }

    fn insert(&mut self, key: Key, place: usize, file: Arc<OwnedFd>) -> FileId {
        let id = FileId(self.met.len() as u32);
        self.buckets.entry(key).or_default().insert(place, self.met.len());
        self.met.push(Met { place: Place::Here(file), device: key.0, inode: key.1, captured: None });
        id
    }

    /// The description that was met last: at the beginning of a capture it is the one to capture.
    pub(crate) fn newest(&self) -> Option<FileId> {
        Some(FileId(self.met.len().checked_sub(1)? as u32))
    }

    /// What was captured of a description is this instead.
    pub(crate) fn amend(&mut self, id: FileId, state: Vec<u8>) {
        if let Some(captured) = self.met.get_mut(id.0 as usize).and_then(|met| met.captured.as_mut()) {
            captured.state = state;
        }
    }

    fn keep(&mut self, state: FileState) {
        let place = state.id.0 as usize;
        self.met[place].captured = Some(state);
    }
}

/// The number of the description behind `file`, descriptor `number` of `subject`; captures it when it is met for the
/// first time. A description that was met before costs one `fstat`, one `fcntl` and a few `kcmp`s.
pub fn intern_file(look: &mut Look<'_>, subject: &Subject, number: i32, file: OwnedFd) -> Result<FileId, CaptureError> {
    let name = || format!("file descriptor {number} of process {}", subject.pod);
    let stat = file::fstat(&file).capturing("looking at", name())?;
    let flags = descriptor::flags(&file).capturing("reading the flags", name())?;
    let key = (stat.st_dev, stat.st_ino, flags);
    match look.files.find(&file, key).capturing("comparing", name())? {
        Ok(met) => Ok(FileId(met as u32)),
        Err(place) => meet(look, describe(subject, number, file)?, key, place),
    }
}

/// As [`intern_file`], for a file that has been described already.
pub fn intern(look: &mut Look<'_>, descriptor: Descriptor) -> Result<FileId, CaptureError> {
    let flags = descriptor::flags(&descriptor.file).capturing("reading the flags", descriptor.object())?;
    let key = (descriptor.stat.st_dev, descriptor.stat.st_ino, flags);
    match look.files.find(&descriptor.file, key).capturing("comparing", descriptor.object())? {
        Ok(met) => Ok(FileId(met as u32)),
        Err(place) => meet(look, descriptor, key, place),
    }
}

/// As [`intern`], for a file that was captured ahead of the hold.
pub(crate) fn intern_root_file(look: &mut Look<'_>, file: RootFile) -> Result<FileId, CaptureError> {
    let RootFile { descriptor, state, .. } = file;
    let flags = descriptor::flags(&descriptor.file).capturing("reading the flags", descriptor.object())?;
    let key = (descriptor.stat.st_dev, descriptor.stat.st_ino, flags);
    match look.files.find(&descriptor.file, key).capturing("comparing", descriptor.object())? {
        Ok(met) => Ok(FileId(met as u32)),
        Err(place) => {
            let kind = kind_of(&descriptor)?.name();
            let id = look.files.insert(key, place, descriptor.file);
            look.files.keep(FileState::new(id, kind, state));
            Ok(id)
        }
    }
}

fn meet(look: &mut Look<'_>, descriptor: Descriptor, key: Key, place: usize) -> Result<FileId, CaptureError> {
    let kind = kind_of(&descriptor)?;
    let id = look.files.insert(key, place, descriptor.file.clone());
    match &mut look.files.apart {
        _ if kind.refers_to_others() => look.files.late.push((id, kind, descriptor)),
        Some(apart) if kind.reads_apart() => {
            apart.push((id, kind, descriptor));
            // Each of them is open here, and what is read stays in memory until it is kept.
            if apart.len() >= MOST_APART {
                read_apart(look)?;
            }
        }
        _ => capture(look, id, kind, &descriptor)?,
    }
    Ok(id)
}

/// Descriptions that are put apart at most.
const MOST_APART: usize = 256;

/// From now on descriptions of kinds that take long wait for [`read_apart`].
pub fn put_apart(look: &mut Look<'_>) {
    look.files.apart.get_or_insert_default();
}

/// Captures the descriptions that have been put apart, beside each other.
pub fn read_apart(look: &mut Look<'_>) -> Result<(), CaptureError> {
    let apart = look.files.apart.as_mut().map(std::mem::take).unwrap_or_default();
    let read = |(id, kind, descriptor): (FileId, &'static dyn FileKind, Descriptor)| {
        // The lines that `capture` asks for are read here already.
        let keep = kind.read_apart(&descriptor).and_then(|keep| descriptor.info().map(|_| keep));
        (id, kind, descriptor, keep)
    };
    for (id, kind, descriptor, keep) in parallel::map(apart, read) {
        let state = keep?(look, id);
        keep_state(look, id, kind, &descriptor, state)?;
    }
    Ok(())
}

/// The mount namespace from whose root the path of a file leads, if it is not the pod's own.
fn place(look: &mut Look<'_>, descriptor: &Descriptor) -> Result<Option<NamespaceId>, CaptureError> {
    let nest = look.nests.of(descriptor);
    if nest.is_none() && !look.nests.is_empty() && mounts::mount_of(look, descriptor)?.is_none() {
        return Err(
            descriptor.refuse("is open through a mount that was taken away, so that a restart could not find it")
        );
    }
    Ok(nest)
}

/// Kinds whose files are opened by the path that they had, from the root of their own mount namespace.
const BY_PATH: [&str; 7] = ["regular", "directory", "name-only", "fifo", "device", "tun", "proc"];

fn capture(
    look: &mut Look<'_>,
    id: FileId,
    kind: &'static dyn FileKind,
    descriptor: &Descriptor,
) -> Result<(), CaptureError> {
    let state = kind.capture(look, descriptor)?;
    keep_state(look, id, kind, descriptor, state)
}

/// Keeps what was captured of a description, with what every kind has.
fn keep_state(
    look: &mut Look<'_>,
    id: FileId,
    kind: &'static dyn FileKind,
    descriptor: &Descriptor,
    state: Vec<u8>,
) -> Result<(), CaptureError> {
    let (owner, locks) = (owner::capture(descriptor, look.depth)?, locks::capture(descriptor)?);
    let is_elsewhere =
        look.namespaces.has_networks() && (descriptor.link.starts_with(b"socket:") || tun::is_one(descriptor));
    let network = if is_elsewhere { look.namespaces.of_socket(descriptor)? } else { None };
    let mounts = BY_PATH.contains(&kind.name()).then(|| place(look, descriptor)).transpose()?.flatten();
    look.files.keep(FileState { owner, locks, network, mounts, ..FileState::new(id, kind.name(), state) });
    Ok(())
}

/// Captures the descriptions that refer to others (epoll). To be called once the descriptors of every process, and the
/// files of every mapping and queue, have been met.
pub fn finish(look: &mut Look<'_>) -> Result<(), CaptureError> {
    // A capture may meet more of them: a queue's socket that holds an epoll.
    while let Some((id, kind, descriptor)) = look.files.late.pop() {
        capture(look, id, kind, &descriptor)?;
    }
    // What was met on its way in a queue. Of what is read apart, nothing leads to others.
    read_apart(look)?;
    sockets::reconcile(look)?;
    sockets::complete(look)?;
    look.sockets.complete()
}

/// Reads what `/proc/self` says of a file that is ours, and makes a [`Descriptor`] of it.
pub fn describe(subject: &Subject, number: i32, file: OwnedFd) -> Result<Descriptor, CaptureError> {
    let name = || format!("file descriptor {number} of process {}", subject.pod);
    let raw = file.as_raw_fd();
    let link = match std::fs::read_link(format!("/proc/self/fd/{raw}")) {
        Err(e) if e.raw_os_error() == Some(libc::ENAMETOOLONG) => {
            let why = "has a path that is longer than the kernel tells (4096 bytes), which cannot be checkpointed";
            return Err(subject.refuse(format!("file descriptor {number}"), why));
        }
        link => link.capturing("reading the link", name())?,
    };
    let stat = file::fstat(&file).capturing("looking at", name())?;
    let link = link.into_os_string().into_vec();
    Ok(Descriptor { subject: subject.clone(), number, file: Arc::new(file), link, stat, info: OnceLock::new() })
}
