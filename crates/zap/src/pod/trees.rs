//! The directory trees of a pod that travel in its images: the upper layers of its overlays, and its tmpfs mounts.

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::{CaptureError, Context, RebuildError};
use crate::ids::{FileId, HostPid};
use crate::image::{ImageError, ImageReader, ImageWriter, LayerWriter, Room};
use crate::layer::{self, Index, Inodes};
use crate::look::Look;
use crate::memory::{Backing, MemoryState, VmaState};
use crate::mounts::{self, Fresh, Home, Nests};
use crate::pod::{LivePod, rootfs};

/// The archive of the upper layers.
const UPPER: &str = "upper";

/// The archive of a tmpfs mount: `/dev/shm` is `tmpfs-dev-shm`.
fn archive_of(mount: &str) -> String {
    format!("tmpfs{}", mount.replace('/', "-"))
}

fn inside(init: HostPid, mount: &str) -> PathBuf {
    init.proc("root").join(mount.trim_start_matches('/'))
}

/// A tree of which a copy was taken while the pod ran.
struct Tree {
    top: PathBuf,
    archive: Archive,
    index: Index,
    /// What keeps a tmpfs in sight that the pod was born with, if something was mounted in it.
    #[allow(dead_code)]
    bare: Option<OwnedFd>,
    /// Of a tmpfs that was made inside the pod: its device, the name of its archive, and what keeps it in sight.
    fresh: Option<(Vec<u8>, String, OwnedFd)>,
}

impl Tree {
    /// Packs a tree, and what changes in the meantime as long as that is much.
    fn pack(top: PathBuf, out: LayerWriter) -> Result<Tree, TreesError> {
        const MUCH: u64 = 8 << 20;
        const ROUNDS: usize = 4;
        let mut archive = Archive { out, gathered: Vec::new(), gathers: false, room: Room::default() };
        let mut index = layer::pack(&top, &mut archive)?;
        for _ in 0..ROUNDS {
            if !index.has_large() || layer::follow(&top, &mut index, &mut archive)? < MUCH {
                break;
            }
        }
        Ok(Tree { top, archive, index, bare: None, fresh: None })
    }
}

/// An archive on its way into an image.
struct Archive {
    out: LayerWriter,
    /// What was packed with the pod held: it stays in memory until the pod runs again, as long as there is room.
    gathered: Vec<Vec<u8>>,
    gathers: bool,
    room: Room,
}

impl Archive {
    fn write_gathered(&mut self) -> io::Result<()> {
        self.gathered.drain(..).try_for_each(|piece| self.out.write_all(&piece))
    }
}

