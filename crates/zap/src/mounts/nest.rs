//! Mount namespaces that were made inside the pod. Each is written down with its whole table: what it shows of what the
//! pod has itself, by its path there, and file systems of its own.

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use serde::{Deserialize, Serialize};

use super::capture::{Fresh, Home, Made, archive_of, born_place, check_terminals, contents_of, file_system, view};
use super::removed::{self, Holder, RemovedFile};
use super::shown::{self, Shown};
use super::table::{Entry, below, parse};
use super::{FileSystem, capture};
use crate::error::{CaptureError, Context};
use crate::files::Descriptor;
use crate::files::mounts::relative;
use crate::ids::HostPid;
use crate::look::{Look, Subject};
use crate::namespaces::{Body, NamespaceId, NamespaceState, Sightings};
use crate::sys::{clone, file, nsfs};

/// What is mounted in a mount namespace: the root first, and each mount after the one that it is on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NestState {
    /// The mounts.
    pub mounts: Vec<NestedMount>,
}

/// A mount in a mount namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NestedMount {
    /// The mount that it is on, by its place in the list; `None`: it is the root.
    pub on: Option<usize>,
    /// Where it is there; empty: on its top.
    #[serde(with = "serde_bytes")]
    pub place: Vec<u8>,
    /// What it shows.
    pub source: NestedSource,
    /// Its own flags, as `mount_setattr(2)` has them.
    pub attributes: u64,
    /// Whether it is shared with copies of it that are still to be made.
    pub shared: bool,
    /// Whether it cannot be bound elsewhere.
    pub unbindable: bool,
}

