//! `PROCMAP_QUERY` of `/proc/PID/maps` (Linux 6.11): one mapping at a time, in binary, and without a path unless it is asked for,
//! which is most of what a line of text costs.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use super::check;

/// A mapping as the kernel tells it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Queried {
    /// First address.
    pub start: u64,
    /// Address behind the last.
    pub end: u64,
    /// [`READ`], [`WRITE`], [`EXECUTE`], [`SHARED`].
    pub flags: u64,
    /// Offset in the file.
    pub offset: u64,
    /// Major and minor number of the file's device.
    pub device: (u32, u32),
    /// Inode of the file; zero for memory of no file.
    pub inode: u64,
    /// Its name, if that was asked for.
    pub name: Vec<u8>,
}

/// `PROCMAP_QUERY_VMA_READABLE`.
pub const READ: u64 = 1;
/// `PROCMAP_QUERY_VMA_WRITABLE`.
pub const WRITE: u64 = 2;
/// `PROCMAP_QUERY_VMA_EXECUTABLE`.
pub const EXECUTE: u64 = 4;
/// `PROCMAP_QUERY_VMA_SHARED`.
pub const SHARED: u64 = 8;

const COVERING_OR_NEXT: u64 = 0x10;
/// `_IOWR('f', 17, struct procmap_query)`
const PROCMAP_QUERY: libc::c_ulong = 0xc068_6611;
/// Longer names are an error (ENAMETOOLONG).
const NAME: usize = 256;

#[repr(C)]
#[derive(Default)]
struct Argument {
    size: u64,
    query_flags: u64,
    query_address: u64,
    start: u64,
    end: u64,
    flags: u64,
    page_size: u64,
    offset: u64,
    inode: u64,
    major: u32,
    minor: u32,
    name_size: u32,
    build_id_size: u32,
    name_address: u64,
    build_id_address: u64,
}

/// The first mapping that ends behind `address`, with its name if `named`; `None` if there is no more.
pub fn query(maps: &File, address: u64, named: bool) -> io::Result<Option<Queried>> {
    let mut name = [0u8; NAME];
    let mut argument = Argument {
        size: size_of::<Argument>() as u64,
        query_flags: COVERING_OR_NEXT,
        query_address: address,
        name_size: if named { NAME as u32 } else { 0 },
        name_address: if named { name.as_mut_ptr() as u64 } else { 0 },
        ..Argument::default()
    };
    // SAFETY: the kernel reads and writes one procmap_query, laid out as `Argument`, and writes at most `name_size` bytes of
    // `name`; both outlive the call.
    match check(unsafe { libc::ioctl(maps.as_raw_fd(), PROCMAP_QUERY, &raw mut argument) }.into()) {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
        other => other?,
    };
    let length = if named { argument.name_size as usize } else { 0 };
    let name = name.get(..length).ok_or_else(|| io::Error::other("PROCMAP_QUERY told too long a name"))?;
    Ok(Some(Queried {
        start: argument.start,
        end: argument.end,
        flags: argument.flags,
        offset: argument.offset,
        device: (argument.major, argument.minor),
        inode: argument.inode,
        name: name.strip_suffix(b"\0").unwrap_or(name).to_vec(),
    }))
}
