//! Netlink requests: attributes, batches, answers. Knows nothing of what is asked.
//!
//! The requests of a batch travel in one datagram; the kernel carries them out in order before `send` returns, and goes
//! on after one that failed.

use std::io::{self, PipeReader};
use std::os::fd::AsFd;

use netlink_sys::protocols::{NETLINK_GENERIC, NETLINK_NETFILTER, NETLINK_ROUTE, NETLINK_XFRM};
use netlink_sys::{Socket, SocketAddr};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::sockopt::SndBufForce;

use crate::sys::namespace;

const HEADER: usize = 16;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;

/// Attributes of a request, laid out as the kernel reads them.
#[derive(Default)]
pub(crate) struct Attributes {
    bytes: Vec<u8>,
    /// Whether one was longer than its length can say: the kernel would take what is behind for others.
    too_long: bool,
}

impl Attributes {
    /// As the kernel reads them.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Begins with a fixed header.
    fn after(header: &[u8]) -> Attributes {
        Attributes { bytes: header.to_vec(), too_long: false }
    }

    /// Appends one. A request with one that is too long (from 65,532 bytes) fails, and is not made.
    pub(crate) fn put(&mut self, kind: u16, value: &[u8]) -> &mut Attributes {
        let Ok(length) = u16::try_from(value.len() + 4) else {
            self.too_long = true;
            return self;
        };
        self.bytes.extend(length.to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend(value);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        self
    }

    /// Appends a number in the host's byte order, as rtnetlink has them.
    pub(crate) fn put_u32(&mut self, kind: u16, value: u32) -> &mut Attributes {
        self.put(kind, &value.to_ne_bytes())
    }

    /// Appends a number in network byte order, as nfnetlink has them.
    pub(crate) fn put_be32(&mut self, kind: u16, value: u32) -> &mut Attributes {
        self.put(kind, &value.to_be_bytes())
    }

    /// Appends a string, with the zero byte at its end.
    pub(crate) fn put_str(&mut self, kind: u16, value: &str) -> &mut Attributes {
        self.put(kind, &[value.as_bytes(), &[0]].concat())
    }

    /// Appends attributes inside an attribute, after a fixed `header` where the kernel wants one.
    pub(crate) fn nest_after(
        &mut self,
        kind: u16,
        header: &[u8],
        fill: impl FnOnce(&mut Attributes),
    ) -> &mut Attributes {
        let mut inside = Attributes::after(header);
        fill(&mut inside);
        self.too_long |= inside.too_long;
        self.put(kind, &inside.bytes)
    }

    /// Appends attributes inside an attribute.
    pub(crate) fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Attributes)) -> &mut Attributes {
        self.nest_after(kind | libc::NLA_F_NESTED as u16, &[], fill)
    }
}

/// The attributes in `bytes`, as (kind without flags, value). What is malformed ends the list.
pub(crate) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?);
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        Some((kind & libc::NLA_TYPE_MASK as u16, value))
    })
}

/// The first attribute of that kind.
pub(crate) fn attribute(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes_of(bytes, wanted).next()
}

/// All of that kind.
pub(crate) fn attributes_of(bytes: &[u8], wanted: u16) -> impl Iterator<Item = &[u8]> {
    attributes(bytes).filter(move |(kind, _)| *kind == wanted).map(|(_, value)| value)
}

/// One request of a batch and what it is for.
struct Step {
    step: &'static str,
    object: String,
    optional: bool,
}

