//! `ptrace(2)`, in its `PTRACE_SEIZE` form. A tracee belongs to the *thread* that seized it.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::mem::{MaybeUninit, size_of};
use std::time::{Duration, Instant};

use super::check;
use crate::ids::HostPid;

/// `PTRACE_O_SUSPEND_SECCOMP`: filters of the tracee do not run while it is traced. Inherited by auto-attached children.
pub const SUSPEND_SECCOMP: i32 = 1 << 21;
/// `PTRACE_O_EXITKILL`: tracees die with their tracer. Inherited by auto-attached children.
pub const EXIT_KILL: i32 = 1 << 20;
/// `PTRACE_O_TRACESYSGOOD`: stops at system calls are told from signals. Inherited by auto-attached children.
pub const TELL_CALLS: i32 = 1;
/// The signal of a stop at a system call, with [`TELL_CALLS`].
pub const CALL_STOP: i32 = libc::SIGTRAP | 0x80;
const PTRACE_SETOPTIONS: u32 = 0x4200;
const PTRACE_SEIZE: u32 = 0x4206;
const PTRACE_INTERRUPT: u32 = 0x4207;
const PTRACE_LISTEN: u32 = 0x4208;
const PTRACE_PEEKSIGINFO: u32 = 0x4209;
const PTRACE_GETSIGMASK: u32 = 0x420a;
const PTRACE_SETSIGMASK: u32 = 0x420b;
const PTRACE_SECCOMP_GET_FILTER: u32 = 0x420c;
const PTRACE_SECCOMP_GET_METADATA: u32 = 0x420d;
const PTRACE_GET_RSEQ_CONFIGURATION: u32 = 0x420f;
const NT_PRSTATUS: usize = 1;
const NT_PRFPREG: usize = 2;
const NT_X86_XSTATE: usize = 0x202;
/// Bytes of what FXSAVE saves.
const FXSAVE: usize = 512;

/// General registers of a thread (`struct user_regs_struct`).
pub type Registers = libc::user_regs_struct;

/// The raw bytes of a `siginfo_t` (128).
pub type SigInfo = [u8; 128];

/// Registers as the 27 words of the kernel's struct, in its order.
pub fn registers_to_words(registers: &Registers) -> [u64; 27] {
    // SAFETY: user_regs_struct is 27 u64 without padding (asserted below); any bit pattern is a valid u64.
    unsafe { std::mem::transmute_copy(registers) }
}

/// The reverse of [`registers_to_words`].
pub fn registers_from_words(words: &[u64; 27]) -> Registers {
    // SAFETY: as above; every field is a u64, so any bit pattern is valid.
    unsafe { std::mem::transmute_copy(words) }
}

const _: () = assert!(size_of::<Registers>() == 27 * 8);

fn request(request: u32, tid: HostPid, address: usize, data: usize) -> io::Result<u64> {
    // SAFETY: every caller in this file passes addresses of live, correctly sized buffers, or plain numbers.
    check(unsafe { libc::syscall(libc::SYS_ptrace, request as libc::c_long, tid.0 as libc::c_long, address, data) })
}

/// Attaches without stopping.
pub fn seize(tid: HostPid, options: i32) -> io::Result<()> {
    // Of an earlier tracee with that number.
    let _ = told(tid);
    request(PTRACE_SEIZE, tid, 0, options as usize).map(drop)
}

/// Changes the options of a stopped tracee.
pub fn set_options(tid: HostPid, options: i32) -> io::Result<()> {
    request(PTRACE_SETOPTIONS, tid, 0, options as usize).map(drop)
}

/// Asks a seized tracee to stop; it reports `PTRACE_EVENT_STOP`.
pub fn interrupt(tid: HostPid) -> io::Result<()> {
    request(PTRACE_INTERRUPT, tid, 0, 0).map(drop)
}

/// Lets a stopped tracee run on, delivering `signal` (0: none).
pub fn cont(tid: HostPid, signal: i32) -> io::Result<()> {
    request(libc::PTRACE_CONT, tid, 0, signal as usize).map(drop)
}

/// Lets a stopped tracee run on to the next entry to or exit from a system call, and take `signal` (0: none).
pub fn cont_to_call(tid: HostPid, signal: i32) -> io::Result<()> {
    request(libc::PTRACE_SYSCALL, tid, 0, signal as usize).map(drop)
}

