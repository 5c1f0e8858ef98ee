//! Facts of the machine that a measurement was made on.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::stats::quantile;

/// Packages whose version matters to what is measured.
const PACKAGES: &[&str] = &[
    "apache2-bin",
    "bubblewrap",
    "default-jre-headless",
    "fio",
    "gcc",
    "libapr1",
    "libc6",
    "make",
    "memcached",
    "nginx-core",
    "nodejs",
    "postgresql",
    "python3",
    "redis-server",
    "sqlite3",
    "tigervnc-standalone-server",
    "util-linux",
    "x11-apps",
];
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

/// A machine, as far as it matters to a measurement. Written beside the samples as `host.json`.
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
            packages: PACKAGES.iter().filter_map(|p| Some(((*p).into(), package_version(p)?))).collect(),
            commit: commit(),
            measured_at: std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(0, |d| d.as_secs()),
            load: read("/proc/loadavg"),
            noise: Some(listen()),
        }
    }

    /// Writes the facts beside the samples below `out`.
    pub fn write(&self, out: &Path) -> Result<()> {
        let dir = crate::samples::raw_dir(out);
        std::fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
        let path = dir.join("host.json");
        std::fs::write(&path, serde_json::to_string_pretty(self)? + "\n")
            .with_context(|| format!("writing {}", path.display()))
    }

    /// The facts that were written below `out`.
    pub fn read(out: &Path) -> Result<Self> {
        let path = crate::samples::raw_dir(out).join("host.json");
        let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{} is not the facts of a host", path.display()))
    }
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

fn package_version(package: &str) -> Option<String> {
    first_line(Command::new("dpkg-query").args(["-W", "-f", "${Version}\n", package]))
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
        facts.write(out.path()).unwrap();
        assert_eq!(HostFacts::read(out.path()).unwrap(), facts);
        assert!(facts.cpus > 0 && facts.memory_bytes > 0 && !facts.kernel.trim().is_empty());
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
