//! A two-way byte stream to another host: frames that are counted, and waits that end.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::protocol::{self, Frame, GREETING, Message};
use crate::fault::{self, Break, Cut, Stream};
use crate::image::PartSink;
use crate::sys::file::set_nonblocking;

/// How long the other side may say nothing while it is its turn, and not take what we say.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// What a pipe holds: as much as the kernel allows to everybody.
const PIPE: i32 = 1 << 20;

/// One end of a stream.
pub struct Wire {
    from: Mutex<Input>,
    /// A copy of what is read from, to wait for.
    arrivals: OwnedFd,
    to: Mutex<Output>,
    sent: AtomicU64,
    cancelled: Arc<EventFd>,
    committed: AtomicBool,
}

struct Input {
    file: Patient,
    buffer: Vec<u8>,
}

struct Output {
    file: Patient,
    /// How many parts of the image were begun.
    parts: u16,
    /// Where a test has the stream cut.
    cut_before: Option<Cut>,
    /// How many frames were sent, of those that count for that, and whether it has been cut.
    frames: u64,
    is_cut: bool,
}

/// A file that is waited for with a limit, or until the stream is cancelled.
struct Patient {
    file: File,
    limit: Duration,
    cancelled: Arc<EventFd>,
}

impl Patient {
    fn wait(&self, what: PollFlags) -> io::Result<()> {
        let limit = PollTimeout::try_from(self.limit).unwrap_or(PollTimeout::MAX);
        self.wait_at_most(what, limit)
    }

    fn wait_at_most(&self, what: PollFlags, limit: PollTimeout) -> io::Result<()> {
        loop {
            let mut fds =
                [PollFd::new(self.file.as_fd(), what), PollFd::new(self.cancelled.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, limit) {
                Err(nix::errno::Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
                Ok(0) => return Err(io::Error::new(io::ErrorKind::TimedOut, "the other side is silent")),
                Ok(_) if fds[1].any().unwrap_or(false) => return Err(interrupted()),
                Ok(_) => return Ok(()),
            }
        }
    }
}

fn interrupted() -> io::Error {
    io::Error::other("it was interrupted")
}

impl Read for Patient {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            self.wait(PollFlags::POLLIN)?;
            match self.file.read(buffer) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                other => return other,
            }
        }
    }
}

