//! System calls that a hold interrupted: how a thread goes on as if nothing had been.
//!
//! The kernel restarts most by itself when it finds the original registers (`rax` = -ERESTART…, `orig_rax` = the number).
//! Some return a plain EINTR to whatever interrupts them; those are rewound here.

use crate::sys::ptrace::Registers;

const ERESTARTSYS: i64 = -512;
const ERESTARTNOINTR: i64 = -513;
const ERESTARTNOHAND: i64 = -514;
const ERESTART_RESTARTBLOCK: i64 = -516;
const EINTR: i64 = -4;

/// Whether the thread is inside a system call.
pub fn in_system_call(registers: &Registers) -> bool {
    registers.orig_rax as i64 >= 0
}

/// Whether the call returned an EINTR that only the hold can have caused, if no signal waits to be delivered.
pub(super) fn needs_rewind(registers: &Registers) -> bool {
    in_system_call(registers) && registers.rax as i64 == EINTR && returns_bare_eintr(registers.orig_rax as i64)
}

fn returns_bare_eintr(number: i64) -> bool {
    matches!(
        number,
        libc::SYS_epoll_wait
            | libc::SYS_epoll_pwait
            | libc::SYS_epoll_pwait2
            | libc::SYS_rt_sigtimedwait
            | libc::SYS_semop
            | libc::SYS_semtimedop
            | libc::SYS_io_getevents
            | 333 // io_pgetevents
            | libc::SYS_recvfrom
            | libc::SYS_recvmsg
            | libc::SYS_recvmmsg
            | libc::SYS_read
            | libc::SYS_readv
            | libc::SYS_accept
            | libc::SYS_accept4
            | libc::SYS_connect
            | libc::SYS_sendto
            | libc::SYS_sendmsg
            | libc::SYS_write
            | libc::SYS_writev
    )
}

/// Makes the thread issue its call again.
pub(super) fn rewind(registers: &mut Registers) {
    registers.rip -= 2;
    registers.rax = registers.orig_rax;
    registers.orig_rax = u64::MAX;
}

/// The registers for a thread that nobody sees home (its tracer died): the kernel's own restart does not apply there.
pub(super) fn orphan(registers: &Registers) -> Registers {
    let mut home = *registers;
    if in_system_call(registers) {
        match registers.rax as i64 {
            ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND => rewind(&mut home),
            ERESTART_RESTARTBLOCK => {
                home.rip -= 2;
                home.rax = libc::SYS_restart_syscall as u64;
            }
            _ => {}
        }
    }
    home
}

/// Of a thread in a `connect(2)` that the kernel will make again: the descriptor, and the registers after it has succeeded.
pub fn connecting(registers: &Registers) -> Option<(i32, Registers)> {
    let is_to_be = registers.orig_rax as i64 == libc::SYS_connect && registers.rax as i64 == ERESTARTSYS;
    is_to_be.then_some((registers.rdi as i32, Registers { rax: 0, orig_rax: u64::MAX, ..*registers }))
}

/// The registers of a thread with the number of the call that it is in. A call of those that the kernel goes on with
/// (`ERESTART_RESTARTBLOCK`) has lost it once it was interrupted, by an earlier hold or a stop signal: what the thread is in then
/// is `restart_syscall`, which means nothing to another thread. `read` reads the thread's memory, and says whether it could.
pub fn named(registers: &Registers, read: &dyn Fn(u64, &mut [u8]) -> bool) -> Registers {
    let is_lost =
        registers.orig_rax as i64 == libc::SYS_restart_syscall && registers.rax as i64 == ERESTART_RESTARTBLOCK;
    let call = if is_lost { lost_call(registers, read) } else { None };
    Registers { orig_rax: call.map_or(registers.orig_rax, |number| number as u64), ..*registers }
}

