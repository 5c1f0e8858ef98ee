//! Where pods are recorded: one directory a pod, below one directory a host.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use crate::ids::{HostPid, PodPid};
use crate::pod::limits::LimitGroups;
use crate::pod::network::Network;
use crate::pod::{AddressPlan, Cgroup, PodError, PodSpec};
use crate::processor::Beginnings;
use crate::sys::pidfd::PidFd;

/// One *host*: the registry of its pods and the storage of their files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Store {
    state: PathBuf,
    storage: PathBuf,
}

/// A process that cannot be mistaken for a later one of the same PID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its PID on the host.
    pub pid: HostPid,
    /// When it started, in clock ticks since boot (field 22 of `/proc/PID/stat`).
    pub start: u64,
}

/// What a pod is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PodState {
    /// Its processes run.
    Running,
    /// They stand still until `resume`.
    Suspended,
    /// They have ended.
    Stopped,
}

/// What the registry knows of a pod.
#[derive(Debug, Serialize, Deserialize)]
pub struct Record {
    /// As it was asked for.
    pub spec: PodSpec,
    /// What it does.
    pub state: PodState,
    /// Its PID 1, while it has one.
    pub init: Option<ProcessId>,
    /// Its monitor, while it has one.
    pub monitor: Option<ProcessId>,
    /// Its first command.
    pub main: Option<PodPid>,
    /// With what its first command ended.
    pub exit_code: Option<i32>,
    /// When it was made (RFC 3339).
    pub created: String,
    /// Its cgroup.
    pub cgroup: Cgroup,
    /// Its connection: a [`crate::pod::network::Network`], written down.
    pub network: Option<serde_json::Value>,
    /// Other groups that limit it.
    pub limits: LimitGroups,
    /// Whether it was given to another host that may be running it: it stays held until a person decides.
    #[serde(default)]
    pub in_doubt: bool,
    /// What is kept of it for the host that it has moved to.
    #[serde(default)]
    pub residual: Option<Residual>,
    /// On which processors its programs began, but for those that began here.
    #[serde(default)]
    pub beginnings: Beginnings,
}

/// What a host keeps of a pod that runs elsewhere.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Residual {
    /// Where it runs.
    pub to: String,
    /// Bytes of its memory that are fetched from here.
    pub memory: u64,
}

/// The right to be a pod's monitor: held while it lives, and let go by the kernel when it dies.
#[derive(Debug)]
pub struct Claim {
    _lock: Flock<File>,
}

impl Store {
    /// The host of a state directory; the default one (`/run/zap` with `/var/lib/zap`) if none is given.
    pub fn new(state: Option<&Path>) -> Store {
        match state.map(|dir| std::path::absolute(dir).unwrap_or_else(|_| dir.to_owned())) {
            Some(dir) => Store { storage: dir.join("storage"), state: dir },
            None => Store { state: "/run/zap".into(), storage: "/var/lib/zap".into() },
        }
    }

    /// The directory of the registry.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// The directory of the storage.
    pub fn storage(&self) -> &Path {
        &self.storage
    }

    /// The registry's directory of a pod.
    pub fn pod_dir(&self, name: &str) -> PathBuf {
        self.state.join("pods").join(name)
    }

    /// The storage of a pod: its upper layers.
    pub fn storage_dir(&self, name: &str) -> PathBuf {
        self.storage.join("pods").join(name)
    }

    /// Which mounts a pod was born with, where its processes may make others.
    pub fn mounts_file(&self, name: &str) -> PathBuf {
        self.pod_dir(name).join("mounts")
    }

    /// The console's log of a pod.
    pub fn log_file(&self, name: &str) -> PathBuf {
        self.pod_dir(name).join("console.log")
    }

    /// The names of all pods, sorted. What monitors that died before they had recorded anything left is removed.
    pub fn names(&self) -> Result<Vec<String>, PodError> {
        let path = self.state.join("pods");
        let entries = match fs::read_dir(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(|source| PodError::Store { step: "listing", path, source })?,
        };
        let mut names: Vec<String> = entries.flatten().filter_map(|e| e.file_name().into_string().ok()).collect();
        names.sort();
        let (names, unknown): (Vec<_>, Vec<_>) = names.into_iter().partition(|name| self.is_recorded(name));
        if !unknown.is_empty() {
            let _registry = self.lock_registry()?;
            for name in unknown.iter().filter(|name| self.is_abandoned(name)) {
                self.forget_unlocked(name)?;
            }
        }
        Ok(names)
    }

