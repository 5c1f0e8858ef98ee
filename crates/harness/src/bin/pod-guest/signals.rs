//! Signals: actions, masks, queues, alternate stacks.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crate::stage::*;

pub(crate) const KINDS: &[crate::stage::Kind] = &[
    ("actions", actions),
    ("action-works", action_works),
    ("pending", pending),
    ("pending-thread", pending_thread),
    ("pending-kinds", pending_kinds),
    ("pending-all", pending_all),
    ("many-signals", many_signals),
    ("all-handled", all_handled),
    ("all-preempted", all_preempted),
    ("signal-files", signal_files),
    ("alternate-stack", alternate_stack),
    ("in-handler", in_handler),
    ("autodisarm", autodisarm),
    ("sigsuspend", sigsuspend),
];

pub(crate) fn set(signals: &[i32]) -> libc::sigset_t {
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in signals {
            libc::sigaddset(&raw mut set, *signal);
        }
        set
    }
}

/// The kernel's form of a set.
pub(crate) fn bits(signals: &[i32]) -> u64 {
    signals.iter().map(|signal| 1 << (signal - 1)).sum()
}

/// Blocks these and no other.
pub(crate) fn block(signals: &[i32]) {
    let set = set(signals);
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut()) };
}

/// What this thread blocks.
pub(crate) fn blocked() -> u64 {
    let mut mask = 0u64;
    unsafe { libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_BLOCK, 0, &raw mut mask, 8) };
    mask
}

/// Takes one of these, which are blocked, as soon as it comes.
pub(crate) fn wait_for(signals: &[i32]) -> i32 {
    let set = set(signals);
    unsafe { libc::sigwaitinfo(&raw const set, std::ptr::null_mut()) }
}

/// Takes one of these if it is pending.
pub(crate) fn poll_for(signals: &[i32]) -> Option<i32> {
    let set = set(signals);
    let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    let signal = unsafe { libc::sigtimedwait(&raw const set, std::ptr::null_mut(), &raw const now) };
    (signal > 0).then_some(signal)
}

/// The kernel's `struct sigaction` of every signal.
fn all_actions() -> Vec<[u64; 4]> {
    let one = |signal: i32| {
        let mut action = [0u64; 4];
        unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, 0, action.as_mut_ptr(), 8) };
        action
    };
    (1..=64).map(one).collect()
}

fn put_action(signal: i32, action: [u64; 4]) -> Checked {
    call("rt_sigaction", libc::SYS_rt_sigaction, [signal as u64, action.as_ptr() as u64, 0, 8]).map(drop)
}

/// Handlers, ignored signals, every flag, masks.
fn actions() -> Checked {
    let flags = [
        libc::SA_ONSTACK,
        libc::SA_RESTART,
        libc::SA_NODEFER,
        libc::SA_RESETHAND,
        libc::SA_SIGINFO,
        libc::SA_NOCLDSTOP,
        libc::SA_NOCLDWAIT,
        0x800,
    ];
    for (i, flag) in flags.iter().enumerate() {
        put_action(libc::SIGRTMIN() + i as i32, [0x1000 + i as u64, *flag as u32 as u64 | 0x0400_0000, 0x77, 1 << i])?;
    }
    put_action(libc::SIGCHLD, [0x9000, libc::SA_NOCLDSTOP as u64 | 0x0400_0000, 0x78, u64::MAX >> 3 & !0x40100])?;
    put_action(libc::SIGHUP, [1, 0, 0, 0])?;
    put_action(libc::SIGPIPE, [0, libc::SA_RESTART as u64, 0, 0])?;
    put_action(64, [0x5000, 0x0400_0000, 0x79, 0])?;
    let before = all_actions();
    hold()?;
    equal("the signal actions", all_actions(), before)
}

static CAUGHT: AtomicU64 = AtomicU64::new(0);
static MASK_INSIDE: AtomicU64 = AtomicU64::new(0);
static ADDRESS_INSIDE: AtomicUsize = AtomicUsize::new(0);

extern "C" fn catch(signal: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let local = 0u8;
    ADDRESS_INSIDE.store(&raw const local as usize, Ordering::SeqCst);
    MASK_INSIDE.store(blocked(), Ordering::SeqCst);
    let value = unsafe { (*info).si_value().sival_ptr } as u64;
    CAUGHT.store((signal as u64) << 32 | value & 0xffff_ffff, Ordering::SeqCst);
}

