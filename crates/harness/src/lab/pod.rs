//! A pod in a lab.

use std::collections::HashSet;
use std::fs::File;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use super::zap::{self, CheckpointStats, Listed, Process, RestartStats};
use super::{Lab, served_at, wait_for};
use crate::workload::Workload;

/// How long a workload may take to begin: some set up a database or compile something first.
const START: Duration = Duration::from_secs(300);

/// How to run a pod beyond what its workload says.
#[derive(Clone, Debug, Default)]
pub struct PodOptions {
    /// Further options of `zap run`.
    pub options: Vec<String>,
}

/// A pod in a lab. It stays until it is removed, or until the lab goes.
#[derive(Clone, Debug)]
pub struct Pod<'a> {
    lab: &'a Lab,
    name: String,
    address: Option<Ipv4Addr>,
}

impl Lab {
    /// Runs `workload` in a pod and waits until it is ready.
    pub fn start_pod(&self, workload: &dyn Workload, name: &str, options: &PodOptions) -> Result<Pod<'_>> {
        let recipe = workload.in_pod(self)?;
        let mut arguments: Vec<String> = ["run", "-d", "-n", name].map(Into::into).into();
        arguments.extend(recipe.binds.iter().flat_map(|bind| ["--bind".into(), bind.clone()]));
        arguments.extend(recipe.environment.iter().flat_map(|(key, value)| ["-e".into(), format!("{key}={value}")]));
        arguments.extend(recipe.options.iter().chain(&options.options).cloned());
        arguments.push("--".into());
        arguments.extend(recipe.command);
        self.zap(&arguments)?;
        let pod = self.pod(name)?;
        if pod.address.is_some() {
            self.attach_client()?;
            let ready = workload.ready(self, pod.served_at()?);
            ready.with_context(|| format!("pod {name}; its log: {}", pod.log()))?;
        }
        let works = wait_for("the workload to work", START, || workload.works(&pod));
        works.with_context(|| format!("pod {name}; its log: {}", pod.log()))?;
        Ok(pod)
    }

    /// The pod called `name`.
    pub fn pod(&self, name: &str) -> Result<Pod<'_>> {
        let listed = self.pods()?.into_iter().find(|pod| pod.name == name);
        let listed = listed.with_context(|| format!("zap ls does not list pod {name}"))?;
        let address = listed.address.as_deref().filter(|text| !text.is_empty()).map(str::parse).transpose();
        Ok(Pod { lab: self, name: name.into(), address: address.context("the address in zap ls")? })
    }

    /// Every pod of the lab.
    pub fn pods(&self) -> Result<Vec<Listed>> {
        let (text, _) = self.zap(&["ls", "--json"])?;
        serde_json::from_str(&text).with_context(|| format!("zap ls --json printed {text:?}"))
    }

    /// Restarts `image` with further `options`; also how long the whole command took.
    pub fn restart(&self, image: &Path, options: &[&str]) -> Result<(Pod<'_>, RestartStats, Duration)> {
        let (stats, took) = self.restart_only(image, options)?;
        Ok((self.pod(&stats.name)?, stats, took))
    }

    /// The same, without looking at the pod afterwards: nothing but the restart takes time.
    pub fn restart_only(&self, image: &Path, options: &[&str]) -> Result<(RestartStats, Duration)> {
        let image = image.to_string_lossy();
        let (text, took) = self.zap(&[&["restart", &image, "-d", "--stats"], options].concat())?;
        let stats: RestartStats = zap::stats(&text)?;
        if stats.address.is_some() {
            self.attach_client()?;
        }
        Ok((stats, took))
    }
}