    fn is_recorded(&self, name: &str) -> bool {
        self.pod_dir(name).join(RECORD).exists()
    }

    /// Whether nobody is about to record something under this name; while the registry is locked nobody begins to.
    fn is_abandoned(&self, name: &str) -> bool {
        !self.is_recorded(name) && matches!(self.claim(name), Ok(Some(_)))
    }

    /// Takes a name: makes the pod's directories and becomes its monitor. What a monitor that died before it had
    /// recorded anything left under that name is removed first.
    pub fn claim_new(&self, name: &str) -> Result<Claim, PodError> {
        let _registry = self.lock_registry()?;
        let dir = self.pod_dir(name);
        match make_dir(&dir) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                if !self.is_abandoned(name) {
                    return Err(PodError::Taken(name.to_owned()));
                }
                self.forget_unlocked(name)?;
                make_dir(&dir).map_err(|source| PodError::Store { step: "making", path: dir, source })?;
            }
            other => other.map_err(|source| PodError::Store { step: "making", path: dir, source })?,
        }
        make_private_directory(&self.storage_dir(name))?;
        self.claim(name)?.ok_or_else(|| PodError::Taken(name.to_owned()))
    }

    /// Becomes the monitor of a pod that is there; `None` if it has one that lives.
    pub fn claim(&self, name: &str) -> Result<Option<Claim>, PodError> {
        let path = self.pod_dir(name).join("lock");
        let file = open_lock(&path).map_err(|e| self.missing(name, path, e))?;
        Ok(Flock::lock(file, FlockArg::LockExclusiveNonblock).ok().map(|lock| Claim { _lock: lock }))
    }

    /// Held by whoever starts a monitor for a pod that lost its own, so that two commands do not start two.
    pub fn lock_start(&self, name: &str) -> Result<Claim, PodError> {
        let path = self.pod_dir(name).join("start-lock");
        lock_waiting(&path).map_err(|e| self.missing(name, path, e))
    }

    fn lock_registry(&self) -> Result<Claim, PodError> {
        make_private_directory(&self.state.join("pods"))?;
        let path = self.state.join("lock");
        lock_waiting(&path).map_err(|source| PodError::Store { step: "locking", path, source })
    }

    fn missing(&self, name: &str, path: PathBuf, source: io::Error) -> PodError {
        match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => PodError::Unknown(name.to_owned()),
            _ => PodError::Store { step: "opening", path, source },
        }
    }

    /// Connects to the monitor of a pod.
    pub fn connect(&self, name: &str) -> io::Result<UnixStream> {
        let dir = open_dir(&self.pod_dir(name))?;
        UnixStream::connect(short_path(&dir))
    }

    /// Makes the socket on which a pod's monitor listens.
    pub fn listen(&self, name: &str) -> Result<UnixListener, PodError> {
        let path = self.pod_dir(name).join(SOCKET);
        let bind = || {
            let dir = open_dir(&self.pod_dir(name))?;
            match fs::remove_file(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
            UnixListener::bind(short_path(&dir))
        };
        bind().map_err(|source| PodError::Store { step: "listening at", path: path.clone(), source })
    }

    /// What is known of a pod.
    pub fn load(&self, name: &str) -> Result<Record, PodError> {
        let path = self.pod_dir(name).join(RECORD);
        let text = fs::read(&path).map_err(|e| self.missing(name, path.clone(), e))?;
        serde_json::from_slice(&text).map_err(|e| PodError::Record { path, what: e.to_string() })
    }

    /// Writes down what is known of a pod: whole, or not at all.
    pub fn save(&self, record: &Record) -> Result<(), PodError> {
        let dir = self.pod_dir(&record.spec.name);
        let (path, fresh) = (dir.join(RECORD), dir.join("pod.json.new"));
        let text = serde_json::to_vec_pretty(record).expect("a record has no maps with odd keys");
        let write = || {
            let mut options = File::options();
            let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
            file.write_all(&text)?;
            if record.in_doubt {
                // The one thing that a crash of the host must not forget: the pod may be running elsewhere.
                file.sync_all()?;
                fs::rename(&fresh, &path)?;
                return File::open(&dir)?.sync_all();
            }
            fs::rename(&fresh, &path)
        };
        write().map_err(|source| PodError::Store { step: "writing", path: path.clone(), source })
    }

    /// Removes a pod's directories. The pod itself must be gone. Again is no error.
    pub fn forget(&self, name: &str) -> Result<(), PodError> {
        let _registry = self.lock_registry()?;
        self.forget_unlocked(name)
    }

    fn forget_unlocked(&self, name: &str) -> Result<(), PodError> {
        crate::pod::rootfs::remove_layers(&self.storage_dir(name))?;
        let dir = self.pod_dir(name);
        match fs::remove_dir_all(&dir) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(PodError::Store { step: "removing", path: dir, source: e })
            }
            _ => Ok(()),
        }
    }

    /// A name that no pod has: `wanted` if nobody has it, else a fresh one made of it.
    pub fn free_name(&self, wanted: &str) -> String {
        let free = |name: &String| !self.pod_dir(name).exists();
        std::iter::once(wanted.to_owned())
            .chain((2..).map(|n| format!("{wanted}-{n}")))
            .find(free)
            .expect("numbers do not end")
    }
}