fn handle(signal: i32, flags: i32, mask: &[i32]) -> Checked {
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = catch as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | flags;
    action.sa_mask = set(mask);
    done("sigaction", unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) }).map(drop)
}

fn queue(signal: i32, value: usize) -> Checked {
    let value = libc::sigval { sival_ptr: value as *mut libc::c_void };
    done("sigqueue", unsafe { libc::sigqueue(libc::getpid(), signal, value) }).map(drop)
}

/// A handler from before runs, with its mask, once if it was to be reset.
fn action_works() -> Checked {
    let signal = libc::SIGRTMIN() + 3;
    handle(signal, libc::SA_RESETHAND, &[libc::SIGUSR2])?;
    hold()?;
    queue(signal, 99)?;
    equal("what was caught", CAUGHT.load(Ordering::SeqCst), (signal as u64) << 32 | 99)?;
    equal("the mask inside", MASK_INSIDE.load(Ordering::SeqCst), bits(&[signal, libc::SIGUSR2]))?;
    equal("the handler afterwards", all_actions()[signal as usize - 1][0], 0)
}

type Taken = (i32, i32, usize, i32);

/// Takes a pending signal: number, code, value, sender.
fn take(signals: &[i32]) -> Option<Taken> {
    let set = set(signals);
    let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // Not the C library's, which tells of tgkill as if it were kill.
    let signal = unsafe { libc::syscall(libc::SYS_rt_sigtimedwait, &raw const set, &raw mut info, &raw const now, 8) };
    (signal > 0).then(|| unsafe { (signal as i32, info.si_code, info.si_value().sival_ptr as usize, info.si_pid()) })
}

/// Signals queued to the process: order, values, senders.
fn pending() -> Checked {
    let (low, high, usual) = (libc::SIGRTMIN() + 1, libc::SIGRTMIN() + 2, libc::SIGUSR1);
    let all = [low, high, usual, libc::SIGTERM];
    block(&all);
    let itself = unsafe { libc::getpid() };
    for value in 1..=3 {
        queue(high, value)?;
        queue(low, value + 10)?;
    }
    done("kill", unsafe { libc::kill(itself, usual) })?;
    done("kill", unsafe { libc::kill(itself, usual) })?;
    let child = fork(|| done("kill", unsafe { libc::kill(itself, libc::SIGTERM) }).map(drop))?;
    reap(child)?;
    hold()?;
    equal("a usual signal", take(&[usual]).map(|t| (t.0, t.1, t.3)), Some((usual, libc::SI_USER, itself)))?;
    equal(
        "a child's signal",
        take(&[libc::SIGTERM]).map(|t| (t.0, t.1, t.3)),
        Some((libc::SIGTERM, libc::SI_USER, child)),
    )?;
    for value in 1..=3 {
        equal("a queued signal", take(&[low]), Some((low, libc::SI_QUEUE, value + 10, itself)))?;
    }
    for value in 1..=3 {
        equal("a queued signal", take(&[low, high]), Some((high, libc::SI_QUEUE, value, itself)))?;
    }
    equal("what is left", take(&all), None)
}

/// Thousands of signals wait, to the process and to a thread.
fn many_signals() -> Checked {
    const MANY: usize = 3000;
    let (process, thread) = (libc::SIGRTMIN() + 1, libc::SIGRTMIN() + 2);
    block(&[process, thread]);
    let itself = unsafe { libc::pthread_self() };
    for number in 0..MANY {
        queue(process, number)?;
        let value = libc::sigval { sival_ptr: number as *mut libc::c_void };
        equal("queueing a signal", unsafe { libc::pthread_sigqueue(itself, thread, value) }, 0)?;
    }
    hold()?;
    for signal in [process, thread] {
        for number in 0..MANY {
            equal("a queued signal", take(&[signal]).map(|t| (t.0, t.2)), Some((signal, number)))?;
        }
    }
    equal("what is left", take(&[process, thread]), None)
}

