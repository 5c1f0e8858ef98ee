//! One keep-alive connection.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use thiserror::Error;

use super::content;

/// A head longer than this is not from a server of ours.
const MAX_HEAD: usize = 16 << 10;
/// A chunk longer than this likewise.
const MAX_CHUNK: usize = 16 << 20;

/// What went wrong with a request.
#[derive(Debug, Error)]
pub enum HttpError {
    /// No connection was to be had.
    #[error("connecting to {address}: {source}")]
    Connect {
        /// Where to.
        address: SocketAddr,
        /// Why not.
        source: std::io::Error,
    },
    /// The connection failed while in use: reset, timed out …
    #[error("{doing}: {source}")]
    Broken {
        /// What was being done.
        doing: String,
        /// How it failed.
        source: std::io::Error,
    },
    /// The server closed the connection too early.
    #[error("{path}: the connection was closed after {got} bytes")]
    Closed {
        /// What was asked for.
        path: String,
        /// Bytes of the answer that had come.
        got: u64,
    },
    /// The answer was not one.
    #[error("{path}: the head of the answer is not HTTP with a length: {head:?}")]
    BadHead {
        /// What was asked for.
        path: String,
        /// What came.
        head: String,
    },
    /// The answer was one, but not the one expected.
    #[error("{path}: status {status}")]
    Status {
        /// What was asked for.
        path: String,
        /// What the server said.
        status: u16,
    },
    /// The length of a file is wrong.
    #[error("{path}: {got} bytes instead of {expected}")]
    Length {
        /// What was asked for.
        path: String,
        /// Bytes announced.
        got: u64,
        /// Bytes that the file has.
        expected: u64,
    },
    /// A byte is wrong.
    #[error("{path}: the byte at {offset} is wrong")]
    Content {
        /// What was asked for.
        path: String,
        /// Where in the file.
        offset: u64,
    },
}

/// The head of an answer.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) status: u16,
    /// Bytes of the content; `None` if it comes in chunks.
    pub(super) length: Option<u64>,
    /// Bytes that the head takes, the empty line included.
    pub(super) bytes: usize,
}

/// A connection to a server, kept open between requests.
#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Connection {
    /// Connects to `address`. Every later wait for the server ends after `patience` with an error.
    pub fn open(address: SocketAddr, patience: Duration) -> Result<Self, HttpError> {
        let connect = || {
            let stream = TcpStream::connect_timeout(&address, patience)?;
            stream.set_read_timeout(Some(patience))?;
            stream.set_write_timeout(Some(patience))?;
            stream.set_nodelay(true)?;
            Ok(stream)
        };
        let stream = connect().map_err(|source| HttpError::Connect { address, source })?;
        Ok(Self { stream, buffer: Vec::new() })
    }

    /// The local end's port.
    pub fn local_port(&self) -> Option<u16> {
        self.stream.local_addr().ok().map(|a| a.port())
    }

    /// What it goes over.
    pub(super) fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Fetches `path`, whatever it contains.
    pub fn get(&mut self, path: &str) -> Result<Vec<u8>, HttpError> {
        let Some(length) = self.ask(path)?.length else { return self.chunked(path) };
        let length = length as usize;
        let mut body = std::mem::take(&mut self.buffer);
        let mut have = body.len().min(length);
        self.buffer = body.split_off(have);
        body.resize(length, 0);
        while have < length {
            have += self.read(path, &mut body[have..], have as u64)?;
        }
        Ok(body)
    }

    /// Reads a content that comes in chunks.
    fn chunked(&mut self, path: &str) -> Result<Vec<u8>, HttpError> {
        let mut chunk = [0; 4096];
        loop {
            if let Some((body, bytes)) = parse_chunks(path, &self.buffer)? {
                self.buffer.drain(..bytes);
                return Ok(body);
            }
            let n = self.read(path, &mut chunk, self.buffer.len() as u64)?;
            self.buffer.extend_from_slice(&chunk[..n]);
        }
    }

    /// Fetches the file `name` of the site and verifies every byte.
    pub fn get_file(&mut self, name: &str) -> Result<(), HttpError> {
        let path = format!("/{name}");
        let body = self.get(&path)?;
        let expected = content::size_of(name).unwrap_or(0);
        if body.len() as u64 != expected {
            return Err(HttpError::Length { path, got: body.len() as u64, expected });
        }
        match content::first_difference(expected, 0, &body) {
            None => Ok(()),
            Some(offset) => Err(HttpError::Content { path, offset }),
        }
    }

    /// Asks for the file `name` of the site and reads its head; the content is read at the caller's pace.
    pub fn download(mut self, name: &str) -> Result<Download, HttpError> {
        let path = format!("/{name}");
        let got = self.ask(&path)?.length.unwrap_or(0);
        let expected = content::size_of(name).unwrap_or(0);
        if got != expected {
            return Err(HttpError::Length { path, got, expected });
        }
        Ok(Download { connection: self, path, size: expected, got: 0, chunk: vec![0; 64 << 10] })
    }

    /// Sends a request and reads the head of the answer; what came after it stays in the buffer.
    fn ask(&mut self, path: &str) -> Result<Head, HttpError> {
        let request = format!("GET {path} HTTP/1.1\r\nHost: pod\r\n\r\n");
        self.stream
            .write_all(request.as_bytes())
            .map_err(|source| HttpError::Broken { doing: format!("asking for {path}"), source })?;
        let mut chunk = [0; 4096];
        loop {
            if let Some(head) = parse_head(path, &self.buffer)? {
                self.buffer.drain(..head.bytes);
                return if head.status == 200 {
                    Ok(head)
                } else {
                    Err(HttpError::Status { path: path.into(), status: head.status })
                };
            }
            let n = self.read(path, &mut chunk, self.buffer.len() as u64)?;
            self.buffer.extend_from_slice(&chunk[..n]);
        }
    }

    fn read(&mut self, path: &str, into: &mut [u8], got: u64) -> Result<usize, HttpError> {
        loop {
            match self.stream.read(into) {
                Ok(0) => return Err(HttpError::Closed { path: path.into(), got }),
                Ok(n) => return Ok(n),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(source) => {
                    return Err(HttpError::Broken { doing: format!("reading {path} at byte {got}"), source });
                }
            }
        }
    }
}

