//! Rings of `io_uring` that wait for nothing.
//!
//! Nobody can set the kernel's own counters of a ring: a new one is counted up by requests that do nothing. What is in its
//! queues is memory that it shares with its programs. How it was set up, and all that waits in it, only the kernel's memory tells.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{Descriptor, FileKind, decoded, reopen};
use crate::error::{CaptureError, Context, RebuildError};
use crate::ids::{FileId, HostPid};
use crate::image::encode;
use crate::kernel;
use crate::look::Look;
use crate::memory::PAGE;
use crate::procfs;
use crate::rebuild::Rebuild;
use crate::sys::ring::{self, Area};

/// What its link is.
pub(crate) const LINK: &[u8] = b"anon_inode:[io_uring]";

/// A ring.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoUringState {
    /// Requests and answers that there is room for: powers of two.
    pub room: (u32, u32),
    /// How it was set up (some of [`ring::MANNERS`]).
    #[serde(default)]
    pub manners: u32,
    /// How many requests the kernel has taken, each of which it has answered.
    pub taken: u32,
    /// The queues: counters, answers, and the order of requests.
    #[serde(with = "serde_bytes")]
    pub queues: Vec<u8>,
    /// The requests.
    #[serde(with = "serde_bytes")]
    pub requests: Vec<u8>,
    /// Status flags.
    pub flags: i32,
}

/// Where things are in the memory of the queues (`struct io_rings`).
const REQUESTS_HEAD: usize = 0;
const REQUESTS_TAIL: usize = 4;
const ANSWERS_HEAD: usize = 8;
const ANSWERS_TAIL: usize = 12;
const STATE: usize = 36;
const ANSWERS: usize = 64;
/// Room that the kernel gives at most.
const MOST: (u32, u32) = (1 << 15, 1 << 16);

/// How long requests may be under way, and how often to look.
const PATIENCE: Duration = Duration::from_millis(200);
const PAUSE: Duration = Duration::from_millis(1);

/// Of a ring whose memory has another length than it should.
const WIDE: &str = "has requests or answers of another size (IORING_SETUP_SQE128, IORING_SETUP_CQE32), or its program has \
    given it the memory (IORING_SETUP_NO_MMAP), which cannot be checkpointed yet";

/// What counting up may take: a request takes some 60 ns, and a call 1 µs.
const LONGEST: u64 = 10_000_000_000;

fn counting_up(room: u32, taken: u32) -> u64 {
    u64::from(taken) * 60 + u64::from(taken / room.max(1)) * 1000
}

/// Bytes of the queues where the order of requests is among them; it begins behind the answers.
fn order((requests, answers): (u32, u32)) -> std::ops::Range<usize> {
    let start = (ANSWERS + answers as usize * ring::ANSWER).next_multiple_of(64);
    start..start + 4 * requests as usize
}

fn pages(bytes: usize) -> usize {
    bytes.next_multiple_of(PAGE as usize)
}

/// What `fdinfo` says of a ring.
struct Told {
    room: (u32, u32),
    taken: u32,
    answered: u32,
}

pub(super) struct IoUring;

impl FileKind for IoUring {
    fn name(&self) -> &'static str {
        "io-uring"
    }

    fn recognizes(&self, descriptor: &Descriptor) -> bool {
        descriptor.link == LINK
    }

    fn check(&self, descriptor: &Descriptor) -> Result<(), CaptureError> {
        manners(descriptor)?;
        refuse_setup(descriptor)?;
        refuse_workers(descriptor)?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            match told(descriptor) {
                // While the kernel works on it it says nothing.
                Err(refused) if Instant::now() > deadline => return Err(refused),
                Err(_) => std::thread::sleep(PAUSE),
                Ok(_) => return Ok(()),
            }
        }
    }

    fn capture(&self, _look: &mut Look<'_>, descriptor: &Descriptor) -> Result<Vec<u8>, CaptureError> {
        let manners = manners(descriptor)?;
        refuse_setup(descriptor)?;
        let Told { room, taken, answered } = told(descriptor)?;
        let queues = whole(descriptor, ring::QUEUES, &[order(room).end, order(room).start])?;
        let requests = whole(descriptor, ring::REQUESTS, &[room.0 as usize * ring::REQUEST])?;
        let word = |at: usize| queues[at..].first_chunk().map_or(0, |word| u32::from_ne_bytes(*word));
        if word(STATE) != 0 || (word(REQUESTS_HEAD), word(ANSWERS_TAIL)) != (taken, answered) {
            return Err(descriptor.refuse("has work of the kernel's under way; try again later"));
        }
        if counting_up(room.0, taken) > LONGEST {
            let why = format!("has done {taken} requests, and it would take a restart too long to count up to them");
            return Err(descriptor.refuse(why));
        }
        Ok(encode(&IoUringState { room, manners, taken, queues, requests, flags: descriptor.flags() }))
    }

    fn open(&self, _rebuild: &mut Rebuild<'_>, id: FileId, state: &[u8]) -> Result<OwnedFd, RebuildError> {
        let state: IoUringState = decoded(state)?;
        check_plausible(&state).map_err(|what| RebuildError::Damaged(format!("the io_uring {id} {what}")))?;
        let ring = ring::make(state.room, state.manners & ring::MANNERS).rebuilding("making the io_uring", id)?;
        fill(&ring, &state).rebuilding("counting up the io_uring", id)?;
        reopen::set_flags(&ring, state.flags).rebuilding("setting the flags of", id)?;
        Ok(ring)
    }
}

