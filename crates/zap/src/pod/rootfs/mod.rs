//! What a pod sees as its file system: the root and the host's other file systems, each under an overlay of the pod's
//! own; fresh system directories; nothing of the host's `/run`, and nothing of zap's.
//!
//! The set of mounts depends only on the spec and the host's mount table, so a restart makes the same tree.

mod build;
mod devices;
mod layers;

pub use build::{BuildError, build};
pub use layers::{prepare_layers, remove_layers};

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::pod::mounts::{self, Mount};
use crate::pod::{Bind, PodError, PodSpec, Store};

/// The tmpfs mounts of a pod, as it names them, whose contents travel in an image.
pub fn tmpfs_mounts() -> &'static [&'static str] {
    &["/dev/shm", "/run", "/tmp"]
}

/// Directories of the host that a pod has fresh ones of: nothing mounted below them is carried over.
const FRESH: [&str; 5] = ["/dev", "/proc", "/run", "/sys", "/tmp"];

/// File systems that hold files people keep. All others are the kernel's own, or belong to the host's session.
const REAL: [&str; 19] = [
    "ext2",
    "ext3",
    "ext4",
    "xfs",
    "btrfs",
    "f2fs",
    "jfs",
    "reiserfs",
    "zfs",
    "bcachefs",
    "overlay",
    "squashfs",
    "erofs",
    "iso9660",
    "nfs",
    "nfs4",
    "9p",
    "virtiofs",
    "fuse.sshfs",
];

/// A mount of the host that the pod sees through an overlay.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Overlay {
    /// Where, as the pod names it.
    #[serde(with = "raw_path")]
    pub target: PathBuf,
    /// The host's directory below it.
    #[serde(with = "raw_path")]
    pub lower: PathBuf,
    /// The pod's own layer.
    #[serde(with = "raw_path")]
    pub upper: PathBuf,
    /// What the kernel needs beside it.
    #[serde(with = "raw_path")]
    pub work: PathBuf,
}

/// What is to be mounted.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Plan {
    /// An empty directory of the host's to mount the root on.
    #[serde(with = "raw_path")]
    pub mount_point: PathBuf,
    /// The root first, then the others, outer before inner.
    pub overlays: Vec<Overlay>,
    /// What the pod sees as it is, and cannot write to.
    pub read_only: Vec<Bind>,
    /// What was asked for with `--bind`.
    pub binds: Vec<Bind>,
    /// What the pod must not see: zap's own directories.
    pub masks: Vec<PathBuf>,
    /// Whether the console is the pod's first pty.
    pub tty: bool,
    /// Its host name, and its own line for `/etc/hosts`; only for a pod that is made, not for one that is restarted.
    pub names: Option<Names>,
    /// For a restart: the highest PID of the image. New ones come after it, so that nothing passing takes one of the image's.
    pub last_pid: Option<i32>,
}

/// What a new pod's files say of its name.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Names {
    /// The host name.
    pub hostname: String,
    /// The name servers' file, where the pod cannot read the host's because it is below `/run`: path and contents.
    pub resolver: Option<(PathBuf, Vec<u8>)>,
}

