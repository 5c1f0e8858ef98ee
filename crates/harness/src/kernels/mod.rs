//! Hosts with kernels of their own: small virtual machines that boot Debian's, under QEMU without hardware assistance.
//!
//! A guest has the host's own root, read-only through virtiofs, below a tmpfs of its own: what was built is there under the
//! same path. It is reached by a [command server](command) at an address that only a network namespace of ours knows.

pub mod command;
mod fetch;
mod guest;
mod init;
mod initramfs;
mod unpack;
mod world;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

pub use fetch::{Unavailable, fetch};
pub use guest::{Guest, Machine};
pub use init::{be_init, be_server};
pub use world::{Visitor, World};

/// A series of kernels that Debian has, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Series {
    /// What it is called here.
    pub name: &'static str,
    /// The package that depends on its newest kernel.
    package: &'static str,
    /// The suite that has it, where the machine's own package lists have not.
    suite: Option<&'static str>,
}

/// Those that there are, the oldest first.
pub const SERIES: [Series; 3] = [
    Series { name: "6.1", package: "linux-image-cloud-amd64", suite: None },
    Series { name: "6.12", package: "linux-image-6.12-cloud-amd64", suite: None },
    Series { name: "7", package: "linux-image-cloud-amd64", suite: Some("trixie-backports") },
];

/// The series of that name.
pub fn series(name: &str) -> Option<Series> {
    SERIES.into_iter().find(|series| series.name == name)
}

/// A kernel that is ready to boot.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// `uname -r`.
    pub release: String,
    /// Its directory in the cache.
    directory: PathBuf,
}

impl Kernel {
    /// What was unpacked before.
    fn cached(directory: &Path) -> Result<Self> {
        let release = std::fs::read_to_string(directory.join("release"))
            .with_context(|| format!("reading the release in {}", directory.display()))?;
        Ok(Self { release: release.trim().to_owned(), directory: directory.to_owned() })
    }

    /// The kernel itself, uncompressed: it is entered without the detour that a compressed one takes.
    fn image(&self) -> PathBuf {
        self.directory.join("vmlinux")
    }

    /// Its modules, in the order in which they are to be loaded.
    fn modules(&self) -> Result<Vec<PathBuf>> {
        let entries = std::fs::read_dir(self.directory.join("modules")).context("reading the kernel's modules")?;
        let mut paths: Vec<_> = entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<_>>()?;
        paths.sort();
        Ok(paths)
    }
}
