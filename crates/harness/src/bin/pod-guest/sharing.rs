//! What processes share that are not threads of one: memory, signal actions, descriptors, root and working directory.

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicI64, AtomicU8, Ordering};

use crate::identity::go_to;
use crate::stage::*;
use crate::watches::make;

pub(crate) const KINDS: &[crate::stage::Kind] = &[
    ("shared-directory", shared_directory),
    ("shared-files", shared_files),
    ("shared-strangely", shared_strangely),
    ("shared-memory-process", shared_memory_process),
    ("shared-memory-alone", shared_memory_alone),
    ("shared-memory-wholly", shared_memory_wholly),
    ("shared-memory-family", shared_memory_family),
    ("shared-memory-siblings", shared_memory_siblings),
    ("shared-memory-written", shared_memory_written),
    ("shared-memory-stopped", shared_memory_stopped),
    ("thread-directory", thread_directory),
    ("thread-directory-shared", thread_directory_shared),
    ("thread-directory-of-process", thread_directory_of_process),
    ("thread-files", thread_files),
    ("thread-undo-list", thread_undo_list),
];

/// A child made by `clone(2)` with these flags and SIGCHLD.
fn clone(flags: i32, body: impl FnOnce() -> Checked) -> Result<i32, String> {
    match call("clone", libc::SYS_clone, [(flags | libc::SIGCHLD) as u64, 0, 0, 0, 0])? {
        0 => leave(body()),
        pid => Ok(pid as i32),
    }
}

fn working_directory() -> String {
    std::env::current_dir().map(|path| path.display().to_string()).unwrap_or_default()
}

/// A child and its child that share root, working directory and umask; another that does not.
fn shared_directory() -> Checked {
    let (set_up, moved, seen) = (Gate::new()?, Gate::new()?, Gate::new()?);
    std::env::set_current_dir("/usr").map_err(|e| e.to_string())?;
    let shares = clone(libc::CLONE_FS, || {
        let grandchild = clone(libc::CLONE_FS, || {
            set_up.open()?;
            await_go();
            std::env::set_current_dir("/tmp").map_err(|e| e.to_string())?;
            unsafe { libc::umask(0o27) };
            moved.open()
        })?;
        set_up.open()?;
        await_go();
        reap(grandchild)?;
        equal("where the grandchild went", working_directory(), "/tmp".to_owned())
    })?;
    let alone = fork(|| {
        set_up.open()?;
        seen.pass(1)?;
        equal("where nobody went", working_directory(), "/usr".to_owned())
    })?;
    set_up.pass(3)?;
    hold()?;
    moved.pass(1)?;
    equal("where the grandchild went", working_directory(), "/tmp".to_owned())?;
    equal("the mask that it set", unsafe { libc::umask(0) }, 0o27)?;
    seen.open()?;
    [shares, alone].into_iter().try_for_each(reap)
}

/// A child and its child that share the descriptors, among them one that each opens for itself; another that does not.
fn shared_files() -> Checked {
    let (set_up, opened, seen) = (Gate::new()?, Gate::new()?, Gate::new()?);
    let kept = std::fs::File::open("/etc").map_err(|e| e.to_string())?;
    let itself = std::fs::File::open("/proc/self/status").map_err(|e| e.to_string())?;
    const NUMBER: i32 = 57;
    let is_open = |number| unsafe { libc::fcntl(number, libc::F_GETFD) } != -1;
    let shares = clone(libc::CLONE_FILES, || {
        std::env::set_current_dir("/tmp").map_err(|e| e.to_string())?;
        let grandchild = clone(libc::CLONE_FILES | libc::CLONE_FS, || {
            set_up.open()?;
            await_go();
            done("dup2", unsafe { libc::dup2(kept.as_raw_fd(), NUMBER) })?;
            equal("working directory", working_directory(), "/tmp".to_owned())?;
            opened.open()
        })?;
        set_up.open()?;
        await_go();
        reap(grandchild)?;
        check(is_open(NUMBER), "what the grandchild opened is not open in the child")
    })?;
    let alone = fork(|| {
        set_up.open()?;
        seen.pass(1)?;
        check(!is_open(NUMBER) && is_open(kept.as_raw_fd()), "it has the descriptors of others")
    })?;
    set_up.pass(3)?;
    hold()?;
    opened.pass(1)?;
    check(is_open(NUMBER) && is_open(itself.as_raw_fd()), "what the grandchild opened is not open here")?;
    seen.open()?;
    [shares, alone].into_iter().try_for_each(reap)
}

