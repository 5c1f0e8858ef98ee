//! Contexts of asynchronous input and output (`io_setup`): a ring of events that the kernel shares with the process, whose
//! address is the name of the context.
//!
//! The kernel shows the events that nobody has taken yet, and nothing of the requests that it is still working on. What
//! disks are asked for is over when they have nothing to do; requests that wait for something else are seen in its memory
//! alone.

use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::layout::Mapping;
use super::state::{Backing, MemoryState, VmaState};
use super::{PAGE, mapped};
use crate::error::{CaptureError, Context};
use crate::ids::HostPid;
use crate::kernel;
use crate::look::{Look, Subject};
use crate::sys::{descriptor, memory};
use crate::tracee::{Arg, Batch, Call, Output, Results};

/// An event: the request's data, the request, two results.
pub type Event = [u64; 4];

/// A context.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingState {
    /// Events that were not taken, the oldest first.
    pub events: Vec<Event>,
}

/// `struct aio_ring` before its events, and what says that it is one.
const HEAD: u64 = 32;
const MAGIC: u32 = 0xa10a_10a1;
const EVENT: u64 = size_of::<Event>() as u64;

/// How long disks may be busy, and how often to look.
const PATIENCE: Duration = Duration::from_millis(200);
const PAUSE: Duration = Duration::from_micros(500);
/// Completing what a disk has done takes the kernel no longer than that.
const QUIET: Duration = Duration::from_millis(5);

/// Whether a mapping is the ring of a context.
pub(super) fn is_ring(mapping: &Mapping) -> bool {
    mapping.shared && mapping.path.starts_with(b"/[aio]")
}

/// Refuses a context with requests that wait for something other than a disk, where the kernel's memory can be read.
pub(super) fn check(subject: &Subject, mapping: &Mapping) -> Result<(), CaptureError> {
    let object = || mapped::object(mapping);
    let Ok(mut kernel) = kernel::reader() else { return Ok(()) };
    let waits = std::fs::File::open(subject.host.proc("mem"))
        .and_then(|memory| kernel.has_requests(memory.as_fd(), mapping.start));
    match waits {
        // Of a part of a ring, for one.
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::Unsupported) => Ok(()),
        waits => match waits.capturing("asking what is asked for by", object())? {
            false => Ok(()),
            true => Err(subject.refuse(
                object(),
                "is used for requests that wait (IOCB_CMD_POLL), which cannot be checkpointed yet; try again when they \
                 are answered",
            )),
        },
    }
}

/// Writes down a context. The process is held.
pub(super) fn capture(look: &Look<'_>, subject: &Subject, mapping: &Mapping) -> Result<Backing, CaptureError> {
    let read = || Ring::read(subject.host, mapping.start..mapping.end);
    let object = || mapped::object(mapping);
    if look.files.all().any(|(_, file)| descriptor::flags(file).unwrap_or(0) & libc::O_DIRECT != 0) {
        settled(&read).capturing("reading", object())?.map_err(|()| {
            let why = "is used for files past the page cache, and disks were busy for 200 ms; try again later";
            subject.refuse(object(), why)
        })?;
    }
    check(subject, mapping)?;
    let ring = read().capturing("reading", object())?;
    match ring.events(subject.host).capturing("reading", object())? {
        Some(events) => Ok(Backing::Asynchronous(RingState { events })),
        None => {
            Err(subject.refuse(object(), "is part of a ring of asynchronous I/O, which cannot be checkpointed yet"))
        }
    }
}

/// Waits until every disk has had nothing to do for a moment, and no event comes any more.
fn settled(read: &dyn Fn() -> io::Result<Ring>) -> io::Result<Result<(), ()>> {
    let deadline = Instant::now() + PATIENCE;
    let mut busy = disks();
    let (mut tail, mut since) = (read()?.tail, Instant::now());
    loop {
        busy.retain(|disk| is_busy(disk));
        let now = read()?.tail;
        if now != tail || !busy.is_empty() {
            (tail, since) = (now, Instant::now());
        }
        if since.elapsed() >= QUIET {
            return Ok(Ok(()));
        }
        if Instant::now() > deadline {
            return Ok(Err(()));
        }
        std::thread::sleep(PAUSE);
    }
}

fn disks() -> Vec<std::path::PathBuf> {
    let all = std::fs::read_dir("/sys/block").into_iter().flatten().flatten();
    all.map(|disk| disk.path().join("inflight")).collect()
}

/// Reads and writes that a disk has been asked for and has not done.
fn is_busy(disk: &std::path::Path) -> bool {
    let text = std::fs::read_to_string(disk).unwrap_or_default();
    text.split_whitespace().any(|count| count != "0")
}

/// The head of a ring as it is read.
struct Ring {
    range: Range<u64>,
    count: u64,
    head: u64,
    tail: u64,
    magic: u32,
}

impl Ring {
    fn read(process: HostPid, range: Range<u64>) -> io::Result<Ring> {
        let mut bytes = [0; HEAD as usize];
        let read = memory::read(process, std::slice::from_ref(&(range.start..range.start + HEAD)), &mut bytes)?;
        if read < bytes.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let word = |at: usize| bytes[at..].first_chunk().map_or(0, |w| u32::from_ne_bytes(*w));
        let [count, head, tail] = [4, 8, 12].map(|at| u64::from(word(at)));
        Ok(Ring { range, count, head, tail, magic: word(16) })
    }

