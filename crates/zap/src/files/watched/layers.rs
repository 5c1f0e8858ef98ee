//! Handles of an overlay's files: each is the handle of the file in the layer that it comes from.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::files::mounts::Mount;
use crate::files::reopen;
use crate::sys::file::fstat;
use crate::sys::watch::{self, Handle};

/// `OVL_FILEID_V1`: three bytes of padding come first.
const OVERLAY: i32 = 0xf8;
const PADDING: usize = 3;
/// `struct ovl_fb`: version, magic, length, flags, type, UUID; the handle itself is behind.
const HEAD: usize = 21;
const MAGIC: u8 = 0xfb;
/// `OVL_FH_FLAG_PATH_UPPER`.
const OF_UPPER: u8 = 4;

/// What a handle leads to.
pub(super) enum Decoded<P> {
    /// A path.
    Path(P),
    /// A file that has no name any more.
    Nameless,
    /// Nothing: the file is gone.
    Stale,
    /// The file system cannot tell.
    Unable,
}

impl<P> Decoded<P> {
    pub(super) fn path(self) -> Option<P> {
        match self {
            Decoded::Path(path) => Some(path),
            _ => None,
        }
    }

    pub(super) fn and_then<Q>(self, then: impl FnOnce(P) -> Option<Q>) -> Decoded<Q> {
        match self {
            Decoded::Path(path) => then(path).map_or(Decoded::Unable, Decoded::Path),
            Decoded::Nameless => Decoded::Nameless,
            Decoded::Stale => Decoded::Stale,
            Decoded::Unable => Decoded::Unable,
        }
    }
}

/// Opens a handle on the file system of the directory `top`; the path is as those name it who see the directory.
pub(super) fn decode(top: &OwnedFd, handle: &Handle) -> io::Result<Decoded<PathBuf>> {
    let file = match watch::open_by_handle(top, handle) {
        Ok(file) => file,
        Err(error) if error.raw_os_error() == Some(libc::ESTALE) => return Ok(Decoded::Stale),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EINVAL)) => {
            return Ok(Decoded::Unable);
        }
        Err(error) => return Err(error),
    };
    if fstat(&file)?.st_nlink == 0 {
        return Ok(Decoded::Nameless);
    }
    Ok(Decoded::Path(std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?))
}

/// Opens a directory as the place to start from with a handle.
pub(super) fn open_top(path: &Path) -> io::Result<OwnedFd> {
    Ok(reopen::path(path, libc::O_RDONLY | libc::O_DIRECTORY)?)
}

/// The handle inside a handle of an overlay, and whether it is of the upper layer.
fn inner(handle: &Handle) -> Option<(bool, Handle)> {
    let skip = if handle.kind == OVERLAY { PADDING } else { 0 };
    of_origin(handle.bytes.get(skip..)?)
}

/// The same from the bytes of `trusted.overlay.origin`.
fn of_origin(bytes: &[u8]) -> Option<(bool, Handle)> {
    let length = usize::from(*bytes.get(2)?);
    if bytes[1] != MAGIC || length < HEAD || length > bytes.len() {
        return None;
    }
    Some((bytes[3] & OF_UPPER != 0, Handle { kind: i32::from(bytes[4]), bytes: bytes[HEAD..length].to_vec() }))
}

/// Reads some bytes as what a layer says of where a file comes from.
pub(in crate::files) fn try_origin(bytes: &[u8]) {
    drop(of_origin(bytes));
}

/// The layers of the pod's overlays, opened as they are needed.
#[derive(Default)]
pub(super) struct Layers {
    tops: HashMap<PathBuf, Option<(OwnedFd, PathBuf)>>,
    renamed: HashMap<PathBuf, Renamed>,
}

/// What an upper layer says of files that come from the lower one.
#[derive(Default)]
struct Renamed {
    /// Where a file of the lower layer is now.
    origins: HashMap<Handle, Vec<PathBuf>>,
    /// Where a directory was in the lower layer, and where it is now.
    redirects: Vec<(PathBuf, PathBuf)>,
}

impl Layers {
    fn top(&mut self, layer: &Path) -> Option<&(OwnedFd, PathBuf)> {
        let open = || {
            let top = open_top(layer).ok()?;
            let path = std::fs::read_link(format!("/proc/self/fd/{}", top.as_raw_fd())).ok()?;
            Some((top, path))
        };
        self.tops.entry(layer.to_owned()).or_insert_with(open).as_ref()
    }

