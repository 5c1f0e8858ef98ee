//! Incremental images: what an image has in common with an earlier one is stored only there.
//!
//! The contents of a file are cut into blocks, and a block whose BLAKE3 the parent has too is referred to instead of
//! stored. `data` is cut into pages, archives where their contents say so ([`fastcdc`]), so that what follows an insertion
//! is found again. What a file is made of then, its *stretches*, is a record of the state; each names the image that
//! stores it, so that a chain of parents is never walked.

use std::collections::HashMap;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use fastcdc::v2020::FastCDC;
use serde::{Deserialize, Serialize};

use super::manifest::Manifest;
use super::{ImageError, ImageReader};
use crate::parallel;

/// The kind of the record with the stretches, and its version.
pub(super) const KIND: &str = "stretches";
pub(super) const VERSION: u16 = 1;

/// Bytes of a block of `data`, and the least, usual and most of an archive's.
const PAGE: usize = 4096;
const CONTENT: (usize, usize, usize) = (4 << 10, 16 << 10, 64 << 10);
/// Bytes of a piece of `data` that one thread hashes.
const PIECE: u64 = 8 << 20;

/// An image in which parts of another are stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Ancestor {
    /// Its content id.
    pub(super) id: String,
    /// Where it was.
    pub(super) path: PathBuf,
}

/// Bytes in a row of a file's contents, and where they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "(u16, u64, u64)", into = "(u16, u64, u64)")]
pub(super) struct Stretch {
    /// 0 is the image itself, others are its ancestors, the parent first.
    pub(super) image: u16,
    /// Where in what that image stores of the file (before compression).
    pub(super) offset: u64,
    pub(super) length: u64,
}

impl From<(u16, u64, u64)> for Stretch {
    fn from((image, offset, length): (u16, u64, u64)) -> Stretch {
        Stretch { image, offset, length }
    }
}

impl From<Stretch> for (u16, u64, u64) {
    fn from(stretch: Stretch) -> (u16, u64, u64) {
        (stretch.image, stretch.offset, stretch.length)
    }
}

/// What the files of an image are made of, by name.
pub(super) type Stretches = Vec<(String, Vec<Stretch>)>;

/// What a file is made of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Contents {
    stretches: Vec<Stretch>,
    /// Where each ends in the contents.
    ends: Vec<u64>,
}

impl Contents {
    /// A file all of which is stored in its own image.
    pub(super) fn own(length: u64) -> Contents {
        let mut own = Contents::default();
        own.push(Stretch { image: 0, offset: 0, length });
        own
    }

    /// Bytes.
    pub(super) fn length(&self) -> u64 {
        self.ends.last().copied().unwrap_or_default()
    }

    /// Adds a stretch at the end, and joins it with the last where it goes on.
    pub(super) fn push(&mut self, next: Stretch) {
        if next.length == 0 {
            return;
        }
        let end = self.length() + next.length;
        match (self.stretches.last_mut(), self.ends.last_mut()) {
            (Some(last), Some(last_end)) if last.image == next.image && last.offset + last.length == next.offset => {
                last.length += next.length;
                *last_end = end;
            }
            _ => {
                self.stretches.push(next);
                self.ends.push(end);
            }
        }
    }

    /// Where the bytes from `offset` on are stored, as many as are there in a row.
    pub(super) fn at(&self, offset: u64) -> Option<Stretch> {
        let index = self.ends.partition_point(|end| *end <= offset);
        let stretch = self.stretches.get(index)?;
        let left = self.ends[index] - offset;
        Some(Stretch { offset: stretch.offset + stretch.length - left, length: left, ..*stretch })
    }

    pub(super) fn into_stretches(self) -> Vec<Stretch> {
        self.stretches
    }

    /// Those that a record has; `stored` says how much each image stores of the file. The error says what is wrong.
    pub(super) fn checked(stretches: Vec<Stretch>, stored: impl Fn(u16) -> Option<u64>) -> Result<Contents, String> {
        let mut contents = Contents::default();
        for stretch in stretches {
            let end = stretch.offset.checked_add(stretch.length);
            let there = stored(stretch.image).is_some_and(|stored| end.is_some_and(|end| end <= stored));
            if !there || contents.length().checked_add(stretch.length).is_none() {
                return Err(format!("{} bytes at {} of image {}", stretch.length, stretch.offset, stretch.image));
            }
            contents.push(stretch);
        }
        Ok(contents)
    }
}

