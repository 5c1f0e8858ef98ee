//! What the `zap` command prints, as its command line promises it.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use super::served_at;

/// A pod in `zap ls --json`.
#[derive(Clone, Debug, Deserialize)]
pub struct Listed {
    /// Its name.
    pub name: String,
    /// `running`, `suspended` or `stopped`.
    pub state: String,
    /// Its IPv4 address, without a prefix length.
    #[serde(default)]
    pub address: Option<String>,
    /// Its PID 1 as the host sees it.
    #[serde(default)]
    pub init_pid: Option<i32>,
}

/// A process in `zap ps --json`.
#[derive(Clone, Debug, Deserialize)]
pub struct Process {
    /// As the pod sees it.
    pub pid: i32,
    /// As the host sees it.
    pub host_pid: i32,
    /// Program and arguments.
    #[serde(default)]
    pub command: Vec<String>,
}

/// A stage of a checkpoint or restart.
#[derive(Clone, Debug, Deserialize)]
pub struct Phase {
    /// Its name.
    pub name: String,
    /// Microseconds that it took.
    pub us: u64,
}

/// `zap checkpoint --stats`.
#[derive(Clone, Debug, Deserialize)]
pub struct CheckpointStats {
    /// Microseconds from the moment that the first process is held until the last one runs again.
    pub downtime_us: u64,
    /// Microseconds of the whole checkpoint.
    pub total_us: u64,
    /// Its stages.
    pub phases: Vec<Phase>,
    /// Bytes of the image.
    pub bytes: u64,
    /// Pages of memory in it.
    pub pages: u64,
    /// Processes in it.
    pub processes: u64,
    /// Threads in it.
    pub threads: u64,
}

/// `zap restart --stats`.
#[derive(Clone, Debug, Deserialize)]
pub struct RestartStats {
    /// Microseconds of the whole restart.
    pub total_us: u64,
    /// Its stages.
    pub phases: Vec<Phase>,
    /// The name that the pod got.
    pub name: String,
    /// Its outer address.
    #[serde(default)]
    pub address: Option<String>,
}

impl RestartStats {
    /// Where the pod's workload serves.
    pub fn served_at(&self) -> Result<SocketAddr> {
        let address = self.address.as_deref().with_context(|| format!("pod {} has no address", self.name))?;
        Ok(served_at(address.parse().context("the address in the stats of a restart")?))
    }
}

/// `zap migrate --stats`.
#[derive(Clone, Debug, Deserialize)]
pub struct MigrateStats {
    /// Microseconds for which the pod ran nowhere.
    pub downtime_us: u64,
    /// Microseconds from the request until nothing was left at the source.
    pub total_us: u64,
    /// Bytes sent, or written to a store.
    pub bytes: u64,
    /// Times that memory was looked through.
    pub rounds: u64,
    /// Bytes of memory that the pod depended on the source for once it ran.
    pub residual_bytes: u64,
    /// Microseconds for which it did.
    pub residual_us: u64,
    /// The source's stages …
    pub phases: Vec<Phase>,
    /// … and the destination's, within the last of them.
    pub there: Vec<Phase>,
}

/// The JSON object on the last line of what `--stats` printed.
pub(super) fn stats<T: for<'de> Deserialize<'de>>(stdout: &str) -> Result<T> {
    let line = stdout.lines().last().context("--stats printed nothing")?;
    serde_json::from_str(line).with_context(|| format!("--stats printed {line:?}"))
}

/// The `zap` to measure: `ZAP_BIN`, or the one built beside this program.
pub fn zap_binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("ZAP_BIN") {
        return Ok(path.into());
    }
    built_beside("zap").context("set ZAP_BIN, perhaps")
}

/// The program of that name that was built with this one.
pub fn built_beside(name: &str) -> Result<PathBuf> {
    let this = std::env::current_exe().context("finding this program's own path")?;
    // A test is one directory deeper than a command.
    let beside = this.ancestors().skip(1).take(2).map(|directory| directory.join(name));
    match beside.into_iter().find(|path| path.is_file()) {
        Some(path) => Ok(path),
        None => bail!("there is no {name} beside {}: build the workspace first", this.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stats_are_the_last_line() {
        let printed =
            "web\n{\"total_us\":5,\"phases\":[{\"name\":\"tree\",\"us\":3}],\"name\":\"web\",\"address\":null}\n";
        let stats: RestartStats = stats(printed).unwrap();
        assert_eq!((stats.total_us, stats.phases[0].us, stats.address), (5, 3, None));
        assert!(super::stats::<RestartStats>("").is_err());
        assert!(super::stats::<RestartStats>("web\n").is_err());
    }
}
