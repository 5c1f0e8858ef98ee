//! Debian's Apache, with the configuration of `workloads/apache` and a site whose every byte is known.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::{Offer, Recipe, Workload, folder};
use crate::client::{Connection, content};
use crate::lab::{Lab, Netns, PATIENCE, wait_until};

/// Where the folder is in a pod.
const FOLDER_IN_POD: &str = "/srv/apache";
/// Where the site is in a pod.
const SITE_IN_POD: &str = "/srv/site";

/// How Apache spreads its connections over processes and threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mpm {
    /// Threads that wait for requests, not for connections.
    Event,
    /// A thread a connection.
    Worker,
    /// A process a connection.
    Prefork,
}

impl Mpm {
    /// Its name in Apache's terms.
    pub fn name(self) -> &'static str {
        match self {
            Mpm::Event => "event",
            Mpm::Worker => "worker",
            Mpm::Prefork => "prefork",
        }
    }
}

/// Apache with one of its MPMs.
#[derive(Clone, Copy, Debug)]
pub struct Apache {
    /// Which.
    pub mpm: Mpm,
}

impl Apache {
    fn environment(&self, site: &str) -> Vec<(String, String)> {
        vec![("ZAP_MPM".into(), self.mpm.name().into()), ("ZAP_SITE".into(), site.into())]
    }
}

impl Workload for Apache {
    fn name(&self) -> &'static str {
        match self.mpm {
            Mpm::Event => "apache-event",
            Mpm::Worker => "apache-worker",
            Mpm::Prefork => "apache-prefork",
        }
    }

    fn claim(&self) -> &'static str {
        "low overhead, sub-second checkpoint and restart: a web server and its connections"
    }

    fn offers(&self) -> Offer {
        Offer::Site
    }

    fn in_pod(&self, lab: &Lab) -> Result<Recipe> {
        let (folder, site) = (folder("apache")?, site(lab)?);
        Ok(Recipe {
            command: vec![format!("{FOLDER_IN_POD}/start")],
            environment: self.environment(SITE_IN_POD),
            binds: vec![
                format!("{}:{FOLDER_IN_POD}:ro", folder.display()),
                format!("{}:{SITE_IN_POD}:ro", site.display()),
            ],
            ..Recipe::default()
        })
    }

    fn natively(&self, lab: &Lab, directory: &Path) -> Result<Recipe> {
        let mut environment = self.environment(&site(lab)?.to_string_lossy());
        environment.push(("ZAP_VAR".into(), directory.to_string_lossy().into_owned()));
        let start = folder("apache")?.join("start").to_string_lossy().into_owned();
        Ok(Recipe { command: vec![start], environment, ..Recipe::default() })
    }

    fn ready_for(&self, from: &Netns, address: SocketAddr) -> Result<()> {
        wait_until("the first answer", || {
            from.enter(|| {
                Connection::open(address, Duration::from_secs(1))?.get_file("1k.bin").context("asking for a file")
            })?
        })
    }

    fn health(&self, lab: &Lab, address: SocketAddr) -> Result<()> {
        lab.client().enter(|| {
            let mut connection = Connection::open(address, PATIENCE)?;
            for (file, _) in content::FILES.iter().filter(|(_, size)| *size <= 10 << 20) {
                connection.get_file(file)?;
            }
            let answer = String::from_utf8_lossy(&connection.get("/cgi/hello?who=pod")?).into_owned();
            ensure!(answer.starts_with("hello, who=pod, from process "), "the CGI script answered {answer:?}");
            Ok(())
        })?
    }
}

/// The site of a lab, made on first use.
fn site(lab: &Lab) -> Result<PathBuf> {
    let site = lab.directory().join("site");
    content::generate(&site)?;
    Ok(site)
}
