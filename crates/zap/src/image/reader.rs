//! Reading an image. Everything is open and in memory after [`ImageReader::open`]: no path is needed any more.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::de::DeserializeOwned;

use super::chunk::{ChunkPlace, Compression, FileEntry, Out};
use super::frame::{self, Record};
use super::manifest::Manifest;
use super::verify::{Stored, verify};
use super::{DataRef, DataSink, ImageError, decode};
use crate::parallel;

/// Bytes of records from which on it takes more than one thread to decode them.
const MUCH: usize = 64 << 10;

/// Reads an image whose manifest and state were verified.
pub struct ImageReader {
    path: PathBuf,
    manifest: Manifest,
    state: Vec<u8>,
    /// One for each file of the manifest but the state, in its order.
    files: Vec<(FileEntry, File)>,
    plain: OnceLock<File>,
}

impl ImageReader {
    /// Opens the image at `path`; checks the manifest, that nothing is missing or too much, and the state.
    pub fn open(path: &Path) -> Result<ImageReader, ImageError> {
        let at = path.join("manifest");
        let manifest = match fs::read(&at) {
            Ok(bytes) => Manifest::from_bytes(&at, &bytes)?,
            Err(e) if e.kind() == io::ErrorKind::NotFound && path.exists() => {
                return Err(ImageError::Foreign { path: path.to_owned(), why: "it has no manifest".into() });
            }
            Err(e) if e.kind() == io::ErrorKind::NotADirectory => {
                return Err(ImageError::Foreign { path: path.to_owned(), why: "it is not a directory".into() });
            }
            Err(e) => return Err(ImageError::io("opening", path)(e)),
        };
        refuse_strangers(path, &manifest)?;
        let mut files = Vec::new();
        let mut state = None;
        for entry in &manifest.files {
            let at = path.join(&entry.name);
            let file = File::open(&at).map_err(|e| match e.kind() {
                io::ErrorKind::NotFound => ImageError::damaged(&at, "it is missing"),
                _ => ImageError::io("opening", &at)(e),
            })?;
            match &*entry.name {
                "state" => state = Some(read_state(&at, &file, entry)?),
                _ => files.push((entry.clone(), file)),
            }
        }
        let state = state.ok_or_else(|| ImageError::damaged(&at, "it names no state"))?;
        if manifest.file("data").is_none() {
            return Err(ImageError::damaged(&at, "it names no data"));
        }
        Ok(ImageReader { path: path.to_owned(), manifest, state, files, plain: OnceLock::new() })
    }

    /// An image whose files, of which `manifest` speaks, are open and checked already.
    pub(super) fn of_files(
        path: &Path,
        manifest: Manifest,
        mut files: Vec<(FileEntry, File)>,
    ) -> Result<ImageReader, ImageError> {
        let state = files.iter().position(|(entry, _)| entry.name == "state");
        let state = state.ok_or_else(|| ImageError::damaged(path, "it names no state"))?;
        let (entry, file) = files.remove(state);
        let state = read_frames(path, &file, &entry)?;
        if manifest.file("data").is_none() {
            return Err(ImageError::damaged(path, "it names no data"));
        }
        Ok(ImageReader { path: path.to_owned(), state, manifest, files, plain: OnceLock::new() })
    }

    /// Checks every byte of the data.
    pub fn verify_data(&self) -> Result<(), ImageError> {
        self.verify_files(|name| name == "data")
    }

    /// Checks every byte of the layers.
    pub fn verify_layers(&self) -> Result<(), ImageError> {
        self.verify_files(|name| name != "data")
    }

