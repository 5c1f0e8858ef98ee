//! Process trees: children and grandchildren, the ended, the orphaned, the stopped.

use std::os::fd::AsRawFd;

use crate::stage::*;

pub(crate) const KINDS: &[crate::stage::Kind] = &[
    ("plain", plain),
    ("tree", tree),
    ("zombies", zombies),
    ("zombie-signals", zombie_signals),
    ("orphan", orphan),
    ("subreaper", subreaper),
    ("subreaper-sessions", subreaper_sessions),
    ("death-signal", death_signal),
    ("exit-signal", exit_signal),
    ("stopped", stopped),
    ("stopped-threads", stopped_threads),
    ("vfork", vfork),
    ("vfork-brief", vfork_brief),
    ("leader-gone", leader_gone),
    ("traced", traced),
    ("forks-afterwards", forks_afterwards),
];

fn plain() -> Checked {
    hold()
}

fn parent() -> i32 {
    unsafe { libc::getppid() }
}

/// Three children with three children each: everybody knows parent and children again.
fn tree() -> Checked {
    let set_up = Gate::new()?;
    let children: Vec<i32> = (0..3).map(|_| fork(|| branch(set_up))).collect::<Result<_, _>>()?;
    set_up.pass(12)?;
    hold()?;
    children.into_iter().try_for_each(reap)
}

fn branch(set_up: Gate) -> Checked {
    let before = parent();
    let leaf = || {
        let before = parent();
        set_up.open()?;
        await_go();
        equal("the parent of a grandchild", parent(), before)
    };
    let children: Vec<i32> = (0..3).map(|_| fork(leaf)).collect::<Result<_, _>>()?;
    set_up.open()?;
    await_go();
    children.into_iter().try_for_each(reap)?;
    equal("the parent of a child", parent(), before)
}

fn die_of(signal: i32) -> Checked {
    let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    unsafe { libc::setrlimit(libc::RLIMIT_CORE, &raw const none) };
    unsafe { libc::signal(signal, libc::SIG_DFL) };
    unsafe { libc::kill(libc::getpid(), signal) };
    Err("survived".into())
}

fn until_ended(pid: i32) -> Checked {
    until("a child to end", || read(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") Z ")))
}

/// Children that have ended in several ways; they are reaped in order, with what they ended with.
fn zombies() -> Checked {
    let exits = |code: i32| move || -> Checked { unsafe { libc::_exit(code) } };
    let pids = [
        fork(exits(0))?,
        fork(exits(7))?,
        fork(exits(255))?,
        fork(|| die_of(libc::SIGKILL))?,
        fork(|| die_of(libc::SIGTERM))?,
        fork(|| die_of(libc::SIGSEGV))?,
    ];
    pids.into_iter().try_for_each(until_ended)?;
    hold()?;
    let statuses = [0, 7 << 8, 255 << 8, libc::SIGKILL, libc::SIGTERM, libc::SIGSEGV];
    for (pid, expected) in pids.into_iter().zip(statuses) {
        let mut status = 0;
        let reaped = done("waitpid", unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) })?;
        equal("the next to be reaped", reaped, i64::from(pid))?;
        equal("a wait status", status, expected)?;
    }
    let none = unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) };
    equal("a wait without children", none, -1)
}

