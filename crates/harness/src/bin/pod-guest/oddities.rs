//! What few programs do, and some depend on.

use crate::stage::*;

pub(crate) const KINDS: &[crate::stage::Kind] = &[
    ("autogroup-nice", autogroup_nice),
    ("seccomp-strict", seccomp_strict),
    ("deadline", deadline),
    ("guards", guards),
    ("sparse", sparse),
    ("sealed", sealed),
    ("locked-on-fault", locked_on_fault),
];

/// The niceness of a session's group.
fn autogroup_nice() -> Checked {
    let child = fork(|| {
        done("setsid", unsafe { libc::setsid() })?;
        write("/proc/self/autogroup", "7")?;
        let before = read("/proc/self/autogroup")?;
        check(before.contains("nice 7"), &before)?;
        await_go();
        let after = read("/proc/self/autogroup")?;
        check(after.contains("nice 7"), format!("the niceness of the group: {after}"))
    })?;
    until_asleep(child)?;
    hold()?;
    reap(child)
}

/// A process that may read, write and end, and nothing else.
fn seccomp_strict() -> Checked {
    let (go, set_up) = (Gate::new()?, Gate::new()?);
    let child = fork(|| {
        done("prctl", unsafe { libc::prctl(libc::PR_SET_SECCOMP, 1u64, 0u64, 0u64, 0u64) })?;
        let passed = set_up.open().and(go.pass(1));
        unsafe { libc::syscall(libc::SYS_exit, if passed.is_ok() { 0 } else { 1 }) };
        Ok(())
    })?;
    set_up.pass(1)?;
    until_asleep(child)?;
    hold()?;
    go.open()?;
    reap(child)
}

/// A thread with a deadline.
fn deadline() -> Checked {
    #[repr(C)]
    #[derive(Clone, Copy, Debug, Default, PartialEq)]
    struct Attributes {
        size: u32,
        policy: u32,
        flags: u64,
        nice: i32,
        priority: u32,
        runtime: u64,
        deadline: u64,
        period: u64,
    }
    let wanted = Attributes {
        size: 48,
        policy: 6,
        flags: 1,
        runtime: 1_000_000,
        deadline: 50_000_000,
        period: 100_000_000,
        ..Attributes::default()
    };
    if call("sched_setattr", libc::SYS_sched_setattr, [0, &raw const wanted as u64, 0]).is_err() {
        println!("skipped: no deadlines here");
        return hold();
    }
    hold()?;
    let mut now = Attributes::default();
    call("sched_getattr", libc::SYS_sched_getattr, [0, &raw mut now as u64, 48, 0])?;
    equal("the deadline", now, wanted)
}

fn map(length: usize, flags: i32) -> Result<*mut u8, String> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let at = unsafe {
        libc::mmap(std::ptr::null_mut(), length, protection, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | flags, -1, 0)
    };
    if at == libc::MAP_FAILED { Err(std::io::Error::last_os_error().to_string()) } else { Ok(at.cast()) }
}

/// Guard pages inside a mapping: touching one kills.
fn guards() -> Checked {
    let at = map(16 << 12, 0)?;
    unsafe { at.add(3 << 12).write(3) };
    if unsafe { libc::madvise(at.add(4 << 12).cast(), 2 << 12, 102) } != 0 {
        println!("skipped: no guard pages here");
        return hold();
    }
    hold()?;
    equal("before the guard", unsafe { at.add(3 << 12).read() }, 3)?;
    for page in [4, 5] {
        let child = fork(|| {
            unsafe { at.add(page << 12).write_volatile(1) };
            Ok(())
        })?;
        check(libc::WIFSIGNALED(status_of(child)?), "a guard page could be written to")?;
    }
    unsafe { at.add(6 << 12).write_volatile(1) };
    Ok(())
}

/// A terabyte of address space with a page here and there.
fn sparse() -> Checked {
    let at = map(1 << 40, libc::MAP_NORESERVE)?;
    let places = || (0..64usize).map(|n| (n << 34) + (n << 12));
    places().for_each(|place| unsafe { at.add(place).write(place as u8 ^ 0x5a) });
    hold()?;
    for place in places() {
        equal("a page", unsafe { at.add(place).read() }, place as u8 ^ 0x5a)?;
        equal("a page beside it", unsafe { at.add(place + 8192).read() }, 0)?;
    }
    Ok(())
}

/// A mapping that nobody may change any more.
fn sealed() -> Checked {
    let at = map(4 << 12, 0)?;
    if unsafe { libc::syscall(462, at, 4 << 12, 0) } != 0 {
        println!("skipped: no seals here");
        return hold();
    }
    hold()?;
    equal("munmap", unsafe { libc::munmap(at.cast(), 4 << 12) }, -1)?;
    equal("mprotect", unsafe { libc::mprotect(at.cast(), 4 << 12, libc::PROT_READ) }, -1)
}

/// Memory that is locked as it is touched.
fn locked_on_fault() -> Checked {
    let at = map(8 << 12, 0)?;
    unsafe { at.add(4096).write(1) };
    call("mlock2", libc::SYS_mlock2, [at as u64, 8 << 12, 1])?;
    hold()?;
    let mut there = [0u8; 8];
    done("mincore", unsafe { libc::mincore(at.cast(), 8 << 12, there.as_mut_ptr()) })?;
    equal("which pages are there", there, [0, 1, 0, 0, 0, 0, 0, 0])
}
