//! `bpf(2)`: programs that the kernel runs, such as one that decides which devices the processes of a control group may open.

use std::ffi::CStr;
use std::fs::File;
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

impl Instruction {
    /// What it does, to which register, from which, by how many instructions it jumps or where it reads, and the constant.
    pub const fn new(code: u8, to: u8, from: u8, offset: i16, constant: i32) -> Instruction {
        Instruction { code, registers: from << 4 | to, offset, constant }
    }
}

const MAP_CREATE: libc::c_int = 0;
const MAP_LOOKUP: libc::c_int = 1;
const PROGRAM_LOAD: libc::c_int = 5;
const PROGRAM_ATTACH: libc::c_int = 8;
const PROGRAM_RUN: libc::c_int = 10;
const LINK_CREATE: libc::c_int = 28;
const ITERATOR_CREATE: libc::c_int = 33;
/// `BPF_PROG_TYPE_CGROUP_DEVICE` and `BPF_CGROUP_DEVICE`.
const DEVICES_OF_A_GROUP: u32 = 15;
const WHEN_A_DEVICE_IS_OPENED: u32 = 6;
/// `BPF_PROG_TYPE_CGROUP_SYSCTL` and `BPF_CGROUP_SYSCTL`.
const SETTINGS_OF_A_GROUP: u32 = 23;
const WHEN_A_SETTING_IS_USED: u32 = 18;
/// `BPF_PROG_TYPE_TRACING` and `BPF_TRACE_ITER`.
const TRACING: u32 = 26;
const ITERATOR: u32 = 28;
/// `BPF_MAP_TYPE_ARRAY`, and `BPF_F_MMAPABLE`.
const ARRAY: u32 = 2;
/// `BPF_PSEUDO_MAP_VALUE`, where an instruction names a map.
pub(super) const VALUE_OF_A_MAP: u8 = 2;
pub(super) const MAPPABLE: u32 = 1 << 10;
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
    name: [u8; 16],
    interface: u32,
    /// What it will be attached as.
    attached_as: u32,
    types: [u32; 9],
    /// The number of the kernel's function that it is attached to.
    function: u32,
}

/// Likewise, for `BPF_PROG_ATTACH`.
#[repr(C)]
struct Attach {
    target: u32,
    program: u32,
    kind: u32,
    flags: u32,
}