/// A file on its way, verified as it comes.
#[derive(Debug)]
pub struct Download {
    connection: Connection,
    path: String,
    size: u64,
    got: u64,
    chunk: Vec<u8>,
}

impl Download {
    /// Bytes that have come and were right.
    pub fn got(&self) -> u64 {
        self.got
    }

    /// Bytes still to come.
    pub fn missing(&self) -> u64 {
        self.size - self.got
    }

    /// Reads and verifies at least `bytes` more, or what is missing.
    pub fn advance(&mut self, bytes: u64) -> Result<(), HttpError> {
        let goal = self.size.min(self.got + bytes);
        while self.got < goal {
            self.step()?;
        }
        Ok(())
    }

    /// Reads the rest; the connection can then be used again.
    pub fn finish(mut self) -> Result<Connection, HttpError> {
        self.advance(u64::MAX - self.got)?;
        Ok(self.connection)
    }

    fn step(&mut self) -> Result<(), HttpError> {
        let wanted = self.missing().min(self.chunk.len() as u64) as usize;
        let buffered = self.connection.buffer.len().min(wanted);
        let n = if buffered > 0 {
            let taken: Vec<u8> = self.connection.buffer.drain(..buffered).collect();
            self.chunk[..buffered].copy_from_slice(&taken);
            buffered
        } else {
            self.connection.read(&self.path, &mut self.chunk[..wanted], self.got)?
        };
        if let Some(offset) = content::first_difference(self.size, self.got, &self.chunk[..n]) {
            return Err(HttpError::Content { path: self.path.clone(), offset });
        }
        self.got += n as u64;
        Ok(())
    }
}

/// The head of an answer at the start of `bytes`; `None` if it is not complete yet.
pub(super) fn parse_head(path: &str, bytes: &[u8]) -> Result<Option<Head>, HttpError> {
    let bad = || bad_head(path, bytes);
    let Some(end) = find(bytes, b"\r\n\r\n") else {
        return if bytes.len() > MAX_HEAD { Err(bad()) } else { Ok(None) };
    };
    let text = std::str::from_utf8(&bytes[..end]).map_err(|_| bad())?;
    let (first, rest) = text.split_once("\r\n").unwrap_or((text, ""));
    let field = |name: &str| {
        let mut fields = rest.split("\r\n").filter_map(|line| line.split_once(':'));
        fields.find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim())
    };
    let status = first.strip_prefix("HTTP/1.").and_then(|rest| rest.split(' ').nth(1)?.parse().ok()).ok_or_else(bad)?;
    let length = match (field("content-length"), field("transfer-encoding")) {
        (_, Some("chunked")) => None,
        (Some(length), None) => Some(length.parse().map_err(|_| bad())?),
        _ => return Err(bad()),
    };
    Ok(Some(Head { status, length, bytes: end + 4 }))
}