    fn verify_files(&self, which: impl Fn(&str) -> bool) -> Result<(), ImageError> {
        let wanted = self.files.iter().filter(|(entry, _)| which(&entry.name));
        let stored = |entry, file| Stored { path: self.path.join(&FileEntry::clone(entry).name), file, entry };
        verify(&wanted.map(|(entry, file)| stored(entry, file)).collect::<Vec<_>>())
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The content id: what a child image names its parent by.
    pub fn id(&self) -> &str {
        &self.manifest.id
    }

    /// What the writer wanted people to read.
    pub fn facts(&self) -> &serde_json::Value {
        &self.manifest.facts
    }

    /// Name, bytes on disk, and bytes after decompression of every file but the manifest.
    pub fn parts(&self) -> impl Iterator<Item = (&str, u64, u64)> {
        self.manifest.files.iter().map(|f| (&*f.name, f.stored_length(), f.length))
    }

    /// How the data is stored.
    pub fn compression(&self) -> Compression {
        self.manifest.file("data").map(|f| f.compression).unwrap_or_default()
    }

    fn all(&self) -> impl Iterator<Item = Record<'_>> {
        let mut rest = &self.state[..];
        // every frame was checked when the state was read
        std::iter::from_fn(move || if rest.is_empty() { None } else { frame::pull(&mut rest).ok() })
    }

    /// The records of one kind, in the order in which they were written.
    pub fn records<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = (u16, &'a [u8])> {
        self.all().filter(move |r| r.kind == kind).map(|r| (r.version, r.body))
    }

    /// Every record's kind, version and length.
    pub fn contents(&self) -> impl Iterator<Item = (&str, u16, usize)> {
        self.all().map(|r| (r.kind, r.version, r.body.len()))
    }

    /// Refuses records that the caller does not know: `known` are kinds with the highest version of each.
    pub fn check_kinds(&self, known: &[(&str, u16)]) -> Result<(), ImageError> {
        let stranger =
            self.all().find(|r| !known.iter().any(|(kind, version)| r.kind == *kind && r.version <= *version));
        match stranger {
            None => Ok(()),
            Some(Record { kind, version, .. }) => {
                let what = format!("it has a record of kind {kind}, version {version}, which this zap does not know");
                Err(ImageError::damaged(&self.path.join("state"), what))
            }
        }
    }

    /// Every record of `kind`, decoded.
    pub fn every<T: DeserializeOwned + Send>(&self, kind: &str) -> Result<Vec<T>, ImageError> {
        let bodies: Vec<&[u8]> = self.records(kind).map(|(_, body)| body).collect();
        let decoded = |body| decode(body).map_err(|e| self.bad_record(kind, &e));
        match bodies.iter().map(|body| body.len()).sum() {
            0..MUCH => bodies.into_iter().map(decoded).collect(),
            _ => parallel::map(bodies, decoded).into_iter().collect(),
        }
    }

    /// The one record of `kind`, decoded.
    pub fn one<T: DeserializeOwned + Send>(&self, kind: &str) -> Result<T, ImageError> {
        let mut all = self.every(kind)?;
        match (all.pop(), all.len()) {
            (Some(record), 0) => Ok(record),
            (_, others) => Err(self.bad_record(kind, &format!("expected one, found {}", others + 1))),
        }
    }

    fn bad_record(&self, kind: &str, why: &str) -> ImageError {
        ImageError::damaged(&self.path.join("state"), format!("record {kind}: {why}"))
    }

    /// Some bulk bytes.
    pub fn read(&self, place: DataRef) -> Result<Vec<u8>, ImageError> {
        self.check_place(place)?;
        let mut bytes = vec![0; place.length as usize];
        self.read_at(place.offset, &mut bytes)?;
        Ok(bytes)
    }

    /// Some bulk bytes, in order, in pieces that stay in a core's cache: memory that was never touched is slow to fill.
    pub fn read_pieces<E: From<ImageError>>(
        &self,
        place: DataRef,
        mut take: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        const PIECE: u64 = 64 << 10;
        self.check_place(place)?;
        let mut piece = vec![0; place.length.min(PIECE) as usize];
        let mut done = 0;
        while done < place.length {
            let now = (place.length - done).min(PIECE);
            let piece = &mut piece[..now as usize];
            self.read_at(place.offset + done, piece)?;
            take(piece)?;
            done += now;
        }
        Ok(())
    }

