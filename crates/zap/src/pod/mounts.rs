//! The host's mount table, as `/proc/self/mountinfo` tells it.

use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use crate::mounts::{self, Entry};

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Where it is.
    pub target: PathBuf,
    /// The type of its file system: `ext4`.
    pub kind: String,
    /// Whether it, or its file system, is read-only.
    pub read_only: bool,
}

/// Reads a mount table. Lines that are not understood are passed over.
pub fn parse(table: &[u8]) -> Vec<Mount> {
    let mount = |entry: Entry| Mount {
        read_only: entry.is_read_only(),
        target: PathBuf::from(std::ffi::OsString::from_vec(entry.point)),
        kind: entry.kind,
    };
    mounts::parse(table).into_iter().map(mount).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_read() {
        let table = b"27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard\n\
            28 27 0:25 / /mnt/a\\040b ro,nosuid shared:1 - tmpfs none rw,size=4k\nrubbish\n";
        let mounts = parse(table);
        assert_eq!(mounts.len(), 2);
        assert_eq!(mounts[0], Mount { target: "/".into(), kind: "ext4".into(), read_only: false });
        assert_eq!(mounts[1], Mount { target: "/mnt/a b".into(), kind: "tmpfs".into(), read_only: true });
    }
}
