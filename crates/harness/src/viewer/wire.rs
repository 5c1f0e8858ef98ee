//! The messages of RFB 3.8 (RFC 6143) that a viewer needs, without authentication.

use std::io::{self, Read, Write};

/// What can come from a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum FromServer {
    /// Rectangles follow, as many as this.
    Update(u16),
    /// A bell, or a colour map: of no interest.
    Other,
    /// What was cut or selected, as Latin-1.
    Text(Vec<u8>),
}

/// How a rectangle is sent.
pub(super) const RAW: i32 = 0;
pub(super) const COPY: i32 = 1;
pub(super) const DESKTOP_SIZE: i32 = -223;

/// The head of a rectangle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rectangle {
    pub(super) x: u16,
    pub(super) y: u16,
    pub(super) width: u16,
    pub(super) height: u16,
    pub(super) encoding: i32,
}

/// The longest text that is believed.
const LONGEST_TEXT: u32 = 1 << 20;

fn bytes<const N: usize>(from: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    from.read_exact(&mut bytes)?;
    Ok(bytes)
}

pub(super) fn word(from: &mut impl Read) -> io::Result<u16> {
    Ok(u16::from_be_bytes(bytes(from)?))
}

fn long(from: &mut impl Read) -> io::Result<u32> {
    Ok(u32::from_be_bytes(bytes(from)?))
}

fn text(from: &mut impl Read, length: u32) -> io::Result<Vec<u8>> {
    if length > LONGEST_TEXT {
        return Err(wrong(format!("a text of {length} bytes")));
    }
    let mut text = vec![0; length as usize];
    from.read_exact(&mut text)?;
    Ok(text)
}

fn wrong(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// Everything up to the first update; gives the size of the screen and the name of the desktop.
pub(super) fn shake_hands(stream: &mut (impl Read + Write)) -> io::Result<((u16, u16), String)> {
    const VERSION: &[u8; 12] = b"RFB 003.008\n";
    const NO_AUTHENTICATION: u8 = 1;
    let version: [u8; 12] = bytes(stream)?;
    if &version != VERSION {
        return Err(wrong(format!("the server speaks {:?}", String::from_utf8_lossy(&version))));
    }
    stream.write_all(VERSION)?;
    let [count] = bytes(stream)?;
    let mut kinds = vec![0; usize::from(count)];
    stream.read_exact(&mut kinds)?;
    if !kinds.contains(&NO_AUTHENTICATION) {
        return Err(wrong(format!("the server wants authentication (kinds {kinds:?})")));
    }
    stream.write_all(&[NO_AUTHENTICATION])?;
    let verdict = long(stream)?;
    if verdict != 0 {
        return Err(wrong(format!("the server turned us away ({verdict})")));
    }
    // Others may watch, too.
    stream.write_all(&[1])?;
    let size = (word(stream)?, word(stream)?);
    let _format: [u8; 16] = bytes(stream)?;
    let length = long(stream)?;
    let name = String::from_utf8_lossy(&text(stream, length)?).into_owned();
    // 32 bits a pixel, little-endian, 8 a colour: red in bits 16 to 23.
    stream.write_all(&[0, 0, 0, 0, 32, 24, 0, 1, 0, 255, 0, 255, 0, 255, 16, 8, 0, 0, 0, 0])?;
    let encodings = [COPY, RAW, DESKTOP_SIZE];
    let mut message = vec![2, 0, 0, encodings.len() as u8];
    message.extend(encodings.iter().flat_map(|encoding| encoding.to_be_bytes()));
    stream.write_all(&message)?;
    Ok((size, name))
}

/// The next message's head; the rectangles of an update are still to be read.
pub(super) fn next(from: &mut impl Read) -> io::Result<FromServer> {
    match bytes::<1>(from)? {
        [0] => {
            bytes::<1>(from)?;
            Ok(FromServer::Update(word(from)?))
        }
        [1] => {
            bytes::<3>(from)?;
            let colours = word(from)?;
            text(from, u32::from(colours) * 6).map(|_| FromServer::Other)
        }
        [2] => Ok(FromServer::Other),
        [3] => {
            bytes::<3>(from)?;
            let length = long(from)?;
            text(from, length).map(FromServer::Text)
        }
        [kind] => Err(wrong(format!("a message of kind {kind}"))),
    }
}

/// The head of the next rectangle.
pub(super) fn rectangle(from: &mut impl Read) -> io::Result<Rectangle> {
    Ok(Rectangle {
        x: word(from)?,
        y: word(from)?,
        width: word(from)?,
        height: word(from)?,
        encoding: long(from)? as i32,
    })
}

/// Asks for what has changed, or (`whole`) for everything.
pub(super) fn request((width, height): (u16, u16), whole: bool) -> [u8; 10] {
    let ([a, b], [c, d]) = (width.to_be_bytes(), height.to_be_bytes());
    [3, u8::from(!whole), 0, 0, 0, 0, a, b, c, d]
}

/// A key goes down or up.
pub(super) fn key(symbol: u32, down: bool) -> [u8; 8] {
    let [a, b, c, d] = symbol.to_be_bytes();
    [4, u8::from(down), 0, 0, a, b, c, d]
}

/// Where the mouse is, and which of its buttons are down.
pub(super) fn pointer((x, y): (u16, u16), buttons: u8) -> [u8; 6] {
    let ([a, b], [c, d]) = (x.to_be_bytes(), y.to_be_bytes());
    [5, buttons, a, b, c, d]
}

/// A text of ours to paste.
pub(super) fn cut(text: &str) -> Vec<u8> {
    let latin: Vec<u8> = text.chars().map(|c| u8::try_from(c).unwrap_or(b'?')).collect();
    [&[6, 0, 0, 0], &(latin.len() as u32).to_be_bytes()[..], &latin].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_to_a_server() {
        assert_eq!(request((1024, 768), false), [3, 1, 0, 0, 0, 0, 4, 0, 3, 0]);
        assert_eq!(key(0xff0d, true), [4, 1, 0, 0, 0, 0, 0xff, 0x0d]);
        assert_eq!(pointer((258, 3), 1), [5, 1, 1, 2, 0, 3]);
        assert_eq!(cut("é€"), [6, 0, 0, 0, 0, 0, 0, 2, 0xe9, b'?']);
    }

    #[test]
    fn messages_from_a_server() {
        let mut bytes: &[u8] = &[2, 0, 9, 0, 1, 3, 0, 0, 0, 0, 0, 0, 2, b'h', b'i', 7];
        assert_eq!(next(&mut bytes).unwrap(), FromServer::Other);
        assert_eq!(next(&mut bytes).unwrap(), FromServer::Update(1));
        assert_eq!(next(&mut bytes).unwrap(), FromServer::Text(b"hi".to_vec()));
        assert!(next(&mut bytes).is_err());
        assert!(next(&mut &[3, 0, 0, 0, 255, 255, 255, 255][..]).is_err(), "no memory for a text that long");
    }
}