/// Leaves a tracee in its group stop, but listening for events.
pub fn listen(tid: HostPid) -> io::Result<()> {
    request(PTRACE_LISTEN, tid, 0, 0).map(drop)
}

/// Detaches from a stopped tracee, which runs on (or stays in a group stop that is in effect).
pub fn detach(tid: HostPid, signal: i32) -> io::Result<()> {
    request(libc::PTRACE_DETACH, tid, 0, signal as usize).map(drop)
}

fn get_regset(tid: HostPid, kind: usize, buffer: &mut [MaybeUninit<u8>]) -> io::Result<usize> {
    let mut vector = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    request(libc::PTRACE_GETREGSET, tid, kind, &raw mut vector as usize)?;
    Ok(vector.iov_len)
}

/// Reads the general registers.
pub fn registers(tid: HostPid) -> io::Result<Registers> {
    let mut buffer = [MaybeUninit::<u8>::uninit(); size_of::<Registers>()];
    let length = get_regset(tid, NT_PRSTATUS, &mut buffer)?;
    if length != buffer.len() {
        return Err(io::Error::other("the tracee is not a 64-bit process"));
    }
    // SAFETY: the kernel filled all of it; any bit pattern is valid.
    Ok(unsafe { std::mem::transmute::<[MaybeUninit<u8>; size_of::<Registers>()], Registers>(buffer) })
}

/// Sets the general registers.
pub fn set_registers(tid: HostPid, registers: &Registers) -> io::Result<()> {
    let vector = libc::iovec { iov_base: (&raw const *registers).cast_mut().cast(), iov_len: size_of::<Registers>() };
    request(libc::PTRACE_SETREGSET, tid, NT_PRSTATUS, &raw const vector as usize).map(drop)
}

/// Whether the processor has no XSAVE: its extended state is what FXSAVE saves.
fn is_without_xsave(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENODEV | libc::EINVAL))
}

/// Reads the extended state (x87, SSE, AVX …) in the uncompacted XSAVE format of this host into `buffer`; its length.
pub fn extended_state(tid: HostPid, buffer: &mut Vec<u8>) -> io::Result<()> {
    buffer.clear();
    buffer.reserve(16 << 10);
    let length = match get_regset(tid, NT_X86_XSTATE, buffer.spare_capacity_mut()) {
        Err(error) if is_without_xsave(&error) => get_regset(tid, NT_PRFPREG, buffer.spare_capacity_mut())?,
        other => other?,
    };
    // SAFETY: the kernel filled `length` bytes of the spare capacity.
    unsafe { buffer.set_len(length) };
    Ok(())
}

/// Bytes of the extended state, of any thread of this host: asked of `tid`.
pub fn extended_size(tid: HostPid) -> io::Result<usize> {
    static SIZE: std::sync::OnceLock<usize> = std::sync::OnceLock::new();
    match SIZE.get() {
        Some(size) => Ok(*size),
        None => {
            let mut buffer = Vec::new();
            extended_state(tid, &mut buffer)?;
            Ok(*SIZE.get_or_init(|| buffer.len()))
        }
    }
}

/// Sets the extended state; `bytes` must be exactly as long as this host's XSAVE area.
pub fn set_extended_state(tid: HostPid, bytes: &[u8]) -> io::Result<()> {
    let vector = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    match request(libc::PTRACE_SETREGSET, tid, NT_X86_XSTATE, &raw const vector as usize) {
        Err(error) if is_without_xsave(&error) && bytes.len() == FXSAVE => {
            request(libc::PTRACE_SETREGSET, tid, NT_PRFPREG, &raw const vector as usize).map(drop)
        }
        other => other.map(drop),
    }
}

/// The blocked signals (the saved mask while in `sigsuspend` and its like).
pub fn signal_mask(tid: HostPid) -> io::Result<u64> {
    let mut mask = 0u64;
    request(PTRACE_GETSIGMASK, tid, size_of::<u64>(), &raw mut mask as usize)?;
    Ok(mask)
}

/// Sets the blocked signals.
pub fn set_signal_mask(tid: HostPid, mask: u64) -> io::Result<()> {
    request(PTRACE_SETSIGMASK, tid, size_of::<u64>(), &raw const mask as usize).map(drop)
}

#[repr(C)]
struct PeekArgs {
    offset: u64,
    flags: u32,
    count: i32,
}

/// Queued signals that are looked at, at most: for each the kernel goes through the queue from its beginning, which takes
/// half a second for so many, and twenty for as many as root may have.
pub const MOST_PENDING: usize = 1 << 14;

