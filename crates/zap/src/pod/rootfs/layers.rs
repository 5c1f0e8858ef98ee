//! The pod's own layers on the host's disk.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statfs::statfs;

use super::Overlay;
use crate::pod::PodError;
use crate::pod::registry::make_private_directory;

/// File systems that cannot hold an upper layer: overlay itself, NFS, 9p, FAT.
const UNSUITABLE: [i64; 4] = [0x794c_7630, 0x6969, 0x0102_1997, 0x4d44];

/// Makes the directories of a pod's layers. Where the storage cannot hold an upper layer they are on a tmpfs.
pub fn prepare_layers(storage: &Path, overlays: &[Overlay]) -> Result<(), PodError> {
    make_private_directory(storage)?;
    let unsuitable = statfs(storage).is_ok_and(|s| UNSUITABLE.contains(&s.filesystem_type().0));
    if unsuitable {
        mount(Some("zap"), storage, Some("tmpfs"), MsFlags::empty(), Some("mode=0700"))
            .map_err(|e| failed("mounting a tmpfs on", storage)(e.into()))?;
    }
    make_private_directory(&storage.join("mount"))?;
    for overlay in overlays {
        make_private_directory(&overlay.upper)?;
        make_private_directory(&overlay.work)?;
        like(&overlay.lower, &overlay.upper).map_err(failed("making", &overlay.upper))?;
    }
    Ok(())
}

/// The top directory of an overlay shows owner and mode of the upper layer's.
fn like(lower: &Path, upper: &Path) -> io::Result<()> {
    let model = fs::metadata(lower)?;
    std::os::unix::fs::chown(upper, Some(model.uid()), Some(model.gid()))?;
    fs::set_permissions(upper, fs::Permissions::from_mode(model.mode() & 0o7777))
}

/// Removes all of a pod's layers. Again is no error.
pub fn remove_layers(storage: &Path) -> Result<(), PodError> {
    // EINVAL: it is not a mount point, as on every host whose storage can hold an upper layer.
    let _ = umount2(storage, MntFlags::MNT_DETACH);
    match fs::remove_dir_all(storage) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed("removing", storage)(e)),
        _ => Ok(()),
    }
}

fn failed(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> PodError + use<> {
    let path = path.to_owned();
    move |source| PodError::Store { step, path, source }
}