/// Paths are bytes, not text.
mod raw_path {
    use std::ffi::{OsStr, OsString};
    use std::path::{Path, PathBuf};

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
        OsStr::serialize(path.as_os_str(), serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PathBuf, D::Error> {
        OsString::deserialize(deserializer).map(PathBuf::from)
    }
}

/// The directory of a pod's upper layers: one for each overlay.
pub fn upper_dir(store: &Store, pod: &str) -> PathBuf {
    store.storage_dir(pod).join("upper")
}

/// What the pod of `spec` sees, on the host as it is now.
pub fn plan(store: &Store, spec: &PodSpec, fresh: bool) -> Result<Plan, PodError> {
    let path = Path::new("/proc/self/mountinfo");
    let table =
        std::fs::read(path).map_err(|source| PodError::Store { step: "reading", path: path.to_owned(), source })?;
    let storage = store.storage_dir(&spec.name);
    let mut plan = Plan {
        mount_point: storage.join("mount"),
        overlays: vec![overlay(&storage, &spec.root, Path::new("/"))],
        read_only: Vec::new(),
        binds: spec.binds.clone(),
        masks: [store.state(), store.storage()].iter().filter_map(|p| inside(&spec.root, p)).collect(),
        tty: spec.tty,
        names: fresh.then(|| Names { hostname: spec.hostname.clone(), resolver: resolver() }),
        last_pid: None,
    };
    for mount in visible(mounts::parse(&table)) {
        let Some(target) = inside(&spec.root, &mount.target) else { continue };
        if target == Path::new("/") || mount.target.starts_with(store.storage()) {
            continue;
        }
        if mount.read_only || !mount.target.is_dir() {
            plan.read_only.push(Bind { source: mount.target, target, read_only: true });
        } else {
            plan.overlays.push(overlay(&storage, &mount.target, &target));
        }
    }
    Ok(plan)
}

/// The mounts that a pod is to see: of real file systems, not covered by another, not below a fresh directory, outer first.
fn visible(mounts: Vec<Mount>) -> Vec<Mount> {
    let mut seen: Vec<Mount> = Vec::new();
    for mount in mounts {
        // A later mount on the same place, or on a place above, hides the earlier one.
        seen.retain(|m| !m.target.starts_with(&mount.target));
        seen.push(mount);
    }
    seen.retain(|m| REAL.contains(&m.kind.as_str()) && !FRESH.iter().any(|f| m.target.starts_with(f)));
    seen.sort_by(|a, b| a.target.cmp(&b.target));
    seen
}

/// The name of the directory of an overlay's upper layer, by the place that the pod sees it at.
pub fn layer_name(target: &Path) -> String {
    match target.strip_prefix("/") {
        Ok(rest) if !rest.as_os_str().is_empty() => {
            rest.to_string_lossy().replace('%', "%25").replace('/', "%2f") + ".mount"
        }
        _ => "root".to_owned(),
    }
}

fn overlay(storage: &Path, lower: &Path, target: &Path) -> Overlay {
    let name = layer_name(target);
    Overlay {
        target: target.to_owned(),
        lower: lower.to_owned(),
        upper: storage.join("upper").join(&name),
        work: storage.join("work").join(&name),
    }
}

/// A path of the host as a pod with that root names it, if it is below.
fn inside(root: &Path, path: &Path) -> Option<PathBuf> {
    path.strip_prefix(root).ok().map(|rest| Path::new("/").join(rest))
}

/// Where `/etc/resolv.conf` leads below `/run` the pod cannot follow it; it gets the list of real servers if there is one.
fn resolver() -> Option<(PathBuf, Vec<u8>)> {
    let real = std::fs::canonicalize("/etc/resolv.conf").ok()?;
    if !real.starts_with("/run") {
        return None;
    }
    let contents = std::fs::read("/run/systemd/resolve/resolv.conf").or_else(|_| std::fs::read(&real)).ok()?;
    Some((real, contents))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(target: &str, kind: &str) -> Mount {
        Mount { target: target.into(), kind: kind.into(), read_only: false }
    }

    #[test]
    fn only_what_people_keep_is_seen() {
        let mounts = [
            mount("/", "ext4"),
            mount("/proc", "proc"),
            mount("/home/a", "xfs"),
            mount("/home", "ext4"),
            mount("/srv", "btrfs"),
            mount("/tmp/x", "ext4"),
            mount("/opt", "tmpfs"),
        ];
        let seen: Vec<_> = visible(mounts[1..].to_vec()).into_iter().map(|m| m.target).collect();
        assert_eq!(seen, [PathBuf::from("/home"), PathBuf::from("/srv")]);
    }

    #[test]
    fn layers_have_names_that_travel() {
        let layer = overlay(Path::new("/s"), Path::new("/srv/data"), Path::new("/srv/data"));
        assert_eq!(layer.upper, Path::new("/s/upper/srv%2fdata.mount"));
        assert_eq!(overlay(Path::new("/s"), Path::new("/r"), Path::new("/")).upper, Path::new("/s/upper/root"));
    }
}
