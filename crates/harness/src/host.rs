//! Facts of the machine that a measurement was made on.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::stats::quantile;

/// Where the names of the packages under test are.
const SETUP: &str = include_str!("../../../setup.sh");
/// What these bring along, and others that may be there.
const MORE_PACKAGES: [&str; 6] = ["apache2-bin", "libapr1", "libc6", "linux-base", "util-linux", "criu"];
/// How long the machine is listened to.
const LISTENED: Duration = Duration::from_millis(300);

/// How uneven a machine is: what is measured there cannot be told apart more finely.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Noise {
    /// How much longer the same work takes in one of twenty cases than in the middle one, as a part.
    pub spread: f64,
    /// The part of the time of its processors that a virtual machine did not get.
    pub stolen: f64,
}

/// A machine and what was measured on it, as far as it matters. Written beside the samples, in `host.json`, by a name that each
/// sample has.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HostFacts {
    /// Kernel release and version.
    pub kernel: String,
    /// Name of the distribution.
    pub distribution: String,
    /// Model name of the CPU.
    pub cpu: String,
    /// CPUs that are online.
    pub cpus: usize,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Whether the machine is virtual.
    pub virtual_machine: bool,
    /// Frequency governor of the first CPU, where it has one.
    pub governor: Option<String>,
    /// State of transparent huge pages.
    pub huge_pages: Option<String>,
    /// What the kernel does about each weakness of the CPU: the dearer ones slow every system call.
    pub mitigations: BTreeMap<String, String>,
    /// Versions of the packages that take part.
    pub packages: BTreeMap<String, String>,
    /// Commit of the source, with `-dirty` where files differ from it.
    pub commit: Option<String>,
    /// Seconds since 1970 when the measurement began.
    pub measured_at: u64,
    /// Load averages when the measurement began.
    pub load: String,
    /// A reading of the machine's noise.
    #[serde(default)]
    pub noise: Option<Noise>,
}

