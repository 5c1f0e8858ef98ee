//! Limits on memory, CPU time and processes, by whichever control groups the host offers.
//!
//! With version 2 the pod's own group gets them, if its controllers can be had. Where a controller belongs to a hierarchy
//! of version 1, a group of the pod's is made there, below the one that zap itself is in.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::ids::HostPid;
use crate::pod::Limits;
use crate::pod::cgroup::hierarchy;
use crate::pod::mounts;

/// What was made and switched on for a pod's limits.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct LimitGroups {
    /// Groups of version 1.
    directories: Vec<PathBuf>,
    /// Controllers of version 2 that were switched on, and in which groups' `cgroup.subtree_control`.
    enabled: Vec<(PathBuf, String)>,
}

/// Why a limit could not be set.
#[derive(Debug, thiserror::Error)]
pub enum LimitError {
    /// No control group of this host has the controller (exit code 4).
    #[error("this host lacks a control group that could limit {0}")]
    Lacks(&'static str),
    /// Writing the limit failed.
    #[error("limiting {what}: {path}: {source}", path = path.display())]
    Write {
        /// What was to be limited.
        what: &'static str,
        /// The control file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// The period over which CPU time is counted, in microseconds.
const PERIOD: u64 = 100_000;

/// One limit, as both versions spell it: (file, text), those marked optional only where they exist.
struct Limit {
    controller: &'static str,
    what: &'static str,
    v1: Vec<(&'static str, String)>,
    v2: Vec<(&'static str, String)>,
}

fn wanted(limits: &Limits) -> Vec<Limit> {
    let memory = limits.memory.map(|bytes| Limit {
        controller: "memory",
        what: "memory",
        // The second counts swap as well; it is there only if the kernel accounts for swap.
        v1: vec![("memory.limit_in_bytes", bytes.to_string()), ("memory.memsw.limit_in_bytes", bytes.to_string())],
        v2: vec![("memory.max", bytes.to_string()), ("memory.swap.max", "0".to_owned())],
    });
    let cpu = limits.cpus.map(|thousandths| {
        let quota = thousandths * PERIOD / 1000;
        Limit {
            controller: "cpu",
            what: "CPU time",
            v1: vec![("cpu.cfs_period_us", PERIOD.to_string()), ("cpu.cfs_quota_us", quota.to_string())],
            v2: vec![("cpu.max", format!("{quota} {PERIOD}"))],
        }
    });
    let pids = limits.pids.map(|number| {
        // PID 1 is ours and not among them.
        let text = (number + 1).to_string();
        Limit {
            controller: "pids",
            what: "processes",
            v1: vec![("pids.max", text.clone())],
            v2: vec![("pids.max", text)],
        }
    });
    memory.into_iter().chain(cpu).chain(pids).collect()
}

/// Files that a kernel may be without.
const OPTIONAL: [&str; 2] = ["memory.memsw.limit_in_bytes", "memory.swap.max"];

impl LimitGroups {
    /// Sets the limits of the pod `name`, whose own group (version 2) is the directory `group`. On failure nothing is left.
    pub fn create(name: &str, group: &Path, limits: &Limits) -> Result<LimitGroups, LimitError> {
        let mut made = LimitGroups::default();
        for limit in wanted(limits) {
            made.set(name, group, &limit).inspect_err(|_| drop(made.remove()))?;
        }
        Ok(made)
    }

    fn set(&mut self, name: &str, group: &Path, limit: &Limit) -> Result<(), LimitError> {
        if self.enable(group, limit.controller) {
            return write_all(group, limit, &limit.v2);
        }
        let Some(own) = own_group(limit.controller) else { return Err(LimitError::Lacks(limit.what)) };
        let host = group.parent().and_then(Path::file_name).unwrap_or_default().to_string_lossy().into_owned();
        let directory = own.join(format!("{host}-{name}"));
        match fs::create_dir(&directory) {
            Ok(()) => {}
            // Left by a zap that was killed; two controllers may also share a hierarchy.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(_) => return Err(LimitError::Lacks(limit.what)),
        }
        if !self.directories.contains(&directory) {
            self.directories.push(directory.clone());
        }
        write_all(&directory, limit, &limit.v1)
    }

    /// Makes a controller available in `group`, by switching it on in every group above; whether that was possible.
    fn enable(&mut self, group: &Path, controller: &str) -> bool {
        let listed =
            |path: PathBuf| fs::read_to_string(path).is_ok_and(|t| t.split_ascii_whitespace().any(|c| c == controller));
        let is_group = |path: &&Path| path.join("cgroup.subtree_control").is_file();
        let above: Vec<_> = group.ancestors().skip(1).take_while(is_group).collect();
        for ancestor in above.into_iter().rev() {
            if !listed(ancestor.join("cgroup.controllers")) {
                return false;
            }
            let control = ancestor.join("cgroup.subtree_control");
            if listed(control.clone()) {
                continue;
            }
            if fs::write(&control, format!("+{controller}")).is_err() {
                return false;
            }
            self.enabled.push((control, controller.to_owned()));
        }
        listed(group.join("cgroup.controllers"))
    }

    /// Puts a process into the groups; its children follow. To be called for PID 1 before it starts anything.
    pub fn add(&self, process: HostPid) -> Result<(), LimitError> {
        for directory in &self.directories {
            let path = directory.join("cgroup.procs");
            let what = "the pod";
            fs::write(&path, process.0.to_string()).map_err(|source| LimitError::Write { what, path, source })?;
        }
        Ok(())
    }

    /// Removes the groups, which are empty by now, and switches off what was switched on. Again is no error.
    pub fn remove(&self) -> Result<(), LimitError> {
        for directory in &self.directories {
            match fs::remove_dir(directory) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(LimitError::Write { what: "the pod", path: directory.clone(), source });
                }
                _ => {}
            }
        }
        for (control, controller) in self.enabled.iter().rev() {
            // Another pod may need it still; then it is the last one's to switch off.
            let _ = fs::write(control, format!("-{controller}"));
        }
        Ok(())
    }
}

fn write_all(directory: &Path, limit: &Limit, files: &[(&str, String)]) -> Result<(), LimitError> {
    for (file, text) in files {
        let path = directory.join(file);
        if OPTIONAL.contains(file) && !path.exists() {
            continue;
        }
        fs::write(&path, text).map_err(|source| LimitError::Write { what: limit.what, path, source })?;
    }
    Ok(())
}

/// The group of version 1 that zap is in, in the hierarchy of `controller`.
fn own_group(controller: &str) -> Option<PathBuf> {
    let table = fs::read("/proc/self/mountinfo").ok()?;
    let own = fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = own_path(&own, controller)?;
    let mount = table.split(|b| *b == b'\n').find_map(|line| {
        // The last field has the options of the file system: its controllers.
        let mut options = line.rsplit(|b| *b == b' ').next()?.split(|b| *b == b',');
        let mount = mounts::parse(line).pop().filter(|m| m.kind == "cgroup")?;
        options.any(|o| o == controller.as_bytes()).then_some(mount)
    })?;
    let below = mount.target.join(path.trim_start_matches('/'));
    // In a container the path may be one that is not mounted here; then the mount itself is its group.
    Some(if below.is_dir() { below } else { mount.target })
}

/// The path for a controller in `/proc/self/cgroup`: lines of `number:controllers:path`.
fn own_path<'a>(text: &'a str, controller: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        fields.next()?.split(',').any(|c| c == controller).then(|| fields.next())?
    })
}

