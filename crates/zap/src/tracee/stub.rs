//! The machine code that runs a batch inside a tracee: position independent, about two hundred bytes.
//!
//! It walks an array of calls, raises the marker signal at itself, and, if nobody is there to see the marker (the tracer
//! died), loads the registers that the thread had and jumps home with `iretq`, which takes instruction pointer, flags and
//! stack pointer from memory at once. Not `rt_sigreturn`: that resets the kernel's state of an interrupted sleep.

use std::mem::offset_of;

/// One call as the stub reads it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct RawCall {
    pub(super) number: i64,
    pub(super) args: [u64; 6],
    /// Bits 0–5: argument N is the address of its value. Bit 8: stop when the call fails.
    pub(super) flags: u64,
    pub(super) result: i64,
}

/// Set in [`RawCall::flags`]: the batch ends when this call fails.
pub(super) const STOP_ON_FAILURE: u64 = 0x100;

/// What the stub needs to know; `rbx` points to it at entry.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Seat {
    /// First call and end of calls.
    pub(super) calls: u64,
    pub(super) calls_end: u64,
    /// Where the stub stopped: the address of the failed call, or `calls_end`.
    pub(super) reached: u64,
    /// The marker: tgkill(tgid, tid, signal), numbers as the tracee's PID namespace has them.
    pub(super) tgid: u64,
    pub(super) tid: u64,
    pub(super) signal: u64,
    /// The signal mask to go home with.
    pub(super) mask: u64,
    /// Registers to go home with.
    pub(super) r15: u64,
    pub(super) r14: u64,
    pub(super) r13: u64,
    pub(super) r12: u64,
    pub(super) rbp: u64,
    pub(super) rbx: u64,
    pub(super) r11: u64,
    pub(super) r10: u64,
    pub(super) r9: u64,
    pub(super) r8: u64,
    pub(super) rax: u64,
    pub(super) rcx: u64,
    pub(super) rdx: u64,
    pub(super) rsi: u64,
    pub(super) rdi: u64,
    /// The frame of `iretq`.
    pub(super) rip: u64,
    pub(super) cs: u64,
    pub(super) rflags: u64,
    pub(super) rsp: u64,
    pub(super) ss: u64,
    /// The scratch mapping, for whoever finds this seat in a vDSO after its maker died.
    pub(super) scratch: [u64; 2],
}

/// The stub, and the offset of its second entry: one call whose arguments are in the registers already.
#[derive(Debug)]
pub(super) struct Stub {
    pub(super) code: Vec<u8>,
    /// Entry for a single call with registers preset (`rbx` = seat); the result is in `rbp` at the marker.
    pub(super) single: u64,
}

struct Assembler {
    code: Vec<u8>,
}

impl Assembler {
    fn emit(&mut self, bytes: &[u8]) {
        self.code.extend_from_slice(bytes);
    }

    /// `mov reg64, [base + disp32]`; registers by their number, 0 = rax … 15 = r15.
    fn load(&mut self, register: u8, base: u8, displacement: usize) {
        self.memory(0x8b, register, base, displacement);
    }

    /// `mov [base + disp32], reg64`.
    fn store(&mut self, register: u8, base: u8, displacement: usize) {
        self.memory(0x89, register, base, displacement);
    }

    fn memory(&mut self, opcode: u8, register: u8, base: u8, displacement: usize) {
        let rex = 0x48 | (register >> 3) << 2 | (base >> 3);
        self.emit(&[rex, opcode, 0x80 | (register & 7) << 3 | (base & 7)]);
        if base & 7 == 4 {
            self.emit(&[0x24]);
        }
        self.emit(&(displacement as u32).to_le_bytes());
    }

    /// A two-byte-opcode conditional jump to be patched; where its displacement is.
    fn jump(&mut self, opcode: &[u8]) -> usize {
        self.emit(opcode);
        self.emit(&[0; 4]);
        self.code.len() - 4
    }

    fn here(&mut self, jump: usize) {
        self.to(jump, self.code.len());
    }

    fn to(&mut self, jump: usize, target: usize) {
        let distance = target as i64 - (jump + 4) as i64;
        self.code[jump..jump + 4].copy_from_slice(&(distance as i32).to_le_bytes());
    }
}

const RAX: u8 = 0;
const RCX: u8 = 1;
const RDX: u8 = 2;
const RBX: u8 = 3;
const RBP: u8 = 5;
const RSI: u8 = 6;
const RDI: u8 = 7;
const R8: u8 = 8;
const R10: u8 = 10;
const R12: u8 = 12;
const R13: u8 = 13;
const R14: u8 = 14;
const SYSCALL: &[u8] = &[0x0f, 0x05];
const JUMP: &[u8] = &[0xe9];
const JAE: &[u8] = &[0x0f, 0x83];
const JB: &[u8] = &[0x0f, 0x82];
const JZ: &[u8] = &[0x0f, 0x84];

