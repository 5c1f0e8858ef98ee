//! Which devices the processes of a pod may open: a node is a number, and whoever may make nodes could name any of the
//! host's. Nodes may be made (programs pack and unpack trees with them); opening them is what is decided here.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use crate::pod::{Bind, Cgroup, PodError};
use crate::sys::bpf::{self, Instruction};

/// A device of the host's, or all with one major number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Device {
    block: bool,
    major: u32,
    minor: Option<u32>,
}

const fn character(major: u32, minor: Option<u32>) -> Device {
    Device { block: false, major, minor }
}

/// What has nothing of the host's behind it, or what is the pod's own (`Documentation/admin-guide/devices.txt`): null,
/// zero, full, random, urandom; tty, console, ptmx; the slaves of ptys.
const HARMLESS: [Device; 9] = [
    character(1, Some(3)),
    character(1, Some(5)),
    character(1, Some(7)),
    character(1, Some(8)),
    character(1, Some(9)),
    character(5, Some(0)),
    character(5, Some(1)),
    character(5, Some(2)),
    character(136, None),
];

/// Has the group's processes open no devices but harmless ones, and those that were bound into the pod.
pub(super) fn confine(group: &Cgroup, binds: &[Bind]) -> Result<(), PodError> {
    let allowed: Vec<Device> = HARMLESS.into_iter().chain(binds.iter().flat_map(|bind| bound(&bind.source))).collect();
    bpf::decide_about_devices(group.open()?.as_fd(), &program(&allowed))
        .map_err(|error| PodError::Lacks(format!("device filters of control groups (CONFIG_CGROUP_BPF): {error}")))
}

/// Whether the kernel has such filters, tried on a group.
pub(crate) fn probe(directory: &Path) -> io::Result<()> {
    bpf::decide_about_devices(fs::File::open(directory)?.as_fd(), &program(&HARMLESS))
}

/// The devices at a path of the host's: itself, or those below a directory of `/dev`.
fn bound(source: &Path) -> Vec<Device> {
    let Ok(found) = fs::metadata(source) else { return Vec::new() };
    let kind = found.file_type();
    if kind.is_dir() {
        let devices = source.starts_with("/dev") && fs::symlink_metadata(source).is_ok_and(|f| f.is_dir());
        let below = devices.then(|| fs::read_dir(source).ok()).flatten().into_iter().flatten().flatten();
        return below.filter(|entry| !entry.path().is_symlink()).flat_map(|entry| bound(&entry.path())).collect();
    }
    let (major, minor) = (nix::sys::stat::major(found.rdev()) as u32, nix::sys::stat::minor(found.rdev()) as u32);
    let device = Device { block: kind.is_block_device(), major, minor: Some(minor) };
    if kind.is_block_device() || kind.is_char_device() { vec![device] } else { Vec::new() }
}

/// Registers of the program.
const RESULT: u8 = 0;
const CONTEXT: u8 = 1;
const ACCESS: u8 = 2;
const KIND: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;

/// A word of `struct bpf_cgroup_dev_ctx`: access (high half) and type (low half), major number, minor number.
const fn word(to: u8, at: i16) -> Instruction {
    Instruction::new(0x61, to, CONTEXT, at, 0)
}

const fn answer(allow: bool) -> [Instruction; 2] {
    [Instruction::new(0xb7, RESULT, 0, 0, allow as i32), Instruction::new(0x95, 0, 0, 0, 0)]
}

const fn unless(register: u8, value: u32, skip: i16) -> Instruction {
    Instruction::new(0x55, register, 0, skip, value as i32)
}

const MAKE_A_NODE: u32 = 1;
const BLOCK: u32 = 1;
const CHARACTER: u32 = 2;

/// The program that allows these and no others.
fn program(allowed: &[Device]) -> Vec<Instruction> {
    let mut program = vec![
        word(ACCESS, 0),
        word(MAJOR, 4),
        word(MINOR, 8),
        Instruction::new(0xbf, KIND, ACCESS, 0, 0),
        // kind &= 0xffff, access >>= 16
        Instruction::new(0x57, KIND, 0, 0, 0xffff),
        Instruction::new(0x77, ACCESS, 0, 0, 16),
        unless(ACCESS, MAKE_A_NODE, 2),
    ];
    program.extend(answer(true));
    for device in allowed {
        let minor = device.minor.map(|minor| unless(MINOR, minor, 2));
        let rest = 2 + minor.is_some() as i16;
        program.push(unless(KIND, if device.block { BLOCK } else { CHARACTER }, rest + 1));
        program.push(unless(MAJOR, device.major, rest));
        program.extend(minor);
        program.extend(answer(true));
    }
    program.extend(answer(false));
    program
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The program for one device: every instruction as the kernel has it, the jumps to the next device's first one.
    #[test]
    fn exact_instructions() {
        let program = program(&[character(1, Some(3))]);
        let jumps: Vec<_> =
            program.iter().filter(|i| i.code == 0x55).map(|i| (i.registers, i.offset, i.constant)).collect();
        assert_eq!(jumps, [(ACCESS, 2, 1), (KIND, 4, 2), (MAJOR, 3, 1), (MINOR, 2, 3)]);
        assert_eq!(program.len(), 7 + 2 + 5 + 2);
        assert_eq!(program.last().unwrap().code, 0x95);
    }

    #[test]
    fn what_is_bound_is_allowed() {
        let full = Device { block: false, major: 1, minor: Some(7) };
        assert_eq!(bound(Path::new("/dev/full")), [full]);
        assert!(bound(Path::new("/dev")).contains(&full));
        assert_eq!(bound(Path::new("/etc")), []);
        assert_eq!(bound(Path::new("/etc/passwd")), []);
        assert_eq!(bound(Path::new("/nothing")), []);
    }
}
