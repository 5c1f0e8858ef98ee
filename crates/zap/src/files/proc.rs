//! Files of `/proc`: opened again by their path, those of a process once that process exists.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use serde::{Deserialize, Serialize};

use super::late::Late;
use super::{Descriptor, FileKind, FileState, decoded, reopen, unlinked};
use crate::error::{CaptureError, Context, RebuildError};
use crate::ids::{FileId, PodPid};
use crate::image::encode;
use crate::look::Look;
use crate::rebuild::Rebuild;
use crate::sys::{clone, exec};

/// An open file or directory of `/proc`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcState {
    /// The path in the pod.
    #[serde(with = "serde_bytes")]
    pub path: Vec<u8>,
    /// Access mode and status flags.
    pub flags: i32,
    /// The offset.
    pub position: u64,
    /// Whether its process has ended: nothing can be done with it any more. Sandboxes make such a directory their root.
    #[serde(default)]
    pub dead: bool,
    /// Whether it was opened through a proc of a PID namespace made inside the pod, which is mounted when that exists.
    #[serde(default)]
    pub nested: bool,
}

pub(super) struct Proc;

/// Whether a path is below `/proc/PID`.
fn of_process(path: &[u8]) -> bool {
    path.strip_prefix(b"/proc/").and_then(|p| p.first()).is_some_and(u8::is_ascii_digit)
}

/// The process of a path below `/proc/PID`, and what comes behind it.
fn process_of(path: &[u8]) -> Option<(PodPid, &[u8])> {
    let rest = path.strip_prefix(b"/proc/")?;
    let end = rest.iter().position(|b| *b == b'/').unwrap_or(rest.len());
    let number = std::str::from_utf8(&rest[..end]).ok()?.parse().ok()?;
    Some((PodPid(number), &rest[end..]))
}

/// The path of a directory of a process that has ended.
pub(super) fn nowhere(file: &FileState) -> Result<Option<Vec<u8>>, RebuildError> {
    if file.kind != Proc.name() {
        return Ok(None);
    }
    let state: ProcState = decoded(&file.state)?;
    Ok(state.dead.then_some(state.path))
}

/// The processes that have ended and of which files are open.
pub fn ended(files: &[FileState]) -> impl Iterator<Item = PodPid> {
    files.iter().filter_map(|file| Some(process_of(&nowhere(file).ok()??)?.0))
}

/// The process of a path below `/proc/PID`, and the path as that process itself may name it.
pub fn own_path(path: &[u8]) -> Option<(PodPid, Vec<u8>)> {
    process_of(path).map(|(pid, behind)| (pid, [b"/proc/self", behind, b"\0"].concat()))
}

/// Opens a file of a passing process with the number of the one that has ended, or with any.
fn of_the_dead(state: &ProcState) -> io::Result<OwnedFd> {
    let behind = process_of(&state.path).map_or(&[][..], |(_, behind)| behind);
    let path = CString::new([b"/proc/self", behind].concat())?;
    let flags = OFlag::from_bits_retain(state.flags & !libc::O_ASYNC) | OFlag::O_CLOEXEC;
    let opened = open("/dev/null", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?;
    let work = || {
        let file = open(path.as_c_str(), flags, Mode::empty())?;
        exec::duplicate_to(file.as_raw_fd(), opened.as_raw_fd())
    };
    // What it was called in a PID namespace made inside the pod says nothing here.
    let number = process_of(&state.path).filter(|_| !state.nested);
    match number.map(|(pid, _)| clone::in_process(pid, &work)) {
        Some(Err(e)) if e.raw_os_error() != Some(libc::EEXIST) => Err(e),
        Some(Ok(())) => Ok(opened),
        _ => clone::in_child(&work).map(|()| opened),
    }
}

/// Refuses a file of `/proc/pressure` that tells when there is too much of it: nobody can read at how much.
fn refuse_trigger(descriptor: &Descriptor) -> Result<(), CaptureError> {
    let may_have =
        descriptor.link.starts_with(b"/proc/pressure/") && descriptor.flags() & libc::O_ACCMODE != libc::O_RDONLY;
    // One that has none finds this wrong, and one that has takes no other.
    match may_have.then(|| nix::unistd::write(&descriptor.file, b"?")) {
        Some(Err(nix::Error::EBUSY)) => {
            Err(descriptor.refuse("tells its program of pressure (a trigger), which cannot be checkpointed yet"))
        }
        _ => Ok(()),
    }
}

impl FileKind for Proc {
    fn name(&self) -> &'static str {
        "proc"
    }

    fn recognizes(&self, descriptor: &Descriptor) -> bool {
        descriptor.link.starts_with(b"/") && super::of_proc(descriptor)
    }

    fn check(&self, descriptor: &Descriptor) -> Result<(), CaptureError> {
        refuse_trigger(descriptor)
    }

    fn capture(&self, look: &mut Look<'_>, descriptor: &Descriptor) -> Result<Vec<u8>, CaptureError> {
        refuse_trigger(descriptor)?;
        let (flags, position) = (descriptor.flags(), descriptor.position());
        let path = descriptor.link.clone();
        let nested = look.nests.shows_others(descriptor);
        let named = match process_of(&path) {
            // The path may be that of a later process with the same number.
            Some(_) => unlinked::is_named(look, descriptor, &path),
            None => look.path_from_host(descriptor, &path).exists(),
        };
        if named {
            return Ok(encode(&ProcState { path, flags, position, dead: false, nested }));
        }
        let path = path.strip_suffix(b" (deleted)").unwrap_or(&path).to_vec();
        if process_of(&path).is_none() {
            return Err(descriptor.refuse("is a file of /proc that is gone, so that a restart could not open it"));
        }
        Ok(encode(&ProcState { path, flags, position, dead: true, nested }))
    }

    fn late(&self, state: &[u8]) -> Result<Option<Late>, RebuildError> {
        let ProcState { path, flags, position, dead, nested } = decoded(state)?;
        Ok(((nested || of_process(&path)) && !dead).then_some(Late::Path { path, flags, position, nested }))
    }

    fn open(&self, _rebuild: &mut Rebuild<'_>, _id: FileId, state: &[u8]) -> Result<OwnedFd, RebuildError> {
        let state: ProcState = decoded(state)?;
        let path = reopen::as_path(&state.path);
        if state.dead {
            return of_the_dead(&state).rebuilding("opening", path.display());
        }
        reopen::path_at(path, state.flags, state.position).rebuilding("opening", path.display())
    }
}
