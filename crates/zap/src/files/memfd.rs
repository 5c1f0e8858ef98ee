//! Memory with a descriptor: `memfd_create(2)`.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::{Mode, fchmod, futimens};
use nix::sys::statfs::{HUGETLBFS_MAGIC, TMPFS_MAGIC, fstatfs};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, Whence, fchown, ftruncate, lseek};
use serde::{Deserialize, Serialize};

use super::attributes::{self, Attributes};
use super::pipe::LARGE_FILE;
use super::{Contents, Descriptor, FileKind, decoded, huge_memory, reopen};
use crate::error::{CaptureError, Context, RebuildError};
use crate::ids::{FileId, HostPid, PodPid};
use crate::image::encode;
use crate::look::Look;
use crate::rebuild::Rebuild;

/// An open memfd.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemfdState {
    /// Its name, without `memfd:`.
    #[serde(with = "serde_bytes")]
    pub name: Vec<u8>,
    /// Which memory it is: descriptions of the same have the same.
    pub inode: u64,
    /// The file system in which it is, likewise: that of huge pages is another.
    #[serde(default)]
    pub device: u64,
    /// Access mode and status flags.
    pub flags: i32,
    /// The offset.
    pub position: u64,
    /// `F_SEAL_*`.
    pub seals: i32,
    /// The memory itself; with the description that was met first.
    pub body: Option<MemfdBody>,
}

/// The memory behind a memfd.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemfdBody {
    /// What is in it.
    pub contents: Contents,
    /// Permissions.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Bytes of a page, if they are huge (`MFD_HUGETLB`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub huge: Option<u64>,
    /// Last access and last change of contents: seconds, nanoseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub times: Option<((i64, i64), (i64, i64))>,
    /// Extended attributes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub attributes: Attributes,
}

pub(super) struct Memfd;

/// `F_SEAL_FUTURE_WRITE` leaves writable mappings that are there, so it must come after them; and F_SEAL_SEAL after it.
const AFTER_MAPPING: i32 = libc::F_SEAL_FUTURE_WRITE;

impl FileKind for Memfd {
    fn name(&self) -> &'static str {
        "memfd"
    }

    fn recognizes(&self, descriptor: &Descriptor) -> bool {
        let shape = descriptor.link.starts_with(b"/memfd:") && descriptor.link.ends_with(b" (deleted)");
        shape && fstatfs(&descriptor.file).is_ok_and(|s| matches!(s.filesystem_type(), TMPFS_MAGIC | HUGETLBFS_MAGIC))
    }

    fn capture(&self, look: &mut Look<'_>, descriptor: &Descriptor) -> Result<Vec<u8>, CaptureError> {
        let name = descriptor.link.strip_prefix(b"/memfd:").and_then(|n| n.strip_suffix(b" (deleted)"));
        let stat = descriptor.stat;
        let first = look.first_sight("memfd", stat.st_dev, stat.st_ino);
        let body = first.then(|| body(look, descriptor)).transpose()?;
        let seals = fcntl(descriptor, FcntlArg::F_GET_SEALS).capturing("reading the seals", descriptor.object())?;
        Ok(encode(&MemfdState {
            name: name.unwrap_or_default().to_vec(),
            inode: stat.st_ino,
            device: stat.st_dev,
            flags: descriptor.flags(),
            position: descriptor.position(),
            seals,
            body,
        }))
    }

    fn open(&self, rebuild: &mut Rebuild<'_>, _id: FileId, state: &[u8]) -> Result<OwnedFd, RebuildError> {
        let state: MemfdState = decoded(state)?;
        let shown = format!("memfd {}", String::from_utf8_lossy(&state.name));
        if rebuild.object::<Made>("memfd", (state.device, state.inode)).is_none() {
            let made = make(rebuild, &state, &shown)?;
            rebuild.keep_object("memfd", (state.device, state.inode), Made { file: made, is_given: false });
        }
        let made = rebuild.object::<Made>("memfd", (state.device, state.inode));
        let made = made.ok_or_else(|| RebuildError::Damaged(format!("{shown} is of two kinds")))?;
        let file = made.describe(state.flags).rebuilding("opening", &shown)?;
        lseek(&file, state.position as i64, Whence::SeekSet).rebuilding("seeking in", &shown)?;
        Ok(file)
    }

    fn settle(
        &self,
        file: BorrowedFd<'_>,
        state: &[u8],
        _host_pid: &dyn Fn(PodPid) -> Option<HostPid>,
    ) -> Result<(), RebuildError> {
        let state: MemfdState = decoded(state)?;
        let shown = || format!("memfd {}", String::from_utf8_lossy(&state.name));
        if state.flags & libc::O_ACCMODE != libc::O_RDONLY {
            return seal(file, state.seals).rebuilding("sealing", shown());
        }
        // Only who may write may seal.
        let writable = reopen::again(file, libc::O_RDWR).rebuilding("opening", shown())?;
        seal(writable.as_fd(), state.seals).rebuilding("sealing", shown())
    }

    fn needs_settling(&self, state: &[u8]) -> bool {
        decoded::<MemfdState>(state).is_ok_and(|s| s.seals & AFTER_MAPPING != 0)
    }
}

