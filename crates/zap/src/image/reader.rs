//! Reading an image. Everything is open and in memory after [`ImageReader::open`]: no path is needed any more.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use serde::de::DeserializeOwned;

use super::chunk::{CHUNK, Compression, FileEntry, Out};
use super::frame::{self, Record};
use super::inherit::{self, Ancestor, Contents, Stretches};
use super::manifest::Manifest;
use super::stored::{Chunks, Stored, Whole, gathered, memory_file};
use super::verify::{Stored as OnDisk, verify};
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
    files: Vec<Stored>,
    /// The images that `manifest.ancestors` speaks of, each without ancestors of its own: what they store is what counts.
    ancestors: Vec<ImageReader>,
    /// All of the data, where it is not a plain file.
    plain: OnceLock<File>,
    /// The data is in a store, and has not been checked.
    stored: bool,
}

/// The data of an image that is in a store: checked as it is read.
pub struct StoredData {
    path: PathBuf,
    file: File,
    entry: FileEntry,
}

impl StoredData {
    /// What is in that file, of which `entry` has the checksums.
    pub(crate) fn of(file: File, entry: FileEntry) -> StoredData {
        StoredData { path: PathBuf::from("the store"), file, entry }
    }

    /// The file, and its checksums.
    pub(crate) fn parts(&self) -> (BorrowedFd<'_>, &FileEntry) {
        (self.file.as_fd(), &self.entry)
    }

    /// The offsets that are read and checked together with this one.
    pub fn chunk_around(&self, offset: u64) -> Range<u64> {
        let start = offset / CHUNK as u64 * CHUNK as u64;
        start..(start + CHUNK as u64).min(self.entry.length)
    }

    /// What is in the chunk that begins at this offset.
    pub fn read_chunk(&self, start: u64) -> io::Result<Vec<u8>> {
        let range = self.chunk_around(start);
        let mut bytes = vec![0; (range.end - range.start) as usize];
        self.file.read_exact_at(&mut bytes, range.start)?;
        if self.entry.crc32.get(start as usize / CHUNK) != Some(&crc32fast::hash(&bytes)) {
            return Err(io::Error::other(format!("{}: the MiB at byte {start} is damaged", self.path.display())));
        }
        Ok(bytes)
    }
}

impl ImageReader {
    /// Opens the image at `path`, and those that it was written relative to; checks the manifest, that nothing is missing
    /// or too much, and the state.
    pub fn open(path: &Path) -> Result<ImageReader, ImageError> {
        let mut image = ImageReader::open_alone(path)?;
        for ancestor in &image.manifest.ancestors {
            let missing =
                || ImageError::Orphan { path: path.to_owned(), id: ancestor.id.clone(), was: ancestor.path.clone() };
            let found = inherit::find(ancestor, path).ok_or_else(missing)?;
            image.ancestors.push(ImageReader::open_alone(&found)?);
        }
        image.inherit()?;
        Ok(image)
    }

    /// Puts the files together from what this image and its ancestors store.
    fn inherit(&mut self) -> Result<(), ImageError> {
        if self.ancestors.is_empty() {
            return Ok(());
        }
        let all: Stretches = self.one(inherit::KIND)?;
        for (name, stretches) in all {
            let stored = |image: u16| match image {
                0 => self.manifest.file(&name).map(|file| file.length),
                older => self.ancestors.get(usize::from(older) - 1)?.manifest.file(&name).map(|file| file.length),
            };
            let wrong = |what| self.bad_record(inherit::KIND, &format!("{name} has {what}, which are not there"));
            let contents = Contents::checked(stretches, stored).map_err(wrong)?;
            let file = self.files.iter_mut().find(|file| file.entry.name == name);
            let Some(file) = file else { return Err(self.bad_record(inherit::KIND, &format!("it has no {name}"))) };
            file.contents = contents;
        }
        Ok(())
    }

