//! Switches that a process or thread has set for itself and that nothing else depends on.

use std::ops::Range;
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};

use crate::ids::HostPid;
use crate::memory::PAGE;
use crate::process::proc_files::Status;
use crate::procfs;
use crate::tracee::{Batch, Call, Output, Results};

/// Switches of a thread.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThreadControls {
    /// `PR_GET_SPECULATION_CTRL` of store bypass, indirect branches, and L1D flushes.
    pub speculation: [i32; 3],
    /// Whether reading the time stamp counter is an error (`PR_TSC_SIGSEGV`).
    pub no_time_stamps: bool,
    /// What memory errors do (`PR_MCE_KILL_GET`): killing late is 0, early 1, as the host has it 2.
    pub memory_errors: i32,
    /// Where memory comes from (`get_mempolicy`): mode with flags, and nodes as a bit mask. Mode 0 is the default.
    pub memory_policy: (i32, Vec<u64>),
}

/// Switches of a process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessControls {
    /// Whether memory that can be written to can become executable (`PR_GET_MDWE`).
    pub write_or_execute: i32,
    /// Whether all of its memory may be merged (`PR_GET_MEMORY_MERGE`).
    pub merge: bool,
    /// How memory that is still to come is locked (`mlockall`): `MCL_FUTURE`, perhaps with `MCL_ONFAULT`, or 0.
    #[serde(default)]
    pub lock_future: i32,
    /// The memory barriers that it has registered for (`membarrier(2)`): the commands `MEMBARRIER_CMD_REGISTER_…`.
    #[serde(default)]
    pub barriers: i32,
    /// Extended registers that it has asked for (`ARCH_GET_XCOMP_PERM`).
    pub extended: u64,
}

const DEFAULT_MEMORY_ERRORS: i32 = 2;
const PR_GET_MDWE: i32 = 66;
const PR_SET_MDWE: i32 = 65;
const PR_GET_MEMORY_MERGE: i32 = 68;
const PR_SET_MEMORY_MERGE: i32 = 67;
const ARCH_GET_XCOMP_PERM: i32 = 0x1022;
const ARCH_REQ_XCOMP_PERM: i32 = 0x1023;
/// Feature and bit of the tiles of AMX.
const TILES: u32 = 18;
const MEMBARRIER_CMD_GET_REGISTRATIONS: i32 = 1 << 9;
/// Barriers that fail unless they were registered for; the command that registers is the next bit.
const BARRIERS: [i32; 3] = [1 << 3, 1 << 5, 1 << 7];
const PR_SPEC_PRCTL: i32 = 1;
const PR_SPEC_ENABLE: i32 = 2;
/// Disabled, disabled for good, disabled until the next program.
const PR_SPEC_DISABLED: i32 = 4 | 8 | 16;
/// Words of a mask of memory nodes.
const NODES: usize = 16;

/// Questions of a batch to a thread.
pub struct AskedThread {
    speculation: [Call; 3],
    time_stamps: Output,
    memory_errors: Call,
    memory_policy: (Output, Call, Output),
}

/// Adds the questions to a thread.
pub fn ask_thread(batch: &mut Batch) -> AskedThread {
    let mut speculation =
        |which: i32| batch.attempt(libc::SYS_prctl, [libc::PR_GET_SPECULATION_CTRL.into(), which.into()]);
    let speculation = [speculation(0), speculation(1), speculation(2)];
    let time_stamps = batch.output(8);
    batch.attempt(libc::SYS_prctl, [libc::PR_GET_TSC.into(), time_stamps.into()]);
    let memory_errors = batch.attempt(libc::SYS_prctl, [libc::PR_MCE_KILL_GET.into()]);
    let (mode, nodes) = (batch.output(8), batch.output(8 * NODES));
    let policy = batch.attempt(libc::SYS_get_mempolicy, [mode.into(), nodes.into(), (64 * NODES).into()]);
    AskedThread { speculation, time_stamps, memory_errors, memory_policy: (mode, policy, nodes) }
}

fn number(results: &Results, output: Output) -> i32 {
    results.output(output).first_chunk().map_or(0, |bytes| i32::from_ne_bytes(*bytes))
}

impl AskedThread {
    /// The answers.
    pub fn answers(&self, results: &Results) -> ThreadControls {
        let (mode, asked, nodes) = self.memory_policy;
        let mode = if results.get(asked) == 0 { number(results, mode) } else { 0 };
        let words = results.output(nodes).chunks_exact(8);
        let words: Vec<u64> = words.map(|w| w.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte))).collect();
        let errors = results.get(self.memory_errors);
        ThreadControls {
            speculation: self.speculation.map(|call| results.get(call).max(0) as i32),
            no_time_stamps: number(results, self.time_stamps) == libc::PR_TSC_SIGSEGV,
            memory_errors: if errors < 0 { DEFAULT_MEMORY_ERRORS } else { errors as i32 },
            memory_policy: (mode, if mode == 0 { Vec::new() } else { words }),
        }
    }
}

