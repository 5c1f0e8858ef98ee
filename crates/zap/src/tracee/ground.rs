//! Where in a tracee the stub and the batches live.
//!
//! The stub is in the zero tail of the vDSO, the batches in a scratch mapping that the stub's single-call entry makes and
//! unmakes. In a restart the seed brings both along in one mapping of its own.

use std::fs::{File, OpenOptions};
use std::io;
use std::mem::{offset_of, size_of};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use crate::ids::{HostPid, PodPid};
use crate::process::proc_files::Status;
use crate::procfs;
use crate::tracee::batch::{Arg, Batch, OnFailure, Results};
use crate::tracee::held::{Held, TraceeError};
use crate::tracee::interrupted;
use crate::tracee::stub::{self, RawCall, STOP_ON_FAILURE, Seat, Stub};

/// Bytes of a seat with a small batch (a thread's).
pub const SMALL_SEAT: usize = 4 << 10;

/// The prepared ground of one process.
#[derive(Debug)]
pub struct Ground {
    process: (HostPid, PodPid),
    memory: File,
    pub(super) stub: u64,
    pub(super) single: u64,
    /// The signal that ends a batch: one that the program neither handles nor has pending, and that is ignored by default.
    pub(super) marker: i32,
    /// Where its batches go: all of the scratch mapping, or its part of it.
    scratch: Range<u64>,
    /// The scratch mapping.
    mapping: Range<u64>,
    seat_size: usize,
    /// Where the stub lies in the vDSO; zeros belong there.
    tail: Option<Range<u64>>,
}

/// Opens the memory of a process for reading and writing, whatever its protections.
pub fn open_memory(process: HostPid) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(process.proc("mem"))
}

/// Why the memory of a process could not be written to. The kernel says EIO if it cannot have the page: that of a process that
/// is being killed (`oom_reaper` may have emptied it already), or a new one, with the host or a control group out of memory.
fn unwritten((host, pod): (HostPid, PodPid), error: io::Error) -> TraceeError {
    match error.raw_os_error() {
        Some(libc::EIO) if is_being_killed(host) => TraceeError::Died(pod),
        Some(libc::EIO) => {
            let source = io::Error::other("there is no memory for a page of it on this host, or in its control group");
            TraceeError::Kernel { step: "writing to", thread: pod, source }
        }
        _ => TraceeError::kernel("writing to", pod)(error),
    }
}

/// Whether SIGKILL is on its way to a process, or has arrived.
fn is_being_killed(process: HostPid) -> bool {
    let Ok(status) = procfs::read_record(process.proc("status")).map(Status::new) else { return true };
    let killed = 1 << (libc::SIGKILL - 1);
    let ended = status.field("State").is_none_or(|state| state.starts_with(['Z', 'X']));
    ended || (status.mask("SigPnd") | status.mask("ShdPnd")) & killed != 0
}

/// A vDSO with room for the stub and a seat behind its code, or with a stub that somebody left there.
#[derive(Debug)]
pub struct Site {
    process: (HostPid, PodPid),
    memory: File,
    stub: Stub,
    /// Where the stub goes, or is.
    tail: Range<u64>,
    /// What the seat of a stub that was there says of itself.
    left: Option<Seat>,
}

/// Where in a vDSO the stub lies: it was put at a multiple of 16.
fn place_of(code: &[u8], vdso: &[u8]) -> Option<usize> {
    (0..vdso.len()).step_by(16).rev().find(|at| vdso[*at..].starts_with(code))
}

impl Site {
    /// Looks for the zeros behind the code of the vDSO of a process, or the stub that somebody left there.
    pub fn find(process: (HostPid, PodPid), vdso: Range<u64>) -> Result<Site, TraceeError> {
        let failed = |step| TraceeError::kernel(step, process.1);
        let memory = open_memory(process.0).map_err(failed("opening the memory of"))?;
        let mut bytes = vec![0; (vdso.end - vdso.start) as usize];
        memory.read_exact_at(&mut bytes, vdso.start).map_err(failed("reading the vDSO of"))?;
        let stub = stub::assemble();
        let seat_offset = stub.code.len().next_multiple_of(16);
        let needed = seat_offset + size_of::<Seat>();
        let found = place_of(&stub.code, &bytes);
        let free = || bytes.iter().rposition(|b| *b != 0).map_or(0, |last| last + 1).next_multiple_of(16);
        let offset = found.unwrap_or_else(free);
        if offset + needed > bytes.len() {
            return Err(TraceeError::NoRoom(process.1));
        }
        let left = found.and_then(|at| crate::sys::plain::from_bytes(&bytes[at + seat_offset..]));
        let start = vdso.start + offset as u64;
        Ok(Site { process, memory, stub, tail: start..start + needed as u64, left })
    }

