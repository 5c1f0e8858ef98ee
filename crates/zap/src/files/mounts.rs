//! The mounts of a pod, and which of them travel with its image.

use std::collections::HashMap;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use crate::error::{CaptureError, Context};
use crate::ids::HostPid;
use crate::look::Look;
use crate::mounts::{self, Entry};
use crate::pod::rootfs::{layer_name, tmpfs_mounts};

use super::Descriptor;

/// A line of `/proc/PID/mountinfo`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Its number, unique on the host.
    pub id: u64,
    /// The device number of its file system.
    pub device: u64,
    /// The directory of the file system that it shows.
    pub root: PathBuf,
    /// Where it is mounted, as the process whose file was read sees it.
    pub point: PathBuf,
    /// `overlay`, `tmpfs`, `ext4` …
    pub file_system: String,
    /// Whether the mount or its file system is read-only.
    pub read_only: bool,
}

/// Where the contents of a file come from after a restart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The upper layer or a tmpfs: it travels with the image.
    Layer,
    /// The lower root: it must be unchanged at the restart.
    Lower,
    /// A bind mount: looked for, not looked into.
    External,
    /// A file system whose files are the kernel's own: sysfs, cgroup.
    Kernel,
    /// Anything else.
    Unknown(String),
}

/// The mounts that have been looked up, by number.
#[derive(Debug, Default)]
pub struct Mounts {
    known: HashMap<u64, Mount>,
}

impl Mounts {
    /// The mount with that number, as `init` or, failing that, `process` sees it.
    pub(crate) fn find(&mut self, id: u64, init: HostPid, process: HostPid) -> std::io::Result<Option<&Mount>> {
        for pid in [init, process] {
            if self.known.contains_key(&id) {
                break;
            }
            let lines = crate::procfs::read(pid.proc("mountinfo"))?;
            self.known.extend(parse(&lines).map(|m| (m.id, m)));
        }
        Ok(self.known.get(&id))
    }

    /// A mount of the file system with that device number, the whole of it if there is one, as `init` or, failing that,
    /// `process` sees it.
    pub(super) fn of_device(
        &mut self,
        device: u64,
        init: HostPid,
        process: HostPid,
    ) -> std::io::Result<Option<&Mount>> {
        for pid in [init, process] {
            if self.known.values().any(|m| m.device == device) {
                break;
            }
            let lines = crate::procfs::read(pid.proc("mountinfo"))?;
            self.known.extend(parse(&lines).map(|m| (m.id, m)));
        }
        let mounts = self.known.values().filter(|m| m.device == device);
        Ok(mounts.min_by_key(|m| (m.root.as_os_str().len(), m.id)))
    }
}

/// The mount that a file was opened through.
pub fn mount_of(look: &mut Look<'_>, descriptor: &Descriptor) -> Result<Option<Mount>, CaptureError> {
    let id = descriptor.field("mnt_id:").and_then(|v| v.parse().ok()).unwrap_or(u64::MAX);
    let found = look.files.mounts.find(id, look.init, descriptor.subject.host);
    Ok(found.capturing("looking up the mount", descriptor.object())?.cloned())
}

/// The path that the pod was born with of a file on a mount that it made of what it was born with, and that mount.
fn at_home(
    look: &mut Look<'_>,
    descriptor: &Descriptor,
    path: &Path,
) -> Result<Option<(Mount, Vec<u8>)>, CaptureError> {
    if look.made.is_empty() {
        return Ok(None);
    }
    let Some(mount) = mount_of(look, descriptor)? else { return Ok(None) };
    let Some(Some((born, place))) = look.made.get(&mount.id).cloned() else { return Ok(None) };
    let rest = mounts::below(path.as_os_str().as_bytes(), mount.point.as_os_str().as_bytes()).unwrap_or_default();
    let found = look.files.mounts.find(born, look.init, descriptor.subject.host);
    let found = found.capturing("looking up the mount", descriptor.object())?.cloned();
    Ok(found.map(|born| (born, mounts::join(&place, rest))))
}

/// The path that the pod was born with, of a file that is shown elsewhere by a mount that the pod made.
pub fn home_of(look: &mut Look<'_>, descriptor: &Descriptor, path: &Path) -> Result<Option<Vec<u8>>, CaptureError> {
    Ok(at_home(look, descriptor, path)?.map(|(_, home)| home))
}

