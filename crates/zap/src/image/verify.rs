//! Checking the stored bytes against the manifest, by several threads where there is much to check.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use super::ImageError;
use super::chunk::{CHUNK, ChunkPlace, FileEntry};

/// A file of an image, open, and what the manifest says of it.
pub(super) struct Stored<'a> {
    pub(super) path: PathBuf,
    pub(super) file: &'a File,
    pub(super) entry: &'a FileEntry,
}

/// Read at a time: small enough to stay in a core's own cache between the copy and the checksum.
const PIECE: usize = 256 << 10;
/// Chunks from which on a second thread pays.
const MANY: usize = 8;

struct Job<'a> {
    path: &'a Path,
    file: &'a File,
    place: ChunkPlace,
}

/// Checks every stored byte of `files`.
pub(super) fn verify(files: &[Stored<'_>]) -> Result<(), ImageError> {
    let mut jobs = Vec::new();
    for stored in files {
        check_length(stored)?;
        let places = stored.entry.chunks().map_err(|what| ImageError::damaged(&stored.path, what))?;
        jobs.extend(places.into_iter().map(|place| Job { path: &stored.path, file: stored.file, place }));
    }
    let threads = match jobs.len() {
        0..MANY => 1,
        _ => std::thread::available_parallelism().map_or(1, usize::from).min(jobs.len()),
    };
    let next = AtomicUsize::new(0);
    let work = || {
        let mut piece = vec![0; PIECE.min(CHUNK)];
        while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
            check_chunk(job, &mut piece)?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let ours = work();
        let theirs = others.into_iter().map(|t| t.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        theirs.fold(ours, Result::and)
    })
}

fn check_length(stored: &Stored<'_>) -> Result<(), ImageError> {
    let found = stored.file.metadata().map_err(ImageError::io("looking at", &stored.path))?.len();
    let expected = stored.entry.stored_length();
    if found == expected {
        return Ok(());
    }
    Err(ImageError::damaged(&stored.path, format!("it has {found} bytes, the manifest says {expected}")))
}

fn check_chunk(job: &Job<'_>, piece: &mut [u8]) -> Result<(), ImageError> {
    let mut hasher = crc32fast::Hasher::new();
    let mut done = 0;
    while done < job.place.stored {
        let now = piece.len().min(job.place.stored - done);
        let read = job.file.read_exact_at(&mut piece[..now], job.place.offset + done as u64);
        read.map_err(ImageError::io("reading", job.path))?;
        hasher.update(&piece[..now]);
        done += now;
    }
    if hasher.finalize() == job.place.crc32 {
        return Ok(());
    }
    Err(ImageError::damaged(job.path, format!("the checksum of the MiB at byte {} is wrong", job.place.offset)))
}