/// A child that shares its parent's descriptors with its own child, after its parent has left.
fn shared_strangely() -> Checked {
    let (set_up, ends) = (Gate::new()?, Gate::new()?);
    let middle = clone(libc::CLONE_FILES, || {
        clone(libc::CLONE_FILES, || {
            until("adoption", || unsafe { libc::getppid() } == 1)?;
            set_up.open()?;
            await_go();
            ends.open()
        })
        .map(drop)
    })?;
    reap(middle)?;
    set_up.pass(1)?;
    hold()?;
    ends.pass(1)
}

/// A system call of a process that has the memory of another, and with it its `errno`.
fn raw<const N: usize>(number: libc::c_long, args: [u64; N]) -> i64 {
    let mut all = [0u64; 6];
    all[..N].copy_from_slice(&args);
    let result: i64;
    unsafe {
        std::arch::asm!("syscall", inlateout("rax") number => result, in("rdi") all[0], in("rsi") all[1],
            in("rdx") all[2], in("r10") all[3], in("r8") all[4], in("r9") all[5], out("rcx") _, out("r11") _);
    }
    result
}

/// What those that share memory tell each other: how many are ready, and what somebody has found to be wrong.
static READY: AtomicI64 = AtomicI64::new(0);
static WRONG: AtomicI64 = AtomicI64::new(0);
static WORD: AtomicI64 = AtomicI64::new(0);

/// Notes that a sharer has set something up, and has it wait until it may go on.
fn wait_as_sharer() {
    READY.fetch_add(1, Ordering::SeqCst);
    while raw(libc::SYS_access, [c"/tmp/on".as_ptr() as u64, libc::F_OK as u64]) != 0 {
        let pause = [0i64, 5_000_000];
        raw(libc::SYS_nanosleep, [pause.as_ptr() as u64, 0]);
    }
}

fn expect(holds: bool, number: i64) {
    if !holds {
        WRONG.store(number, Ordering::SeqCst);
    }
}

/// A process that runs `body` and shares memory, and more by these flags, on a stack of its own.
fn share(flags: i32, body: extern "C" fn(*mut libc::c_void) -> i32) -> i64 {
    let stack = Box::leak(vec![0u64; 1 << 13].into_boxed_slice());
    share_on(stack, flags, body)
}

fn share_on(stack: &mut [u64], flags: i32, body: extern "C" fn(*mut libc::c_void) -> i32) -> i64 {
    let top = unsafe { stack.as_mut_ptr().add(stack.len()) };
    i64::from(unsafe { libc::clone(body, top.cast(), flags | libc::CLONE_VM | libc::SIGCHLD, std::ptr::null_mut()) })
}

fn until_ready(count: i64) -> Checked {
    until("those that share memory", || READY.load(Ordering::SeqCst) == count)
}

fn nothing_wrong() -> Checked {
    equal("what a sharer has found to be wrong", WRONG.load(Ordering::SeqCst), 0)
}

fn is_open(number: i32) -> bool {
    raw(libc::SYS_fcntl, [number as u64, libc::F_GETFD as u64]) >= 0
}

/// What is to be done about a signal.
fn action(signal: i32) -> u64 {
    let mut action = [0u64; 4];
    raw(libc::SYS_rt_sigaction, [signal as u64, 0, action.as_mut_ptr() as u64, 8]);
    action[0]
}

fn ignore(signal: i32) {
    let action = [libc::SIG_IGN as u64, 0, 0, 0];
    raw(libc::SYS_rt_sigaction, [signal as u64, action.as_ptr() as u64, 0, 8]);
}

fn is_in(directory: &[u8]) -> bool {
    let mut path = [0u8; 64];
    let length = raw(libc::SYS_getcwd, [path.as_mut_ptr() as u64, 64]);
    length as usize == directory.len() && path.starts_with(directory)
}

/// A child that shares memory, and is no thread.
fn shared_memory_process() -> Checked {
    extern "C" fn child(_: *mut libc::c_void) -> i32 {
        wait_as_sharer();
        WORD.fetch_add(1, Ordering::SeqCst);
        0
    }
    let child = done("clone", share(0, child))?;
    until_ready(1)?;
    hold()?;
    reap(child as i32)?;
    equal("what the child has written", WORD.load(Ordering::SeqCst), 1)
}

const FIRST: i32 = 50;
const OTHER: i32 = 51;

