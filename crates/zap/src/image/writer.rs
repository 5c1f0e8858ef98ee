//! Writing an image: beside its name, under which it appears when it is complete.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::fcntl::{AT_FDCWD, Flock, FlockArg, RenameFlags, renameat2};
use serde::Serialize;

use super::chunk::{ChunkWriter, Compression, Out, Written};
use super::frame::{self, Record};
use super::inherit::{self, Contents, Parent, Stretches};
use super::manifest::Manifest;
use super::{DataSink, ImageError, PartSink, encode};
use crate::parallel;

/// An image that is being written. Dropped before [`ImageWriter::finish`], it leaves nothing.
pub struct ImageWriter {
    /// Bulk bytes.
    pub data: DataSink,
    state: Vec<u8>,
    layers: Vec<Written>,
    compression: Compression,
    parent: Option<Arc<Parent>>,
    home: Home,
    path: PathBuf,
}

/// Where an image comes into being.
enum Home {
    /// In a directory beside its name.
    Directory(Partial),
    /// Wherever somebody puts its parts together.
    Elsewhere(Arc<dyn PartSink>),
}

impl Home {
    fn file(&self, name: &str) -> Result<Out, ImageError> {
        match self {
            Home::Directory(partial) => partial.file(name).map(Out::File),
            Home::Elsewhere(sink) => {
                let part = sink.begin(name).map_err(ImageError::io("sending", Path::new(name)))?;
                Ok(Out::Elsewhere(sink.clone(), part))
            }
        }
    }

    fn whole(&self, name: &str, bytes: &[u8]) -> Result<Written, ImageError> {
        let mut out = ChunkWriter::new(self.file(name)?, name, Compression::None);
        let written = out.append(bytes).and_then(|()| out.finish());
        written.map_err(ImageError::io("writing", &self.place(name)))
    }

    /// For messages: where a file of the image is.
    fn place(&self, name: &str) -> PathBuf {
        match self {
            Home::Directory(partial) => partial.path.join(name),
            Home::Elsewhere(_) => PathBuf::from(name),
        }
    }
}

/// What was written, in bytes on disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// All of it.
    pub bytes: u64,
    /// The state.
    pub state_bytes: u64,
    /// Pages and other bulk bytes.
    pub data_bytes: u64,
    /// Archives of the upper layer and of tmpfs contents.
    pub layer_bytes: u64,
}

/// An archive that is being written into an image. [`ImageWriter::close_layer`] makes it part of it.
pub struct LayerWriter {
    out: ChunkWriter,
}

