//! Programs as they are packaged, each with a load of its own in the pod and a check that notices a loss: the folders of
//! `workloads/` that have a `check`.

use std::net::SocketAddr;
use std::path::Path;

use anyhow::{Context, Result, bail};

use super::{Offer, Recipe, Workload, folder};
use crate::lab::{Lab, Netns, Pod, built_beside};

/// Where the folders are in a pod.
const FOLDERS_IN_POD: &str = "/srv/workloads";
/// Where programs of our own are in a pod.
const OWN_IN_POD: &str = "/srv/programs";

/// One of them.
#[derive(Clone, Copy, Debug)]
pub struct Program {
    name: &'static str,
    /// Further options of `zap run`.
    options: &'static [&'static str],
    /// A program of this workspace that it runs.
    own: Option<&'static str>,
}

impl Program {
    const fn packaged(name: &'static str) -> Self {
        Self { name, options: &[], own: None }
    }

    /// Whether nothing was lost; `how` is what is expected in particular.
    pub fn check(&self, pod: &Pod<'_>, how: &[&str]) -> Result<()> {
        let script = format!("{FOLDERS_IN_POD}/{}/check", self.name);
        pod.exec(&[&[script.as_str()], how].concat()).map(drop)
    }
}

/// All of them.
pub const PROGRAMS: &[Program] = &[
    Program { options: &["--cap-add", "sys_admin"], ..Program::packaged("bubblewrap") },
    Program::packaged("caddy"),
    Program::packaged("chromium"),
    Program::packaged("compile"),
    Program::packaged("ffmpeg"),
    Program::packaged("git"),
    Program::packaged("java"),
    Program::packaged("mariadb"),
    Program::packaged("memcached"),
    Program::packaged("nginx"),
    Program::packaged("node"),
    Program::packaged("postgresql"),
    Program::packaged("python"),
    Program::packaged("redis"),
    Program::packaged("redis_memory"),
    Program::packaged("sqlite"),
    Program::packaged("ssh"),
    Program::packaged("supervisor"),
    Program::packaged("terminal"),
    Program { own: Some("tokio-server"), ..Program::packaged("tokio") },
];

impl Workload for Program {
    fn name(&self) -> &'static str {
        self.name
    }

    fn claim(&self) -> &'static str {
        "unmodified programs: checkpoint and restart under load"
    }

    fn in_pod(&self, _lab: &Lab) -> Result<Recipe> {
        let folders = folder(self.name)?.parent().context("the root is no workload")?.to_owned();
        let mut binds = vec![format!("{}:{FOLDERS_IN_POD}:ro", folders.display())];
        if let Some(own) = self.own {
            binds.push(format!("{}:{OWN_IN_POD}/{own}:ro", built_beside(own)?.display()));
        }
        Ok(Recipe {
            command: vec![format!("{FOLDERS_IN_POD}/{}/start", self.name)],
            options: self.options.iter().map(|option| (*option).to_owned()).collect(),
            binds,
            ..Recipe::default()
        })
    }

    fn natively(&self, _lab: &Lab, _directory: &Path) -> Result<Recipe> {
        bail!("{} writes to places of its own choice: it runs in pods only", self.name)
    }

    fn offers(&self) -> Offer {
        Offer::Nothing
    }

    fn ready_for(&self, _from: &Netns, _address: SocketAddr) -> Result<()> {
        Ok(())
    }

    fn health(&self, _lab: &Lab, _address: SocketAddr) -> Result<()> {
        Ok(())
    }

    fn works(&self, pod: &Pod<'_>) -> Result<()> {
        self.check(pod, &[])
    }
}
