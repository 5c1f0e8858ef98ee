//! Switches that a process or thread has set for itself.

use crate::stage::*;

pub(crate) const KINDS: &[crate::stage::Kind] = &[
    ("cpu-affinity", cpu_affinity),
    ("io-priority", io_priority),
    ("timer-slack", timer_slack),
    ("speculation", speculation),
    ("memory-policy", memory_policy),
    ("memory-policy-ranges", memory_policy_ranges),
    ("memory-barriers", memory_barriers),
    ("write-or-execute", write_or_execute),
    ("machine-checks", machine_checks),
    ("time-stamps", time_stamps),
    ("sealed-memory", sealed_memory),
];

fn prctl(option: i32, args: [u64; 4]) -> Result<i64, String> {
    let [a, b, c, d] = args;
    call("prctl", libc::SYS_prctl, [option as u64, a, b, c, d])
}

/// In the first thread, in another that sets its own, and in a child: what `read` says stays.
fn stays<T: PartialEq + std::fmt::Debug + Send + 'static>(
    first: impl FnOnce() -> Checked,
    second: impl FnOnce() -> Checked + Send + 'static,
    read: fn() -> Result<T, String>,
) -> Checked {
    first()?;
    let before = read()?;
    let (sender, receiver) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || -> Checked {
        let own = second().and_then(|()| read());
        let _ = sender.send(own.as_ref().map(drop).map_err(Clone::clone));
        await_go();
        equal("in the other thread", read()?, own?)
    });
    receiver.recv().map_err(|e| e.to_string())??;
    hold()?;
    equal("in the first thread", read()?, before)?;
    thread.join().map_err(|_| "the thread failed")?
}

fn cpu_affinity() -> Checked {
    let read = || {
        let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
        done("get", unsafe { libc::sched_getaffinity(0, size_of_val(&set), &raw mut set) })?;
        Ok((0..1024).filter(|cpu| unsafe { libc::CPU_ISSET(*cpu, &set) }).collect::<Vec<_>>())
    };
    let only_first = || {
        let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
        unsafe { libc::CPU_SET(0, &mut set) };
        done("set", unsafe { libc::sched_setaffinity(0, size_of_val(&set), &raw const set) }).map(drop)
    };
    stays(|| Ok(()), only_first, read)
}

fn io_priority() -> Checked {
    let set = |priority: u64| move || call("ioprio_set", libc::SYS_ioprio_set, [1, 0, priority]).map(drop);
    stays(set(2 << 13 | 6), set(3 << 13), || call("ioprio_get", libc::SYS_ioprio_get, [1, 0]))
}

fn timer_slack() -> Checked {
    let set = |ns: u64| move || prctl(libc::PR_SET_TIMERSLACK, [ns, 0, 0, 0]).map(drop);
    stays(set(123_456), set(7_000), || prctl(libc::PR_GET_TIMERSLACK, [0; 4]))
}

/// Store bypass and indirect branches, where the host lets them be controlled.
fn speculation() -> Checked {
    const DISABLE: u64 = 4;
    const FORCE_DISABLE: u64 = 8;
    let read = || Ok([0, 1, 2].map(|which| prctl(libc::PR_GET_SPECULATION_CTRL, [which, 0, 0, 0]).unwrap_or(-1)));
    let set = |to: u64| {
        move || {
            for which in [0, 1] {
                if prctl(libc::PR_GET_SPECULATION_CTRL, [which, 0, 0, 0]).is_ok_and(|now| now & 1 != 0) {
                    prctl(libc::PR_SET_SPECULATION_CTRL, [which, to, 0, 0])?;
                }
            }
            Ok(())
        }
    };
    stays(set(DISABLE), set(FORCE_DISABLE), read)
}

/// Prefer and interleave over the first node, which there always is.
fn memory_policy() -> Checked {
    fn read() -> Result<(i32, [u64; 16]), String> {
        let (mut mode, mut nodes) = (0i32, [0u64; 16]);
        let args = [&raw mut mode as u64, nodes.as_mut_ptr() as u64, 1024, 0, 0];
        call("get_mempolicy", libc::SYS_get_mempolicy, args)?;
        Ok((mode, nodes))
    }
    let set = |mode: u64| {
        move || {
            let nodes = 1u64;
            call("set_mempolicy", libc::SYS_set_mempolicy, [mode, &raw const nodes as u64, 64]).map(drop)
        }
    };
    stays(set(1), set(3 | 1 << 15), read)
}