    /// Where the file of a handle is in its layer, from the layer's top.
    fn place(&mut self, lower: &Path, upper: &Path, handle: &Handle) -> io::Result<Decoded<PathBuf>> {
        let Some((of_upper, inner)) = inner(handle) else { return Ok(Decoded::Unable) };
        let Some((top, path)) = self.top(if of_upper { upper } else { lower }) else { return Ok(Decoded::Unable) };
        Ok(decode(top, &inner)?.and_then(|place| Some(place.strip_prefix(path).ok()?.to_owned())))
    }

    /// What a handle of the overlay at `mount` leads to, if it has not been renamed.
    pub(super) fn decode(
        &mut self,
        mount: &Mount,
        root: &Path,
        upper: &Path,
        handle: &Handle,
    ) -> io::Result<Decoded<Vec<u8>>> {
        let place = self.place(&lower_of(mount, root), upper, handle)?;
        Ok(place.and_then(|place| Some(in_pod(mount, &place))))
    }

    /// Other places at which the file of a handle may be.
    pub(super) fn renamed(
        &mut self,
        mount: &Mount,
        root: &Path,
        upper: &Path,
        handle: &Handle,
    ) -> io::Result<Vec<Vec<u8>>> {
        let Some((false, origin)) = inner(handle) else { return Ok(Vec::new()) };
        let place = self.place(&lower_of(mount, root), upper, handle)?.path();
        if !self.renamed.contains_key(upper) {
            let mut renamed = Renamed::default();
            renamed.read(upper, Path::new(""), Path::new(""));
            self.renamed.insert(upper.to_owned(), renamed);
        }
        let Some(renamed) = self.renamed.get(upper) else { return Ok(Vec::new()) };
        let same = renamed.origins.get(&origin).into_iter().flatten().cloned();
        let below =
            renamed.redirects.iter().filter_map(|(was, is)| Some(is.join(place.as_ref()?.strip_prefix(was).ok()?)));
        Ok(same.chain(below).map(|place| in_pod(mount, &place)).collect())
    }
}

impl Renamed {
    /// Reads a directory of the upper layer. `lower` is where its like is in the lower one. What cannot be read is passed over.
    fn read(&mut self, upper: &Path, here: &Path, lower: &Path) {
        let Ok(entries) = std::fs::read_dir(upper.join(here)) else { return };
        for entry in entries.flatten() {
            let (path, inside) = (entry.path(), here.join(entry.file_name()));
            let origin = xattr::get(&path, "trusted.overlay.origin").ok().flatten();
            if let Some((_, handle)) = origin.and_then(|bytes| of_origin(&bytes)) {
                self.origins.entry(handle).or_default().push(inside.clone());
            }
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            let redirect = xattr::get(&path, "trusted.overlay.redirect").ok().flatten();
            let below = match &redirect {
                Some(name) if name.starts_with(b"/") => reopen::as_path(&name[1..]).to_owned(),
                Some(name) => lower.join(reopen::as_path(name)),
                None => lower.join(entry.file_name()),
            };
            if below != inside {
                self.redirects.push((below.clone(), inside.clone()));
            }
            self.read(upper, &inside, &below);
        }
    }
}

/// The lower layer of an overlay on the host.
fn lower_of(mount: &Mount, root: &Path) -> PathBuf {
    root.join(mount.point.strip_prefix("/").unwrap_or(&mount.point))
}

fn in_pod(mount: &Mount, place: &Path) -> Vec<u8> {
    // Joining nothing would add a slash.
    let whole = if place.as_os_str().is_empty() { mount.point.clone() } else { mount.point.join(place) };
    whole.as_os_str().as_bytes().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_the_inner_handle_out() {
        let mut bytes = vec![0, 0, 0, 0, MAGIC, 29, OF_UPPER, 1];
        bytes.extend([7; 16]);
        bytes.extend(1..=8);
        let handle = Handle { kind: OVERLAY, bytes };
        assert_eq!(inner(&handle), Some((true, Handle { kind: 1, bytes: (1..=8).collect() })));
        let short = Handle { kind: OVERLAY, bytes: handle.bytes[..30].to_vec() };
        assert_eq!(inner(&short), None);
        assert_eq!(inner(&Handle { kind: OVERLAY, bytes: vec![0] }), None);
    }
}