fn check_plausible(state: &IoUringState) -> Result<(), &'static str> {
    let (requests, answers) = state.room;
    let is_room = |room: u32, most: u32| room.is_power_of_two() && room <= most;
    if !is_room(requests, MOST.0) || !is_room(answers, MOST.1) || answers < requests {
        return Err("has room that none has");
    }
    if counting_up(requests, state.taken) > LONGEST || state.queues.len() < ANSWERS {
        return Err("has counters that none has");
    }
    Ok(())
}

/// Counts a new ring up, and gives it what was in the other's memory.
fn fill(ring: &OwnedFd, state: &IoUringState) -> io::Result<()> {
    let order = order(state.room);
    let queues = Area::map(ring, ring::QUEUES, pages(order.end))?;
    let requests = Area::map(ring, ring::REQUESTS, pages(state.room.0 as usize * ring::REQUEST))?;
    let mut bytes = queues.bytes();
    // Where the program has no order of requests, they are taken one after the other: so they are in this one.
    let one_after_the_other = || (0..state.room.0).flat_map(u32::to_ne_bytes).collect::<Vec<u8>>();
    bytes[order.clone()].copy_from_slice(&one_after_the_other());
    queues.write(&bytes);
    count_up(ring, &queues, state)?;
    bytes[..state.queues.len().min(order.start)].copy_from_slice(&state.queues[..state.queues.len().min(order.start)]);
    if let Some(given) = state.queues.get(order.clone()).filter(|given| given.iter().any(|byte| *byte != 0)) {
        bytes[order].copy_from_slice(given);
    }
    queues.write(&bytes);
    requests.write(&state.requests);
    Ok(())
}

/// The requests of a new ring are zeros, which is one that does nothing.
fn count_up(ring: &OwnedFd, queues: &Area, state: &IoUringState) -> io::Result<()> {
    let mut taken = 0;
    while taken < state.taken {
        let some = (state.taken - taken).min(state.room.0);
        taken += some;
        queues.set(REQUESTS_TAIL, taken);
        if ring::enter(ring, some)? != u64::from(some) {
            return Err(io::Error::other("it took fewer requests"));
        }
        let answered = queues.counter(ANSWERS_TAIL).map_or(0, |tail| tail.load(Ordering::Acquire));
        if answered != taken {
            return Err(io::Error::other("it has not answered"));
        }
        queues.set(ANSWERS_HEAD, taken);
    }
    Ok(())
}

/// How it was set up. Refuses one that has what only the kernel's memory tells, and any where nobody may read that.
fn manners(descriptor: &Descriptor) -> Result<u32, CaptureError> {
    let seen = kernel::reader().map_err(io::Error::other).and_then(|mut kernel| kernel.ring(descriptor.as_fd()));
    match seen {
        Ok((_, Some(what))) => Err(descriptor.refuse(format!("has {what}, which cannot be checkpointed yet"))),
        Ok((wide, None)) if wide & ring::WIDE != 0 => Err(descriptor.refuse(WIDE)),
        Ok((setup, None)) => Ok(setup & ring::MANNERS),
        Err(_) => Err(descriptor.refuse(
            "may have timeouts in flight, or buffers to choose from, which the kernel of this host does not show (`zap check`: \
             kernel memory)",
        )),
    }
}

