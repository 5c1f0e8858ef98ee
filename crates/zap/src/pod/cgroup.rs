//! A pod's cgroup (v2): what its processes are, freezing them, and ending them all; and its groups of version 1 with it.

use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::os::fd::{AsFd, IntoRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;
use serde::{Deserialize, Serialize};

use crate::error::CaptureError;
use crate::ids::{HostPid, PodPid};
use crate::pod::old_groups::OldGroups;
use crate::pod::{PodError, PodSpec, Store};

/// How long processes may take to stand still, or to die: longer only in uninterruptible sleep.
const PATIENCE: Duration = Duration::from_secs(10);
/// For how long a change may not be reported, and how often to look for it meanwhile.
const UNREPORTED: Duration = Duration::from_millis(20);
const LOOK_AGAIN: Duration = Duration::from_micros(100);
/// How often to ask whether it can still come, after that.
const ASK_AGAIN: Duration = Duration::from_millis(100);

/// The cgroup of a pod. Written down by its place in the hierarchy, which a process elsewhere may find mounted elsewhere.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Written", into = "Written")]
pub struct Cgroup {
    path: PathBuf,
    old: OldGroups,
}

/// How it is written down.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Written {
    Place(PathBuf),
    Places { place: PathBuf, old: OldGroups },
}

impl Cgroup {
    /// The group that a pod is to have.
    pub fn of(store: &Store, spec: &PodSpec) -> Result<Cgroup, PodError> {
        let host = group_of(store);
        let old = OldGroups::of(&format!("{host}-{}", spec.name), spec);
        Ok(Cgroup { path: hierarchy()?.join(host).join(&spec.name), old })
    }