/// Signals queued to one thread are for that thread alone.
fn pending_thread() -> Checked {
    let signal = libc::SIGRTMIN() + 5;
    block(&[signal, libc::SIGUSR2]);
    let set_up = Gate::new()?;
    let thread = std::thread::spawn(move || {
        let itself = unsafe { libc::pthread_self() };
        let value = libc::sigval { sival_ptr: 77 as *mut libc::c_void };
        unsafe { libc::pthread_sigqueue(itself, signal, value) };
        unsafe { libc::pthread_kill(itself, libc::SIGUSR2) };
        set_up.open()?;
        await_go();
        equal("a thread's queued signal", take(&[signal]).map(|t| (t.1, t.2)), Some((libc::SI_QUEUE, 77)))?;
        equal("a thread's signal", take(&[libc::SIGUSR2]).map(|t| t.1), Some(-6))?;
        equal("what is left", take(&[signal, libc::SIGUSR2]), None)
    });
    set_up.pass(1)?;
    hold()?;
    equal("another thread's signal", take(&[signal, libc::SIGUSR2]), None)?;
    thread.join().map_err(|_| "a thread panicked")?
}

/// Every signal that can be blocked waits, to the process and to a thread.
fn pending_all() -> Checked {
    let all: Vec<i32> = (1..=64).filter(|s| ![libc::SIGKILL, libc::SIGSTOP, 32, 33].contains(s)).collect();
    // A stop takes back what continues, and the other way round.
    let all: Vec<i32> =
        all.into_iter().filter(|s| ![libc::SIGCONT, libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU].contains(s)).collect();
    block(&all);
    let send = |set_up: Gate| -> Checked {
        let (process, thread) = unsafe { (libc::getpid() as u64, libc::gettid() as u64) };
        for signal in &all {
            call("tgkill", libc::SYS_tgkill, [process, thread, *signal as u64])?;
        }
        set_up.open()
    };
    let own = bits(&all);
    let set_up = Gate::new()?;
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            send(set_up)?;
            await_go();
            equal("what a thread has pending", blocked_pending() & own, own)?;
            all.iter().try_for_each(|signal| {
                equal("a thread's signal", take(&[*signal]).map(|t| (t.0, t.1)), Some((*signal, -6)))
            })
        });
        for signal in &all {
            done("kill", unsafe { libc::kill(libc::getpid(), *signal) })?;
        }
        set_up.pass(1)?;
        hold()?;
        thread.join().map_err(|_| "a thread panicked")??;
        equal("what is pending", blocked_pending() & own, own)?;
        all.iter().try_for_each(|signal| {
            equal("a signal", take(&[*signal]).map(|t| (t.0, t.1)), Some((*signal, libc::SI_USER)))
        })
    })
}

/// Signals that the kernel itself queues: a timer's, a child's stop, one to the leader alone.
fn pending_kinds() -> Checked {
    let signals = [libc::SIGALRM, libc::SIGCHLD, libc::SIGUSR2, libc::SIGPIPE];
    block(&signals);
    unsafe { libc::alarm(1) };
    let child = fork(|| {
        unsafe { libc::raise(libc::SIGSTOP) };
        Ok(())
    })?;
    call("tgkill", libc::SYS_tgkill, [std::process::id().into(), std::process::id().into(), libc::SIGUSR2 as u64])?;
    let pipe = Gate::new()?;
    unsafe { libc::close(pipe.read_end()) };
    check(pipe.open().is_err(), "a pipe without a reader took a byte")?;
    let pending = || blocked_pending() & bits(&signals);
    until("the signals", || pending() == bits(&signals))?;
    hold()?;
    equal("what is pending", pending(), bits(&signals))?;
    equal("an alarm", take(&[libc::SIGALRM]).map(|t| t.1), Some(libc::SI_KERNEL))?;
    equal("a child's stop", take(&[libc::SIGCHLD]).map(|t| (t.1, t.3)), Some((libc::CLD_STOPPED, child)))?;
    equal("the leader's own", take(&[libc::SIGUSR2]).map(|t| t.1), Some(-6))?;
    equal("a broken pipe", take(&[libc::SIGPIPE]).map(|t| t.0), Some(libc::SIGPIPE))?;
    unsafe { libc::kill(child, libc::SIGCONT) };
    reap(child)
}

/// The signals that came since [`handle_all`].
static SEEN: AtomicU64 = AtomicU64::new(0);

