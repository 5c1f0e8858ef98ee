//! Rings of `io_uring`, which pods have that take no seccomp profile.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::stage::*;

pub(crate) const KINDS: &[crate::stage::Kind] = &[
    ("io-uring", io_uring),
    ("io-uring-fresh", io_uring_fresh),
    ("io-uring-shared", io_uring_shared),
    ("io-uring-unordered", io_uring_unordered),
    ("io-uring-going-on", io_uring_going_on),
    ("io-uring-mapped", io_uring_mapped),
    ("io-uring-in-flight", io_uring_in_flight),
    ("io-uring-notifying", io_uring_notifying),
    ("io-uring-polling", io_uring_polling),
    ("io-uring-of-one", io_uring_of_one),
    ("io-uring-files", io_uring_files),
    ("io-uring-buffers", io_uring_buffers),
    ("io-uring-provided", io_uring_provided),
    ("io-uring-timed", io_uring_timed),
    ("io-uring-registered", io_uring_registered),
    ("io-uring-nowhere", io_uring_nowhere),
    ("io-uring-wide", io_uring_wide),
];

const NO_ARRAY: u32 = 1 << 16;
const SUBMIT_ALL: u32 = 1 << 7;
const WIDE_ANSWERS: u32 = 1 << 11;
const SQPOLL: u32 = 1 << 1;
const SINGLE_ISSUER: u32 = 1 << 12;
const ROOM: u32 = 8;
const NOP: u8 = 0;
const READ: u8 = 22;
const TIMEOUT: u8 = 11;
const PROVIDE_BUFFERS: u8 = 31;
/// Where a request has its flags, its offset, and flags of what it does.
const FLAGS: usize = 1;
const OFFSET: usize = 8;
const DOING: usize = 28;

/// A ring, and where it is mapped. Offsets are what the kernel says they are.
struct Ring {
    number: i32,
    parameters: [u32; 30],
    queues: *mut u8,
    requests: *mut u8,
}

impl Ring {
    fn new(flags: u32) -> Result<Ring, String> {
        let mut parameters = [0u32; 30];
        parameters[2] = flags;
        let number =
            call("io_uring_setup", libc::SYS_io_uring_setup, [u64::from(ROOM), parameters.as_mut_ptr() as u64])?;
        let number = number as i32;
        let map = |offset: i64| {
            let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_POPULATE);
            let start = unsafe { libc::mmap(std::ptr::null_mut(), 4096, protection, flags, number, offset) };
            done("mmap", if start == libc::MAP_FAILED { -1i64 } else { 0 })?;
            Ok::<*mut u8, String>(start.cast())
        };
        Ok(Ring { number, parameters, queues: map(0)?, requests: map(0x1000_0000)? })
    }

    fn counter(&self, at: u32) -> &AtomicU32 {
        unsafe { AtomicU32::from_ptr(self.queues.add(at as usize).cast()) }
    }

    /// Head and tail of the requests, head and tail of the answers.
    fn counters(&self) -> [u32; 4] {
        let p = &self.parameters;
        [p[10], p[11], p[20], p[21]].map(|at| self.counter(at).load(Ordering::SeqCst))
    }

    /// Changes the request that was put in line last.
    fn amend(&self, at: usize, bytes: &[u8]) {
        let last = self.counter(self.parameters[11]).load(Ordering::SeqCst).wrapping_sub(1) & (ROOM - 1);
        let place = 64 * last as usize + at;
        unsafe { self.requests.add(place).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }

    /// Puts a request in line: what to do, with which file, where, and what to call it.
    fn put(&self, operation: u8, file: i32, (address, length): (u64, u32), name: u64) {
        let tail = self.counter(self.parameters[11]);
        let place = tail.load(Ordering::SeqCst) & (ROOM - 1);
        let mut request = [0u8; 64];
        request[0] = operation;
        request[4..8].copy_from_slice(&file.to_ne_bytes());
        request[8..16].copy_from_slice(&u64::MAX.to_ne_bytes());
        request[16..24].copy_from_slice(&address.to_ne_bytes());
        request[24..28].copy_from_slice(&length.to_ne_bytes());
        request[32..40].copy_from_slice(&name.to_ne_bytes());
        unsafe { self.requests.add(64 * place as usize).copy_from_nonoverlapping(request.as_ptr(), 64) };
        if self.parameters[2] & NO_ARRAY == 0 {
            self.counter(self.parameters[16] + 4 * place).store(place, Ordering::SeqCst);
        }
        tail.fetch_add(1, Ordering::SeqCst);
    }

    /// Has the kernel take what is in line, and waits for as many answers.
    fn enter(&self, count: u32, answers: u32) -> Checked {
        const GETEVENTS: u64 = 1;
        let args = [self.number as u64, u64::from(count), u64::from(answers), GETEVENTS, 0, 0];
        equal("requests taken", call("io_uring_enter", libc::SYS_io_uring_enter, args)?, i64::from(count))
    }

    /// The next answer: to which request, and what.
    fn answer(&self) -> Result<(u64, i32), String> {
        let [_, _, head, tail] = self.counters();
        check(head != tail, "there is no answer")?;
        let place = head & (self.parameters[1] - 1);
        let answer = unsafe { self.queues.add(self.parameters[25] as usize + 16 * place as usize) };
        let found = unsafe { (answer.cast::<u64>().read_volatile(), answer.add(8).cast::<i32>().read_volatile()) };
        self.counter(self.parameters[20]).fetch_add(1, Ordering::SeqCst);
        Ok(found)
    }

    fn register(&self, what: u64, argument: u64, count: u64) -> Checked {
        call("io_uring_register", libc::SYS_io_uring_register, [self.number as u64, what, argument, count]).map(drop)
    }

    /// Does `count` requests that do nothing, called by their numbers; all but the last answers are taken.
    fn run(&self, count: u64, untaken: u64) -> Checked {
        for name in 0..count {
            self.put(NOP, -1, (0, 0), name);
            self.enter(1, 1)?;
            if name + untaken < count {
                equal("an answer", self.answer()?, (name, 0))?;
            }
        }
        Ok(())
    }

    /// A read that waits for what is written to a pipe.
    fn reads(&self, name: u64) -> Checked {
        let (gate, mut word) = (Gate::new()?, [0u8; 4]);
        self.put(READ, gate.read_end(), (word.as_mut_ptr() as u64, 4), name);
        self.enter(1, 0)?;
        gate.open()?;
        self.enter(0, 1)?;
        equal("what was read", (self.answer()?, word), ((name, 1), [b'x', 0, 0, 0]))
    }
}