    /// Makes it, empty.
    pub fn make(&mut self) -> Result<(), PodError> {
        let path = &self.path;
        fs::create_dir_all(path).map_err(failed("making", path))?;
        // The kernel notes at every switch of threads, for every group from the thread's own upwards, who waits for what;
        // nobody asks for it of a pod. Kernels from 6.1 can leave it out (`Documentation/admin-guide/cgroup-v2.rst`).
        for group in path.ancestors().take(2) {
            let _ = fs::write(group.join("cgroup.pressure"), "0");
        }
        // A process that makes a user namespace and a cgroup namespace in it may mount the hierarchy from the pod's group
        // down, and would make groups there in which nobody would look for it.
        let above = group_above(path).join("cgroup.max.depth");
        fs::write(&above, "1").map_err(failed("writing", &above))?;
        self.old.make().map_err(failed_at("making"))
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its directory, opened.
    pub fn open(&self) -> Result<OwnedFd, PodError> {
        File::open(&self.path).map(OwnedFd::from).map_err(failed("opening", &self.path))
    }

    /// The files through which a thread that writes `0` joins its groups of version 1.
    pub(super) fn doors(&self) -> Result<Vec<File>, PodError> {
        self.old.doors().map_err(failed_at("opening"))
    }

    /// Its group in the hierarchy of version 1 that has a controller.
    pub(super) fn old_group(&self, controller: &str) -> Option<PathBuf> {
        self.old.with(controller)
    }

    /// Lets those go on that somebody in the pod has frozen: PID 1 can be among them.
    pub(crate) fn thaw_inside(&self) {
        self.old.thaw();
    }

    /// Whether somebody in the pod has frozen all of it.
    pub(crate) fn is_frozen_inside(&self) -> bool {
        self.old.is_frozen()
    }

    /// Refuses a pod in which somebody has made control groups, or frozen some of it.
    pub(crate) fn check(&self) -> Result<(), CaptureError> {
        self.old.disturbed().map_or(Ok(()), |group| Err(refuse_groups(group)))
    }

    /// The same of a pod that is frozen, so that nobody in it was before.
    pub(crate) fn check_frozen(&self) -> Result<(), CaptureError> {
        self.old.divided().map_or(Ok(()), |group| Err(refuse_groups(group)))
    }

    /// Whether it is there.
    pub fn exists(&self) -> bool {
        self.path.is_dir()
    }

    /// Freezes every process, and returns when all stand still. If one does not, all go on and it is an error.
    pub fn freeze(&self) -> Result<(), PodError> {
        self.write("cgroup.freeze", "1")?;
        // Those whom somebody in the pod has frozen in a hierarchy of version 1 never count as frozen here.
        let frozen = self.wait_until("frozen 1", "freezing", || {
            self.old.disturbed().map_or(Ok(()), |group| Err(PodError::Groups { group }))
        });
        if frozen.is_err() {
            self.thaw()?;
        }
        frozen
    }

    /// Lets them go on.
    pub fn thaw(&self) -> Result<(), PodError> {
        self.write("cgroup.freeze", "0")
    }

    /// Whether it was told to freeze.
    pub fn is_frozen(&self) -> bool {
        fs::read(self.path.join("cgroup.freeze")).is_ok_and(|t| t.starts_with(b"1"))
    }

    /// Kills every process, PID 1 too, and returns when all are gone.
    pub fn kill(&self) -> Result<(), PodError> {
        self.begin_kill()?;
        self.await_end()
    }

    /// Kills every process, PID 1 too: none does anything more.
    pub fn begin_kill(&self) -> Result<(), PodError> {
        self.write("cgroup.kill", "1")?;
        self.old.thaw();
        Ok(())
    }

    /// Returns when all processes are gone.
    pub fn await_end(&self) -> Result<(), PodError> {
        match self.wait_until("populated 0", "ending", || Ok(())) {
            // Somebody else has seen that before, and has removed it.
            Err(PodError::Store { source, .. }) if is_gone(&source) => Ok(()),
            other => other,
        }
    }

    /// The processes in it (not threads), PID 1 too.
    pub fn pids(&self) -> Result<Vec<HostPid>, PodError> {
        let path = self.path.join("cgroup.procs");
        let text = fs::read_to_string(&path).map_err(failed("reading", &path))?;
        Ok(text.lines().filter_map(|l| l.parse().ok()).map(HostPid).collect())
    }

    /// Removes the empty group, and the one above it if it was the host's last pod. Again is no error.
    pub fn remove(&self) -> Result<(), PodError> {
        match fs::remove_dir(&self.path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed("removing", &self.path)(e)),
            _ => {}
        }
        if let Some(parent) = self.path.parent() {
            // Other pods of this host may still be in it.
            let _ = fs::remove_dir(parent);
        }
        self.old.remove().map_err(failed_at("removing"))
    }

    fn write(&self, file: &str, text: &str) -> Result<(), PodError> {
        let path = self.path.join(file);
        fs::write(&path, text).map_err(failed("writing", &path))
    }

    /// Waits until `cgroup.events` has this line. The kernel reports changes of that file as POLLPRI, but not more often than
    /// every 10 ms (`CGROUP_FILE_NOTIFY_MIN_INTV`): whoever freezes, thaws and kills in a row would wait for that. If it takes
    /// long, `hopeful` is asked now and then.
    fn wait_until(
        &self,
        line: &str,
        step: &'static str,
        hopeful: impl Fn() -> Result<(), PodError>,
    ) -> Result<(), PodError> {
        let path = self.path.join("cgroup.events");
        let mut events = File::open(&path).map_err(failed("opening", &path))?;
        let begun = Instant::now();
        let deadline = begun + PATIENCE;
        loop {
            let mut text = String::new();
            events.rewind().and_then(|()| events.read_to_string(&mut text)).map_err(failed("reading", &path))?;
            if text.lines().any(|l| l == line) {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(failed(step, &self.path)(io::ErrorKind::TimedOut.into()));
            }
            let pause = if begun.elapsed() < UNREPORTED {
                LOOK_AGAIN
            } else {
                hopeful()?;
                left.min(ASK_AGAIN)
            };
            match ppoll(
                &mut [PollFd::new(events.as_fd(), PollFlags::POLLPRI)],
                Some(TimeSpec::from_duration(pause)),
                None,
            ) {
                Err(nix::Error::EINTR) | Ok(_) => {}
                Err(e) => return Err(failed(step, &self.path)(e.into())),
            }
        }
    }
}

