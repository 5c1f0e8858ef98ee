//! The log of a console: output in frames, moved from the pipe into the file within one system call, so that a monitor
//! that is killed has neither lost nor repeated any of it.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{SpliceFFlags, splice};

use super::frame::{self, HEAD, Kind};
use crate::sys::descriptor::unread;

/// A log that is written.
pub struct Log {
    file: File,
    /// Where the next frame begins.
    end: u64,
}

impl Log {
    /// Opens the log at this path, which is made if there is none.
    pub fn open(path: &Path) -> io::Result<Log> {
        // Not for appending: the kernel splices into no file that is open so.
        let mut file = File::options().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
        let end = file.seek(SeekFrom::End(0))?;
        Ok(Log { file, end })
    }

    /// Adds a frame. A full disk must not stop the pod: what does not fit is left out.
    pub fn add(&mut self, kind: Kind, bytes: &[u8]) {
        let frame = frame::encode(kind, bytes);
        match self.file.write_all_at(&frame, self.end) {
            Ok(()) => self.end += frame.len() as u64,
            Err(_) => self.cut(),
        }
    }

    /// Moves at most `most` bytes out of a pipe and into a frame, and returns how many they were: none if the pipe is empty.
    /// What has been moved can be read again with [`Log::moved`].
    ///
    /// # Errors
    /// The file takes no more, or cannot be spliced into; nothing has been moved then.
    pub fn take(&mut self, kind: Kind, pipe: &OwnedFd, most: usize) -> io::Result<usize> {
        let there = unread(pipe)?.min(most);
        if there == 0 {
            return Ok(0);
        }
        // The head comes first: whoever finds it without its bytes knows from which pipe they are to come.
        let moved = self.write_head(kind, there).and_then(|()| self.fill(pipe, self.end + HEAD as u64, there));
        match moved {
            Ok(moved) if moved == there => {}
            // Somebody in the pod has read its own output.
            Ok(moved) if moved > 0 => self.write_head(kind, moved)?,
            Ok(_) => self.cut(),
            Err(_) => self.cut(),
        }
        let moved = moved?;
        if moved > 0 {
            self.end += (HEAD + moved) as u64;
        }
        Ok(moved)
    }

    /// The last `length` bytes that were moved.
    pub fn moved(&self, length: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.file.read_exact_at(&mut bytes, self.end - length as u64)?;
        Ok(bytes)
    }

    /// Ends the frame in which a monitor was killed: its bytes are in their pipe still, which `pipe` finds by the kind.
    pub fn mend<'a>(&mut self, pipe: impl FnOnce(Kind) -> Option<&'a OwnedFd>) -> io::Result<()> {
        let Some(torn) = self.torn()? else { return Ok(()) };
        let length = self.end;
        self.end = torn.begin;
        let Some((kind, whole)) = torn.head else {
            self.cut();
            return Ok(());
        };
        let payload = torn.begin + HEAD as u64;
        let there = (length - payload) as usize;
        let rest = match pipe(kind) {
            Some(pipe) => self.fill(pipe, length, whole - there)?,
            None => 0,
        };
        if rest < whole - there {
            self.write_head(kind, there + rest)?;
        }
        self.end = payload + (there + rest) as u64;
        Ok(())
    }

    /// Looks through the file for a last frame that is not whole.
    fn torn(&self) -> io::Result<Option<Torn>> {
        let mut begin = 0;
        let mut frames = BufReader::new(&self.file);
        frames.rewind()?;
        while begin < self.end {
            if self.end - begin < HEAD as u64 {
                return Ok(Some(Torn { begin, head: None }));
            }
            let mut head = [0; HEAD];
            frames.read_exact(&mut head)?;
            let (kind, length) = frame::parse_head(&head)?;
            let next = begin + (HEAD + length) as u64;
            if next > self.end {
                return Ok(Some(Torn { begin, head: Some((kind, length)) }));
            }
            frames.seek_relative(length as i64)?;
            begin = next;
        }
        Ok(None)
    }

    fn write_head(&self, kind: Kind, length: usize) -> io::Result<()> {
        self.file.write_all_at(&frame::head(kind, length), self.end)
    }

    /// Moves bytes to this place until there are `length`, or no more in the pipe.
    fn fill(&self, pipe: &OwnedFd, mut at: u64, length: usize) -> io::Result<usize> {
        let mut moved = 0;
        while moved < length {
            let mut offset = at as i64;
            let left = length - moved;
            match splice(pipe, None, &self.file, Some(&mut offset), left, SpliceFFlags::SPLICE_F_NONBLOCK) {
                Ok(0) | Err(Errno::EAGAIN) => break,
                Err(Errno::EINTR) => {}
                // What has been moved is in the log, and the rest in the pipe.
                Err(_) if moved > 0 => break,
                Err(errno) => return Err(errno.into()),
                Ok(length) => {
                    moved += length;
                    at += length as u64;
                }
            }
        }
        Ok(moved)
    }

    /// Removes what is behind the last whole frame.
    fn cut(&self) {
        // A file that cannot be made shorter is mended by whoever opens it next.
        let _ = self.file.set_len(self.end);
    }
}