/// What a mount in a mount namespace shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum NestedSource {
    /// What the pod itself has under this path.
    Home(#[serde(with = "serde_bytes")] Vec<u8>),
    /// A file system of its own.
    New(FileSystem),
    /// Part of a file system that a mount of that namespace, which has no higher number, made: by its place in the list.
    Part(NamespaceId, usize, #[serde(with = "serde_bytes")] Vec<u8>),
    /// A file of such a file system that has no name there any more.
    Removed(Holder, RemovedFile),
}

/// A mount namespace that was met.
struct Nest {
    id: NamespaceId,
    subject: Subject,
    namespace: OwnedFd,
    root: OwnedFd,
    /// Its mounts, in the order of [`NestState`], and on which each is.
    entries: Vec<(Entry, Option<usize>)>,
}

/// The mount namespaces that were met.
#[derive(Default)]
pub struct Nests {
    nests: Vec<Nest>,
    /// In which of them a mount is.
    of: HashMap<u64, usize>,
    /// What their file systems show that the pod itself does not have.
    shown: Shown,
}

impl Nests {
    /// Reads the tables of those that were met in the pod of `init`.
    pub fn look(met: &Sightings, init: HostPid, home: &Home) -> Result<Nests, CaptureError> {
        let mut found = Nests::default();
        for (id, namespace, subject) in met.mount_namespaces() {
            let object = || format!("the mount namespace of {}", subject.object());
            let (text, root) = table(namespace).capturing("reading the mounts of", object())?;
            let namespace = namespace.try_clone().capturing("copying", object())?;
            let entries = in_order(parse(&text));
            found.of.extend(entries.iter().map(|(entry, _)| (entry.id, found.nests.len())));
            found.nests.push(Nest { id, subject: subject.clone(), namespace, root, entries });
        }
        found.look_what_is_shown(met, init, home)?;
        Ok(found)
    }

    fn look_what_is_shown(&mut self, met: &Sightings, init: HostPid, home: &Home) -> Result<(), CaptureError> {
        let shows = |entry: &&Entry| {
            shown::kind_shown(&entry.kind).is_some() && !home.all().any(|old| old.device == entry.device)
        };
        for nest in &self.nests {
            for (entry, _) in nest.entries.iter().filter(|(entry, _)| shows(&entry)) {
                shown::note_proc(&mut self.shown, entry, &nest.path(&entry.point), (met, init))?;
            }
        }
        let entries = self.nests.iter().flat_map(|nest| nest.entries.iter().map(|(entry, _)| entry)).filter(shows);
        shown::note_views(&mut self.shown, entries, met)
    }

    /// Whether a file was opened through a proc that shows a PID namespace made inside the pod.
    pub fn shows_others(&self, descriptor: &Descriptor) -> bool {
        let device = || {
            let nest = self.nest_of(descriptor)?;
            let id: u64 = descriptor.field("mnt_id:")?.parse().ok()?;
            nest.entries.iter().find(|(entry, _)| entry.id == id).map(|(entry, _)| &entry.device)
        };
        !self.shown.is_empty() && device().is_some_and(|device| matches!(self.shown.get(device), Some(Some(_))))
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.nests.is_empty()
    }

    /// Whether one of them has a mount of that number.
    pub fn has(&self, mount: u64) -> bool {
        self.of.contains_key(&mount)
    }

    /// The namespace of the mount through which a file was opened, if it is not the pod's own.
    pub fn of(&self, descriptor: &Descriptor) -> Option<NamespaceId> {
        Some(self.nest_of(descriptor)?.id)
    }

    fn nest_of(&self, descriptor: &Descriptor) -> Option<&Nest> {
        if self.nests.is_empty() {
            return None;
        }
        let id = descriptor.field("mnt_id:")?.parse().ok()?;
        self.nests.get(*self.of.get(&id)?)
    }

    /// A path, as it is reached from the host, from the root of the namespace through which a file was opened.
    pub fn path(&self, descriptor: &Descriptor, path: &[u8]) -> Option<PathBuf> {
        Some(self.nest_of(descriptor)?.path(path))
    }

    /// What the pod was born with of what is shown in them.
    pub fn add_to(&self, made: &mut Made, home: &Home) {
        let entries = self.nests.iter().flat_map(|nest| &nest.entries);
        made.extend(entries.map(|(entry, _)| (entry.id, born_place(&home.born, entry))));
    }

    /// Where a file system that is not the pod's own is shown first, by the place of the namespace and that of the mount:
    /// of the mounts there, by the one that shows most of it.
    fn first(&self, device: &[u8]) -> Option<(usize, usize)> {
        let shows = |entry: &Entry| entry.device == device && !removed::is_removed(entry);
        let most = |nest: &Nest| {
            let mounts = nest.entries.iter().enumerate().filter(|(_, (entry, _))| shows(entry));
            mounts.min_by_key(|(_, (entry, _))| entry.root.len()).map(|(place, _)| place)
        };
        self.nests.iter().enumerate().find_map(|(place, nest)| Some((place, most(nest)?)))
    }

    /// The tmpfs mounts of their own, for their contents to be copied.
    pub fn fresh(&self, home: &Home) -> Result<Vec<Fresh>, CaptureError> {
        let entries = self.nests.iter().flat_map(|nest| &nest.entries);
        let devices: BTreeSet<&Vec<u8>> =
            entries.filter(|(entry, _)| entry.kind == "tmpfs").map(|(entry, _)| &entry.device).collect();
        let mut found: Vec<Fresh> = Vec::new();
        for device in devices.into_iter().filter(|device| !home.all().any(|old| old.device == **device)) {
            let Some((place, index)) = self.first(device) else { continue };
            let (nest, entry) = (&self.nests[place], &self.nests[place].entries[index].0);
            let others = nest.entries.iter().map(|(other, _)| other);
            capture::check_unbindable(entry, others).map_err(|why| nest.refuse(entry, why))?;
            let top = view(&nest.namespace, entry)?.ok_or_else(|| nest.refuse(entry, capture::COVERED))?;
            found.push(Fresh { device: entry.device.clone(), archive: archive_of(entry), top });
        }
        Ok(found)
    }

    /// What is in them; `fresh` are the file systems whose contents are being copied.
    pub fn states(
        &self,
        init: HostPid,
        home: &Home,
        fresh: &[(Vec<u8>, String)],
    ) -> Result<HashMap<NamespaceId, NestState>, CaptureError> {
        let state = |place: usize| {
            let nest = &self.nests[place];
            let mounts = (0..nest.entries.len()).map(|index| self.mount((place, index), init, home, fresh));
            Ok((nest.id, NestState { mounts: mounts.collect::<Result<_, CaptureError>>()? }))
        };
        (0..self.nests.len()).map(state).collect()
    }

    fn mount(
        &self,
        at: (usize, usize),
        init: HostPid,
        home: &Home,
        fresh: &[(Vec<u8>, String)],
    ) -> Result<NestedMount, CaptureError> {
        let nest = &self.nests[at.0];
        let (entry, on) = &nest.entries[at.1];
        let nested = self.nests.iter().flat_map(|nest| nest.entries.iter().map(|(entry, _)| entry));
        if entry.has_peers(home.all().chain(nested)) {
            return Err(nest.refuse(entry, capture::PEERS));
        }
        let above = on.map(|on| &nest.entries[on].0.point);
        Ok(NestedMount {
            on: *on,
            place: above.and_then(|above| below(&entry.point, above)).unwrap_or_default().to_vec(),
            source: self.source(at, init, home, fresh)?,
            attributes: entry.attributes(),
            shared: entry.propagates("shared"),
            unbindable: entry.propagates("unbindable"),
        })
    }

    fn source(
        &self,
        (place, index): (usize, usize),
        init: HostPid,
        home: &Home,
        fresh: &[(Vec<u8>, String)],
    ) -> Result<NestedSource, CaptureError> {
        let nest = &self.nests[place];
        let entry = &nest.entries[index].0;
        if removed::is_removed(entry) {
            return self.removed((place, index));
        }
        if home.all().any(|old| old.device == entry.device) {
            let gone = "shows what the pod itself does not, or has covered, which cannot be checkpointed yet";
            return home.path_to(init, entry).map(NestedSource::Home).ok_or_else(|| nest.refuse(entry, gone));
        }
        if let Some((first, most)) = self.first(&entry.device).filter(|at| *at != (place, index)) {
            let (id, whole) = (self.nests[first].id, &self.nests[first].entries[most].0);
            let other = "shows another part of its file system, which cannot be checkpointed yet";
            let rest = below(&entry.root, &whole.root).ok_or_else(|| nest.refuse(entry, other))?;
            return Ok(NestedSource::Part(id, most, rest.to_vec()));
        }
        nest.own_file_system(entry, fresh, &self.shown).map(NestedSource::New)
    }

    /// What was removed since it was mounted: a file is made anew where its file system is shown, or else in one of its own.
    fn removed(&self, (place, index): (usize, usize)) -> Result<NestedSource, CaptureError> {
        let nest = &self.nests[place];
        let entry = &nest.entries[index].0;
        let alike = |(other, _): &(Entry, _)| (&other.device, &other.root) == (&entry.device, &entry.root);
        let mut first = self.nests.iter().filter_map(|nest| Some((nest.id, nest.entries.iter().position(alike)?)));
        if let Some((id, first)) = first.next().filter(|first| *first != (nest.id, index)) {
            return Ok(NestedSource::Part(id, first, Vec::new()));
        }
        let whole = self.first(&entry.device);
        let root = whole.map_or(&b"/"[..], |(place, most)| &self.nests[place].entries[most].0.root);
        let file = removed::capture(&nest.path(&entry.point), entry, root);
        let file = file.capturing("reading", "a mounted file")?.map_err(|why| nest.refuse(entry, why))?;
        let alone = || FileSystem { root: b"/".to_vec(), ..file_system(entry, None) };
        let holder = whole.map_or_else(|| Holder::Nobody(alone()), |(at, most)| Holder::Mount(self.nests[at].id, most));
        Ok(NestedSource::Removed(holder, file))
    }
}

impl Nest {
    fn refuse(&self, entry: &Entry, why: &str) -> CaptureError {
        let point = String::from_utf8_lossy(&entry.point);
        self.subject.refuse(format!("the mount on {point} in its mount namespace"), why)
    }

    fn path(&self, path: &[u8]) -> PathBuf {
        let root = format!("/proc/self/fd/{}", self.root.as_raw_fd());
        Path::new(&root).join(relative(path))
    }

    fn own_file_system(
        &self,
        entry: &Entry,
        fresh: &[(Vec<u8>, String)],
        shown: &Shown,
    ) -> Result<FileSystem, CaptureError> {
        let refuse = |why: &str| self.refuse(entry, why);
        match entry.kind.as_str() {
            "tmpfs" | "cgroup2" => {}
            "devpts" => check_terminals(&self.path(&entry.point), entry, &refuse)?,
            kind if shown::kind_shown(kind).is_some_and(|_| shown.contains_key(&entry.device)) => {}
            kind if shown::kind_shown(kind).is_some() => {
                return Err(refuse(
                    "is of a namespace made inside the pod which could not be found: it is covered, or \
                    nobody lives there; this cannot be checkpointed yet",
                ));
            }
            kind => return Err(refuse(&format!("is of the file system {kind}, which cannot be checkpointed yet"))),
        }
        let contents = contents_of(entry, fresh, &refuse)?;
        Ok(FileSystem { of: shown.get(&entry.device).copied().flatten(), ..file_system(entry, contents) })
    }
}

/// Puts what is mounted there into the namespaces that were met; `fresh` are the file systems that are being copied.
pub fn fill(
    mut namespaces: Vec<NamespaceState>,
    look: &Look<'_>,
    fresh: &[(Vec<u8>, String)],
) -> Result<Vec<NamespaceState>, CaptureError> {
    if look.nests.nests.is_empty() {
        return Ok(namespaces);
    }
    let home = Home::look(look.spec, look.init, &look.mounts_file)?;
    let mut states = look.nests.states(look.init, &home, fresh)?;
    for namespace in &mut namespaces {
        if let (Body::Mount(nest), Some(state)) = (&mut namespace.body, states.remove(&namespace.id)) {
            *nest = state;
        }
    }
    Ok(namespaces)
}

/// The mounts of a namespace as they are seen from its root, and that root.
fn table(namespace: &OwnedFd) -> std::io::Result<(Vec<u8>, OwnedFd)> {
    let proc = file::open_path(Path::new("/proc"))?;
    clone::in_thread(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS)?;
        nsfs::enter(namespace, libc::CLONE_NEWNS)?;
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let mut text = Vec::new();
        File::from(openat(&proc, "thread-self/mountinfo", flags, Mode::empty())?).read_to_end(&mut text)?;
        Ok((text, file::open_path(Path::new("/"))?))
    })
}