    /// Where an earlier zap, which died, left its stub: a thread in there is on its way home.
    pub fn left_behind(&self) -> Option<Range<u64>> {
        self.left.as_ref().map(|_| self.tail.start..self.tail.start + self.stub.code.len() as u64)
    }

    /// The scratch mapping of a zap that died.
    fn leaked(&self) -> Option<Range<u64>> {
        let scratch = self.left.as_ref().map(|seat| seat.scratch[0]..seat.scratch[1]);
        scratch.filter(|range| range.start < range.end)
    }

    fn seat(&self) -> u64 {
        self.tail.end - size_of::<Seat>() as u64
    }
}

impl Ground {
    /// Prepares a process found running: the stub goes to the tail of its vDSO, the scratch to `scratch` (unused addresses).
    ///
    /// `held` is any of its threads; it makes the mapping.
    pub fn prepare(
        held: &mut Held,
        site: Site,
        scratch: Range<u64>,
        seat_size: usize,
        marker: i32,
    ) -> Result<Ground, TraceeError> {
        Ground::begin(held, site, scratch, seat_size, marker)?.finish(held)
    }

    /// Begins to prepare it. Others may be begun with before its end is waited for.
    pub fn begin(
        held: &mut Held,
        site: Site,
        scratch: Range<u64>,
        seat_size: usize,
        marker: i32,
    ) -> Result<Preparing, TraceeError> {
        let (seat, leaked) = (site.seat(), site.leaked());
        let Site { process, memory, stub, tail, .. } = site;
        let ground = Ground {
            process,
            memory,
            stub: tail.start,
            single: tail.start + stub.single,
            marker,
            scratch: scratch.clone(),
            mapping: scratch.clone(),
            seat_size,
            tail: Some(tail.clone()),
        };
        let mut bytes = stub.code;
        bytes.resize((seat - tail.start) as usize, 0);
        bytes.extend_from_slice(as_bytes(&ground.seat_of(held, seat, 0)));
        ground.write(tail.start, &bytes)?;
        let (read_write, private) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // As a stack, which is no data: a process may have as much of that as it is allowed (RLIMIT_DATA).
        let flags = private | libc::MAP_FIXED_NOREPLACE | libc::MAP_GROWSDOWN;
        let length = scratch.end - scratch.start;
        let args = [scratch.start, length, read_write as u64, flags as u64, u64::MAX, 0];
        held.begin_single(&ground, seat, libc::SYS_mmap, args)?;
        Ok(Preparing { ground, leaked })
    }

    /// The ground that a seed brought along: the stub at the start of `code`, seats in `scratch`.
    pub fn brought(
        process: (HostPid, PodPid),
        code: u64,
        scratch: Range<u64>,
        seat_size: usize,
        marker: i32,
    ) -> Result<Ground, TraceeError> {
        let memory = open_memory(process.0).map_err(TraceeError::kernel("opening the memory of", process.1))?;
        let single = code + stub::assemble().single;
        let mapping = scratch.clone();
        Ok(Ground { process, memory, stub: code, single, marker, scratch, mapping, seat_size, tail: None })
    }

    /// Leaves all but `part` of the scratch mapping to processes that have the same address space.
    pub fn narrow(&mut self, part: Range<u64>) {
        self.scratch = part;
    }

    /// The ground of another process that has the same address space, and acts in that part of its scratch mapping. Whose
    /// ground this is sees to stub and mapping.
    pub fn beside(&self, process: (HostPid, PodPid), part: Range<u64>, marker: i32) -> Result<Ground, TraceeError> {
        let memory = open_memory(process.0).map_err(TraceeError::kernel("opening the memory of", process.1))?;
        let (mapping, seat_size, tail) = (self.mapping.clone(), self.seat_size, None);
        let (stub, single) = (self.stub, self.single);
        Ok(Ground { process, memory, stub, single, marker, scratch: part, mapping, seat_size, tail })
    }

    /// Unmaps the scratch through the stub in the vDSO's tail and puts zeros back there. `held` goes home afterwards.
    pub fn clear(&self, held: &mut Held) -> Result<(), TraceeError> {
        self.unmap(held)?;
        self.erase()
    }

    /// Unmaps the scratch through the stub in the vDSO's tail, which stays. Whoever is in the scratch must have gone home.
    pub fn unmap(&self, held: &mut Held) -> Result<(), TraceeError> {
        self.begin_to_unmap(held)?;
        self.finish_unmapping(held)
    }

    /// Begins to unmap the scratch. Others may be begun with before its end is waited for.
    pub fn begin_to_unmap(&self, held: &mut Held) -> Result<(), TraceeError> {
        if self.tail.is_none() {
            return Ok(());
        }
        let seat = self.tail_seat();
        self.write(seat, as_bytes(&self.seat_of(held, seat, 0)))?;
        let length = self.mapping.end - self.mapping.start;
        held.begin_single(self, seat, libc::SYS_munmap, [self.mapping.start, length, 0, 0, 0, 0])
    }

