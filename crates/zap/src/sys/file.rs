//! Small calls on files that no safe library covers the way they are needed here.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use super::check;

/// `fstat(2)`, whole.
pub fn fstat(file: impl AsFd) -> io::Result<libc::stat> {
    let mut stat = std::mem::MaybeUninit::<libc::stat>::zeroed();
    // SAFETY: the kernel fills the struct that we give it; all-zero is a valid value of it in any case.
    check(unsafe { libc::fstat(file.as_fd().as_raw_fd(), stat.as_mut_ptr()) } as libc::c_long)?;
    // SAFETY: zeroed, then filled.
    Ok(unsafe { stat.assume_init() })
}

/// Has reads and writes of a file (and of its duplicates) return rather than wait.
pub fn set_nonblocking(file: impl AsFd) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL)?);
    fcntl(&file, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

/// Opens a place without reading or writing it (`O_PATH`); follows the last link.
pub fn open_path(path: &std::path::Path) -> io::Result<OwnedFd> {
    let file = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_CLOEXEC).open(path)?;
    Ok(file.into())
}

/// An entry of a directory: where reading goes on behind it, and its name.
pub type Entry = (i64, Vec<u8>);

/// The entries of a directory from where its offset is, in the order of the file system; `.` and `..` are among them.
pub fn entries(directory: impl AsFd) -> io::Result<Vec<Entry>> {
    const HEAD: usize = 19;
    let mut entries = Vec::new();
    let mut buffer = vec![0u8; 64 << 10];
    loop {
        let (fd, room) = (directory.as_fd().as_raw_fd(), buffer.len());
        // SAFETY: the kernel writes at most `room` bytes into the buffer, which is that long.
        let length = check(unsafe { libc::syscall(libc::SYS_getdents64, fd, buffer.as_mut_ptr(), room) })?;
        let mut rest = buffer.get(..length as usize).unwrap_or_default();
        if rest.is_empty() {
            return Ok(entries);
        }
        // Inode, place behind, length, type, name.
        while let (Some(place), Some(size)) = (rest.get(8..16), rest.get(16..18)) {
            let size = usize::from(u16::from_ne_bytes([size[0], size[1]]));
            let name = rest.get(HEAD..size).ok_or_else(|| io::Error::other("an entry is cut off"))?;
            let name = name.split(|byte| *byte == 0).next().unwrap_or_default().to_vec();
            entries.push((place.first_chunk().map_or(0, |place| i64::from_ne_bytes(*place)), name));
            rest = &rest[size..];
        }
    }
}