impl Write for LayerWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.out.append(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl ImageWriter {
    /// Starts an image that will appear at `path`, which must not exist.
    pub fn create(path: &Path, compression: Compression) -> Result<ImageWriter, ImageError> {
        ImageWriter::create_child(path, compression, None)
    }

    /// Likewise, but what the image at `parent` has already is not stored again.
    pub fn create_child(
        path: &Path,
        compression: Compression,
        parent: Option<&Path>,
    ) -> Result<ImageWriter, ImageError> {
        if fs::symlink_metadata(path).is_ok() {
            return Err(ImageError::Exists(path.to_owned()));
        }
        let parent = parent.map(Parent::open).transpose()?.map(Arc::new);
        ImageWriter::at(Home::Directory(Partial::create(path)?), path.to_owned(), compression, parent)
    }

    /// Starts an image whose parts are put together elsewhere. Nothing of it is compressed.
    pub fn sending(sink: Arc<dyn PartSink>) -> Result<ImageWriter, ImageError> {
        ImageWriter::at(Home::Elsewhere(sink), PathBuf::new(), Compression::None, None)
    }

    fn at(
        home: Home,
        path: PathBuf,
        compression: Compression,
        parent: Option<Arc<Parent>>,
    ) -> Result<ImageWriter, ImageError> {
        let data = ChunkWriter::new(home.file("data")?, "data", compression).child_of(parent.as_ref());
        let data = DataSink::new(data);
        Ok(ImageWriter { data, state: Vec::new(), layers: Vec::new(), compression, parent, home, path })
    }

    /// Adds a record of state. It stays in memory until the end.
    pub fn record(&mut self, kind: &str, version: u16, state: &impl Serialize) {
        frame::push(&mut self.state, Record { kind, version, body: &encode(state) });
    }

    /// Adds a record of each state, in their order; bulk bytes that wait are written meanwhile.
    pub fn records<T: Serialize + Sync>(&mut self, kind: &str, version: u16, states: &[T]) -> Result<(), ImageError> {
        /// Fewer are not worth another thread.
        const SOME: usize = 4;
        if states.len() < SOME {
            states.iter().for_each(|state| self.record(kind, version, state));
            return Ok(());
        }
        let data = &mut self.data;
        let (flushed, bodies) = std::thread::scope(|scope| {
            let flushing = scope.spawn(|| data.flush());
            let bodies = parallel::map(states.iter().collect(), encode);
            (flushing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), bodies)
        });
        flushed.map_err(ImageError::io("writing", &self.home.place("data")))?;
        bodies.iter().for_each(|body| frame::push(&mut self.state, Record { kind, version, body }));
        Ok(())
    }

    /// Starts an archive. Its name is plain: no slash.
    pub fn layer(&mut self, name: &str) -> Result<LayerWriter, ImageError> {
        let name = format!("layer-{name}");
        let out = ChunkWriter::new(self.home.file(&name)?, &name, self.compression);
        Ok(LayerWriter { out: out.child_of(self.parent.as_ref()) })
    }

    /// Ends an archive and makes it part of the image.
    pub fn close_layer(&mut self, layer: LayerWriter) -> Result<(), ImageError> {
        let closed = layer.out.finish().map_err(ImageError::io("writing", &self.path))?;
        self.layers.push(closed);
        Ok(())
    }

    /// Completes the image: writes what is pending, synchronises, and gives it its name. `facts` are for people to read.
    pub fn finish(self, facts: &impl Serialize) -> Result<Summary, ImageError> {
        let ImageWriter { data, mut state, layers, home, path, parent, .. } = self;
        let data = data.finish().map_err(ImageError::io("writing", &home.place("data")))?;
        let mut parts: Vec<Written> = data.into_iter().chain(layers).collect();
        let made_of = parts.iter_mut().filter_map(|part| Some((part.entry.name.clone(), part.contents.take()?)));
        let made_of: Stretches = made_of.map(|(name, contents)| (name, Contents::into_stretches(contents))).collect();
        if parent.is_some() {
            let body = encode(&made_of);
            frame::push(&mut state, Record { kind: inherit::KIND, version: inherit::VERSION, body: &body });
        }
        parts.insert(0, home.whole("state", &state)?);
        let manifest = Manifest {
            id: String::new(),
            machine: std::env::consts::ARCH.into(),
            facts: serde_json::to_value(facts).unwrap_or_default(),
            files: parts.iter().map(|part| part.entry.clone()).collect(),
            ancestors: parent.map(|parent| parent.ancestors.clone()).unwrap_or_default(),
        };
        let manifest = Manifest { id: content_id(&state, &manifest), ..manifest }.to_bytes();
        match home {
            Home::Elsewhere(sink) => {
                sink.complete(&manifest).map_err(ImageError::io("sending", Path::new("manifest")))?
            }
            Home::Directory(partial) => {
                let home = Home::Directory(partial);
                parts.push(home.whole("manifest", &manifest)?);
                for Written { out, entry, .. } in &parts {
                    out.sync().map_err(ImageError::io("synchronising", &home.place(&entry.name)))?;
                }
                if let Home::Directory(partial) = home {
                    partial.complete(&path)?;
                }
            }
        }
        Ok(summarize(&parts))
    }
}

