//! An image that arrives in parts: put together in files without a name, checked as it comes.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::ImageError;
use super::chunk::{CHUNK, Compression, FileEntry};
use super::manifest::Manifest;
use super::reader::ImageReader;
use super::stored::memory_file;

/// An image on its way in. Dropped, it leaves nothing.
pub struct ReceivedImage {
    /// Where its sender is, for messages.
    from: PathBuf,
    /// Where archives are kept: in files that have no name.
    storage: PathBuf,
    parts: Vec<Part>,
}

/// A part that grows, and the checksum of each of its chunks.
struct Part {
    name: String,
    file: File,
    length: u64,
    crc32: Vec<u32>,
    hasher: crc32fast::Hasher,
    /// It did not come, it was there: what is in it is checked when it is read.
    stored: bool,
}

impl Part {
    fn append(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        while !bytes.is_empty() {
            let in_chunk = (self.length % CHUNK as u64) as usize;
            let (now, later) = bytes.split_at(bytes.len().min(CHUNK - in_chunk));
            self.hasher.update(now);
            self.length += now.len() as u64;
            if self.length.is_multiple_of(CHUNK as u64) {
                self.crc32.push(std::mem::take(&mut self.hasher).finalize());
            }
            bytes = later;
        }
        Ok(())
    }

    /// Whether it is what the manifest says.
    fn is(&mut self, entry: &FileEntry) -> bool {
        if self.stored {
            let length = self.file.metadata().map_or(0, |metadata| metadata.len());
            return entry.compression == Compression::None && length == entry.length && entry.chunks().is_ok();
        }
        if !self.length.is_multiple_of(CHUNK as u64) {
            self.crc32.push(std::mem::take(&mut self.hasher).finalize());
        }
        entry.compression == Compression::None && entry.length == self.length && entry.crc32 == self.crc32
    }
}

impl ReceivedImage {
    /// Nothing of it is there yet. `from` is for messages; archives are kept in the file system of `storage`.
    pub fn new(from: &Path, storage: &Path) -> ReceivedImage {
        ReceivedImage { from: from.to_owned(), storage: storage.to_owned(), parts: Vec::new() }
    }

    /// A file of the image begins. They are numbered in this order, from 0 on.
    pub fn begin(&mut self, name: &str) -> Result<(), ImageError> {
        self.check_name(name)?;
        let file = if name.starts_with("layer-") { nameless(&self.storage) } else { memory_file("zap-image") };
        let file = file.map_err(ImageError::io("making a file for", &self.from))?;
        self.push(name, file, false);
        Ok(())
    }

    /// This file of the image is in a store.
    pub fn stored(&mut self, name: &str, file: File) -> Result<(), ImageError> {
        self.check_name(name)?;
        self.push(name, file, true);
        Ok(())
    }

    fn check_name(&self, name: &str) -> Result<(), ImageError> {
        let known = ["data", "state"].contains(&name) || name.starts_with("layer-");
        if !known || name.contains('/') || self.parts.iter().any(|part| part.name == name) {
            return Err(ImageError::damaged(&self.from, format!("it begins a file {name:?}")));
        }
        Ok(())
    }

    fn push(&mut self, name: &str, file: File, stored: bool) {
        let hasher = crc32fast::Hasher::new();
        self.parts.push(Part { name: name.to_owned(), file, length: 0, crc32: Vec::new(), hasher, stored });
    }

    /// Bytes for the end of a file.
    pub fn append(&mut self, part: u16, bytes: &[u8]) -> Result<(), ImageError> {
        let known = self.parts.get_mut(usize::from(part));
        let part = known
            .ok_or_else(|| ImageError::damaged(&self.from, format!("bytes of file {part}, which was not begun")))?;
        part.append(bytes).map_err(ImageError::io("keeping", &self.from))
    }

    /// Bytes that have come.
    pub fn bytes(&self) -> u64 {
        self.parts.iter().map(|part| part.length).sum()
    }

    /// All of it is there: checks every byte against the manifest.
    pub fn complete(mut self, manifest: &[u8]) -> Result<ImageReader, ImageError> {
        let manifest = Manifest::from_bytes(&self.from, manifest)?;
        let mut files = Vec::with_capacity(self.parts.len());
        let stored = self.parts.iter().any(|part| part.stored);
        for entry in &manifest.files {
            let missing = || ImageError::damaged(&self.from, format!("its file {} is missing", entry.name));
            let index = self.parts.iter().position(|part| part.name == entry.name).ok_or_else(missing)?;
            let mut part = self.parts.swap_remove(index);
            if !part.is(entry) {
                return Err(ImageError::damaged(&self.from, format!("the checksums of {} are wrong", entry.name)));
            }
            files.push((entry.clone(), part.file));
        }
        if let Some(part) = self.parts.first() {
            return Err(ImageError::damaged(&self.from, format!("it has a file {} too many", part.name)));
        }
        ImageReader::of_files(&self.from, manifest, files, stored)
    }
}

/// A file in that directory that no name leads to: it is gone with us. Where the file system has none, in memory.
fn nameless(directory: &Path) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = File::options();
    let opened = options.read(true).write(true).mode(0o600).custom_flags(libc::O_TMPFILE).open(directory);
    opened.or_else(|_| memory_file("zap-layer"))
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::image::{ImageWriter, PartSink};

    struct Relay(Mutex<Option<ReceivedImage>>, Mutex<Option<ImageReader>>);

    impl PartSink for Relay {
        fn begin(&self, name: &str) -> io::Result<u16> {
            let mut image = self.0.lock().unwrap();
            let image = image.as_mut().unwrap();
            image.begin(name).map_err(io::Error::other)?;
            Ok(image.parts.len() as u16 - 1)
        }

        fn append(&self, part: u16, bytes: &[u8]) -> io::Result<()> {
            self.0.lock().unwrap().as_mut().unwrap().append(part, bytes).map_err(io::Error::other)
        }

        fn complete(&self, manifest: &[u8]) -> io::Result<()> {
            let image = self.0.lock().unwrap().take().unwrap();
            *self.1.lock().unwrap() = Some(image.complete(manifest).map_err(io::Error::other)?);
            Ok(())
        }
    }

    #[test]
    fn what_is_sent_arrives() {
        let dir = tempfile::tempdir().unwrap();
        let relay =
            Arc::new(Relay(Mutex::new(Some(ReceivedImage::new(Path::new("peer"), dir.path()))), Mutex::new(None)));
        let mut writer = ImageWriter::sending(relay.clone()).unwrap();
        let bytes: Vec<u8> = (0..3 << 20).map(|n: u32| n as u8).collect();
        let place = writer.data.append_pages(bytes.clone());
        writer.record("pod", 1, &7u8);
        let mut layer = writer.layer("upper").unwrap();
        layer.write_all(b"hello").unwrap();
        writer.close_layer(layer).unwrap();
        writer.finish(&"facts").unwrap();
        let reader = relay.1.lock().unwrap().take().unwrap();
        assert_eq!(reader.read(place).unwrap(), bytes);
        assert_eq!(reader.one::<u8>("pod").unwrap(), 7);
        assert_eq!(io::read_to_string(reader.layer("upper").unwrap()).unwrap(), "hello");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn strange_parts_are_refused() {
        let mut image = ReceivedImage::new(Path::new("peer"), Path::new("/tmp"));
        assert!(image.begin("../x").is_err());
        assert!(image.begin("manifest").is_err());
        image.begin("data").unwrap();
        assert!(image.begin("data").is_err());
        assert!(image.append(1, b"x").is_err());
        assert!(image.complete(b"nonsense").is_err());
    }
}