    fn check_place(&self, place: DataRef) -> Result<(), ImageError> {
        let length = self.manifest.file("data").map_or(0, |f| f.length);
        if place.offset.checked_add(place.length).is_none_or(|end| end > length) {
            let what = format!("{} bytes at {} are referred to, it has {length}", place.length, place.offset);
            return Err(ImageError::damaged(&self.path.join("data"), what));
        }
        Ok(())
    }

    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<(), ImageError> {
        let failed = |e| ImageError::io("reading", &self.path.join("data"))(e);
        self.plain_data()?.read_exact_at(bytes, offset).map_err(failed)
    }

    /// The data as a plain file: a [`DataRef`]'s offset is an offset into it.
    pub fn data_file(&self) -> Result<BorrowedFd<'_>, ImageError> {
        Ok(self.plain_data()?.as_fd())
    }

    fn plain_data(&self) -> Result<&File, ImageError> {
        let path = self.path.join("data");
        let (entry, file) = self.files.iter().find(|f| f.0.name == "data").expect("checked when it was opened");
        if entry.compression == Compression::None {
            return Ok(file);
        }
        if let Some(plain) = self.plain.get() {
            return Ok(plain);
        }
        let mut plain = memory_file("zap-data").map_err(ImageError::io("unpacking", &path))?;
        let mut chunks = LayerReader::new(path.clone(), file, entry)?;
        io::copy(&mut chunks, &mut plain).map_err(ImageError::io("unpacking", &path))?;
        Ok(self.plain.get_or_init(|| plain))
    }

    /// The names of the archives.
    pub fn layers(&self) -> impl Iterator<Item = &str> {
        self.files.iter().filter_map(|(entry, _)| entry.name.strip_prefix("layer-"))
    }

    /// An archive, as it was written.
    pub fn layer(&self, name: &str) -> Result<LayerReader<'_>, ImageError> {
        let found = self.files.iter().find(|(entry, _)| entry.name.strip_prefix("layer-") == Some(name));
        let path = self.path.join(format!("layer-{name}"));
        match found {
            Some((entry, file)) => LayerReader::new(path, file, entry),
            None => Err(ImageError::damaged(&path, "it is missing")),
        }
    }

    /// Descriptors from which [`ImageReader::receive`] makes the same reader in a process that cannot see the path.
    pub fn share(&self) -> Result<Vec<OwnedFd>, ImageError> {
        let doing = ImageError::io("sharing", &self.path);
        let mut manifest = self.manifest.clone();
        let data = self.plain_data()?;
        for entry in manifest.files.iter_mut().filter(|f| f.name == "data" && f.compression != Compression::None) {
            // what is shared was verified here: the receiver has no use for checksums of the compressed form
            let chunks = entry.length.div_ceil(super::chunk::CHUNK as u64) as usize;
            *entry = FileEntry {
                compression: Compression::None,
                stored: Vec::new(),
                crc32: vec![0; chunks],
                ..entry.clone()
            };
        }
        let share = || -> io::Result<Vec<OwnedFd>> {
            let text = manifest.to_bytes();
            let mut head = memory_file("zap-state")?;
            head.write_all(&(text.len() as u64).to_le_bytes())?;
            head.write_all(&text)?;
            head.write_all(&self.state)?;
            let mut shared = vec![head.into()];
            for (entry, file) in &self.files {
                shared.push(if entry.name == "data" { data.try_clone()? } else { file.try_clone()? }.into());
            }
            Ok(shared)
        };
        share().map_err(doing)
    }

    /// The reader behind descriptors that [`ImageReader::share`] gave.
    pub fn receive(shared: Vec<OwnedFd>) -> Result<ImageReader, ImageError> {
        let path = PathBuf::from("image");
        let mut shared = shared.into_iter().map(File::from);
        let mut bytes = Vec::new();
        if let Some(mut head) = shared.next() {
            let read = head.seek(SeekFrom::Start(0)).and_then(|_| head.read_to_end(&mut bytes));
            read.map_err(ImageError::io("receiving", &path))?;
        }
        let cut = || ImageError::damaged(&path, "it was cut off on its way");
        let (length, rest) = bytes.split_first_chunk::<8>().ok_or_else(cut)?;
        let (text, state) = rest.split_at_checked(u64::from_le_bytes(*length) as usize).ok_or_else(cut)?;
        let manifest = Manifest::from_bytes(&path, text)?;
        let entries: Vec<FileEntry> = manifest.files.iter().filter(|f| f.name != "state").cloned().collect();
        let files: Vec<(FileEntry, File)> = entries.into_iter().zip(shared).collect();
        if files.len() + 1 != manifest.files.len() {
            return Err(cut());
        }
        Ok(ImageReader { path, state: state.to_vec(), manifest, files, plain: OnceLock::new() })
    }

    /// A reader of what a sink of no image has kept, without records: for tests of what goes into one.
    pub fn of_sink(sink: DataSink) -> io::Result<ImageReader> {
        let bytes = sink.into_pending();
        let mut file = memory_file("zap-data")?;
        let mut out = super::chunk::ChunkWriter::new(Out::File(file.try_clone()?), "data", Compression::None);
        out.append(&bytes)?;
        let (_, entry) = out.finish()?;
        file.rewind()?;
        let manifest = Manifest {
            id: String::new(),
            machine: std::env::consts::ARCH.into(),
            facts: serde_json::Value::Null,
            files: vec![entry.clone()],
        };
        let (path, plain) = (PathBuf::from("memory"), OnceLock::new());
        Ok(ImageReader { path, manifest, state: Vec::new(), files: vec![(entry, file)], plain })
    }
}

