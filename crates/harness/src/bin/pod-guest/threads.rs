//! Threads: hundreds of them, each with things of its own, blocked or running.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Barrier, Condvar, Mutex};

use crate::stage::*;

pub(crate) const KINDS: &[crate::stage::Kind] = &[
    ("threads", threads),
    ("thread-ids", thread_ids),
    ("rseq", rseq),
    ("robust-list", robust_list),
    ("robust-death", robust_death),
    ("joining", joining),
    ("thread-credentials", thread_credentials),
];

const COUNT: u32 = 200;

thread_local! {
    static OWN: Cell<u64> = const { Cell::new(0) };
}

/// What the threads wait for.
struct Shared {
    set_up: Barrier,
    go: AtomicBool,
    told: Mutex<bool>,
    tell: Condvar,
    pipe: Gate,
}

fn threads() -> Checked {
    let shared = Arc::new(Shared {
        set_up: Barrier::new(COUNT as usize + 1),
        go: AtomicBool::new(false),
        told: Mutex::new(false),
        tell: Condvar::new(),
        pipe: Gate::new()?,
    });
    let spawn = |number| {
        let shared = Arc::clone(&shared);
        std::thread::spawn(move || one_of_many(number, &shared))
    };
    let handles: Vec<_> = (0..COUNT).map(spawn).collect();
    shared.set_up.wait();
    hold()?;
    shared.go.store(true, Ordering::SeqCst);
    *shared.told.lock().map_err(|e| e.to_string())? = true;
    shared.tell.notify_all();
    (0..COUNT).try_for_each(|_| shared.pipe.open())?;
    handles.into_iter().try_for_each(|handle| handle.join().map_err(|_| "a thread panicked")?)
}

fn one_of_many(number: u32, shared: &Shared) -> Checked {
    let on_stack = std::hint::black_box(u64::from(number) * 0x0101_0101);
    let name = format!("thread {number}");
    OWN.set(u64::from(number) + 7);
    let blocked = [libc::SIGRTMIN() + (number % 20) as i32];
    crate::signals::block(&blocked);
    done("prctl", unsafe {
        libc::prctl(libc::PR_SET_NAME, std::ffi::CString::new(name.clone()).unwrap_or_default().as_ptr())
    })?;
    let (id, itself) = (unsafe { libc::gettid() }, unsafe { libc::pthread_self() });
    shared.set_up.wait();
    wait_somehow(number, shared)?;
    equal("a thread's own value", OWN.get(), u64::from(number) + 7)?;
    equal("a value on the stack", std::hint::black_box(on_stack), u64::from(number) * 0x0101_0101)?;
    equal("a thread's id", (unsafe { libc::gettid() }, unsafe { libc::pthread_self() }), (id, itself))?;
    let comm = read("/proc/thread-self/comm")?;
    equal("a thread's name", comm.trim_end(), &name)?;
    equal("a thread's mask", crate::signals::blocked(), crate::signals::bits(&blocked))
}

/// A few spin; most wait in one call or another.
fn wait_somehow(number: u32, shared: &Shared) -> Checked {
    match number % 4 {
        0 => shared.pipe.pass(1),
        1 => until("the word to go", || shared.go.load(Ordering::SeqCst)),
        _ if number == 2 => {
            while !shared.go.load(Ordering::SeqCst) {
                std::hint::spin_loop();
            }
            Ok(())
        }
        _ => {
            let told = shared.told.lock().map_err(|e| e.to_string())?;
            let woken = shared.tell.wait_while(told, |told| !*told).map_err(|e| e.to_string())?;
            drop(woken);
            Ok(())
        }
    }
}

/// Threads as `/proc` lists them, and signals to one of them.
fn thread_ids() -> Checked {
    let list = || -> Result<Vec<String>, String> {
        let entries = std::fs::read_dir("/proc/self/task").map_err(|e| e.to_string())?.flatten();
        let mut ids: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        ids.sort();
        Ok(ids)
    };
    crate::signals::block(&[libc::SIGUSR1]);
    let id = Arc::new(AtomicU32::new(0));
    let target = {
        let id = Arc::clone(&id);
        std::thread::spawn(move || {
            id.store(unsafe { libc::gettid() } as u32, Ordering::SeqCst);
            crate::signals::wait_for(&[libc::SIGUSR1])
        })
    };
    until("the thread", || id.load(Ordering::SeqCst) != 0)?;
    let before = list()?;
    hold()?;
    equal("the threads", list()?, before)?;
    let itself = u64::from(std::process::id());
    call("tgkill", libc::SYS_tgkill, [itself, id.load(Ordering::SeqCst).into(), libc::SIGUSR1 as u64])?;
    equal("the signal", target.join().map_err(|_| "a thread panicked")?, libc::SIGUSR1)
}

unsafe extern "C" {
    static __rseq_offset: isize;
    static __rseq_size: u32;
}

/// The CPU number that the kernel writes into this thread's rseq area.
fn rseq_cpu() -> u32 {
    let base: usize;
    unsafe {
        std::arch::asm!("mov {}, fs:0", out(reg) base);
        ((base as isize + __rseq_offset + 4) as *const u32).read_volatile()
    }
}