    /// The events that were not taken; `None` if it is not a whole ring.
    fn events(&self, process: HostPid) -> io::Result<Option<Vec<Event>>> {
        let length = self.range.end - self.range.start;
        if self.magic != MAGIC || self.count != places(length) || self.tail >= self.count || self.head >= self.count {
            return Ok(None);
        }
        let mut bytes = vec![0; length as usize];
        if memory::read(process, std::slice::from_ref(&self.range), &mut bytes)? < bytes.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let all = bytes[HEAD as usize..].as_chunks::<{ EVENT as usize }>().0;
        let event = |place: u64| {
            let mut event = Event::default();
            let words = all.get(place as usize).map_or(&[][..], |bytes| bytes.as_chunks::<8>().0);
            event.iter_mut().zip(words).for_each(|(to, from)| *to = u64::from_ne_bytes(*from));
            event
        };
        let unread = (self.tail + self.count - self.head) % self.count;
        Ok(Some((0..unread).map(|n| event((self.head + n) % self.count)).collect()))
    }
}

/// How many events a ring of that many bytes has room for.
fn places(length: u64) -> u64 {
    length.saturating_sub(HEAD) / EVENT
}

/// The least that a context must be asked for so that its ring is that long: twice that and two is what it has room for.
fn wish(length: u64) -> u64 {
    (length / PAGE).saturating_sub(1).saturating_mul(PAGE / EVENT / 2).saturating_sub(1).max(1)
}

/// The contexts of a process.
pub struct Contexts<'s>(Vec<(&'s VmaState, &'s RingState)>);

/// Where the kernel has put a context, and how many stand-ins of its events were taken.
pub struct Made(Vec<(Output, Vec<(Call, i64)>)>);

/// Requests that are submitted in one go.
const MANY: usize = 256;

impl<'s> Contexts<'s> {
    /// Those of this address space.
    pub fn of(state: &'s MemoryState) -> Contexts<'s> {
        let ring = |vma: &'s VmaState| match &vma.backing {
            Backing::Asynchronous(ring) => Some((vma, ring)),
            _ => None,
        };
        Contexts(state.vmas.iter().filter_map(ring).collect())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Makes them, somewhere: where they shall be is kept free.
    pub fn make(&self, batch: &mut Batch) -> Made {
        let make = |(vma, _): &(&VmaState, &RingState)| {
            let name = batch.output(8);
            let wish = wish(vma.end - vma.start);
            batch.call(libc::SYS_io_setup, [wish.into(), name.into()], "making a context of asynchronous I/O");
            (name, Vec::new())
        };
        Made(self.0.iter().map(make).collect())
    }

    /// Moves them to where they shall be, and has them get as many events as there shall be: reads of nothing of `file`.
    pub fn move_and_fill(&self, made: &mut Made, results: &Results, file: i32, batch: &mut Batch) {
        for ((vma, ring), (name, fills)) in self.0.iter().zip(&mut made.0) {
            let (at, length) = (word(results.output(*name)), vma.end - vma.start);
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            let args = [at.into(), length.into(), length.into(), flags.into(), vma.start.into()];
            batch.call(libc::SYS_mremap, args, format!("moving a ring to {:#x}", vma.start));
            for some in ring.events.chunks(MANY) {
                let request = [0u64, 0, (file as u64) << 32, 0, 0, 0, 0, 0];
                let request = batch.bytes(request.map(u64::to_ne_bytes).as_flattened());
                let list = batch.bytes(&vec![0; 8 * some.len()]);
                (0..some.len()).for_each(|place| batch.pointer(list, 8 * place, request));
                let args: [Arg; 3] = [vma.start.into(), some.len().into(), list];
                fills.push((batch.call(libc::SYS_io_submit, args, "filling a ring"), some.len() as i64));
            }
        }
    }

    /// Gives the events their contents.
    pub fn complete(&self, made: &Made, results: &Results, process: HostPid) -> io::Result<()> {
        use std::os::unix::fs::FileExt;
        let memory = std::fs::OpenOptions::new().write(true).open(process.proc("mem"))?;
        for ((vma, ring), (_, fills)) in self.0.iter().zip(&made.0) {
            let now = Ring::read(process, vma.range())?;
            if now.magic != MAGIC || now.count != places(vma.end - vma.start) {
                return Err(io::Error::other("this host has more processors than a ring has room for"));
            }
            if fills.iter().any(|(call, count)| results.get(*call) != *count) {
                return Err(io::Error::other("its events do not fit into its ring"));
            }
            let bytes: Vec<u8> = ring.events.iter().flatten().flat_map(|word| word.to_ne_bytes()).collect();
            memory.write_all_at(&bytes, vma.start + HEAD)?;
        }
        Ok(())
    }
}

fn word(bytes: &[u8]) -> u64 {
    bytes.first_chunk().map_or(0, |word| u64::from_ne_bytes(*word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_wish_gives_a_ring_as_long() {
        // What the kernel does with a wish: io_setup and aio_setup_ring of fs/aio.c.
        let length = |wish: u64| (HEAD + EVENT * (2 * wish + 2)).next_multiple_of(PAGE);
        for pages in 1..100 {
            assert_eq!(length(wish(pages * PAGE)), pages * PAGE, "{pages}");
            assert_eq!(places(pages * PAGE), pages * 128 - 1);
        }
    }
}