/// Where the contents of `descriptor` (a file that still has its name `path`) come from after a restart.
pub fn origin(look: &mut Look<'_>, descriptor: &Descriptor, path: &Path) -> Result<Origin, CaptureError> {
    let Some(mount) = mount_of(look, descriptor)? else {
        return Ok(Origin::Unknown("detached mount".into()));
    };
    let binds: Vec<&Path> = look.spec.binds.iter().map(|b| b.target.as_path()).collect();
    match look.made.get(&mount.id) {
        None => Ok(classify(&mount, path, &binds, &look.upper)),
        Some(None) if mount.file_system == "tmpfs" => Ok(Origin::Layer),
        Some(None) => Ok(Origin::Kernel),
        Some(Some(_)) => match at_home(look, descriptor, path)? {
            Some((born, home)) => {
                let binds: Vec<&Path> = look.spec.binds.iter().map(|b| b.target.as_path()).collect();
                Ok(classify(&born, as_path(&home), &binds, &look.upper))
            }
            None => Ok(Origin::Unknown("detached mount".into())),
        },
    }
}

/// Where a file of an overlay is in the pod's own layer, if it has been written.
pub(super) fn in_layer(mount: &Mount, path: &Path, upper: &Path) -> PathBuf {
    upper.join(layer_name(&mount.point)).join(path.strip_prefix(&mount.point).unwrap_or(path))
}

fn classify(mount: &Mount, path: &Path, binds: &[&Path], upper: &Path) -> Origin {
    match mount.file_system.as_str() {
        _ if binds.contains(&mount.point.as_path()) => Origin::External,
        "overlay" => {
            let in_upper = !upper.as_os_str().is_empty() && in_layer(mount, path, upper).symlink_metadata().is_ok();
            if in_upper { Origin::Layer } else { Origin::Lower }
        }
        "tmpfs" if tmpfs_mounts().iter().any(|t| mount.point == Path::new(t)) => Origin::Layer,
        "sysfs" | "cgroup" | "cgroup2" | "devtmpfs" => Origin::Kernel,
        _ if mount.read_only => Origin::Lower,
        other => Origin::Unknown(other.to_owned()),
    }
}

/// The lines of a `mountinfo` that make sense.
pub fn parse(lines: &[u8]) -> impl Iterator<Item = Mount> {
    mounts::parse(lines).into_iter().filter_map(mount)
}

fn mount(entry: Entry) -> Option<Mount> {
    Some(Mount {
        read_only: entry.is_read_only(),
        id: entry.id,
        device: device(&entry.device)?,
        root: path_of(entry.root),
        point: path_of(entry.point),
        file_system: entry.kind,
    })
}

/// `8:1`
fn device(field: &[u8]) -> Option<u64> {
    let (major, minor) = std::str::from_utf8(field).ok()?.split_once(':')?;
    Some(libc::makedev(major.parse().ok()?, minor.parse().ok()?))
}

pub(crate) use super::reopen::{as_path, from_host, relative};

fn path_of(bytes: Vec<u8>) -> PathBuf {
    PathBuf::from(std::ffi::OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINES: &[u8] = b"27 1 0:31 / /a\\040b rw,relatime - overlay overlay rw\n\
        30 27 0:33 / /tmp rw - tmpfs tmpfs rw\nbad line\n\
        31 27 8:1 /srv /data rw shared:1 master:2 - ext4 /dev/sda rw\n32 27 0:40 / /sys ro - sysfs sysfs rw\n";

    #[test]
    fn parses_mountinfo() {
        let mounts: Vec<Mount> = parse(LINES).collect();
        assert_eq!(mounts.iter().map(|m| m.id).collect::<Vec<_>>(), [27, 30, 31, 32]);
        assert_eq!(mounts[0].point, Path::new("/a b"));
        assert_eq!((mounts[2].root.as_path(), mounts[2].file_system.as_str()), (Path::new("/srv"), "ext4"));
        assert!(mounts[3].read_only && !mounts[0].read_only);
    }

    #[test]
    fn tells_where_contents_come_from() {
        let mounts: Vec<Mount> = parse(LINES).collect();
        let upper = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(upper.path().join("a b.mount/new")).unwrap();
        let of = |i: usize, path: &str| classify(&mounts[i], Path::new(path), &[Path::new("/data")], upper.path());
        assert_eq!(of(0, "/a b/bin/sh"), Origin::Lower);
        assert_eq!(of(0, "/a b/new"), Origin::Layer);
        assert_eq!(of(1, "/tmp/x"), Origin::Layer);
        assert_eq!(of(2, "/data/x"), Origin::External);
        assert_eq!(of(3, "/sys/x"), Origin::Kernel);
        assert_eq!(classify(&mounts[2], Path::new("/data/x"), &[], upper.path()), Origin::Unknown("ext4".into()));
    }
}
