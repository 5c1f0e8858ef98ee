//! Limits on memory, CPU time and processes, by whichever control groups the host offers.
//!
//! With version 2 the pod's own group gets them, if its controllers can be had. Where a controller belongs to a hierarchy
//! of version 1, the pod's group there gets them: the upper one, which nobody in the pod can come by.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::pod::cgroup::hierarchy;
use crate::pod::{Cgroup, Limits, old_groups};

/// What was switched on for a pod's limits.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct LimitGroups {
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
    /// Sets the limits of the pod that has these groups. On failure nothing is left.
    pub fn create(groups: &Cgroup, limits: &Limits) -> Result<LimitGroups, LimitError> {
        let mut made = LimitGroups::default();
        for limit in wanted(limits) {
            made.set(groups, &limit).inspect_err(|_| made.remove())?;
        }
        Ok(made)
    }

    fn set(&mut self, groups: &Cgroup, limit: &Limit) -> Result<(), LimitError> {
        if self.enable(groups.path(), limit.controller) {
            return write_all(groups.path(), limit, &limit.v2);
        }
        let old = groups.old_group(limit.controller).ok_or(LimitError::Lacks(limit.what))?;
        write_all(&old, limit, &limit.v1)
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

    /// Switches off what was switched on.
    pub fn remove(&self) {
        for (control, controller) in self.enabled.iter().rev() {
            // Another pod may need it still; then it is the last one's to switch off.
            let _ = fs::write(control, format!("-{controller}"));
        }
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

/// Which of memory, CPU time and processes can be limited here, and by which version, for a group below `parent`.
pub fn available() -> Vec<(&'static str, Option<u8>)> {
    let v2 = hierarchy().ok().and_then(|m| fs::read_to_string(m.join("cgroup.controllers")).ok()).unwrap_or_default();
    let version = |controller: &str| match () {
        () if v2.split_ascii_whitespace().any(|c| c == controller) => Some(2),
        () if old_groups::have(controller) => Some(1),
        () => None,
    };
    vec![("memory", version("memory")), ("cpu", version("cpu")), ("pids", version("pids"))]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::{PodSpec, Store};

    #[test]
    fn limits_are_spelled_as_each_version_wants_them() {
        let limits = Limits { memory: Some(1 << 20), cpus: Some(1500), pids: Some(9) };
        let all = wanted(&limits);
        assert_eq!(all[1].v2, [("cpu.max", "150000 100000".to_owned())]);
        assert_eq!(all[1].v1[1], ("cpu.cfs_quota_us", "150000".to_owned()));
        assert_eq!(all[2].v2, [("pids.max", "10".to_owned())]);
    }

    /// The limits land in a group of version 2, or in groups of version 1.
    #[test]
    fn a_group_is_limited_and_nothing_is_left() {
        if fs::read("/proc/self/mountinfo").is_ok_and(|table| !table.windows(9).any(|some| some == b" cgroup2 ")) {
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let store = Store::new(Some(directory.path()));
        let limits = Limits { memory: Some(64 << 20), cpus: Some(500), pids: Some(3) };
        let mut groups = Cgroup::of(&store, &PodSpec::new("limited", &[])).unwrap();
        groups.make().unwrap();
        let result = LimitGroups::create(&groups, &limits).map(|made| {
            let limited = groups.old_group("pids").unwrap_or(groups.path().to_owned());
            let limit = fs::read_to_string(limited.join("pids.max")).unwrap();
            made.remove();
            limit
        });
        groups.remove().unwrap();
        match result {
            Ok(limit) => assert_eq!(limit, "4\n"),
            Err(error) => assert!(matches!(error, LimitError::Lacks(_)), "{error}"),
        }
    }
}