fn handle_all() -> Checked {
    extern "C" fn seen(signal: i32) {
        SEEN.fetch_or(1 << (signal - 1), Ordering::Relaxed);
    }
    for signal in (1..=64).filter(|s| ![libc::SIGKILL, libc::SIGSTOP, 32, 33].contains(s)) {
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = seen as extern "C" fn(i32) as usize;
        action.sa_flags = libc::SA_RESTART;
        done("sigaction", unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) })?;
    }
    Ok(())
}

/// A program that handles every signal, as those in Go do.
fn all_handled() -> Checked {
    handle_all()?;
    hold()?;
    equal("signals that came", SEEN.load(Ordering::Relaxed), 0)?;
    done("kill", unsafe { libc::kill(libc::getpid(), libc::SIGURG) })?;
    equal("signals that came", SEEN.load(Ordering::Relaxed), bits(&[libc::SIGURG]))
}

/// Threads of such a program preempt each other all the time, by the signal that Go has for that.
fn all_preempted() -> Checked {
    handle_all()?;
    // So much that it is copied while the program runs.
    let memory: Vec<u8> = (0..16 << 20).map(|at: u32| at as u8).collect();
    let (pid, count) = (std::process::id() as i32, 9);
    let threads = std::sync::Mutex::new(vec![pid]);
    std::thread::scope(|scope| {
        let preempt = || -> Checked {
            threads.lock().map_err(|e| e.to_string())?.push(unsafe { libc::gettid() });
            while !std::path::Path::new(ON).exists() {
                let all = threads.lock().map_err(|e| e.to_string())?.clone();
                // Who has gone on may have ended.
                for thread in all {
                    unsafe { libc::syscall(libc::SYS_tgkill, pid, thread, libc::SIGURG) };
                }
                // They are more than there are processors: signals wait for those that have none.
                // And they are in the vDSO for most of the time.
                let begun = std::time::Instant::now();
                while begun.elapsed() < std::time::Duration::from_millis(1) {}
            }
            Ok(())
        };
        let all: Vec<_> = (1..count).map(|_| scope.spawn(preempt)).collect();
        until("the threads", || threads.lock().is_ok_and(|threads| threads.len() == count))?;
        hold_loosely()?;
        all.into_iter().try_for_each(|thread| thread.join().map_err(|_| "a thread panicked")?)
    })?;
    check(memory.iter().zip(0u32..).all(|(byte, at)| *byte == at as u8), "memory has changed")?;
    equal("signals that came", SEEN.load(Ordering::Relaxed), bits(&[libc::SIGURG]))
}

/// Threads of two processes wait at an epoll for a file that reads signals: each is told of those of its own process.
fn signal_files() -> Checked {
    let set_up = Gate::new()?;
    let child = fork(|| {
        wait_for_signals(|_| {
            set_up.open()?;
            await_go();
            Ok(())
        })
    })?;
    set_up.pass(1)?;
    wait_for_signals(|waiting| {
        until_asleep(waiting)?;
        hold()
    })?;
    reap(child)
}

fn wait_for_signals(meanwhile: impl FnOnce(i32) -> Checked) -> Checked {
    block(&[libc::SIGUSR1, libc::SIGURG]);
    let set = bits(&[libc::SIGUSR1, libc::SIGURG]);
    let flags = (libc::SFD_NONBLOCK | libc::SFD_CLOEXEC) as u64;
    let file = call("signalfd4", libc::SYS_signalfd4, [-1i64 as u64, &raw const set as u64, 8, flags])? as i32;
    let epoll = done("epoll_create1", unsafe { libc::epoll_create1(0) })? as i32;
    let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: 17 };
    done("epoll_ctl", unsafe { libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, file, &raw mut event) })?;
    let number = std::sync::atomic::AtomicI32::new(0);
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| -> Checked {
            number.store(unsafe { libc::gettid() }, std::sync::atomic::Ordering::Relaxed);
            let mut event = libc::epoll_event { events: 0, u64: 0 };
            let ready = done("epoll_wait", unsafe { libc::epoll_wait(epoll, &raw mut event, 1, 20_000) })?;
            equal("what an epoll tells", (ready, { event.u64 }), (1, 17))?;
            let mut info = [0u8; 128];
            let length = unsafe { libc::read(file, info.as_mut_ptr().cast(), info.len()) };
            equal("what there is to read", length, 128)?;
            equal("the signal", i32::from(info[0]), libc::SIGURG)
        });
        until("a thread to begin", || number.load(std::sync::atomic::Ordering::Relaxed) != 0)?;
        meanwhile(number.load(std::sync::atomic::Ordering::Relaxed))?;
        done("kill", unsafe { libc::kill(libc::getpid(), libc::SIGURG) })?;
        thread.join().map_err(|_| "a thread panicked")?
    })
}