/// A child that shares nothing but memory: descriptors, directory, signal actions, user, limits and filters are its own.
fn shared_memory_alone() -> Checked {
    extern "C" fn child(_: *mut libc::c_void) -> i32 {
        raw(libc::SYS_dup2, [FIRST as u64, OTHER as u64]);
        raw(libc::SYS_close, [FIRST as u64]);
        raw(libc::SYS_chdir, [c"/usr".as_ptr() as u64]);
        ignore(libc::SIGUSR1);
        let limit = [77u64, 78];
        raw(libc::SYS_prlimit64, [0, u64::from(libc::RLIMIT_NOFILE), limit.as_ptr() as u64, 0]);
        raw(libc::SYS_setresuid, [1000, 1001, 1002]);
        // Nothing but that there is a filter.
        let allow = [libc::sock_filter { code: 6, jt: 0, jf: 0, k: 0x7fff_0000 }];
        let program = libc::sock_fprog { len: 1, filter: allow.as_ptr().cast_mut() };
        raw(libc::SYS_prctl, [libc::PR_SET_NO_NEW_PRIVS as u64, 1, 0, 0, 0]);
        raw(libc::SYS_seccomp, [1, 0, (&raw const program) as u64]);
        wait_as_sharer();
        expect(is_open(OTHER) && !is_open(FIRST), 1);
        expect(is_in(b"/usr\0"), 2);
        expect(action(libc::SIGUSR1) == libc::SIG_IGN as u64 && action(libc::SIGUSR2) == libc::SIG_DFL as u64, 3);
        let mut limit = [0u64; 2];
        raw(libc::SYS_prlimit64, [0, u64::from(libc::RLIMIT_NOFILE), 0, limit.as_mut_ptr() as u64]);
        expect(limit == [77, 78], 4);
        expect(raw(libc::SYS_getuid, []) == 1000 && raw(libc::SYS_geteuid, []) == 1001, 5);
        expect(raw(libc::SYS_prctl, [libc::PR_GET_SECCOMP as u64, 0, 0, 0, 0]) == 2, 6);
        expect(WORD.load(Ordering::SeqCst) == 5, 7);
        WORD.store(6, Ordering::SeqCst);
        0
    }
    let file = std::fs::File::open("/etc").map_err(|e| e.to_string())?;
    done("dup2", unsafe { libc::dup2(file.as_raw_fd(), FIRST) })?;
    std::env::set_current_dir("/tmp").map_err(|e| e.to_string())?;
    let child = done("clone", share(0, child))?;
    until_ready(1)?;
    ignore(libc::SIGUSR2);
    WORD.store(5, Ordering::SeqCst);
    hold()?;
    check(is_open(FIRST) && !is_open(OTHER), "it has the descriptors of its child")?;
    equal("working directory", working_directory(), "/tmp".to_owned())?;
    let actions = (action(libc::SIGUSR1), action(libc::SIGUSR2));
    equal("signal actions", actions, (libc::SIG_DFL as u64, libc::SIG_IGN as u64))?;
    reap(child as i32)?;
    equal("what the child has written", WORD.load(Ordering::SeqCst), 6)?;
    nothing_wrong()
}

/// A child that shares memory, descriptors, directory and signal actions, and has a thread.
fn shared_memory_wholly() -> Checked {
    static STACK: [AtomicU8; 1 << 16] = [const { AtomicU8::new(0) }; 1 << 16];
    extern "C" fn thread(_: *mut libc::c_void) -> i32 {
        let own = (raw(libc::SYS_getpid, []), raw(libc::SYS_gettid, []));
        wait_as_sharer();
        expect(own == (raw(libc::SYS_getpid, []), raw(libc::SYS_gettid, [])), 1);
        raw(libc::SYS_dup2, [FIRST as u64, OTHER as u64]);
        WORD.fetch_add(1, Ordering::SeqCst);
        raw(libc::SYS_exit, [0]);
        0
    }
    extern "C" fn child(_: *mut libc::c_void) -> i32 {
        let flags = libc::CLONE_VM | libc::CLONE_FS | libc::CLONE_FILES | libc::CLONE_SIGHAND | libc::CLONE_THREAD;
        let top = STACK.as_ptr().wrapping_add(STACK.len()).cast_mut();
        expect(unsafe { libc::clone(thread, top.cast(), flags, std::ptr::null_mut()) } > 0, 2);
        wait_as_sharer();
        raw(libc::SYS_chdir, [c"/tmp".as_ptr() as u64]);
        ignore(libc::SIGUSR1);
        while WORD.load(Ordering::SeqCst) != 1 {
            std::hint::spin_loop();
        }
        0
    }
    let file = std::fs::File::open("/etc").map_err(|e| e.to_string())?;
    done("dup2", unsafe { libc::dup2(file.as_raw_fd(), FIRST) })?;
    std::env::set_current_dir("/usr").map_err(|e| e.to_string())?;
    let child = done("clone", share(libc::CLONE_FS | libc::CLONE_FILES | libc::CLONE_SIGHAND, child))?;
    until_ready(2)?;
    hold()?;
    reap(child as i32)?;
    check(is_open(OTHER), "what the child's thread opened is not open here")?;
    equal("where the child went", working_directory(), "/tmp".to_owned())?;
    equal("the action that the child set", action(libc::SIGUSR1), libc::SIG_IGN as u64)?;
    nothing_wrong()
}

