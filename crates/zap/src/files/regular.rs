//! Regular files: by path where the path leads to the same file after a restart, by contents where it does not.

use std::os::fd::OwnedFd;
use std::path::Path;

use nix::unistd::{Whence, lseek};
use serde::{Deserialize, Serialize};

use super::mounts::{Origin, origin};
use super::unlinked::{self, UnlinkedState};
use super::{Contents, Descriptor, FileIdentity, FileKind, FileState, decoded, identity, reopen};
use crate::error::{CaptureError, Context, RebuildError};
use crate::ids::FileId;
use crate::image::encode;
use crate::look::Look;
use crate::rebuild::Rebuild;

/// An open regular file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegularState {
    /// The path in the pod; for a file without a name, the last one it had.
    #[serde(with = "serde_bytes")]
    pub path: Vec<u8>,
    /// Access mode and status flags.
    pub flags: i32,
    /// The offset.
    pub position: u64,
    /// Where its contents come from at a restart.
    pub source: Source,
}

/// Where the contents of a regular file come from at a restart.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Source {
    /// A layer of the image, or a file system of the kernel's own: it is there under its path.
    Path,
    /// A bind mount: whatever is there under its path.
    External,
    /// The root of the pod, which must not have changed.
    Root(FileIdentity),
    /// The root, or the image where the root has changed.
    Carried(FileIdentity, Contents),
    /// It has no name under which it could be found.
    Unlinked(UnlinkedState),
}

pub(super) struct Regular;

/// Links of files that look like paths but belong to memory.
const OF_MEMORY: [&[u8]; 5] = [b"/memfd:", b"/SYSV", b"/dev/zero (deleted)", b"/anon_hugepage", b"/secretmem"];

impl FileKind for Regular {
    fn name(&self) -> &'static str {
        "regular"
    }

    fn recognizes(&self, descriptor: &Descriptor) -> bool {
        descriptor.stat.st_mode & libc::S_IFMT == libc::S_IFREG
            && descriptor.link.starts_with(b"/")
            && !OF_MEMORY.iter().any(|m| descriptor.link.starts_with(m))
            && !super::of_proc(descriptor)
    }

    fn capture(&self, look: &mut Look<'_>, descriptor: &Descriptor) -> Result<Vec<u8>, CaptureError> {
        let (path, source) = source(look, descriptor)?;
        Ok(encode(&RegularState { path, flags: descriptor.flags(), position: descriptor.position(), source }))
    }

    fn open(&self, rebuild: &mut Rebuild<'_>, _id: FileId, state: &[u8]) -> Result<OwnedFd, RebuildError> {
        let state: RegularState = decoded(state)?;
        let file = open(rebuild, &state)?;
        if state.position != 0 && state.position != lseek(&file, 0, Whence::SeekCur).unwrap_or(-1) as u64 {
            let shown = reopen::as_path(&state.path).display();
            lseek(&file, state.position as i64, Whence::SeekSet).rebuilding("seeking in", shown)?;
        }
        Ok(file)
    }
}

/// The path of a file, and where its contents come from.
fn source(look: &mut Look<'_>, descriptor: &Descriptor) -> Result<(Vec<u8>, Source), CaptureError> {
    let named = unlinked::is_named(look, descriptor, &descriptor.link);
    if !named {
        let Some(path) = descriptor.link.strip_suffix(b" (deleted)") else {
            return Err(descriptor.refuse("is hidden by another file or mount, so that a restart could not find it"));
        };
        let state = unlinked::capture(look, descriptor, path)?;
        return Ok((path.to_vec(), Source::Unlinked(state)));
    }
    let path = descriptor.link.clone();
    let source = match origin(look, descriptor, reopen::as_path(&path))? {
        Origin::Layer | Origin::Kernel => Source::Path,
        Origin::External => Source::External,
        Origin::Lower => lower(look, descriptor, &path)?,
        Origin::Unknown(what) => return Err(descriptor.refuse(format!("is on {what}, which does not travel with a pod"))),
    };
    Ok((path, source))
}

fn lower(look: &mut Look<'_>, descriptor: &Descriptor, path: &[u8]) -> Result<Source, CaptureError> {
    let here = identity::in_root(&look.spec.root, path);
    let size = descriptor.stat.st_size as u64;
    match identity::identity_of(&here) {
        Ok(found) if found.size == size && !look.carry_files => Ok(Source::Root(found)),
        // Not under its path on the host, or asked to be carried.
        found => {
            let reader = reopen::again(descriptor, libc::O_RDONLY).capturing("opening", descriptor.object())?;
            let contents = Contents::take(&reader, size, look.data).capturing("reading", descriptor.object())?;
            let other = FileIdentity { size, blake3: [0; 32] };
            Ok(Source::Carried(found.unwrap_or(other), contents))
        }
    }
}

/// Computes, while the pod runs, what a capture of `descriptor` will ask for.
pub(super) fn look_ahead(look: &mut Look<'_>, descriptor: &Descriptor) -> Result<(), CaptureError> {
    let path = reopen::as_path(&descriptor.link);
    if unlinked::is_named(look, descriptor, &descriptor.link) && origin(look, descriptor, path)? == Origin::Lower {
        // Whatever is wrong with the file is for the capture to say.
        identity::identity_of(&identity::in_root(&look.spec.root, &descriptor.link)).ok();
    }
    Ok(())
}

fn open(rebuild: &mut Rebuild<'_>, state: &RegularState) -> Result<OwnedFd, RebuildError> {
    let path = reopen::as_path(&state.path);
    match &state.source {
        Source::Unlinked(file) => return unlinked::open(rebuild, &state.path, state.flags, file),
        Source::Carried(identity, contents) if identity::verify(Path::new("/"), &state.path, identity).is_err() => {
            let written = std::fs::File::create(path).rebuilding("creating", path.display())?;
            contents.put(&written, rebuild.image).rebuilding("writing", path.display())?;
        }
        _ => {}
    }
    let file = reopen::path(path, state.flags).map_err(|e| gone(path, e))?;
    if let Source::Root(expected) = &state.source {
        let size = crate::sys::file::fstat(&file).rebuilding("looking at", path.display())?.st_size as u64;
        if size != expected.size {
            let what = format!("it has {size} bytes, not {}", expected.size);
            return Err(RebuildError::Changed { path: path.display().to_string(), what });
        }
    }
    Ok(file)
}

fn gone(path: &Path, error: nix::Error) -> RebuildError {
    let (path, what) = (path.display().to_string(), "it is gone".to_owned());
    match error {
        nix::Error::ENOENT => RebuildError::Changed { path, what },
        other => RebuildError::Kernel { step: "opening", object: path, source: other.into() },
    }
}

/// Refuses a root whose files are not what the open files of an image need. For the monitor, before anything is made.
pub fn verify_root<'s>(root: &Path, states: impl IntoIterator<Item = &'s FileState>) -> Result<(), RebuildError> {
    for state in states.into_iter().filter(|s| s.kind == Regular.name()) {
        let state: RegularState = decoded(&state.state)?;
        if let Source::Root(expected) = &state.source {
            identity::verify(root, &state.path, expected)?;
        }
    }
    Ok(())
}
