//! A thread that is held still, and acting through it.

use std::io;
use std::marker::PhantomData;
use std::time::{Duration, Instant};

use crate::ids::{HostPid, PodPid};
use crate::process::proc_files::parse_stat;
use crate::procfs;
use crate::sys::ptrace::{self, Registers, Stop};
use crate::tracee::batch::{Batch, Results};
use crate::tracee::ground::Ground;
use crate::tracee::interrupted;

/// What can go wrong with a tracee.
#[derive(Debug, thiserror::Error)]
pub enum TraceeError {
    /// It ended; the wait status is in the error.
    #[error("thread {0} ended while it was held")]
    Died(PodPid),
    /// A ptrace request failed.
    #[error("{step} thread {thread}: {source}")]
    Kernel {
        /// What was being done.
        step: &'static str,
        /// To which thread.
        thread: PodPid,
        /// What the kernel said.
        source: io::Error,
    },
    /// A call of a batch failed in the tracee.
    #[error("{what} in process {thread}: {source}")]
    Call {
        /// What the call was for.
        what: String,
        /// The thread that made it.
        thread: PodPid,
        /// What the kernel said.
        source: io::Error,
    },
    /// There is no room for the stub or the scratch area in the address space.
    #[error(
        "thread {0} has no room for a scratch area: its address space is full, or as large as it may be (RLIMIT_AS), or has \
         as many mappings as it may"
    )]
    NoRoom(PodPid),
}

impl TraceeError {
    pub(crate) fn kernel(step: &'static str, thread: PodPid) -> impl FnOnce(io::Error) -> TraceeError {
        move |source| match source.raw_os_error() {
            Some(libc::ESRCH) => TraceeError::Died(thread),
            // Memory of which nothing can be read or written is that of a process that was killed.
            None if matches!(source.kind(), io::ErrorKind::WriteZero | io::ErrorKind::UnexpectedEof) => {
                TraceeError::Died(thread)
            }
            _ => TraceeError::Kernel { step, thread, source },
        }
    }
}

/// How a thread is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ThreadName {
    /// TID on the host.
    pub host: HostPid,
    /// TID in the pod.
    pub pod: PodPid,
    /// TGID and TID in the thread's own (innermost) PID namespace, for calls that it makes on itself.
    pub own: (i32, i32),
}

/// How long a thread may take to stop: longer only in a wait that nothing interrupts.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long a thread runs that is to leave some code, and how often it is tried at most: functions of the vDSO take less
/// than a microsecond.
const NUDGE: Duration = Duration::from_micros(20);
const MOST_NUDGES: usize = 100;

/// A thread that was seized and asked to stop, but has not said yet that it has.
#[must_use = "a seized thread must be waited for"]
pub struct Seized {
    name: ThreadName,
    _here: PhantomData<*const ()>,
}

/// A thread that is stopped under our control. Cannot be copied; letting it go consumes it.
#[derive(Debug)]
#[must_use = "a held thread must be let go"]
pub struct Held {
    /// Who it is.
    pub name: ThreadName,
    /// The registers that it goes home with.
    pub registers: Registers,
    /// The signal mask that it goes home with.
    pub mask: u64,
    /// The stop signal of the group stop that it was found in.
    pub group_stop: Option<i32>,
    /// Whether it is the only thread of its process.
    pub alone: bool,
    /// Whether its registers or mask are ours at the moment.
    away: bool,
    /// The signal that ends the batch which it runs.
    busy: Option<i32>,
    /// It belongs to the thread that seized it.
    _here: PhantomData<*const ()>,
}

/// Seizes a thread and asks it to stop.
pub fn seize(name: ThreadName, options: i32) -> Result<Seized, TraceeError> {
    ptrace::seize(name.host, options).map_err(|source| match source.raw_os_error() {
        // What the kernel says of one that has ended.
        Some(libc::EPERM) if has_ended(name.host) => TraceeError::Died(name.pod),
        _ => TraceeError::kernel("seizing", name.pod)(source),
    })?;
    ptrace::interrupt(name.host).map_err(TraceeError::kernel("interrupting", name.pod))?;
    Ok(Seized { name, _here: PhantomData })
}