fn content_id(state: &[u8], manifest: &Manifest) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(state);
    for ancestor in &manifest.ancestors {
        hasher.update(ancestor.id.as_bytes());
    }
    for file in &manifest.files {
        hasher.update(file.name.as_bytes());
        for sum in &file.crc32 {
            hasher.update(&sum.to_le_bytes());
        }
    }
    hasher.finalize().to_hex().to_string()
}

fn summarize(parts: &[Written]) -> Summary {
    let mut summary = Summary::default();
    for Written { entry, .. } in parts {
        let bytes = entry.stored_length();
        summary.bytes += bytes;
        match &*entry.name {
            "state" => summary.state_bytes += bytes,
            "data" => summary.data_bytes += bytes,
            "manifest" => {}
            _ => summary.layer_bytes += bytes,
        }
    }
    summary
}

/// The directory in which an image is written, locked while we live; removed when dropped.
struct Partial {
    path: PathBuf,
    lock: Option<Flock<File>>,
}

impl Partial {
    fn create(image: &Path) -> Result<Partial, ImageError> {
        let prefix = prefix_of(image).ok_or_else(|| ImageError::Exists(image.to_owned()))?;
        let parent = parent_of(image);
        remove_orphans(parent, &prefix);
        let path = parent.join(format!("{prefix}{}", std::process::id()));
        fs::DirBuilder::new().mode(0o700).create(&path).map_err(ImageError::io("making", &path))?;
        let mut partial = Partial { path, lock: None };
        let directory = File::open(&partial.path).map_err(ImageError::io("opening", &partial.path))?;
        let lock = Flock::lock(directory, FlockArg::LockExclusiveNonblock).map_err(|(_, e)| e.into());
        partial.lock = Some(lock.map_err(ImageError::io("locking", &partial.path))?);
        Ok(partial)
    }

    fn file(&self, name: &str) -> Result<File, ImageError> {
        let path = self.path.join(name);
        let opened = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path);
        opened.map_err(ImageError::io("making", &path))
    }

    fn complete(mut self, image: &Path) -> Result<(), ImageError> {
        let parent = parent_of(image);
        if let Some(lock) = &self.lock {
            lock.sync_all().map_err(ImageError::io("synchronising", &self.path))?;
        }
        rename_to_new(&self.path, image)?;
        // the partial has become the image: nothing is left to remove
        self.path = PathBuf::new();
        let synced = File::open(parent).and_then(|p| p.sync_all());
        synced.map_err(ImageError::io("synchronising", parent))
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.path.as_os_str().is_empty() {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

fn parent_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn rename_to_new(from: &Path, to: &Path) -> Result<(), ImageError> {
    use nix::errno::Errno;
    match renameat2(AT_FDCWD, from, AT_FDCWD, to, RenameFlags::RENAME_NOREPLACE) {
        Ok(()) => Ok(()),
        Err(Errno::EEXIST) => Err(ImageError::Exists(to.to_owned())),
        // a file system without the flag: a directory never replaces anything but an empty directory
        Err(Errno::EINVAL) => fs::rename(from, to).map_err(ImageError::io("naming", to)),
        Err(error) => Err(ImageError::io("naming", to)(error.into())),
    }
}

/// What the names of directories begin with in which an image is written.
fn prefix_of(image: &Path) -> Option<String> {
    Some(format!(".{}.partial-", image.file_name()?.to_string_lossy()))
}

/// Removes what writers of an image left that were killed.
pub fn remove_partials(image: &Path) {
    if let Some(prefix) = prefix_of(image) {
        remove_orphans(parent_of(image), &prefix);
    }
}

/// Removes what writers of the same image left that were killed: whoever lives holds a lock.
fn remove_orphans(parent: &Path, prefix: &str) {
    let Ok(entries) = fs::read_dir(parent) else { return };
    for entry in entries.flatten().filter(|e| e.file_name().to_string_lossy().starts_with(prefix)) {
        let locked = File::open(entry.path()).map(|d| Flock::lock(d, FlockArg::LockExclusiveNonblock));
        if let Ok(Ok(_lock)) = locked {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}
