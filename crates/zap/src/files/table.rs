//! The open file descriptions met by a checkpoint, each once.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::os::fd::{AsRawFd, OwnedFd};

use crate::error::{CaptureError, Context};
use crate::files::{Descriptor, FileState, kind_of};
use crate::ids::FileId;
use crate::look::{Look, Subject};
use crate::sys::kcmp;

/// Which open file descriptions have been met, and what was captured of each.
#[derive(Default)]
pub struct FileTable {
    met: Vec<Met>,
    /// Candidates for identity: indexes into `met` of descriptions of one inode with the same flags, in kcmp's order.
    buckets: HashMap<Key, Vec<usize>>,
}

/// Device, inode, status flags.
type Key = (u64, u64, i32);

struct Met {
    file: OwnedFd,
    captured: Option<FileState>,
}

impl FileTable {
    /// The states captured, in order of their numbers.
    pub fn states(&self) -> impl Iterator<Item = &FileState> {
        self.met.iter().filter_map(|m| m.captured.as_ref())
    }

    /// Our copy of a description that was met.
    pub fn file(&self, id: FileId) -> Option<&OwnedFd> {
        self.met.get(id.0 as usize).map(|m| &m.file)
    }

    /// Where in the bucket of `key` this description is, or where it belongs: buckets are in the kernel's own order.
    fn find(&self, descriptor: &Descriptor, key: Key) -> Result<Result<usize, usize>, CaptureError> {
        let ours = std::process::id() as i32;
        let (mut low, bucket) = (0, self.buckets.get(&key).map_or(&[][..], Vec::as_slice));
        let mut high = bucket.len();
        while low < high {
            let middle = (low + high) / 2;
            let (a, b) = (self.met[bucket[middle]].file.as_raw_fd(), descriptor.file.as_raw_fd());
            match kcmp::compare_files(ours, a, ours, b).capturing("comparing", descriptor.object())? {
                Ordering::Equal => return Ok(Ok(bucket[middle])),
                Ordering::Less => low = middle + 1,
                Ordering::Greater => high = middle,
            }
        }
        Ok(Err(low))
    }
}

/// The number of the description behind `descriptor`; captures it when it is met for the first time.
pub fn intern(look: &mut Look<'_>, descriptor: Descriptor) -> Result<FileId, CaptureError> {
    let key = (descriptor.stat.st_dev, descriptor.stat.st_ino, descriptor.flags());
    let place = match look.files.find(&descriptor, key)? {
        Ok(met) => return Ok(FileId(met as u32)),
        Err(place) => place,
    };
    let kind = kind_of(&descriptor)?;
    let id = FileId(look.files.met.len() as u32);
    let copy = descriptor.file.try_clone().capturing("copying", descriptor.object())?;
    look.files.buckets.entry(key).or_default().insert(place, id.0 as usize);
    look.files.met.push(Met { file: copy, captured: None });
    let state = kind.capture(look, &descriptor)?;
    look.files.met[id.0 as usize].captured = Some(FileState { id, kind: kind.name().to_owned(), state });
    Ok(id)
}

/// Reads what `/proc/self` says of a file that is ours, and makes a [`Descriptor`] of it.
pub fn describe(subject: &Subject, number: i32, file: OwnedFd) -> Result<Descriptor, CaptureError> {
    let name = || format!("file descriptor {number} of process {}", subject.pod);
    let link =
        std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).capturing("reading the link", name())?;
    let info = std::fs::read(format!("/proc/self/fdinfo/{}", file.as_raw_fd())).capturing("reading fdinfo", name())?;
    let stat = crate::sys::file::fstat(&file).capturing("looking at", name())?;
    let link = std::os::unix::ffi::OsStringExt::into_vec(link.into_os_string());
    Ok(Descriptor { subject: subject.clone(), number, file, link, info, stat })
}