impl HostFacts {
    /// The facts of this machine, now. What cannot be found out is left empty.
    pub fn gather() -> Self {
        let cpuinfo = read("/proc/cpuinfo");
        Self {
            kernel: format!("{} {}", read("/proc/sys/kernel/osrelease"), read("/proc/sys/kernel/version")),
            distribution: os_release(&read("/etc/os-release")),
            cpu: cpuinfo_field(&cpuinfo, "model name"),
            cpus: std::thread::available_parallelism().map_or(0, usize::from),
            memory_bytes: memory_bytes(&read("/proc/meminfo")),
            virtual_machine: cpuinfo_field(&cpuinfo, "flags").split(' ').any(|flag| flag == "hypervisor"),
            governor: present("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
            huge_pages: present("/sys/kernel/mm/transparent_hugepage/enabled"),
            mitigations: mitigations(Path::new("/sys/devices/system/cpu/vulnerabilities")),
            packages: versions(&packages()),
            commit: commit(),
            measured_at: std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(0, |d| d.as_secs()),
            load: read("/proc/loadavg"),
            noise: Some(listen()),
        }
    }

    /// Writes the facts beside those that are below `out`, and gives their name.
    pub fn write(&self, out: &Path) -> Result<String> {
        let name = format!("{}@{}", self.commit.as_deref().unwrap_or("unknown"), self.measured_at);
        let mut all = if path_of(out).exists() { Self::read_all(out)? } else { BTreeMap::new() };
        all.insert(name.clone(), self.clone());
        let (dir, path) = (crate::samples::raw_dir(out), path_of(out));
        std::fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
        std::fs::write(&path, serde_json::to_string_pretty(&all)? + "\n")
            .with_context(|| format!("writing {}", path.display()))?;
        Ok(name)
    }

    /// All facts that were written below `out`, by their names. Those of before there were names have an empty one.
    pub fn read_all(out: &Path) -> Result<BTreeMap<String, Self>> {
        let path = path_of(out);
        let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        match serde_json::from_str::<Self>(&text) {
            Ok(of_all) => Ok(BTreeMap::from([(String::new(), of_all)])),
            Err(_) => {
                serde_json::from_str(&text).with_context(|| format!("{} is not the facts of hosts", path.display()))
            }
        }
    }

    /// Each fact in words, and what it is.
    pub fn described(&self) -> Vec<(String, String)> {
        let gib = self.memory_bytes as f64 / f64::from(1 << 30);
        let packages = self.packages.iter().map(|(name, version)| format!("{name} {version}"));
        let mut facts: Vec<(&str, String)> = vec![
            ("kernel", self.kernel.clone()),
            ("distribution", self.distribution.clone()),
            ("CPU", format!("{} × {}", self.cpus, self.cpu)),
            ("memory", format!("{gib:.1} GiB")),
            ("virtual machine", if self.virtual_machine { "yes" } else { "no" }.into()),
            ("commit", self.commit.clone().unwrap_or_else(|| "unknown".into())),
            ("seconds since 1970", self.measured_at.to_string()),
            ("load at the start", self.load.clone()),
        ];
        facts.extend(self.governor.clone().map(|governor| ("frequency governor", governor)));
        facts.extend(self.huge_pages.clone().map(|state| ("transparent huge pages", state)));
        facts.extend(self.noise.map(|noise| {
            let (spread, stolen) = (noise.spread * 100.0, noise.stolen * 100.0);
            let words = format!(
                "the same work of a millisecond: 95th percentile {spread:.0} % above the median; {stolen:.1} % of the time stolen"
            );
            ("noise", words)
        }));
        facts.extend(self.mitigations.iter().map(|(name, state)| (&**name, state.clone())));
        facts.push(("packages", packages.collect::<Vec<_>>().join(", ")));
        facts.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }
}

fn path_of(out: &Path) -> std::path::PathBuf {
    crate::samples::raw_dir(out).join("host.json")
}

/// Does the same work again and again, and sees how long it takes.
fn listen() -> Noise {
    let (begun, stolen_before) = (Instant::now(), stolen(&read("/proc/stat")));
    let mut times = Vec::new();
    while begun.elapsed() < LISTENED {
        let start = Instant::now();
        std::hint::black_box((0..100_000_u64).fold(1, |hash: u64, i| hash.rotate_left(5) ^ std::hint::black_box(i)));
        times.push(start.elapsed().as_secs_f64());
    }
    let (middle, high) = (quantile(&times, 0.5), quantile(&times, 0.95));
    let spread = middle.zip(high).map_or(0.0, |(middle, high)| high / middle - 1.0);
    let (total_after, stolen_after) = stolen(&read("/proc/stat"));
    let (total, stolen) = (total_after - stolen_before.0, stolen_after - stolen_before.1);
    Noise { spread, stolen: if total > 0.0 { (stolen / total).clamp(0.0, 1.0) } else { 0.0 } }
}

/// All time of the processors, and that of it which went to other virtual machines (proc_stat(5)).
fn stolen(stat: &str) -> (f64, f64) {
    let numbers: Vec<f64> =
        stat.lines().next().unwrap_or_default().split_whitespace().skip(1).filter_map(|n| n.parse().ok()).collect();
    (numbers.iter().take(8).sum(), numbers.get(7).copied().unwrap_or(0.0))
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default().trim().to_string()
}

fn present(path: &str) -> Option<String> {
    Some(read(path)).filter(|text| !text.is_empty())
}

fn os_release(text: &str) -> String {
    let name = text.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
    name.unwrap_or_default().trim_matches('"').to_string()
}

fn cpuinfo_field(text: &str, name: &str) -> String {
    let fields = text.lines().filter_map(|line| line.split_once(':'));
    fields.map(|(key, value)| (key.trim(), value.trim())).find(|(key, _)| *key == name).map_or("", |f| f.1).into()
}

fn memory_bytes(meminfo: &str) -> u64 {
    let total = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    total.and_then(|rest| rest.trim().strip_suffix(" kB")?.parse::<u64>().ok()).unwrap_or(0) * 1024
}

fn mitigations(dir: &Path) -> BTreeMap<String, String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let fact = |entry: std::fs::DirEntry| {
        let state = std::fs::read_to_string(entry.path()).ok()?.trim().to_string();
        (state != "Not affected").then(|| (entry.file_name().to_string_lossy().into_owned(), state))
    };
    entries.filter_map(fact).collect()
}