    /// Waits until the scratch is unmapped.
    pub fn finish_unmapping(&self, held: &mut Held) -> Result<(), TraceeError> {
        if self.tail.is_some() { held.finish_single(self).map(drop) } else { Ok(()) }
    }

    /// Puts zeros back where the stub was. Nobody is in it any more.
    pub fn erase(&self) -> Result<(), TraceeError> {
        let Some(tail) = &self.tail else { return Ok(()) };
        self.write(tail.start, &vec![0; (tail.end - tail.start) as usize])
    }

    /// Begins to unmap a ground that was brought along, `code` and all, from a `syscall` instruction of the vDSO: a stub in
    /// there would leave the process a page of its own. [`Held::reach_call`] and [`Held::finish_leaving`] follow.
    pub fn begin_to_leave(self, held: &mut Held, code: u64, vdso: &Range<u64>) -> Result<(), TraceeError> {
        let mut bytes = vec![0; (vdso.end - vdso.start) as usize];
        let read = self.memory.read_exact_at(&mut bytes, vdso.start);
        read.map_err(TraceeError::kernel("reading the vDSO of", self.process.1))?;
        let instruction =
            bytes.windows(2).position(|two| two == [0x0f, 0x05]).ok_or(TraceeError::NoRoom(self.process.1))?;
        let args = [code, self.mapping.end - code, 0, 0, 0, 0];
        held.begin_call_from(vdso.start + instruction as u64, libc::SYS_munmap, args)
    }

    /// The address range of the scratch mapping: not the pod's.
    pub fn scratch(&self) -> Range<u64> {
        self.mapping.clone()
    }

    /// The signal that ends a batch.
    pub fn marker(&self) -> i32 {
        self.marker
    }

    /// The process's memory, whatever its protections.
    pub fn memory(&self) -> &File {
        &self.memory
    }

    /// How many seats of the ordinary size the scratch has.
    pub fn seats(&self) -> usize {
        (self.scratch.end - self.scratch.start) as usize / self.seat_size
    }

    fn tail_seat(&self) -> u64 {
        self.tail.as_ref().map_or(0, |t| t.end - size_of::<Seat>() as u64)
    }

    fn write(&self, at: u64, bytes: &[u8]) -> Result<(), TraceeError> {
        self.memory.write_all_at(bytes, at).map_err(|error| unwritten(self.process, error))
    }

    fn seat_of(&self, held: &Held, at: u64, calls: usize) -> Seat {
        let home = interrupted::orphan(&held.registers);
        let first = at + size_of::<Seat>() as u64;
        Seat {
            calls: first,
            calls_end: first + (calls * size_of::<RawCall>()) as u64,
            reached: 0,
            tgid: held.name.own.0 as u64,
            tid: held.name.own.1 as u64,
            signal: self.marker as u64,
            mask: held.mask,
            r15: home.r15,
            r14: home.r14,
            r13: home.r13,
            r12: home.r12,
            rbp: home.rbp,
            rbx: home.rbx,
            r11: home.r11,
            r10: home.r10,
            r9: home.r9,
            r8: home.r8,
            rax: home.rax,
            rcx: home.rcx,
            rdx: home.rdx,
            rsi: home.rsi,
            rdi: home.rdi,
            rip: home.rip,
            cs: home.cs,
            rflags: home.eflags,
            rsp: home.rsp,
            ss: home.ss,
            scratch: [self.mapping.start, self.mapping.end],
        }
    }

    /// Which call of the batch in `seat` lies at `address`: what a newborn has in the register that walks through the calls.
    pub fn call_at(&self, seat: usize, address: u64) -> Option<usize> {
        let first = self.scratch.start + (seat * self.seat_size) as u64 + size_of::<Seat>() as u64;
        Some(address.checked_sub(first)? as usize / size_of::<RawCall>())
    }

    /// How many seats of the ordinary size `batch` takes.
    pub fn seats_of(&self, batch: &Batch) -> usize {
        batch.size().div_ceil(self.seat_size)
    }

    /// Where a seat is.
    pub(super) fn seat(&self, seat: usize) -> u64 {
        self.scratch.start + (seat * self.seat_size) as u64
    }

    /// Writes seat, calls and data of a batch; the address of the seat.
    pub(super) fn place(&self, seat: usize, held: &Held, batch: &Batch) -> Result<u64, TraceeError> {
        let at = self.seat(seat);
        self.write(at, &self.seat_bytes(at, held, batch)?)?;
        Ok(at)
    }

