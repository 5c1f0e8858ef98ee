//! The whole contents of a file, holes left out, in the image.

use std::io;
use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::sys::uio::{pread, pwrite};
use nix::unistd::{Whence, ftruncate, lseek};
use serde::{Deserialize, Serialize};

use crate::image::{DataRef, DataSink, ImageReader};

/// Bytes that are taken at a time.
const CHUNK: u64 = 1 << 20;

/// The contents of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Contents {
    /// Its size in bytes.
    pub size: u64,
    /// Where in it there are bytes, and where they are in the image.
    pub pieces: Vec<(u64, DataRef)>,
}

impl Contents {
    /// Takes the contents of `file`, which must be open for reading and of our own: its offset moves.
    pub fn take(file: impl AsFd, size: u64, data: &mut DataSink) -> io::Result<Contents> {
        let mut pieces = Vec::new();
        let mut at = 0;
        while let Some((start, end)) = stretch(&file, at, size)? {
            for offset in (start..end).step_by(CHUNK as usize) {
                let mut bytes = data.room(CHUNK.min(end - offset) as usize);
                read_exactly(&file, offset, &mut bytes)?;
                pieces.push((offset, data.fill(bytes)));
            }
            at = end;
        }
        Ok(Contents { size, pieces })
    }

    /// Writes the contents into `file`, which is empty.
    pub fn put(&self, file: impl AsFd, image: &ImageReader) -> io::Result<()> {
        ftruncate(&file, self.size as i64)?;
        for (offset, place) in &self.pieces {
            let bytes = super::data_of(image, *place)?;
            let mut done = 0;
            while done < bytes.len() {
                done += pwrite(&file, &bytes[done..], (*offset + done as u64) as i64)?;
            }
        }
        Ok(())
    }
}

/// The next stretch of bytes that is no hole, from `at` on.
fn stretch(file: impl AsFd, at: u64, size: u64) -> io::Result<Option<(u64, u64)>> {
    if at >= size {
        return Ok(None);
    }
    let start = match lseek(&file, at as i64, Whence::SeekData) {
        Err(Errno::ENXIO) => return Ok(None),
        // A file system that does not know of holes.
        Err(Errno::EINVAL) => return Ok(Some((at, size))),
        other => other? as u64,
    };
    let end = lseek(&file, start as i64, Whence::SeekHole)? as u64;
    Ok(Some((start, end.min(size))))
}

fn read_exactly(file: impl AsFd, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        match pread(&file, &mut bytes[done..], (offset + done as u64) as i64)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => done += n,
        }
    }
    Ok(())
}
