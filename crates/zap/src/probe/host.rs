//! What pods are made of: control groups, file systems, networks.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::sys::fanotify::{EventFFlags, Fanotify, InitFlags};

use super::{Feature, holds, required, useful, works};
use crate::kernel;
use crate::pod::cgroup::hierarchy;
use crate::pod::{limits, network};
use crate::sys::{mount, probe};

pub(super) fn features(storage: &Path) -> Vec<Feature> {
    let mut features = vec![
        required("cgroup v2", "holding and ending all of a pod's processes at once", cgroup()),
        useful("limits", "--memory, --cpus and --pids", limited()),
        required("overlayfs", "a private root over the host's files", works(overlay(None))),
    ];
    match Scratch::below(storage) {
        Ok(scratch) => {
            let on_storage = works(overlay(Some(&scratch.0)));
            features.push(useful("overlay on storage", "a pod's files on disk; else they are in memory", on_storage));
            features.push(useful(
                "reflink on storage",
                "copying a pod's files without their bytes",
                works(reflink(&scratch.0)),
            ));
        }
        Err(e) => features.push(useful("storage", "a pod's files on disk; else they are in memory", Err(e))),
    }
    features.push(useful("fanotify", "following which files change", works(fanotify())));
    let kernel = kernel::reader().map(|_| String::new()).map_err(io::Error::other);
    features.push(useful("kernel memory", "keeping what clients of unix sockets say before they are accepted", kernel));
    let [bridge, filter, exchange, line, follow] = network::probe();
    features.push(required("bridge and veth", "pods with addresses of their own", works(bridge)));
    features.push(useful("nftables", "published ports, and a way out through the host", works(filter)));
    features.push(useful("nftables netdev egress", "copies of a pod side by side", works(exchange)));
    features.push(useful("nftables netdev fwd", "following pods that move to another network", works(follow)));
    features.push(useful("VXLAN", "forwarders for pods that move to another network", works(line)));
    features
}

/// Makes a group and looks at what the kernel puts into it.
fn cgroup() -> io::Result<String> {
    let unified = hierarchy().map_err(|e| io::Error::other(e.to_string()))?;
    let group = unified.join(format!("zap-check-{}", std::process::id()));
    fs::create_dir(&group)?;
    let missing: Vec<_> = ["cgroup.freeze", "cgroup.kill"].into_iter().filter(|f| !group.join(f).exists()).collect();
    let devices = crate::pod::probe_devices(&group);
    fs::remove_dir(&group)?;
    devices.map_err(|e| io::Error::other(format!("no device filters (CONFIG_CGROUP_BPF): {e}")))?;
    holds(missing.is_empty(), &format!("the kernel lacks {}", missing.join(" and ")))
}

fn limited() -> io::Result<String> {
    let (can, cannot): (Vec<_>, Vec<_>) = limits::available().into_iter().partition(|(_, version)| version.is_some());
    let told: Vec<_> = can.iter().map(|(name, version)| format!("{name} (v{})", version.unwrap_or_default())).collect();
    let missing: Vec<_> = cannot.iter().map(|(name, _)| *name).collect();
    holds(missing.is_empty(), &format!("no control group for {}", missing.join(", "))).map(|_| told.join(", "))
}

/// Mounts an overlay, attached nowhere, with its upper layer in `storage` or in a tmpfs of its own.
fn overlay(storage: Option<&Path>) -> io::Result<()> {
    let Some(storage) = storage else {
        // Read-only, of two layers that are there anyway.
        return mount::new_mount(c"overlay", &[(c"lowerdir", Some(c"/usr:/etc"))], 0).map(drop);
    };
    for layer in ["lower", "upper", "work"] {
        fs::create_dir(storage.join(layer))?;
    }
    let path = |layer: &str| CString::new(storage.join(layer).as_os_str().as_bytes()).map_err(io::Error::from);
    let (lower, upper, work) = (path("lower")?, path("upper")?, path("work")?);
    let options = [(c"lowerdir", Some(&*lower)), (c"upperdir", Some(&*upper)), (c"workdir", Some(&*work))];
    mount::new_mount(c"overlay", &options, 0).map(drop)
}

fn reflink(storage: &Path) -> io::Result<()> {
    let (from, to) = (storage.join("from"), storage.join("to"));
    fs::write(&from, [0; 4096])?;
    probe::reflink(&File::open(&from)?, &File::create(&to)?)
}

fn fanotify() -> nix::Result<()> {
    Fanotify::init(
        InitFlags::FAN_CLASS_NOTIF | InitFlags::FAN_CLOEXEC | InitFlags::FAN_UNLIMITED_MARKS,
        EventFFlags::O_RDONLY,
    )
    .map(drop)
}

/// A directory of ours where pods' files would be, gone in the end with those that had to be made above it.
struct Scratch(PathBuf, Option<PathBuf>);

impl Scratch {
    fn below(storage: &Path) -> io::Result<Scratch> {
        let missing = storage.ancestors().take_while(|p| !p.exists()).last().map(Path::to_owned);
        let path = storage.join(format!(".check-{}", std::process::id()));
        fs::create_dir_all(&path)?;
        Ok(Scratch(path, missing))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
        // Only while they are empty: a pod may have been made meanwhile.
        let made = self.1.as_ref().map(|top| self.0.ancestors().skip(1).take_while(move |p| p.starts_with(top)));
        made.into_iter().flatten().for_each(|path| drop(fs::remove_dir(path)));
    }
}