/// Children and grandchildren that share memory, one of which was adopted, and a copy that one of them has forked.
fn shared_memory_family() -> Checked {
    static STACKS: [[AtomicU8; 1 << 15]; 2] = [const { [const { AtomicU8::new(0) }; 1 << 15] }; 2];
    fn share_from(stack: usize, body: extern "C" fn(*mut libc::c_void) -> i32) -> i64 {
        let stack = &STACKS[stack];
        let top = stack.as_ptr().wrapping_add(stack.len()).cast_mut();
        i64::from(unsafe { libc::clone(body, top.cast(), libc::CLONE_VM | libc::SIGCHLD, std::ptr::null_mut()) })
    }
    extern "C" fn grandchild(_: *mut libc::c_void) -> i32 {
        let parent = raw(libc::SYS_getppid, []);
        wait_as_sharer();
        expect(raw(libc::SYS_getppid, []) == parent, 1);
        WORD.fetch_add(1, Ordering::SeqCst);
        0
    }
    extern "C" fn adopted(_: *mut libc::c_void) -> i32 {
        while raw(libc::SYS_getppid, []) != 1 {
            raw(libc::SYS_sched_yield, []);
        }
        wait_as_sharer();
        expect(raw(libc::SYS_getppid, []) == 1, 2);
        WORD.fetch_add(1, Ordering::SeqCst);
        0
    }
    extern "C" fn parent_of_adopted(_: *mut libc::c_void) -> i32 {
        expect(share_from(0, adopted) > 0, 3);
        0
    }
    extern "C" fn child(_: *mut libc::c_void) -> i32 {
        expect(share_from(1, grandchild) > 0, 4);
        let copy = raw(libc::SYS_fork, []);
        if copy == 0 {
            WORD.store(50, Ordering::SeqCst);
            wait_as_sharer();
            raw(libc::SYS_exit_group, [WORD.load(Ordering::SeqCst) as u64]);
        }
        wait_as_sharer();
        let mut status = 0i32;
        raw(libc::SYS_wait4, [copy as u64, (&raw mut status) as u64, 0, 0]);
        expect(status == 50 << 8, 5);
        raw(libc::SYS_wait4, [u64::MAX, (&raw mut status) as u64, 0, 0]);
        expect(status == 0, 6);
        0
    }
    reap(done("clone", share(0, parent_of_adopted))? as i32)?;
    let child = done("clone", share(0, child))?;
    // What the copy has counted is its own.
    until_ready(3)?;
    until("a copy", || read(format!("/proc/{child}/task/{child}/children")).is_ok_and(|c| c.trim().contains(' ')))?;
    hold()?;
    reap(child as i32)?;
    until("the others", || WORD.load(Ordering::SeqCst) == 2)?;
    nothing_wrong()
}

/// Two children of a process that share with each other and not with it: the one has made the other its sibling.
fn shared_memory_siblings() -> Checked {
    extern "C" fn sibling(_: *mut libc::c_void) -> i32 {
        let parent = raw(libc::SYS_getppid, []);
        wait_as_sharer();
        expect(raw(libc::SYS_getppid, []) == parent, 1);
        WORD.store(7, Ordering::SeqCst);
        0
    }
    let (set_up, me) = (Gate::new()?, std::process::id() as i32);
    let child = fork(|| {
        done("clone", share(libc::CLONE_PARENT | libc::CLONE_FILES, sibling))?;
        until_ready(1)?;
        set_up.open()?;
        await_go();
        until("what the sibling writes", || WORD.load(Ordering::SeqCst) == 7)?;
        equal("the parent", unsafe { libc::getppid() }, me)?;
        nothing_wrong()
    })?;
    set_up.pass(1)?;
    hold()?;
    equal("what others write", WORD.load(Ordering::SeqCst), 0)?;
    reap(child)?;
    reap(-1)
}

