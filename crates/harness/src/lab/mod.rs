//! A place to measure in: one *host* of zap's own, and clients beside it, with no way out.
//!
//! A lab is a tmpfs with a registry of pods in it and a network namespace that zap runs in. Clients and native servers
//! have network namespaces of their own, attached to the bridge that zap makes. When a lab is dropped, or the process is
//! interrupted (see [`clean_up_on_interrupt`]), everything is gone.

mod cleanup;
mod native;
mod netns;
mod pair;
mod pod;
mod zap;

use std::ffi::{OsStr, OsString};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, RwLock, Weak};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::mount::{MsFlags, mount};

pub use cleanup::{clean_up_on_interrupt, stop_if_interrupted};
pub use native::Native;
pub use netns::Netns;
pub use pair::{Pair, Way, options_of};
pub use pod::{Pod, PodOptions, Resident, resident};
pub use zap::{CheckpointStats, Listed, MigrateStats, Phase, Process, RestartStats, built_beside, zap_binary};

/// The port that workloads serve on.
pub const PORT: u16 = 80;

/// The client's interface in the host's namespace.
pub(crate) const CLIENT_PORT: &str = "lab0";
/// The client's address: far from those that zap leases first.
pub(crate) const CLIENT: Ipv4Addr = Ipv4Addr::new(198, 18, 255, 10);
/// The bridge that zap makes.
const BRIDGE: &str = "zap0";
/// How long anything that should happen at once may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// See the [module](self).
#[derive(Debug)]
pub struct Lab {
    inner: Arc<Inner>,
}

/// What [`cleanup`] needs, shared with the thread that waits for an interruption.
#[derive(Debug)]
struct Inner {
    directory: PathBuf,
    zap: PathBuf,
    host: Netns,
    client: Arc<Netns>,
    /// Those of native servers and of peers.
    others: Mutex<Vec<Weak<Netns>>>,
    /// True once the lab is being taken down: no command is started any more. Read-locked while one runs.
    closed: RwLock<bool>,
}

impl Lab {
    /// A lab with the `zap` that [`zap_binary`] finds.
    pub fn new() -> Result<Self> {
        Self::with_zap(zap_binary()?)
    }

    /// A lab with this `zap`.
    pub fn with_zap(zap: PathBuf) -> Result<Self> {
        ensure!(nix::unistd::geteuid().is_root(), "root is needed for pods and network namespaces");
        let client = Arc::new(Netns::new()?);
        let wire = |host: &Netns| {
            client.connect("eth0", host, CLIENT_PORT)?;
            client.ip(&[&format!("address add {CLIENT}/16 dev eth0")]).map(drop)
        };
        Self::wired(zap, client.clone(), wire)
    }

    /// A lab whose client may have others to speak to: `wire` gives the host the interface that leads to it.
    pub(crate) fn wired(zap: PathBuf, client: Arc<Netns>, wire: impl FnOnce(&Netns) -> Result<()>) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        cleanup::sweep(&zap);
        let host = Netns::new()?;
        wire(&host)?;
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let directory = PathBuf::from(format!("/run/zap-lab-{}-{number}", std::process::id()));
        std::fs::create_dir(&directory).with_context(|| format!("making {}", directory.display()))?;
        // An image on a tmpfs, so that it is zap that is measured and not a disk.
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        if let Err(error) = mount(Some("zap-lab"), &directory, Some("tmpfs"), flags, Some("mode=0755,size=75%")) {
            let _ = std::fs::remove_dir(&directory);
            return Err(error).with_context(|| format!("mounting a tmpfs on {}", directory.display()));
        }
        let inner =
            Arc::new(Inner { directory, zap, host, client, others: Mutex::default(), closed: RwLock::new(false) });
        cleanup::register(&inner);
        let lab = Self { inner };
        std::fs::create_dir(lab.state()).context("making the lab's state directory")?;
        std::fs::write(lab.state().join("config.toml"), format!("uplink = \"{CLIENT_PORT}\"\n"))
            .context("writing the lab's config.toml")?;
        Ok(lab)
    }

    /// The lab's directory, a tmpfs.
    pub fn directory(&self) -> &Path {
        &self.inner.directory
    }

    /// The state directory of its zap.
    pub fn state(&self) -> PathBuf {
        self.inner.directory.join("state")
    }

    /// The network namespace that zap runs in.
    pub fn host(&self) -> &Netns {
        &self.inner.host
    }

    /// The network namespace of a client, on the bridge.
    pub fn client(&self) -> &Netns {
        &self.inner.client
    }

    /// A network namespace more. Whatever runs in it ends with the lab.
    pub fn another_netns(&self) -> Result<Arc<Netns>> {
        let netns = Arc::new(Netns::new()?);
        self.inner.others.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(Arc::downgrade(&netns));
        Ok(netns)
    }

    /// Runs `zap` with `arguments` in the lab to its end, whatever that is; and how long it took, from before it was
    /// started until it had ended.
    pub fn try_zap<S: AsRef<std::ffi::OsStr>>(&self, arguments: &[S]) -> Result<(Output, Duration)> {
        self.inner.zap(arguments)
    }

    /// The same, and anything but exit code 0 is an error.
    pub fn zap<S: AsRef<std::ffi::OsStr>>(&self, arguments: &[S]) -> Result<(String, Duration)> {
        let (output, took) = self.try_zap(arguments)?;
        if !output.status.success() {
            let words: Vec<_> = arguments.iter().map(|a| a.as_ref().to_string_lossy()).collect();
            let said = String::from_utf8_lossy(&output.stderr);
            bail!("zap {} ended with {}: {}", words.join(" "), output.status, said.trim());
        }
        Ok((String::from_utf8_lossy(&output.stdout).into_owned(), took))
    }

    /// The words of a command, for a shell, that leads to `zap receive` in the lab from wherever it is run.
    pub fn way_in(&self) -> String {
        let state = self.state();
        format!("{} {} --state {} receive", self.host().way_in(), self.inner.zap.display(), state.display())
    }

    /// Starts `zap` with `arguments` in the lab, with pipes as its stdin and stdout.
    pub fn spawn_zap(&self, arguments: &[&str]) -> Result<Child> {
        let mut command = Command::new(&self.inner.zap);
        command.arg("--state").arg(self.state()).args(shown(&self.inner.zap, arguments));
        self.host().spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()))
    }

    /// Makes sure that the client is on the bridge, which is there from the first pod to the last.
    pub fn attach_client(&self) -> Result<()> {
        self.attach(CLIENT_PORT)
    }

    fn attach(&self, port: &str) -> Result<()> {
        let host = self.host();
        if !host.ip(&[&format!("-o link show dev {port}")])?.contains(&format!("master {BRIDGE} ")) {
            host.ip(&[&format!("link set {port} master {BRIDGE}")])
                .with_context(|| format!("putting {port} on the bridge, which a pod should have made"))?;
        }
        Ok(())
    }
}