fn has_ended(thread: HostPid) -> bool {
    let stat = procfs::read_record(thread.proc("stat")).ok().and_then(|stat| parse_stat(&stat));
    stat.is_none_or(|stat| matches!(stat.state, b'Z' | b'X'))
}

impl Seized {
    /// A thread that the kernel attached for us (`CLONE_PTRACE`) and that stops before its first instruction.
    pub fn newborn(name: ThreadName) -> Seized {
        Seized { name, _here: PhantomData }
    }

    /// Waits for the stop.
    pub fn wait(self) -> Result<Held, TraceeError> {
        let name = self.name;
        let deadline = Instant::now() + PATIENCE;
        let stop = loop {
            match ptrace::wait_until(name.host, deadline).map_err(TraceeError::kernel("waiting for", name.pod))? {
                Stop::Event(signal) => break signal,
                Stop::Ended(_) => return Err(TraceeError::Died(name.pod)),
                // A signal that was on its way; it goes on its way. The stop that was asked for follows.
                Stop::Signal(signal) => {
                    ptrace::cont(name.host, signal).map_err(TraceeError::kernel("continuing", name.pod))?
                }
                Stop::Other(_) => ptrace::cont(name.host, 0).map_err(TraceeError::kernel("continuing", name.pod))?,
            }
        };
        self.stopped(stop)
    }

    /// For a newborn whose stop has been waited for already.
    pub fn already_stopped(self) -> Result<Held, TraceeError> {
        self.stopped(libc::SIGTRAP)
    }

    fn stopped(self, stop: i32) -> Result<Held, TraceeError> {
        let name = self.name;
        let group_stop = (stop != libc::SIGTRAP).then_some(stop);
        let mut held = Held {
            name,
            registers: ptrace::registers(name.host)
                .map_err(TraceeError::kernel("reading the registers of", name.pod))?,
            mask: ptrace::signal_mask(name.host).map_err(TraceeError::kernel("reading the mask of", name.pod))?,
            group_stop,
            alone: false,
            away: false,
            busy: None,
            _here: PhantomData,
        };
        if interrupted::needs_rewind(&held.registers) && !held.has_deliverable_signal()? {
            interrupted::rewind(&mut held.registers);
            // At once: whoever sees it home may be gone then.
            ptrace::set_registers(name.host, &held.registers)
                .map_err(TraceeError::kernel("setting the registers of", name.pod))?;
        }
        Ok(held)
    }
}