/// The content in the chunks at the start of `bytes`, and how many bytes they took; `None` if the last is not there yet.
pub(super) fn parse_chunks(path: &str, bytes: &[u8]) -> Result<Option<(Vec<u8>, usize)>, HttpError> {
    let (mut body, mut at) = (Vec::new(), 0);
    loop {
        let Some(end) = find(&bytes[at..], b"\r\n") else { return Ok(None) };
        let digits = std::str::from_utf8(&bytes[at..at + end]).ok();
        let size = digits.and_then(|digits| usize::from_str_radix(digits, 16).ok());
        let size = size.filter(|size| *size <= MAX_CHUNK).ok_or_else(|| bad_head(path, bytes))?;
        let start = at + end + 2;
        let Some(chunk) = bytes.get(start..start + size + 2) else { return Ok(None) };
        body.extend_from_slice(&chunk[..size]);
        at = start + size + 2;
        if size == 0 {
            return Ok(Some((body, at)));
        }
    }
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}

fn bad_head(path: &str, bytes: &[u8]) -> HttpError {
    let head = String::from_utf8_lossy(&bytes[..bytes.len().min(200)]).into_owned();
    HttpError::BadHead { path: path.into(), head }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn heads() {
        let parse = |text: &str| parse_head("/", text.as_bytes());
        assert_eq!(parse("HTTP/1.1 200 OK\r\nContent-Le").unwrap(), None);
        let head = parse("HTTP/1.1 200 OK\r\ncontent-length: 12\r\n\r\nrest").unwrap().unwrap();
        assert_eq!((head.status, head.length, head.bytes), (200, Some(12), 39));
        assert!(matches!(parse("HTTP/1.1 200 OK\r\nServer: x\r\n\r\n"), Err(HttpError::BadHead { .. })));
        assert!(matches!(parse("nonsense\r\n\r\n"), Err(HttpError::BadHead { .. })));
        assert!(parse_head("/", &[b'a'; MAX_HEAD + 1]).is_err());
    }

    #[test]
    fn chunks() {
        let parse = |text: &str| parse_chunks("/", text.as_bytes());
        assert_eq!(parse("3\r\nabc\r\n0\r\n").unwrap(), None);
        assert_eq!(parse("3\r\nabc\r\n2\r\nde\r\n0\r\n\r\nHTTP").unwrap(), Some((b"abcde".to_vec(), 20)));
        assert!(parse("xyz\r\n").is_err());
        assert!(parse("ffffffffffffffff\r\n").is_err());
    }

    /// Answers one connection with `answer`, byte for byte, however many requests come, and closes it.
    fn serve(answer: Vec<u8>) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 1024];
            let _ = stream.read(&mut request);
            let _ = stream.write_all(&answer);
        });
        address
    }

    fn answer(body: &[u8], announced: usize) -> Vec<u8> {
        let mut answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {announced}\r\n\r\n").into_bytes();
        answer.extend_from_slice(body);
        answer
    }

    fn fetch(answer: Vec<u8>) -> Result<(), HttpError> {
        Connection::open(serve(answer), Duration::from_secs(60))?.get_file("1k.bin")
    }

    #[test]
    fn a_right_file_a_wrong_byte_a_short_file_a_wrong_length() {
        let mut body = vec![0; 1024];
        content::fill(1024, 0, &mut body);
        fetch(answer(&body, 1024)).unwrap();
        assert!(matches!(fetch(answer(&body[..1000], 1024)), Err(HttpError::Closed { got: 1000, .. })));
        assert!(matches!(fetch(answer(&body, 1000)), Err(HttpError::Length { got: 1000, .. })));
        body[700] ^= 4;
        assert!(matches!(fetch(answer(&body, 1024)), Err(HttpError::Content { offset: 700, .. })));
    }

    #[test]
    fn a_download_goes_at_the_pace_of_its_reader() {
        let mut body = vec![0; 1 << 20];
        content::fill(1 << 20, 0, &mut body);
        let connection = Connection::open(serve(answer(&body, 1 << 20)), Duration::from_secs(60)).unwrap();
        let mut download = connection.download("1m.bin").unwrap();
        download.advance(1000).unwrap();
        assert!(download.got() >= 1000 && download.missing() > 0);
        download.finish().unwrap();
    }
}
