//! Where pages come from that are to be put in place.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use crate::image::{FileEntry, StoredData};

/// Whoever has the pages. They come in the order in which they were asked for.
pub trait Supply: Send {
    /// Asks for pages; which are going to come for it, at least those.
    fn ask(&mut self, wanted: Range<u64>) -> io::Result<Range<u64>>;

    /// What is readable when pages have come; `None` if they are there as soon as they were asked for.
    fn arrivals(&self) -> Option<BorrowedFd<'_>>;

    /// How long nothing may come of what was asked for, where that can be.
    fn patience(&self) -> Option<Duration> {
        None
    }

    /// The pages that were asked for first: their offset, and what is in them.
    fn take(&mut self) -> io::Result<(u64, Vec<u8>)>;

    /// All has come, and no more will be asked for.
    fn finish(&mut self) -> io::Result<()>;

    /// The file with the pages, and its checksums where they have to be checked: what another monitor can go on with. None
    /// if they come from a stream.
    fn outlives_us(&self) -> Option<(BorrowedFd<'_>, Option<FileEntry>)> {
        None
    }
}

/// What [`Supply::outlives_us`] gave, to go on with.
pub(super) fn of_file(file: OwnedFd, check: Option<FileEntry>) -> Box<dyn Supply> {
    match check {
        Some(entry) => Box::new(FromStore::new(StoredData::of(file.into(), entry))),
        None => Box::new(FromImage::new(file)),
    }
}

/// The image, all of which has come, and was checked when it did.
pub struct FromImage {
    data: File,
    asked: VecDeque<Range<u64>>,
}

impl FromImage {
    /// The image's data.
    pub fn new(data: OwnedFd) -> FromImage {
        FromImage { data: data.into(), asked: VecDeque::new() }
    }
}

impl Supply for FromImage {
    fn ask(&mut self, wanted: Range<u64>) -> io::Result<Range<u64>> {
        self.asked.push_back(wanted.clone());
        Ok(wanted)
    }

    fn arrivals(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn take(&mut self) -> io::Result<(u64, Vec<u8>)> {
        let wanted = self.asked.pop_front().ok_or(io::ErrorKind::InvalidInput)?;
        let mut bytes = vec![0; (wanted.end - wanted.start) as usize];
        self.data.read_exact_at(&mut bytes, wanted.start)?;
        Ok((wanted.start, bytes))
    }

    fn finish(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn outlives_us(&self) -> Option<(BorrowedFd<'_>, Option<FileEntry>)> {
        Some((self.data.as_fd(), None))
    }
}

/// A store that both hosts see. What is read is checked; what has been read is never read again.
pub struct FromStore {
    data: StoredData,
    asked: VecDeque<Range<u64>>,
}

impl FromStore {
    /// The image's data, in the store.
    pub fn new(data: StoredData) -> FromStore {
        FromStore { data, asked: VecDeque::new() }
    }
}

impl Supply for FromStore {
    fn ask(&mut self, wanted: Range<u64>) -> io::Result<Range<u64>> {
        let whole = self.data.chunk_around(wanted.start);
        self.asked.push_back(whole.clone());
        Ok(whole)
    }

    fn arrivals(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn take(&mut self) -> io::Result<(u64, Vec<u8>)> {
        let whole = self.asked.pop_front().ok_or(io::ErrorKind::InvalidInput)?;
        Ok((whole.start, self.data.read_chunk(whole.start)?))
    }

    fn finish(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn outlives_us(&self) -> Option<(BorrowedFd<'_>, Option<FileEntry>)> {
        let (file, entry) = self.data.parts();
        Some((file, Some(entry.clone())))
    }
}