pub(super) fn memory_file(name: &str) -> io::Result<File> {
    Ok(File::from(memfd_create(name, MFdFlags::MFD_CLOEXEC)?))
}

fn refuse_strangers(path: &Path, manifest: &Manifest) -> Result<(), ImageError> {
    let entries = fs::read_dir(path).map_err(ImageError::io("listing", path))?;
    for entry in entries {
        let name = entry.map_err(ImageError::io("listing", path))?.file_name();
        let known = name == "manifest" || manifest.files.iter().any(|f| name == *f.name);
        if !known {
            return Err(ImageError::damaged(&path.join(name), "it is not part of the image"));
        }
    }
    Ok(())
}

fn read_state(path: &Path, file: &File, entry: &FileEntry) -> Result<Vec<u8>, ImageError> {
    verify(&[Stored { path: path.to_owned(), file, entry }])?;
    read_frames(path, file, entry)
}

/// The state, whose bytes were checked; each frame of it is checked too.
fn read_frames(path: &Path, file: &File, entry: &FileEntry) -> Result<Vec<u8>, ImageError> {
    let mut state = vec![0; entry.length as usize];
    file.read_exact_at(&mut state, 0).map_err(ImageError::io("reading", path))?;
    let mut rest = &state[..];
    while !rest.is_empty() {
        frame::pull(&mut rest).map_err(|what| ImageError::damaged(path, what))?;
    }
    Ok(state)
}

/// Reads an archive of an image from its beginning, unpacked.
pub struct LayerReader<'a> {
    path: PathBuf,
    file: &'a File,
    compression: Compression,
    places: std::vec::IntoIter<ChunkPlace>,
    chunk: Vec<u8>,
    done: usize,
}

impl<'a> LayerReader<'a> {
    fn new(path: PathBuf, file: &'a File, entry: &FileEntry) -> Result<LayerReader<'a>, ImageError> {
        let places = entry.chunks().map_err(|what| ImageError::damaged(&path, what))?.into_iter();
        Ok(LayerReader { path, file, compression: entry.compression, places, chunk: Vec::new(), done: 0 })
    }
}

impl Read for LayerReader<'_> {
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
