//! A pod's groups in the hierarchies of control groups of version 1 that the host has.
//!
//! Whoever makes a user namespace, and a cgroup namespace in it, may mount each hierarchy from his own group down, and change
//! what is there. So a pod has groups of its own, two deep, below the ones that zap itself is in: the upper one belongs to the
//! host and has the pod's limits; the lower one is what processes of the pod can come by.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::sync::OnceLock;

use nix::sys::resource::{Resource, getrlimit};
use serde::{Deserialize, Serialize};

use crate::mounts::Entry;
use crate::pod::{PodSpec, capabilities};

/// The name of the lower group.
const LOWER: &str = "pod";

/// The groups of a pod, written down by their places: a process elsewhere may find the hierarchies mounted elsewhere.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct OldGroups(Vec<Upper>);

/// An upper group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Upper {
    /// What its hierarchy is for: `cpu,cpuacct`, `name=systemd`.
    hierarchy: String,
    /// Its place in what is mounted of the hierarchy.
    place: PathBuf,
}

impl OldGroups {
    /// Those of a pod that is to be made, where zap may make any.
    pub(super) fn of(name: &str, spec: &PodSpec) -> OldGroups {
        let real_time = spec.limits.cpus.is_none() && may_be_real_time(spec);
        let upper = hierarchies().iter().filter(|h| !(h.read_only || real_time && h.shares_out_real_time())).map(|h| {
            let place = h.own.strip_prefix(&h.mount).unwrap_or(Path::new("")).join(name);
            Upper { hierarchy: h.names.clone(), place }
        });
        OldGroups(upper.collect())
    }

    /// Makes them, but for those that zap may not make.
    pub(super) fn make(&mut self) -> Result<(), (PathBuf, io::Error)> {
        let mut failure = None;
        self.0.retain(|group| {
            let Some(path) = group.path() else { return false };
            match make(&path) {
                Ok(()) => true,
                Err(e) if may_not(&e) => {
                    tracing::info!("{}: {e}: the pod has no group there", path.display());
                    false
                }
                Err(e) => {
                    failure.get_or_insert((path, e));
                    true
                }
            }
        });
        failure.map_or(Ok(()), Err)
    }

    /// The files through which a thread that writes `0` joins them.
    pub(super) fn doors(&self) -> Result<Vec<File>, (PathBuf, io::Error)> {
        let open = |path: PathBuf| {
            // Not `cgroup.procs`: to have a whole process join, the kernel waits until no other forks, for milliseconds.
            let door = path.join(LOWER).join("tasks");
            File::options().write(true).open(&door).map_err(|e| (door, e))
        };
        self.paths().map(open).collect()
    }

    /// The upper group in the hierarchy of a controller.
    pub(super) fn with(&self, controller: &str) -> Option<PathBuf> {
        self.0.iter().find(|group| group.hierarchy.split(',').any(|name| name == controller)).and_then(Upper::path)
    }

    /// What somebody in the pod has done to them that could not be made again, if that shows.
    pub(super) fn disturbed(&self) -> Option<String> {
        self.lower(|lower| is_divided(lower) || is_frozen(lower))
    }

    /// The one in which somebody in the pod has made groups.
    pub(super) fn divided(&self) -> Option<String> {
        self.lower(is_divided)
    }

    fn lower(&self, is: impl Fn(&Path) -> bool) -> Option<String> {
        self.paths().map(|upper| upper.join(LOWER)).find(|lower| is(lower)).map(|lower| lower.display().to_string())
    }

    /// Whether somebody in the pod has frozen all of it.
    pub(super) fn is_frozen(&self) -> bool {
        self.with("freezer").is_some_and(|upper| is_frozen(&upper.join(LOWER)))
    }

    /// Lets those go on that somebody in the pod has frozen: not even who is killed ends before.
    pub(super) fn thaw(&self) {
        if let Some(upper) = self.with("freezer") {
            thaw(&upper.join(LOWER));
        }
    }

