//! The entries of an archive. Each is the length of its head (u32, little-endian), the head in CBOR, and for a regular file
//! the bytes of its stretches.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

use crate::image::{decode, encode};

/// What an archive begins with.
pub(super) const TITLE: &[u8] = b"zap layer 1\n";
/// A head longer than this is not believed: paths and attributes are bounded by the kernel.
const LONGEST: usize = 64 << 20;

/// One entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Entry {
    /// Relative to the top; empty for the top itself.
    #[serde(with = "serde_bytes")]
    pub(super) path: Vec<u8>,
    pub(super) what: What,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum What {
    /// A file with what is known of it.
    File(Kind, Facts),
    /// A regular file that was packed before, of which some bytes differ by now. `stretches` are all that are no hole now,
    /// `changed` those whose bytes follow.
    Patched { size: u64, stretches: Vec<(u64, u64)>, changed: Vec<(u64, u64)>, facts: Facts },
    /// Another name of the regular file that was packed under this path.
    Link(#[serde(with = "serde_bytes")] Vec<u8>),
    /// It is gone.
    Removed,
    /// The archive is complete.
    End,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Kind {
    Directory,
    /// Size, and the stretches (offset, length) whose bytes follow.
    Regular(u64, Vec<(u64, u64)>),
    Symlink(#[serde(with = "serde_bytes")] Vec<u8>),
    /// A device, FIFO or socket: file type and device number as `mknod` takes them.
    Node(u32, u64),
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Facts {
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Seconds, nanoseconds.
    pub(super) accessed: (i64, i64),
    pub(super) modified: (i64, i64),
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) attributes: Vec<(serde_bytes::ByteBuf, serde_bytes::ByteBuf)>,
}

pub(super) fn write(out: &mut dyn Write, entry: &Entry) -> io::Result<()> {
    let head = encode(entry);
    out.write_all(&(head.len() as u32).to_le_bytes())?;
    out.write_all(&head)
}

pub(super) fn read(from: &mut dyn Read) -> io::Result<Entry> {
    let mut length = [0; 4];
    from.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length) as usize;
    if length > LONGEST {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("an entry claims {length} bytes")));
    }
    let mut head = vec![0; length];
    from.read_exact(&mut head)?;
    decode(&head).map_err(|why| io::Error::new(io::ErrorKind::InvalidData, why))
}
