//! Other people's processes, and PID 1.

use std::os::fd::AsRawFd;

use harness::escape::Facts;

use super::attempt::{Attempt, Failed, Kept, Tried, c, call, check, io, own, prepare, read, write};

pub(crate) const ATTEMPTS: &[Attempt] = &[
    ("signal-host", |f, _| check(unsafe { libc::kill(f.pid, 0) }.into()).map(drop)),
    ("signal-group-host", |f, _| check(unsafe { libc::kill(-f.pid, 0) }.into()).map(drop)),
    ("queue-signal-host", |f, _| queue(f.pid)),
    ("kill-init", |_, _| at_init(libc::SIGKILL)),
    ("stop-init", |_, _| at_init(libc::SIGSTOP)),
    ("trace-host", |f, _| trace(f.pid)),
    ("trace-init", |_, _| trace(1)),
    ("read-memory-host", |f, _| vm(libc::SYS_process_vm_readv, f.pid)),
    ("read-memory-init", |_, _| vm(libc::SYS_process_vm_readv, 1)),
    ("write-memory-init", |_, _| vm(libc::SYS_process_vm_writev, 1)),
    ("pidfd-host", |f, _| check(call(libc::SYS_pidfd_open, [f.pid as u64, 0, 0, 0, 0, 0])).map(drop)),
    ("take-file-of-init", take_file),
    ("kill-init-by-pidfd", kill_by_pidfd),
    ("enter-init-by-pidfd", enter_by_pidfd),
    ("compare-with-init", |_, _| check(call(libc::SYS_kcmp, [1, std::process::id().into(), 2, 0, 0, 0])).map(drop)),
    ("limit-host", |f, _| prlimit(f.pid)),
    ("affinity-host", |f, _| {
        let mask = 1u64;
        check(call(libc::SYS_sched_setaffinity, [f.pid as u64, 8, &raw const mask as u64, 0, 0, 0])).map(drop)
    }),
    ("priority-host", |f, _| {
        check(unsafe { libc::setpriority(libc::PRIO_PROCESS, f.pid as u32, 10) }.into()).map(drop)
    }),
    ("io-priority-host", |f, _| check(call(libc::SYS_ioprio_set, [1, f.pid as u64, 2 << 13 | 4, 0, 0, 0])).map(drop)),
    ("robust-list-host", |f, _| {
        let mut out = [0u64; 2];
        let [head, length] = [0, 1].map(|i| (&raw mut out[i]) as u64);
        check(call(libc::SYS_get_robust_list, [f.pid as u64, head, length, 0, 0, 0])).map(drop)
    }),
    ("own-signals-to-host", |f, kept| {
        check(unsafe { libc::fcntl(kept.root.as_raw_fd(), libc::F_SETOWN, f.pid) }.into()).map(drop)
    }),
    ("proc-host", |f, _| read(&format!("/proc/{}/status", f.pid))),
    ("proc-host-root", |f, _| read(&format!("/proc/{}/root{}", f.pid, f.marker))),
    ("proc-host-by-kept-proc", |f, kept| {
        let path = c(&format!("{}/status", f.pid));
        check(unsafe { libc::openat(kept.proc.as_raw_fd(), path.as_ptr(), libc::O_RDONLY) }.into()).map(drop)
    }),
    ("proc-init-memory", |_, _| write("/proc/1/mem", "x")),
    ("proc-init-maps", |_, _| read("/proc/1/maps")),
    ("proc-init-environment", |_, _| read("/proc/1/environ")),
    ("proc-init-stack", |_, _| read("/proc/1/stack")),
    ("proc-init-exe", |_, _| read("/proc/1/exe")),
    ("proc-init-exe-written", |_, _| write("/proc/1/exe", "x")),
    ("proc-init-exe-name", |_, _| std::fs::read_link("/proc/1/exe").map(drop).map_err(io)),
    ("proc-init-root", |f, _| read(&format!("/proc/1/root{}", f.marker))),
    ("proc-init-cwd", |_, _| std::fs::read_dir("/proc/1/cwd").map(drop).map_err(io)),
    ("proc-init-files", |_, _| first_link("/proc/1/fd")),
    ("proc-init-file", |_, _| read("/proc/1/fd/3")),
    ("proc-init-mapped-files", |_, _| first_link("/proc/1/map_files")),
    ("proc-init-namespace", |_, _| std::fs::File::open("/proc/1/ns/mnt").map(drop).map_err(io)),
];

