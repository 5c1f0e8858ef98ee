//! Other systems that are measured beside zap: on their own copy of the same workload, in the same run, in turns.

mod criu;
mod place;
mod stats;

use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Result, bail};

pub use criu::{Criu, CriuCopy, Dumped, Restored};
pub use stats::{DumpStats, RestoreStats, StatsError};

/// Another system, as `--peer` names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PeerSpec {
    /// CRIU, by the path of its program.
    Criu(PathBuf),
    /// No system at all: the workload by itself, ended and started again.
    Native,
}

impl FromStr for PeerSpec {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        match text.split_once('=') {
            Some(("criu", path)) if !path.is_empty() => Ok(Self::Criu(path.into())),
            None if text == "native" => Ok(Self::Native),
            _ => bail!("there is no peer {text:?}; there are criu=PATH and native"),
        }
    }
}
