//! What the kernel has in its memory, for those who may read it: a program of a few instructions (`bpf(2)`) that copies
//! bytes from an address of the kernel's to a page that it has in common with us.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::NonNull;

use super::bpf::{self, Instruction};
use crate::ids::Address;

/// The most bytes that one run copies.
const PIECE: usize = 4096;
/// The mapping: where to read, how much, the result, the task that asks; the bytes are on the next page.
const MAPPED: usize = 2 * PIECE;
const WHERE: i16 = 0;
const HOW_MUCH: i16 = 8;
const RESULT: i16 = 16;
const TASK: i16 = 24;

/// A window into the kernel's memory.
#[derive(Debug)]
pub struct Window {
    program: OwnedFd,
    page: NonNull<u8>,
}

// SAFETY: the page belongs to nobody else, and a window is looked through by `&mut self` alone.
unsafe impl Send for Window {}

impl Window {
    /// One that is shut; an error where the kernel lets nobody look (`CONFIG_BPF_SYSCALL`, `CAP_BPF` and `CAP_PERFMON`,
    /// no lockdown).
    pub fn open() -> io::Result<Window> {
        let map = bpf::array(MAPPED as u32, bpf::MAPPABLE)?;
        let program = bpf::load(bpf::CALLED, bpf::SLEEPABLE, c"Dual MIT/GPL", &program(map.as_raw_fd()))?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice; nothing refers to it yet.
        let page =
            unsafe { libc::mmap(std::ptr::null_mut(), MAPPED, protection, libc::MAP_SHARED, map.as_raw_fd(), 0) };
        if page == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let page = NonNull::new(page.cast()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Window { program, page })
    }

    /// Fills `bytes` with what the kernel has at `from`; an error if nothing is there.
    pub fn read(&mut self, from: Address, bytes: &mut [u8]) -> io::Result<()> {
        let mut from = from;
        for piece in bytes.chunks_mut(PIECE) {
            self.set(WHERE, from.0);
            self.set(HOW_MUCH, piece.len() as u64);
            bpf::run(&self.program)?;
            match self.get(RESULT) as i64 {
                0 => {}
                error => return Err(io::Error::from_raw_os_error(-error as i32)),
            }
            // SAFETY: the page of the bytes is mapped for as long as `self` lives, and no piece is longer.
            unsafe { std::ptr::copy_nonoverlapping(self.page.as_ptr().add(PIECE), piece.as_mut_ptr(), piece.len()) };
            from = from.plus(piece.len() as u64);
        }
        Ok(())
    }

    /// The kernel's own record of the thread that asks, its `struct task_struct`.
    pub fn current_task(&mut self) -> io::Result<Address> {
        self.set(HOW_MUCH, 0);
        bpf::run(&self.program)?;
        Ok(Address(self.get(TASK)))
    }

    fn word(&self, at: i16) -> *mut u64 {
        // SAFETY: the constants above lie within the mapping, and are multiples of eight.
        unsafe { self.page.as_ptr().add(at as usize).cast() }
    }

    fn set(&mut self, at: i16, value: u64) {
        // SAFETY: the word is mapped and aligned; the program, which runs in calls of ours alone, is not running.
        unsafe { self.word(at).write_volatile(value) };
    }

    fn get(&self, at: i16) -> u64 {
        // SAFETY: as for `set`.
        unsafe { self.word(at).read_volatile() }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: the mapping that `open` made; nothing borrows from it.
        unsafe { libc::munmap(self.page.as_ptr().cast(), MAPPED) };
    }
}

/// The program. The kernel has it call what reads (`bpf_probe_read_kernel`) if it is offered under the GPL: these
/// instructions are, or under the MIT licence, as one likes.
fn program(map: i32) -> [Instruction; 16] {
    const LOAD: u8 = 0x79;
    const STORE: u8 = 0x7b;
    const CALL: u8 = 0x85;
    const SET: u8 = 0xb7;
    const COPY: u8 = 0xbf;
    [
        // r6 is the page: the value of the map's one element, from its beginning.
        Instruction::new(0x18, 6, bpf::VALUE_OF_A_MAP, 0, map),
        Instruction::new(0, 0, 0, 0, 0),
        // bpf_get_current_task
        Instruction::new(CALL, 0, 0, 0, 35),
        Instruction::new(STORE, 6, 0, TASK, 0),
        Instruction::new(SET, 0, 0, 0, 0),
        Instruction::new(STORE, 6, 0, RESULT, 0),
        Instruction::new(LOAD, 2, 6, HOW_MUCH, 0),
        // if r2 > PIECE, or nothing is wanted, go to the end
        Instruction::new(0x25, 2, 0, 7, PIECE as i32),
        Instruction::new(0x15, 2, 0, 6, 0),
        Instruction::new(LOAD, 3, 6, WHERE, 0),
        Instruction::new(COPY, 1, 6, 0, 0),
        Instruction::new(0x07, 1, 0, 0, PIECE as i32),
        // bpf_probe_read_kernel(r1: to, r2: so many, r3: from)
        Instruction::new(CALL, 0, 0, 0, 113),
        Instruction::new(STORE, 6, 0, RESULT, 0),
        Instruction::new(SET, 0, 0, 0, 0),
        Instruction::new(0x95, 0, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_knows_our_name() {
        let mut window = Window::open().unwrap();
        let task = window.current_task().unwrap();
        let mut record = vec![0; 6000];
        window.read(task, &mut record).unwrap();
        let name = std::fs::read("/proc/thread-self/comm").unwrap();
        let name = name.trim_ascii_end();
        assert!(record.windows(name.len()).any(|part| part == name));
        assert!(window.read(Address(8), &mut record).is_err());
    }
}