/// Sets what is not as in a new thread.
pub fn restart_thread(state: &ThreadControls, batch: &mut Batch) {
    for (which, value) in (0i32..).zip(state.speculation) {
        let unusual = if which == 2 { PR_SPEC_ENABLE } else { PR_SPEC_DISABLED };
        if value & PR_SPEC_PRCTL != 0 && value & unusual != 0 {
            let args = [libc::PR_SET_SPECULATION_CTRL.into(), which.into(), (value & !PR_SPEC_PRCTL).into()];
            batch.call(libc::SYS_prctl, args, "setting a speculation control");
        }
    }
    let (mode, nodes) = &state.memory_policy;
    if *mode != 0 {
        let bytes: Vec<u8> = nodes.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let empty = nodes.iter().all(|word| *word == 0);
        let mask = if empty { 0u64.into() } else { batch.bytes(&bytes) };
        let most = if empty { 0 } else { 64 * nodes.len() + 1 };
        batch.call(libc::SYS_set_mempolicy, [(*mode).into(), mask, most.into()], "setting the memory policy");
    }
    if state.memory_errors != DEFAULT_MEMORY_ERRORS && state.memory_errors >= 0 {
        let args = [libc::PR_MCE_KILL.into(), libc::PR_MCE_KILL_SET.into(), state.memory_errors.into()];
        batch.call(libc::SYS_prctl, args, "setting what memory errors do");
    }
    if state.no_time_stamps {
        let args = [libc::PR_SET_TSC.into(), libc::PR_TSC_SIGSEGV.into()];
        batch.call(libc::SYS_prctl, args, "forbidding time stamps");
    }
}

/// Questions of a batch to a process.
pub struct AskedProcess {
    write_or_execute: Call,
    merge: Call,
    registrations: Call,
    barriers: [Call; 3],
    segments: Call,
    extended: Output,
}

/// Adds the questions to a process.
pub fn ask_process(batch: &mut Batch) -> AskedProcess {
    let write_or_execute = batch.attempt(libc::SYS_prctl, [PR_GET_MDWE.into()]);
    let merge = batch.attempt(libc::SYS_prctl, [PR_GET_MEMORY_MERGE.into()]);
    let registrations = batch.attempt(libc::SYS_membarrier, [MEMBARRIER_CMD_GET_REGISTRATIONS.into()]);
    let barriers = BARRIERS.map(|barrier| batch.attempt(libc::SYS_membarrier, [barrier.into()]));
    let entry = batch.output(8);
    let segments = batch.attempt(libc::SYS_modify_ldt, [0i32.into(), entry.into(), 8i32.into()]);
    let extended = batch.output(8);
    batch.attempt(libc::SYS_arch_prctl, [ARCH_GET_XCOMP_PERM.into(), extended.into()]);
    AskedProcess { write_or_execute, merge, registrations, barriers, segments, extended }
}

impl AskedProcess {
    /// The answers.
    pub fn answers(&self, results: &Results) -> ProcessControls {
        let bits = results.output(self.extended).first_chunk().map_or(0, |bytes| u64::from_ne_bytes(*bytes));
        ProcessControls {
            write_or_execute: results.get(self.write_or_execute).max(0) as i32,
            merge: results.get(self.merge) == 1,
            extended: bits,
            barriers: self.barriers(results),
            lock_future: 0,
        }
    }

    /// Before Linux 6.3 only the barriers themselves tell whether they were registered for.
    fn barriers(&self, results: &Results) -> i32 {
        let told = results.get(self.registrations);
        if told >= 0 {
            return told as i32;
        }
        let pairs = BARRIERS.iter().zip(self.barriers);
        pairs.filter(|(_, call)| results.get(*call) == 0).map(|(barrier, _)| barrier << 1).sum()
    }

    /// Whether it has segments of its own (`modify_ldt(2)`).
    pub fn has_segments(&self, results: &Results) -> bool {
        results.get(self.segments) > 0
    }
}

/// How memory that is still to come is locked, by the mapping that zap made last: it was locked, or not, at once.
/// `locked` is what the process had locked before.
pub fn lock_future(process: HostPid, locked: u64, scratch: &Range<u64>) -> i32 {
    let status = procfs::read_record(process.proc("status")).map(Status::new);
    let now = status.map_or(0, |status| status.kilobytes("VmLck"));
    if now < locked + (scratch.end - scratch.start) / 1024 {
        return 0;
    }
    // Nobody has touched its end.
    let (mut entry, place) = ([0; 8], (scratch.end - 1) / PAGE * 8);
    let read = std::fs::File::open(process.proc("pagemap")).and_then(|map| map.read_exact_at(&mut entry, place));
    let is_present = read.is_ok() && u64::from_ne_bytes(entry) >> 63 != 0;
    if is_present { libc::MCL_FUTURE } else { libc::MCL_FUTURE | libc::MCL_ONFAULT }
}

/// What threads need, before there are any; what belongs to the address space if that is its `own`.
pub fn restart_process(state: &ProcessControls, own: bool, batch: &mut Batch) {
    if state.extended & 1 << TILES != 0 {
        batch.call(libc::SYS_arch_prctl, [ARCH_REQ_XCOMP_PERM.into(), TILES.into()], "asking for the registers of AMX");
    }
    if !own {
        return;
    }
    // With more than one thread the kernel would wait for all processors.
    for register in (0..i32::BITS - 1).map(|bit| 1 << bit).filter(|bit| state.barriers & bit != 0) {
        batch.call(libc::SYS_membarrier, [register.into()], "registering for memory barriers");
    }
    if state.lock_future != 0 {
        batch.call(libc::SYS_mlockall, [state.lock_future.into()], "locking memory that is still to come");
    }
}

/// What hinders the restart itself, at its end.
pub fn restrict_process(state: &ProcessControls, batch: &mut Batch) {
    if state.merge {
        batch.call(libc::SYS_prctl, [PR_SET_MEMORY_MERGE.into(), 1i32.into()], "letting memory be merged");
    }
    if state.write_or_execute != 0 {
        let args = [PR_SET_MDWE.into(), state.write_or_execute.into()];
        batch.call(libc::SYS_prctl, args, "forbidding that memory becomes executable");
    }
}