/// The queued signals of the thread, or of its process (`shared`), in order; nothing is removed. `E2BIG` if there are more
/// than [`MOST_PENDING`].
pub fn pending_signals(tid: HostPid, shared: bool) -> io::Result<Vec<SigInfo>> {
    let peek = |offset: usize, buffer: &mut [SigInfo]| {
        let args = PeekArgs { offset: offset as u64, flags: shared as u32, count: buffer.len() as i32 };
        let got = request(PTRACE_PEEKSIGINFO, tid, &raw const args as usize, buffer.as_mut_ptr() as usize)?;
        io::Result::Ok((got as usize).min(buffer.len()))
    };
    let mut all = Vec::new();
    loop {
        let mut buffer = [[0u8; 128]; 32];
        let got = peek(all.len(), &mut buffer)?;
        let is_first = all.is_empty();
        all.extend_from_slice(&buffer[..got]);
        if got < buffer.len() {
            return Ok(all);
        }
        if is_first && peek(MOST_PENDING, &mut buffer[..1])? > 0 {
            return Err(io::Error::from_raw_os_error(libc::E2BIG));
        }
    }
}

/// One seccomp filter of the tracee's chain as classic BPF instructions (8 bytes each) and its flags; `None` past the end.
pub fn seccomp_filter(tid: HostPid, index: usize) -> io::Result<Option<(Vec<u8>, u64)>> {
    let count = match request(PTRACE_SECCOMP_GET_FILTER, tid, index, 0) {
        Ok(count) => count as usize,
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
        Err(e) => return Err(e),
    };
    let mut bytes = vec![0u8; count * 8];
    request(PTRACE_SECCOMP_GET_FILTER, tid, index, bytes.as_mut_ptr() as usize)?;
    let mut metadata = [index as u64, 0u64];
    request(PTRACE_SECCOMP_GET_METADATA, tid, size_of_val(&metadata), metadata.as_mut_ptr() as usize)?;
    Ok(Some((bytes, metadata[1])))
}

/// A thread's registered restartable-sequences area.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[repr(C)]
pub struct RseqConfiguration {
    /// Address of `struct rseq`; 0 when none is registered.
    pub address: u64,
    /// Its registered size in bytes.
    pub size: u32,
    /// The abort signature.
    pub signature: u32,
    /// Flags of the registration.
    pub flags: u32,
    pad: u32,
}

/// Reads the rseq registration.
pub fn rseq_configuration(tid: HostPid) -> io::Result<RseqConfiguration> {
    let mut configuration = RseqConfiguration::default();
    let size = size_of::<RseqConfiguration>();
    request(PTRACE_GET_RSEQ_CONFIGURATION, tid, size, &raw mut configuration as usize)?;
    Ok(configuration)
}

/// How a thread sees to some of its own system calls (`PR_SET_SYSCALL_USER_DISPATCH`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[repr(C)]
pub struct DispatchConfiguration {
    /// 0 off, 1 on.
    pub mode: u64,
    /// Where the byte is that says whether calls are made (0) or come back as signals (1); 0 where there is none.
    pub selector: u64,
    /// The code whose calls are always made: its beginning, and how long it is. If only the calls of some code come back,
    /// it is all other code, which goes round from the end of the address space to its beginning.
    pub offset: u64,
    /// See there.
    pub length: u64,
}

/// Reads it; `None` if the thread sees to nothing. Before Linux 6.4 nobody can tell.
pub fn dispatch(tid: HostPid) -> io::Result<Option<DispatchConfiguration>> {
    const PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG: u32 = 0x4211;
    let mut configuration = DispatchConfiguration::default();
    let size = size_of_val(&configuration);
    request(PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG, tid, size, &raw mut configuration as usize)?;
    Ok((configuration.mode != 0).then_some(configuration))
}

/// Sets it.
pub fn set_dispatch(tid: HostPid, configuration: &DispatchConfiguration) -> io::Result<()> {
    const PTRACE_SET_SYSCALL_USER_DISPATCH_CONFIG: u32 = 0x4210;
    /// Only the calls of this code come back (since Linux 6.17).
    const INCLUSIVE: u64 = 2;
    let mut wanted = *configuration;
    if let (end, true) = wanted.offset.overflowing_add(wanted.length) {
        (wanted.mode, wanted.offset, wanted.length) = (INCLUSIVE, end, wanted.length.wrapping_neg());
    }
    let size = size_of_val(&wanted);
    request(PTRACE_SET_SYSCALL_USER_DISPATCH_CONFIG, tid, size, &raw const wanted as usize).map(drop)
}