impl Inner {
    fn zap<S: AsRef<std::ffi::OsStr>>(&self, arguments: &[S]) -> Result<(Output, Duration)> {
        let closed = self.closed.read().unwrap_or_else(|poisoned| poisoned.into_inner());
        ensure!(!*closed, "the lab is being taken down");
        self.zap_in_any_case(arguments)
    }

    fn zap_in_any_case<S: AsRef<std::ffi::OsStr>>(&self, arguments: &[S]) -> Result<(Output, Duration)> {
        let mut command = Command::new(&self.zap);
        command.arg("--state").arg(self.directory.join("state")).args(shown(&self.zap, arguments));
        let start = Instant::now();
        let output = self.host.output(command.stdin(Stdio::null()))?;
        Ok((output, start.elapsed()))
    }
}

/// What a pod does not see of the host: it has its own.
const OWN: [&str; 3] = ["/dev", "/run", "/tmp"];

/// The same arguments; if they run a pod, and what was built with `zap` lies where a pod does not see it, with that shown to
/// it in its place.
fn shown<S: AsRef<OsStr>>(zap: &Path, arguments: &[S]) -> Vec<OsString> {
    let mut words: Vec<OsString> = arguments.iter().map(|word| word.as_ref().to_owned()).collect();
    match zap.parent().filter(|built| OWN.iter().any(|own| built.starts_with(own))) {
        Some(built) if words.first().is_some_and(|verb| verb == "run") => {
            let mut bind = built.as_os_str().to_owned();
            bind.push(":");
            bind.push(built);
            bind.push(":ro");
            words.splice(1..1, [OsString::from("--bind"), bind]);
            words
        }
        _ => words,
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        cleanup::take_down(&self.inner);
    }
}

/// Waits until `check` succeeds, and says what it last said if that does not happen within [`PATIENCE`].
pub fn wait_until<T>(what: &str, check: impl FnMut() -> Result<T>) -> Result<T> {
    wait_for(what, PATIENCE, check)
}

/// The same, with a patience of its own.
pub fn wait_for<T>(what: &str, patience: Duration, mut check: impl FnMut() -> Result<T>) -> Result<T> {
    let deadline = Instant::now() + patience;
    loop {
        match check() {
            Ok(value) => return Ok(value),
            Err(error) if Instant::now() > deadline => {
                return Err(error).with_context(|| format!("waited {} s for {what}", patience.as_secs()));
            }
            // A poll, not a pause to get past a race: there is nothing here to wait on.
            Err(_) => std::thread::sleep(Duration::from_millis(2)),
        }
    }
}

/// The address and port that a workload serves on.
pub fn served_at(address: Ipv4Addr) -> SocketAddr {
    (address, PORT).into()
}