/// Each mount after the one that it is on, with that one's place. Of those on one mount the deepest come first: each is
/// then put where nothing else lies on the way.
fn in_order(entries: Vec<Entry>) -> Vec<(Entry, Option<usize>)> {
    let known: std::collections::HashSet<u64> = entries.iter().map(|entry| entry.id).collect();
    let mut on: HashMap<u64, Vec<Entry>> = HashMap::new();
    let mut ordered: Vec<(Entry, Option<usize>)> = Vec::with_capacity(entries.len());
    for entry in entries {
        match known.contains(&entry.parent) && entry.parent != entry.id {
            true => on.entry(entry.parent).or_default().push(entry),
            false => ordered.push((entry, None)),
        }
    }
    let mut next = 0;
    while let Some((entry, _)) = ordered.get(next) {
        let mut there = on.remove(&entry.id).unwrap_or_default();
        there.sort_by_key(|entry| std::cmp::Reverse(entry.point.len()));
        ordered.extend(there.into_iter().map(|entry| (entry, Some(next))));
        next += 1;
    }
    ordered
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_come_after_what_they_are_on_and_the_deepest_first() {
        let text = b"30 29 0:2 / /a rw - tmpfs x rw\n31 29 0:3 / /a/b rw - tmpfs x rw\n29 1 0:1 / / rw - tmpfs x rw\n\
            32 30 0:4 / /a/b rw - tmpfs x rw\n";
        let ordered = in_order(parse(text));
        let order: Vec<(u64, Option<usize>)> = ordered.iter().map(|(entry, on)| (entry.id, *on)).collect();
        assert_eq!(order, [(29, None), (31, Some(0)), (30, Some(0)), (32, Some(2))]);
    }
}
