//! The host's mount table, as `/proc/self/mountinfo` tells it.

use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

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
    table.split(|b| *b == b'\n').filter_map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Option<Mount> {
    let fields: Vec<&[u8]> = line.split(|b| *b == b' ').collect();
    let dash = fields.iter().position(|f| *f == b"-")?;
    let (target, options) = (fields.get(4)?, fields.get(5)?);
    let (kind, super_options) = (fields.get(dash + 1)?, fields.get(dash + 3)?);
    let says_ro = |options: &[u8]| options.split(|b| *b == b',').any(|o| o == b"ro");
    Some(Mount {
        target: PathBuf::from(std::ffi::OsString::from_vec(unescape(target))),
        kind: String::from_utf8_lossy(kind).into_owned(),
        read_only: says_ro(options) || says_ro(super_options),
    })
}

/// Undoes the kernel's `\040`.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let octal =
            rest.get(1..4).and_then(|d| std::str::from_utf8(d).ok()).and_then(|d| u8::from_str_radix(d, 8).ok());
        match (first, octal) {
            (b'\\', Some(byte)) => {
                bytes.push(byte);
                rest = &rest[4..];
            }
            _ => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    bytes
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