impl Record {
    /// The addresses under which others reach the pod, if it is connected.
    pub fn outer_addresses(&self) -> Option<AddressPlan> {
        let network: Network = serde_json::from_value(self.network.clone()?).ok()?;
        Some(network.outer().clone())
    }
}

const RECORD: &str = "pod.json";

impl ProcessId {
    /// The process that has this PID now.
    pub fn of(pid: HostPid) -> Option<ProcessId> {
        Some(ProcessId { pid, start: start_time(pid)? })
    }

    /// A handle on it, if anything of it is left: a process whose first thread has ended may still have others.
    pub fn handle(&self) -> Option<PidFd> {
        // Opened first: what the number stands for then stays.
        let process = PidFd::open(self.pid).ok()?;
        (start_time(self.pid)? == self.start).then_some(process)
    }

    /// Whether it still lives (a zombie does not, nor does what is about to be one).
    pub fn lives(&self) -> bool {
        stat_fields(self.pid).is_some_and(|(flags, start)| start == self.start && flags & EXITING == 0)
    }
}

/// `PF_EXITING` of the kernel's flags: it has begun to end.
const EXITING: u64 = 0x4;

fn start_time(pid: HostPid) -> Option<u64> {
    stat_fields(pid).map(|(_, start)| start)
}

/// Flags and start time, from `/proc/PID/stat`; the command name in it may hold anything, so fields count from its end.
fn stat_fields(pid: HostPid) -> Option<(u64, u64)> {
    let stat = fs::read(pid.proc("stat")).ok()?;
    let after = stat.iter().rposition(|b| *b == b')')? + 2;
    let text = std::str::from_utf8(&stat[after..]).ok()?;
    let mut fields = text.split(' ');
    let flags = fields.nth(6)?.parse().ok()?;
    Some((flags, fields.nth(12)?.parse().ok()?))
}

const SOCKET: &str = "monitor.sock";

fn open_dir(path: &Path) -> io::Result<File> {
    File::options().read(true).custom_flags(libc::O_DIRECTORY | libc::O_PATH).open(path)
}

/// The path of the socket in that directory: a socket's path has room for 107 bytes, whatever the state directory.
fn short_path(dir: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/{SOCKET}", dir.as_raw_fd()))
}

fn make_dir(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().mode(0o700).create(path)
}

/// Makes a directory and those above it; what is made is for root alone.
pub fn make_private_directory(path: &Path) -> Result<(), PodError> {
    let mut builder = fs::DirBuilder::new();
    builder.mode(0o700).recursive(true).create(path).map_err(|source| PodError::Store {
        step: "making",
        path: path.to_owned(),
        source,
    })
}

fn open_lock(path: &Path) -> io::Result<File> {
    File::options().create(true).truncate(false).write(true).mode(0o600).open(path)
}

fn lock_waiting(path: &Path) -> io::Result<Claim> {
    let lock = Flock::lock(open_lock(path)?, FlockArg::LockExclusive).map_err(|(_, e)| io::Error::from(e))?;
    Ok(Claim { _lock: lock })
}
