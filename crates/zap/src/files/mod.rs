//! Open files: one kind, one file. [`KINDS`] is the table; a new kind is one module and one line there.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, OnceLock};

use serde::{Deserialize, Serialize};

use crate::error::{CaptureError, Context, RebuildError};
use crate::ids::FileId;
use crate::look::{Look, Subject};
use crate::namespaces::NamespaceId;
use crate::procfs;
use crate::rebuild::Rebuild;
use crate::sys::descriptor;

pub mod attributes;
pub mod contents;
pub mod descriptors;
pub mod device;
pub mod directory;
pub mod directory_notice;
pub mod epoll;
pub mod eventfd;
pub mod fanotify;
pub mod fifo;
mod hashes;
pub mod huge_memory;
pub mod identity;
pub mod inotify;
pub mod io_uring;
mod late;
pub mod locks;
pub mod memfd;
pub mod mounts;
pub mod mqueue;
pub mod mqueue_notice;
pub mod name_only;
pub mod namespace;
pub mod owner;
pub mod pidfd;
pub mod pipe;
mod pool;
pub mod proc;
pub mod pty;
mod refusals;
pub mod regular;
pub mod removed;
mod reopen;
pub mod shared_memory;
pub mod signalfd;
mod table;
pub mod terminal;
mod terminal_queue;
#[cfg(test)]
pub(crate) mod testing;
pub mod timerfd;
pub mod tun;
pub mod unlinked;
pub mod watched;

pub use contents::Contents;
pub use descriptors::{
    CloseOnExec, DescriptorState, ask_close_on_exec, check_all, process_descriptors, read_close_on_exec,
};
pub(crate) use descriptors::{check_one, count};
pub use hashes::HashCache;
pub use identity::{FileIdentity, UsedFile, compare, identity_of};
pub use late::{Late, LateFiles, is_late_elsewhere};
pub use locks::{PosixLock, locked, posix_locks, take_posix_locks};
pub use pool::{
    Source, Unsettled, any_late, awaken_all, connect_all, connect_late, open_all, restart_descriptors, settle_all,
    unsettled,
};
pub use regular::verify_root;
pub(crate) use regular::{Directories, RootFile};
pub(crate) use reopen::from_host;
pub(crate) use table::intern_root_file;
pub use table::{FileTable, describe, finish, intern, intern_file, put_apart, read_apart};
pub use terminal::{controlling_pty, give_terminal_up, set_foreground, take_terminal};

/// One open file description of the pod, seen through a copy of it that is ours (`pidfd_getfd`).
///
/// The copy *shares* offset and flags with the pod's: whatever a capture changes, it puts back.
#[derive(Clone)]
pub struct Descriptor {
    /// The process through which it was met, for messages.
    pub subject: Subject,
    /// Its number there, or -1 when it is known only from a queue or a mapping.
    pub number: i32,
    /// Our copy.
    pub file: Arc<OwnedFd>,
    /// What `/proc/self/fd/N` says: a path as seen from the pod's root, `pipe:[123]`, `anon_inode:[eventpoll]`.
    pub link: Vec<u8>,
    /// `fstat`.
    pub stat: libc::stat,
    /// `/proc/self/fdinfo/N`, once somebody wants to know it.
    info: OnceLock<Vec<u8>>,
}

impl Descriptor {
    /// The name of the object for messages: `file descriptor 9 (pipe:[123])`.
    pub fn object(&self) -> String {
        let link = String::from_utf8_lossy(&self.link);
        match self.number {
            0.. => format!("file descriptor {} ({link})", self.number),
            _ => format!("a file without a descriptor ({link}: mapped, executed, or on its way)"),
        }
    }

    /// The error that refuses the pod because of this file.
    pub fn refuse(&self, why: impl Into<String>) -> CaptureError {
        self.subject.refuse(self.object(), why)
    }

    /// Status flags and access mode, as `open(2)` takes them. `O_CLOEXEC` is not among them: it belongs to the number, not
    /// to the description.
    pub fn flags(&self) -> i32 {
        descriptor::flags(&self.file).unwrap_or(0) & !libc::O_CLOEXEC
    }

    /// `/proc/self/fdinfo/N`, whole.
    pub fn info(&self) -> Result<&[u8], CaptureError> {
        if let Some(info) = self.info.get() {
            return Ok(info);
        }
        let path = format!("/proc/self/fdinfo/{}", self.file.as_raw_fd());
        let info = procfs::read_record(path).capturing("reading fdinfo", self.object())?;
        Ok(self.info.get_or_init(|| info))
    }

    /// The file offset, from `fdinfo`.
    pub fn position(&self) -> u64 {
        self.field("pos:").and_then(|v| v.parse().ok()).unwrap_or(0)
    }

