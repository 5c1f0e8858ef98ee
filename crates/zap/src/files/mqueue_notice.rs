//! Who is told of the next message in an empty queue (`mq_notify(3)`). A queue says itself who that is and how, but for the
//! value that comes with the signal: only the kernel's memory tells.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use serde::{Deserialize, Serialize};

use super::{Descriptor, DescriptorState};
use crate::error::{CaptureError, Context};
use crate::ids::PodPid;
use crate::ipc::posix::{self, Notice};
use crate::kernel;
use crate::look::Look;
use crate::tracee::Batch;

/// Who is told, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NoticeState {
    /// The process that is told: it holds the queue.
    pub process: PodPid,
    /// `SIGEV_SIGNAL` or `SIGEV_NONE`.
    pub mode: i32,
    /// The signal.
    pub signal: i32,
    /// The value that comes with it.
    pub value: u64,
}

/// Who is told of the next message in this queue, seen through a description of our own too.
pub(super) fn capture(
    look: &Look<'_>,
    descriptor: &Descriptor,
    ours: impl AsFd,
) -> Result<Option<NoticeState>, CaptureError> {
    let notice = posix::notice(posix::name_of(&descriptor.link), ours)?;
    let Some(Notice { mode, signal }) = notice else { return Ok(None) };
    let read = read(descriptor.as_fd(), look.depth).capturing("reading who is told by", descriptor.object())?;
    Ok(Some(NoticeState { process: PodPid(read.0), mode, signal, value: read.1 }))
}

/// Process and value.
fn read(queue: BorrowedFd<'_>, depth: usize) -> io::Result<(i32, u64)> {
    let mut kernel = kernel::reader().map_err(io::Error::other)?;
    let inode = kernel.inode(queue)?;
    let queue = kernel.around(inode, "mqueue_inode_info.vfs_inode");
    let process = kernel.pointer(queue, "mqueue_inode_info.notify_owner")?;
    let event = kernel.at(queue, "mqueue_inode_info.notify");
    let value = kernel.pointer(event, "sigevent.sigev_value")?;
    Ok((kernel.pid(process, depth)?, value.0))
}

impl NoticeState {
    /// The call by which its process, asks for it again, through one of its descriptors.
    pub(super) fn ask(&self, descriptor: &DescriptorState, batch: &mut Batch) {
        // struct sigevent: value, signal, mode.
        let words = [self.signal.to_ne_bytes(), self.mode.to_ne_bytes()];
        let event = batch.bytes(&[&self.value.to_ne_bytes()[..], words.as_flattened(), &[0; 48]].concat());
        let what = format!("asking to be told of messages by descriptor {}", descriptor.number);
        batch.call(libc::SYS_mq_notify, [descriptor.number.into(), event], what);
    }
}
