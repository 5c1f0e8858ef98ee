//! What was mounted since the pod was born.

use std::collections::HashMap;
use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::removed::{REMOVED, is_removed};
use super::shown::{first_process, kind_shown};
use super::table::{Entry, below, join, parse};
use super::{FileSystem, MountState, Source};
use crate::error::{CaptureError, Context};
use crate::files::mounts::{as_path, from_host};
use crate::ids::{HostPid, PodPid};
use crate::pod::{PodSpec, capabilities};
use crate::sys::{clone, file, mount, nsfs};

/// A tmpfs that was made inside the pod: its device, the archive of its contents, and a view of it that nothing covers.
pub struct Fresh {
    /// Its device.
    pub device: Vec<u8>,
    /// The name of its archive.
    pub archive: String,
    /// The view.
    pub top: OwnedFd,
}

/// File systems that are made again as they were, with nothing in them that is not found elsewhere.
const VIEWS: [&str; 5] = ["proc", "sysfs", "mqueue", "cgroup2", "devpts"];

/// Whether somebody in the pod may mount anything in its own mount namespace.
fn may_mount(spec: &PodSpec) -> bool {
    capabilities::includes(&spec.capabilities, "SYS_ADMIN")
}

/// Writes down which mounts a pod is born with.
pub fn note_birth(spec: &PodSpec, init: HostPid, path: &Path) -> std::io::Result<()> {
    if may_mount(spec) { fs::write(path, fs::read(init.proc("mountinfo"))?) } else { Ok(()) }
}

fn refuse(entry: &Entry, why: &str) -> CaptureError {
    CaptureError::Refused {
        process: PodPid(1),
        command: "the pod".into(),
        object: format!("the mount on {}", String::from_utf8_lossy(&entry.point)),
        why: why.into(),
    }
}

/// The mounts that a pod was born with, and those that were made since in its own mount namespace.
pub struct Home {
    pub(super) born: Vec<Entry>,
    pub(super) made: Vec<Entry>,
}

impl Home {
    /// What there is. Where nobody may mount anything it is what the pod was born with.
    pub fn look(spec: &PodSpec, init: HostPid, born: &Path) -> Result<Home, CaptureError> {
        if may_mount(spec) && born.exists() {
            let (born, made) = made_since(spec, init, born)?;
            return Ok(Home { born, made });
        }
        let path = init.proc("mountinfo");
        let born = parse(&fs::read(&path).capturing("reading", path.display())?);
        Ok(Home { born, made: Vec::new() })
    }

    pub(super) fn all(&self) -> impl DoubleEndedIterator<Item = &Entry> {
        self.born.iter().chain(&self.made)
    }

    /// The path in the pod of what a mount shows.
    pub(super) fn path_to(&self, init: HostPid, entry: &Entry) -> Option<Vec<u8>> {
        self.all().rev().filter(|old| holds(old, entry)).find_map(|old| visible(init, old, entry))
    }
}

/// The mounts that were made since, in an order in which they can be made again.
fn made_since(spec: &PodSpec, init: HostPid, born: &Path) -> Result<(Vec<Entry>, Vec<Entry>), CaptureError> {
    if !may_mount(spec) || !born.exists() {
        return Ok((Vec::new(), Vec::new()));
    }
    let born = parse(&fs::read(born).capturing("reading", born.display())?);
    let path = init.proc("mountinfo");
    let now = parse(&fs::read(&path).capturing("reading", path.display())?);
    let known: HashMap<u64, &Entry> = now.iter().map(|entry| (entry.id, entry)).collect();
    for entry in &born {
        let Some(same) = known.get(&entry.id).filter(|same| same.is_same(entry)) else {
            return Err(refuse(entry, "was taken away or moved, which cannot be checkpointed yet"));
        };
        if (same.attributes(), &same.propagation) != (entry.attributes(), &entry.propagation) {
            return Err(refuse(entry, "has other options than at first, which cannot be checkpointed yet"));
        }
    }
    let old: HashMap<u64, &Entry> = born.iter().map(|entry| (entry.id, entry)).collect();
    let made = now.iter().filter(|entry| !old.get(&entry.id).is_some_and(|same| same.is_same(entry)));
    let made = parents_first(made.cloned().collect());
    Ok((born, made))
}