impl Write for Archive {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        const PIECE: usize = 1 << 20;
        if !self.gathers {
            return self.out.write(bytes);
        }
        match self.gathered.last_mut().filter(|piece| piece.capacity() - piece.len() >= bytes.len()) {
            Some(piece) => piece.extend_from_slice(bytes),
            None => {
                let mut piece = Vec::with_capacity(PIECE.max(bytes.len()));
                piece.extend_from_slice(bytes);
                self.gathered.push(piece);
            }
        }
        if self.room.is_scarce_after(bytes.len() as u64) {
            self.write_gathered()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The trees of a pod on their way into an image.
pub struct Trees(Vec<Tree>);

/// Why a tree could not be written down.
#[derive(Debug, thiserror::Error)]
pub enum TreesError {
    /// It could not be read.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// It could not be written.
    #[error(transparent)]
    Image(#[from] ImageError),
}

impl Trees {
    /// Copies everything while the pod runs.
    pub fn look_ahead(pod: &LivePod, writer: &mut ImageWriter, nests: &Nests) -> Result<Trees, TreesError> {
        let mut trees = vec![Tree::pack(pod.upper(), writer.layer(UPPER)?)?];
        for mount in rootfs::tmpfs_mounts() {
            let bare = mounts::bare(&pod.spec, pod.init, &pod.mounts_file(), mount)?;
            let top = bare.as_ref().map_or_else(|| inside(pod.init, mount), mounts::path_of);
            let tree = Tree::pack(top, writer.layer(&archive_of(mount))?)?;
            trees.push(Tree { bare, ..tree });
        }
        let home = Home::look(&pod.spec, pod.init, &pod.mounts_file())?;
        let made = mounts::fresh(&pod.spec, pod.init, &pod.mounts_file())?;
        for Fresh { device, archive: name, top: view } in made.into_iter().chain(nests.fresh(&home)?) {
            let tree = Tree::pack(mounts::path_of(&view), writer.layer(&name)?)?;
            trees.push(Tree { fresh: Some((device, name, view)), ..tree });
        }
        let trees = Trees(trees);
        // What cannot be made again is refused ahead.
        mounts::capture(&pod.spec, pod.init, &pod.mounts_file(), &trees.fresh())?;
        nests.states(pod.init, &home, &trees.fresh())?;
        Ok(trees)
    }

    /// The tmpfs mounts that were made inside the pod: device, and the name of the archive.
    pub fn fresh(&self) -> Vec<(Vec<u8>, String)> {
        let fresh = self.0.iter().filter_map(|tree| tree.fresh.as_ref());
        fresh.map(|(device, archive, _)| (device.clone(), archive.clone())).collect()
    }

    /// With the pod held: what changed since. `always` are files that may have changed without a trace
    /// ([`mapped_for_writing`]).
    pub fn catch_up(&mut self, always: &Inodes) -> Result<(), CaptureError> {
        for tree in &mut self.0 {
            tree.archive.gathers = true;
            layer::pack_changes(&tree.top, std::mem::take(&mut tree.index), always, &mut tree.archive)?;
        }
        Ok(())
    }

    /// Writes what changed, and makes the archives part of the image.
    pub fn finish(self, writer: &mut ImageWriter) -> Result<(), TreesError> {
        for mut tree in self.0 {
            tree.archive.write_gathered().capturing("writing the changes of", tree.top.display())?;
            writer.close_layer(tree.archive.out)?;
        }
        Ok(())
    }
}

/// The files that somebody has mapped shared and writable, by device and inode as they are in the trees: writing through
/// a mapping need not change a file's times.
pub fn mapped_for_writing<'s>(pod: &LivePod, look: &Look<'_>, memory: impl Iterator<Item = &'s MemoryState>) -> Inodes {
    let writable = |vma: &&VmaState| vma.protection & libc::PROT_WRITE != 0;
    let shared = |vma: &VmaState| match vma.backing {
        Backing::Shared { file, .. } => Some(file),
        _ => None,
    };
    let files: BTreeSet<FileId> =
        memory.flat_map(|memory| memory.vmas.iter().filter(writable).filter_map(shared)).collect();
    let mut inodes = Inodes::new();
    for file in files.into_iter().filter_map(|id| look.files.file(id)) {
        // Of a mount of the pod's own it may be the file itself.
        inodes.extend(crate::sys::file::fstat(&*file).map(|found| (found.st_dev, found.st_ino)));
        let Ok(path) = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())) else { continue };
        let places = path.ancestors().skip(1).filter_map(|mount| {
            let layer = pod.upper().join(rootfs::layer_name(mount));
            Some(layer.join(path.strip_prefix(mount).ok()?))
        });
        for place in places.chain([pod.path(&path.to_string_lossy())]) {
            inodes.extend(std::fs::symlink_metadata(place).map(|found| (found.dev(), found.ino())));
        }
    }
    inodes
}

/// Unpacks the upper layers, before they are mounted.
pub fn unpack_upper(image: &ImageReader, into: &Path) -> Result<(), RebuildError> {
    unpack(image, UPPER, into)
}

/// Unpacks what was in the tmpfs mounts.
pub fn unpack_tmpfs(image: &ImageReader, init: HostPid) -> Result<(), RebuildError> {
    rootfs::tmpfs_mounts().iter().try_for_each(|mount| unpack(image, &archive_of(mount), &inside(init, mount)))
}

fn unpack(image: &ImageReader, name: &str, into: &Path) -> Result<(), RebuildError> {
    let mut archive = image.layer(name).map_err(|e| RebuildError::Damaged(e.to_string()))?;
    layer::unpack(&mut archive, into)
}