/// Much memory, to which a process writes all the time that shares it with one that sleeps.
fn shared_memory_written() -> Checked {
    const WORDS: usize = 4 << 20;
    static AREA: std::sync::atomic::AtomicPtr<u64> = std::sync::atomic::AtomicPtr::new(std::ptr::null_mut());
    extern "C" fn writer(_: *mut libc::c_void) -> i32 {
        let area = AREA.load(Ordering::SeqCst);
        let mut place = 0;
        READY.fetch_add(1, Ordering::SeqCst);
        while WORD.load(Ordering::SeqCst) == 0 {
            let word = unsafe { &mut *area.add(place) };
            *word += 1;
            // A page, and another word of it the next time around.
            place = (place + 512) % (WORDS - 1);
        }
        place as i32 & 0x7f
    }
    let area = Box::leak((0..WORDS as u64).map(|word| word << 32).collect::<Box<[u64]>>());
    AREA.store(area.as_mut_ptr(), Ordering::SeqCst);
    let child = done("clone", share(0, writer))?;
    until_ready(1)?;
    hold_loosely()?;
    WORD.store(1, Ordering::SeqCst);
    status_of(child as i32)?;
    // Every word was written to as often as the others, or once more.
    let counts = (0..WORDS - 1).map(|place| (area[place] >> 32 == place as u64, area[place] as u32));
    let (mut least, mut most) = (u32::MAX, 0);
    for (place, (is_right, count)) in counts.enumerate() {
        check(is_right, format!("word {place} is {:#x}", area[place]))?;
        (least, most) = (least.min(count), most.max(count));
    }
    check(most - least <= 1, format!("words were written to {least} to {most} times"))
}

/// Stopped processes that share memory: one with its parent, which goes on, and one whose parent is stopped too.
fn shared_memory_stopped() -> Checked {
    static STACK: [AtomicU8; 1 << 15] = [const { AtomicU8::new(0) }; 1 << 15];
    fn stop() {
        raw(libc::SYS_kill, [raw(libc::SYS_getpid, []) as u64, libc::SIGSTOP as u64]);
        WORD.fetch_add(1, Ordering::SeqCst);
    }
    extern "C" fn grandchild(_: *mut libc::c_void) -> i32 {
        READY.store(raw(libc::SYS_getpid, []), Ordering::SeqCst);
        stop();
        0
    }
    extern "C" fn child(_: *mut libc::c_void) -> i32 {
        let top = STACK.as_ptr().wrapping_add(STACK.len()).cast_mut();
        let flags = libc::CLONE_VM | libc::SIGCHLD;
        let grandchild = unsafe { libc::clone(grandchild, top.cast(), flags, std::ptr::null_mut()) };
        stop();
        let mut status = -1i32;
        raw(libc::SYS_wait4, [grandchild as u64, (&raw mut status) as u64, 0, 0]);
        expect(status == 0, 1);
        0
    }
    let child = done("clone", share(0, child))? as i32;
    until("a grandchild", || READY.load(Ordering::SeqCst) != 0)?;
    let grandchild = READY.load(Ordering::SeqCst) as i32;
    let is_stopped = |pid: i32| read(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") T "));
    until("stops", || is_stopped(child) && is_stopped(grandchild))?;
    hold()?;
    check(is_stopped(child) && is_stopped(grandchild), "they are not stopped any more")?;
    for pid in [grandchild, child] {
        unsafe { libc::kill(pid, libc::SIGCONT) };
    }
    reap(child)?;
    equal("how many went on", WORD.load(Ordering::SeqCst), 2)?;
    nothing_wrong()
}

/// What a thread does that leaves what it shares with the others.
fn leave_others(
    flag: i32,
    (set_up, go): (&Gate, &Gate),
    then: impl FnOnce() -> Checked,
    afterwards: impl FnOnce() -> Checked,
) -> Checked {
    done("unshare", unsafe { libc::unshare(flag) })?;
    then()?;
    set_up.open()?;
    go.pass(1)?;
    afterwards()
}

/// A thread that has left what it shares with the others.
fn apart(flag: i32, then: impl FnOnce() -> Checked + Send, afterwards: impl FnOnce() -> Checked + Send) -> Checked {
    let (set_up, go) = (Gate::new()?, Gate::new()?);
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| leave_others(flag, (&set_up, &go), then, afterwards));
        set_up.pass(1)?;
        let held = hold_loosely();
        go.open()?;
        held?;
        thread.join().unwrap_or_else(|_| Err("it panicked".into()))
    })
}