/// Each mount after the one that it is on; numbers say nothing, the kernel gives them again.
fn parents_first(mut made: Vec<Entry>) -> Vec<Entry> {
    let on: HashMap<u64, u64> = made.iter().map(|entry| (entry.id, entry.parent)).collect();
    made.sort_by_cached_key(|entry| {
        std::iter::successors(Some(entry.id), |id| on.get(id).copied()).take(on.len() + 1).count()
    });
    made
}

/// Which of some mounts shows most of a file system.
fn widest(made: &[Entry], device: &[u8]) -> Option<usize> {
    let mounts = made.iter().enumerate().filter(|(_, entry)| entry.device == device);
    mounts.min_by_key(|(_, entry)| entry.root.len()).map(|(place, _)| place)
}

/// The tmpfs mounts that were made, for their contents to be copied.
pub fn fresh(spec: &PodSpec, init: HostPid, born: &Path) -> Result<Vec<Fresh>, CaptureError> {
    let (born, made) = made_since(spec, init, born)?;
    let mut found: Vec<Fresh> = Vec::new();
    let widest = |entry: &Entry| widest(&made, &entry.device).map_or_else(|| entry.clone(), |at| made[at].clone());
    for entry in &made.iter().filter(|entry| entry.kind == "tmpfs").map(widest).collect::<Vec<_>>() {
        let is_known = born.iter().any(|old| old.device == entry.device);
        if is_known || found.iter().any(|fresh| fresh.device == entry.device) {
            continue;
        }
        let namespace = fs::File::open(init.proc("ns/mnt")).capturing("opening", "the pod's mount namespace")?;
        check_unbindable(entry, born.iter().chain(&made)).map_err(|why| refuse(entry, why))?;
        let top = view(&namespace.into(), entry)?.ok_or_else(|| refuse(entry, COVERED))?;
        found.push(Fresh { device: entry.device.clone(), archive: archive_of(entry), top });
    }
    Ok(found)
}

/// A view of a tmpfs that the pod was born with, at `point`, without what was mounted in it since; `None` where nothing was.
pub fn bare(spec: &PodSpec, init: HostPid, born: &Path, point: &str) -> Result<Option<OwnedFd>, CaptureError> {
    let (born, made) = made_since(spec, init, born)?;
    let Some(entry) = born.iter().rev().find(|entry| entry.point == point.as_bytes()).filter(|_| !made.is_empty())
    else {
        return Ok(None);
    };
    let namespace = fs::File::open(init.proc("ns/mnt")).capturing("opening", "the pod's mount namespace")?;
    view(&namespace.into(), entry)?.ok_or_else(|| refuse(entry, COVERED)).map(Some)
}

pub(super) const PEERS: &str = "tells other mounts of what is mounted there, which cannot be checkpointed yet";
pub(super) const COVERED: &str = "is covered by another mount, which cannot be checkpointed yet";

/// The name of the archive of a tmpfs.
pub(super) fn archive_of(entry: &Entry) -> String {
    format!("mount-{}", String::from_utf8_lossy(&entry.device).replace(':', "-"))
}

/// Why a mount that cannot be shown elsewhere cannot be packed: something is mounted on it, and hides what is there.
pub(super) fn check_unbindable<'e>(
    entry: &Entry,
    mut others: impl Iterator<Item = &'e Entry>,
) -> Result<(), &'static str> {
    match entry.propagates("unbindable") && others.any(|other| other.parent == entry.id) {
        true => Err(
            "cannot be shown elsewhere (unbindable) and has something mounted on it, which cannot be checkpointed yet",
        ),
        false => Ok(()),
    }
}

