//! Memory of huge pages (`mmap` with `MAP_ANONYMOUS | MAP_HUGETLB`): the kernel keeps it in a file without a name, private
//! memory too. A restart needs as many huge pages free on its host.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::sys::uio::pread;
use serde::{Deserialize, Serialize};

use super::{Contents, Descriptor, FileKind, data_of, decoded, reopen};
use crate::error::{CaptureError, Context, RebuildError};
use crate::ids::FileId;
use crate::image::{DataSink, encode};
use crate::look::Look;
use crate::rebuild::Rebuild;
use crate::sys::memory::{huge_anonymous, put_huge};

/// Memory of huge pages, of a process or of it and its relatives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HugeMemoryState {
    /// Which memory it is: descriptions of the same have the same.
    pub inode: u64,
    /// Access mode.
    pub flags: i32,
    /// Bytes of a page.
    pub page: u64,
    /// What is in it, and its size; with the description that was met first. Private pages are not in it.
    pub contents: Option<Contents>,
}

pub(super) struct HugeMemory;

/// Bytes that are looked at together: zeros are left out.
const PIECE: usize = 1 << 20;

impl FileKind for HugeMemory {
    fn name(&self) -> &'static str {
        "huge-memory"
    }

    fn recognizes(&self, descriptor: &Descriptor) -> bool {
        descriptor.link == b"/anon_hugepage (deleted)" && libc::major(descriptor.stat.st_dev) == 0
    }

    fn capture(&self, look: &mut Look<'_>, descriptor: &Descriptor) -> Result<Vec<u8>, CaptureError> {
        let stat = descriptor.stat;
        let first = look.first_sight("huge-memory", stat.st_dev, stat.st_ino);
        let contents = first.then(|| contents(look.data, descriptor, stat.st_size as u64)).transpose()?;
        let (page, flags) = (stat.st_blksize as u64, descriptor.flags());
        Ok(encode(&HugeMemoryState { inode: stat.st_ino, flags, page, contents }))
    }

    fn open(&self, rebuild: &mut Rebuild<'_>, _id: FileId, state: &[u8]) -> Result<OwnedFd, RebuildError> {
        let state: HugeMemoryState = decoded(state)?;
        let shown = format!("memory of pages of {} KiB", state.page >> 10);
        if rebuild.object::<Made>("huge-memory", state.inode).is_none() {
            let made = make(rebuild, &state, &shown)?;
            rebuild.keep_object("huge-memory", state.inode, Made(made));
        }
        let made = rebuild.object::<Made>("huge-memory", state.inode);
        let made = made.ok_or_else(|| RebuildError::Damaged(format!("{shown} is of two kinds")))?;
        reopen::again(&made.0, state.flags).rebuilding("opening", &shown)
    }
}

/// What is in a file of huge pages.
pub(super) fn contents(data: &mut DataSink, descriptor: &Descriptor, size: u64) -> Result<Contents, CaptureError> {
    let reader = reopen::again(descriptor, libc::O_RDONLY).capturing("opening", descriptor.object())?;
    let (mut pieces, mut at) = (Vec::new(), 0);
    while at < size {
        let mut bytes = vec![0; PIECE.min((size - at) as usize)];
        let read = pread(&reader, &mut bytes, at as i64).capturing("reading", descriptor.object())?;
        if read == 0 {
            return Err(CaptureError::Unexpected { object: descriptor.object(), what: format!("end at {at}") });
        }
        bytes.truncate(read);
        if bytes.iter().any(|byte| *byte != 0) {
            pieces.push((at, data.append(bytes)));
        }
        at += read as u64;
    }
    Ok(Contents { size, pieces })
}

fn make(rebuild: &Rebuild<'_>, state: &HugeMemoryState, shown: &str) -> Result<OwnedFd, RebuildError> {
    let missing = || RebuildError::Damaged(format!("the contents of {shown} are not in it"));
    let contents = state.contents.as_ref().ok_or_else(missing)?;
    check(state.page, contents.size, shown)?;
    if contents.size == 0 {
        return Err(RebuildError::Damaged(format!("there is nothing of {shown}")));
    }
    let made = huge_anonymous(contents.size, state.page).rebuilding("making", shown)?;
    fill(made.as_fd(), state.page, contents, rebuild, shown)?;
    Ok(made)
}

fn check(page: u64, size: u64, shown: &str) -> Result<(), RebuildError> {
    if page.is_power_of_two() && page >= 4096 && size.is_multiple_of(page) {
        return Ok(());
    }
    Err(RebuildError::Damaged(format!("{size} bytes of {shown} cannot be")))
}

/// Puts that into a file of pages of this size, which is as long as it was.
pub(super) fn fill(
    file: BorrowedFd<'_>,
    page: u64,
    contents: &Contents,
    rebuild: &Rebuild<'_>,
    shown: &str,
) -> Result<(), RebuildError> {
    check(page, contents.size, shown)?;
    for (at, place) in &contents.pieces {
        let bytes = data_of(rebuild.image, *place).rebuilding("reading", shown)?;
        if at.checked_add(bytes.len() as u64).is_none_or(|end| end > contents.size) {
            return Err(RebuildError::Damaged(format!("there are bytes behind the end of {shown}")));
        }
        put_huge(file, page, *at, &bytes).map_err(|error| lacking(error, shown))?;
    }
    Ok(())
}

fn lacking(error: std::io::Error, shown: &str) -> RebuildError {
    match error.raw_os_error() {
        Some(libc::ENOSPC | libc::ENOMEM) => {
            RebuildError::Lacks(format!("free huge pages for {shown} (write how many to /proc/sys/vm/nr_hugepages)"))
        }
        _ => RebuildError::Kernel { step: "filling", object: shown.to_owned(), source: error },
    }
}

struct Made(OwnedFd);
