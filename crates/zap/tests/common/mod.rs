//! A host of its own for a test: a fresh network namespace and a fresh state directory, and nothing left afterwards.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// How long anything in a test may take. Machines that test are busy.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// One host. Commands of zap's run in its network namespace, which has no way out.
pub struct Host {
    dir: TempDir,
    holder: Child,
}

impl Host {
    /// A fresh one.
    pub fn new() -> Host {
        let dir = tempfile::Builder::new().prefix("zap-test-").tempdir().unwrap();
        // The holder keeps the network namespace; it ends when its stdin does, so also when the test is killed.
        let mut holder = Command::new("unshare");
        holder.args(["--net", "sh", "-c", "ip link set lo up 2>/dev/null; echo ready; exec cat >/dev/null"]);
        let mut holder = holder.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("unshare(1) is needed");
        let mut ready = [0; 6];
        std::io::Read::read_exact(holder.stdout.as_mut().unwrap(), &mut ready).unwrap();
        Host { dir, holder }
    }

    /// Its state directory.
    pub fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    /// A directory for the test's own files.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A command in the host's network namespace.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/proc/{}/ns/net", self.holder.id())).arg("--").arg(program);
        command.env("ZAP_STATE", self.state());
        command
    }

    /// Its network namespace, for a thread of the test's to enter.
    pub fn network(&self) -> std::fs::File {
        std::fs::File::open(format!("/proc/{}/ns/net", self.holder.id())).unwrap()
    }

    /// A command of zap's.
    pub fn zap<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Command {
        let mut command = self.command(env!("CARGO_BIN_EXE_zap"));
        command.args(args);
        command
    }

    /// One that may have no more than [`ENOUGH`] memory of its own, nor whatever it starts.
    pub fn frugal<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Command {
        let mut command = self.command("prlimit");
        command.arg(format!("--data={}", ENOUGH << 10)).arg(env!("CARGO_BIN_EXE_zap")).args(args);
        command
    }

    /// The words, for a shell, that lead to such a command of zap's on this host.
    pub fn leads_to(&self, command: &str) -> String {
        let command = self.zap([command]);
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        let words: Vec<String> = words.map(|word| format!("'{}'", word.to_str().unwrap())).collect();
        format!("ZAP_STATE='{}' {}", self.state().display(), words.join(" "))
    }

    /// Runs a command of zap's to its end, with nothing as stdin.
    pub fn run<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Done {
        let mut command = self.zap(args);
        finish(command.stdin(Stdio::null()))
    }

    /// Runs one that must succeed; what it printed, without the last line end.
    pub fn ok<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> String {
        let done = self.run(args);
        assert_eq!(done.code, 0, "{done:?}");
        done.stdout.trim_end().to_owned()
    }

    /// Starts a pod on loopback alone and gives its name.
    pub fn start<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> String {
        let mut all: Vec<std::ffi::OsString> = ["run", "-d", "--net", "private"].map(Into::into).into();
        all.extend(args.into_iter().map(|a| a.as_ref().to_owned()));
        self.ok(all)
    }

    /// The JSON document that a command prints.
    pub fn json<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> serde_json::Value {
        serde_json::from_str(&self.ok(args)).unwrap()
    }

    /// What `ls` says of a pod.
    pub fn row(&self, pod: &str) -> serde_json::Value {
        let rows = self.json(["ls", "--json"]);
        rows.as_array().unwrap().iter().find(|r| r["name"] == pod).cloned().unwrap_or_default()
    }

    /// The PID of a pod's monitor.
    pub fn monitor(&self, pod: &str) -> i32 {
        self.json(["inspect", "--json", pod])["monitor"]["pid"].as_i64().unwrap() as i32
    }

    /// Waits until a command in a pod succeeds.
    pub fn wait_for(&self, pod: &str, shell: &str) {
        eventually(shell, || self.run(["exec", pod, "sh", "-c", shell]).code == 0);
    }

    /// The host's cgroups of this host's pods.
    pub fn cgroups(&self) -> Vec<PathBuf> {
        let hash = blake3::hash(self.state().as_os_str().as_encoded_bytes()).to_hex();
        let name = format!("zap-{}", &hash[..12]);
        let mut found = Vec::new();
        find_groups(Path::new("/sys/fs/cgroup"), &name, &mut found);
        found
    }
}