/// A copy of a mount without what is mounted on it, or the mount itself if there can be no copy; `None` if it is covered.
pub(super) fn view(namespace: &OwnedFd, entry: &Entry) -> Result<Option<OwnedFd>, CaptureError> {
    let (path, id, is_unbindable) = (as_path(&entry.point).to_owned(), entry.id, entry.propagates("unbindable"));
    let copied = clone::in_thread(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS)?;
        nsfs::enter(namespace, libc::CLONE_NEWNS)?;
        let there = file::open_path(&path)?;
        if mount::id_of(&there)? != id {
            return Ok(None);
        }
        if is_unbindable { Ok(Some(there)) } else { mount::copy_mount(&path, false).map(Some) }
    });
    copied.capturing("looking at", path.display())
}

/// The mounts that were made inside a pod, by number: of those that show what the pod was born with, the number of the
/// mount that it has it on, and the path there.
pub type Made = HashMap<u64, Option<(u64, Vec<u8>)>>;

/// The mounts that were made.
pub fn made(spec: &PodSpec, init: HostPid, born: &Path) -> Result<Made, CaptureError> {
    let (born, made) = made_since(spec, init, born)?;
    Ok(made.iter().map(|entry| (entry.id, born_place(&born, entry))).collect())
}

/// Of what the pod was born with: the number of the mount that shows what `entry` does, and the path there.
pub(super) fn born_place(born: &[Entry], entry: &Entry) -> Option<(u64, Vec<u8>)> {
    let old = born.iter().rev().find(|old| holds(old, entry))?;
    Some((old.id, join(&old.point, below(&entry.root, &old.root)?)))
}

/// The mounts that were made; `fresh` are those whose contents are being copied.
pub fn capture(
    spec: &PodSpec,
    init: HostPid,
    born: &Path,
    fresh: &[(Vec<u8>, String)],
) -> Result<Vec<MountState>, CaptureError> {
    let (born, made) = made_since(spec, init, born)?;
    let mut states: Vec<MountState> = Vec::with_capacity(made.len());
    for (place, entry) in made.iter().enumerate() {
        if is_removed(entry) {
            return Err(refuse(entry, REMOVED));
        }
        let whole = widest(&made, &entry.device).filter(|first| *first != place);
        let source = match (born.iter().rev().find(|old| holds(old, entry)), whole) {
            (Some(old), _) => bind(init, old, entry)?,
            (None, Some(first)) => part(&made[first], first, entry)?,
            (None, None) => Source::New(own_file_system(init, &born, entry, fresh)?),
        };
        if entry.has_peers(born.iter().chain(&made)) {
            return Err(refuse(entry, PEERS));
        }
        states.push(MountState {
            point: entry.point.clone(),
            source,
            attributes: entry.attributes(),
            shared: entry.propagates("shared"),
            unbindable: entry.propagates("unbindable"),
        });
    }
    Ok(states)
}

/// Whether what a mount shows is in the file system, as far as it is seen, of one that the pod was born with.
pub(super) fn holds(old: &Entry, entry: &Entry) -> bool {
    old.device == entry.device && below(&entry.root, &old.root).is_some()
}

fn bind(init: HostPid, old: &Entry, entry: &Entry) -> Result<Source, CaptureError> {
    let gone = "shows what is gone or covered elsewhere, which cannot be checkpointed yet";
    visible(init, old, entry).map(Source::Bind).ok_or_else(|| refuse(entry, gone))
}

/// The path in the pod under which `old` shows what `entry` does, unless something else is seen there.
fn visible(init: HostPid, old: &Entry, entry: &Entry) -> Option<Vec<u8>> {
    let path = join(&old.point, below(&entry.root, &old.root)?);
    let there = file::open_path(&from_host(init, &path)).ok().and_then(|file| mount::id_of(&file).ok());
    (there == Some(old.id)).then_some(path)
}