    /// Removes them, which are empty by now, with all that was made below. Again is no error.
    pub(super) fn remove(&self) -> Result<(), (PathBuf, io::Error)> {
        self.paths().try_for_each(|upper| remove(&upper.join(LOWER)).and_then(|()| remove(&upper)))
    }

    fn paths(&self) -> impl Iterator<Item = PathBuf> {
        self.0.iter().filter_map(Upper::path)
    }
}

impl Upper {
    /// Where it is, if its hierarchy can be reached from here.
    fn path(&self) -> Option<PathBuf> {
        let hierarchy = hierarchies().iter().find(|h| h.names == self.hierarchy)?;
        Some(hierarchy.mount.join(&self.place))
    }
}

const FREEZER: &str = "freezer.state";
const THAWED: &[u8] = b"THAWED";

fn may_not(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem)
}

/// Whether processes of the pod can come to run in real time.
fn may_be_real_time(spec: &PodSpec) -> bool {
    capabilities::includes(&spec.capabilities, "SYS_NICE")
        || getrlimit(Resource::RLIMIT_RTPRIO).is_ok_and(|(_, hard)| hard > 0)
}

fn make(upper: &Path) -> io::Result<()> {
    make_one(upper)?;
    if let Some(above) = upper.parent() {
        give_processors(above, upper)?;
    }
    make_one(&upper.join(LOWER))
}

fn make_one(path: &Path) -> io::Result<()> {
    match fs::create_dir(path) {
        // Left by a zap that was killed.
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

/// Nobody can join a group without processors and memory nodes, as new ones are.
fn give_processors(above: &Path, group: &Path) -> io::Result<()> {
    if !group.join("cpuset.cpus").exists() {
        return Ok(());
    }
    for file in ["cpuset.cpus", "cpuset.mems"] {
        fs::write(group.join(file), fs::read(above.join(file))?)?;
    }
    // What is made below begins like this one.
    fs::write(group.join("cgroup.clone_children"), "1")
}

/// A directory has a link from each directory in it.
fn is_divided(group: &Path) -> bool {
    fs::metadata(group).is_ok_and(|found| found.nlink() > 2)
}

fn is_frozen(group: &Path) -> bool {
    fs::read(group.join(FREEZER)).is_ok_and(|state| !state.starts_with(THAWED))
}

fn thaw(group: &Path) {
    let _ = fs::write(group.join(FREEZER), THAWED);
    inner(group).for_each(|inner| thaw(&inner));
}

fn remove(group: &Path) -> Result<(), (PathBuf, io::Error)> {
    match fs::remove_dir(group) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(_) => {
            inner(group).try_for_each(|inner| remove(&inner))?;
            fs::remove_dir(group).map_err(|e| (group.to_owned(), e))
        }
    }
}

/// The groups in a group.
fn inner(group: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(group).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path())
}

/// A hierarchy of version 1.
struct Hierarchy {
    /// What it is for, as `/proc/self/cgroup` says it.
    names: String,
    /// Where it is mounted, and the group there that zap is in.
    mount: PathBuf,
    own: PathBuf,
    read_only: bool,
}

impl Hierarchy {
    /// Whether a new group in it has no real time until somebody gives it a part of the host's: `CONFIG_RT_GROUP_SCHED`.
    fn shares_out_real_time(&self) -> bool {
        self.own.join("cpu.rt_runtime_us").exists()
    }
}

/// The hierarchies of version 1 that can be reached from here: as this process has them mounted, or else the host's first one.
fn hierarchies() -> &'static [Hierarchy] {
    static FOUND: OnceLock<Vec<Hierarchy>> = OnceLock::new();
    FOUND.get_or_init(|| {
        let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let mut wanted: Vec<_> = places(&own).collect();
        let mut found = Vec::new();
        for (table, root) in super::cgroup::TABLES {
            if wanted.is_empty() {
                break;
            }
            let table = crate::mounts::parse(&fs::read(table).unwrap_or_default());
            wanted.retain(|(names, place)| {
                let mut mounted = table.iter().filter(|entry| shows(entry, names));
                let hierarchy = mounted.find_map(|entry| reach(entry, root, names, place));
                let missing = hierarchy.is_none();
                found.extend(hierarchy);
                missing
            });
        }
        found
    })
}

