//! A file of an image in chunks of one MiB, each with a CRC-32 of what is stored, compressed or not.

use std::fs::File;
use std::io::{self, Write};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::PartSink;
use super::inherit::{Contents, Cutter, Parent, Stretch};

/// Bytes of a chunk before compression; the last one may be shorter.
pub(super) const CHUNK: usize = 1 << 20;

/// How bulk bytes are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// As they are: a restart reads pages straight from the file.
    #[default]
    None,
    /// LZ4 blocks.
    Lz4,
    /// Zstandard frames, level 1.
    Zstd,
}

impl std::str::FromStr for Compression {
    type Err = String;

    fn from_str(name: &str) -> Result<Compression, String> {
        match name {
            "none" => Ok(Compression::None),
            "lz4" => Ok(Compression::Lz4),
            "zstd" => Ok(Compression::Zstd),
            _ => Err(format!("{name} is not one of none, lz4, zstd")),
        }
    }
}

impl Compression {
    fn pack(self, chunk: &[u8]) -> io::Result<Vec<u8>> {
        match self {
            Compression::None => Ok(chunk.to_vec()),
            Compression::Lz4 => Ok(lz4_flex::block::compress(chunk)),
            Compression::Zstd => zstd::bulk::compress(chunk, 1),
        }
    }

    /// The chunk behind `stored`; a chunk that did not shrink is stored as it was.
    pub(super) fn unpack(self, stored: &[u8], length: usize) -> Result<Vec<u8>, String> {
        if stored.len() == length {
            return Ok(stored.to_vec());
        }
        let chunk = match self {
            Compression::None => return Err("a chunk has the wrong length".into()),
            Compression::Lz4 => lz4_flex::block::decompress(stored, length).map_err(|e| e.to_string())?,
            Compression::Zstd => zstd::bulk::decompress(stored, length).map_err(|e| e.to_string())?,
        };
        if chunk.len() == length { Ok(chunk) } else { Err("a chunk unpacks to the wrong length".into()) }
    }
}

/// What the manifest says of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    pub(super) name: String,
    /// Bytes before compression.
    pub(super) length: u64,
    pub(super) compression: Compression,
    /// Stored bytes of each chunk; empty if nothing is compressed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) stored: Vec<u32>,
    /// CRC-32 of each chunk as stored.
    #[serde(with = "hex_words")]
    pub(super) crc32: Vec<u32>,
}

/// Where a chunk is stored, and what it becomes.
pub(super) struct ChunkPlace {
    pub(super) offset: u64,
    pub(super) stored: usize,
    pub(super) length: usize,
    pub(super) crc32: u32,
}

impl FileEntry {
    /// The chunks in order, or why the entry cannot be true.
    pub(super) fn chunks(&self) -> Result<Vec<ChunkPlace>, String> {
        let count = self.length.div_ceil(CHUNK as u64);
        let plain = self.compression == Compression::None;
        if self.crc32.len() as u64 != count || self.stored.len() as u64 != if plain { 0 } else { count } {
            return Err(format!("the manifest does not cover {} bytes", self.length));
        }
        let mut offset = 0;
        let place = |(index, crc32): (usize, &u32)| {
            let length = (self.length - index as u64 * CHUNK as u64).min(CHUNK as u64) as usize;
            let stored = if plain { length } else { self.stored[index] as usize };
            if stored > length {
                return Err("the manifest has a chunk larger than its contents".to_owned());
            }
            offset += stored as u64;
            Ok(ChunkPlace { offset: offset - stored as u64, stored, length, crc32: *crc32 })
        };
        self.crc32.iter().enumerate().map(place).collect()
    }

    /// Bytes of the file itself.
    pub(super) fn stored_length(&self) -> u64 {
        match self.compression {
            Compression::None => self.length,
            _ => self.stored.iter().map(|s| u64::from(*s)).sum(),
        }
    }
}

mod hex_words {
    use std::fmt::Write;

    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(words: &[u32], serializer: S) -> Result<S::Ok, S::Error> {
        let mut text = String::with_capacity(words.len() * 8);
        for word in words {
            write!(text, "{word:08x}").expect("writing to memory cannot fail");
        }
        serializer.serialize_str(&text)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u32>, D::Error> {
        let text = String::deserialize(deserializer)?;
        let word = |w: &[u8]| {
            let w = std::str::from_utf8(w).map_err(D::Error::custom)?;
            if w.len() != 8 {
                return Err(D::Error::custom("checksums are eight digits each"));
            }
            u32::from_str_radix(w, 16).map_err(D::Error::custom)
        };
        text.as_bytes().chunks(8).map(word).collect()
    }
}

/// Where the bytes of one file of an image go.
pub(super) enum Out {
    /// To a file.
    File(File),
    /// To somebody who puts them together again.
    Elsewhere(Arc<dyn PartSink>, u16),
}

impl Out {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Out::File(file) => file.write_all(bytes),
            Out::Elsewhere(sink, part) => sink.append(*part, bytes),
        }
    }

    /// Makes sure that it would survive a crash of the host, where that is ours to do.
    pub(super) fn sync(&self) -> io::Result<()> {
        match self {
            Out::File(file) => file.sync_all(),
            Out::Elsewhere(..) => Ok(()),
        }
    }
}

