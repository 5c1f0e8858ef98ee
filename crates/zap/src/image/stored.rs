//! What is stored of a file of an image, and its contents as they come out of it.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use nix::sys::memfd::{MFdFlags, memfd_create};

use super::ImageError;
use super::chunk::{ChunkPlace, Compression, FileEntry};
use super::inherit::Contents;

/// A file of an image.
pub(super) struct Stored {
    pub(super) entry: FileEntry,
    pub(super) file: File,
    /// What it is made of.
    pub(super) contents: Contents,
    /// What is stored, unpacked.
    unpacked: OnceLock<File>,
}

impl Stored {
    pub(super) fn new(entry: FileEntry, file: File) -> Stored {
        let contents = Contents::own(entry.length);
        Stored { entry, file, contents, unpacked: OnceLock::new() }
    }

    /// Whether what is stored is all of it, as it is.
    pub(super) fn is_plain(&self) -> bool {
        self.entry.compression == Compression::None && self.contents == Contents::own(self.entry.length)
    }

    /// What is stored, before compression, as a file.
    pub(super) fn unpacked(&self, path: &Path) -> Result<&File, ImageError> {
        if self.entry.compression == Compression::None {
            return Ok(&self.file);
        }
        if self.unpacked.get().is_none() {
            let path = path.join(&self.entry.name);
            let mut chunks = Chunks::new(path.clone(), &self.file, &self.entry)?;
            let plain = gathered(&mut chunks).map_err(ImageError::io("unpacking", &path))?;
            return Ok(self.unpacked.get_or_init(|| plain));
        }
        Ok(self.unpacked.get().unwrap_or(&self.file))
    }
}

/// A file that has no name.
pub(crate) fn memory_file(name: &str) -> io::Result<File> {
    Ok(File::from(memfd_create(name, MFdFlags::MFD_CLOEXEC)?))
}

/// All that comes, in a file in memory.
pub(super) fn gathered(contents: &mut dyn Read) -> io::Result<File> {
    let mut plain = memory_file("zap-data")?;
    io::copy(contents, &mut plain)?;
    Ok(plain)
}

/// Reads a file's contents from wherever they are stored.
pub(super) struct Whole<'a> {
    pub(super) contents: &'a Contents,
    /// What this image stores of it, and each ancestor.
    pub(super) stored: Vec<Option<&'a File>>,
    pub(super) at: u64,
}

impl Read for Whole<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Some(stretch) = self.contents.at(self.at) else { return Ok(0) };
        let stored = self.stored.get(usize::from(stretch.image)).copied().flatten();
        let stored = stored.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        let now = buffer.len().min(usize::try_from(stretch.length).unwrap_or(usize::MAX));
        stored.read_exact_at(&mut buffer[..now], stretch.offset)?;
        self.at += now as u64;
        Ok(now)
    }
}

/// Reads what is stored of a file, chunk by chunk, unpacked.
pub(super) struct Chunks<'a> {
    path: PathBuf,
    file: &'a File,
    compression: Compression,
    places: std::vec::IntoIter<ChunkPlace>,
    chunk: Vec<u8>,
    done: usize,
}

impl<'a> Chunks<'a> {
    pub(super) fn new(path: PathBuf, file: &'a File, entry: &FileEntry) -> Result<Chunks<'a>, ImageError> {
        let places = entry.chunks().map_err(|what| ImageError::damaged(&path, what))?.into_iter();
        Ok(Chunks { path, file, compression: entry.compression, places, chunk: Vec::new(), done: 0 })
    }
}

impl Read for Chunks<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.done == self.chunk.len() {
            let Some(place) = self.places.next() else { return Ok(0) };
            let mut stored = vec![0; place.stored];
            self.file.read_exact_at(&mut stored, place.offset)?;
            let named = |what| io::Error::other(format!("{}: {what}", self.path.display()));
            self.chunk = self.compression.unpack(&stored, place.length).map_err(named)?;
            self.done = 0;
        }
        let now = buffer.len().min(self.chunk.len() - self.done);
        buffer[..now].copy_from_slice(&self.chunk[self.done..self.done + now]);
        self.done += now;
        Ok(now)
    }
}
