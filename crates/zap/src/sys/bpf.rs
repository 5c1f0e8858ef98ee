//! `bpf(2)`: a program that decides which devices the processes of a control group may open.

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

const PROGRAM_LOAD: libc::c_int = 5;
const PROGRAM_ATTACH: libc::c_int = 8;
/// `BPF_PROG_TYPE_CGROUP_DEVICE` and `BPF_CGROUP_DEVICE`.
const DEVICES_OF_A_GROUP: u32 = 15;
const WHEN_A_DEVICE_IS_OPENED: u32 = 6;

/// The beginning of `union bpf_attr`, as `BPF_PROG_LOAD` takes it.
#[repr(C)]
struct Load {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
}

/// Likewise, for `BPF_PROG_ATTACH`.
#[repr(C)]
struct Attach {
    target: u32,
    program: u32,
    kind: u32,
    flags: u32,
}

/// Has `program` decide about devices for the control group (v2) whose directory is `group`, for as long as that lives.
/// It is run with a `struct bpf_cgroup_dev_ctx` before a device is opened or a node of one is made: 0 denies.
pub fn decide_about_devices(group: BorrowedFd<'_>, program: &[Instruction]) -> io::Result<()> {
    let load = Load {
        kind: DEVICES_OF_A_GROUP,
        count: program.len() as u32,
        instructions: program.as_ptr() as u64,
        license: c"".as_ptr() as u64,
    };
    // SAFETY: the kernel reads as many bytes as it is told, the instructions and the empty string, all of which outlive
    // the call.
    let loaded = check(unsafe { libc::syscall(libc::SYS_bpf, PROGRAM_LOAD, &raw const load, size_of::<Load>()) })?;
    // SAFETY: the descriptor is new, and nobody else's.
    let loaded = unsafe { OwnedFd::from_raw_fd(loaded as i32) };
    let attach = Attach {
        target: group.as_raw_fd() as u32,
        program: loaded.as_raw_fd() as u32,
        kind: WHEN_A_DEVICE_IS_OPENED,
        flags: 0,
    };
    // SAFETY: the kernel reads as many bytes as it is told.
    check(unsafe { libc::syscall(libc::SYS_bpf, PROGRAM_ATTACH, &raw const attach, size_of::<Attach>()) }).map(drop)
}
