//! Mappings of every sort, with their protections and advice.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::memory::*;
use crate::stage::*;

pub(crate) const KINDS: &[crate::stage::Kind] = &[
    ("protections", protections),
    ("grows-down", grows_down),
    ("advice", advice),
    ("advice-changing", advice_changing),
    ("locked", locked),
    ("locked-unreadable", locked_unreadable),
    ("many-mappings", many_mappings),
    ("executable-memory", executable),
    ("low-address", low_address),
    ("vdso", vdso),
    ("no-vdso", no_vdso),
    ("program-replaced", program_replaced),
    ("memfd", memfd),
    ("huge-memfd", huge_memfd),
    ("locked-future", locked_future),
    ("droppable", droppable),
    ("named-memory", named_memory),
    ("protection-keys", protection_keys),
];

const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// Contents behind every protection; the portrait compares the protections themselves.
fn protections() -> Checked {
    let all = [libc::PROT_NONE, libc::PROT_READ, READ_WRITE, libc::PROT_READ | libc::PROT_EXEC, libc::PROT_EXEC];
    let mut regions = Vec::new();
    for (i, protection) in all.into_iter().enumerate() {
        let region = anonymous(3 * PAGE)?;
        fill(region, 3 * PAGE, 80 + i as u64);
        protect(region, 3 * PAGE, protection)?;
        regions.push(region);
    }
    let guarded = anonymous(5 * PAGE)?;
    protect(guarded, PAGE, libc::PROT_NONE)?;
    let reserved = map(1 << 30, libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, -1)?;
    hold()?;
    for (i, region) in regions.into_iter().enumerate() {
        protect(region, 3 * PAGE, libc::PROT_READ)?;
        check_filled(&format!("region {i}"), region, 3 * PAGE, 80 + i as u64)?;
    }
    protect(reserved, PAGE, READ_WRITE)?;
    equal("reserved memory", unsafe { reserved.read() }, 0)
}

/// A stack that grows when it is touched below, before and afterwards.
fn grows_down() -> Checked {
    let room = map(512 * PAGE, libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)?;
    equal("munmap", unsafe { libc::munmap(room.cast(), 512 * PAGE) }, 0)?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_GROWSDOWN | libc::MAP_FIXED;
    let top = unsafe { room.add(508 * PAGE) };
    let stack = unsafe { libc::mmap(top.cast(), 4 * PAGE, READ_WRITE, flags, -1, 0) } as *mut u8;
    equal("the stack's place", stack, top)?;
    fill(stack, 4 * PAGE, 91);
    unsafe { stack.sub(2 * PAGE).write(9) };
    hold()?;
    check_filled("the stack", stack, 4 * PAGE, 91)?;
    equal("the grown page", unsafe { stack.sub(2 * PAGE).read() }, 9)?;
    unsafe { stack.sub(5 * PAGE).write(8) };
    equal("the page grown afterwards", unsafe { stack.sub(5 * PAGE).read() }, 8)
}

/// Advice is in the portrait; wiping on fork and keeping from forks work.
fn advice() -> Checked {
    let all = [
        libc::MADV_DONTFORK,
        libc::MADV_DONTDUMP,
        libc::MADV_WIPEONFORK,
        libc::MADV_HUGEPAGE,
        libc::MADV_NOHUGEPAGE,
        libc::MADV_SEQUENTIAL,
        libc::MADV_RANDOM,
        libc::MADV_MERGEABLE,
    ];
    let mut regions = Vec::new();
    for (i, advice) in all.into_iter().enumerate() {
        let region = anonymous(2 * PAGE)?;
        fill(region, 2 * PAGE, 100 + i as u64);
        if unsafe { libc::madvise(region.cast(), 2 * PAGE, advice) } == 0 {
            regions.push((i, region));
        }
    }
    hold()?;
    for (i, region) in &regions {
        check_filled(&format!("region {i}"), *region, 2 * PAGE, 100 + *i as u64)?;
    }
    let wiped = regions.iter().find(|(i, _)| *i == 2).map_or(std::ptr::null_mut(), |(_, region)| *region);
    reap(fork(|| equal("wiped memory in a child", unsafe { wiped.read() }, 0))?)
}