/// A ring that has done more than it has room for, with answers that were not taken, and requests that were not sent.
fn io_uring() -> Checked {
    let ring = Ring::new(0)?;
    ring.run(1021, 3)?;
    ring.put(NOP, -1, (0, 0), 5000);
    ring.put(NOP, -1, (0, 0), 5001);
    hold()?;
    equal("the counters", ring.counters(), [1021, 1023, 1018, 1021])?;
    (1018..1021).try_for_each(|name| equal("an answer", ring.answer()?, (name, 0)))?;
    ring.enter(2, 2)?;
    equal("an answer", ring.answer()?, (5000, 0))?;
    equal("an answer", ring.answer()?, (5001, 0))?;
    ring.reads(77)?;
    ring.run(20, 0)
}

/// A ring that was never used.
fn io_uring_fresh() -> Checked {
    let ring = Ring::new(0)?;
    hold()?;
    ring.run(20, 0)?;
    ring.reads(1)
}

/// A ring of a process and its child, one of which has mapped it twice.
fn io_uring_shared() -> Checked {
    let (ring, set_up, seen) = (Ring::new(0)?, Gate::new()?, Gate::new()?);
    ring.run(5, 0)?;
    let child = fork(|| {
        set_up.open()?;
        await_go();
        ring.run(3, 0)?;
        seen.open()
    })?;
    let again =
        unsafe { libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ, libc::MAP_SHARED, ring.number, 0x800_0000) };
    done("mmap", if again == libc::MAP_FAILED { -1i64 } else { 0 })?;
    set_up.pass(1)?;
    hold()?;
    seen.pass(1)?;
    equal("the counters", ring.counters(), [8; 4])?;
    equal("the same elsewhere", unsafe { again.cast::<u32>().read_volatile() }, 8)?;
    reap(child)?;
    ring.run(3, 0)
}

/// A ring whose requests are taken one after the other, as libraries set them up.
fn io_uring_unordered() -> Checked {
    let Ok(ring) = Ring::new(NO_ARRAY) else { return io_uring_fresh() };
    ring.run(11, 1)?;
    ring.put(NOP, -1, (0, 0), 5000);
    hold()?;
    equal("an answer", ring.answer()?, (10, 0))?;
    ring.enter(1, 1)?;
    equal("an answer", ring.answer()?, (5000, 0))?;
    ring.run(20, 0)?;
    ring.reads(9)
}

/// A ring that goes on behind a request which fails at once.
fn io_uring_going_on() -> Checked {
    let ring = Ring::new(SUBMIT_ALL)?;
    let try_both = || {
        ring.put(u8::MAX, -1, (0, 0), 1);
        ring.put(NOP, -1, (0, 0), 2);
        ring.enter(2, 2)?;
        equal("what failed", ring.answer()?, (1, -libc::EINVAL))?;
        equal("what did not", ring.answer()?, (2, 0))
    };
    try_both()?;
    hold()?;
    try_both()
}

/// A ring of which only the mapping is left.
fn io_uring_mapped() -> Checked {
    let ring = Ring::new(0)?;
    unsafe { libc::close(ring.number) };
    hold_loosely()?;
    equal("the counters", ring.counters(), [0; 4])
}

/// A read that waits.
fn io_uring_in_flight() -> Checked {
    let (ring, gate, mut word) = (Ring::new(0)?, Gate::new()?, [0u8; 4]);
    ring.put(READ, gate.read_end(), (word.as_mut_ptr() as u64, 4), 7);
    ring.enter(1, 0)?;
    hold_loosely()?;
    gate.open()?;
    ring.enter(0, 1)?;
    equal("the answer", ring.answer()?, (7, 1))
}