    fn open_alone(path: &Path) -> Result<ImageReader, ImageError> {
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
                _ => files.push(Stored::new(entry.clone(), file)),
            }
        }
        let state = state.ok_or_else(|| ImageError::damaged(&at, "it names no state"))?;
        ImageReader::assemble(path, manifest, state, files)
    }

    fn assemble(
        path: &Path,
        manifest: Manifest,
        state: Vec<u8>,
        files: Vec<Stored>,
    ) -> Result<ImageReader, ImageError> {
        if manifest.file("data").is_none() {
            return Err(ImageError::damaged(path, "it names no data"));
        }
        let (path, ancestors, plain) = (path.to_owned(), Vec::new(), OnceLock::new());
        Ok(ImageReader { path, manifest, state, files, ancestors, plain, stored: false })
    }

    /// An image whose files, of which `manifest` speaks, are open and checked already, but for data that is `stored`.
    pub(super) fn of_files(
        path: &Path,
        manifest: Manifest,
        mut files: Vec<(FileEntry, File)>,
        stored: bool,
    ) -> Result<ImageReader, ImageError> {
        if !manifest.ancestors.is_empty() {
            return Err(ImageError::damaged(path, "parts of it are in another image"));
        }
        let state = files.iter().position(|(entry, _)| entry.name == "state");
        let state = state.ok_or_else(|| ImageError::damaged(path, "it names no state"))?;
        let (entry, file) = files.remove(state);
        let state = read_frames(path, &file, &entry)?;
        let files = files.into_iter().map(|(entry, file)| Stored::new(entry, file)).collect();
        let whole = ImageReader::assemble(path, manifest, state, files)?;
        Ok(ImageReader { stored, ..whole })
    }

    /// Checks every byte of the data.
    pub fn verify_data(&self) -> Result<(), ImageError> {
        self.verify_files(|name| name == "data")
    }

    /// Checks data that is in a store, but for what lies `later` altogether.
    pub fn verify_stored(&self, later: &[Range<u64>]) -> Result<(), ImageError> {
        if !self.stored {
            return Ok(());
        }
        let mut later = later.to_vec();
        later.sort_by_key(|range| range.start);
        let data = self.stored_data()?;
        let mut behind = 0;
        let mut wanted = Vec::new();
        for range in later.iter().chain(std::iter::once(&(data.entry.length..data.entry.length))) {
            // Every chunk that has something of the gap before this range.
            if behind < range.start {
                let first = (behind / CHUNK as u64).max(wanted.last().map_or(0, |last| last + 1));
                wanted.extend(first..range.start.div_ceil(CHUNK as u64));
            }
            behind = behind.max(range.end);
        }
        let check = |chunk: u64| data.read_chunk(chunk * CHUNK as u64).map(drop);
        let checked: io::Result<Vec<()>> = parallel::map(wanted, check).into_iter().collect();
        checked.map(drop).map_err(|e| ImageError::damaged(&self.path, e.to_string()))
    }

    /// The data, to be read and checked bit by bit.
    pub fn stored_data(&self) -> Result<StoredData, ImageError> {
        let path = self.path.join("data");
        let stored = self.file("data").expect("checked when it was opened");
        let file = stored.file.try_clone().map_err(ImageError::io("sharing", &path))?;
        Ok(StoredData { path, file, entry: stored.entry.clone() })
    }

    /// Whether the data is in a store.
    pub fn is_stored(&self) -> bool {
        self.stored
    }

    /// Checks every byte of the layers.
    pub fn verify_layers(&self) -> Result<(), ImageError> {
        self.verify_files(|name| name != "data")
    }

    fn verify_files(&self, which: impl Fn(&str) -> bool) -> Result<(), ImageError> {
        let images = std::iter::once(self).chain(&self.ancestors);
        let files = images.flat_map(|image| image.files.iter().map(move |file| (&image.path, file)));
        let wanted = files.filter(|(_, file)| which(&file.entry.name));
        let jobs =
            wanted.map(|(path, Stored { file, entry, .. })| OnDisk { path: path.join(&entry.name), file, entry });
        verify(&jobs.collect::<Vec<_>>())
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The content id: what a child image names its parent by.
    pub fn id(&self) -> &str {
        &self.manifest.id
    }

    /// The images in which parts of this one are stored, the parent first.
    pub(super) fn ancestors(&self) -> impl Iterator<Item = &Ancestor> {
        self.manifest.ancestors.iter()
    }

    /// The content id of the image that this one was written relative to, and where that was.
    pub fn parent(&self) -> Option<(&str, &Path)> {
        self.manifest.ancestors.first().map(|parent| (&*parent.id, &*parent.path))
    }

    /// What the writer wanted people to read.
    pub fn facts(&self) -> &serde_json::Value {
        &self.manifest.facts
    }

    /// Name, bytes on disk, and bytes that they and those of its ancestors are, of every file but the manifest.
    pub fn parts(&self) -> impl Iterator<Item = (&str, u64, u64)> {
        let whole = |f: &FileEntry| self.file(&f.name).map_or(f.length, |file| file.contents.length());
        self.manifest.files.iter().map(move |f| (&*f.name, f.stored_length(), whole(f)))
    }

    fn file(&self, name: &str) -> Option<&Stored> {
        self.files.iter().find(|file| file.entry.name == name)
    }

    /// What the file of that name is made of: of nothing, if there is none.
    pub(super) fn contents_of(&self, name: &str) -> Contents {
        self.file(name).map(|file| file.contents.clone()).unwrap_or_default()
    }

    /// The contents of the file of that name, from a place on.
    pub(super) fn contents_from(&self, name: &str, at: u64) -> Result<Whole<'_>, ImageError> {
        let missing = || ImageError::damaged(&self.path.join(name), "it is missing");
        let contents = &self.file(name).ok_or_else(missing)?.contents;
        let image = std::iter::once(self).chain(&self.ancestors);
        let stored = image.map(|image| image.file(name).map(|file| file.unpacked(&image.path)).transpose());
        Ok(Whole { contents, stored: stored.collect::<Result<_, _>>()?, at })
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
        let own = [(inherit::KIND, inherit::VERSION)];
        let stranger = self
            .all()
            .find(|r| !known.iter().chain(&own).any(|(kind, version)| r.kind == *kind && r.version <= *version));
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
        let length = self.file("data").map_or(0, |file| file.contents.length());
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

    /// Whether the data is stored in one file, as it is.
    pub fn is_plain(&self) -> bool {
        self.file("data").is_some_and(Stored::is_plain)
    }

    /// The data as a plain file: a [`DataRef`]'s offset is an offset into it.
    pub fn data_file(&self) -> Result<BorrowedFd<'_>, ImageError> {
        Ok(self.plain_data()?.as_fd())
    }

    fn plain_data(&self) -> Result<&File, ImageError> {
        let data = self.file("data").expect("checked when it was opened");
        if data.is_plain() {
            return Ok(&data.file);
        }
        if let Some(plain) = self.plain.get() {
            return Ok(plain);
        }
        let plain = self.gather(data)?;
        Ok(self.plain.get_or_init(|| plain))
    }

    /// All of a file's contents.
    fn gather(&self, stored: &Stored) -> Result<File, ImageError> {
        let path = self.path.join(&stored.entry.name);
        let failed = ImageError::io("unpacking", &path);
        match self.ancestors.is_empty() {
            true => gathered(&mut Chunks::new(path.clone(), &stored.file, &stored.entry)?).map_err(failed),
            false => gathered(&mut self.contents_from(&stored.entry.name, 0)?).map_err(failed),
        }
    }

    /// The names of the archives.
    pub fn layers(&self) -> impl Iterator<Item = &str> {
        self.files.iter().filter_map(|file| file.entry.name.strip_prefix("layer-"))
    }

    /// An archive, as it was written.
    pub fn layer(&self, name: &str) -> Result<LayerReader<'_>, ImageError> {
        let name = format!("layer-{name}");
        let path = self.path.join(&name);
        let Some(file) = self.file(&name) else { return Err(ImageError::damaged(&path, "it is missing")) };
        if self.ancestors.is_empty() {
            return Ok(LayerReader(Box::new(Chunks::new(path, &file.file, &file.entry)?)));
        }
        let whole = self.contents_from(&name, 0)?;
        Ok(LayerReader(Box::new(io::BufReader::with_capacity(super::chunk::CHUNK, whole))))
    }

    /// Descriptors from which [`ImageReader::receive`] makes the same reader in a process that cannot see the path.
    pub fn share(&self) -> Result<Vec<OwnedFd>, ImageError> {
        // what is shared was verified here: the receiver has no use for checksums of another form of it
        let plain_entry = |stored: &Stored| {
            let length = stored.contents.length();
            let crc32 = vec![0; length.div_ceil(super::chunk::CHUNK as u64) as usize];
            FileEntry { length, compression: Compression::None, stored: Vec::new(), crc32, ..stored.entry.clone() }
        };
        let mut manifest = self.manifest.clone();
        manifest.ancestors.clear();
        let mut files = Vec::new();
        for stored in &self.files {
            let name = &stored.entry.name;
            let as_it_is = stored.is_plain() || (name != "data" && self.ancestors.is_empty());
            let file = match &**name {
                "data" => self.plain_data()?.try_clone(),
                _ if as_it_is => stored.file.try_clone(),
                _ => Ok(self.gather(stored)?),
            };
            files.push(file.map_err(ImageError::io("sharing", &self.path))?);
            if let (Some(entry), false) = (manifest.files.iter_mut().find(|entry| entry.name == *name), as_it_is) {
                *entry = plain_entry(stored);
            }
        }
        let head = || -> io::Result<File> {
            let text = manifest.to_bytes();
            let mut head = memory_file("zap-state")?;
            head.write_all(&(text.len() as u64).to_le_bytes())?;
            head.write_all(&text)?;
            head.write_all(&self.state)?;
            Ok(head)
        };
        let head = head().map_err(ImageError::io("sharing", &self.path))?;
        Ok(std::iter::once(head).chain(files).map(OwnedFd::from).collect())
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
        let files: Vec<Stored> =
            entries.into_iter().zip(shared).map(|(entry, file)| Stored::new(entry, file)).collect();
        if files.len() + 1 != manifest.files.len() {
            return Err(cut());
        }
        ImageReader::assemble(&path, manifest, state.to_vec(), files)
    }

    /// A reader of what a sink of no image has kept, without records: for tests of what goes into one.
    pub fn of_sink(sink: DataSink) -> io::Result<ImageReader> {
        let bytes = sink.into_pending();
        let mut file = memory_file("zap-data")?;
        let mut out = super::chunk::ChunkWriter::new(Out::File(file.try_clone()?), "data", Compression::None);
        out.append(&bytes)?;
        let entry = out.finish()?.entry;
        file.rewind()?;
        let manifest = Manifest {
            id: String::new(),
            machine: std::env::consts::ARCH.into(),
            facts: serde_json::Value::Null,
            files: vec![entry.clone()],
            ancestors: Vec::new(),
        };
        let files = vec![Stored::new(entry, file)];
        ImageReader::assemble(Path::new("memory"), manifest, Vec::new(), files).map_err(io::Error::other)
    }
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
    verify(&[OnDisk { path: path.to_owned(), file, entry }])?;
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
pub struct LayerReader<'a>(Box<dyn Read + 'a>);

impl Read for LayerReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}
