//! The mappings of a process, told by a program of a few instructions that the kernel calls with each of them (`bpf(2)`, an
//! iterator over `struct vm_area_struct`, since Linux 6.1 of one process).

use std::io::{self, Read};
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::memfd::{MFdFlags, memfd_create};

use super::bpf::{self, Instruction, Of};
use super::check;

/// Where the members of the kernel's structures are, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Places {
    /// `vm_area_struct.vm_start`.
    pub start: i16,
    /// `vm_area_struct.vm_end`.
    pub end: i16,
    /// `vm_area_struct.vm_flags`.
    pub flags: i16,
    /// `vm_area_struct.vm_pgoff`.
    pub offset: i16,
    /// `vm_area_struct.anon_vma`.
    pub modified: i16,
    /// `vm_area_struct.vm_file`.
    pub file: i16,
    /// `file.f_inode`.
    pub inode: i16,
    /// `inode.i_ino`.
    pub number: i16,
    /// `inode.i_sb`.
    pub system: i16,
    /// `super_block.s_dev`.
    pub device: i16,
    /// `vm_area_struct.vm_mm`.
    pub memory: i16,
    /// `mm_struct.mm_lock_seq` (Linux 6.4).
    pub changes: i16,
    /// `vm_area_struct.anon_name` and `anon_vma_name.name`, where there are names.
    pub name: Option<(i16, i16)>,
}

/// A mapping as the kernel has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Its first address.
    pub start: u64,
    /// The address behind it.
    pub end: u64,
    /// The kernel's flags, whatever they mean to it.
    pub flags: u64,
    /// Where in the file it begins, in pages.
    pub offset: u64,
    /// Whether a page of it was ever modified, if it is private.
    pub modified: bool,
    /// The inode and the device of its file, by the kernel's own numbers.
    pub file: (u64, u64),
    /// The name that a program gave it.
    pub name: [u8; NAME],
}

/// The mappings of a process.
#[derive(Clone, Debug, Default)]
pub struct Told {
    /// All of them, by their addresses.
    pub records: Vec<Record>,
    /// How often the address space had changed when the first was told of: while that is the same, so are all mappings.
    /// Following memory counts, too.
    pub changes: u64,
}

impl Record {
    /// Its addresses.
    pub fn range(&self) -> Range<u64> {
        self.start..self.end
    }
}

const PAGE: u64 = 4096;
/// Bytes of a name, with the zero behind it (`ANON_VMA_NAME_MAX_LEN`).
const NAME: usize = 80;
const WORDS: usize = 8;
const RECORD: usize = WORDS * 8 + NAME;
/// Bytes of one read: the kernel gives less than so much, and whole records.
const AT_ONCE: usize = 64 << 10;

/// The program.
#[derive(Debug)]
pub struct Teller(OwnedFd);

impl Teller {
    /// Gives it to the kernel. `function` is the number of `bpf_iter_task_vma` in the kernel's types.
    pub fn open(function: u32, places: &Places) -> io::Result<Teller> {
        bpf::load_iterator(function, c"Dual MIT/GPL", &program(places)).map(Teller)
    }

    /// The mappings of the process that has this thread; none of one without memory.
    pub fn read(&self, thread: i32) -> io::Result<Told> {
        let mut stream = bpf::iterate(&self.0, Of::Thread(thread))?;
        let (mut told, mut bytes) = (Told::default(), vec![0; AT_ONCE]);
        loop {
            let length = stream.read(&mut bytes)?;
            for (record, changes) in bytes[..length].as_chunks().0.iter().map(record) {
                // One without addresses is behind the last, if there was room for it.
                if record.start < told.records.last().map_or(1, |last| last.end) {
                    return Ok(told);
                }
                if told.records.is_empty() {
                    told.changes = changes;
                }
                told.records.push(record);
            }
            if length == 0 {
                return Ok(told);
            }
        }
    }
}

/// A private mapping of a file of ours, to see what the kernel does with such.
#[derive(Debug)]
pub struct Own(Range<u64>);

impl Own {
    /// One page of it.
    pub fn map() -> io::Result<Own> {
        let file = memfd_create("page", MFdFlags::MFD_CLOEXEC)?;
        nix::unistd::ftruncate(&file, PAGE as i64)?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice; nothing refers to it.
        let start = unsafe {
            libc::mmap(std::ptr::null_mut(), PAGE as usize, protection, libc::MAP_PRIVATE, file.as_raw_fd(), 0)
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Own(start as u64..start as u64 + PAGE))
    }

