//! Bulk bytes on their way into an image.

use std::io;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use super::DataRef;
use super::chunk::{ChunkWriter, Written};
use crate::sys::arena::{Arena, Piece};

/// Bytes of a page; what rooms for pages are aligned to.
const PAGE: usize = 4096;

/// Collects bulk bytes. What is appended has its place at once; it reaches the disk when [`DataSink::flush`] is called
/// (before the hold) or the image is finished (after it), never while the pod is held.
#[derive(Default)]
pub struct DataSink {
    /// What comes behind the prepared room, if there is one.
    pending: Vec<Vec<u8>>,
    /// Where the next of that goes.
    end: u64,
    prepared: Option<Prepared>,
    out: Option<ChunkWriter>,
}

/// Memory that is in place before it is needed.
struct Prepared {
    /// Where in the image's data it begins.
    first: u64,
    arena: Arc<Arena>,
}

/// Room for bytes, to be filled and then appended ([`DataSink::fill`]).
pub struct Room {
    bytes: Bytes,
    align: usize,
}

enum Bytes {
    Prepared(Piece),
    Fresh(Vec<u8>),
}

impl Room {
    /// Keeps but the first bytes.
    pub fn truncate(&mut self, length: usize) {
        match &mut self.bytes {
            Bytes::Prepared(piece) => piece.truncate(length),
            Bytes::Fresh(bytes) => bytes.truncate(length),
        }
    }
}

impl Deref for Room {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Prepared(piece) => piece,
            Bytes::Fresh(bytes) => bytes,
        }
    }
}

impl DerefMut for Room {
    fn deref_mut(&mut self) -> &mut [u8] {
        match &mut self.bytes {
            Bytes::Prepared(piece) => piece,
            Bytes::Fresh(bytes) => bytes,
        }
    }
}

impl DataSink {
    pub(super) fn new(out: ChunkWriter) -> DataSink {
        DataSink { out: Some(out), ..DataSink::default() }
    }

    /// Gives it memory that is in place before it is needed. Once only. (A mapping of the image's own file, on a tmpfs, would
    /// save a copy, but its pages are small, and to touch one takes four microseconds.)
    pub fn prepare(&mut self, arena: Arena) -> io::Result<()> {
        self.flush()?;
        let Some(out) = self.out.as_mut().filter(|_| self.prepared.is_none()) else { return Ok(()) };
        let length = arena.size();
        let arena = Arc::new(arena);
        let first = self.end.next_multiple_of(PAGE as u64);
        out.append(&vec![0; (first - self.end) as usize])?;
        self.prepared = Some(Prepared { first, arena });
        self.end = first + length as u64;
        Ok(())
    }

    /// Room for so many bytes.
    pub fn room(&self, length: usize) -> Room {
        self.aligned(length, 1)
    }

    /// Room for whole pages, at an offset that is a multiple of the page size.
    pub fn room_for_pages(&self, length: usize) -> Room {
        self.aligned(length, PAGE)
    }

    fn aligned(&self, length: usize, align: usize) -> Room {
        let piece = self.prepared.as_ref().and_then(|prepared| prepared.arena.take(length, align));
        Room { bytes: piece.map_or_else(|| Bytes::Fresh(vec![0; length]), Bytes::Prepared), align }
    }

    /// Appends the room, filled.
    pub fn fill(&mut self, room: Room) -> DataRef {
        let length = room.len() as u64;
        match (room.bytes, &self.prepared) {
            (Bytes::Prepared(piece), Some(prepared)) => DataRef { offset: prepared.first + piece.at() as u64, length },
            (Bytes::Prepared(piece), None) => self.push(piece.to_vec()),
            (Bytes::Fresh(bytes), _) => {
                let gap = self.end.next_multiple_of(room.align as u64) - self.end;
                self.push(vec![0; gap as usize]);
                self.push(bytes)
            }
        }
    }

    /// Appends whole pages.
    #[cfg(test)]
    pub(super) fn append_pages(&mut self, pages: Vec<u8>) -> DataRef {
        let mut room = self.room_for_pages(pages.len());
        room.copy_from_slice(&pages);
        self.fill(room)
    }