impl Write for Patient {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            self.wait(PollFlags::POLLOUT)?;
            match self.file.write(bytes) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                other => return other,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Why a message did not go out as a whole.
#[derive(Debug)]
pub enum NotSent {
    /// No byte of it did: the other side cannot have heard it.
    Nothing(io::Error),
    /// Some of it did, and perhaps all.
    Some(io::Error),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Wire {
    /// A stream that is read from one file and written to another (or a copy of the same).
    pub fn new(from: OwnedFd, to: OwnedFd) -> io::Result<Wire> {
        for file in [&from, &to] {
            // A write must not block for ever: a pipe or socket that is full is waited for with a limit.
            set_nonblocking(file)?;
            // The less often both sides have to wait for each other, the better; a socket has no such size.
            let _ = nix::fcntl::fcntl(file, nix::fcntl::FcntlArg::F_SETPIPE_SZ(PIPE));
        }
        let cancelled = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
        let patient = |file: OwnedFd| Patient { file: file.into(), limit: PATIENCE, cancelled: cancelled.clone() };
        Ok(Wire {
            arrivals: from.try_clone()?,
            from: Mutex::new(Input { file: patient(from), buffer: Vec::new() }),
            to: Mutex::new(Output { file: patient(to), parts: 0, cut_before: None, frames: 0, is_cut: false }),
            sent: AtomicU64::new(0),
            committed: AtomicBool::new(false),
            cancelled,
        })
    }

    /// Whoever waits for the other side, or is about to, gets an error, unless [`Wire::commit`] came before.
    pub fn cancel(&self) {
        if !self.committed.load(Ordering::SeqCst) {
            let _ = self.cancelled.write(1);
        }
    }

    /// From now on nothing cancels it; an error if something has.
    pub fn commit(&self) -> io::Result<()> {
        self.committed.store(true, Ordering::SeqCst);
        if self.is_cancelled() { Err(interrupted()) } else { Ok(()) }
    }

    /// Whether [`Wire::cancel`] came in time.
    pub fn is_cancelled(&self) -> bool {
        poll(&mut [PollFd::new(self.cancelled.as_fd(), PollFlags::POLLIN)], PollTimeout::ZERO) != Ok(0)
    }

    /// For tests: where the stream breaks, and how long it is waited for.
    pub fn tried(self, how: &Stream) -> Wire {
        let limit = how.patience_ms.map_or(PATIENCE, Duration::from_millis);
        lock(&self.from).file.limit = limit;
        let mut to = lock(&self.to);
        (to.file.limit, to.cut_before) = (limit, how.cut.clone());
        drop(to);
        self
    }

    /// Says who we are and hears whether the other side is one of us.
    pub fn greet(&self) -> io::Result<()> {
        lock(&self.to).file.write_all(GREETING)?;
        let mut heard = [0; GREETING.len()];
        lock(&self.from).file.read_exact(&mut heard)?;
        if &heard == GREETING { Ok(()) } else { Err(io::Error::other("the other side is not `zap receive`")) }
    }

    /// Sends a message.
    pub fn send(&self, message: &Message) -> io::Result<()> {
        self.send_whole(message).map_err(|(NotSent::Nothing(error) | NotSent::Some(error))| error)
    }

    /// Sends a message that the other side must not act on unless we know that we have sent it: an error says whether
    /// anything of it went out.
    pub fn send_whole(&self, message: &Message) -> Result<(), NotSent> {
        let mut bytes = Vec::new();
        protocol::write_message(&mut bytes, message).map_err(NotSent::Nothing)?;
        let mut to = lock(&self.to);
        to.frame(message.name()).map_err(NotSent::Nothing)?;
        let first = to.file.write(&bytes).map_err(NotSent::Nothing)?;
        self.sent.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        to.file.write_all(&bytes[first..]).map_err(NotSent::Some)
    }

    /// Hears a message. Nothing else may come.
    pub fn hear(&self) -> io::Result<Message> {
        match self.hear_frame(|_, _| {})? {
            Some(message) => Ok(message),
            None => Err(io::Error::new(io::ErrorKind::InvalidData, "bytes came where a message was expected")),
        }
    }

    /// Hears a message (which is returned) or bytes of the image: these `take` is given, with the number of their part. It may
    /// keep the buffer and leave another.
    pub fn hear_frame(&self, take: impl FnOnce(u16, &mut Vec<u8>)) -> io::Result<Option<Message>> {
        let mut from = lock(&self.from);
        let Input { file, buffer } = &mut *from;
        match protocol::read_frame(file, buffer)? {
            Frame::Message(message) => Ok(Some(message)),
            Frame::Bytes(part) => {
                take(part, buffer);
                Ok(None)
            }
            Frame::Pages(_) => Err(io::Error::new(io::ErrorKind::InvalidData, "pages came that nobody asked for")),
        }
    }

    /// Hears pages that were asked for: their offset, and what is in them.
    pub fn hear_pages(&self) -> io::Result<(u64, Vec<u8>)> {
        let mut from = lock(&self.from);
        let Input { file, buffer } = &mut *from;
        match protocol::read_frame(file, buffer)? {
            Frame::Pages(offset) => Ok((offset, std::mem::take(buffer))),
            Frame::Message(Message::Abandoned(why)) => Err(io::Error::other(why)),
            _ => Err(io::Error::new(io::ErrorKind::InvalidData, "something came where pages were expected")),
        }
    }

    /// Sends pages that were asked for.
    pub fn send_pages(&self, offset: u64, pages: &[u8]) -> io::Result<()> {
        let mut to = lock(&self.to);
        to.frame("pages")?;
        protocol::write_pages(&mut to.file, offset, pages)?;
        self.sent.fetch_add(pages.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// What is readable when the other side has said something. It must not be read from.
    pub fn arrivals(&self) -> BorrowedFd<'_> {
        self.arrivals.as_fd()
    }

    /// How long the other side may say nothing.
    pub fn patience(&self) -> Duration {
        lock(&self.from).file.limit
    }

    /// Bytes sent so far.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }
}

impl Output {
    /// A frame of that kind is about to be sent.
    fn frame(&mut self, kind: &str) -> io::Result<()> {
        let Some(cut) = &self.cut_before else { return Ok(()) };
        let counts = cut.kind.as_ref().is_none_or(|wanted| wanted == kind);
        self.is_cut |= counts && self.frames >= cut.frame;
        if !self.is_cut {
            self.frames += u64::from(counts);
            return Ok(());
        }
        match cut.how {
            Break::Ends => {}
            Break::Dies => fault::die(),
            // Nothing is waited for but that nobody is there.
            Break::Stalls => self.file.wait_at_most(PollFlags::empty(), PollTimeout::NONE)?,
        }
        Err(io::Error::new(io::ErrorKind::BrokenPipe, "the stream was cut by a test"))
    }
}

impl PartSink for Wire {
    fn begin(&self, name: &str) -> io::Result<u16> {
        self.send(&Message::Begin { name: name.to_owned() })?;
        let mut to = lock(&self.to);
        to.parts += 1;
        Ok(to.parts - 1)
    }

    fn append(&self, part: u16, bytes: &[u8]) -> io::Result<()> {
        let mut to = lock(&self.to);
        for piece in bytes.chunks(protocol::PIECE) {
            to.frame("bytes")?;
            protocol::write_bytes(&mut to.file, part, piece)?;
        }
        self.sent.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    fn complete(&self, manifest: &[u8]) -> io::Result<()> {
        self.send(&Message::Manifest(manifest.to_vec()))
    }
}
