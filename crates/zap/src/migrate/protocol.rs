//! What two hosts say to each other: frames over any two-way byte stream.
//!
//! A frame is `kind: u8 · part: u16 · length: u32 · payload`, little-endian. Bytes of the image (kind `D`, with the number of
//! the part) are covered by the checksums of its manifest; a message (kind `M`, CBOR) carries a CRC-32 of its own behind it,
//! and so do pages that were left behind (kind `P`, beginning with their offset).
//!
//! | source | | destination |
//! | --- | --- | --- |
//! | `Hello` | → | looks whether the pod could live here |
//! | | ← | `Welcome`, or `Refused` and why |
//! | `Begin`, `Uses` | → | compares the files of its root with those that the pod uses |
//! | | ← | `Alike`, or `Failed` and which |
//! | bytes, `Begin`, … `Manifest` | → | keeps what comes, then rebuilds the pod, held |
//! | | ← | `Ready`, or `Failed` and why: the source's copy goes on |
//! | gives its copy up, durably: `Go` | → | lets it go |
//! | | ← | `Running` |
//!
//! Where pages were left behind, the destination may say `Fetch` from the moment at which it hears `Go`; the source answers
//! each with pages, in order, until it hears `Complete`, which does not come before `Running`. Where memory went to a store,
//! `Stored` comes before `Manifest`.
//!
//! Until `Ready` whatever happens leaves the pod at the source. Between `Go` and `Running` a cut leaves neither side knowing:
//! the source's copy stays held until a person decides (`zap migrate --resolve`).

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

use crate::demands::Offer;
use crate::files::UsedFile;
use crate::image::{decode, encode};
use crate::monitor::protocol::Failure;
use crate::pod::PodSpec;
use crate::pod::network::former::FormerPlace;
use crate::pod::network::trail::Trail;

/// The version of this protocol.
pub const VERSION: u32 = 3;

/// What both sides begin with, so that nothing else is taken for a peer.
pub const GREETING: &[u8; 8] = b"zap/mig1";

/// What the source says first.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Hello {
    /// Version of the protocol.
    pub protocol: u32,
    /// Version of the image's format.
    pub format: u32,
    /// Kinds of record that the image may have, with their versions.
    pub records: Vec<(String, u16)>,
    /// The pod as it was born.
    pub spec: PodSpec,
    /// The address at which others reach it.
    pub address: Option<std::net::Ipv4Addr>,
    /// Whether another will do, where that one cannot be had.
    #[serde(default)]
    pub any_address: bool,
    /// The place that is to be kept for it at the source, in that case.
    #[serde(default)]
    pub former: Option<FormerPlace>,
    /// The hosts that it has been on, if it is followed to another address.
    #[serde(default)]
    pub trail: Option<Trail>,
    /// Bytes of private memory, roughly: what the destination must have room for.
    pub memory: u64,
    /// Bytes of the files that it has written: likewise.
    #[serde(default)]
    pub files: u64,
    /// How memory is moved.
    pub strategy: String,
    /// The file in a store that both are to see.
    pub store: Option<std::path::PathBuf>,
}