/// Cuts a file's contents into blocks.
pub(super) struct Cutter {
    by_content: bool,
    rest: Vec<u8>,
}

impl Cutter {
    /// For the file of that name.
    pub(super) fn of(name: &str) -> Cutter {
        Cutter { by_content: name != "data", rest: Vec::new() }
    }

    /// More of the contents; `take` gets every block that is complete.
    pub(super) fn push<E>(&mut self, bytes: &[u8], take: impl FnMut(&[u8]) -> Result<(), E>) -> Result<(), E> {
        self.rest.extend_from_slice(bytes);
        let least = if self.by_content { CONTENT.2 } else { PAGE };
        self.cut(least, take)
    }

    /// There is no more.
    pub(super) fn finish<E>(&mut self, take: impl FnMut(&[u8]) -> Result<(), E>) -> Result<(), E> {
        self.cut(1, take)
    }

    /// Cuts as long as that many bytes are there.
    fn cut<E>(&mut self, least: usize, mut take: impl FnMut(&[u8]) -> Result<(), E>) -> Result<(), E> {
        let mut done = 0;
        while self.rest.len() - done >= least {
            let left = &self.rest[done..];
            let length = match self.by_content {
                true => FastCDC::new(left, CONTENT.0, CONTENT.1, CONTENT.2).cut(0, left.len().min(CONTENT.2)).1,
                false => left.len().min(PAGE),
            };
            take(&left[..length])?;
            done += length;
        }
        self.rest.drain(..done);
        Ok(())
    }
}

type Block = [u8; blake3::OUT_LEN];

/// Where the blocks of an earlier image are stored.
pub(super) struct Parent {
    pub(super) ancestors: Vec<Ancestor>,
    files: HashMap<String, HashMap<Block, Stretch>>,
}

impl Parent {
    /// Reads and checks the image at `path`.
    pub(super) fn open(path: &Path) -> Result<Parent, ImageError> {
        let image = ImageReader::open(path).map_err(|error| match error {
            ImageError::Io { source, .. } => ImageError::Foreign { path: path.to_owned(), why: source.to_string() },
            other => other,
        })?;
        image.verify_layers().and_then(|()| image.verify_data())?;
        let mut ancestors = vec![Ancestor { id: image.id().to_owned(), path: path.to_owned() }];
        ancestors.extend(image.ancestors().cloned());
        let names = image.parts().map(|(name, ..)| name.to_owned()).filter(|name| name != "state");
        let blocks = |name: String| Ok((name.clone(), blocks_of(&image, &name)?));
        let files = names.map(blocks).collect::<Result<_, ImageError>>()?;
        Ok(Parent { ancestors, files })
    }

    /// Where a block of the file of that name is stored, seen from a child.
    pub(super) fn find(&self, name: &str, block: &[u8]) -> Option<Stretch> {
        self.files.get(name)?.get(blake3::hash(block).as_bytes()).copied()
    }
}

/// The blocks of a file, and where they are stored, seen from a child.
fn blocks_of(image: &ImageReader, name: &str) -> Result<HashMap<Block, Stretch>, ImageError> {
    let contents = image.contents_of(name);
    let length = contents.length();
    let piece = if name == "data" { PIECE } else { u64::MAX };
    let pieces =
        (0..length.div_ceil(piece)).map(|n| (n * piece, n.saturating_add(1).saturating_mul(piece).min(length)));
    let found = parallel::map(pieces.collect(), |(start, end)| {
        let mut blocks = Vec::new();
        let mut at = start;
        let mut take = |block: &[u8]| {
            let length = block.len() as u64;
            // a block in several places is none that could be referred to
            if let Some(stored) = contents.at(at).filter(|stored| stored.length >= length) {
                let stored = Stretch { image: stored.image + 1, length, ..stored };
                blocks.push((*blake3::hash(block).as_bytes(), stored));
            }
            at += length;
            Ok::<_, io::Error>(())
        };
        let read = image.contents_from(name, start).and_then(|contents| {
            let cut = cut_all(&mut contents.take(end - start), Cutter::of(name), &mut take);
            cut.map_err(ImageError::io("reading", &image.path().join(name)))
        });
        read.map(|()| blocks)
    });
    let mut all = HashMap::new();
    for blocks in found {
        all.extend(blocks?);
    }
    Ok(all)
}

