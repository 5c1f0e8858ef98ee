//! Reading the kernel's texts in `/proc`.
//!
//! These files do not tell their sizes: `std::fs::read` begins with 32 bytes and asks the kernel to write a `status` eight
//! times over. Here a buffer is kept for each thread, and most files come in one read.

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Bytes of a buffer to begin with. The kernel hands out long tables in pieces of a page or more.
const ROOM: usize = 64 << 10;

thread_local! {
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Whether a file is of such a file system.
pub(crate) fn has(path: &Path) -> bool {
    nix::sys::statfs::statfs(path).is_ok_and(|s| s.filesystem_type() == nix::sys::statfs::PROC_SUPER_MAGIC)
}

/// Reads a file to its end.
pub(crate) fn read(path: impl AsRef<Path>) -> io::Result<Vec<u8>> {
    fill(path.as_ref(), |_, _| false)
}

/// Reads a file that the kernel writes in one go (`status`, `stat`, what is in `fdinfo`): whatever leaves room in the
/// buffer was all.
pub(crate) fn read_record(path: impl AsRef<Path>) -> io::Result<Vec<u8>> {
    fill(path.as_ref(), |got, room| got < room)
}

/// As [`read`], for text.
pub(crate) fn read_text(path: impl AsRef<Path>) -> io::Result<String> {
    String::from_utf8(read(path)?).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

/// As [`read_record`], for text.
pub(crate) fn read_record_text(path: impl AsRef<Path>) -> io::Result<String> {
    String::from_utf8(read_record(path)?).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

/// Has the kernel write a record anew that was opened before.
pub(crate) fn reread_record(file: &File) -> io::Result<Vec<u8>> {
    BUFFER.with_borrow_mut(|buffer| {
        let length = buffer.len().max(ROOM);
        buffer.resize(length, 0);
        match file.read_at(buffer, 0)? {
            got if got < length => Ok(buffer[..got].to_vec()),
            _ => Err(io::Error::new(io::ErrorKind::InvalidData, "longer than any record")),
        }
    })
}

fn fill(path: &Path, was_all: impl Fn(usize, usize) -> bool) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    BUFFER.with_borrow_mut(|buffer| {
        let mut length = 0;
        loop {
            if buffer.len() - length < ROOM / 2 {
                buffer.resize((buffer.len() * 2).max(ROOM), 0);
            }
            let room = buffer.len() - length;
            match file.read(&mut buffer[length..]) {
                Ok(0) => break,
                Ok(got) => {
                    length += got;
                    if was_all(got, room) {
                        break;
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(buffer[..length].to_vec())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_reads_what_std_reads() {
        assert_eq!(read("/proc/self/auxv").unwrap(), std::fs::read("/proc/self/auxv").unwrap());
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("long");
        let bytes: Vec<u8> = (0..5 * ROOM).map(|n| (n % 251) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(read(&path).unwrap(), bytes);
        assert!(read(directory.path().join("nothing")).is_err());
        assert!(read_text(&path).is_err());
    }

    #[test]
    fn a_record_is_whole() {
        let labels =
            |text: &str| text.lines().filter_map(|l| Some(l.split_once(':')?.0.to_owned())).collect::<Vec<_>>();
        let (ours, std) =
            (read_record_text("/proc/self/status").unwrap(), std::fs::read_to_string("/proc/self/status").unwrap());
        assert_eq!(labels(&ours), labels(&std));
    }
}