impl Held {
    fn has_deliverable_signal(&self) -> Result<bool, TraceeError> {
        for shared in [false, true] {
            let queue = match ptrace::pending_signals(self.name.host, shared) {
                // So many are refused, but the thread is to go on as if nothing had been.
                Err(e) if e.raw_os_error() == Some(libc::E2BIG) => return self.has_open_signal(),
                queue => queue.map_err(TraceeError::kernel("reading the queued signals of", self.name.pod))?,
            };
            let open = queue.iter().any(|info| {
                let signal = i32::from_ne_bytes([info[0], info[1], info[2], info[3]]);
                self.mask & (1 << (signal - 1)) == 0
            });
            if open {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The same by the sets that its status shows: these are the pod's and the kernel's, and there is time.
    fn has_open_signal(&self) -> Result<bool, TraceeError> {
        let status = procfs::read_record_text(self.name.host.proc("status"));
        let status = status.map_err(TraceeError::kernel("reading the status of", self.name.pod))?;
        let mut sets = status.lines().filter_map(|l| l.strip_prefix("SigPnd:").or_else(|| l.strip_prefix("ShdPnd:")));
        Ok(sets.any(|set| u64::from_str_radix(set.trim(), 16).is_ok_and(|set| set & !self.mask != 0)))
    }

    /// Changes what the thread goes home with; it is written when it goes.
    pub fn set_home(&mut self, registers: Registers, mask: u64) {
        (self.registers, self.mask, self.away) = (registers, mask, true);
    }

    /// Starts a batch in this thread. Others may be started before its end is waited for.
    pub fn begin(&mut self, ground: &Ground, seat: usize, batch: &Batch) -> Result<(), TraceeError> {
        let seat = ground.place(seat, self, batch)?;
        self.enter(ground, ground.stub, seat, None)
    }

    /// Waits for the end of a batch and reads what it brought back.
    pub fn finish(&mut self, ground: &Ground, seat: usize, batch: &Batch) -> Result<Results, TraceeError> {
        self.await_marker(ground.marker)?;
        self.results(ground, seat, batch)
    }

    /// What a batch that has come to its end brought back.
    pub fn results(&self, ground: &Ground, seat: usize, batch: &Batch) -> Result<Results, TraceeError> {
        self.checked(ground.collect(seat, self, batch)?, batch)
    }

    fn checked(&self, results: Results, batch: &Batch) -> Result<Results, TraceeError> {
        match results.failure(batch) {
            None => Ok(results),
            Some((call, errno)) => {
                let source = io::Error::from_raw_os_error(errno);
                Err(TraceeError::Call { what: batch.steps[call].what.clone(), thread: self.name.pod, source })
            }
        }
    }

    /// Starts the same batch in several threads of a process, in the seats from `first` on.
    pub fn begin_all(all: &mut [&mut Held], ground: &Ground, first: usize, batch: &Batch) -> Result<(), TraceeError> {
        ground.place_all(first, all, batch)?;
        for (place, held) in all.iter_mut().enumerate() {
            held.enter(ground, ground.stub, ground.seat(first + place), None)?;
        }
        Ok(())
    }

    /// Waits for the ends of what [`begin_all`](Self::begin_all) started; what each brought back.
    pub fn finish_all(
        all: &mut [&mut Held],
        ground: &Ground,
        first: usize,
        batch: &Batch,
    ) -> Result<Vec<Results>, TraceeError> {
        for held in all.iter_mut() {
            held.await_marker(ground.marker)?;
        }
        let results = ground.collect_all(first, all.len(), batch)?;
        all.iter().zip(results).map(|(held, results)| held.checked(results, batch)).collect()
    }

    /// Runs a batch to its end.
    pub fn run(&mut self, ground: &Ground, seat: usize, batch: &Batch) -> Result<Results, TraceeError> {
        self.begin(ground, seat, batch)?;
        self.finish(ground, seat, batch)
    }

    /// Begins one call with its arguments in registers, through the stub's second entry.
    pub(super) fn begin_single(
        &mut self,
        ground: &Ground,
        seat: u64,
        number: libc::c_long,
        args: [u64; 6],
    ) -> Result<(), TraceeError> {
        self.enter(ground, ground.single, seat, Some((number, args)))
    }

    /// Waits for its end; what the kernel answered.
    pub(super) fn finish_single(&mut self, ground: &Ground) -> Result<i64, TraceeError> {
        self.await_marker(ground.marker)?;
        let registers = ptrace::registers(self.name.host).map_err(self.failed("reading the registers of"))?;
        Ok(registers.rbp as i64)
    }

    /// Begins one call from a `syscall` instruction at `address`, which may be anybody's: nothing is written to the tracee.
    /// Its end is not that of a batch: a tracee whose tracer dies meanwhile must die with it.
    pub(super) fn begin_call_from(
        &mut self,
        address: u64,
        number: libc::c_long,
        args: [u64; 6],
    ) -> Result<(), TraceeError> {
        let mut registers = self.registers;
        (registers.rip, registers.rax, registers.orig_rax) = (address, number as u64, u64::MAX);
        [registers.rdi, registers.rsi, registers.rdx, registers.r10, registers.r8, registers.r9] = args;
        self.away = true;
        ptrace::set_registers(self.name.host, &registers).map_err(self.failed("setting the registers of"))?;
        ptrace::set_signal_mask(self.name.host, u64::MAX).map_err(self.failed("setting the mask of"))?;
        ptrace::cont_to_call(self.name.host, 0).map_err(self.failed("continuing"))
    }

    /// Has a call that was begun be made: it was waited for until it begins.
    pub fn reach_call(&mut self) -> Result<(), TraceeError> {
        self.await_call()?;
        ptrace::cont_to_call(self.name.host, 0).map_err(self.failed("continuing"))
    }

    /// Waits until a call has been made; what the kernel answered.
    pub(super) fn finish_call(&mut self) -> Result<i64, TraceeError> {
        self.await_call()?;
        let registers = ptrace::registers(self.name.host).map_err(self.failed("reading the registers of"))?;
        Ok(registers.rax as i64)
    }

    /// Waits until the ground that [`Ground::begin_to_leave`] began to unmap is gone.
    pub fn finish_leaving(&mut self) -> Result<(), TraceeError> {
        match self.finish_call()? {
            0 => Ok(()),
            errno => Err(self.failed("unmapping the scratch of")(io::Error::from_raw_os_error(-errno as i32))),
        }
    }

    fn await_call(&mut self) -> Result<(), TraceeError> {
        loop {
            let signal = match self.next_stop()? {
                Stop::Signal(ptrace::CALL_STOP) => return Ok(()),
                Stop::Ended(_) => return Err(TraceeError::Died(self.name.pod)),
                // SIGSTOP, which was on its way.
                Stop::Signal(signal) => signal,
                Stop::Event(stop) => self.noting(stop),
                Stop::Other(_) => 0,
            };
            ptrace::cont_to_call(self.name.host, signal).map_err(self.failed("continuing"))?;
        }
    }

    fn enter(
        &mut self,
        ground: &Ground,
        entry: u64,
        seat: u64,
        call: Option<(libc::c_long, [u64; 6])>,
    ) -> Result<(), TraceeError> {
        let mut registers = self.registers;
        registers.rip = entry;
        registers.rbx = seat;
        registers.orig_rax = u64::MAX;
        registers.eflags &= !(0x100 | 0x400); // no single-stepping, no backwards string operations
        if let Some((number, args)) = call {
            registers.rax = number as u64;
            [registers.rdi, registers.rsi, registers.rdx, registers.r10, registers.r8, registers.r9] = args;
        }
        self.away = true;
        // Registers first: a handler must not run at the stub's entry with the thread's own mask.
        ptrace::set_registers(self.name.host, &registers).map_err(self.failed("setting the registers of"))?;
        let all_but_marker = !(1u64 << (ground.marker - 1));
        ptrace::set_signal_mask(self.name.host, all_but_marker).map_err(self.failed("setting the mask of"))?;
        ptrace::cont(self.name.host, 0).map_err(self.failed("continuing"))?;
        self.busy = Some(ground.marker);
        Ok(())
    }

    fn next_stop(&self) -> Result<Stop, TraceeError> {
        let (own_pid, own_tid) = self.name.own;
        let wait = if own_pid == own_tid && !self.alone { ptrace::wait_first } else { ptrace::wait };
        wait(self.name.host).map_err(self.failed("waiting for"))
    }

    fn await_marker(&mut self, marker: i32) -> Result<(), TraceeError> {
        self.busy = None;
        loop {
            let stop = self.next_stop()?;
            if self.is_at(marker, stop)? {
                return Ok(());
            }
        }
    }

    /// Whether a stop that was waited for elsewhere is the end of a batch; if not, the thread goes on.
    pub fn is_marked(&mut self, ground: &Ground, stop: Stop) -> Result<bool, TraceeError> {
        let is_marked = self.is_at(ground.marker, stop)?;
        if is_marked {
            self.busy = None;
        }
        Ok(is_marked)
    }

    /// Notes a group stop that the thread has come into meanwhile; nothing goes on with it.
    fn noting(&mut self, stop: i32) -> i32 {
        if stop != libc::SIGTRAP {
            self.group_stop = Some(stop);
        }
        0
    }

    fn is_at(&mut self, marker: i32, stop: Stop) -> Result<bool, TraceeError> {
        match stop {
            Stop::Signal(signal) if signal == marker => return Ok(true),
            Stop::Ended(_) => return Err(TraceeError::Died(self.name.pod)),
            // SIGSTOP and SIGKILL alone get past the mask; a stop asked for meanwhile is the pod's affair.
            Stop::Signal(signal) => ptrace::cont(self.name.host, signal),
            Stop::Event(stop) => ptrace::cont(self.name.host, self.noting(stop)),
            Stop::Other(_) => ptrace::cont(self.name.host, 0),
        }
        .map_err(self.failed("continuing"))?;
        Ok(false)
    }

    /// Lets a thread that is in the stub of a zap that died finish its way home, and holds it there.
    pub fn finish_way_home(self, stub: &std::ops::Range<u64>) -> Result<Held, TraceeError> {
        let mut held = self;
        while stub.contains(&held.registers.rip) {
            let name = held.name;
            held.go_home()?;
            ptrace::cont(name.host, 0).map_err(TraceeError::kernel("continuing", name.pod))?;
            ptrace::interrupt(name.host).map_err(TraceeError::kernel("interrupting", name.pod))?;
            held = Seized { name, _here: PhantomData }.wait()?;
        }
        Ok(held)
    }

    /// Lets a thread that is in the middle of some code run on until it is found elsewhere; it makes no system call meanwhile.
    /// One that is hardly ever elsewhere may be there still, as may one that a stop signal has stopped.
    pub fn leave(self, code: &std::ops::Range<u64>) -> Result<Held, TraceeError> {
        let mut held = self;
        for _ in 0..MOST_NUDGES {
            let inside = code.contains(&held.registers.rip) && !interrupted::in_system_call(&held.registers);
            if !inside || held.group_stop.is_some() {
                break;
            }
            held = held.nudged()?;
        }
        Ok(held)
    }

    /// Lets the thread run for a moment.
    fn nudged(self) -> Result<Held, TraceeError> {
        let (name, alone) = (self.name, self.alone);
        ptrace::cont_to_call(name.host, 0).map_err(self.failed("continuing"))?;
        // It runs beside us, or in our place where there is one processor.
        let begun = Instant::now();
        while begun.elapsed() < NUDGE {
            std::thread::yield_now();
        }
        ptrace::interrupt(name.host).map_err(self.failed("interrupting"))?;
        let deadline = Instant::now() + PATIENCE;
        let stop = loop {
            match ptrace::wait_until(name.host, deadline).map_err(self.failed("waiting for"))? {
                Stop::Event(stop) => break stop,
                Stop::Ended(_) => return Err(TraceeError::Died(name.pod)),
                // It is about to make a call, and does so when it is let go. The stop that was asked for comes first: once
                // more, since a thread that comes to a call forgets a stop that it had not come to yet.
                Stop::Signal(ptrace::CALL_STOP) => {
                    let mut registers =
                        ptrace::registers(name.host).map_err(self.failed("reading the registers of"))?;
                    interrupted::rewind(&mut registers);
                    ptrace::set_registers(name.host, &registers).map_err(self.failed("setting the registers of"))?;
                    ptrace::interrupt(name.host).map_err(self.failed("interrupting"))?;
                    ptrace::cont(name.host, 0)
                }
                Stop::Signal(signal) => ptrace::cont_to_call(name.host, signal),
                Stop::Other(_) => ptrace::cont_to_call(name.host, 0),
            }
            .map_err(self.failed("continuing"))?;
        };
        let held = Seized { name, _here: PhantomData }.stopped(stop)?;
        Ok(Held { alone, ..held })
    }

    /// Waits for the end of a thread that leaves its process to the others. Of the first thread nothing is told then.
    pub fn ends_alone(self) -> Result<(), TraceeError> {
        let deadline = Instant::now() + PATIENCE;
        while !has_ended(self.name.host) {
            if Instant::now() > deadline {
                return Err(self.failed("waiting for the end of")(io::ErrorKind::TimedOut.into()));
            }
            std::thread::yield_now();
        }
        Ok(())
    }

    /// Gives the thread its registers and mask back; it stays held. A batch that nobody waited for ends first.
    pub fn go_home(&mut self) -> Result<(), TraceeError> {
        if let Some(marker) = self.busy {
            self.await_marker(marker)?;
        }
        if self.away {
            ptrace::set_signal_mask(self.name.host, self.mask).map_err(self.failed("setting the mask of"))?;
            ptrace::set_registers(self.name.host, &self.registers).map_err(self.failed("setting the registers of"))?;
            self.away = false;
        }
        Ok(())
    }

    /// From now on the thread outlives its tracer, and walks home by itself.
    pub fn outlive_tracer(&mut self) -> Result<(), TraceeError> {
        ptrace::set_options(self.name.host, 0).map_err(self.failed("setting the options of"))
    }

    /// Lets the thread run on from where it was held.
    pub fn let_go(mut self) -> Result<(), TraceeError> {
        self.go_home()?;
        match ptrace::detach(self.name.host, 0) {
            // Killed meanwhile: nothing is left to let go.
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            other => other.map_err(self.failed("detaching from")),
        }
    }

    pub(super) fn failed(&self, step: &'static str) -> impl FnOnce(io::Error) -> TraceeError + use<> {
        TraceeError::kernel(step, self.name.pod)
    }
}
