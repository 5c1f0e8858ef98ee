//! Whether anybody in a pod has set anything below `/proc/sys/net`: a checkpoint that knows that nobody has need not read all
//! that is there, more than six hundred files of each network namespace.

use std::io;
use std::os::fd::AsFd;

use crate::pod::Cgroup;
use crate::sys::bpf::{self, Instruction, Word};

/// What a monitor knows of it.
#[derive(Debug, Default)]
pub struct Sysctls(Option<Word>);

impl Sysctls {
    /// Has the kernel note, from now on, what processes of the group write. Where it cannot (`CONFIG_CGROUP_BPF`, `CAP_BPF`),
    /// nothing is known.
    pub(super) fn watch(group: &Cgroup) -> Sysctls {
        let watched = || -> io::Result<Word> {
            let written = Word::new()?;
            let directory = group.open().map_err(io::Error::other)?;
            bpf::watch_settings(directory.as_fd(), &program(&written))?;
            Ok(written)
        };
        let watched = watched().inspect_err(|error| tracing::info!(%error, "settings of networks are not watched"));
        Sysctls(watched.ok())
    }

    /// How often somebody has written any, if that is known.
    pub fn writes(&self) -> Option<u64> {
        self.0.as_ref()?.get().ok()
    }

    /// Whether it is certain that nobody has.
    pub fn are_untouched(&self) -> bool {
        self.writes() == Some(0)
    }
}

/// The program: writes to settings whose name begins with `net/` are counted. Everything is allowed.
fn program(written: &Word) -> Vec<Instruction> {
    const NET: i32 = i32::from_le_bytes(*b"net/");
    const NAME: i16 = -16;
    const LENGTH: i32 = 16;
    let [address, rest] = written.address(3);
    vec![
        // r2 = whether this is a write; if not, go to the end
        Instruction::new(0x61, 2, 1, 0, 0),
        Instruction::new(0x15, 2, 0, 11, 0),
        // bpf_sysctl_get_name(r1: context, r2: to, r3: its length, r4: all of it), which is cut off there
        Instruction::new(0xbf, 2, 10, 0, 0),
        Instruction::new(0x07, 2, 0, 0, NAME as i32),
        Instruction::new(0xb7, 3, 0, 0, LENGTH),
        Instruction::new(0xb7, 4, 0, 0, 0),
        Instruction::new(0x85, 0, 0, 0, 101),
        Instruction::new(0x61, 2, 10, NAME, 0),
        Instruction::new(0x55, 2, 0, 4, NET),
        address,
        rest,
        Instruction::new(0xb7, 2, 0, 0, 1),
        // *r3 += r2, atomically
        Instruction::new(0xdb, 3, 2, 0, 0),
        Instruction::new(0xb7, 0, 0, 0, 1),
        Instruction::new(0x95, 0, 0, 0, 0),
    ]
}