/// The hierarchies of version 1 in `/proc/self/cgroup`, and this process's group in each: lines of `number:names:place`.
fn places(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.lines().filter_map(|line| {
        let (_, rest) = line.split_once(':')?;
        // That of version 2 has no name.
        rest.split_once(':').filter(|(names, _)| !names.is_empty())
    })
}

/// Whether a mount is of the hierarchy with these names.
fn shows(entry: &Entry, names: &str) -> bool {
    entry.kind == "cgroup" && names.split(',').all(|name| entry.super_options.iter().any(|option| option == name))
}

fn reach(entry: &Entry, root: &str, names: &str, place: &str) -> Option<Hierarchy> {
    let mount = super::cgroup::from(root, Path::new(OsStr::from_bytes(&entry.point)));
    let below = Path::new(place).strip_prefix(OsStr::from_bytes(&entry.root)).ok();
    // In a container the place may be one that is not mounted here; then the mount itself is its group.
    let below = below.filter(|below| !below.components().any(|part| part == Component::ParentDir));
    let own = below.map(|below| mount.join(below)).filter(|own| own.is_dir()).unwrap_or_else(|| mount.clone());
    own.join("tasks").exists().then(|| Hierarchy {
        names: names.to_owned(),
        mount,
        own,
        read_only: entry.is_read_only(),
    })
}

/// Whether a group can be limited by a controller of version 1 here.
pub(super) fn have(controller: &str) -> bool {
    hierarchies().iter().any(|h| !h.read_only && h.names.split(',').any(|name| name == controller))
}

/// Reads a text as the groups that a process is in.
pub(crate) fn try_groups(text: &str) {
    places(text).for_each(drop);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_groups_are_found_by_hierarchy() {
        let text = "9:name=systemd:/\n4:memory:/a/b\n1:cpu,cpuacct:/c:d\n0::/\nrubbish\n";
        let found: Vec<_> = places(text).collect();
        assert_eq!(found, [("name=systemd", "/"), ("memory", "/a/b"), ("cpu,cpuacct", "/c:d")]);
    }

    #[test]
    fn a_hierarchy_is_found_by_its_options() {
        let table = b"31 30 0:27 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
            32 30 0:28 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n\
            33 30 0:29 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n";
        let table = crate::mounts::parse(table);
        let at = |names: &str| table.iter().position(|entry| shows(entry, names));
        assert_eq!(["cpu,cpuacct", "cpuset", "name=systemd", "pids"].map(at), [Some(0), Some(1), Some(2), None]);
    }

    /// Groups are made, joined and removed with what was made and frozen in them; where the host has none of version 1 there is
    /// nothing to do.
    #[test]
    fn nothing_is_left_of_groups() {
        let spec = PodSpec { capabilities: Vec::new(), ..PodSpec::new("test", &[]) };
        let mut groups = OldGroups::of(&format!("zap-test-{}", std::process::id()), &spec);
        groups.make().unwrap();
        assert_eq!(groups.doors().unwrap().len(), groups.0.len());
        assert_eq!(groups.disturbed(), None);
        if let Some(upper) = groups.with("freezer") {
            fs::create_dir(upper.join("pod/inner")).unwrap();
            assert!(groups.disturbed().is_some());
            let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
            fs::write(upper.join("pod/inner/tasks"), child.id().to_string()).unwrap();
            fs::write(upper.join("pod/inner").join(FREEZER), "FROZEN").unwrap();
            child.kill().unwrap();
            groups.thaw();
            child.wait().unwrap();
        }
        groups.remove().unwrap();
        assert!(groups.paths().all(|path| !path.exists()));
        groups.remove().unwrap();
    }
}
