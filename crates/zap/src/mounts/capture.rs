//! What was mounted since the pod was born.

use std::collections::HashMap;
use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use super::table::{Entry, below, join, parse};
use super::{FileSystem, MountState, Source};
use crate::error::{CaptureError, Context};
use crate::files::mounts::as_path;
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
    let admin = capabilities::NAMES.iter().position(|name| *name == "SYS_ADMIN");
    spec.capabilities.iter().any(|number| Some(*number as usize) == admin)
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
    let mut made: Vec<Entry> = made.cloned().collect();
    made.sort_by_key(|entry| entry.id);
    Ok((born, made))
}

/// The tmpfs mounts that were made, for their contents to be copied.
pub fn fresh(spec: &PodSpec, init: HostPid, born: &Path) -> Result<Vec<Fresh>, CaptureError> {
    let (born, made) = made_since(spec, init, born)?;
    let mut found: Vec<Fresh> = Vec::new();
    for entry in made.iter().filter(|entry| entry.kind == "tmpfs") {
        let is_known = born.iter().any(|old| old.device == entry.device);
        if is_known || found.iter().any(|fresh| fresh.device == entry.device) {
            continue;
        }
        let top = view(init, entry)?;
        let archive = format!("mount-{}", String::from_utf8_lossy(&entry.device).replace(':', "-"));
        found.push(Fresh { device: entry.device.clone(), archive, top });
    }
    Ok(found)
}

/// A copy of a mount without what is mounted on it.
fn view(init: HostPid, entry: &Entry) -> Result<OwnedFd, CaptureError> {
    let namespace = fs::File::open(init.proc("ns/mnt")).capturing("opening", "the pod's mount namespace")?;
    let (path, id) = (as_path(&entry.point).to_owned(), entry.id);
    let copied = clone::in_thread(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS)?;
        nsfs::enter(&namespace, libc::CLONE_NEWNS)?;
        let there = file::open_path(&path)?;
        if mount::id_of(&there)? != id {
            return Ok(None);
        }
        mount::copy_mount(&path, false).map(Some)
    });
    let covered = "is covered by another mount, which cannot be checkpointed yet";
    copied.capturing("looking at", path.display())?.ok_or_else(|| refuse(entry, covered))
}

/// The mounts that were made inside a pod, by number: of those that show what the pod was born with, the number of the
/// mount that it has it on, and the path there.
pub type Made = HashMap<u64, Option<(u64, Vec<u8>)>>;

/// The mounts that were made.
pub fn made(spec: &PodSpec, init: HostPid, born: &Path) -> Result<Made, CaptureError> {
    let (born, made) = made_since(spec, init, born)?;
    let place = |entry: &Entry| {
        let old = born.iter().rev().find(|old| holds(old, entry))?;
        Some((old.id, join(&old.point, below(&entry.root, &old.root)?)))
    };
    Ok(made.iter().map(|entry| (entry.id, place(entry))).collect())
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
        let earlier = made[..place].iter().position(|other| other.device == entry.device);
        let source = match (born.iter().rev().find(|old| holds(old, entry)), earlier) {
            (Some(old), _) => bind(init, old, entry)?,
            (None, Some(first)) => part(&made[first], first, entry)?,
            (None, None) => Source::New(file_system(init, entry, fresh)?),
        };
        let has = |name: &str| entry.propagation.iter().any(|field| field.starts_with(name));
        let is_peer =
            |other: &Entry| other.id != entry.id && entry.propagation.iter().any(|p| other.propagation.contains(p));
        if has("master") || has("shared") && born.iter().chain(&made).any(is_peer) {
            return Err(refuse(entry, "tells other mounts of what is mounted there, which cannot be checkpointed yet"));
        }
        states.push(MountState {
            point: entry.point.clone(),
            source,
            attributes: entry.attributes(),
            shared: has("shared"),
            unbindable: has("unbindable"),
        });
    }
    Ok(states)
}

/// Whether what a mount shows is in the file system, as far as it is seen, of one that the pod was born with.
fn holds(old: &Entry, entry: &Entry) -> bool {
    old.device == entry.device && below(&entry.root, &old.root).is_some()
}

fn bind(init: HostPid, old: &Entry, entry: &Entry) -> Result<Source, CaptureError> {
    let path = join(&old.point, below(&entry.root, &old.root).unwrap_or_default());
    let inside = init.proc("root").join(as_path(path.strip_prefix(b"/").unwrap_or(&path)));
    let there = file::open_path(&inside).ok().and_then(|file| mount::id_of(&file).ok());
    if there != Some(old.id) {
        return Err(refuse(entry, "shows what is gone or covered elsewhere, which cannot be checkpointed yet"));
    }
    Ok(Source::Bind(path))
}

fn part(first: &Entry, place: usize, entry: &Entry) -> Result<Source, CaptureError> {
    match below(&entry.root, &first.root) {
        Some(rest) => Ok(Source::Part(place, rest.to_vec())),
        None => Err(refuse(entry, "shows another part of its file system, which cannot be checkpointed yet")),
    }
}

fn file_system(init: HostPid, entry: &Entry, fresh: &[(Vec<u8>, String)]) -> Result<FileSystem, CaptureError> {
    let contents = fresh.iter().find(|(device, _)| *device == entry.device).map(|(_, archive)| archive.clone());
    match entry.kind.as_str() {
        "tmpfs" if contents.is_none() => {
            return Err(refuse(entry, "was made during the checkpoint; try again"));
        }
        "tmpfs" => {}
        "devpts" => {
            let path = init.proc("root").join(as_path(entry.point.strip_prefix(b"/").unwrap_or(&entry.point)));
            let entries = fs::read_dir(&path).capturing("listing", path.display())?;
            if entries.flatten().any(|entry| entry.file_name() != "ptmx") {
                return Err(refuse(entry, "has terminals that are open, which cannot be checkpointed yet"));
            }
        }
        kind if VIEWS.contains(&kind) => {}
        kind => {
            let why = format!("is of the file system {kind}, which cannot be checkpointed yet");
            return Err(refuse(entry, &why));
        }
    }
    Ok(FileSystem {
        kind: entry.kind.clone(),
        device: entry.source.clone(),
        options: entry.file_system_options(),
        contents,
        root: entry.root.clone(),
    })
}

/// The path by which a view is packed.
pub(crate) fn path_of(view: &OwnedFd) -> std::path::PathBuf {
    format!("/proc/self/fd/{}", view.as_raw_fd()).into()
}
