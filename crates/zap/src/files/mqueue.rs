//! Descriptors of POSIX message queues. The queues themselves are kept by [`crate::ipc`], but for those whose name was
//! taken away: they are kept here.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;

use nix::sched::{CloneFlags, setns, unshare};
use serde::{Deserialize, Serialize};

use super::mqueue_notice::{self, NoticeState};
use super::{Descriptor, FileKind, decoded, reopen};
use crate::error::{CaptureError, Context, RebuildError};
use crate::ids::FileId;
use crate::image::encode;
use crate::ipc::posix::{self, PosixQueueState};
use crate::look::Look;
use crate::rebuild::Rebuild;
use crate::sys::clone::in_thread;
use crate::sys::mqueue;

/// An open queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MqueueState {
    /// The link: `/name`, or a path where it was opened as a file.
    #[serde(with = "serde_bytes")]
    pub link: Vec<u8>,
    /// Access mode and status flags.
    pub flags: i32,
    /// The number of its inode, if it has no name any more.
    pub nameless: Option<u64>,
    /// The queue, if it has no name any more; with the description that was met first.
    pub queue: Option<PosixQueueState>,
    /// Who is told of its next message.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub notice: Option<NoticeState>,
}

pub(super) struct Mqueue;

/// A queue without a name, which has one until all are open: in a namespace of its own, as another may have it by now.
struct Made {
    queue: OwnedFd,
    namespace: File,
}

/// What `open(2)` adds to the flags, and `mq_open(3)` does not.
const BY_PATH: i32 = 0o100_000;

impl FileKind for Mqueue {
    fn name(&self) -> &'static str {
        "mqueue"
    }

    fn recognizes(&self, descriptor: &Descriptor) -> bool {
        descriptor.stat.st_mode & libc::S_IFMT == libc::S_IFREG
            && descriptor.stat.st_size == LINE
            && descriptor.link.starts_with(b"/")
            && posix::is_queue(descriptor)
    }

    fn check(&self, descriptor: &Descriptor) -> Result<(), CaptureError> {
        let ours = reopen::again(descriptor, libc::O_RDONLY).capturing("opening", descriptor.object())?;
        posix::check(&descriptor.subject, posix::name_of(&descriptor.link), &ours)
    }

    fn capture(&self, look: &mut Look<'_>, descriptor: &Descriptor) -> Result<Vec<u8>, CaptureError> {
        let stat = &descriptor.stat;
        // with O_CLOEXEC: here it is the description's, too
        let flags = crate::sys::descriptor::flags(&descriptor.file).unwrap_or(0);
        let nameless = (stat.st_nlink == 0).then_some(stat.st_ino);
        let home = std::fs::metadata(reopen::from_host(look.init, b"/dev/mqueue")).map(|m| m.dev()).unwrap_or(0);
        if nameless.is_none() && home != stat.st_dev {
            return Err(descriptor.refuse(
                "is a POSIX message queue of an IPC namespace made inside the pod, which cannot be checkpointed yet",
            ));
        }
        let link = descriptor.link.strip_suffix(b" (deleted)").filter(|_| nameless.is_some());
        let link = link.unwrap_or(&descriptor.link).to_vec();
        let ours = reopen::again(descriptor, libc::O_RDONLY).capturing("opening", descriptor.object())?;
        let notice = mqueue_notice::capture(look, descriptor, &ours)?;
        let mut queue = None;
        if nameless.is_some() && look.first_sight("mqueue", stat.st_dev, stat.st_ino) {
            let ours = reopen::again(descriptor, libc::O_RDWR).capturing("opening", descriptor.object())?;
            queue = Some(posix::capture(&descriptor.subject, posix::name_of(&link), &ours, look.data)?);
        }
        Ok(encode(&MqueueState { link, flags, nameless, queue, notice }))
    }

    fn open(&self, rebuild: &mut Rebuild<'_>, id: FileId, state: &[u8]) -> Result<OwnedFd, RebuildError> {
        let state: MqueueState = decoded(state)?;
        let shown = || format!("the POSIX message queue {}", String::from_utf8_lossy(&state.link));
        if let Some(inode) = state.nameless {
            if let Some(queue) = &state.queue {
                let made = nameless(rebuild, queue)?;
                rebuild.keep_object("mqueue", inode, made);
            }
            let Some(made) = rebuild.object::<Made>("mqueue", inode) else {
                return Err(RebuildError::Damaged(format!("{id}: {} is not in it", shown())));
            };
            if state.flags & BY_PATH != 0 {
                return reopen::again(&made.queue, state.flags).rebuilding("opening", shown());
            }
            let open = || made.inside(|| mqueue::open(posix::name_of(&state.link), by_name(state.flags)));
            return open().rebuilding("opening", shown());
        }
        // Opened by its name it is not below any directory.
        if state.link.iter().filter(|b| **b == b'/').count() > 1 {
            return reopen::path(reopen::as_path(&state.link), state.flags).rebuilding("opening", shown());
        }
        mqueue::open(posix::name_of(&state.link), by_name(state.flags)).rebuilding("opening", shown())
    }

    fn connect(&self, rebuild: &mut Rebuild<'_>, id: FileId, state: &[u8]) -> Result<(), RebuildError> {
        let state: MqueueState = decoded(state)?;
        let (Some(inode), Some(queue)) = (state.nameless, &state.queue) else { return Ok(()) };
        let Some(made) = rebuild.object::<Made>("mqueue", inode) else { return Ok(()) };
        made.inside(|| mqueue::unlink(&queue.name)).rebuilding("unlinking", id)
    }
}

fn by_name(flags: i32) -> i32 {
    flags & (libc::O_ACCMODE | libc::O_NONBLOCK | libc::O_CLOEXEC)
}

impl Made {
    /// Does something in the queue's namespace.
    fn inside<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        in_thread(|| {
            setns(&self.namespace, CloneFlags::CLONE_NEWIPC)?;
            work()
        })
    }
}

/// What `stat` says of the size of every queue.
const LINE: i64 = 80;

fn nameless(rebuild: &Rebuild<'_>, state: &PosixQueueState) -> Result<Made, RebuildError> {
    let image = rebuild.image;
    let elsewhere = || {
        unshare(CloneFlags::CLONE_NEWIPC)?;
        let namespace = File::open("/proc/thread-self/ns/ipc")?;
        Ok(posix::restart(image, state).map(|queue| Made { queue, namespace }))
    };
    in_thread(elsewhere).rebuilding("making", "a POSIX message queue")?
}