/// Buffers that were provided by a request, which has been answered.
fn io_uring_provided() -> Checked {
    const CHOOSE: u8 = 1 << 5;
    let (ring, gate, mut room) = (Ring::new(0)?, Gate::new()?, [0u8; 4]);
    ring.put(PROVIDE_BUFFERS, 1, (room.as_mut_ptr() as u64, 4), 5);
    ring.amend(OFFSET, &[0; 8]);
    ring.enter(1, 1)?;
    equal("the answer", ring.answer()?, (5, 0))?;
    hold_loosely()?;
    gate.open()?;
    ring.put(READ, gate.read_end(), (0, 4), 7);
    ring.amend(FLAGS, &[CHOOSE]);
    ring.enter(1, 1)?;
    equal("the answer", ring.answer()?, (7, 1))
}

/// A clock that has struck once and will again: there are as many answers as requests.
fn io_uring_timed() -> Checked {
    const AGAIN_AND_AGAIN: u32 = 1 << 6;
    let (ring, every) = (Ring::new(0)?, [1i64, 500_000_000]);
    ring.put(TIMEOUT, -1, (every.as_ptr() as u64, 1), 9);
    ring.amend(OFFSET, &[0; 8]);
    ring.amend(DOING, &AGAIN_AND_AGAIN.to_ne_bytes());
    ring.enter(1, 1)?;
    equal("the answer", ring.answer()?, (9, -libc::ETIME))?;
    hold_loosely()?;
    ring.enter(0, 1)?;
    equal("the next answer", ring.answer()?, (9, -libc::ETIME))
}

/// An eventfd is told of answers.
fn io_uring_notifying() -> Checked {
    let ring = Ring::new(0)?;
    let event = done("eventfd", unsafe { libc::eventfd(0, 0) })? as i32;
    ring.register(4, (&raw const event) as u64, 1)?;
    hold_loosely()?;
    ring.run(2, 0)?;
    let mut count = 0u64;
    done("read", unsafe { libc::read(event, (&raw mut count).cast(), 8) } as i64)?;
    equal("how often it was told", count, 2)
}

/// A thread of the kernel's looks for requests.
fn io_uring_polling() -> Checked {
    let ring = Ring::new(SQPOLL)?;
    hold_loosely()?;
    equal("the counters", ring.counters(), [0; 4])
}

/// A ring of one thread alone.
fn io_uring_of_one() -> Checked {
    let ring = Ring::new(SINGLE_ISSUER)?;
    hold_loosely()?;
    ring.run(3, 0)
}

/// A ring that knows files by numbers of its own.
fn io_uring_files() -> Checked {
    let ring = Ring::new(0)?;
    let file = 0i32;
    ring.register(2, (&raw const file) as u64, 1)?;
    hold_loosely()?;
    ring.run(3, 0)
}

/// A ring that knows memory by numbers of its own.
fn io_uring_buffers() -> Checked {
    let (ring, buffer) = (Ring::new(0)?, [0u8; 4096]);
    let vector = [buffer.as_ptr() as u64, 4096];
    ring.register(0, vector.as_ptr() as u64, 1)?;
    hold_loosely()?;
    ring.run(3, 0)
}

/// A thread that knows a ring by a number of its own.
fn io_uring_registered() -> Checked {
    let ring = Ring::new(0)?;
    let update = [u64::from(u32::MAX), ring.number as u64];
    ring.register(20, update.as_ptr() as u64, 1)?;
    hold_loosely()?;
    ring.run(3, 0)
}

/// A ring in memory of the program's own, that a thread has under a number and no descriptor leads to.
fn io_uring_nowhere() -> Checked {
    const OWN_MEMORY: u32 = 1 << 14;
    const WITHOUT_DESCRIPTOR: u32 = 1 << 15;
    const REGISTERED: u64 = 1 << 4;
    // Where the parameters say where requests and queues are to be.
    const PLACES: [usize; 2] = [18, 28];
    let mut parameters = [0u32; 30];
    parameters[2] = OWN_MEMORY | WITHOUT_DESCRIPTOR;
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
    for place in PLACES {
        let start = unsafe { libc::mmap(std::ptr::null_mut(), 4096, protection, flags, -1, 0) } as u64;
        (parameters[place], parameters[place + 1]) = (start as u32, (start >> 32) as u32);
    }
    let number = call("io_uring_setup", libc::SYS_io_uring_setup, [u64::from(ROOM), parameters.as_mut_ptr() as u64])?;
    let asked = || call("io_uring_enter", libc::SYS_io_uring_enter, [number as u64, 0, 0, REGISTERED]);
    equal("what it does", asked()?, 0)?;
    hold_loosely()?;
    equal("what it does", asked()?, 0)
}

/// A ring whose answers are twice as long.
fn io_uring_wide() -> Checked {
    let ring = Ring::new(WIDE_ANSWERS)?;
    hold_loosely()?;
    equal("the counters", ring.counters(), [0; 4])
}