    /// Its addresses.
    pub fn range(&self) -> Range<u64> {
        self.0.clone()
    }

    /// Gives it advice (`madvise(2)`).
    pub fn advise(&self, advice: i32) -> io::Result<()> {
        // SAFETY: the mapping is ours, and nothing refers to what is there.
        check(unsafe { libc::madvise(self.0.start as *mut libc::c_void, PAGE as usize, advice) }.into()).map(drop)
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        // SAFETY: the mapping that `map` made; nothing refers to it.
        unsafe { libc::munmap(self.0.start as *mut libc::c_void, PAGE as usize) };
    }
}

/// A mapping, and how often its address space had changed.
fn record(bytes: &[u8; RECORD]) -> (Record, u64) {
    let mut words = [0; WORDS];
    let (head, name) = bytes.split_at(WORDS * 8);
    words.iter_mut().zip(head.as_chunks().0).for_each(|(word, bytes)| *word = u64::from_ne_bytes(*bytes));
    let [start, end, flags, offset, modified, inode, device, changes] = words;
    let mut known = [0; NAME];
    known.copy_from_slice(name);
    (Record { start, end, flags, offset, modified: modified != 0, file: (inode, device), name: known }, changes)
}

/// r6 is the mapping, r7 the stream that is written to. A record is put together on the stack.
fn program(places: &Places) -> Vec<Instruction> {
    const LOAD: u8 = 0x79;
    const LOAD_HALF: u8 = 0x61;
    const STORE: u8 = 0x7b;
    const ZERO: u8 = 0x7a;
    const CALL: u8 = 0x85;
    const SET: u8 = 0xb7;
    const COPY: u8 = 0xbf;
    const ADD: u8 = 0x07;
    const IF_NONE: u8 = 0x15;
    const END: u8 = 0x95;
    let place = |word: usize| -(RECORD as i16) + 8 * word as i16;
    let load = |code, to, from, at| Instruction::new(code, to, from, at, 0);
    let keep = |from, word| Instruction::new(STORE, 10, from, place(word), 0);
    let mut tells = Vec::new();
    let members = [places.start, places.end, places.flags, places.offset, places.modified];
    for (word, member) in members.into_iter().enumerate() {
        tells.extend([load(LOAD, 2, 6, member), keep(2, word)]);
    }
    tells.extend([load(LOAD, 1, 6, places.memory), load(LOAD_HALF, 2, 1, places.changes), keep(2, 7)]);
    let file = [
        load(LOAD, 1, 1, places.inode),
        load(LOAD, 2, 1, places.number),
        keep(2, 5),
        load(LOAD, 1, 1, places.system),
        load(LOAD_HALF, 2, 1, places.device),
        keep(2, 6),
    ];
    tells.extend([load(LOAD, 1, 6, places.file), Instruction::new(IF_NONE, 1, 0, file.len() as i16, 0)]);
    tells.extend(file);
    if let Some((name, text)) = places.name {
        // bpf_probe_read_kernel_str(r1: to, r2: so many, r3: from)
        let read = [
            Instruction::new(ADD, 3, 0, 0, text.into()),
            Instruction::new(COPY, 1, 10, 0, 0),
            Instruction::new(ADD, 1, 0, 0, place(WORDS).into()),
            Instruction::new(SET, 2, 0, 0, NAME as i32),
            Instruction::new(CALL, 0, 0, 0, 115),
        ];
        tells.extend([load(LOAD, 3, 6, name), Instruction::new(IF_NONE, 3, 0, read.len() as i16, 0)]);
        tells.extend(read);
    }
    // The context: the stream among what there is to say of the call, the thread, the mapping; behind the last there is none.
    let mut program = vec![load(LOAD, 7, 1, 0), load(LOAD, 7, 7, 0), load(LOAD, 6, 1, 16)];
    program.extend((0..RECORD / 8).map(|word| Instruction::new(ZERO, 10, 0, place(word), 0)));
    program.push(Instruction::new(IF_NONE, 6, 0, tells.len() as i16, 0));
    program.extend(tells);
    program.extend([
        // bpf_seq_write(r1: the stream, r2: from, r3: so many)
        Instruction::new(COPY, 1, 7, 0, 0),
        Instruction::new(COPY, 2, 10, 0, 0),
        Instruction::new(ADD, 2, 0, 0, place(0).into()),
        Instruction::new(SET, 3, 0, 0, RECORD as i32),
        Instruction::new(CALL, 0, 0, 0, 127),
        Instruction::new(SET, 0, 0, 0, 0),
        Instruction::new(END, 0, 0, 0, 0),
    ]);
    program
}