/// Requests that go together.
#[derive(Default)]
pub(crate) struct Batch {
    bytes: Vec<u8>,
    steps: Vec<Step>,
    /// The first request that cannot be put into words: then none is made.
    too_long: Option<(&'static str, String)>,
}

/// A request that failed.
#[derive(Debug)]
pub(crate) struct Failed {
    /// What was being done.
    pub(crate) step: &'static str,
    /// To what.
    pub(crate) object: String,
    /// What the kernel said.
    pub(crate) source: io::Error,
}

impl Failed {
    /// As an error that says what was being done.
    pub(crate) fn in_words(self) -> io::Error {
        io::Error::new(self.source.kind(), format!("{} {}: {}", self.step, self.object, self.source))
    }
}

impl From<Failed> for io::Error {
    fn from(failed: Failed) -> io::Error {
        failed.source
    }
}

impl Batch {
    /// Appends a request: its type, flags, fixed header and attributes.
    pub(crate) fn push(
        &mut self,
        (step, object): (&'static str, &str),
        (kind, flags): (u16, i32),
        header: &[u8],
        fill: impl FnOnce(&mut Attributes),
    ) -> &mut Batch {
        let mut body = Attributes::after(header);
        fill(&mut body);
        if body.too_long {
            self.too_long.get_or_insert((step, object.to_owned()));
        }
        // No acknowledgements: errors are answered in any case.
        message(&mut self.bytes, kind, flags, self.steps.len() as u32, &body.bytes);
        self.steps.push(Step { step, object: object.to_owned(), optional: false });
        self
    }

    /// Whether there is nothing in it.
    pub(crate) fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// Appends a message that is not a request but the frame of requests.
    pub(crate) fn mark(&mut self, kind: u16, body: &[u8]) {
        message(&mut self.bytes, kind, 0, self.steps.len() as u32, body);
    }

    /// Whether it can be sent.
    fn check(&self) -> Result<(), Failed> {
        let Some((step, object)) = &self.too_long else { return Ok(()) };
        let source = io::Error::new(io::ErrorKind::InvalidInput, "a setting is longer than any can be");
        Err(Failed { step, object: object.clone(), source })
    }

    fn failed(&self, index: usize, source: io::Error) -> Failed {
        let step = &self.steps[index.min(self.steps.len() - 1)];
        Failed { step: step.step, object: step.object.clone(), source }
    }

    /// Lets the last request fail: for what the host may be without, such as IPv6.
    pub(crate) fn optional(&mut self) -> &mut Batch {
        if let Some(last) = self.steps.last_mut() {
            last.optional = true;
        }
        self
    }
}

/// Appends a request: header (length, type, flags, sequence number, sender) and body.
fn message(bytes: &mut Vec<u8>, kind: u16, flags: i32, sequence: u32, body: &[u8]) {
    bytes.extend(((body.len() + HEADER) as u32).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(((flags | libc::NLM_F_REQUEST) as u16).to_ne_bytes());
    bytes.extend(sequence.to_ne_bytes());
    bytes.extend(0u32.to_ne_bytes());
    bytes.extend(body);
    // The next one begins where the kernel looks for it.
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// Who sees a removal of links through, once the kernel has reported it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Behind {
    /// A thread: this process does not end earlier.
    Thread,
    /// A process that has nothing of this one's.
    Process,
}

/// Waits until the removal of the link `index` is in the news (true), or the other end of `done` is closed.
fn reported(news: &Channel, done: &PipeReader, index: u32) -> io::Result<bool> {
    loop {
        let mut ready = [PollFd::new(news.0.as_fd(), PollFlags::POLLIN), PollFd::new(done.as_fd(), PollFlags::POLLIN)];
        match poll(&mut ready, PollTimeout::NONE) {
            Err(nix::Error::EINTR) => continue,
            other => other?,
        };
        if ready[1].any().unwrap_or(true) {
            return Ok(false);
        }
        // Overrun (ENOBUFS) means that there was news.
        match news.receive() {
            Ok(Some(bytes)) if messages(&bytes).any(|m| m.removes(index)) => return Ok(true),
            _ => {}
        }
    }
}

/// A conversation with one part of the kernel, in the network namespace of the thread that opened it.
pub(crate) struct Channel(Socket);

impl Channel {
    /// With the part that has links, addresses and routes.
    pub(crate) fn route() -> io::Result<Channel> {
        Channel::open(NETLINK_ROUTE)
    }

    /// With the packet filter.
    pub(crate) fn filter() -> io::Result<Channel> {
        Channel::open(NETLINK_NETFILTER)
    }

    /// With the packet filter, with room for a batch that must not be parted.
    pub(crate) fn filter_with_room(batch: &Batch) -> io::Result<Channel> {
        const ORDINARY: usize = 100 << 10;
        let channel = Channel::filter()?;
        if batch.bytes.len() > ORDINARY {
            nix::sys::socket::setsockopt(&channel.0.as_fd(), SndBufForce, &(2 * batch.bytes.len()))?;
        }
        Ok(channel)
    }

    /// With the part that has IPsec.
    pub(crate) fn security() -> io::Result<Channel> {
        Channel::open(NETLINK_XFRM)
    }

    /// With those parts that have no protocol of their own.
    pub(crate) fn generic() -> io::Result<Channel> {
        Channel::open(NETLINK_GENERIC)
    }

    fn open(protocol: isize) -> io::Result<Channel> {
        let socket = Socket::new(protocol)?;
        socket.set_cap_ack(true)?;
        socket.set_non_blocking(true)?;
        Ok(Channel(socket))
    }

    /// Carries out a batch; the first failure that matters is the result, after all have been tried.
    pub(crate) fn run(&self, batch: &Batch) -> Result<(), Failed> {
        batch.check()?;
        self.0.send(&batch.bytes, 0).map_err(|e| batch.failed(0, e))?;
        self.outcome(batch)
    }

    /// What the kernel has answered to a batch.
    fn outcome(&self, batch: &Batch) -> Result<(), Failed> {
        let mut failed = Ok(());
        while let Some(bytes) = self.receive().map_err(|e| batch.failed(0, e))? {
            for answer in messages(&bytes) {
                let (index, error) = (answer.sequence as usize, answer.error().unwrap_or(0));
                let optional = batch.steps.get(index).is_some_and(|s| s.optional);
                if error != 0 && !optional && failed.is_ok() {
                    failed = Err(batch.failed(index, io::Error::from_raw_os_error(error)));
                }
            }
        }
        failed
    }

    /// Carries out a batch that ends in the removal of links, until that of the link `index` is reported; the rest of
    /// it goes on behind the scenes, in a thread or in a process of its own.
    ///
    /// By then the kernel lists none of them any more, and nothing passes them. What is left to it is waiting for readers of
    /// the old lists, tens of milliseconds that nobody else has to wait for.
    pub(crate) fn remove(self, batch: Batch, index: u32, behind: Behind) -> Result<(), Failed> {
        let failed = |source| Failed { step: "removing", object: "links".to_owned(), source };
        let news = Channel::news(libc::RTMGRP_LINK).map_err(failed)?;
        let (done, at_end) = io::pipe().map_err(failed)?;
        if behind == Behind::Process {
            batch.check()?;
            namespace::send_apart(self.0.as_fd(), &batch.bytes, at_end.as_fd()).map_err(failed)?;
            drop(at_end);
            return match reported(&news, &done, index).map_err(failed)? {
                true => Ok(()),
                false => self.outcome(&batch),
            };
        }
        let running = std::thread::spawn(move || {
            let _at_end = at_end;
            self.run(&batch)
        });
        if reported(&news, &done, index).map_err(failed)? {
            return Ok(());
        }
        let panicked = || Err(failed(io::Error::other("the thread panicked")));
        running.join().unwrap_or_else(|_| panicked())
    }

    /// Waits for something to be received, and drops it; whether anything was.
    pub(crate) fn wait(&self, longest: PollTimeout) -> io::Result<bool> {
        let mut ready = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        let came = poll(&mut ready, longest)? > 0;
        // Overrun (ENOBUFS) means that there was news.
        if came {
            drop(self.receive());
        }
        Ok(came)
    }

    /// What happens to objects of one of the kernel's `RTMGRP_` groups.
    pub(crate) fn news(group: i32) -> io::Result<Channel> {
        let mut channel = Channel::route()?;
        channel.0.bind(&SocketAddr::new(0, group as u32))?;
        Ok(channel)
    }

    /// Asks for one thing or a list (`flags` says), and returns the body of each answer.
    pub(crate) fn ask(&self, kind: u16, flags: i32, header: &[u8]) -> io::Result<Vec<Vec<u8>>> {
        let mut request = Vec::new();
        message(&mut request, kind, flags, 0, header);
        self.0.send(&request, 0)?;
        let mut found = Vec::new();
        while let Some(bytes) = self.receive()? {
            for answer in messages(&bytes) {
                match (answer.kind, answer.error()) {
                    (NLMSG_DONE, _) => return answer.ended().map(|()| found),
                    (_, Some(error)) => return Err(io::Error::from_raw_os_error(error)),
                    _ => found.push(answer.body.to_vec()),
                }
            }
        }
        Ok(found)
    }

    /// The next datagram, if there is one: the kernel has queued all that it will answer when `send` returns.
    fn receive(&self) -> io::Result<Option<Vec<u8>>> {
        match self.0.recv_from_full() {
            Ok((bytes, _)) => Ok(Some(bytes)),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(e) => Err(e),
        }
    }
}

struct Answer<'a> {
    kind: u16,
    sequence: u32,
    body: &'a [u8],
}

impl Answer<'_> {
    /// Whether it reports that a link is gone, not only (as one of the bridge's family) that it has left its bridge.
    fn removes(&self, index: u32) -> bool {
        let named = self.body.get(4..8) == Some(&index.to_ne_bytes());
        self.kind == libc::RTM_DELLINK && named && self.body[0] == libc::AF_UNSPEC as u8
    }