/// The SIGCHLD of a zombie is pending once, and tells of the first.
fn zombie_signals() -> Checked {
    let mut set = crate::signals::set(&[libc::SIGCHLD]);
    unsafe { libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
    let first = fork(|| unsafe { libc::_exit(3) })?;
    until_ended(first)?;
    let second = fork(|| unsafe { libc::_exit(4) })?;
    until_ended(second)?;
    hold()?;
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let signal = unsafe { libc::sigwaitinfo(&raw mut set, &raw mut info) };
    equal("the pending signal", signal, libc::SIGCHLD)?;
    equal(
        "of whom it tells",
        unsafe { (info.si_pid(), info.si_status(), info.si_code) },
        (first, 3, libc::CLD_EXITED),
    )?;
    equal("first status", status_of(first)?, 3 << 8)?;
    equal("second status", status_of(second)?, 4 << 8)
}

/// A process whose parent has ended lives in the session of one that lives.
fn orphan() -> Checked {
    let (set_up, well) = (Gate::new()?, Gate::new()?);
    let middle = fork(|| {
        fork(|| {
            until("adoption", || parent() == 1)?;
            set_up.open()?;
            await_go();
            equal("the parent of an orphan", parent(), 1)?;
            well.open()
        })
        .map(drop)
    })?;
    reap(middle)?;
    set_up.pass(1)?;
    hold()?;
    well.pass(1)
}

/// An orphan below a subreaper is its child.
fn subreaper() -> Checked {
    call("prctl", libc::SYS_prctl, [libc::PR_SET_CHILD_SUBREAPER as u64, 1])?;
    let (set_up, itself) = (Gate::new()?, std::process::id() as i32);
    let middle = fork(|| {
        fork(|| {
            until("adoption", || parent() == itself)?;
            set_up.open()?;
            await_go();
            equal("the parent of an adopted process", parent(), itself)
        })
        .map(drop)
    })?;
    reap(middle)?;
    set_up.pass(1)?;
    hold()?;
    let mut flag = 0u64;
    call("prctl", libc::SYS_prctl, [libc::PR_GET_CHILD_SUBREAPER as u64, &raw mut flag as u64])?;
    equal("the subreaper flag", flag as u32, 1)?;
    reap(-1)
}

/// Adopted processes of other sessions: of one whose leader has left, and of one whose leader lives.
fn subreaper_sessions() -> Checked {
    call("prctl", libc::SYS_prctl, [libc::PR_SET_CHILD_SUBREAPER as u64, 1])?;
    let (set_up, itself) = (Gate::new()?, std::process::id() as i32);
    let adopted = || {
        until("adoption", || parent() == itself)?;
        let session = unsafe { libc::getsid(0) };
        set_up.open()?;
        await_go();
        equal("the parent of an adopted process", parent(), itself)?;
        equal("its session", unsafe { libc::getsid(0) }, session)
    };
    let left = fork(|| {
        done("setsid", unsafe { libc::setsid() })?;
        fork(adopted).map(drop)
    })?;
    reap(left)?;
    let leader = fork(|| {
        done("setsid", unsafe { libc::setsid() })?;
        let middle = fork(|| fork(adopted).map(drop))?;
        reap(middle)?;
        set_up.open()?;
        await_go();
        // Nobody was left here.
        check(status_of(-1).is_err(), "there is another child")
    })?;
    set_up.pass(3)?;
    hold()?;
    [leader, -1, -1].into_iter().try_for_each(reap)
}

/// The parent-death signal is set, and comes.
fn death_signal() -> Checked {
    let (set_up, well) = (Gate::new()?, Gate::new()?);
    let middle = fork(|| {
        fork(|| {
            crate::signals::block(&[libc::SIGUSR1]);
            call("prctl", libc::SYS_prctl, [libc::PR_SET_PDEATHSIG as u64, libc::SIGUSR1 as u64])?;
            set_up.open()?;
            await_go();
            let mut signal = 0u64;
            call("prctl", libc::SYS_prctl, [libc::PR_GET_PDEATHSIG as u64, &raw mut signal as u64])?;
            equal("the parent-death signal", signal as i32, libc::SIGUSR1)?;
            equal("the signal of a parent's death", crate::signals::wait_for(&[libc::SIGUSR1]), libc::SIGUSR1)?;
            well.open()
        })?;
        set_up.pass(1)?;
        set_up.open()?;
        await_go();
        Ok(())
    })?;
    set_up.pass(0)?;
    until_asleep(middle)?;
    until("the grandchild", || read(format!("/proc/{middle}/task/{middle}/children")).is_ok_and(|c| !c.is_empty()))?;
    hold()?;
    reap(middle)?;
    well.pass(1)
}

/// A child whose end is told by another signal than SIGCHLD, and one whose end is not told at all.
fn exit_signal() -> Checked {
    crate::signals::block(&[libc::SIGUSR2]);
    let silent = clone_with(0)?;
    let telling = clone_with(libc::SIGUSR2)?;
    hold()?;
    equal("the signal of the child's end", crate::signals::wait_for(&[libc::SIGUSR2]), libc::SIGUSR2)?;
    reap(telling)?;
    reap(silent)
}

fn clone_with(exit_signal: i32) -> Result<i32, String> {
    match call("clone", libc::SYS_clone, [exit_signal as u64, 0, 0, 0, 0])? {
        0 => {
            await_go();
            leave(Ok(()))
        }
        pid => Ok(pid as i32),
    }
}

fn state_of(pid: i32) -> String {
    let stat = read(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").map_or_else(String::new, |(_, rest)| rest[..1].into())
}

fn wait_flags(pid: i32, flags: i32) -> Result<(i32, i32), String> {
    let mut status = 0;
    let reaped = done("waitpid", unsafe { libc::waitpid(pid, &raw mut status, flags) })?;
    Ok((reaped as i32, status))
}

/// A stopped child stays stopped, whether its parent has been told or not, and goes on with SIGCONT.
fn stopped() -> Checked {
    let stops = |signal: i32| {
        move || {
            unsafe { libc::raise(signal) };
            Ok(())
        }
    };
    // In a group of its own that is not orphaned: SIGTSTP does nothing in others.
    let background = move || {
        done("setpgid", unsafe { libc::setpgid(0, 0) })?;
        stops(libc::SIGTSTP)()
    };
    let (told, untold) = (fork(stops(libc::SIGSTOP))?, fork(background)?);
    equal("a stop", wait_flags(told, libc::WUNTRACED)?.1, 0x7f | libc::SIGSTOP << 8)?;
    until("a stop", || state_of(untold) == "T")?;
    hold()?;
    equal("the states", (state_of(told), state_of(untold)), ("T".into(), "T".into()))?;
    equal("a stop told twice", wait_flags(told, libc::WUNTRACED | libc::WNOHANG)?.0, 0)?;
    let status = 0x7f | libc::SIGTSTP << 8;
    equal("a stop not told yet", wait_flags(untold, libc::WUNTRACED | libc::WNOHANG)?, (untold, status))?;
    for child in [told, untold] {
        unsafe { libc::kill(child, libc::SIGCONT) };
        reap(child)?;
    }
    Ok(())
}

/// Every thread of a stopped process stands still, and goes on.
fn stopped_threads() -> Checked {
    let child = fork(|| {
        let threads: Vec<_> = (0..5).map(|_| std::thread::spawn(await_go)).collect();
        unsafe { libc::kill(libc::getpid(), libc::SIGSTOP) };
        threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| "a thread panicked".into()))
    })?;
    equal("a stop", wait_flags(child, libc::WUNTRACED)?.1, 0x7f | libc::SIGSTOP << 8)?;
    hold()?;
    doze();
    equal("the state", state_of(child), "T".into())?;
    unsafe { libc::kill(child, libc::SIGCONT) };
    reap(child)
}

