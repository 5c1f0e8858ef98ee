//! Zap for programs: a host and its pods, as the command line has them.
//!
//! ```no_run
//! use std::path::Path;
//! use zap::host::Host;
//! use zap::pod::PodSpec;
//!
//! # fn main() -> Result<(), zap::monitor::protocol::Failure> {
//! let host = Host::new(None);
//! let pod = host.run(PodSpec::new("web", &["python3", "-m", "http.server"]))?;
//! let stats = host.checkpoint(&pod, Path::new("/tmp/web.zap"), false)?;
//! let (pod, _) = host.restart(Path::new("/tmp/web.zap"), None)?;
//! println!("{pod} was held for {} µs", stats.downtime_us);
//! # Ok(())
//! # }
//! ```
//!
//! Monitors are `zap` processes: the `zap` command must be beside the program that uses this, in `PATH`, or named by
//! `ZAP_PROGRAM`.

use std::path::Path;

use crate::monitor::client;
use crate::monitor::frame::Collector;
use crate::monitor::protocol::{Born, Failure, Request, Start, Watch};
use crate::pod::{PodSpec, Store};
use crate::{checkpoint, image, restart};

/// A host: everything that belongs to one state directory.
#[derive(Clone, Debug)]
pub struct Host {
    store: Store,
}

impl Host {
    /// The host of this state directory; that of this machine if absent.
    pub fn new(state: Option<&Path>) -> Host {
        Host { store: Store::new(state) }
    }

    /// Makes a pod and runs its command in it, unattended. Returns its name.
    pub fn run(&self, spec: PodSpec) -> Result<String, Failure> {
        let (store, watch) = (self.store.clone(), Watch::default());
        let start = Start::Run { store, spec: Box::new(spec), address: None, mac: None, watch, fault: None };
        client::launch::<Born>(&start).map(|(born, _)| born.name)
    }

    /// Writes a pod down as `image`, which must not exist yet. It is then gone, unless it is left running.
    pub fn checkpoint(&self, pod: &str, image: &Path, leave_running: bool) -> Result<checkpoint::Stats, Failure> {
        let monitor = self.store.load(pod)?.monitor;
        let options = checkpoint::Options {
            output: absolute(image)?,
            afterwards: if leave_running { checkpoint::Afterwards::Running } else { checkpoint::Afterwards::Gone },
            compress: image::Compression::None,
            parent: None,
            carry_files: false,
            fault: None,
        };
        let (stats, _) = client::ask(&self.store, pod, &Request::Checkpoint(options))?;
        if !leave_running {
            client::await_end(monitor);
        }
        Ok(stats)
    }

    /// Starts a pod again from `image`, under `name`; under the image's own if absent, or a fresh one if that is taken.
    /// Returns the name that it got.
    pub fn restart(&self, image: &Path, name: Option<&str>) -> Result<(String, restart::Stats), Failure> {
        let options = restart::Options {
            image: absolute(image)?,
            name: name.map(str::to_owned),
            address: None,
            former: None,
            trail: None,
            publish: None,
            binds: Vec::new(),
            root: None,
            fault: None,
        };
        let start = Start::Restart { store: self.store.clone(), options: options.into(), watch: Watch::default() };
        let (born, _) = client::launch::<Born>(&start)?;
        Ok((born.name, born.stats.unwrap_or_default()))
    }

    /// What a pod has printed, on either stream.
    pub fn log(&self, pod: &str) -> std::io::Result<Vec<u8>> {
        let mut frames = Collector::default();
        frames.add(&std::fs::read(self.store.log_file(pod))?);
        let mut text = Vec::new();
        while let Some((_, payload)) = frames.take()? {
            text.extend(payload);
        }
        Ok(text)
    }

    /// Ends a pod that runs and removes all of it.
    pub fn remove(&self, pod: &str) -> Result<(), Failure> {
        let monitor = self.store.load(pod)?.monitor;
        client::ask::<()>(&self.store, pod, &Request::Remove)?;
        client::await_end(monitor);
        Ok(())
    }
}

fn absolute(path: &Path) -> Result<std::path::PathBuf, Failure> {
    std::path::absolute(path).map_err(|e| Failure { message: format!("{}: {e}", path.display()), code: 2 })
}