fn blocked_pending() -> u64 {
    let mut pending = 0u64;
    unsafe { libc::syscall(libc::SYS_rt_sigpending, &raw mut pending, 8) };
    pending
}

fn stack_now() -> libc::stack_t {
    let mut stack: libc::stack_t = unsafe { std::mem::zeroed() };
    unsafe { libc::sigaltstack(std::ptr::null(), &raw mut stack) };
    stack
}

/// Gives this thread an alternate stack; its addresses.
fn new_stack(flags: i32) -> Result<std::ops::Range<usize>, String> {
    let memory = vec![0u8; 1 << 16].leak();
    let stack = libc::stack_t { ss_sp: memory.as_mut_ptr().cast(), ss_flags: flags, ss_size: memory.len() };
    done("sigaltstack", unsafe { libc::sigaltstack(&raw const stack, std::ptr::null_mut()) })?;
    Ok(memory.as_ptr_range().start as usize..memory.as_ptr_range().end as usize)
}

/// Every thread's own alternate stack.
fn alternate_stack() -> Checked {
    let one = || -> Checked {
        let stack = new_stack(0)?;
        await_go();
        let now = stack_now();
        equal("the alternate stack", (now.ss_sp as usize, now.ss_flags, now.ss_size), (stack.start, 0, stack.len()))?;
        handle(libc::SIGUSR1, libc::SA_ONSTACK, &[])?;
        unsafe { libc::raise(libc::SIGUSR1) };
        check(stack.contains(&ADDRESS_INSIDE.load(Ordering::SeqCst)), "the handler ran on another stack")
    };
    let thread = std::thread::spawn(move || {
        let stack = new_stack(0)?;
        await_go();
        equal("a thread's alternate stack", stack_now().ss_sp as usize, stack.start)
    });
    hold_loosely()?;
    thread.join().map_err(|_| "a thread panicked")??;
    one()
}

extern "C" fn hold_inside(_: i32) {
    let before = (stack_now().ss_flags, blocked());
    let result = hold().and_then(|()| equal("stack flags and mask inside", (stack_now().ss_flags, blocked()), before));
    if let Err(differs) = result {
        println!("inside the handler: {differs}");
        unsafe { libc::_exit(1) };
    }
}

/// Held while a handler runs on the alternate stack.
fn in_handler() -> Checked {
    let stack = new_stack(0)?;
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = hold_inside as *const () as usize;
    action.sa_flags = libc::SA_ONSTACK;
    action.sa_mask = set(&[libc::SIGUSR2]);
    done("sigaction", unsafe { libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut()) })?;
    unsafe { libc::raise(libc::SIGUSR1) };
    equal("the mask afterwards", blocked(), 0)?;
    equal("the stack afterwards", (stack_now().ss_sp as usize, stack_now().ss_flags), (stack.start, 0))
}

/// A stack that disarms itself while it is used.
fn autodisarm() -> Checked {
    const SS_AUTODISARM: i32 = 1 << 31;
    let stack = new_stack(SS_AUTODISARM)?;
    hold()?;
    let now = stack_now();
    equal("the stack", (now.ss_sp as usize, now.ss_flags), (stack.start, SS_AUTODISARM))
}

/// A mask that is in force only while sigsuspend waits.
fn sigsuspend() -> Checked {
    let set_up = Gate::new()?;
    let child = fork(|| {
        handle(libc::SIGUSR1, 0, &[])?;
        block(&[libc::SIGUSR1, libc::SIGHUP]);
        set_up.open()?;
        let others = set(&[libc::SIGTERM]);
        equal("sigsuspend", unsafe { libc::sigsuspend(&raw const others) }, -1)?;
        equal("what was caught", CAUGHT.load(Ordering::SeqCst) >> 32, libc::SIGUSR1 as u64)?;
        equal("the mask afterwards", blocked(), bits(&[libc::SIGUSR1, libc::SIGHUP]))
    })?;
    set_up.pass(1)?;
    until_asleep(child)?;
    hold()?;
    unsafe { libc::kill(child, libc::SIGUSR1) };
    reap(child)
}