fn queue(pid: i32) -> Tried {
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    info.si_code = libc::SI_QUEUE;
    let info = &raw const info as u64;
    check(call(libc::SYS_rt_sigqueueinfo, [pid as u64, libc::SIGUSR1 as u64, info, 0, 0, 0])).map(drop)
}

/// PID 1 takes no signal that it has not asked for.
fn at_init(signal: i32) -> Tried {
    check(unsafe { libc::kill(1, signal) }.into())?;
    std::thread::sleep(std::time::Duration::from_millis(5));
    init_is_well()
}

fn init_is_well() -> Tried {
    let stat = std::fs::read_to_string("/proc/1/stat").map_err(io)?;
    let state = stat.rsplit(')').next().unwrap_or_default().trim().chars().next();
    if matches!(state, Some('S' | 'R')) { Err(Failed::Nothing) } else { Ok(()) }
}

fn trace(pid: i32) -> Tried {
    check(unsafe { libc::ptrace(libc::PTRACE_SEIZE, pid, 0, 0) }).map(drop)
}

fn vm(number: i64, pid: i32) -> Tried {
    let mut here = [0u8; 8];
    let local = libc::iovec { iov_base: here.as_mut_ptr().cast(), iov_len: 8 };
    // The image of this program is not linked to a fixed address; that of zap is.
    let remote = libc::iovec { iov_base: 0x40_0000 as *mut _, iov_len: 8 };
    let (local, remote) = (&raw const local as u64, &raw const remote as u64);
    check(call(number, [pid as u64, local, 1, remote, 1, 0])).map(drop)
}

fn pidfd_of_init() -> Result<std::os::fd::OwnedFd, Failed> {
    Ok(own(prepare(call(libc::SYS_pidfd_open, [1, 0, 0, 0, 0, 0]))?))
}

fn take_file(_: &Facts, _: &Kept) -> Tried {
    let init = pidfd_of_init()?;
    check(call(libc::SYS_pidfd_getfd, [init.as_raw_fd() as u64, 3, 0, 0, 0, 0])).map(drop)
}

fn kill_by_pidfd(_: &Facts, _: &Kept) -> Tried {
    let init = pidfd_of_init()?;
    check(call(libc::SYS_pidfd_send_signal, [init.as_raw_fd() as u64, libc::SIGKILL as u64, 0, 0, 0, 0]))?;
    std::thread::sleep(std::time::Duration::from_millis(5));
    init_is_well()
}

fn enter_by_pidfd(_: &Facts, _: &Kept) -> Tried {
    let init = pidfd_of_init()?;
    check(unsafe { libc::setns(init.as_raw_fd(), libc::CLONE_NEWNS | libc::CLONE_NEWPID) }.into()).map(drop)
}

fn prlimit(pid: i32) -> Tried {
    let limit = libc::rlimit { rlim_cur: 64, rlim_max: 64 };
    let limit = &raw const limit as u64;
    check(call(libc::SYS_prlimit64, [pid as u64, libc::RLIMIT_NOFILE.into(), limit, 0, 0, 0])).map(drop)
}

/// Where the first link of a directory leads.
fn first_link(directory: &str) -> Tried {
    let first = std::fs::read_dir(directory).map_err(io)?.next();
    let Some(first) = first else { return Err(Failed::Nothing) };
    std::fs::read_link(first.map_err(io)?.path()).map(drop).map_err(io)
}
