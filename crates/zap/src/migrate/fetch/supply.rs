//! Where pages that were left behind come from.

use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use crate::image::StoredData;
use crate::migrate::protocol::Message;
use crate::migrate::wire::Wire;

/// Whoever has the pages. They come in the order in which they were asked for.
pub trait Supply: Send {
    /// Asks for pages; which are going to come for it, at least those.
    fn ask(&mut self, wanted: Range<u64>) -> io::Result<Range<u64>>;

    /// What is readable when pages have come; `None` if they are there as soon as they were asked for.
    fn arrivals(&self) -> Option<BorrowedFd<'_>>;

    /// The pages that were asked for first: their offset, and what is in them.
    fn take(&mut self) -> io::Result<(u64, Vec<u8>)>;

    /// No more will be asked for.
    fn finish(&mut self) -> io::Result<()>;
}

/// The host that the pod has left.
pub struct FromSource(pub Arc<Wire>);

impl Supply for FromSource {
    fn ask(&mut self, wanted: Range<u64>) -> io::Result<Range<u64>> {
        self.0.send(&Message::Fetch { offset: wanted.start, length: wanted.end - wanted.start })?;
        Ok(wanted)
    }

    fn arrivals(&self) -> Option<BorrowedFd<'_>> {
        Some(self.0.arrivals())
    }

    fn take(&mut self) -> io::Result<(u64, Vec<u8>)> {
        self.0.hear_pages()
    }

    fn finish(&mut self) -> io::Result<()> {
        self.0.send(&Message::Complete)
    }
}

/// A store that both hosts see. What is read is checked; what has been read is never read again.
pub struct FromStore {
    data: StoredData,
    asked: std::collections::VecDeque<Range<u64>>,
}

impl FromStore {
    /// The image's data, in the store.
    pub fn new(data: StoredData) -> FromStore {
        FromStore { data, asked: Default::default() }
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
}