/// One message.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Message {
    /// From the source: what is to come.
    Hello(Box<Hello>),
    /// From the destination: it could live here, under this name.
    Welcome {
        /// The name.
        name: String,
        /// What its processor and its kernel have.
        #[serde(default)]
        offer: Option<Box<Offer>>,
    },
    /// From the destination, instead.
    Refused(Failure),
    /// From the source: files of the root that the pod uses, and that do not come along.
    Uses(Vec<UsedFile>),
    /// From the destination: these are the same there.
    Alike,
    /// From the source: the next part of the image begins. Parts are numbered in this order, from 0 on.
    Begin {
        /// Its name.
        name: String,
    },
    /// From the source: this part of the image is in the store.
    Stored {
        /// Its name.
        name: String,
    },
    /// From the source: all is there. The manifest covers it.
    Manifest(#[serde(with = "serde_bytes")] Vec<u8>),
    /// From the source: it has thought better of it.
    Abandoned(String),
    /// From the destination: the pod is rebuilt, and held.
    Ready {
        /// The address at which it will be reached.
        address: String,
        /// Where the line to a forwarder ends there, if there is to be one.
        #[serde(default)]
        line: Option<std::net::Ipv4Addr>,
        /// Whether it finds the way back to those who follow it.
        #[serde(default)]
        followed: bool,
        /// How long what took.
        #[serde(default)]
        phases: Vec<crate::checkpoint::Phase>,
    },
    /// From the destination: it could not be rebuilt, and nothing is left of the attempt.
    Failed(Failure),
    /// From the source: it is yours.
    Go,
    /// From the destination: it runs.
    Running,
    /// From the destination: pages that were left behind are wanted.
    Fetch {
        /// The first.
        offset: u64,
        /// Bytes.
        length: u64,
    },
    /// From the destination: nothing of what was left behind is wanted any more.
    Complete,
}

impl Message {
    /// What it is called, for errors.
    pub fn name(&self) -> &'static str {
        match self {
            Message::Hello(_) => "hello",
            Message::Welcome { .. } => "welcome",
            Message::Refused(_) => "refused",
            Message::Uses(_) => "uses",
            Message::Alike => "alike",
            Message::Begin { .. } => "begin",
            Message::Manifest(_) => "manifest",
            Message::Abandoned(_) => "abandoned",
            Message::Ready { .. } => "ready",
            Message::Failed(_) => "failed",
            Message::Go => "go",
            Message::Running => "running",
            Message::Stored { .. } => "stored",
            Message::Fetch { .. } => "fetch",
            Message::Complete => "complete",
        }
    }
}

/// A frame, as it was read.
#[derive(Debug)]
pub enum Frame {
    /// A message.
    Message(Message),
    /// Bytes for the end of this part of the image.
    Bytes(u16),
    /// Pages that were left behind, from this offset on.
    Pages(u64),
}

const HEAD: usize = 7;
const MESSAGE: u8 = b'M';
const BYTES: u8 = b'D';
const PAGES: u8 = b'P';
/// No message is longer: the manifest of a TiB has a million checksums.
const LONGEST: usize = 64 << 20;
/// Bytes of the image in one frame at most.
pub const PIECE: usize = 1 << 20;

fn head(kind: u8, part: u16, length: usize) -> [u8; HEAD] {
    let [a, b] = part.to_le_bytes();
    let [c, d, e, f] = (length as u32).to_le_bytes();
    [kind, a, b, c, d, e, f]
}

/// Writes a message.
pub fn write_message(mut to: impl Write, message: &Message) -> io::Result<()> {
    let payload = encode(message);
    to.write_all(&head(MESSAGE, 0, payload.len()))?;
    to.write_all(&payload)?;
    to.write_all(&crc32fast::hash(&payload).to_le_bytes())
}

/// Writes bytes of a part of the image; how many frames that took.
pub fn write_bytes(mut to: impl Write, part: u16, bytes: &[u8]) -> io::Result<u64> {
    let mut frames = 0;
    for piece in bytes.chunks(PIECE) {
        to.write_all(&head(BYTES, part, piece.len()))?;
        to.write_all(piece)?;
        frames += 1;
    }
    Ok(frames)
}

/// Writes pages that were left behind: at most [`PIECE`] bytes.
pub fn write_pages(mut to: impl Write, offset: u64, pages: &[u8]) -> io::Result<()> {
    to.write_all(&head(PAGES, 0, 8 + pages.len()))?;
    to.write_all(&offset.to_le_bytes())?;
    to.write_all(pages)?;
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&offset.to_le_bytes());
    hasher.update(pages);
    to.write_all(&hasher.finalize().to_le_bytes())
}

