//! Frames: how commands and monitors talk, and how the console's log is kept. One byte says the kind, four the length.

use std::io::{self, Read, Write};

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// A request, in JSON.
    Request = b'R',
    /// The answer, in JSON.
    Answer = b'A',
    /// Bytes for stdin.
    Input = b'I',
    /// The end of stdin.
    InputEnd = b'E',
    /// The size of the client's window: rows and columns, two bytes each.
    Resize = b'W',
    /// A signal for the command: four bytes.
    Signal = b'S',
    /// Bytes from stdout, or from a terminal.
    Output = b'O',
    /// Bytes from stderr.
    ErrorOutput = b'P',
    /// The end of the session, in JSON.
    End = b'X',
    /// How far it is, in JSON: any number of these may come before an answer.
    Progress = b'G',
}

impl Kind {
    fn of(byte: u8) -> Option<Kind> {
        use Kind::*;
        [Request, Answer, Input, InputEnd, Resize, Signal, Output, ErrorOutput, End, Progress]
            .into_iter()
            .find(|k| *k as u8 == byte)
    }
}

/// No frame is longer.
pub const LONGEST: usize = 16 << 20;

/// How long what precedes the bytes is.
pub const HEAD: usize = 5;

/// The bytes of a frame.
pub fn encode(kind: Kind, payload: &[u8]) -> Vec<u8> {
    [&head(kind, payload.len()), payload].concat()
}

/// What precedes the bytes of a frame.
pub fn head(kind: Kind, length: usize) -> [u8; HEAD] {
    let [a, b, c, d] = (length as u32).to_le_bytes();
    [kind as u8, a, b, c, d]
}

/// Writes a frame.
pub fn write(mut to: impl Write, kind: Kind, payload: &[u8]) -> io::Result<()> {
    to.write_all(&encode(kind, payload))
}

/// Reads a frame; `None` at the end.
pub fn read(mut from: impl Read) -> io::Result<Option<(Kind, Vec<u8>)>> {
    let mut head = [0; HEAD];
    match from.read(&mut head)? {
        0 => return Ok(None),
        n => from.read_exact(&mut head[n..])?,
    }
    let (kind, length) = parse_head(&head)?;
    let mut payload = vec![0; length];
    from.read_exact(&mut payload)?;
    Ok(Some((kind, payload)))
}

/// What a frame is, and how long.
pub fn parse_head(head: &[u8; HEAD]) -> io::Result<(Kind, usize)> {
    let length = u32::from_le_bytes([head[1], head[2], head[3], head[4]]) as usize;
    match Kind::of(head[0]) {
        Some(kind) if length <= LONGEST => Ok((kind, length)),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "not a frame of zap's")),
    }
}

/// Collects bytes until they are frames.
#[derive(Debug, Default)]
pub struct Collector {
    bytes: Vec<u8>,
}

impl Collector {
    /// Adds bytes as they came.
    pub fn add(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole frame.
    pub fn take(&mut self) -> io::Result<Option<(Kind, Vec<u8>)>> {
        let Some(head) = self.bytes.first_chunk::<HEAD>() else { return Ok(None) };
        let (kind, length) = parse_head(head)?;
        if self.bytes.len() < HEAD + length {
            return Ok(None);
        }
        let payload = self.bytes[HEAD..HEAD + length].to_vec();
        self.bytes.drain(..HEAD + length);
        Ok(Some((kind, payload)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_comes_back_however_it_is_cut() {
        let bytes = encode(Kind::Output, b"hello");
        assert_eq!(read(&bytes[..]).unwrap(), Some((Kind::Output, b"hello".to_vec())));
        let mut collector = Collector::default();
        for byte in &bytes[..bytes.len() - 1] {
            collector.add(&[*byte]);
            assert_eq!(collector.take().unwrap(), None);
        }
        collector.add(b"o");
        assert_eq!(collector.take().unwrap(), Some((Kind::Output, b"hello".to_vec())));
    }

    #[test]
    fn rubbish_is_an_error() {
        assert!(read(&b"\0\0\0\0\0"[..]).is_err());
        assert!(read(&encode(Kind::Output, b"hello")[..7]).is_err());
        assert!(read(&[b'O', 255, 255, 255, 255][..]).is_err());
    }
}