fn body(look: &mut Look<'_>, descriptor: &Descriptor) -> Result<MemfdBody, CaptureError> {
    let stat = descriptor.stat;
    let kind = fstatfs(&descriptor.file).capturing("looking at", descriptor.object())?.filesystem_type();
    let huge = (kind == HUGETLBFS_MAGIC).then_some(stat.st_blksize as u64);
    let contents = if huge.is_some() {
        huge_memory::contents(look.data, descriptor, stat.st_size as u64)?
    } else {
        let file = reopen::again(descriptor, libc::O_RDONLY).capturing("opening", descriptor.object())?;
        Contents::take(&file, stat.st_size as u64, look.data).capturing("reading", descriptor.object())?
    };
    let attributes =
        attributes::take(descriptor.as_fd()).capturing("reading the attributes of", descriptor.object())?;
    let times = Some(((stat.st_atime, stat.st_atime_nsec), (stat.st_mtime, stat.st_mtime_nsec)));
    Ok(MemfdBody { contents, mode: stat.st_mode & 0o7777, uid: stat.st_uid, gid: stat.st_gid, huge, times, attributes })
}

struct Made {
    file: OwnedFd,
    /// Whether its first description is somebody's by now.
    is_given: bool,
}

impl Made {
    /// A description of it. The one that is born with it does not count as one that writes, so that the memory can be
    /// executed (`fexecve(3)`); those that are opened do.
    fn describe(&mut self, flags: i32) -> std::io::Result<OwnedFd> {
        let settable = libc::O_APPEND | libc::O_NONBLOCK | libc::O_NOATIME | libc::O_ASYNC | LARGE_FILE;
        if self.is_given || flags & !settable != libc::O_RDWR {
            return Ok(reopen::again(&self.file, flags)?);
        }
        self.is_given = true;
        let file = self.file.try_clone()?;
        reopen::set_flags(&file, flags)?;
        Ok(file)
    }
}

