//! Character devices without state of their own: `/dev/null` and its neighbours.

use std::os::fd::OwnedFd;

use nix::unistd::{Whence, lseek};
use serde::{Deserialize, Serialize};

use super::{Descriptor, FileKind, decoded, reopen};
use crate::error::{CaptureError, Context, RebuildError};
use crate::ids::FileId;
use crate::image::encode;
use crate::look::Look;
use crate::rebuild::Rebuild;

/// Minor numbers of major 1 that are safe: null, zero, full, random, urandom.
const MEMORY_DEVICES: [u32; 5] = [3, 5, 7, 8, 9];

/// An open device without state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceState {
    /// The path in the pod.
    #[serde(with = "serde_bytes")]
    pub path: Vec<u8>,
    /// Major and minor number.
    pub device: (u32, u32),
    /// Status flags.
    pub flags: i32,
    /// The offset, which `/dev/zero` and `/dev/random` keep.
    pub position: u64,
}

pub(super) struct Device;

fn numbers(stat: &libc::stat) -> (u32, u32) {
    (libc::major(stat.st_rdev), libc::minor(stat.st_rdev))
}

impl FileKind for Device {
    fn name(&self) -> &'static str {
        "device"
    }

    fn recognizes(&self, descriptor: &Descriptor) -> bool {
        let (major, minor) = numbers(&descriptor.stat);
        let character = descriptor.stat.st_mode & libc::S_IFMT == libc::S_IFCHR;
        character && major == 1 && MEMORY_DEVICES.contains(&minor)
    }

    fn capture(&self, _look: &mut Look<'_>, descriptor: &Descriptor) -> Result<Vec<u8>, CaptureError> {
        Ok(encode(&DeviceState {
            path: descriptor.link.clone(),
            device: numbers(&descriptor.stat),
            flags: descriptor.flags(),
            position: descriptor.position(),
        }))
    }

    fn open(&self, _rebuild: &mut Rebuild<'_>, _id: FileId, state: &[u8]) -> Result<OwnedFd, RebuildError> {
        let state: DeviceState = decoded(state)?;
        let path = reopen::as_path(&state.path);
        let file = reopen::path(path, state.flags).rebuilding("opening", path.display())?;
        let stat = crate::sys::file::fstat(&file).rebuilding("looking at", path.display())?;
        if numbers(&stat) != state.device {
            let what = "it is another device".to_owned();
            return Err(RebuildError::Changed { path: path.display().to_string(), what });
        }
        if state.position != 0 {
            lseek(&file, state.position as i64, Whence::SeekSet).rebuilding("seeking in", path.display())?;
        }
        Ok(file)
    }
}
