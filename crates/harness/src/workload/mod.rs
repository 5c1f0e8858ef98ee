//! What runs: how it is started in a pod and natively, and how its health is checked.

mod apache;
mod desktop;
mod program;
mod sleep;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

pub use apache::{Apache, Mpm};
pub use desktop::{CLOCK, COUNTER, Desktop, HOME_IN_POD, NATIVE_DISPLAY, SHELL};
pub use program::{PROGRAMS, Program};
pub use sleep::Sleep;

use crate::lab::{Lab, Netns, Pod};

/// How to start something.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recipe {
    /// Program and arguments.
    pub command: Vec<String>,
    /// Environment beyond what there is.
    pub environment: Vec<(String, String)>,
    /// `SRC:DST[:ro]` of the external directories that a pod needs.
    pub binds: Vec<String>,
    /// Further options of `zap run` that a pod needs.
    pub options: Vec<String>,
}

/// What a workload offers to others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offer {
    /// Nothing.
    Nothing,
    /// Web pages.
    Site,
    /// A screen.
    Screen,
}

/// Something that runs in a pod as it does natively.
pub trait Workload: std::fmt::Debug + Sync {
    /// Its name in samples and on the command line.
    fn name(&self) -> &'static str;
    /// What of the paper it serves.
    fn claim(&self) -> &'static str;
    /// How it starts in a pod of `lab`.
    fn in_pod(&self, lab: &Lab) -> Result<Recipe>;
    /// How it starts natively, with `directory` for whatever it writes.
    fn natively(&self, lab: &Lab, directory: &Path) -> Result<Recipe>;
    /// What others can connect to.
    fn offers(&self) -> Offer;
    /// Waits until it is ready to be driven at `address`, by who is in the network namespace `from`.
    fn ready_for(&self, from: &Netns, address: SocketAddr) -> Result<()>;
    /// The same, for the client of a lab.
    fn ready(&self, lab: &Lab, address: SocketAddr) -> Result<()> {
        self.ready_for(lab.client(), address)
    }
    /// Whether it works: everything that it offers, tried once.
    fn health(&self, lab: &Lab, address: SocketAddr) -> Result<()>;
    /// Whether it works, and nothing was lost since it began, as one sees from inside `pod`.
    fn works(&self, _pod: &Pod<'_>) -> Result<()> {
        Ok(())
    }
}

/// Every workload.
pub fn all() -> Vec<Box<dyn Workload>> {
    served().into_iter().chain(programs()).collect()
}

/// Programs as they are packaged.
pub fn programs() -> impl Iterator<Item = Box<dyn Workload>> {
    PROGRAMS.iter().map(|program| Box::new(*program) as Box<dyn Workload>)
}

/// The workloads that others use, and the one that does nothing.
pub fn served() -> Vec<Box<dyn Workload>> {
    vec![
        Box::new(Sleep),
        Box::new(Apache { mpm: Mpm::Event }),
        Box::new(Apache { mpm: Mpm::Worker }),
        Box::new(Apache { mpm: Mpm::Prefork }),
        Box::new(Desktop::Classic),
        Box::new(Desktop::Full),
    ]
}

/// The folder of a workload: below `ZAP_WORKLOADS`, or in the source that this program was built from.
pub fn folder(name: &str) -> Result<PathBuf> {
    let all = match std::env::var_os("ZAP_WORKLOADS") {
        Some(path) => PathBuf::from(path),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../workloads"),
    };
    match all.join(name).canonicalize() {
        Ok(path) => Ok(path),
        Err(_) => bail!("there is no workload folder {}: set ZAP_WORKLOADS", all.join(name).display()),
    }
}