/// What `setup.sh` installs, and more.
fn packages() -> Vec<&'static str> {
    let list = SETUP.split_once("\nPACKAGES=(").and_then(|(_, rest)| rest.split_once(')')).map_or("", |(list, _)| list);
    let words = list.lines().filter(|line| !line.trim_start().starts_with('#')).flat_map(str::split_whitespace);
    words.chain(MORE_PACKAGES).collect()
}

/// The versions of those that are installed.
fn versions(packages: &[&str]) -> BTreeMap<String, String> {
    // It says what it knows of the others even if one has never been heard of.
    let output = Command::new("dpkg-query").args(["-W", "-f", "${Package} ${Version}\n"]).args(packages).output();
    let text = output.map_or(String::new(), |output| String::from_utf8_lossy(&output.stdout).into_owned());
    let installed = text.lines().filter_map(|line| line.split_once(' ')).filter(|(_, version)| !version.is_empty());
    installed.map(|(name, version)| (name.to_owned(), version.to_owned())).collect()
}

fn commit() -> Option<String> {
    let source = env!("CARGO_MANIFEST_DIR");
    first_line(Command::new("git").args(["-C", source, "describe", "--always", "--dirty", "--abbrev=12"]))
}

fn first_line(command: &mut Command) -> Option<String> {
    let output = command.output().ok().filter(|output| output.status.success())?;
    let line = String::from_utf8_lossy(&output.stdout).lines().next()?.to_string();
    (!line.is_empty()).then_some(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_survive_the_file() {
        let out = tempfile::tempdir().unwrap();
        let facts = HostFacts::gather();
        let name = facts.write(out.path()).unwrap();
        let later = HostFacts { measured_at: facts.measured_at + 1, ..facts.clone() };
        let later_name = later.write(out.path()).unwrap();
        let all = HostFacts::read_all(out.path()).unwrap();
        assert_eq!((all.len(), &all[&name], &all[&later_name]), (2, &facts, &later));
        assert!(facts.cpus > 0 && facts.memory_bytes > 0 && !facts.kernel.trim().is_empty());
        assert!(facts.packages.contains_key("libc6"), "{:?}", facts.packages);
        // As before they had names.
        std::fs::write(path_of(out.path()), serde_json::to_string(&facts).unwrap()).unwrap();
        assert_eq!(HostFacts::read_all(out.path()).unwrap()[""], facts);
    }

    #[test]
    fn packages_are_those_of_the_set_up() {
        let packages = packages();
        assert!(["apache2", "openjdk-17-jdk-headless", "xz-utils"].iter().all(|name| packages.contains(name)));
        assert!(!packages.iter().any(|word| word.starts_with('#') || *word == "workloads/overhead"), "{packages:?}");
    }

    #[test]
    fn texts_of_the_kernel() {
        assert_eq!(memory_bytes("MemTotal:       16 kB\nMemFree: 1 kB\n"), 16384);
        assert_eq!(memory_bytes("nothing"), 0);
        assert_eq!(stolen("cpu  1 2 3 4 5 6 7 8 9 10\ncpu0 1"), (36.0, 8.0));
        assert_eq!(cpuinfo_field("processor\t: 0\nmodel name\t: Some CPU\n", "model name"), "Some CPU");
        assert_eq!(os_release("NAME=x\nPRETTY_NAME=\"Debian 12\"\n"), "Debian 12");
    }
}
