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