/// Likewise, for `BPF_LINK_CREATE`.
#[repr(C)]
struct Link {
    program: u32,
    target: u32,
    kind: u32,
    flags: u32,
    of: u64,
    length: u32,
    rest: u32,
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

/// Likewise, for `BPF_MAP_LOOKUP_ELEM`.
#[repr(C)]
struct Lookup {
    map: u32,
    key: u64,
    value: u64,
    flags: u64,
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
    give(&Load { kind, flags, ..Load::of(license, program) })
}

/// Gives it one that it calls with each thing that `function`, by its number in the kernel's types, goes through.
pub(super) fn load_iterator(function: u32, license: &CStr, program: &[Instruction]) -> io::Result<OwnedFd> {
    give(&Load { kind: TRACING, attached_as: ITERATOR, function, ..Load::of(license, program) })
}

impl Load {
    /// What every program has. It must outlive the result.
    fn of(license: &CStr, program: &[Instruction]) -> Load {
        Load {
            count: program.len() as u32,
            instructions: program.as_ptr() as u64,
            license: license.as_ptr() as u64,
            ..Load::default()
        }
    }
}

fn give(load: &Load) -> io::Result<OwnedFd> {
    // SAFETY: the kernel reads as many bytes as it is told, the instructions and the string, all of which outlive the call.
    owned(unsafe { libc::syscall(libc::SYS_bpf, PROGRAM_LOAD, std::ptr::from_ref(load), size_of::<Load>()) })
}

/// Whose things a program goes through.
#[derive(Clone, Copy)]
pub(super) enum Of {
    Thread(i32),
    Process(i32),
}

/// The stream of what a program that goes through things of one thread or process writes about them. Whoever reads it must know
/// where it ends: read on, it begins again somewhere (seen on Linux 6.18).
pub(super) fn iterate(program: &OwnedFd, of: Of) -> io::Result<File> {
    // union bpf_iter_link_info: of which thread, of which process, by which descriptor
    let of = match of {
        Of::Thread(thread) => [thread, 0, 0, 0],
        Of::Process(process) => [0, process, 0, 0],
    };
    let link = Link {
        program: program.as_raw_fd() as u32,
        target: 0,
        kind: ITERATOR,
        flags: 0,
        of: of.as_ptr() as u64,
        length: size_of_val(&of) as u32,
        rest: 0,
    };
    // SAFETY: the kernel reads as many bytes as it is told, and those that `of` points to, which outlive the call.
    let link = owned(unsafe { libc::syscall(libc::SYS_bpf, LINK_CREATE, &raw const link, size_of::<Link>()) })?;
    let read = [link.as_raw_fd(), 0];
    // SAFETY: the kernel reads as many bytes as it is told.
    owned(unsafe { libc::syscall(libc::SYS_bpf, ITERATOR_CREATE, &raw const read, size_of_val(&read)) }).map(File::from)
}

/// Runs a program of the kind [`CALLED`].
pub(super) fn run(program: &OwnedFd) -> io::Result<()> {
    let mut run = Run { program: program.as_raw_fd() as u32, ..Run::default() };
    // SAFETY: the kernel reads as many bytes as it is told, and writes the program's result among them.
    check(unsafe { libc::syscall(libc::SYS_bpf, PROGRAM_RUN, &raw mut run, size_of::<Run>()) }).map(drop)
}

/// An array of one element of `size` bytes.
pub(super) fn array(size: u32, flags: u32) -> io::Result<OwnedFd> {
    let map = Map { kind: ARRAY, key: 4, value: size, count: 1, flags };
    // SAFETY: the kernel reads as many bytes as it is told.
    owned(unsafe { libc::syscall(libc::SYS_bpf, MAP_CREATE, &raw const map, size_of::<Map>()) })
}

/// A word that a program has in common with us.
#[derive(Debug)]
pub struct Word(OwnedFd);

impl Word {
    /// One that is zero.
    pub fn new() -> io::Result<Word> {
        array(size_of::<u64>() as u32, 0).map(Word)
    }

    /// What is in it now.
    pub fn get(&self) -> io::Result<u64> {
        let (key, mut value) = (0u32, 0u64);
        let lookup = Lookup {
            map: self.0.as_raw_fd() as u32,
            key: (&raw const key) as u64,
            value: (&raw mut value) as u64,
            flags: 0,
        };
        // SAFETY: the kernel reads the request and the key, and writes as many bytes as an element of the array has.
        check(unsafe { libc::syscall(libc::SYS_bpf, MAP_LOOKUP, &raw const lookup, size_of::<Lookup>()) })?;
        Ok(value)
    }

    /// The instructions that put its address into a register.
    pub fn address(&self, register: u8) -> [Instruction; 2] {
        let map = self.0.as_raw_fd();
        [Instruction::new(0x18, register, VALUE_OF_A_MAP, 0, map), Instruction::new(0, 0, 0, 0, 0)]
    }
}

/// Has `program` decide about devices for the control group (v2) whose directory is `group`, for as long as that lives.
/// It is run with a `struct bpf_cgroup_dev_ctx` before a device is opened or a node of one is made: 0 denies.
pub fn decide_about_devices(group: BorrowedFd<'_>, program: &[Instruction]) -> io::Result<()> {
    attach(group, load(DEVICES_OF_A_GROUP, 0, c"", program)?, WHEN_A_DEVICE_IS_OPENED)
}

/// Has `program` run before a process of the control group (v2) whose directory is `group` reads or writes what is below
/// `/proc/sys`, with a `struct bpf_sysctl`, for as long as the group lives: 0 denies.
pub fn watch_settings(group: BorrowedFd<'_>, program: &[Instruction]) -> io::Result<()> {
    attach(group, load(SETTINGS_OF_A_GROUP, 0, c"", program)?, WHEN_A_SETTING_IS_USED)
}

fn attach(group: BorrowedFd<'_>, program: OwnedFd, kind: u32) -> io::Result<()> {
    let attach = Attach { target: group.as_raw_fd() as u32, program: program.as_raw_fd() as u32, kind, flags: 0 };
    // SAFETY: the kernel reads as many bytes as it is told.
    check(unsafe { libc::syscall(libc::SYS_bpf, PROGRAM_ATTACH, &raw const attach, size_of::<Attach>()) }).map(drop)
}