/// A frame that ends before its length says.
struct Torn {
    begin: u64,
    head: Option<(Kind, usize)>,
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn frames(path: &Path) -> Vec<(Kind, Vec<u8>)> {
        let mut file = File::open(path).unwrap();
        std::iter::from_fn(|| frame::read(&mut file).unwrap()).collect()
    }

    fn pipe_with(bytes: &[u8]) -> (OwnedFd, io::PipeWriter) {
        let (reader, mut writer) = io::pipe().unwrap();
        writer.write_all(bytes).unwrap();
        (reader.into(), writer)
    }

    #[test]
    fn output_moves_from_the_pipe_into_a_frame() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut log = Log::open(&path).unwrap();
        let (pipe, _writer) = pipe_with(b"hello");
        assert_eq!(log.take(Kind::Output, &pipe, 3).unwrap(), 3);
        assert_eq!(log.moved(3).unwrap(), b"hel");
        assert_eq!(log.take(Kind::Output, &pipe, 100).unwrap(), 2);
        assert_eq!(log.take(Kind::Output, &pipe, 100).unwrap(), 0);
        log.add(Kind::ErrorOutput, b"said");
        let expected = [(Kind::Output, b"hel".to_vec()), (Kind::Output, b"lo".to_vec())];
        assert_eq!(frames(&path), [&expected[..], &[(Kind::ErrorOutput, b"said".to_vec())]].concat());
    }

    #[test]
    fn a_frame_is_ended_wherever_its_monitor_was_killed() {
        let whole = frame::encode(Kind::ErrorOutput, b"hello");
        for cut in 0..=whole.len() {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("log");
            std::fs::write(&path, [&frame::encode(Kind::Output, b"before"), &whole[..cut]].concat()).unwrap();
            // The bytes leave the pipe when they are in the file.
            let (pipe, _writer) = pipe_with(&b"hello"[cut.saturating_sub(HEAD)..]);
            let mut log = Log::open(&path).unwrap();
            log.mend(|kind| (kind == Kind::ErrorOutput).then_some(&pipe)).unwrap();
            log.take(Kind::ErrorOutput, &pipe, 100).unwrap();
            let expected = [(Kind::Output, b"before".to_vec()), (Kind::ErrorOutput, b"hello".to_vec())];
            assert_eq!(frames(&path), expected, "killed after {cut} bytes");
        }
    }

    #[test]
    fn bytes_that_nobody_has_any_more_make_a_shorter_frame() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        std::fs::write(&path, &frame::encode(Kind::Output, b"hello")[..HEAD + 2]).unwrap();
        let mut log = Log::open(&path).unwrap();
        log.mend(|_| None).unwrap();
        log.add(Kind::Output, b"after");
        assert_eq!(frames(&path), [(Kind::Output, b"he".to_vec()), (Kind::Output, b"after".to_vec())]);
    }
}