/// The memory of a ring at that offset, which must be as long as one of these.
fn whole(descriptor: &Descriptor, offset: u64, lengths: &[usize]) -> Result<Vec<u8>, CaptureError> {
    for length in lengths.iter().map(|length| pages(*length)) {
        let has = |length: usize| Area::is_as_long(descriptor, offset, length);
        if has(length) && !has(length + PAGE as usize) {
            let area = Area::map(descriptor, offset, length).capturing("mapping", descriptor.object())?;
            return Ok(area.bytes());
        }
    }
    Err(descriptor.refuse(WIDE))
}

/// What it says of itself, with nothing under way.
fn told(descriptor: &Descriptor) -> Result<Told, CaptureError> {
    // What was read of it before may be old.
    let path = format!("/proc/self/fdinfo/{}", descriptor.file.as_raw_fd());
    let text = procfs::read(path).capturing("reading fdinfo", descriptor.object())?;
    let text = String::from_utf8_lossy(&text);
    let field = |label: &str| text.lines().find_map(|line| line.strip_prefix(label)).map(str::trim);
    let number = |label: &str| {
        let value = field(label).unwrap_or("is missing");
        let digits = value.strip_prefix("0x").map_or((value, 10), |digits| (digits, 16));
        u32::from_str_radix(digits.0, digits.1).map_err(|_| CaptureError::Unexpected {
            object: descriptor.object(),
            what: format!("fdinfo: {label} {value}"),
        })
    };
    let [requests, answers, taken, answered] = ["SqMask:", "CqMask:", "CachedSqHead:", "CachedCqTail:"].map(number);
    let (room, taken, answered) = ((requests?.wrapping_add(1), answers?.wrapping_add(1)), taken?, answered?);
    refuse_belongings(descriptor, &field)?;
    let lists = ["PollList:", "CqOverflowList:"].map(|label| is_followed(&text, label));
    match taken.wrapping_sub(answered) {
        _ if lists[0] => {
            Err(descriptor.refuse("has requests in flight, which wait for a file (PollList in its fdinfo)"))
        }
        _ if lists[1] => {
            Err(descriptor.refuse("has more answers than there is room for (CqOverflowList in its fdinfo)"))
        }
        0 => Ok(Told { room, taken, answered }),
        more if more < u32::MAX / 2 => Err(descriptor.refuse(format!(
            "has requests in flight, for it has taken {taken} and answered {answered}; try again when it has answered"
        ))),
        _ => Err(descriptor.refuse(format!(
            "has taken {taken} requests and given {answered} answers, so that nobody can tell whether it is done"
        ))),
    }
}

/// Whether something is listed below a label.
fn is_followed(text: &str, label: &str) -> bool {
    let mut behind = text.lines().skip_while(|line| !line.starts_with(label)).skip(1);
    behind.next().is_some_and(|line| line.starts_with(' '))
}

/// Refuses a ring with which something was registered.
fn refuse_belongings<'t>(descriptor: &Descriptor, field: &dyn Fn(&str) -> Option<&'t str>) -> Result<(), CaptureError> {
    let has = |label: &str, usual: &str| field(label).is_some_and(|value| value != usual);
    let what = match () {
        () if has("SqThread:", "-1") => "a thread of the kernel's that looks for requests (IORING_SETUP_SQPOLL)",
        () if has("UserFiles:", "0") => "files that were registered with it",
        () if has("UserBufs:", "0") => "buffers that were registered with it",
        () if field("Personalities:").is_some() => "other users' credentials that were registered with it",
        () if has("NAPI:", "disabled") => "network queues that it polls (NAPI)",
        () => return Ok(()),
    };
    Err(descriptor.refuse(format!("has {what}, which cannot be checkpointed yet")))
}

/// Refuses a ring that was set up in a way, or was given something, that is found out by asking.
fn refuse_setup(descriptor: &Descriptor) -> Result<(), CaptureError> {
    let refused = |what: &str| Err(descriptor.refuse(format!("{what}, which cannot be checkpointed yet")));
    if ring::enter(descriptor, 0).is_err_and(|e| e.raw_os_error() == Some(libc::EBADFD)) {
        return refused("has not been enabled yet (IORING_SETUP_R_DISABLED)");
    }
    match ring::tells_an_eventfd(descriptor) {
        Ok(true) => return refused("tells an eventfd of its answers (IORING_REGISTER_EVENTFD)"),
        Err(e) if e.raw_os_error() == Some(libc::EEXIST) => {
            return refused("belongs to one thread (IORING_SETUP_SINGLE_ISSUER)");
        }
        Err(e) if e.raw_os_error() == Some(libc::EACCES) => return refused("is restricted in what it does"),
        other => other.map(drop).capturing("asking", descriptor.object())?,
    }
    Ok(())
}