    /// Writes the seats of several threads that are to run the same batch, one behind the other from `first` on.
    pub(super) fn place_all(&self, first: usize, all: &[&mut Held], batch: &Batch) -> Result<(), TraceeError> {
        if batch.size() > self.seat_size {
            return Err(TraceeError::NoRoom(self.process.1));
        }
        if all.is_empty() {
            return Ok(());
        }
        let mut bytes = Vec::with_capacity(all.len() * self.seat_size);
        for (place, held) in all.iter().enumerate() {
            bytes.resize(place * self.seat_size, 0);
            bytes.extend(self.seat_bytes(self.seat(first + place), held, batch)?);
        }
        self.write(self.seat(first), &bytes)
    }

    /// Seat, calls and data of a batch.
    fn seat_bytes(&self, at: u64, held: &Held, batch: &Batch) -> Result<Vec<u8>, TraceeError> {
        let header = self.seat_of(held, at, batch.steps.len());
        let data_at = header.calls_end;
        if data_at + batch.data.len() as u64 > self.scratch.end {
            return Err(TraceeError::NoRoom(self.process.1));
        }
        let result_of = |call: usize| header.calls + (call * size_of::<RawCall>() + offset_of!(RawCall, result)) as u64;
        let mut bytes = Vec::with_capacity((data_at - at) as usize + batch.data.len());
        bytes.extend_from_slice(as_bytes(&header));
        for step in &batch.steps {
            let mut raw = RawCall { number: step.number, ..RawCall::default() };
            for (index, arg) in step.args.iter().enumerate() {
                raw.args[index] = match arg {
                    Arg::Value(value) => *value,
                    Arg::Data(offset) => data_at + *offset as u64,
                    Arg::ResultOf(call) => result_of(call.0),
                };
                raw.flags |= u64::from(matches!(arg, Arg::ResultOf(_))) << index;
            }
            raw.flags |= if step.on_failure == OnFailure::Stop { STOP_ON_FAILURE } else { 0 };
            bytes.extend_from_slice(as_bytes(&raw));
        }
        bytes.extend_from_slice(&batch.relocated(data_at));
        Ok(bytes)
    }

    /// Reads results and data of a batch that has ended.
    pub(super) fn collect(&self, seat: usize, held: &Held, batch: &Batch) -> Result<Results, TraceeError> {
        let mut bytes = vec![0; batch.size()];
        let failed = TraceeError::kernel("reading from", held.name.pod);
        self.memory.read_exact_at(&mut bytes, self.seat(seat)).map_err(failed)?;
        Ok(Self::results(self.seat(seat), &bytes, batch))
    }

    /// Reads results and data of what [`place_all`](Self::place_all) placed.
    pub(super) fn collect_all(&self, first: usize, count: usize, batch: &Batch) -> Result<Vec<Results>, TraceeError> {
        let Some(last) = count.checked_sub(1) else { return Ok(Vec::new()) };
        let mut bytes = vec![0; last * self.seat_size + batch.size()];
        let failed = TraceeError::kernel("reading from", self.process.1);
        self.memory.read_exact_at(&mut bytes, self.seat(first)).map_err(failed)?;
        let of = |place: usize| Self::results(self.seat(first + place), &bytes[place * self.seat_size..], batch);
        Ok((0..count).map(of).collect())
    }

    fn results(at: u64, bytes: &[u8], batch: &Batch) -> Results {
        let word = |offset: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[offset..offset + 8]);
            u64::from_ne_bytes(word)
        };
        let calls = size_of::<Seat>();
        let reached = word(offset_of!(Seat, reached)).saturating_sub(at + calls as u64) as usize / size_of::<RawCall>();
        let results = (0..batch.steps.len())
            .map(|call| word(calls + call * size_of::<RawCall>() + offset_of!(RawCall, result)) as i64)
            .collect();
        let data = bytes[calls + batch.steps.len() * size_of::<RawCall>()..][..batch.data.len()].to_vec();
        Results { results, data, reached }
    }
}

/// A ground whose scratch is being mapped.
#[must_use = "a thread of the process is away until it is waited for"]
pub struct Preparing {
    ground: Ground,
    leaked: Option<Range<u64>>,
}

impl Preparing {
    /// Waits for the scratch. `held` is the thread with which the preparing was begun.
    pub fn finish(self, held: &mut Held) -> Result<Ground, TraceeError> {
        let Preparing { ground, leaked } = self;
        if held.finish_single(&ground)? as u64 != ground.scratch.start {
            return Err(TraceeError::NoRoom(ground.process.1));
        }
        if let Some(leaked) = leaked.filter(|leaked| *leaked != ground.scratch) {
            let args = [leaked.start, leaked.end - leaked.start, 0, 0, 0, 0];
            held.begin_single(&ground, ground.tail_seat(), libc::SYS_munmap, args)?;
            held.finish_single(&ground)?;
        }
        Ok(ground)
    }
}

fn as_bytes<T: Plain>(value: &T) -> &[u8] {
    crate::sys::plain::bytes_of(value)
}

use crate::sys::plain::Plain;
