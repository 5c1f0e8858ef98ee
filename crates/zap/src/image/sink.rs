//! Bulk bytes on their way into an image.

use std::io;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, channel, sync_channel};

use super::DataRef;
use super::chunk::{ChunkWriter, Written};
use super::room::Room;

/// Bytes of a page; what [`DataSink::append_pages`] aligns to.
const PAGE: u64 = 4096;

/// Collects bulk bytes. What is appended has its place at once; it reaches the disk when [`DataSink::flush`] is called
/// (before the hold, or after it) or [`DataSink::stream`], and else while the pod is held only if the host's memory runs out.
#[derive(Default)]
pub struct DataSink {
    pending: Vec<Vec<u8>>,
    end: u64,
    out: Option<ChunkWriter>,
    room: Room,
    /// Why what was pending could not be written when memory ran out.
    failed: Option<io::Error>,
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
        if self.room.is_scarce_after(here.length) && self.failed.is_none() {
            self.failed = self.flush().err();
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
        if let Some(error) = self.failed.take() {
            return Err(error);
        }
        if let Some(out) = &mut self.out {
            for bytes in self.pending.drain(..) {
                out.append(&bytes)?;
            }
        }
        Ok(())
    }

    /// What was appended is lost: the next who writes is told why.
    pub fn fail(&mut self, error: io::Error) {
        self.failed = Some(error);
    }

    /// Has `feed` append pages that are written while it prepares the next ones. What is pending is written first.
    pub fn stream<R>(&mut self, feed: impl FnOnce(&mut Feed<'_>) -> R) -> io::Result<R> {
        self.append_pages(Vec::new());
        self.flush()?;
        let Some(out) = &mut self.out else { return Ok(feed(&mut Feed::Kept(self))) };
        std::thread::scope(|scope| {
            let (full, to_write) = sync_channel::<Vec<u8>>(1);
            let (written, free) = channel();
            let writer = scope.spawn(move || {
                for bytes in to_write {
                    out.append(&bytes)?;
                    // Nobody may need another one.
                    let _ = written.send(bytes);
                }
                Ok(())
            });
            let mut way = Feed::Written { end: self.end, full, free, made: 0 };
            let result = feed(&mut way);
            self.end = way.end();
            drop(way);
            writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)).map(|()| result)
        })
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

/// Where pages are appended one buffer after another.
pub enum Feed<'a> {
    /// To a sink of no image, which keeps them.
    Kept(&'a mut DataSink),
    /// To a thread that writes them.
    Written {
        /// Where the next byte goes.
        end: u64,
        /// Buffers to write.
        full: SyncSender<Vec<u8>>,
        /// Buffers that were written.
        free: Receiver<Vec<u8>>,
        /// How many there are.
        made: usize,
    },
}

/// One that is filled, one that waits, one that is written.
const BUFFERS: usize = 3;

impl Feed<'_> {
    /// Room for so many bytes, with anything in it: memory that was touched before where there is any.
    pub fn buffer(&mut self, length: usize) -> Vec<u8> {
        let mut buffer = match self {
            Feed::Kept(_) => Vec::new(),
            Feed::Written { free, made, .. } => match free.try_recv() {
                Ok(buffer) => buffer,
                // The writer has gone, and says why.
                Err(TryRecvError::Disconnected) => Vec::new(),
                Err(TryRecvError::Empty) if *made < BUFFERS => {
                    *made += 1;
                    Vec::new()
                }
                Err(TryRecvError::Empty) => free.recv().unwrap_or_default(),
            },
        };
        buffer.resize(length, 0);
        buffer
    }

    /// Appends whole pages.
    pub fn append(&mut self, pages: Vec<u8>) -> DataRef {
        match self {
            Feed::Kept(sink) => sink.append_pages(pages),
            Feed::Written { end, full, .. } => {
                let here = DataRef { offset: *end, length: pages.len() as u64 };
                *end += here.length;
                // If the writer has gone, it says why.
                let _ = full.send(pages);
                here
            }
        }
    }

    fn end(&self) -> u64 {
        match self {
            Feed::Kept(sink) => sink.end,
            Feed::Written { end, .. } => *end,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sink_of_no_image_keeps_what_is_streamed() {
        let mut sink = DataSink::default();
        sink.append(b"odd".to_vec());
        let places = sink
            .stream(|feed| {
                [1u8, 2].map(|byte| {
                    let mut buffer = feed.buffer(PAGE as usize);
                    buffer.fill(byte);
                    feed.append(buffer).offset
                })
            })
            .unwrap();
        assert_eq!((places, sink.end()), ([PAGE, 2 * PAGE], 3 * PAGE));
        let all = sink.into_pending();
        assert_eq!((all[PAGE as usize], all[2 * PAGE as usize]), (1, 2));
    }
}