    /// Whether what ends here is all of a list: the kernel says so when something was too large for it.
    fn ended(&self) -> io::Result<()> {
        match self.body.first_chunk().map(|code| i32::from_ne_bytes(*code)) {
            Some(code @ ..0) => Err(io::Error::from_raw_os_error(code.wrapping_neg())),
            _ => Ok(()),
        }
    }

    /// The error number of an acknowledgement, 0 for success.
    fn error(&self) -> Option<i32> {
        let code = self.body.get(..4)?.try_into().ok()?;
        (self.kind == NLMSG_ERROR).then(|| i32::from_ne_bytes(code).wrapping_neg())
    }
}

fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Answer<'_>> {
    std::iter::from_fn(move || {
        let word = |at: usize| Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        let length = word(0)? as usize;
        let answer = Answer { kind: word(4)? as u16, sequence: word(8)?, body: bytes.get(HEADER..length)? };
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        Some(answer)
    })
}

/// Reads some bytes as what the kernel answers, and as what it says in an answer.
pub(crate) fn try_answers(bytes: &[u8]) {
    let _ = messages(bytes).filter(|answer| answer.error().is_some() || answer.removes(1)).count();
    attributes(bytes).for_each(drop);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_read_back() {
        let mut put = Attributes::default();
        put.put(1, b"abc").nest(2, |inside| {
            inside.put_u32(3, 7);
        });
        assert_eq!(put.bytes.len(), 8 + 12);
        let read: Vec<_> = attributes(&put.bytes).collect();
        assert_eq!(read[0], (1, &b"abc"[..]));
        assert_eq!(attributes(read[1].1).next(), Some((3, &7u32.to_ne_bytes()[..])));
    }

    #[test]
    fn what_is_too_long_is_not_asked_for() {
        // Its length would be that of an empty one, and its end be attributes of their own.
        let long = vec![0; 0x1_0000];
        let mut batch = Batch::default();
        let mut inside = |value: &[u8]| {
            batch.push(("making", "a link"), (libc::RTM_NEWLINK, 0), &[0; 16], |link| {
                link.nest(1, |inside| {
                    inside.put(2, value);
                });
            });
            batch.too_long.is_some()
        };
        assert!(!inside(&long[..0x1_0000 - 12]) && inside(&long[..0x1_0000 - 8]) && inside(&long));
        let failed = Channel::route().unwrap().run(&batch).unwrap_err();
        assert_eq!((failed.step, failed.source.kind()), ("making", io::ErrorKind::InvalidInput));
    }

    #[test]
    fn requests_begin_where_the_kernel_looks_for_them() {
        let mut batch = Batch::default();
        batch.push(("asking", "oddly"), (libc::RTM_GETLINK, 0), &[0; 5], |_| {});
        assert_eq!((batch.bytes.len(), batch.bytes[0]), (HEADER + 8, HEADER as u8 + 5));
    }

    #[test]
    fn malformed_attributes_end_the_list() {
        assert_eq!(attributes(&[9, 0, 1, 0, 5]).count(), 0);
        assert_eq!(attributes(&[0, 0, 0, 0]).count(), 0);
    }
}