fn locked() -> Checked {
    let region = anonymous(4 * PAGE)?;
    done("mlock", unsafe { libc::mlock(region.cast(), 2 * PAGE) })?;
    fill(region, 4 * PAGE, 111);
    let late = unsafe { region.add(3 * PAGE) };
    done("mlock2", unsafe { libc::mlock2(late.cast(), PAGE, libc::MLOCK_ONFAULT) } as i64)?;
    hold()?;
    check_filled("locked memory", region, 4 * PAGE, 111)
}

/// Advice that changes all the time, also between a look at the running process and the moment at which it is held: what
/// was asked for last holds.
fn advice_changing() -> Checked {
    // With neighbours of another kind: its bounds stay as they are.
    let around = map(4 * PAGE, libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)?;
    let region = unsafe { around.add(PAGE) };
    protect(region, 2 * PAGE, READ_WRITE)?;
    let (address, stop) = (region as usize, AtomicBool::new(false));
    let change = || {
        while !stop.load(Ordering::Relaxed) {
            for (advice, kept_out) in [(libc::MADV_DONTDUMP, true), (libc::MADV_DODUMP, false)] {
                let advised = unsafe { libc::madvise(address as *mut libc::c_void, 2 * PAGE, advice) };
                done("madvise", advised)?;
                let smaps = read("/proc/self/smaps")?;
                let own = smaps.split_once(&format!("{address:x}-")).ok_or("the mapping is not there")?.1;
                let flags = own.lines().find(|line| line.starts_with("VmFlags:")).ok_or("it has no flags")?;
                equal("out of dumps", flags.contains(" dd"), kept_out)?;
            }
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let changing = scope.spawn(change);
        let held = hold_loosely();
        stop.store(true, Ordering::Relaxed);
        changing.join().map_err(|_| "the thread panicked")?.and(held)
    })
}

/// Two thousand mappings with holes between.
fn many_mappings() -> Checked {
    const COUNT: usize = 2000;
    let room = anonymous(COUNT * 2 * PAGE)?;
    let at = |i: usize| unsafe { room.add(i * 2 * PAGE) };
    for i in 0..COUNT {
        equal("munmap", unsafe { libc::munmap(at(i).add(PAGE).cast(), PAGE) }, 0)?;
        fill(at(i), PAGE, i as u64);
    }
    hold()?;
    (0..COUNT).try_for_each(|i| check_filled("a mapping", at(i), PAGE, i as u64))
}

/// Code made at run time.
fn executable() -> Checked {
    let code = anonymous(PAGE)?;
    bytes(code, 6).copy_from_slice(&[0xb8, 42, 0, 0, 0, 0xc3]);
    protect(code, PAGE, libc::PROT_READ | libc::PROT_EXEC)?;
    let run: extern "C" fn() -> i32 = unsafe { std::mem::transmute(code) };
    hold()?;
    equal("what it gives", run(), 42)
}

/// Memory where others would put their scratch: low, and next to the stack.
fn low_address() -> Checked {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    for place in [0x10_0000usize, 0x1000_0000, 0x1010_0000, 0x2000_0000] {
        let region = unsafe { libc::mmap(place as *mut _, 2 * PAGE, READ_WRITE, flags, -1, 0) };
        equal("a low mapping", region as usize, place)?;
        fill(region.cast(), 2 * PAGE, place as u64);
    }
    hold()?;
    for place in [0x10_0000usize, 0x1000_0000, 0x1010_0000, 0x2000_0000] {
        check_filled("a low mapping", place as *mut u8, 2 * PAGE, place as u64)?;
    }
    Ok(())
}