fn make(rebuild: &Rebuild<'_>, state: &MemfdState, shown: &str) -> Result<OwnedFd, RebuildError> {
    let missing = || RebuildError::Damaged(format!("what is in {shown} is not in it"));
    let body = state.body.as_ref().ok_or_else(missing)?;
    let file = create(&state.name, body.huge).rebuilding("making", shown)?;
    match body.huge {
        None => body.contents.put(&file, rebuild.image).rebuilding("filling", shown)?,
        Some(page) => {
            ftruncate(&file, body.contents.size as i64).rebuilding("making room in", shown)?;
            huge_memory::fill(file.as_fd(), page, &body.contents, rebuild, shown)?;
        }
    }
    let now =
        if state.seals & AFTER_MAPPING == 0 { state.seals } else { state.seals & !AFTER_MAPPING & !libc::F_SEAL_SEAL };
    let finish = || -> std::io::Result<()> {
        fchown(&file, Some(Uid::from_raw(body.uid)), Some(Gid::from_raw(body.gid)))?;
        fchmod(&file, Mode::from_bits_truncate(body.mode))?;
        attributes::put(file.as_fd(), &body.attributes)?;
        if let Some((accessed, modified)) = body.times {
            futimens(&file, &TimeSpec::new(accessed.0, accessed.1), &TimeSpec::new(modified.0, modified.1))?;
        }
        Ok(seal(file.as_fd(), now)?)
    };
    finish().rebuilding("sealing", shown)?;
    Ok(file)
}

fn create(name: &[u8], huge: Option<u64>) -> std::io::Result<OwnedFd> {
    let mut flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    if let Some(page) = huge {
        // MFD_HUGE_SHIFT: the flags say how many bits a page has.
        flags |= MFdFlags::MFD_HUGETLB | MFdFlags::from_bits_retain((page.trailing_zeros() & 0x3f) << 26);
    }
    Ok(memfd_create(std::ffi::CString::new(name)?.as_c_str(), flags)?)
}

fn seal(file: BorrowedFd<'_>, seals: i32) -> nix::Result<()> {
    let held = fcntl(file, FcntlArg::F_GET_SEALS)?;
    if seals & !held == 0 {
        return Ok(());
    }
    fcntl(file, FcntlArg::F_ADD_SEALS(SealFlag::from_bits_retain(seals & !held))).map(drop)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::files::testing::round_trip;
    use crate::look::Console;

    fn memory(flags: MFdFlags) -> OwnedFd {
        let file = std::fs::File::from(memfd_create("a name", flags).unwrap());
        file.write_all_at(b"begin", 0).unwrap();
        file.write_all_at(b"end", 5 << 20).unwrap();
        file.into()
    }

    #[test]
    fn two_descriptions_of_one_memory() {
        let file = memory(MFdFlags::empty());
        lseek(&file, 3, Whence::SeekSet).unwrap();
        let reader = reopen::again(&file, libc::O_RDONLY).unwrap();
        let (_, _, again) = round_trip(&[&reader, &file], Console::None);
        let mut bytes = vec![0; (5 << 20) + 3];
        std::fs::File::from(again[0].try_clone().unwrap()).read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes.starts_with(b"begin\0") && bytes.ends_with(b"\0end"));
        assert_eq!(lseek(&again[1], 0, Whence::SeekCur).unwrap(), 3);
        std::fs::File::from(again[1].try_clone().unwrap()).write_all_at(b"B", 0).unwrap();
        let reader = std::fs::File::from(again[0].try_clone().unwrap());
        reader.read_exact_at(&mut bytes[..5], 0).unwrap();
        assert_eq!(&bytes[..5], b"Begin");
        assert!(reader.write_all_at(b"x", 0).is_err());
        assert_eq!(fcntl(&again[0], FcntlArg::F_GET_SEALS).unwrap(), libc::F_SEAL_SEAL);
    }

    #[test]
    fn seals_come_back_those_against_writing_last() {
        let file = memory(MFdFlags::MFD_ALLOW_SEALING);
        let seals = SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_FUTURE_WRITE | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).unwrap();
        let (_, states, again) = round_trip(&[&file], Console::None);
        assert_eq!(fcntl(&again[0], FcntlArg::F_GET_SEALS).unwrap(), libc::F_SEAL_GROW);
        assert!(Memfd.needs_settling(&states[0].state));
        Memfd.settle(again[0].as_fd(), &states[0].state, &|_| None).unwrap();
        assert_eq!(fcntl(&again[0], FcntlArg::F_GET_SEALS).unwrap(), seals.bits());
    }
}