/// Reads a text as the groups that a process is in.
pub(crate) fn try_groups(text: &str) {
    let _ = own_path(text, "memory");
}

/// Which of memory, CPU time and processes can be limited here, and by which version, for a group below `parent`.
pub fn available() -> Vec<(&'static str, Option<u8>)> {
    let v2 = hierarchy().ok().and_then(|m| fs::read_to_string(m.join("cgroup.controllers")).ok()).unwrap_or_default();
    let version = |controller: &str| match () {
        () if v2.split_ascii_whitespace().any(|c| c == controller) => Some(2),
        () if own_group(controller).is_some() => Some(1),
        () => None,
    };
    vec![("memory", version("memory")), ("cpu", version("cpu")), ("pids", version("pids"))]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_group_is_found_by_controller() {
        let text = "9:name=systemd:/\n4:memory:/a/b\n1:cpu,cpuacct:/c:d\n0::/\n";
        assert_eq!(own_path(text, "memory"), Some("/a/b"));
        assert_eq!(own_path(text, "cpuacct"), Some("/c:d"));
        assert_eq!(own_path(text, "pids"), None);
    }

    #[test]
    fn limits_are_spelled_as_each_version_wants_them() {
        let limits = Limits { memory: Some(1 << 20), cpus: Some(1500), pids: Some(9) };
        let all = wanted(&limits);
        assert_eq!(all[1].v2, [("cpu.max", "150000 100000".to_owned())]);
        assert_eq!(all[1].v1[1], ("cpu.cfs_quota_us", "150000".to_owned()));
        assert_eq!(all[2].v2, [("pids.max", "10".to_owned())]);
    }

    /// A group of version 2 of the test's own; the limits land in it, or in groups of version 1.
    #[test]
    fn a_group_is_limited_and_nothing_is_left() {
        let table = fs::read("/proc/self/mountinfo").unwrap();
        let Some(unified) = mounts::parse(&table).into_iter().find(|m| m.kind == "cgroup2") else { return };
        let host = unified.target.join(format!("zap-test-{}", std::process::id()));
        let group = host.join("pod");
        fs::create_dir_all(&group).unwrap();
        let limits = Limits { memory: Some(64 << 20), cpus: Some(500), pids: Some(3) };
        let result = LimitGroups::create("pod", &group, &limits).map(|made| {
            let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
            fs::write(group.join("cgroup.procs"), child.id().to_string()).unwrap();
            made.add(HostPid(child.id() as i32)).unwrap();
            let limit = fs::read_to_string(made.directories.last().unwrap_or(&group).join("pids.max")).unwrap();
            child.kill().unwrap();
            child.wait().unwrap();
            made.remove().unwrap();
            (made, limit)
        });
        fs::remove_dir(&group).unwrap();
        fs::remove_dir(&host).unwrap();
        match result {
            Ok((made, limit)) => {
                assert_eq!(limit, "4\n");
                assert!(made.directories.iter().all(|d| !d.exists()));
            }
            Err(error) => assert!(matches!(error, LimitError::Lacks(_)), "{error}"),
        }
    }
}
