//! Many connections at once, as a server has them at the moment of a checkpoint.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};

use super::{Connection, Download};
use crate::lab::Netns;

/// How much of a download has come when the crowd is complete: enough that the server is in the middle of it.
const FIRST_PART: u64 = 1 << 20;

/// Open keep-alive connections to one server, some of them in the middle of a 100 MB download.
///
/// The downloads are read only as far as they are asked to: their queues are full, and the server waits.
#[derive(Debug)]
pub struct Crowd {
    idle: Vec<Connection>,
    downloads: Vec<Download>,
}

impl Crowd {
    /// Opens `idle` connections that have each fetched a file, and `downloading` that are part of the way through one,
    /// from the network namespace `from`.
    pub fn open(from: &Netns, to: SocketAddr, idle: usize, downloading: usize, patience: Duration) -> Result<Self> {
        from.enter(|| {
            let connect = || Connection::open(to, patience);
            let open_idle = || {
                let mut connection = connect()?;
                connection.get_file("1k.bin")?;
                anyhow::Ok(connection)
            };
            let open_download = || {
                let mut download = connect()?.download("100m.bin")?;
                download.advance(FIRST_PART)?;
                anyhow::Ok(download)
            };
            Ok(Self {
                idle: (0..idle).map(|_| open_idle()).collect::<Result<_>>().context("opening idle connections")?,
                downloads: (0..downloading)
                    .map(|_| open_download())
                    .collect::<Result<_>>()
                    .context("starting downloads")?,
            })
        })?
    }

    /// How many connections there are.
    pub fn len(&self) -> usize {
        self.idle.len() + self.downloads.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Uses every connection once: a verified request on each idle one, a further verified part of each download.
    pub fn use_once(&mut self) -> Result<()> {
        for (i, connection) in self.idle.iter_mut().enumerate() {
            connection.get_file("10k.bin").with_context(|| format!("idle connection {i}"))?;
        }
        for (i, download) in self.downloads.iter_mut().enumerate() {
            download.advance(FIRST_PART).with_context(|| format!("download {i}"))?;
        }
        Ok(())
    }

    /// Uses every connection, and reads every download to its verified end.
    pub fn finish(mut self) -> Result<()> {
        self.use_once()?;
        for (i, download) in self.downloads.into_iter().enumerate() {
            let mut connection = download.finish().with_context(|| format!("download {i}"))?;
            connection.get_file("1k.bin").with_context(|| format!("after download {i}"))?;
        }
        Ok(())
    }
}