/// Control groups whose names begin like that, in hierarchies of both versions.
fn find_groups(directory: &Path, name: &str, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        match entry.file_name().to_string_lossy().starts_with(name) {
            true => found.push(entry.path()),
            false => find_groups(&entry.path(), name, found),
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let list = self.zap(["ls", "--json"]).output();
        let rows: serde_json::Value =
            list.ok().and_then(|o| serde_json::from_slice(&o.stdout).ok()).unwrap_or_default();
        for row in rows.as_array().into_iter().flatten() {
            let _ = self.zap(["rm", "-f", row["name"].as_str().unwrap_or("")]).output();
        }
        // Whatever is still there after a test that failed.
        for group in self.cgroups() {
            for pod in std::fs::read_dir(&group).into_iter().flatten().flatten() {
                let _ = std::fs::write(pod.path().join("cgroup.kill"), "1");
            }
        }
        drop(self.holder.stdin.take());
        let _ = self.holder.wait();
    }
}

/// A command that has ended.
#[derive(Debug)]
pub struct Done {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

/// Runs a command to its end.
pub fn finish(command: &mut Command) -> Done {
    done(command.output().unwrap())
}

/// What became of it.
pub fn done(output: Output) -> Done {
    Done {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// Waits until something holds, or the test fails.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Kills a process of the test's, and waits until it is gone: a monitor that is about to die may still take a request.
pub fn kill(pid: i32) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
    let state = || std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // Whatever it had open is closed when the last of its threads is gone.
    let threads = || std::fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
    eventually("it is dead", || state().is_empty() || (state().contains(") Z ") && threads() <= 1));
}

/// Every point of that name, to die at, and those at which something can fail.
pub fn fault_points(prefix: &str) -> impl Iterator<Item = String> {
    let deaths = zap::fault::POINTS.iter().map(|point| (*point).to_owned());
    let failing = |point: &&str| zap::fault::ERRORS.map(|(suffix, _)| format!("{point}{suffix}"));
    let failures = zap::fault::FALLIBLE.iter().flat_map(failing);
    deaths.chain(failures).filter(move |point| point.starts_with(prefix))
}

/// A table that a test writes for the report: `target/verification/NAME.csv`.
struct Table(PathBuf);

impl Table {
    /// The last run's is removed: a run that fails leaves none.
    fn of(name: &str) -> Table {
        let directory = match std::env::var_os("ZAP_VERIFICATION") {
            Some(directory) => PathBuf::from(directory),
            None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/verification"),
        };
        std::fs::create_dir_all(&directory).unwrap();
        let table = Table(directory.join(format!("{name}.csv")));
        let _ = std::fs::remove_file(&table.0);
        table
    }

    fn write(self, head: &str, rows: &[(String, String)]) {
        let rows: String = rows.iter().map(|(one, other)| format!("{one},{other}\n")).collect();
        std::fs::write(self.0, format!("{head}\n{rows}")).unwrap();
    }
}

/// What became of faults, written down as a table for the report.
pub struct Outcomes {
    table: Table,
    rows: Vec<(String, String)>,
}

impl Outcomes {
    /// An empty table.
    pub fn of(name: &str) -> Outcomes {
        Outcomes { table: Table::of(&format!("faults-{name}")), rows: Vec::new() }
    }

    /// Notes what became of a fault at one of [`fault_points`].
    pub fn note_at(&mut self, point: &str, outcome: &str) {
        match point.split_once(':') {
            Some((point, "full")) => self.note(format!("ENOSPC at {point}"), outcome),
            Some((point, error)) => self.note(format!("{error} at {point}"), outcome),
            None => self.note(format!("monitor killed at {point}"), outcome),
        }
    }

    /// Notes what became of a fault.
    pub fn note(&mut self, fault: impl Into<String>, outcome: &str) {
        self.rows.push((fault.into(), outcome.to_owned()));
    }

    /// Writes it down, once everything has been seen to.
    pub fn write(self) {
        self.table.write("fault,outcome", &self.rows);
    }
}

/// How often what was tried, written down as a table for the report.
pub struct Counts(Table);

impl Counts {
    /// An empty table.
    pub fn of(name: &str) -> Counts {
        Counts(Table::of(name))
    }

    /// Writes it down, once everything has been tried.
    pub fn write(self, counts: &[(String, u64)]) {
        let rows: Vec<(String, String)> =
            counts.iter().map(|(what, count)| (what.clone(), count.to_string())).collect();
        self.0.write("what,count", &rows);
    }
}

/// Peak of this process's memory since it began, or since [`forget_peak`], in KiB.
pub fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Has the peak be what is there now (proc_pid_clear_refs(5)).
pub fn forget_peak() {
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
}

/// More memory than zap needs for a small image, whatever that says, in KiB.
pub const ENOUGH: u64 = 512 << 10;