    /// The first `fdinfo` line that begins with `label`, without it, trimmed.
    pub fn field(&self, label: &str) -> Option<&str> {
        self.info()
            .ok()?
            .split(|b| *b == b'\n')
            .filter_map(|line| std::str::from_utf8(line).ok())
            .find_map(|line| line.strip_prefix(label))
            .map(str::trim)
    }

    /// A number of `fdinfo`, which must be there.
    pub fn decimal(&self, label: &str) -> Result<u64, CaptureError> {
        self.number(label, 10)
    }

    /// A hexadecimal number of `fdinfo`, which must be there.
    pub fn hexadecimal(&self, label: &str) -> Result<u64, CaptureError> {
        self.number(label, 16)
    }

    fn number(&self, label: &str, radix: u32) -> Result<u64, CaptureError> {
        let text = self.field(label);
        text.and_then(|v| u64::from_str_radix(v, radix).ok()).ok_or_else(|| CaptureError::Unexpected {
            object: self.object(),
            what: format!("fdinfo: {label} {}", text.unwrap_or("is missing")),
        })
    }

    /// Our copy, borrowed.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl AsFd for Descriptor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// A kind of open file: how it is recognised, written down and made again.
///
/// States are encoded by [`crate::image::encode`] / [`crate::image::decode`]: fields can be added with `#[serde(default)]`, any other
/// change of an encoding takes another [`crate::image::FORMAT`].
pub trait FileKind: Sync {
    /// Its tag in the image and in messages: `pipe`, `tcp`, `eventfd`.
    fn name(&self) -> &'static str;

    /// Whether `descriptor` is of this kind. The first kind of the table that says so has it.
    fn recognizes(&self, descriptor: &Descriptor) -> bool;

    /// Whether it could be captured, asked while the pod still runs: cheap, changes nothing. The default accepts.
    fn check(&self, _descriptor: &Descriptor) -> Result<(), CaptureError> {
        Ok(())
    }

    /// Does ahead, while the pod runs, what a capture would take long for. The default has nothing.
    fn look_ahead(&self, _look: &mut Look<'_>, _descriptor: &Descriptor) -> Result<(), CaptureError> {
        Ok(())
    }

    /// Whether a state of this kind names other files, so that it is captured when all have been met (see [`finish`]).
    fn refers_to_others(&self) -> bool {
        false
    }