/// The kernel's code is where the auxiliary vector says, unchanged, with nothing left behind it.
fn vdso() -> Checked {
    let at = unsafe { libc::getauxval(libc::AT_SYSINFO_EHDR) } as *mut u8;
    let before = bytes(at, 2 * PAGE).to_vec();
    hold()?;
    check(bytes(at, 2 * PAGE) == before.as_slice(), "the vDSO has changed")?;
    equal("getcpu", unsafe { libc::sched_getcpu() } >= 0, true)
}

/// A program that did away with the vDSO.
fn no_vdso() -> Checked {
    let child = fork(|| {
        for line in read("/proc/self/maps")?.lines().filter(|line| line.contains("[v")) {
            let (start, end) = line.split_once(' ').and_then(|(range, _)| range.split_once('-')).ok_or("maps")?;
            let number = |text| u64::from_str_radix(text, 16).map_err(|e| format!("{text}: {e}"));
            let (start, end) = (number(start)?, number(end)?);
            let _ = call("munmap", libc::SYS_munmap, [start, end - start]);
        }
        while call("access", libc::SYS_access, [c"/tmp/on".as_ptr() as u64, 0]).is_err() {
            let pause = [0u64, 5_000_000];
            call("nanosleep", libc::SYS_nanosleep, [pause.as_ptr() as u64, 0])?;
        }
        Ok(())
    })?;
    until("the vDSO to go", || read(format!("/proc/{child}/maps")).is_ok_and(|maps| !maps.contains("[vdso]")))?;
    hold_loosely()?;
    reap(child)
}

/// The program's file was replaced while it runs.
fn program_replaced() -> Checked {
    const COPY: &str = "/tmp/program";
    if std::env::args().nth(2).is_some() {
        std::fs::remove_file(COPY).map_err(|e| e.to_string())?;
        write(COPY, "something else")?;
        return hold();
    }
    let itself = std::env::current_exe().map_err(|e| e.to_string())?;
    std::fs::copy(itself, COPY).map_err(|e| e.to_string())?;
    use std::os::unix::process::CommandExt;
    Err(std::process::Command::new(COPY).args(["program-replaced", "again"]).exec().to_string())
}

/// Memory of a memfd, mapped twice, sealed.
fn memfd() -> Checked {
    let file = done("memfd_create", unsafe { libc::memfd_create(c"guest".as_ptr(), libc::MFD_ALLOW_SEALING) })? as i32;
    done("ftruncate", unsafe { libc::ftruncate(file, 8 * PAGE as i64) })?;
    let (one, two) =
        (map(8 * PAGE, READ_WRITE, libc::MAP_SHARED, file)?, map(8 * PAGE, READ_WRITE, libc::MAP_SHARED, file)?);
    fill(one, 4 * PAGE, 121);
    done("seal", unsafe { libc::fcntl(file, libc::F_ADD_SEALS, libc::F_SEAL_SHRINK | libc::F_SEAL_GROW) })?;
    hold()?;
    check_filled("the other view", two, 4 * PAGE, 121)?;
    fill(two, PAGE, 122);
    check_filled("the one view", one, PAGE, 122)?;
    let seals = unsafe { libc::fcntl(file, libc::F_GET_SEALS) };
    equal("the seals", seals, libc::F_SEAL_SHRINK | libc::F_SEAL_GROW)
}

/// Locked memory that cannot be touched any more, and what was locked when it could not: which the kernel does, and says
/// that it failed.
fn locked_unreadable() -> Checked {
    let (region, never) = (anonymous(2 * PAGE)?, anonymous(2 * PAGE)?);
    fill(region, 2 * PAGE, 112);
    let lock = |at: *mut u8| unsafe { libc::mlock(at.cast(), 2 * PAGE) };
    done("mlock", lock(region))?;
    for at in [region, never] {
        done("mprotect", unsafe { libc::mprotect(at.cast(), 2 * PAGE, libc::PROT_NONE) })?;
    }
    check(lock(never) != 0, "memory that nobody can touch was put in place")?;
    hold()?;
    done("mprotect", unsafe { libc::mprotect(region.cast(), 2 * PAGE, libc::PROT_READ) })?;
    check_filled("locked memory", region, 2 * PAGE, 112)
}