fn cut_all(
    contents: &mut impl Read,
    mut cutter: Cutter,
    take: &mut dyn FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut buffer = vec![0; 256 << 10];
    loop {
        match contents.read(&mut buffer)? {
            0 => return cutter.finish(take),
            read => cutter.push(&buffer[..read], &mut *take)?,
        }
    }
}

/// The image of that content id: where it was, or beside its child under whatever name.
pub(super) fn find(ancestor: &Ancestor, child: &Path) -> Option<PathBuf> {
    let is = |path: &Path| {
        let at = path.join("manifest");
        let manifest = std::fs::read(&at).ok().and_then(|bytes| Manifest::from_bytes(&at, &bytes).ok());
        manifest.is_some_and(|manifest| manifest.id == ancestor.id)
    };
    let beside = child.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let likely = [ancestor.path.clone(), beside.join(ancestor.path.file_name().unwrap_or_default())];
    let others = || std::fs::read_dir(beside).into_iter().flatten().flatten().map(|entry| entry.path());
    likely.into_iter().find(|path| is(path)).or_else(|| others().find(|path| is(path)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocks(name: &str, bytes: &[u8], step: usize) -> Vec<Vec<u8>> {
        let (mut cutter, mut blocks) = (Cutter::of(name), Vec::new());
        let mut take = |block: &[u8]| {
            blocks.push(block.to_vec());
            Ok::<_, ()>(())
        };
        bytes.chunks(step).for_each(|part| cutter.push(part, &mut take).unwrap());
        cutter.finish(&mut take).unwrap();
        blocks
    }

    fn noise(length: u32) -> Vec<u8> {
        (0..length).map(|i| (i.wrapping_mul(2_654_435_761).rotate_left(i % 31) >> 11) as u8).collect()
    }

    #[test]
    fn cuts_do_not_depend_on_how_the_bytes_come() {
        for name in ["data", "layer-upper"] {
            let bytes = noise(700_001);
            let all = blocks(name, &bytes, 700_001);
            assert_eq!(all.concat(), bytes);
            assert_eq!(all, blocks(name, &bytes, 1_000));
        }
    }

    #[test]
    fn an_archive_is_found_again_behind_an_insertion() {
        let bytes = noise(1 << 20);
        let longer = [b"something new", &bytes[..]].concat();
        let known = blocks("layer-upper", &bytes, 1 << 16);
        let new = blocks("layer-upper", &longer, 1 << 16).into_iter().filter(|block| !known.contains(block));
        assert!(new.map(|block| block.len()).sum::<usize>() <= 3 * CONTENT.2);
    }

    #[test]
    fn stretches_are_joined_found_and_checked() {
        let mut contents = Contents::default();
        let stretch = |image, offset, length| Stretch { image, offset, length };
        [(0, 0, 10), (0, 10, 5), (1, 100, 10), (1, 110, 0), (0, 15, 1)]
            .into_iter()
            .for_each(|(image, offset, length)| contents.push(stretch(image, offset, length)));
        assert_eq!(contents.length(), 26);
        assert_eq!(contents.at(12), Some(stretch(0, 12, 3)));
        assert_eq!(contents.at(15), Some(stretch(1, 100, 10)));
        assert_eq!(contents.at(25), Some(stretch(0, 15, 1)));
        assert_eq!(contents.at(26), None);
        let stored = |image| [16u64, 110].get(usize::from(image)).copied();
        let all = contents.clone().into_stretches();
        assert_eq!(Contents::checked(all, stored), Ok(contents));
        for bad in [stretch(0, 10, 7), stretch(2, 0, 1), stretch(1, u64::MAX, 2)] {
            assert!(Contents::checked(vec![bad], stored).is_err(), "{bad:?}");
        }
    }
}