/// A parent that waits for its vfork child.
fn vfork() -> Checked {
    let parent = fork(|| {
        let mut stack = vec![0u64; 1 << 13];
        let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
        let top = unsafe { stack.as_mut_ptr().add(stack.len()) };
        let child = done("clone", unsafe { libc::clone(in_vfork, top.cast(), flags, std::ptr::null_mut()) })?;
        reap(child as i32)
    })?;
    until("a vfork", || state_of(parent) == "D")?;
    hold_loosely()?;
    reap(parent)
}

/// A process that always has a vfork child, for a moment less than is waited for.
fn vfork_brief() -> Checked {
    let parent = fork(|| {
        let mut stack = vec![0u64; 1 << 13];
        let top = unsafe { stack.as_mut_ptr().add(stack.len()) };
        while !std::path::Path::new(ON).exists() {
            let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
            let child = unsafe { libc::clone(for_a_moment, top.cast(), flags, std::ptr::null_mut()) };
            reap(done("clone", child)? as i32)?;
            doze();
        }
        Ok(())
    })?;
    until("a vfork", || state_of(parent) == "D")?;
    hold_loosely()?;
    reap(parent)
}

extern "C" fn for_a_moment(_: *mut libc::c_void) -> i32 {
    unsafe { libc::usleep(150_000) };
    0
}

extern "C" fn in_vfork(_: *mut libc::c_void) -> i32 {
    while unsafe { libc::access(c"/tmp/on".as_ptr(), libc::F_OK) } != 0 {
        unsafe { libc::usleep(5_000) };
    }
    0
}

/// A process whose first thread has ended while others run: its status is that of the last.
fn leader_gone() -> Checked {
    let (set_up, files) = (Gate::new()?, Gate::new()?);
    let child = fork(|| {
        for number in 0..3 {
            std::thread::spawn(move || {
                let shared = std::fs::File::open("/etc").map(|file| file.as_raw_fd());
                let (tid, name) = (unsafe { libc::gettid() }, format!("worker{number}"));
                let set = std::ffi::CString::new(name.clone()).unwrap_or_default();
                unsafe { libc::prctl(libc::PR_SET_NAME, set.as_ptr()) };
                crate::signals::block(&[libc::SIGUSR1]);
                unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, libc::SIGUSR1) };
                let well = set_up.open();
                await_go();
                let comm = read(format!("/proc/self/task/{tid}/comm")).unwrap_or_default();
                let pending = crate::signals::poll_for(&[libc::SIGUSR1]);
                let again = crate::signals::poll_for(&[libc::SIGUSR1]);
                let same = unsafe { libc::gettid() } == tid && comm.trim() == name && shared.is_ok();
                if !same || well.is_err() || (pending, again) != (Some(libc::SIGUSR1), None) {
                    println!("a thread: {comm:?} {pending:?} {again:?}");
                    unsafe { libc::_exit(1) };
                }
                let _ = files.open();
                unsafe { libc::syscall(libc::SYS_exit, 7) };
            });
        }
        unsafe { libc::prctl(libc::PR_SET_NAME, c"has left".as_ptr()) };
        unsafe { libc::syscall(libc::SYS_exit, 3) };
        Ok(())
    })?;
    until("the leader to end", || state_of(child) == "Z")?;
    set_up.pass(3)?;
    hold()?;
    files.pass(3)?;
    equal("its status", status_of(child)?, 7 << 8)
}

/// A process that traces its child.
fn traced() -> Checked {
    hold_loosely_beside(|| done("ptrace", unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) }).map(drop))
}

/// New processes and threads are made as if nothing had been.
fn forks_afterwards() -> Checked {
    hold()?;
    for _ in 0..20 {
        reap(fork(|| std::thread::spawn(|| ()).join().map_err(|_| "a thread panicked".into()))?)?;
    }
    let ended = std::process::Command::new("/bin/true").status().map_err(|e| e.to_string())?;
    check(ended.success(), "an executed program failed")
}