/// Assembles the stub.
pub(super) fn assemble() -> Stub {
    let mut a = Assembler { code: Vec::new() };
    a.load(R12, RBX, offset_of!(Seat, calls));
    a.load(R13, RBX, offset_of!(Seat, calls_end));
    let next = a.code.len();
    a.emit(&[0x4d, 0x39, 0xec]); // cmp r12, r13
    let all_done = a.jump(JAE);
    a.load(R14, R12, offset_of!(RawCall, flags));
    for (index, register) in [RDI, RSI, RDX, R10, R8, 9].into_iter().enumerate() {
        a.load(register, R12, offset_of!(RawCall, args) + 8 * index);
        a.emit(&[0x41, 0xf6, 0xc6, 1 << index]); // test r14b, bit
        let direct = a.jump(JZ);
        a.load(register, register, 0);
        a.here(direct);
    }
    a.load(RAX, R12, offset_of!(RawCall, number));
    a.emit(SYSCALL);
    a.store(RAX, R12, offset_of!(RawCall, result));
    a.emit(&[0x48, 0x3d, 0x01, 0xf0, 0xff, 0xff]); // cmp rax, -4095
    let succeeded = a.jump(JB);
    a.emit(&[0x41, 0xf7, 0xc6, 0x00, 0x01, 0x00, 0x00]); // test r14d, STOP_ON_FAILURE
    let failed = {
        let go_on = a.jump(JZ);
        let failed = a.jump(JUMP);
        a.here(go_on);
        failed
    };
    a.here(succeeded);
    a.emit(&[0x49, 0x83, 0xc4, size_of::<RawCall>() as u8]); // add r12, sizeof(RawCall)
    let again = a.jump(JUMP);
    a.to(again, next);
    a.here(all_done);
    a.here(failed);
    a.store(R12, RBX, offset_of!(Seat, reached));
    let marker = a.jump(JUMP);

    let single = a.code.len() as u64;
    a.emit(SYSCALL);
    a.emit(&[0x48, 0x89, 0xc5]); // mov rbp, rax

    a.here(marker);
    a.load(RDI, RBX, offset_of!(Seat, tgid));
    a.load(RSI, RBX, offset_of!(Seat, tid));
    a.load(RDX, RBX, offset_of!(Seat, signal));
    a.emit(&[0xb8]);
    a.emit(&(libc::SYS_tgkill as u32).to_le_bytes()); // mov eax, tgkill
    a.emit(SYSCALL);

    // Nobody saw the marker: give the thread its signal mask and its registers back.
    a.emit(&[0xbf, 2, 0, 0, 0]); // mov edi, SIG_SETMASK
    a.emit(&[0x48, 0x8d, 0xb3]); // lea rsi, [rbx + mask]
    a.emit(&(offset_of!(Seat, mask) as u32).to_le_bytes());
    a.emit(&[0x31, 0xd2]); // xor edx, edx
    a.emit(&[0x41, 0xba, 8, 0, 0, 0]); // mov r10d, 8
    a.emit(&[0xb8]);
    a.emit(&(libc::SYS_rt_sigprocmask as u32).to_le_bytes());
    a.emit(SYSCALL);
    a.emit(&[0x48, 0x8d, 0xa3]); // lea rsp, [rbx + rip]
    a.emit(&(offset_of!(Seat, rip) as u32).to_le_bytes());
    let home = [
        (15, offset_of!(Seat, r15)),
        (14, offset_of!(Seat, r14)),
        (13, offset_of!(Seat, r13)),
        (12, offset_of!(Seat, r12)),
        (RBP, offset_of!(Seat, rbp)),
        (11, offset_of!(Seat, r11)),
        (10, offset_of!(Seat, r10)),
        (9, offset_of!(Seat, r9)),
        (8, offset_of!(Seat, r8)),
        (RAX, offset_of!(Seat, rax)),
        (RCX, offset_of!(Seat, rcx)),
        (RDX, offset_of!(Seat, rdx)),
        (RSI, offset_of!(Seat, rsi)),
        (RDI, offset_of!(Seat, rdi)),
        (RBX, offset_of!(Seat, rbx)),
    ];
    for (register, offset) in home {
        a.load(register, RBX, offset);
    }
    a.emit(&[0x48, 0xcf]); // iretq
    Stub { code: a.code, single }
}

/// Bytes of a seat with `calls` calls, without data.
pub(super) fn size(calls: usize) -> usize {
    size_of::<Seat>() + calls * size_of::<RawCall>()
}

/// The bytes of the stub, for a seed to bring along.
pub fn stub_code() -> Vec<u8> {
    assemble().code
}
