//! The image: framing, checksums, versions. Knows nothing of what is inside.
//!
//! An image is a directory: `manifest` (readable: format version, host and CPU facts, sizes, checksums), `state`
//! (length-framed, (kind, version)-tagged, checksummed records), `data` (bulk bytes: pages, queue contents, deleted files;
//! page-aligned where asked for; a CRC-32 every MiB) and `layer-*` (archives of the upper layer and of tmpfs contents).
//! It appears under its name only when it is complete. What an earlier image has already need not be in it (`inherit.rs`).

use std::io;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

mod chunk;
mod frame;
mod inherit;
mod manifest;
mod reader;
mod received;
mod room;
mod sink;
mod stored;
#[cfg(test)]
mod tests;
mod verify;
mod writer;

pub use chunk::{Compression, FileEntry};

pub use manifest::FORMAT;
pub use reader::{ImageReader, LayerReader, StoredData};
pub use received::ReceivedImage;
pub(crate) use room::Room;
pub use sink::{DataSink, Feed};
pub(crate) use stored::memory_file;
pub use writer::{ImageWriter, LayerWriter, Summary, remove_partials};

/// Puts the parts of an image together somewhere else: over a wire, say.
pub trait PartSink: Send + Sync {
    /// Begins a file of the image; says under which number its bytes come.
    fn begin(&self, name: &str) -> io::Result<u16>;

    /// Bytes that go to the end of a file.
    fn append(&self, part: u16, bytes: &[u8]) -> io::Result<()>;

    /// All is there: the manifest, which covers it.
    fn complete(&self, manifest: &[u8]) -> io::Result<()>;
}

/// Where some bulk bytes are in the `data` of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataRef {
    /// Byte offset, after decompression.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
}

/// What can be wrong with an image. All but `Io` and `Exists` are exit code 5.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// Reading or writing failed.
    #[error("{step} {path}: {source}", path = path.display())]
    Io {
        /// What was being done.
        step: &'static str,
        /// To which file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// An image of that name is there already; nothing is overwritten.
    #[error("{} exists; choose another name or remove it", .0.display())]
    Exists(PathBuf),
    /// It is not an image, or not of this program.
    #[error("{}: not an image: {why}", path.display())]
    Foreign {
        /// The path that was given.
        path: PathBuf,
        /// Why it cannot be one.
        why: String,
    },
    /// Bytes are missing or wrong.
    #[error("{}: the image is damaged: {what}", path.display())]
    Damaged {
        /// The file of the image.
        path: PathBuf,
        /// What is wrong, and where.
        what: String,
    },
    /// Parts of it are stored in another image, which is not there.
    #[error(
        "{}: parts of it are in image {id}, which is neither at {} nor beside it: put it back",
        path.display(), was.display()
    )]
    Orphan {
        /// The image.
        path: PathBuf,
        /// The content id of the other.
        id: String,
        /// Where that was.
        was: PathBuf,
    },
    /// It was written by another version of the format.
    #[error("{}: format version {found}, this zap reads {known}", path.display())]
    Version {
        /// The image.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// Ours.
        known: u32,
    },
}

impl ImageError {
    fn io(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ImageError {
        move |source| ImageError::Io { step, path: path.to_owned(), source }
    }

    fn damaged(path: &Path, what: impl Into<String>) -> ImageError {
        ImageError::Damaged { path: path.to_owned(), what: what.into() }
    }
}

/// Takes records off some bytes, as a reader does, and gives out kind and body of each.
pub(crate) fn try_records(mut bytes: &[u8], each: &mut dyn FnMut(&str, &[u8])) {
    while let Ok(record) = frame::pull(&mut bytes) {
        each(record.kind, record.body);
    }
}

/// Reads some bytes as a manifest.
pub(crate) fn try_manifest(bytes: &[u8]) {
    drop(manifest::Manifest::from_bytes(Path::new("manifest"), bytes));
}

/// Reads some bytes as a chunk that is longer unpacked.
pub(crate) fn try_chunk(bytes: &[u8]) {
    for compression in [Compression::Lz4, Compression::Zstd] {
        drop(compression.unpack(bytes, chunk::CHUNK));
    }
}

/// Reads a text as what the kernel says of the host's memory.
pub(crate) fn try_room(text: &str) {
    let _ = room::is_scarce(text);
}

/// Encodes a state. Self-describing (CBOR), so that fields can be added.
pub fn encode<T: Serialize>(state: &T) -> Vec<u8> {
    let mut bytes = Vec::new();
    ciborium::into_writer(state, &mut bytes).expect("writing to memory cannot fail");
    bytes
}

/// Decodes a state whose checksum has been verified. Bytes left over are an error.
pub fn decode<T: DeserializeOwned>(mut bytes: &[u8]) -> Result<T, String> {
    let value = ciborium::from_reader(&mut bytes).map_err(|e| e.to_string())?;
    if bytes.is_empty() { Ok(value) } else { Err(format!("{} bytes left over", bytes.len())) }
}
