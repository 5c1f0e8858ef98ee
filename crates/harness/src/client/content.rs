//! What the files of a site contain: bytes that follow from size and offset alone, so that any part can be verified.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};

/// The files of a site: name and size in bytes.
pub const FILES: &[(&str, u64)] = &[
    ("1k.bin", 1 << 10),
    ("10k.bin", 10 << 10),
    ("100k.bin", 100 << 10),
    ("1m.bin", 1 << 20),
    ("10m.bin", 10 << 20),
    ("100m.bin", 100 << 20),
];

/// The size of a file of the site; `None` if there is no such file.
pub fn size_of(name: &str) -> Option<u64> {
    FILES.iter().find(|(file, _)| *file == name).map(|(_, size)| *size)
}

/// The eight bytes at word `index` of the file of `size` bytes (splitmix64).
fn word(size: u64, index: u64) -> [u8; 8] {
    let mut z = size.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    (z ^ (z >> 31)).to_le_bytes()
}

/// Fills `buffer` with what the file of `size` bytes has at `offset`.
pub fn fill(size: u64, offset: u64, buffer: &mut [u8]) {
    let mut at = offset;
    let mut rest = buffer;
    while !rest.is_empty() {
        let bytes = &word(size, at / 8)[(at % 8) as usize..];
        let n = bytes.len().min(rest.len());
        let (now, later) = rest.split_at_mut(n);
        now.copy_from_slice(&bytes[..n]);
        at += n as u64;
        rest = later;
    }
}

/// The offset in the file of the first byte of `part` that is not what the file of `size` bytes has at `offset`.
pub fn first_difference(size: u64, offset: u64, part: &[u8]) -> Option<u64> {
    let mut expected = [0; 4096];
    for (i, chunk) in part.chunks(expected.len()).enumerate() {
        let at = offset + (i * expected.len()) as u64;
        let expected = &mut expected[..chunk.len()];
        fill(size, at, expected);
        if expected != chunk {
            let differs = expected.iter().zip(chunk).position(|(a, b)| a != b).unwrap_or(0);
            return Some(at + differs as u64);
        }
    }
    None
}

/// Writes every file of the site into `directory`. A file that is there with its whole size is kept.
pub fn generate(directory: &Path) -> Result<()> {
    std::fs::create_dir_all(directory).with_context(|| format!("making {}", directory.display()))?;
    for (name, size) in FILES {
        let path = directory.join(name);
        if std::fs::metadata(&path).is_ok_and(|m| m.len() == *size) {
            continue;
        }
        write_file(&path, *size).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

fn write_file(path: &Path, size: u64) -> std::io::Result<()> {
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    let mut buffer = vec![0; 1 << 16];
    let mut offset = 0;
    while offset < size {
        let n = (size - offset).min(buffer.len() as u64) as usize;
        fill(size, offset, &mut buffer[..n]);
        file.write_all(&buffer[..n])?;
        offset += n as u64;
    }
    file.flush()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_part_is_verified_wherever_it_was_cut(offset in 0u64..10_000, length in 1usize..9_000, flip in 0usize..9_000) {
            let mut part = vec![0; length];
            fill(1 << 20, offset, &mut part);
            prop_assert_eq!(first_difference(1 << 20, offset, &part), None);
            let flip = flip % length;
            part[flip] ^= 1;
            prop_assert_eq!(first_difference(1 << 20, offset, &part), Some(offset + flip as u64));
        }
    }

    #[test]
    fn files_of_different_sizes_differ_from_the_start() {
        let mut part = [0; 16];
        fill(1 << 10, 0, &mut part);
        assert!(first_difference(10 << 10, 0, &part).is_some());
    }
}
