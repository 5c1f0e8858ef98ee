//! The threads of a process, told by a program of a few instructions that the kernel calls with each of them (`bpf(2)`, an
//! iterator over `struct task_struct`, since Linux 6.1 of one process).

use std::io::{self, Read};
use std::os::fd::OwnedFd;

use super::bpf::{self, Instruction, Of};
use super::check;

/// Bytes that are told of a thread at most: they are put together on a stack of 512.
const MOST: usize = 384;
/// Where a record has the number of the thread, behind a word that only the program needs.
const NUMBER: usize = 8;
const HEAD: usize = 16;
/// Bytes of one read: the kernel gives less than so much, and whole records.
const AT_ONCE: usize = 64 << 10;

/// Where the members of the kernel's structures are, in bytes.
#[derive(Clone, Debug)]
pub struct Places {
    /// `task_struct.thread_pid`.
    pub pid: i32,
    /// Where in a `struct pid` the number is that counts for us.
    pub number: i32,
    /// What is told of a `struct task_struct`: where it is, and how many bytes it has.
    pub members: Vec<(i32, usize)>,
}

/// The program.
#[derive(Debug)]
pub struct Teller {
    program: OwnedFd,
    /// Where in a record each member is.
    at: Vec<usize>,
    record: usize,
}

impl Teller {
    /// Gives it to the kernel. `function` is the number of `bpf_iter_task` in the kernel's types.
    pub fn open(function: u32, places: &Places) -> io::Result<Teller> {
        let mut record = HEAD;
        let mut at = Vec::with_capacity(places.members.len());
        for (_, size) in &places.members {
            at.push(record);
            record += size.next_multiple_of(8);
        }
        if record > MOST {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let program = bpf::load_iterator(function, c"Dual MIT/GPL", &program(places, &at, record))?;
        Ok(Teller { program, at, record })
    }

    /// Calls `tell` with every thread of a process: its number, and the bytes of each member.
    pub fn read(&self, process: i32, mut tell: impl FnMut(i32, &dyn Fn(usize) -> u64)) -> io::Result<()> {
        let mut stream = bpf::iterate(&self.program, Of::Process(process))?;
        let (mut bytes, mut first) = (vec![0; AT_ONCE], None);
        loop {
            let length = stream.read(&mut bytes)?;
            for record in bytes[..length].chunks_exact(self.record) {
                let word = |at: usize| record[at..].first_chunk().map_or(0, |word| u64::from_ne_bytes(*word));
                let number = word(NUMBER) as i32;
                if first == Some(number) {
                    return Ok(());
                }
                first = first.or(Some(number));
                tell(number, &|member| word(self.at[member]));
            }
            if length == 0 {
                return Ok(());
            }
        }
    }
}

/// r6 is the thread, r7 the stream that is written to. A record is put together on the stack.
fn program(places: &Places, at: &[usize], record: usize) -> Vec<Instruction> {
    const LOAD: u8 = 0x79;
    const ZERO: u8 = 0x7a;
    const CALL: u8 = 0x85;
    const SET: u8 = 0xb7;
    const COPY: u8 = 0xbf;
    const ADD: u8 = 0x07;
    const IF_NONE: u8 = 0x15;
    const END: u8 = 0x95;
    let place = |at: usize| at as i16 - record as i16;
    let load = |to, from, at| Instruction::new(LOAD, to, from, at, 0);
    let on_stack = |register, at| {
        [Instruction::new(COPY, register, 10, 0, 0), Instruction::new(ADD, register, 0, 0, place(at).into())]
    };
    // bpf_probe_read_kernel(r1: to, r2: so many, r3: from), from so far behind what is in a register
    let copy = |to: usize, size: usize, from: u8, offset: i32| {
        let [base, further] = on_stack(1, to);
        [
            base,
            further,
            Instruction::new(SET, 2, 0, 0, size as i32),
            Instruction::new(COPY, 3, from, 0, 0),
            Instruction::new(ADD, 3, 0, 0, offset),
            Instruction::new(CALL, 0, 0, 0, 113),
        ]
    };
    let mut tells: Vec<Instruction> =
        (0..record).step_by(8).map(|at| Instruction::new(ZERO, 10, 0, place(at), 0)).collect();
    for (&(offset, size), &at) in places.members.iter().zip(at) {
        tells.extend(copy(at, size, 6, offset));
    }
    tells.extend(copy(0, 8, 6, places.pid));
    tells.push(load(8, 10, place(0)));
    tells.extend(copy(NUMBER, 4, 8, places.number));
    // bpf_seq_write(r1: the stream, r2: from, r3: so many)
    tells.push(Instruction::new(COPY, 1, 7, 0, 0));
    tells.extend(on_stack(2, 0));
    tells.extend([Instruction::new(SET, 3, 0, 0, record as i32), Instruction::new(CALL, 0, 0, 0, 127)]);
    // The context: the stream among what there is to say of the call, the thread; behind the last there is none.
    let mut program = vec![load(7, 1, 0), load(7, 7, 0), load(6, 1, 8)];
    program.push(Instruction::new(IF_NONE, 6, 0, tells.len() as i16, 0));
    program.extend(tells);
    program.extend([Instruction::new(SET, 0, 0, 0, 0), Instruction::new(END, 0, 0, 0, 0)]);
    program
}

/// Sets a switch of the calling thread (`prctl(2)`).
pub fn set_switch(option: i32, values: [i32; 2]) -> io::Result<()> {
    let [first, second] = values.map(libc::c_long::from);
    // SAFETY: with the options that there are callers for, the kernel reads and writes nothing of ours.
    check(unsafe { libc::prctl(option, first, second, 0 as libc::c_long, 0 as libc::c_long) }.into()).map(drop)
}