/// Which call it was, of the four that there are: nearly always the instruction before `syscall` says so, else what the
/// registers can mean.
fn lost_call(registers: &Registers, read: &dyn Fn(u64, &mut [u8]) -> bool) -> Option<i64> {
    const CALLS: [i64; 4] = [libc::SYS_poll, libc::SYS_nanosleep, libc::SYS_clock_nanosleep, libc::SYS_futex];
    // mov $number, %eax; syscall
    let mut code = [0; 7];
    if read(registers.rip.wrapping_sub(7), &mut code)
        && let [0xb8, a, b, c, d, 0x0f, 0x05] = code
    {
        let number = i64::from(u32::from_le_bytes([a, b, c, d]));
        if CALLS.contains(&number) {
            return Some(number);
        }
    }
    let is_there = |address: u64| address != 0 && read(address, &mut [0]);
    let is_time = |address: u64| {
        let mut time = [0; 16];
        if address == 0 || !read(address, &mut time) {
            return false;
        }
        let [seconds, rest] = [0, 8].map(|at| time[at..].first_chunk().map_or(-1, |word| i64::from_ne_bytes(*word)));
        seconds >= 0 && (0..1_000_000_000).contains(&rest)
    };
    let (clock, command) = (registers.rdi as i32, registers.rsi as i32);
    // Clocks of threads and processes have negative numbers.
    let is_clock = clock < 64 && matches!(registers.rdi >> 32, 0 | 0xffff_ffff);
    if is_clock && registers.rsi == 0 && is_time(registers.rdx) {
        return Some(libc::SYS_clock_nanosleep);
    }
    let plain = command & !(libc::FUTEX_PRIVATE_FLAG | libc::FUTEX_CLOCK_REALTIME);
    let waits = matches!(plain, libc::FUTEX_WAIT | libc::FUTEX_WAIT_BITSET) && registers.rsi >> 32 == 0;
    if waits && registers.rdi.is_multiple_of(4) && is_there(registers.rdi) && is_time(registers.r10) {
        return Some(libc::SYS_futex);
    }
    if is_time(registers.rdi) && (registers.rsi == 0 || is_there(registers.rsi)) {
        return Some(libc::SYS_nanosleep);
    }
    let is_poll = registers.rsi as u32 == 0 || is_there(registers.rdi);
    is_poll.then_some(libc::SYS_poll)
}

/// The registers that a *restarted* thread begins with: it has no kernel state of an interrupted sleep.
///
/// A relative sleep goes on with what remained, which the kernel wrote where the program asked for it; where the program
/// did not ask, or the kernel does not tell (`poll`, relative futex waits), the wait starts afresh.
pub fn restarted(registers: &Registers) -> Registers {
    let mut home = *registers;
    if !in_system_call(registers) || registers.rax as i64 != ERESTART_RESTARTBLOCK {
        return home;
    }
    match registers.orig_rax as i64 {
        libc::SYS_nanosleep if registers.rsi != 0 => home.rdi = registers.rsi,
        libc::SYS_clock_nanosleep if registers.r10 != 0 => home.rdx = registers.r10,
        _ => {}
    }
    // As the kernel treats it: begun again unless a handler runs first, which is told EINTR.
    home.rax = ERESTARTNOHAND as u64;
    home
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What was asked for is found by the code, and without it by what registers can mean.
    #[test]
    fn a_call_that_has_lost_its_number_is_named_again() {
        // A time and a place of code lie there; nothing else can be read but small pieces of data.
        const TIME: u64 = 0x1000;
        const CODE: u64 = 0x2000;
        const DATA: u64 = 0x3000;
        let named = |code: &[u8; 7], [rdi, rsi, rdx, r10]: [u64; 4]| {
            let read = |at: u64, into: &mut [u8]| {
                match at {
                    TIME => into.fill(0),
                    DATA => into.fill(0xff),
                    _ if at == CODE - 7 => into.copy_from_slice(code),
                    _ => return false,
                }
                true
            };
            let registers = Registers {
                rdi,
                rsi,
                rdx,
                r10,
                rip: CODE,
                orig_rax: libc::SYS_restart_syscall as u64,
                rax: ERESTART_RESTARTBLOCK as u64,
                ..crate::sys::ptrace::registers_from_words(&[0; 27])
            };
            super::named(&registers, &read).orig_rax as i64
        };
        let silent = &[0x48, 0x89, 0xf8, 0x90, 0x90, 0x0f, 0x05];
        assert_eq!(named(&[0xb8, 7, 0, 0, 0, 0x0f, 0x05], [TIME, 0, 0, 0]), libc::SYS_poll);
        assert_eq!(named(silent, [TIME, 0, 0, 0]), libc::SYS_nanosleep);
        assert_eq!(named(silent, [TIME, TIME, 0, 0]), libc::SYS_nanosleep);
        assert_eq!(named(silent, [1, 0, TIME, 0]), libc::SYS_clock_nanosleep);
        assert_eq!(named(silent, [DATA, 137, 2, TIME]), libc::SYS_futex);
        assert_eq!(named(silent, [DATA, 0, 2, TIME]), libc::SYS_futex);
        assert_eq!(named(silent, [DATA, 137, 2, 0]), libc::SYS_poll);
        assert_eq!(named(silent, [0, 0, 1000, 0]), libc::SYS_poll);
    }

    #[test]
    fn a_connection_that_is_there_ends_the_call_that_asked_for_it() {
        let in_call = |number: i64, result: i64| Registers {
            orig_rax: number as u64,
            rax: result as u64,
            rdi: 7,
            ..crate::sys::ptrace::registers_from_words(&[0; 27])
        };
        let (number, returned) = connecting(&in_call(libc::SYS_connect, ERESTARTSYS)).unwrap();
        assert_eq!((number, returned.rax, in_system_call(&returned)), (7, 0, false));
        assert!(connecting(&in_call(libc::SYS_connect, EINTR)).is_none());
        assert!(connecting(&in_call(libc::SYS_read, ERESTARTSYS)).is_none());
    }
}
