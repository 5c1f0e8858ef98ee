//! A store that both hosts see: a directory, on a file system that they share, in which an image's data is a file.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::protocol::Message;
use super::wire::Wire;
use crate::image::PartSink;

/// The part of an image that goes to a store.
const PART: &str = "data";
/// Its number: no other part has it.
const NUMBER: u16 = u16::MAX;

/// The file of one migration in a store. The destination removes it as soon as it has it open; if it never does, it goes
/// with us.
pub(super) struct StoreFile {
    path: PathBuf,
    file: Mutex<File>,
    written: AtomicU64,
}

impl StoreFile {
    /// A new one in that directory.
    pub(super) fn create(directory: &Path, pod: &str) -> io::Result<StoreFile> {
        let directory = directory.canonicalize()?;
        // Nobody else makes one of this name: the same process may move a pod of the same name once at a time.
        let path = directory.join(format!("zap-{pod}-{}-{}", host_name(), std::process::id()));
        let mut options = File::options();
        let file = options.read(true).write(true).create_new(true).mode(0o600).open(&path)?;
        Ok(StoreFile { path, file: Mutex::new(file), written: AtomicU64::new(0) })
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes written to it.
    pub(super) fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }
}

impl Drop for StoreFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

fn host_name() -> String {
    nix::sys::utsname::uname().map_or_else(|_| "host".into(), |name| name.nodename().to_string_lossy().into_owned())
}

/// An image whose data goes to a store, and all else over the wire.
pub(super) struct ThroughStore {
    /// The way of all else.
    pub(super) wire: Arc<Wire>,
    /// Where data goes.
    pub(super) file: Arc<StoreFile>,
}

impl PartSink for ThroughStore {
    fn begin(&self, name: &str) -> io::Result<u16> {
        if name == PART { Ok(NUMBER) } else { self.wire.begin(name) }
    }

    fn append(&self, part: u16, bytes: &[u8]) -> io::Result<()> {
        if part != NUMBER {
            return self.wire.append(part, bytes);
        }
        self.file.written.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        self.file.file.lock().unwrap_or_else(PoisonError::into_inner).write_all(bytes)
    }

    /// What was flushed is there for the other host before it hears of it.
    fn complete(&self, manifest: &[u8]) -> io::Result<()> {
        self.file.file.lock().unwrap_or_else(PoisonError::into_inner).sync_data()?;
        self.wire.send(&Message::Stored { name: PART.to_owned() })?;
        self.wire.complete(manifest)
    }
}