/// How a tracee stopped or ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// A `PTRACE_EVENT_STOP`, with the stop signal (SIGTRAP unless it is in a group stop).
    Event(i32),
    /// About to get this signal.
    Signal(i32),
    /// Another ptrace event: its number.
    Other(i32),
    /// It ended: the wait status.
    Ended(i32),
}

fn decode(status: i32) -> Stop {
    if !libc::WIFSTOPPED(status) {
        return Stop::Ended(status);
    }
    match (status >> 16, libc::WSTOPSIG(status)) {
        (128, signal) => Stop::Event(signal),
        (0, signal) => Stop::Signal(signal),
        (event, _) => Stop::Other(event),
    }
}

thread_local! {
    /// What tracees of this thread have told while somebody else was waited for.
    static ASIDE: RefCell<HashMap<i32, Stop>> = RefCell::default();
}

/// What this tracee has told already.
fn told(tid: HostPid) -> Option<Stop> {
    ASIDE.with_borrow_mut(|aside| aside.remove(&tid.0))
}

/// One `waitpid(2)` for a tracee of the calling thread, or for any (-1); `None` if `flags` say not to wait and nobody has
/// anything to tell.
fn wait_once(tid: i32, flags: i32) -> io::Result<Option<(HostPid, Stop)>> {
    let mut status = 0;
    loop {
        // SAFETY: status outlives the call.
        match check(unsafe { libc::waitpid(tid, &mut status, libc::__WALL | flags) } as libc::c_long) {
            Ok(0) => return Ok(None),
            Ok(tid) => return Ok(Some((HostPid(tid as i32), decode(status)))),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        }
    }
}

/// Waits until this tracee of the calling thread stops or ends; for the first thread of a process that has others, see
/// [`wait_first`].
pub fn wait(tid: HostPid) -> io::Result<Stop> {
    loop {
        if let Some(stop) = told(tid) {
            return Ok(stop);
        }
        if let Some((_, stop)) = wait_once(tid.0, 0)? {
            return Ok(stop);
        }
    }
}

/// As [`wait`], for the first thread of a process: when the process is killed, the end of the first thread is told only
/// after its other threads, which are tracees too, have been waited for. What they tell is put aside.
pub fn wait_first(tid: HostPid) -> io::Result<Stop> {
    loop {
        if let Some(stop) = told(tid) {
            return Ok(stop);
        }
        if let Some((_, stop)) = wait_once(tid.0, libc::WNOHANG)? {
            return Ok(stop);
        }
        put_aside(0)?;
    }
}

/// Takes what any tracee of this thread tells, for whoever waits for it; whether there was something.
fn put_aside(flags: i32) -> io::Result<bool> {
    let any = wait_once(-1, libc::__WNOTHREAD | flags)?;
    Ok(any.map(|(tid, stop)| ASIDE.with_borrow_mut(|aside| aside.insert(tid.0, stop))).is_some())
}

/// As [`wait_first`], but not longer than until `deadline`: most tracees that were asked to stop do so within microseconds.
pub fn wait_until(tid: HostPid, deadline: Instant) -> io::Result<Stop> {
    const SPIN: usize = 200;
    for round in 0.. {
        if let Some(stop) = told(tid) {
            return Ok(stop);
        }
        match wait_once(tid.0, libc::WNOHANG)? {
            Some((_, stop)) => return Ok(stop),
            None if round < SPIN => std::thread::yield_now(),
            None if Instant::now() > deadline => break,
            None if put_aside(libc::WNOHANG)? => {}
            None => std::thread::sleep(Duration::from_micros(20)),
        }
    }
    Err(io::ErrorKind::TimedOut.into())
}

/// Waits for any tracee of the calling *thread*; who it is.
pub fn wait_any() -> io::Result<(HostPid, Stop)> {
    let aside = ASIDE.with_borrow_mut(|aside| {
        let tid = aside.keys().next().copied()?;
        aside.remove_entry(&tid)
    });
    if let Some((tid, stop)) = aside {
        return Ok((HostPid(tid), stop));
    }
    loop {
        if let Some(told) = wait_once(-1, libc::__WNOTHREAD)? {
            return Ok(told);
        }
    }
}