    /// Kernel → state. The pod is held. Returns the encoded state.
    fn capture(&self, look: &mut Look<'_>, descriptor: &Descriptor) -> Result<Vec<u8>, CaptureError>;

    /// Whether [`FileKind::read_apart`] reads files of this kind.
    fn reads_apart(&self) -> bool {
        false
    }

    /// Does what takes long of a capture and needs nothing of other files, on any thread, beside that of others; what it returns
    /// does the rest. [`FileKind::capture`] does both.
    fn read_apart(&self, descriptor: &Descriptor) -> Result<Keep, CaptureError> {
        Err(descriptor.refuse("is of a kind that is not read by itself"))
    }

    /// How the file is opened if that can be done only when every process of the pod exists; [`FileKind::open`] is not
    /// called then.
    fn late(&self, _state: &[u8]) -> Result<Option<Late>, RebuildError> {
        Ok(None)
    }

    /// The files that are on their way in this one.
    fn carries(&self, _state: &[u8]) -> Result<Vec<FileId>, RebuildError> {
        Ok(Vec::new())
    }

    /// State → kernel, first stage: open the file. Other files may not exist yet.
    fn open(&self, rebuild: &mut Rebuild<'_>, id: FileId, state: &[u8]) -> Result<OwnedFd, RebuildError>;

    /// State → kernel, second stage: every file of the pod is open now (fill queues, pass descriptors, add to epoll).
    fn connect(&self, _rebuild: &mut Rebuild<'_>, _id: FileId, _state: &[u8]) -> Result<(), RebuildError> {
        Ok(())
    }

    /// State → kernel, in the *monitor*, while the tree is made: what [`FileKind::settle`] would take long for. The default
    /// does nothing.
    fn prepare(&self, _file: BorrowedFd<'_>, _state: &[u8]) -> Result<(), RebuildError> {
        Ok(())
    }

    /// State → kernel, last stage: runs in the *monitor* once every process of the pod exists and just before it is let go.
    /// `file` is the monitor's copy; `host_pid` translates a PID of the pod. The default does nothing.
    fn settle(
        &self,
        _file: BorrowedFd<'_>,
        _state: &[u8],
        _host_pid: &dyn Fn(crate::ids::PodPid) -> Option<crate::ids::HostPid>,
    ) -> Result<(), RebuildError> {
        Ok(())
    }

    /// State → kernel, once packets can reach the pod again, everything still held: as [`FileKind::settle`], of which it
    /// is the rest. Whatever can fail belongs there. The default does nothing.
    fn awaken(&self, _file: BorrowedFd<'_>, _state: &[u8]) -> Result<(), RebuildError> {
        Ok(())
    }

    /// Whether [`FileKind::settle`] or [`FileKind::awaken`] has anything to do for this state (a copy is fetched only then).
    fn needs_settling(&self, _state: &[u8]) -> bool {
        false
    }
}

/// Gives what was read of a file, by its number, its place in the image; the encoded state.
pub type Keep = Box<dyn FnOnce(&mut Look<'_>, FileId) -> Vec<u8> + Send>;

/// An open file description in the image.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FileState {
    /// Its number.
    pub id: FileId,
    /// The tag of its kind.
    pub kind: String,
    /// The kind's own state, encoded.
    #[serde(with = "serde_bytes")]
    pub state: Vec<u8>,
    /// Who is told by a signal that it is ready, if anybody.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<owner::OwnerState>,
    /// Locks and leases that belong to it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub locks: Vec<locks::LockState>,
    /// Of a socket or a file of a tun device: its network namespace, if it is not the pod's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<NamespaceId>,
    /// Of a file that is found by its path: the mount namespace from whose root that leads, if it is not the pod's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mounts: Option<NamespaceId>,
}

impl FileState {
    /// A file of which nothing but its kind's state is worth mentioning.
    pub fn new(id: FileId, kind: &str, state: Vec<u8>) -> FileState {
        FileState { id, kind: kind.to_owned(), state, owner: None, locks: Vec::new(), network: None, mounts: None }
    }
}

/// Every kind that is known, in the order in which they are asked.
#[rustfmt::skip]
pub static KINDS: &[&dyn FileKind] = &[
    &proc::Proc,
    &removed::Removed,
    &name_only::NameOnly,
    &mqueue::Mqueue,
    &regular::Regular,
    &memfd::Memfd,
    &shared_memory::SharedMemory,
    &huge_memory::HugeMemory,
    &directory::Directory,
    &pipe::Pipe,
    &fifo::Fifo,
    &device::Device,
    &tun::Tun,
    &crate::sockets::Tcp,
    &crate::sockets::Udp,
    &crate::sockets::Raw,
    &crate::sockets::Link,
    &crate::sockets::Netlink,
    &eventfd::Eventfd,
    &io_uring::IoUring,
    &epoll::Epoll,
    &timerfd::Timerfd,
    &signalfd::Signalfd,
    &pty::Pty,
    &crate::sockets::Unix,
    &pidfd::Pidfd,
    &inotify::Inotify,
    &fanotify::Fanotify,
    &namespace::NamespaceFile,
];

/// The kind of that name.
pub fn kind(name: &str) -> Option<&'static dyn FileKind> {
    KINDS.iter().copied().find(|k| k.name() == name)
}

/// Whether a file is opened only when every process exists.
pub(crate) fn is_late(state: &FileState) -> bool {
    kind(&state.kind).is_some_and(|kind| matches!(kind.late(&state.state), Ok(Some(_))))
}

/// The kind that recognises `descriptor`, or the refusal that names it.
pub fn kind_of(descriptor: &Descriptor) -> Result<&'static dyn FileKind, CaptureError> {
    let known = KINDS.iter().copied().find(|k| k.recognizes(descriptor));
    known.ok_or_else(|| descriptor.refuse(refusals::why(descriptor)))
}

/// A state whose checksum was verified, decoded; what cannot be decoded is damage.
pub fn decoded<T: serde::de::DeserializeOwned>(state: &[u8]) -> Result<T, RebuildError> {
    crate::image::decode(state).map_err(RebuildError::Damaged)
}

/// Whether a file is one of `/proc`.
fn of_proc(descriptor: &Descriptor) -> bool {
    nix::sys::statfs::fstatfs(&descriptor.file).is_ok_and(|s| s.filesystem_type() == nix::sys::statfs::PROC_SUPER_MAGIC)
}

/// Bulk bytes of an image.
pub(crate) fn data_of(image: &crate::image::ImageReader, place: crate::image::DataRef) -> std::io::Result<Vec<u8>> {
    image.read(place).map_err(std::io::Error::other)
}

/// Reads some bytes as the fdinfo of every kind of file.
pub(crate) fn try_info(bytes: &[u8]) {
    epoll::try_info(bytes);
    inotify::try_info(bytes);
    fanotify::try_info(bytes);
    let text = String::from_utf8_lossy(bytes);
    locks::try_info(&text);
    io_uring::try_info(&text);
}

/// Reads some bytes as the name of a file of a process, and as what a layer says of where a file comes from.
pub(crate) fn try_name(bytes: &[u8]) {
    drop(proc::own_path(bytes));
    watched::layers::try_origin(bytes);
}

/// Reads some bytes as the hashes of files that were kept.
pub(crate) fn try_hashes(bytes: &[u8]) {
    hashes::try_hashes(bytes);
}