/// Refuses a pod for what somebody in it has done to that control group.
pub(crate) fn refuse_groups(group: String) -> CaptureError {
    CaptureError::Refused {
        process: PodPid(1),
        command: "init".into(),
        object: format!("the control group {group}"),
        why: "has groups or was frozen by somebody in the pod, which cannot be checkpointed yet; undo that first"
            .into(),
    }
}

/// Whether that says that a group is not there any more: a file that was open in it has no device.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

fn failed(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> PodError + use<> {
    let path = path.to_owned();
    move |source| PodError::Store { step, path, source }
}

/// The same of what failed at a path that comes with the error.
fn failed_at(step: &'static str) -> impl FnOnce((PathBuf, io::Error)) -> PodError {
    move |(path, source)| PodError::Store { step, path, source }
}

fn group_above(path: &Path) -> &Path {
    path.parent().unwrap_or(path)
}

/// The directory that holds the groups of one host's pods.
fn group_of(store: &Store) -> String {
    let hash = blake3::hash(store.state().as_os_str().as_encoded_bytes());
    format!("zap-{}", &hash.to_hex()[..12])
}

static FOUND: OnceLock<PathBuf> = OnceLock::new();

/// Where tables of mounts are, and the root from which what they name is found.
pub(super) const TABLES: [(&str, &str); 2] = [("/proc/self/mountinfo", "/"), ("/proc/1/mountinfo", "/proc/1/root")];
/// Where a mount of our own is.
const OWN: &str = "/proc/self/fd";

/// Where this process finds the cgroup v2 hierarchy. Where none is mounted (`ip netns exec` hides the host's), that of the
/// host's first process; where that has none, a mount of our own, attached nowhere, that lasts as long as the process. To make
/// one takes the kernel milliseconds.
pub(crate) fn hierarchy() -> Result<&'static Path, PodError> {
    if let Some(found) = FOUND.get() {
        return Ok(found);
    }
    let found = match TABLES.into_iter().find_map(|(table, root)| mounted(table, root)) {
        Some(found) => found,
        None => {
            let mount = crate::sys::mount::new_mount(c"cgroup2", &[], 0)
                .map_err(|_| PodError::Lacks("a cgroup v2 hierarchy".to_owned()))?;
            Path::new(OWN).join(mount.into_raw_fd().to_string())
        }
    };
    Ok(FOUND.get_or_init(|| found))
}

/// The hierarchy that a table of mounts names, if it can be reached from here.
fn mounted(table: &str, root: &str) -> Option<PathBuf> {
    let table = fs::read(table).ok()?;
    let target = crate::pod::mounts::parse(&table).into_iter().find(|m| m.kind == "cgroup2")?.target;
    let path = from(root, &target);
    path.join("cgroup.procs").exists().then_some(path)
}

/// What one of the [tables](TABLES) names, as it is found from here.
pub(super) fn from(root: &str, point: &Path) -> PathBuf {
    Path::new(root).join(point.strip_prefix("/").unwrap_or(point))
}

/// Whether what this process knows of the hierarchy holds in a copy of it that has none of its descriptors.
pub(crate) fn is_unknown_or_mounted() -> bool {
    FOUND.get().is_none_or(|path| !path.starts_with(OWN))
}

impl TryFrom<Written> for Cgroup {
    type Error = PodError;

    fn try_from(written: Written) -> Result<Cgroup, PodError> {
        let (place, old) = match written {
            Written::Place(place) => (place, OldGroups::default()),
            Written::Places { place, old } => (place, old),
        };
        Ok(Cgroup { path: hierarchy()?.join(place), old })
    }
}

impl From<Cgroup> for Written {
    fn from(group: Cgroup) -> Written {
        let place = hierarchy().ok().and_then(|above| group.path.strip_prefix(above).ok());
        Written::Places { place: place.unwrap_or(&group.path).to_owned(), old: group.old }
    }
}