fn broken(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

/// Reads a frame. Bytes of the image, and pages, are left in `buffer`.
pub fn read_frame(mut from: impl Read, buffer: &mut Vec<u8>) -> io::Result<Frame> {
    let mut found = [0; HEAD];
    from.read_exact(&mut found)?;
    let [kind, a, b, c, d, e, f] = found;
    let length = u32::from_le_bytes([c, d, e, f]) as usize;
    let most = match kind {
        BYTES => PIECE,
        PAGES => PIECE + 8,
        _ => LONGEST,
    };
    if ![MESSAGE, BYTES, PAGES].contains(&kind) || length > most {
        return Err(broken("the other side said something that is not of this protocol"));
    }
    buffer.clear();
    // Not believed before it comes: memory grows with what is there.
    if from.by_ref().take(length as u64).read_to_end(buffer)? < length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    if kind == BYTES {
        return Ok(Frame::Bytes(u16::from_le_bytes([a, b])));
    }
    let mut sum = [0; 4];
    from.read_exact(&mut sum)?;
    if crc32fast::hash(buffer) != u32::from_le_bytes(sum) {
        return Err(broken("the checksum of a message is wrong"));
    }
    if kind == PAGES {
        let (offset, _) = buffer.split_first_chunk::<8>().ok_or_else(|| broken("pages without an offset came"))?;
        let offset = u64::from_le_bytes(*offset);
        buffer.drain(..8);
        return Ok(Frame::Pages(offset));
    }
    decode(buffer).map(Frame::Message).map_err(|e| broken(&format!("a message of another version of zap: {e}")))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn frames_come_back() {
        let mut wire = Vec::new();
        write_message(&mut wire, &Message::Begin { name: "data".into() }).unwrap();
        assert_eq!(write_bytes(&mut wire, 3, &[7; PIECE + 1]).unwrap(), 2);
        write_pages(&mut wire, 1 << 40, &[9; 4096]).unwrap();
        write_message(&mut wire, &Message::Go).unwrap();
        let (mut from, mut buffer) = (&wire[..], Vec::new());
        assert!(
            matches!(read_frame(&mut from, &mut buffer).unwrap(), Frame::Message(Message::Begin { name }) if name == "data")
        );
        assert!(matches!(read_frame(&mut from, &mut buffer).unwrap(), Frame::Bytes(3)));
        assert_eq!(buffer.len(), PIECE);
        assert!(matches!(read_frame(&mut from, &mut buffer).unwrap(), Frame::Bytes(3)));
        assert_eq!(buffer, [7]);
        assert!(matches!(read_frame(&mut from, &mut buffer).unwrap(), Frame::Pages(0x100_0000_0000)));
        assert_eq!(buffer, [9; 4096]);
        assert!(matches!(read_frame(&mut from, &mut buffer).unwrap(), Frame::Message(Message::Go)));
        assert!(read_frame(&mut from, &mut buffer).is_err());
    }

    #[test]
    fn every_cut_and_flip_of_a_message_is_noticed() {
        let mut wire = Vec::new();
        write_message(
            &mut wire,
            &Message::Ready { address: "198.18.0.2".into(), line: None, followed: false, phases: Vec::new() },
        )
        .unwrap();
        let mut buffer = Vec::new();
        for cut in 0..wire.len() {
            assert!(read_frame(&wire[..cut], &mut buffer).is_err());
        }
        for bit in 0..wire.len() * 8 {
            let mut flipped = wire.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            // the number of a part means nothing in a message
            let harmless = (1..3).contains(&(bit / 8));
            let read = read_frame(&flipped[..], &mut buffer);
            assert!(harmless || matches!(read, Err(_) | Ok(Frame::Bytes(_))), "bit {bit}");
        }
    }

    proptest! {
        #[test]
        fn nonsense_is_an_error_and_nothing_worse(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = read_frame(&bytes[..], &mut Vec::new());
        }
    }
}