/// Threads in directories of their own, as file servers have them: one with a mask of its own, one where nothing is any more,
/// one below another root, as another user.
fn thread_directory() -> Checked {
    make("/tmp/cell/tmp")?;
    make("/tmp/gone")?;
    let (set_up, go) = (Gate::new()?, Gate::new()?);
    let masked = || {
        unsafe { libc::umask(0o27) };
        go_to("/usr")
    };
    let is_masked = || {
        equal("where it is", working_directory(), "/usr".into())?;
        equal("its mask", unsafe { libc::umask(0) }, 0o27)
    };
    let removed = || {
        go_to("/tmp/gone")?;
        std::fs::remove_dir("/tmp/gone").map_err(|e| e.to_string())
    };
    let is_removed = || check(std::env::current_dir().is_err(), "a removed directory has a name");
    let rooted = || {
        done("chroot", unsafe { libc::chroot(c"/tmp/cell".as_ptr()) })?;
        go_to("/tmp")?;
        call("setresuid", libc::SYS_setresuid, [u64::MAX, 1234, u64::MAX]).map(drop)
    };
    let is_rooted = || {
        check(!std::path::Path::new("/proc").exists(), "the old root is there")?;
        equal("where it is", working_directory(), "/tmp".into())?;
        equal("its user", unsafe { libc::syscall(libc::SYS_geteuid) }, 1234)
    };
    std::thread::scope(|scope| {
        let apart = |there: fn() -> Checked, afterwards: fn() -> Checked| {
            let gates = (&set_up, &go);
            scope.spawn(move || leave_others(libc::CLONE_FS, gates, there, afterwards))
        };
        let threads = [apart(masked, is_masked), apart(removed, is_removed), apart(rooted, is_rooted)];
        set_up.pass(3)?;
        let open = open_descriptors()?;
        hold()?;
        equal("open descriptors", open_descriptors()?, open)?;
        equal("where the first thread is", working_directory(), "/".into())?;
        equal("its mask", unsafe { libc::umask(0o22) }, 0o22)?;
        threads.iter().try_for_each(|_| go.open())?;
        threads.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(|_| Err("it panicked".into())))
    })
}

fn open_descriptors() -> Result<usize, String> {
    std::fs::read_dir("/proc/self/fd").map(Iterator::count).map_err(|e| e.to_string())
}

/// A thread that shares its directory with a thread which it has made, and with no other.
fn thread_directory_shared() -> Checked {
    apart(
        libc::CLONE_FS,
        || {
            std::thread::spawn(await_go);
            Ok(())
        },
        || Ok(()),
    )
}

/// A thread whose directory is that of a process.
fn thread_directory_of_process() -> Checked {
    apart(
        libc::CLONE_FS,
        || std::env::set_current_dir("/proc/self").map_err(|e| e.to_string()),
        || check(std::fs::exists("status").unwrap_or(false), "it is elsewhere"),
    )
}

/// A thread with descriptors of its own.
fn thread_files() -> Checked {
    let file = std::fs::File::open("/dev/null").map_err(|e| e.to_string())?;
    let number = file.as_raw_fd();
    let closed = || unsafe { libc::fcntl(number, libc::F_GETFD) } == -1;
    apart(
        libc::CLONE_FILES,
        || done("close", unsafe { libc::close(number) }).map(drop),
        || check(closed(), "it has another's descriptor"),
    )?;
    check(!closed(), "the others' is closed")
}

/// A thread that gives back on its own what it has taken of semaphores.
fn thread_undo_list() -> Checked {
    let set = call("semget", libc::SYS_semget, [libc::IPC_PRIVATE as u64, 1, 0o600])?;
    let value = move || call("semctl", libc::SYS_semctl, [set as u64, 0, libc::GETVAL as u64, 0]);
    apart(
        libc::CLONE_SYSVSEM,
        move || {
            let operation = libc::sembuf { sem_num: 0, sem_op: 3, sem_flg: libc::SEM_UNDO as i16 };
            call("semop", libc::SYS_semop, [set as u64, &raw const operation as u64, 1]).map(drop)
        },
        move || equal("the value", value()?, 3),
    )?;
    until("the thread to have given it back", || value() == Ok(0))?;
    call("semctl", libc::SYS_semctl, [set as u64, 0, libc::IPC_RMID as u64, 0]).map(drop)
}