impl Pod<'_> {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where its workload serves.
    pub fn served_at(&self) -> Result<SocketAddr> {
        Ok(served_at(self.address.with_context(|| format!("pod {} has no address", self.name))?))
    }

    /// What it has printed, to its error output last.
    pub fn log(&self) -> String {
        match self.lab.try_zap(&["logs", &self.name]) {
            Ok((output, _)) => {
                [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat()
            }
            Err(error) => format!("({error:#})"),
        }
    }

    /// What it has printed on stderr, and what zap has said there.
    pub fn log_of_errors(&self) -> String {
        let output = self.lab.try_zap(&["logs", &self.name]);
        output.map_or_else(|e| format!("({e:#})"), |(output, _)| String::from_utf8_lossy(&output.stderr).into_owned())
    }

    /// Runs a command in it, and gives what it printed.
    pub fn exec(&self, command: &[&str]) -> Result<String> {
        Ok(self.lab.zap(&[&["exec", &self.name], command].concat())?.0)
    }

    /// Checkpoints it to `image` with further `options`; also how long the whole command took.
    pub fn checkpoint(&self, image: &Path, options: &[&str]) -> Result<(CheckpointStats, Duration)> {
        let image = image.to_string_lossy();
        let (text, took) = self.lab.zap(&[&["checkpoint", &self.name, "-o", &image, "--stats"], options].concat())?;
        Ok((zap::stats(&text)?, took))
    }

    /// Its processes.
    pub fn processes(&self) -> Result<Vec<Process>> {
        let (text, _) = self.lab.zap(&["ps", &self.name, "--json"])?;
        serde_json::from_str(&text).with_context(|| format!("zap ps --json printed {text:?}"))
    }

    /// Removes it, running or not.
    pub fn remove(self) -> Result<()> {
        self.lab.zap(&["rm", "-f", &self.name]).map(|_| ())
    }
}

/// Memory of processes in bytes, what they share counted once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resident {
    /// All of it.
    pub total: u64,
    /// Of it, memory of no file.
    pub anonymous: u64,
    /// Of it, pages of files.
    pub file: u64,
}

/// The memory of `processes`: the page frames that they map, each counted once.
///
/// It is the sum of their proportional set sizes, with nobody but them to share with: `Pss` of `/proc/PID/smaps` also
/// divides by every other process of the host that happens to map the same libraries just then.
pub fn resident(processes: &[Process]) -> Result<Resident> {
    const PAGE: u64 = 4096;
    let mut frames = Frames::default();
    for process in processes {
        let directory = format!("/proc/{}", process.host_pid);
        match frames.add(&directory) {
            // It has ended since it was listed.
            Err(error) if error.kind() == ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH) => {}
            other => other.with_context(|| format!("looking at the memory of {directory}"))?,
        }
    }
    let Frames { anonymous, file } = frames;
    let (anonymous, file) = (anonymous.len() as u64 * PAGE, file.len() as u64 * PAGE);
    Ok(Resident { total: anonymous + file, anonymous, file })
}

/// Page frames that somebody maps.
#[derive(Default)]
struct Frames {
    anonymous: HashSet<u64>,
    file: HashSet<u64>,
}

impl Frames {
    /// Adds those of the process that `directory` of `/proc` shows.
    fn add(&mut self, directory: &str) -> std::io::Result<()> {
        const PAGE: u64 = 4096;
        const HIGHEST: u64 = 1 << 47;
        const PRESENT: u64 = 1 << 63;
        const OF_FILE: u64 = 1 << 61;
        const FRAME: u64 = (1 << 55) - 1;
        let maps = std::fs::read_to_string(format!("{directory}/maps"))?;
        let pagemap = File::open(format!("{directory}/pagemap"))?;
        let ends = maps.lines().filter_map(|line| line.split(' ').next()?.split_once('-'));
        let numbers = |(start, end)| Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?));
        for (start, end) in ends.filter_map(numbers).filter(|(_, end)| *end <= HIGHEST) {
            let mut entries = vec![0; ((end - start) / PAGE * 8) as usize];
            match pagemap.read_exact_at(&mut entries, start / PAGE * 8) {
                // Nothing is mapped any more: it has ended.
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(()),
                other => other?,
            }
            for entry in entries.chunks_exact(8).filter_map(|entry| Some(u64::from_ne_bytes(*entry.first_chunk()?))) {
                if entry & PRESENT != 0 {
                    let frames = if entry & OF_FILE != 0 { &mut self.file } else { &mut self.anonymous };
                    frames.insert(entry & FRAME);
                }
            }
        }
        Ok(())
    }
}
