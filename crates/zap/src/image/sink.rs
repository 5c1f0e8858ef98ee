//! Bulk bytes on their way into an image.

use std::io;

use super::DataRef;
use super::chunk::{ChunkWriter, Written};
use crate::sys::heap::Stock;

/// Bytes of a page; what [`DataSink::append_pages`] aligns to.
const PAGE: u64 = 4096;

/// Collects bulk bytes. What is appended has its place at once; it reaches the disk when [`DataSink::flush`] is called
/// (before the hold, or after it), never while the pod is held.
#[derive(Default)]
pub struct DataSink {
    pending: Vec<Vec<u8>>,
    end: u64,
    out: Option<ChunkWriter>,
    /// Memory for what is read while the pod is held, and then appended.
    pub stock: Stock,
}

impl DataSink {
    pub(super) fn new(out: ChunkWriter) -> DataSink {
        DataSink { out: Some(out), ..DataSink::default() }
    }

    /// Appends bytes that need no alignment.
    pub fn append(&mut self, bytes: Vec<u8>) -> DataRef {
        let here = DataRef { offset: self.end, length: bytes.len() as u64 };
        self.end += here.length;
        if !bytes.is_empty() {
            self.pending.push(bytes);
        }
        here
    }

    /// Appends whole pages, at an offset that is a multiple of the page size.
    pub fn append_pages(&mut self, pages: Vec<u8>) -> DataRef {
        let gap = self.end.next_multiple_of(PAGE) - self.end;
        self.append(vec![0; gap as usize]);
        self.append(pages)
    }

    /// Where the next byte would go: how much has been appended.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Writes what is pending to the image. A sink of no image keeps everything.
    pub fn flush(&mut self) -> io::Result<()> {
        if let Some(out) = &mut self.out {
            for bytes in self.pending.drain(..) {
                out.append(&bytes)?;
            }
        }
        Ok(())
    }

    pub(super) fn finish(mut self) -> io::Result<Option<Written>> {
        self.flush()?;
        self.out.take().map(ChunkWriter::finish).transpose()
    }

    /// Everything that is pending, in one piece.
    pub(super) fn into_pending(self) -> Vec<u8> {
        self.pending.concat()
    }
}
