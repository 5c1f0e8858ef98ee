//! Files of tun and tap devices. The device itself is an interface (see `namespaces::network`), which is there, and stays, when
//! these are opened; from then on it is for them to keep it. The first is the one that has kept it until then.
//!
//! What has been sent to it and not read is lost, as if there had been no room for it.

use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};

use super::{Descriptor, FileKind, decoded, reopen};
use crate::error::{CaptureError, Context, RebuildError};
use crate::ids::FileId;
use crate::image::encode;
use crate::look::Look;
use crate::namespaces::network;
use crate::rebuild::Rebuild;
use crate::sys::tap::{self, Lasting, Number};

/// An open `/dev/net/tun`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunState {
    /// The path in the pod.
    #[serde(with = "serde_bytes")]
    pub path: Vec<u8>,
    /// Status flags.
    pub flags: i32,
    /// The device that it has.
    pub queue: Option<QueueState>,
}

/// A file as the queue of a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// The name of the device.
    pub device: String,
    /// Whether the device stays when nobody has it.
    pub persistent: bool,
    /// Whether the device leaves it out.
    pub left_out: bool,
    /// Bytes that wait at most, length of headers, whether those are little-endian.
    pub numbers: [i32; 3],
}

pub(super) struct Tun;

const PERSISTENT: i32 = 0x800;
/// In an answer; in a request the same bit is `IFF_NO_PI`.
const NO_FILTER: i32 = 0x1000;
const NUMBERS: [Number; 3] = [tap::SEND_BUFFER, tap::HEADER_LENGTH, tap::LITTLE_ENDIAN];

/// Whether it is one.
pub(super) fn is_one(descriptor: &Descriptor) -> bool {
    let (stat, numbers) = (&descriptor.stat, |device| (libc::major(device), libc::minor(device)));
    stat.st_mode & libc::S_IFMT == libc::S_IFCHR && numbers(stat.st_rdev) == tap::DEVICE
}

impl FileKind for Tun {
    fn name(&self) -> &'static str {
        "tun"
    }

    fn recognizes(&self, descriptor: &Descriptor) -> bool {
        is_one(descriptor)
    }

    fn check(&self, descriptor: &Descriptor) -> Result<(), CaptureError> {
        let device = tap::device_of(descriptor).capturing("asking about", descriptor.object())?;
        if device.is_some_and(|(_, flags)| flags & NO_FILTER == 0) {
            return Err(descriptor.refuse("has a filter (TUNATTACHFILTER), which cannot be checkpointed yet"));
        }
        Ok(())
    }

    fn capture(&self, _look: &mut Look<'_>, descriptor: &Descriptor) -> Result<Vec<u8>, CaptureError> {
        self.check(descriptor)?;
        let device = tap::device_of(descriptor).capturing("asking about", descriptor.object())?;
        let number = |number: Number| tap::get(descriptor, number);
        let queue = device.map(|(device, flags)| {
            Ok(QueueState {
                device,
                persistent: flags & PERSISTENT != 0,
                left_out: flags & libc::IFF_DETACH_QUEUE != 0,
                numbers: [number(NUMBERS[0])?, number(NUMBERS[1])?, number(NUMBERS[2])?],
            })
        });
        let queue = queue.transpose().map_err(|source: std::io::Error| CaptureError::Kernel {
            step: "asking about",
            object: descriptor.object(),
            source,
        })?;
        Ok(encode(&TunState { path: descriptor.link.clone(), flags: descriptor.flags(), queue }))
    }

    fn open(&self, rebuild: &mut Rebuild<'_>, id: FileId, state: &[u8]) -> Result<OwnedFd, RebuildError> {
        let state: TunState = decoded(state)?;
        let queue = state.queue.as_ref();
        let kept = queue.filter(|queue| !queue.left_out).and_then(|queue| {
            let device = (rebuild.network(), queue.device.clone());
            rebuild.taps.remove(&device)
        });
        let path = reopen::as_path(&state.path);
        let file = match kept {
            Some(file) => OwnedFd::from(file),
            None => {
                let file = reopen::path(path, state.flags).rebuilding("opening", path.display())?;
                queue.map_or(Ok(()), |queue| queue.attach(&file)).rebuilding("attaching to its device", id)?;
                file
            }
        };
        reopen::set_flags(&file, state.flags).rebuilding("setting the flags of", id)?;
        queue.map_or(Ok(()), |queue| queue.restart(&file)).rebuilding("setting up", id)?;
        Ok(file)
    }
}

impl QueueState {
    fn attach(&self, file: &OwnedFd) -> std::io::Result<()> {
        tap::attach(file, &self.device, network::flags_of_tun(&self.device)?)
    }

    fn restart(&self, file: &OwnedFd) -> std::io::Result<()> {
        for (number, value) in NUMBERS.iter().zip(self.numbers) {
            if tap::get(file, *number)? != value {
                tap::set(file, *number, value)?;
            }
        }
        if !self.persistent {
            tap::set_lasting(file, Lasting::Persistent, 0)?;
        }
        if self.left_out { tap::leave_out(file) } else { Ok(()) }
    }
}