/// Ranges bound to a node, spread over nodes, in shared memory, with a name too; a child has bound one otherwise.
fn memory_policy_ranges() -> Checked {
    use crate::memory::{PAGE, anonymous, check_filled, fill, shared};
    const BIND: u64 = 2;
    const INTERLEAVE: u64 = 3;
    const STATIC: u64 = 1 << 15;
    let bind = |at: *mut u8, mode: u64| {
        let nodes = 1u64;
        let mask = if mode == 0 { 0 } else { &raw const nodes as u64 };
        call("mbind", libc::SYS_mbind, [at as u64, PAGE as u64, mode, mask, 64, 0]).map(drop)
    };
    let read = |at: *mut u8| {
        let (mut mode, mut nodes) = (0i32, [0u64; 16]);
        let args = [&raw mut mode as u64, nodes.as_mut_ptr() as u64, 1024, at as u64, 2];
        call("get_mempolicy", libc::SYS_get_mempolicy, args)?;
        Ok::<_, String>((mode as u64, nodes[0]))
    };
    let (private, common) = (anonymous(4 * PAGE)?, shared(2 * PAGE)?);
    let (second, third) = (unsafe { private.add(PAGE) }, unsafe { private.add(2 * PAGE) });
    fill(private, 4 * PAGE, 1);
    bind(private, BIND)?;
    bind(second, INTERLEAVE | STATIC)?;
    bind(common, BIND)?;
    let named = std::fs::File::options().read(true).write(true).create_new(true).open("/dev/shm/named");
    let named = named.and_then(|file| file.set_len(2 * PAGE as u64).map(|()| file)).map_err(|e| e.to_string())?;
    let (protection, number) = (libc::PROT_READ | libc::PROT_WRITE, std::os::fd::AsRawFd::as_raw_fd(&named));
    let named = unsafe { libc::mmap(std::ptr::null_mut(), 2 * PAGE, protection, libc::MAP_SHARED, number, 0) };
    done("mmap", if named == libc::MAP_FAILED { -1i64 } else { 0 })?;
    let named = named.cast::<u8>();
    bind(named, INTERLEAVE)?;
    let set_up = Gate::new()?;
    let child = fork(|| {
        bind(private, 0)?;
        bind(third, BIND)?;
        set_up.open()?;
        await_go();
        equal("a range that a child has freed", read(private)?, (0, 0))?;
        equal("what a child has inherited", read(second)?, (INTERLEAVE | STATIC, 1))?;
        equal("what a child has bound", read(third)?, (BIND, 1))
    })?;
    set_up.pass(1)?;
    hold()?;
    reap(child)?;
    equal("a bound range", read(private)?, (BIND, 1))?;
    equal("a spread range", read(second)?, (INTERLEAVE | STATIC, 1))?;
    equal("a range as it comes", read(third)?, (0, 0))?;
    equal("memory with a name", (read(named)?, read(unsafe { named.add(PAGE) })?), ((INTERLEAVE, 1), (0, 0)))?;
    equal("shared memory", (read(common)?, read(unsafe { common.add(PAGE) })?), ((BIND, 1), (0, 0)))?;
    check_filled("what is in it", private, 4 * PAGE, 1)
}

/// Barriers that a process has registered for, which fail for others: runtimes count on them. A child has inherited one, and
/// registered for another.
fn memory_barriers() -> Checked {
    let barrier = |command: u64| call("membarrier", libc::SYS_membarrier, [command, 0, 0]);
    const PLAIN: u64 = 1 << 3;
    const CORES: u64 = 1 << 5;
    const SEQUENCES: u64 = 1 << 7;
    barrier(PLAIN << 1)?;
    let set_up = Gate::new()?;
    let child = fork(|| {
        barrier(CORES << 1)?;
        set_up.open()?;
        await_go();
        barrier(PLAIN)?;
        barrier(CORES)?;
        check(barrier(SEQUENCES).is_err(), "a child can use a barrier that it did not register for")
    })?;
    set_up.pass(1)?;
    hold()?;
    reap(child)?;
    barrier(PLAIN)?;
    check(barrier(CORES).is_err(), "a barrier can be used that was not registered for")
}

/// Memory that was written to cannot become executable.
fn write_or_execute() -> Checked {
    let refused = || {
        let page = crate::memory::anonymous(crate::memory::PAGE)?;
        let made = unsafe { libc::mprotect(page.cast(), crate::memory::PAGE, libc::PROT_READ | libc::PROT_EXEC) };
        equal("making memory executable", made, -1)
    };
    prctl(65, [1, 0, 0, 0])?;
    refused()?;
    hold()?;
    equal("the switch", prctl(66, [0; 4])?, 1)?;
    refused()
}

fn machine_checks() -> Checked {
    let set = |value: u64| move || prctl(libc::PR_MCE_KILL, [libc::PR_MCE_KILL_SET as u64, value, 0, 0]).map(drop);
    stays(set(1), set(0), || prctl(libc::PR_MCE_KILL_GET, [0; 4]))
}

/// A thread that may not read the time stamp counter.
fn time_stamps() -> Checked {
    fn read() -> Result<i32, String> {
        let mut mode = 0i32;
        prctl(libc::PR_GET_TSC, [&raw mut mode as u64, 0, 0, 0])?;
        Ok(mode)
    }
    // Nothing in this thread takes the time from now on.
    let set_up = Gate::new()?;
    let child = fork(|| {
        prctl(libc::PR_SET_TSC, [libc::PR_TSC_SIGSEGV as u64, 0, 0, 0])?;
        set_up.open()?;
        await_go();
        equal("time stamps", read()?, libc::PR_TSC_SIGSEGV)?;
        prctl(libc::PR_SET_TSC, [libc::PR_TSC_ENABLE as u64, 0, 0, 0]).map(drop)
    })?;
    set_up.pass(1)?;
    hold()?;
    reap(child)
}

/// A sealed mapping stays, and stays sealed.
fn sealed_memory() -> Checked {
    let page = crate::memory::anonymous(crate::memory::PAGE)?;
    unsafe { page.write(7) };
    if let Err(error) = call("mseal", 462, [page as u64, crate::memory::PAGE as u64, 0]) {
        return check(error.contains("os error 38"), error);
    }
    hold()?;
    equal("what is there", unsafe { page.read() }, 7)?;
    let changed = unsafe { libc::munmap(page.cast(), crate::memory::PAGE) };
    equal("unmapping it", changed, -1)
}
