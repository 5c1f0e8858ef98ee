//! CRIU on a copy of a workload of its own.

use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::unistd::Pid;

use super::place::Place;
use super::stats::{DumpStats, RestoreStats};
use crate::lab::{Lab, Netns};
use crate::workload::Workload;

/// How many lines of its log are quoted when something fails.
const QUOTED: usize = 3;
/// What the network namespace is called in images: it is not in them, as the bridge of pods is in none.
const NETWORK: &str = "network";

/// The program.
#[derive(Clone, Debug)]
pub struct Criu {
    program: PathBuf,
    /// How it keeps packets away meanwhile.
    lock: &'static str,
}

impl Criu {
    /// The one at `program`, if it can be started.
    pub fn new(program: &Path) -> Result<Self> {
        let mut criu = Self { program: program.into(), lock: "iptables" };
        criu.version()?;
        // What Debian 12 has installed is nftables; not every CRIU was built to use it.
        if criu.run(&["check", "--feature", "network_lock_nftables"])?.status.success() {
            criu.lock = "nftables";
        }
        Ok(criu)
    }

    /// What it calls itself.
    pub fn version(&self) -> Result<String> {
        let output = self.run(&["--version"])?;
        Ok(String::from_utf8_lossy(&output.stdout).lines().collect::<Vec<_>>().join(", "))
    }

    /// What it says of this kernel, if that is not that all is well.
    pub fn objections(&self) -> Result<Option<String>> {
        let output = self.run(&["check"])?;
        Ok((!output.status.success()).then(|| words(&String::from_utf8_lossy(&output.stderr))))
    }

    fn run(&self, arguments: &[&str]) -> Result<Output> {
        let output = Command::new(&self.program).args(arguments).stdin(Stdio::null()).output();
        output.with_context(|| format!("starting {}", self.program.display()))
    }
}

/// A copy of a workload that CRIU writes down and starts again.
#[derive(Debug)]
pub struct CriuCopy {
    criu: Criu,
    place: Place,
    images: PathBuf,
}

/// What came of a dump.
#[derive(Clone, Copy, Debug)]
pub struct Dumped {
    /// What CRIU itself says.
    pub stats: DumpStats,
    /// The whole command.
    pub whole: Duration,
}

/// What came of a restore.
#[derive(Clone, Copy, Debug)]
pub struct Restored {
    /// What CRIU itself says.
    pub stats: RestoreStats,
    /// The whole command.
    pub whole: Duration,
}

impl CriuCopy {
    /// Starts `workload` for `criu`.
    pub fn start(lab: &Lab, workload: &dyn Workload, criu: &Criu) -> Result<Self> {
        let directory = lab.directory().join("criu");
        let place = Place::start(lab, workload, directory.clone())?;
        Ok(Self { criu: criu.clone(), place, images: directory.join("images") })
    }

    /// The network that its clients are in, too.
    pub fn netns(&self) -> &Netns {
        self.place.netns()
    }

    /// Where it serves there.
    pub fn served_at(&self) -> std::net::SocketAddr {
        self.place.served_at()
    }

    /// Where its images are.
    pub fn images(&self) -> &Path {
        &self.images
    }

    /// Writes it down.
    pub fn dump(&mut self, leave_running: bool) -> Result<Dumped> {
        let first = self.place.first().context("the peer's copy does not run")?;
        let _ = std::fs::remove_dir_all(&self.images);
        std::fs::create_dir_all(&self.images).with_context(|| format!("making {}", self.images.display()))?;
        let (pid, inode) = (first.to_string(), self.place.netns().inode()?);
        let network = format!("net[{inode}]:{NETWORK}");
        let mut words = vec!["dump", "--tree", &pid, "--external", &network, "--external", "mnt[]"];
        if leave_running {
            words.push("--leave-running");
        }
        words.extend(["--network-lock", self.criu.lock]);
        let begun = Instant::now();
        self.work(&words, "dump")?;
        let whole = begun.elapsed();
        if !leave_running {
            self.place.ended();
        }
        Ok(Dumped { stats: DumpStats::parse(&self.read("stats-dump")?)?, whole })
    }

    /// Starts what was written down.
    pub fn restore(&mut self) -> Result<Restored> {
        let file = self.place.netns().inheritable()?;
        let network = format!("fd[{}]:{NETWORK}", file.as_raw_fd());
        let pidfile = self.place.directory().join("pid");
        let _ = std::fs::remove_file(&pidfile);
        let root = self.place.directory().join("root");
        let (pid_path, root) = (pidfile.to_string_lossy(), root.to_string_lossy());
        let words = ["restore", "--restore-detached", "--pidfile", &pid_path, "--root", &root];
        let begun = Instant::now();
        self.work(&[&words[..], &["--inherit-fd", &network, "--external", "mnt[]"]].concat(), "restore")?;
        let whole = begun.elapsed();
        let pid = std::fs::read_to_string(&pidfile).with_context(|| format!("reading {}", pidfile.display()))?;
        self.place.started(Pid::from_raw(pid.trim().parse().context("the pidfile of a restore")?));
        Ok(Restored { stats: RestoreStats::parse(&self.read("stats-restore")?)?, whole })
    }

    /// Runs it with what a dump and a restore have in common; a failure is told in its own words.
    fn work(&self, words_first: &[&str], log: &str) -> Result<()> {
        let (images, log) = (self.images.to_string_lossy(), format!("{log}.log"));
        let common = ["--images-dir", &images, "--log-file", &log, "-v2", "--tcp-established", "--file-locks"];
        let more = ["--link-remap", "--ext-unix-sk", "--manage-cgroups=ignore"];
        // Not in the copy's network, which is locked between a dump and a restore: CRIU tries its own connections first.
        let output = self.criu.run(&[words_first, &common, &more].concat())?;
        if !output.status.success() {
            let logged = std::fs::read_to_string(self.images.join(&log)).unwrap_or_default();
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            bail!("criu {} ended with {}: {}", words_first[0], output.status, words(&(logged + &said)));
        }
        Ok(())
    }

    fn read(&self, file: &str) -> Result<Vec<u8>> {
        let path = self.images.join(file);
        std::fs::read(&path).with_context(|| format!("reading {}", path.display()))
    }
}

/// What a log says that went wrong: its first errors, or its end.
fn words(log: &str) -> String {
    let lines: Vec<&str> = log.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let errors: Vec<&str> = lines.iter().copied().filter(|line| line.contains("Error")).take(QUOTED).collect();
    let quoted = if errors.is_empty() { lines[lines.len().saturating_sub(QUOTED)..].to_vec() } else { errors };
    if quoted.is_empty() { "(it said nothing)".into() } else { quoted.join(" / ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_quoted_before_anything_else() {
        let log = "(00.1) Warn: a\n(00.2) Error (x.c:1): b\n(00.3) Error (x.c:2): c\nend\n";
        assert_eq!(words(log), "(00.2) Error (x.c:1): b / (00.3) Error (x.c:2): c");
        assert_eq!(words("one\ntwo\n"), "one / two");
        assert_eq!(words(""), "(it said nothing)");
    }

    #[test]
    fn one_that_is_not_there_is_an_error() {
        assert!(Criu::new(Path::new("/nowhere/criu")).is_err());
    }
}