/// Writes a file in chunks and keeps its entry. What an earlier image has of it is referred to, not written.
pub(super) struct ChunkWriter {
    inherited: Option<Inherited>,
    stored: Storing,
}

/// What of a file is in an earlier image.
struct Inherited {
    parent: Arc<Parent>,
    cutter: Cutter,
    contents: Contents,
}

/// A file that was written: where, what the manifest says of it, and what it is made of if not of itself alone.
pub(super) struct Written {
    pub(super) out: Out,
    pub(super) entry: FileEntry,
    pub(super) contents: Option<Contents>,
}

impl ChunkWriter {
    pub(super) fn new(file: Out, name: &str, compression: Compression) -> ChunkWriter {
        ChunkWriter { inherited: None, stored: Storing::new(file, name, compression) }
    }

    /// Likewise, but for what that image has already.
    pub(super) fn child_of(mut self, parent: Option<&Arc<Parent>>) -> ChunkWriter {
        self.inherited = parent.map(|parent| Inherited {
            parent: parent.clone(),
            cutter: Cutter::of(&self.stored.entry.name),
            contents: Contents::default(),
        });
        self
    }

    pub(super) fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let Some(Inherited { parent, cutter, contents }) = &mut self.inherited else {
            return self.stored.append(bytes);
        };
        cutter.push(bytes, |block| self.stored.append_unless(parent, contents, block))
    }

    /// Ends the last chunk; the file is on its way to the disk but not synchronised.
    pub(super) fn finish(self) -> io::Result<Written> {
        let ChunkWriter { inherited, mut stored } = self;
        let mut made_of = None;
        if let Some(Inherited { parent, mut cutter, mut contents }) = inherited {
            cutter.finish(|block| stored.append_unless(&parent, &mut contents, block))?;
            made_of = Some(contents);
        }
        let (out, entry) = stored.finish()?;
        Ok(Written { out, entry, contents: made_of })
    }
}

/// What is really written of a file.
struct Storing {
    file: Out,
    entry: FileEntry,
    hasher: crc32fast::Hasher,
    in_chunk: usize,
    chunk: Vec<u8>,
}

impl Storing {
    fn new(file: Out, name: &str, compression: Compression) -> Storing {
        let entry = FileEntry { name: name.into(), length: 0, compression, stored: Vec::new(), crc32: Vec::new() };
        Storing { file, entry, hasher: crc32fast::Hasher::new(), in_chunk: 0, chunk: Vec::new() }
    }

    fn append_unless(&mut self, parent: &Parent, contents: &mut Contents, block: &[u8]) -> io::Result<()> {
        let known = parent.find(&self.entry.name, block);
        let own = Stretch { image: 0, offset: self.entry.length, length: block.len() as u64 };
        contents.push(known.unwrap_or(own));
        if known.is_none() { self.append(block) } else { Ok(()) }
    }

    fn append(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(CHUNK - self.in_chunk));
            match self.entry.compression {
                Compression::None => {
                    self.hasher.update(now);
                    self.file.write_all(now)?;
                }
                _ => self.chunk.extend_from_slice(now),
            }
            self.in_chunk += now.len();
            self.entry.length += now.len() as u64;
            if self.in_chunk == CHUNK {
                self.end_chunk()?;
            }
            bytes = later;
        }
        Ok(())
    }

    fn end_chunk(&mut self) -> io::Result<()> {
        if self.entry.compression != Compression::None {
            let packed = self.entry.compression.pack(&self.chunk)?;
            let stored = if packed.len() < self.chunk.len() { &packed } else { &self.chunk };
            self.file.write_all(stored)?;
            self.hasher.update(stored);
            self.entry.stored.push(stored.len() as u32);
            self.chunk.clear();
        }
        self.entry.crc32.push(std::mem::take(&mut self.hasher).finalize());
        self.in_chunk = 0;
        Ok(())
    }

    fn finish(mut self) -> io::Result<(Out, FileEntry)> {
        if self.in_chunk > 0 {
            self.end_chunk()?;
        }
        Ok((self.file, self.entry))
    }
}