    /// Appends bytes that need no alignment.
    pub fn append(&mut self, bytes: Vec<u8>) -> DataRef {
        if self.prepared.is_none() {
            return self.push(bytes);
        }
        let mut room = self.room(bytes.len());
        match &mut room.bytes {
            Bytes::Prepared(piece) => piece.copy_from_slice(&bytes),
            Bytes::Fresh(fresh) => *fresh = bytes,
        }
        self.fill(room)
    }

    fn push(&mut self, bytes: Vec<u8>) -> DataRef {
        let here = DataRef { offset: self.end, length: bytes.len() as u64 };
        self.end += here.length;
        if !bytes.is_empty() {
            self.pending.push(bytes);
        }
        here
    }

    /// How much has been appended, before memory was prepared.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Writes what is pending to the image. A sink of no image keeps everything.
    pub fn flush(&mut self) -> io::Result<()> {
        if let Some(out) = &mut self.out {
            if let Some(prepared) = self.prepared.take() {
                prepared.write(out, self.pending.is_empty())?;
            }
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

impl Prepared {
    /// Writes it, but for what is left of it if it is the `last`.
    fn write(self, out: &mut ChunkWriter, last: bool) -> io::Result<()> {
        let mut arena = Arc::into_inner(self.arena).ok_or_else(|| io::Error::other("a room was not filled"))?;
        out.append(arena.bytes(!last))
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::path::Path;

    use super::super::chunk::{Compression, Out};
    use super::*;

    fn sink(directory: &Path, compression: Compression) -> (File, DataSink) {
        let file = tempfile::tempfile_in(directory).unwrap();
        let out = Out::File(file.try_clone().unwrap());
        (file, DataSink::new(ChunkWriter::new(out, "data", compression)))
    }

    fn contents(file: &File, places: &[DataRef]) -> Vec<Vec<u8>> {
        let read = |place: &DataRef| {
            let mut bytes = vec![0; place.length as usize];
            file.read_exact_at(&mut bytes, place.offset).unwrap();
            bytes
        };
        places.iter().map(read).collect()
    }

    /// Bytes before, in, and behind the prepared room.
    fn fill(sink: &mut DataSink) -> Vec<DataRef> {
        let before = sink.append(b"before".to_vec());
        sink.prepare(Arena::new(8 * PAGE).unwrap()).unwrap();
        let (mut small, mut pages) = (sink.room(100), sink.room_for_pages(2 * PAGE));
        small[..5].copy_from_slice(b"small");
        small.truncate(5);
        pages.fill(7);
        let places = [before, sink.fill(pages), sink.append(b"copied".to_vec()), sink.fill(small)];
        let mut large = sink.room_for_pages(20 * PAGE);
        large.fill(8);
        let places = [&places[..], &[sink.fill(large), sink.append(b"late".to_vec())]].concat();
        assert!(places[1].offset.is_multiple_of(PAGE as u64) && places[4].offset.is_multiple_of(PAGE as u64));
        places
    }

    #[test]
    fn everything_is_where_it_was_said_to_be() {
        let directory = tempfile::tempdir().unwrap();
        for directory in [Path::new("/dev/shm"), directory.path()] {
            let (file, mut sink) = sink(directory, Compression::None);
            let places = fill(&mut sink);
            let entry = sink.finish().unwrap().unwrap().entry;
            let expected = [&b"before"[..], &[7; 2 * PAGE], b"copied", b"small", &[8; 20 * PAGE], b"late"];
            assert_eq!(contents(&file, &places), expected);
            assert_eq!(file.metadata().unwrap().len(), entry.length);
            let all = contents(&file, &[DataRef { offset: 0, length: entry.length }]);
            let sums: Vec<u32> = all[0].chunks(1 << 20).map(crc32fast::hash).collect();
            assert_eq!(sums, entry.crc32);
        }
    }

    #[test]
    fn what_was_prepared_and_not_needed_is_not_in_the_image() {
        for compression in [Compression::None, Compression::Lz4] {
            let (file, mut sink) = sink(Path::new("/dev/shm"), compression);
            sink.prepare(Arena::new(1 << 20).unwrap()).unwrap();
            let place = sink.append(vec![3; 10]);
            let entry = sink.finish().unwrap().unwrap().entry;
            assert_eq!((place.offset, entry.length), (0, 10));
            assert!(file.metadata().unwrap().len() <= 10);
        }
    }
}
