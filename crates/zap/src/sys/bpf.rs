//! `bpf(2)`: programs that the kernel runs, such as one that decides which devices the processes of a control group may open.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::check;

/// One instruction: operation, registers (source, destination: four bits each), offset of a jump, constant.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instruction {
    /// What it does.
    pub code: u8,
    /// Source register (high four bits) and destination register.
    pub registers: u8,
    /// By how many instructions it jumps, or where it reads.
    pub offset: i16,
    /// The constant.
    pub constant: i32,
}

const MAP_CREATE: libc::c_int = 0;
const PROGRAM_LOAD: libc::c_int = 5;
const PROGRAM_ATTACH: libc::c_int = 8;
const PROGRAM_RUN: libc::c_int = 10;
/// `BPF_PROG_TYPE_CGROUP_DEVICE` and `BPF_CGROUP_DEVICE`.
const DEVICES_OF_A_GROUP: u32 = 15;
const WHEN_A_DEVICE_IS_OPENED: u32 = 6;
/// `BPF_PROG_TYPE_SYSCALL`: a program that runs when it is called. The kernel wants it to be one that may sleep.
pub(super) const CALLED: u32 = 31;
pub(super) const SLEEPABLE: u32 = 1 << 4;

/// The beginning of `union bpf_attr`, as `BPF_PROG_LOAD` takes it.
#[derive(Default)]
#[repr(C)]
struct Load {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log: [u64; 2],
    version: u32,
    flags: u32,
}

/// Likewise, for `BPF_PROG_ATTACH`.
#[repr(C)]
struct Attach {
    target: u32,
    program: u32,
    kind: u32,
    flags: u32,
}

/// Likewise, for `BPF_MAP_CREATE`.
#[repr(C)]
struct Map {
    kind: u32,
    key: u32,
    value: u32,
    count: u32,
    flags: u32,
}

/// Likewise, for `BPF_PROG_TEST_RUN`.
#[derive(Default)]
#[repr(C)]
struct Run {
    program: u32,
    others: [u32; 15],
}

fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    let number = check(result)? as i32;
    // SAFETY: every caller passes the result of a call that makes a new descriptor, which nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Gives the kernel a program.
pub(super) fn load(kind: u32, flags: u32, license: &CStr, program: &[Instruction]) -> io::Result<OwnedFd> {
    let load = Load {
        kind,
        count: program.len() as u32,
        instructions: program.as_ptr() as u64,
        license: license.as_ptr() as u64,
        flags,
        ..Load::default()
    };
    // SAFETY: the kernel reads as many bytes as it is told, the instructions and the string, all of which outlive the call.
    owned(unsafe { libc::syscall(libc::SYS_bpf, PROGRAM_LOAD, &raw const load, size_of::<Load>()) })
}

/// Runs a program of the kind [`CALLED`].
pub(super) fn run(program: &OwnedFd) -> io::Result<()> {
    let mut run = Run { program: program.as_raw_fd() as u32, ..Run::default() };
    // SAFETY: the kernel reads as many bytes as it is told, and writes the program's result among them.
    check(unsafe { libc::syscall(libc::SYS_bpf, PROGRAM_RUN, &raw mut run, size_of::<Run>()) }).map(drop)
}

/// An array of one element of `size` bytes, which can be mapped.
pub(super) fn shared_array(size: u32) -> io::Result<OwnedFd> {
    const ARRAY: u32 = 2;
    const MAPPABLE: u32 = 1 << 10;
    let map = Map { kind: ARRAY, key: 4, value: size, count: 1, flags: MAPPABLE };
    // SAFETY: the kernel reads as many bytes as it is told.
    owned(unsafe { libc::syscall(libc::SYS_bpf, MAP_CREATE, &raw const map, size_of::<Map>()) })
}

/// Has `program` decide about devices for the control group (v2) whose directory is `group`, for as long as that lives.
/// It is run with a `struct bpf_cgroup_dev_ctx` before a device is opened or a node of one is made: 0 denies.
pub fn decide_about_devices(group: BorrowedFd<'_>, program: &[Instruction]) -> io::Result<()> {
    let loaded = load(DEVICES_OF_A_GROUP, 0, c"", program)?;
    let attach = Attach {
        target: group.as_raw_fd() as u32,
        program: loaded.as_raw_fd() as u32,
        kind: WHEN_A_DEVICE_IS_OPENED,
        flags: 0,
    };
    // SAFETY: the kernel reads as many bytes as it is told.
    check(unsafe { libc::syscall(libc::SYS_bpf, PROGRAM_ATTACH, &raw const attach, size_of::<Attach>()) }).map(drop)
}
