//! The processes of a pod, as `/proc` shows them.

use serde::{Deserialize, Serialize};

use crate::ids::{HostPid, PodPid};
use crate::pod::{Cgroup, PodError};

/// A process of a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its PID in the pod.
    pub pid: PodPid,
    /// Its PID on the host.
    pub host_pid: HostPid,
    /// Its parent's PID in the pod; 0 for PID 1.
    pub ppid: i32,
    /// What it does: `running`, `sleeping`, `stopped`, `zombie` …
    pub state: String,
    /// Program and arguments; the name alone in brackets for a zombie.
    pub command: Vec<String>,
}

/// The processes in a cgroup, in order of their PIDs in the pod. Those that end meanwhile are left out.
pub fn list(cgroup: &Cgroup) -> Result<Vec<Process>, PodError> {
    let hosts = cgroup.pids()?;
    let parsed: Vec<Status> = hosts.iter().filter_map(|pid| read(*pid)).collect();
    let in_pod = |host: i32| parsed.iter().find(|s| s.host == host).map_or(0, |s| s.pod);
    let mut list: Vec<Process> = parsed
        .iter()
        .map(|s| Process {
            pid: PodPid(s.pod),
            host_pid: HostPid(s.host),
            ppid: in_pod(s.parent),
            state: s.state.clone(),
            command: command(HostPid(s.host), &s.name),
        })
        .collect();
    list.sort_by_key(|p| p.pid);
    Ok(list)
}

struct Status {
    host: i32,
    pod: i32,
    parent: i32,
    state: String,
    name: String,
}

fn read(pid: HostPid) -> Option<Status> {
    let text = std::fs::read(pid.proc("status")).ok()?;
    parse(pid, &String::from_utf8_lossy(&text))
}

fn parse(pid: HostPid, text: &str) -> Option<Status> {
    let field = |label: &str| text.lines().find_map(|l| l.strip_prefix(label)).map(str::trim);
    let state = field("State:")?;
    let state = state.split_once('(').map_or(state, |(_, word)| word.trim_end_matches(')'));
    Some(Status {
        host: pid.0,
        pod: field("NSpid:")?.split_ascii_whitespace().nth(1)?.parse().ok()?,
        parent: field("PPid:")?.parse().ok()?,
        state: state.to_owned(),
        name: field("Name:")?.to_owned(),
    })
}

fn command(pid: HostPid, name: &str) -> Vec<String> {
    let bytes = std::fs::read(pid.proc("cmdline")).unwrap_or_default();
    let line = bytes.strip_suffix(b"\0").unwrap_or(&bytes);
    if line.is_empty() {
        return vec![format!("[{name}]")];
    }
    line.split(|b| *b == 0).map(|arg| String::from_utf8_lossy(arg).into_owned()).collect()
}

/// Reads a text as the status of a process.
pub(crate) fn try_status(text: &str) {
    drop(parse(HostPid(1), text));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_read() {
        let text = "Name:\tapache2\nState:\tS (sleeping)\nPid:\t900\nPPid:\t899\nNSpid:\t900\t7\t1\n";
        let status = parse(HostPid(900), text).unwrap();
        assert_eq!((status.pod, status.parent, status.state.as_str()), (7, 899, "sleeping"));
        assert!(parse(HostPid(900), "Name:\tx\n").is_none());
    }
}