fn part(first: &Entry, place: usize, entry: &Entry) -> Result<Source, CaptureError> {
    match below(&entry.root, &first.root) {
        Some(rest) => Ok(Source::Part(place, rest.to_vec())),
        None => Err(refuse(entry, "shows another part of its file system, which cannot be checkpointed yet")),
    }
}

fn own_file_system(
    init: HostPid,
    born: &[Entry],
    entry: &Entry,
    fresh: &[(Vec<u8>, String)],
) -> Result<FileSystem, CaptureError> {
    let refuse = |why: &str| refuse(entry, why);
    let inside = "shows a namespace made inside the pod, which cannot be checkpointed yet";
    match entry.kind.as_str() {
        "proc" => {
            let home = fs::metadata(init.proc("ns/pid")).capturing("looking at", "the pod's PID namespace")?.ino();
            if first_process(&from_host(init, &entry.point)).is_some_and(|found| found != home) {
                return Err(refuse(inside));
            }
        }
        // Of each namespace there is but one, and the pod has its own.
        kind @ ("sysfs" | "mqueue") if born.iter().any(|old| old.kind == kind) => return Err(refuse(inside)),
        "devpts" => check_terminals(&from_host(init, &entry.point), entry, &refuse)?,
        kind if kind == "tmpfs" || VIEWS.contains(&kind) => {}
        kind => return Err(refuse(&format!("is of the file system {kind}, which cannot be checkpointed yet"))),
    }
    Ok(file_system(entry, contents_of(entry, fresh, &refuse)?))
}

/// Refuses a file system of terminals that are open.
pub(super) fn check_terminals(
    path: &Path,
    entry: &Entry,
    refuse: &dyn Fn(&str) -> CaptureError,
) -> Result<(), CaptureError> {
    let entries = fs::read_dir(path).capturing("listing", as_path(&entry.point).display())?;
    match entries.flatten().any(|entry| entry.file_name() != "ptmx") {
        true => Err(refuse("has terminals that are open, which cannot be checkpointed yet")),
        false => Ok(()),
    }
}

/// The archive of the contents of a file system, if it has any of its own.
pub(super) fn contents_of(
    entry: &Entry,
    fresh: &[(Vec<u8>, String)],
    refuse: &dyn Fn(&str) -> CaptureError,
) -> Result<Option<String>, CaptureError> {
    let contents = fresh.iter().find(|(device, _)| *device == entry.device).map(|(_, archive)| archive.clone());
    match entry.kind == "tmpfs" && contents.is_none() {
        true => Err(refuse("was made during the checkpoint; try again")),
        false => Ok(contents),
    }
}

pub(super) fn file_system(entry: &Entry, contents: Option<String>) -> FileSystem {
    let mut options = entry.file_system_options();
    if kind_shown(&entry.kind).is_some() && entry.super_options.iter().any(|option| option == "ro") {
        options.push(("ro".into(), None));
    }
    FileSystem {
        kind: entry.kind.clone(),
        device: entry.source.clone(),
        options,
        contents,
        root: entry.root.clone(),
        of: None,
    }
}

/// The path by which a view is packed.
pub(crate) fn path_of(view: &OwnedFd) -> std::path::PathBuf {
    format!("/proc/self/fd/{}", view.as_raw_fd()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_come_after_what_they_are_on_whatever_their_numbers() {
        let text =
            b"29 30 0:3 / /a/b rw - tmpfs x rw\n30 1 0:2 / /a rw - tmpfs x rw\n31 29 0:2 /d /a/b/c rw - tmpfs x rw\n";
        let made = parents_first(parse(text));
        assert_eq!(made.iter().map(|entry| entry.id).collect::<Vec<_>>(), [30, 29, 31]);
        assert_eq!(widest(&made, b"0:2"), Some(0));
    }
}