/// Refuses a ring while there are threads of the kernel's that have worked for it: nobody can hold those.
fn refuse_workers(descriptor: &Descriptor) -> Result<(), CaptureError> {
    match has_workers(descriptor.subject.host) {
        true => {
            Err(descriptor.refuse("has workers (iou-wrk), which end when they have had no work for 5 s; try again"))
        }
        false => Ok(()),
    }
}

fn has_workers(process: HostPid) -> bool {
    let threads = std::fs::read_dir(process.proc("task")).into_iter().flatten().flatten();
    threads
        .map(|thread| thread.path().join("comm"))
        .any(|comm| std::fs::read_to_string(comm).is_ok_and(|name| name.starts_with("iou-wrk")))
}

/// Reads a text as a ring's fdinfo.
pub(super) fn try_info(text: &str) {
    let _ = is_followed(text, "PollList:");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::testing::round_trip;
    use crate::look::Console;

    /// Has a ring do some requests that do nothing, and numbers them.
    fn submit(ring: &OwnedFd, room: u32, count: u32) {
        let queues = Area::map(ring, ring::QUEUES, 4096).unwrap();
        let requests = Area::map(ring, ring::REQUESTS, 4096).unwrap();
        let mut bytes = queues.bytes();
        let order = order((room, 2 * room));
        (0..room).for_each(|n| bytes[order.start + 4 * n as usize..][..4].copy_from_slice(&n.to_ne_bytes()));
        queues.write(&bytes);
        for _ in 0..count {
            let tail = queues.counter(REQUESTS_TAIL).unwrap().load(Ordering::SeqCst);
            let mut all = requests.bytes();
            all[(tail % room) as usize * 64 + 32..][..4].copy_from_slice(&tail.to_ne_bytes());
            requests.write(&all);
            queues.set(REQUESTS_TAIL, tail + 1);
            assert_eq!(ring::enter(ring, 1).unwrap(), 1);
        }
    }

    #[test]
    fn counters_and_answers_come_back() {
        let ring = ring::make((4, 8), 0).unwrap();
        submit(&ring, 4, 8);
        Area::map(&ring, ring::QUEUES, 4096).unwrap().set(ANSWERS_HEAD, 6);
        let (_, _, again) = round_trip(&[&ring], Console::None);
        let memory = |ring: &OwnedFd| Area::map(ring, ring::QUEUES, 4096).unwrap().bytes();
        assert!(memory(&again[0]) == memory(&ring));
        // The next answer is behind the others.
        submit(&again[0], 4, 1);
        let after = memory(&again[0]);
        assert_eq!((after[REQUESTS_HEAD], after[ANSWERS_TAIL]), (9, 9));
        assert_eq!(after[ANSWERS..][..4], 8u32.to_ne_bytes());
    }

    #[test]
    fn how_it_was_set_up_comes_back() {
        const SUBMIT_ALL: u32 = 1 << 7;
        let rings = [ring::make((4, 8), SUBMIT_ALL).unwrap(), ring::make((4, 8), 0).unwrap()];
        let (_, _, again) = round_trip(&[&rings[0], &rings[1]], Console::None);
        // What fails at once, and another.
        let taken = |ring: &OwnedFd| {
            let requests = Area::map(ring, ring::REQUESTS, 4096).unwrap();
            requests.write(&[255]);
            Area::map(ring, ring::QUEUES, 4096).unwrap().set(REQUESTS_TAIL, 2);
            ring::enter(ring, 2).unwrap()
        };
        assert_eq!([&again[0], &again[1]].map(taken), [2, 1]);
    }

    #[test]
    fn what_is_listed_below_a_label() {
        assert!(is_followed("PollList:\n  op=6, task_works=0\nCqOverflowList:\n", "PollList:"));
        assert!(!is_followed("PollList:\nCqOverflowList:\n", "PollList:"));
        assert!(!is_followed("CqOverflowList:", "CqOverflowList:"));
    }
}