/// All memory that is still to come is locked.
fn locked_future() -> Checked {
    done("mlockall", unsafe { libc::mlockall(libc::MCL_FUTURE | libc::MCL_ONFAULT) })?;
    let region = anonymous(2 * PAGE)?;
    fill(region, 2 * PAGE, 5);
    hold()?;
    let locked = || -> Result<String, String> {
        let status = read("/proc/self/status")?;
        Ok(status.lines().find(|line| line.starts_with("VmLck")).unwrap_or_default().to_owned())
    };
    let before = locked()?;
    anonymous(16 * PAGE)?;
    check(locked()? != before, format!("new memory is not locked: {before}"))
}

/// Memory that the kernel may take away.
fn droppable() -> Checked {
    const MAP_DROPPABLE: i32 = 8;
    match map(4 * PAGE, libc::PROT_READ | libc::PROT_WRITE, MAP_DROPPABLE | libc::MAP_ANONYMOUS, -1) {
        Ok(region) => fill(region, PAGE, 3),
        Err(error) => check(error.contains("os error 22") || error.contains("os error 95"), error)?,
    }
    hold()
}

/// Names of anonymous memory are in the portrait.
fn named_memory() -> Checked {
    let region = anonymous(8 * PAGE)?;
    fill(region, 8 * PAGE, 4);
    let name = c"a name";
    let args = [0x5356_4d41, 0, region as u64, 4 * PAGE as u64, name.as_ptr() as u64];
    let _ = call("PR_SET_VMA", libc::SYS_prctl, args);
    hold()
}

/// What each protection key allows this thread.
fn allowed() -> u32 {
    let allowed: u32;
    unsafe { std::arch::asm!("rdpkru", in("ecx") 0, out("eax") allowed, out("edx") _) };
    allowed
}

/// The keys of all mappings that have one but the first, by address.
fn keys() -> Result<Vec<(String, String)>, String> {
    let (mut found, mut place) = (Vec::new(), String::new());
    for line in read("/proc/self/smaps")?.lines() {
        match line.strip_prefix("ProtectionKey:").map(str::trim) {
            Some("0") => {}
            Some(key) => found.push((place.clone(), key.to_owned())),
            None if line.starts_with(|c: char| c.is_ascii_digit() || c.is_ascii_lowercase()) => {
                place = line.split(' ').next().unwrap_or_default().to_owned();
            }
            None => {}
        }
    }
    Ok(found)
}

