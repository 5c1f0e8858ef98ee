//! What a large file had in it when it was packed, as hashes of its blocks: of one that is written to all the time, only
//! the blocks that differ are packed again.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::LazyLock;

use nix::sys::uio::pread;
use twox_hash::XxHash3_128;

use crate::parallel;

/// A file that is smaller is packed whole.
pub(super) const LARGE: u64 = 1 << 20;
/// Bytes of a block, which begins at a multiple of this, unless a hole ends in it.
const BLOCK: u64 = 64 << 10;
/// Bytes that one thread compares in one go.
const PORTION: usize = 64;

/// XXH3, which is as fast as memory: whoever contrives two blocks with the same (the seed is secret) loses a block of its own.
type Hash = u128;

/// The blocks of a file, in order: offset, length, hash.
#[derive(Clone, Debug, Default)]
pub(super) struct Blocks(Vec<(u64, u64, Hash)>);

/// A block that is not as it was.
pub(super) struct Changed {
    pub(super) at: u64,
    pub(super) bytes: Vec<u8>,
}

impl Blocks {
    /// Notes a block that is being packed.
    pub(super) fn note(&mut self, at: u64, bytes: &[u8]) {
        self.0.push((at, bytes.len() as u64, hash(bytes)));
    }

    fn get(&self, at: u64, length: u64) -> Option<&Hash> {
        let place = self.0.binary_search_by_key(&at, |(at, _, _)| *at).ok()?;
        let (_, had, hash) = &self.0[place];
        (*had == length).then_some(hash)
    }

    /// Compares some blocks of a file with these: how they are now, and what differs.
    pub(super) fn compare(&self, file: &OwnedFd, blocks: &[(u64, u64)]) -> io::Result<(Blocks, Vec<Changed>)> {
        let portions = blocks.chunks(PORTION).collect();
        let compared = parallel::map(portions, |portion: &[(u64, u64)]| -> io::Result<_> {
            let (mut now, mut changed, mut buffer) = (Blocks::default(), Vec::new(), vec![0; BLOCK as usize]);
            for (at, length) in portion.iter().copied() {
                let bytes = &mut buffer[..length as usize];
                read(file, at, bytes)?;
                now.note(at, bytes);
                if now.0.last().map(|(_, _, hash)| hash) != self.get(at, length) {
                    changed.push(Changed { at, bytes: bytes.to_vec() });
                }
            }
            Ok((now, changed))
        });
        let (mut now, mut changed) = (Blocks::default(), Vec::new());
        for portion in compared {
            let (blocks, differ) = portion?;
            now.0.extend(blocks.0);
            changed.extend(differ);
        }
        Ok((now, changed))
    }

    /// Adds blocks that come behind these.
    pub(super) fn extend(&mut self, behind: Blocks) {
        self.0.extend(behind.0);
    }
}

fn hash(bytes: &[u8]) -> Hash {
    static SEED: LazyLock<u64> = LazyLock::new(rand::random);
    XxHash3_128::oneshot_with_seed(*SEED, bytes)
}

/// The blocks of a file whose bytes are in `stretches`: offset and length.
pub(super) fn blocks_of(stretches: &[(u64, u64)]) -> impl Iterator<Item = (u64, u64)> {
    stretches.iter().flat_map(|(start, length)| {
        let end = start + length;
        let begins = std::iter::successors(Some(*start), move |at| Some((at / BLOCK + 1) * BLOCK));
        begins.take_while(move |at| *at < end).map(move |at| (at, ((at / BLOCK + 1) * BLOCK).min(end) - at))
    })
}

/// Fills `bytes` from a file at `at`; with zeros where it was cut meanwhile, which will be found.
pub(super) fn read(file: &OwnedFd, at: u64, bytes: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        match pread(file, &mut bytes[done..], (at + done as u64) as i64)? {
            0 => {
                bytes[done..].fill(0);
                return Ok(());
            }
            read => done += read,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn a_file_is_split_at_multiples() {
        let blocks: Vec<_> = blocks_of(&[(0, BLOCK + 5), (3 * BLOCK - 4096, 8192)]).collect();
        assert_eq!(blocks, [(0, BLOCK), (BLOCK, 5), (3 * BLOCK - 4096, 4096), (3 * BLOCK, 4096)]);
        assert_eq!(blocks_of(&[]).count(), 0);
    }

    #[test]
    fn what_differs_is_found() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&vec![1; 300 << 10], 0).unwrap();
        let all: Vec<_> = blocks_of(&[(0, 300 << 10)]).collect();
        let file: OwnedFd = file.into();
        let (before, changed) = Blocks::default().compare(&file, &all).unwrap();
        assert_eq!(changed.len(), all.len());
        std::fs::File::from(file.try_clone().unwrap()).write_all_at(b"x", 70_000).unwrap();
        let (now, changed) = before.compare(&file, &all).unwrap();
        assert_eq!(changed.iter().map(|c| (c.at, c.bytes.len() as u64)).collect::<Vec<_>>(), [(BLOCK, BLOCK)]);
        assert!(now.compare(&file, &all).unwrap().1.is_empty());
    }
}