fn stay_on(cpu: usize) -> Checked {
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    unsafe { libc::CPU_SET(cpu, &mut set) };
    done("sched_setaffinity", unsafe { libc::sched_setaffinity(0, size_of_val(&set), &raw const set) }).map(drop)
}

/// The kernel goes on writing the CPU number into the registered area.
fn rseq() -> Checked {
    check(unsafe { __rseq_size } > 0, "the C library registered no rseq area")?;
    hold()?;
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    for cpu in (0..cpus).chain((0..cpus).rev()) {
        stay_on(cpu)?;
        equal("the CPU in the rseq area", rseq_cpu() as usize, cpu)?;
    }
    Ok(())
}

fn list_of(thread: u64) -> Result<(u64, u64), String> {
    let (mut head, mut length) = (0u64, 0u64);
    call("get_robust_list", libc::SYS_get_robust_list, [thread, &raw mut head as u64, &raw mut length as u64])?;
    Ok((head, length))
}

fn robust_list() -> Checked {
    let before = list_of(0)?;
    check(before.0 != 0, "no robust list")?;
    hold()?;
    equal("the robust list", list_of(0)?, before)
}

/// A mutex in shared memory whose holder dies after the restart: the next one is told.
fn robust_death() -> Checked {
    let mutex = crate::memory::shared(4096)?.cast::<libc::pthread_mutex_t>();
    unsafe {
        let mut kind: libc::pthread_mutexattr_t = std::mem::zeroed();
        libc::pthread_mutexattr_init(&raw mut kind);
        libc::pthread_mutexattr_setpshared(&raw mut kind, libc::PTHREAD_PROCESS_SHARED);
        libc::pthread_mutexattr_setrobust(&raw mut kind, libc::PTHREAD_MUTEX_ROBUST);
        libc::pthread_mutex_init(mutex, &raw const kind);
    }
    let set_up = Gate::new()?;
    let holder = fork(|| {
        equal("locking", unsafe { libc::pthread_mutex_lock(mutex) }, 0)?;
        set_up.open()?;
        await_go();
        Ok(())
    })?;
    set_up.pass(1)?;
    let waiter = fork(|| {
        set_up.open()?;
        equal("the lock of a dead holder", unsafe { libc::pthread_mutex_lock(mutex) }, libc::EOWNERDEAD)
    })?;
    set_up.pass(1)?;
    until_asleep(waiter)?;
    hold()?;
    reap(holder)?;
    reap(waiter)
}

/// A thread that waits for another to end: the kernel clears its tid where it was told to.
fn joining() -> Checked {
    let set_up = Gate::new()?;
    let worker = std::thread::spawn(move || {
        let opened = set_up.open();
        await_go();
        opened
    });
    let joiner = std::thread::spawn(move || {
        let opened = set_up.open();
        opened.is_ok() && matches!(worker.join(), Ok(Ok(())))
    });
    set_up.pass(2)?;
    hold()?;
    check(joiner.join().is_ok_and(|joined| joined), "a thread was not joined")
}

/// Whether this thread could ever have a capability.
fn could_have(capability: u64) -> Result<bool, String> {
    Ok(call("PR_CAPBSET_READ", libc::SYS_prctl, [libc::PR_CAPBSET_READ as u64, capability, 0])? == 1)
}

fn drop_capability(capability: u64) -> Checked {
    call("PR_CAPBSET_DROP", libc::SYS_prctl, [libc::PR_CAPBSET_DROP as u64, capability, 0]).map(drop)
}

/// Credentials, bounding sets and personalities belong to threads, as far as the kernel is concerned.
fn thread_credentials() -> Checked {
    const CHOWN: u64 = 0;
    const KILL: u64 = 5;
    let ready = Arc::new(AtomicBool::new(false));
    let other = {
        let ready = Arc::clone(&ready);
        std::thread::spawn(move || {
            drop_capability(CHOWN)?;
            call("personality", libc::SYS_personality, [libc::ADDR_NO_RANDOMIZE as u64, 0, 0])?;
            call("setresuid", libc::SYS_setresuid, [u64::MAX, 1234, u64::MAX])?;
            ready.store(true, Ordering::SeqCst);
            await_go();
            equal("the user of a thread", unsafe { libc::syscall(libc::SYS_geteuid) }, 1234)?;
            equal("what a thread could have", (could_have(CHOWN)?, could_have(KILL)?), (false, true))?;
            equal("a thread's personality", unsafe { libc::personality(u32::MAX.into()) }, libc::ADDR_NO_RANDOMIZE)
        })
    };
    until("the thread", || ready.load(Ordering::SeqCst))?;
    drop_capability(KILL)?;
    hold()?;
    equal("what the first thread could have", (could_have(CHOWN)?, could_have(KILL)?), (true, false))?;
    equal("the personality of the process", unsafe { libc::personality(u32::MAX.into()) }, 0)?;
    equal("the user of the process", unsafe { libc::geteuid() }, 0)?;
    other.join().map_err(|_| "a thread panicked")?
}