/// Protection keys, as engines that compile at run time use them, and a mapping for which the kernel takes one itself. Where
/// the processor has none, there are none afterwards either.
fn protection_keys() -> Checked {
    let alloc = || call("pkey_alloc", libc::SYS_pkey_alloc, [0, 0]);
    let Ok(first) = alloc() else {
        hold()?;
        return check(alloc().is_err(), "there are protection keys");
    };
    let (second, third) = (alloc()?, alloc()?);
    let memory = anonymous(4 * PAGE)?;
    let executed = anonymous(PAGE)?;
    fill(memory, 4 * PAGE, 1);
    let give = |page: usize, key: i64| {
        let args = [memory as u64 + (page * PAGE) as u64, PAGE as u64, READ_WRITE as u64, key as u64];
        call("pkey_mprotect", libc::SYS_pkey_mprotect, args).map(drop)
    };
    give(1, first)?;
    give(2, third)?;
    protect(executed, PAGE, libc::PROT_EXEC)?;
    call("pkey_free", libc::SYS_pkey_free, [second as u64])?;
    // Nobody writes to the page with the third key: PKEY_DISABLE_WRITE.
    let restricted = allowed() | 2 << (2 * third);
    unsafe { std::arch::asm!("wrpkru", in("eax") restricted, in("ecx") 0, in("edx") 0) };
    let before = keys()?;
    equal("mappings with keys", before.len(), 3)?;
    let set_up = Gate::new()?;
    let child = fork(|| {
        unsafe { memory.add(PAGE).write(7) };
        set_up.open()?;
        await_go();
        equal("the byte of a child", unsafe { memory.add(PAGE).read() }, 7)?;
        equal("the keys of a child", alloc()?, second)
    })?;
    set_up.pass(1)?;
    hold()?;
    reap(child)?;
    equal("keys of mappings", keys()?, before)?;
    equal("what keys allow", allowed(), restricted)?;
    check_filled("memory behind keys", memory, 4 * PAGE, 1)?;
    equal("the next key", alloc()?, second)?;
    // The kernel minds keys as well: nobody may write there.
    let zeros = std::fs::File::open("/dev/zero").map_err(|e| e.to_string())?;
    let written = unsafe { libc::read(std::os::fd::AsRawFd::as_raw_fd(&zeros), memory.add(2 * PAGE).cast(), 1) };
    equal("bytes written behind a key", written, -1)
}

/// Huge pages that have a descriptor: with a mapping, a private one, an offset, seals, and one that is empty.
fn huge_memfd() -> Checked {
    const PAGE: usize = 2 << 20;
    let flags = libc::MFD_HUGETLB | libc::MFD_ALLOW_SEALING;
    let make = |name: &std::ffi::CStr| done("memfd_create", unsafe { libc::memfd_create(name.as_ptr(), flags) });
    let (memory, empty) = (make(c"huge")? as i32, make(c"empty")? as i32);
    done("ftruncate", unsafe { libc::ftruncate(memory, 3 * PAGE as i64) })?;
    let map = |flags: i32| -> Result<*mut u8, String> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let at = unsafe { libc::mmap(std::ptr::null_mut(), 3 * PAGE, protection, flags, memory, 0) };
        done("mmap", if at == libc::MAP_FAILED { -1i64 } else { 0 })?;
        Ok(at.cast())
    };
    let (shared, private) = (map(libc::MAP_SHARED)?, map(libc::MAP_PRIVATE | libc::MAP_NORESERVE)?);
    let at = |start: *mut u8, place: usize| unsafe { start.add(place) };
    unsafe {
        at(shared, 5).write(1);
        at(shared, 2 * PAGE).write(2);
        at(private, 2 * PAGE).write(3);
    }
    let end = done("lseek", unsafe { libc::lseek(memory, 2 * PAGE as i64, libc::SEEK_SET) })?;
    done("fcntl", unsafe { libc::fcntl(memory, libc::F_ADD_SEALS, libc::F_SEAL_GROW) })?;
    hold()?;
    let seen = |start: *mut u8| [5, PAGE, 2 * PAGE].map(|place| unsafe { at(start, place).read_volatile() });
    equal("what is in it", seen(shared), [1, 0, 2])?;
    equal("what is private of it", seen(private), [1, 0, 3])?;
    unsafe { at(shared, 9).write(9) };
    let mut bytes = [0u8; 10];
    let read = unsafe { libc::pread(memory, bytes.as_mut_ptr().cast(), 10, 0) };
    equal("bytes", (read, bytes[5], bytes[9]), (10, 1, 9))?;
    equal("the offset", unsafe { libc::lseek(memory, 0, libc::SEEK_CUR) }, end)?;
    equal("its seals", unsafe { libc::fcntl(memory, libc::F_GET_SEALS) }, libc::F_SEAL_GROW)?;
    let mut facts: libc::stat = unsafe { std::mem::zeroed() };
    done("fstat", unsafe { libc::fstat(empty, &raw mut facts) })?;
    equal("the empty one's pages and size", (facts.st_blksize, facts.st_size), (PAGE as i64, 0))
}
