//! Threads that run code of other kinds: whose system calls come back to them, with segments of its own.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering::Relaxed};

use crate::stage::*;

pub(crate) const KINDS: &[crate::stage::Kind] = &[
    ("dispatched-calls", dispatched_calls),
    ("dispatched-calls-now", dispatched_calls_now),
    ("own-segments", own_segments),
];

const PR_SET_SYSCALL_USER_DISPATCH: u64 = 59;
const ON: u64 = 1;
const INCLUSIVE_ON: u64 = 2;

/// Whether system calls are made, or come back as signals: a byte for each thread.
static SELECTORS: [AtomicU8; 2] = [const { AtomicU8::new(0) }; 2];
const BLOCK: u8 = 1;

fn dispatch(mode: u64, code: std::ops::Range<u64>, selector: usize) -> Checked {
    let at = SELECTORS[selector].as_ptr() as u64;
    let args = [PR_SET_SYSCALL_USER_DISPATCH, mode, code.start, code.end - code.start, at];
    call("prctl", libc::SYS_prctl, args).map(drop)
}

/// How often a call came back.
static CAME_BACK: AtomicU32 = AtomicU32::new(0);

extern "C" fn comes_back(_: i32) {
    SELECTORS.iter().for_each(|selector| selector.store(0, Relaxed));
    CAME_BACK.fetch_add(1, Relaxed);
}

fn expect_calls() -> Checked {
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = comes_back as extern "C" fn(i32) as usize;
    done("sigaction", unsafe { libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) }).map(drop)
}

/// Makes a call that comes back.
fn call_in_vain(selector: usize) -> Checked {
    let before = CAME_BACK.load(Relaxed);
    SELECTORS[selector].store(BLOCK, Relaxed);
    unsafe { libc::syscall(libc::SYS_getppid) };
    equal("calls that came back", CAME_BACK.load(Relaxed), before + 1)?;
    check(unsafe { libc::getppid() } >= 0, "a call that is let through")
}

/// Threads that have calls come back to them as signals: all calls of one, those of some code of another, the others not.
fn dispatched_calls() -> Checked {
    expect_calls()?;
    let set_up = Gate::new()?;
    let thread = std::thread::spawn(move || -> Checked {
        // Of the lower half of the address space, where all of this is. Before Linux 6.17 there is no such thing.
        let inclusive = dispatch(INCLUSIVE_ON, 4096..1 << 47, 1).is_ok();
        set_up.open()?;
        await_go();
        if inclusive { call_in_vain(1) } else { Ok(()) }
    });
    set_up.pass(1)?;
    dispatch(ON, 0..0, 0)?;
    hold_loosely()?;
    thread.join().map_err(|_| "a thread has failed")??;
    call_in_vain(0)?;
    call("prctl", libc::SYS_prctl, [PR_SET_SYSCALL_USER_DISPATCH, 0, 0, 0, 0]).map(drop)
}

/// A thread that is in code whose calls come back to it.
fn dispatched_calls_now() -> Checked {
    static STOP: AtomicBool = AtomicBool::new(false);
    static RUNS: AtomicBool = AtomicBool::new(false);
    expect_calls()?;
    let thread = std::thread::spawn(|| -> Checked {
        dispatch(ON, 0..0, 0)?;
        SELECTORS[0].store(BLOCK, Relaxed);
        RUNS.store(true, Relaxed);
        while !STOP.load(Relaxed) {
            std::hint::spin_loop();
        }
        unsafe { libc::syscall(libc::SYS_getppid) };
        equal("calls that came back", CAME_BACK.load(Relaxed), 1)
    });
    until("a thread", || RUNS.load(Relaxed))?;
    hold_loosely()?;
    STOP.store(true, Relaxed);
    thread.join().map_err(|_| "a thread has failed")?
}

fn set_segment(mut description: [u32; 4]) -> Checked {
    let size = size_of_val(&description) as u64;
    call("modify_ldt", libc::SYS_modify_ldt, [0x11, description.as_mut_ptr() as u64, size]).map(drop)
}

fn segments() -> Result<Vec<u64>, String> {
    let mut entries = vec![0u64; 8192];
    call("modify_ldt", libc::SYS_modify_ldt, [0, entries.as_mut_ptr() as u64, 65536])?;
    Ok(entries)
}

/// What is at the beginning of the segment that `gs` has.
fn through_gs() -> u64 {
    let value;
    unsafe { std::arch::asm!("mov {}, gs:[0]", out(reg) value, options(nostack, readonly)) };
    value
}

/// Segments of 16-bit code and of data, the last that there can be, in use; others in a child, and none in another.
fn own_segments() -> Checked {
    const DATA: u32 = 0x2000_0000;
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    let at = DATA as usize as *mut libc::c_void;
    let mapped = unsafe { libc::mmap(at, 4096, protection, flags | libc::MAP_FIXED_NOREPLACE, -1, 0) };
    equal("where memory is", mapped, at)?;
    unsafe { mapped.cast::<u64>().write(77) };
    let set_up = Gate::new()?;
    let none = fork(|| {
        set_up.open()?;
        await_go();
        equal("segments", call("modify_ldt", libc::SYS_modify_ldt, [0, [0u64; 1].as_mut_ptr() as u64, 8])?, 0)
    })?;
    // struct user_desc: number, base, limit, flags.
    set_segment([3, 0x1000, 0xfff, 2 << 1])?;
    set_segment([8191, DATA, 0xfff, 1])?;
    let child = fork(|| {
        set_segment([5, 0x5000, 0xf_ffff, 1 | 1 << 3 | 1 << 4])?;
        set_segment([3, 0, 0, 1 << 3 | 1 << 5])?;
        let before = segments()?;
        set_up.open()?;
        await_go();
        equal("segments", segments()?, before)
    })?;
    let before = segments()?;
    set_up.pass(2)?;
    unsafe { std::arch::asm!("mov gs, {0:x}", in(reg) 8191u32 << 3 | 7, options(nostack)) };
    hold_loosely()?;
    equal("what is in a segment", through_gs(), 77)?;
    equal("segments", segments()?, before)?;
    unsafe { std::arch::asm!("mov gs, {0:x}", in(reg) 8191u32 << 3 | 7, options(nostack)) };
    equal("what is in a segment", through_gs(), 77)?;
    [none, child].into_iter().try_for_each(reap)
}
