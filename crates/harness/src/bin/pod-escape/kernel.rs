//! The kernel itself: what is the whole machine's.

use std::arch::asm;

use super::attempt::{Attempt, Tried, call, check, read, write};

pub(crate) const ATTEMPTS: &[Attempt] = &[
    ("sysctl-core-pattern", |_, _| write("/proc/sys/kernel/core_pattern", "x")),
    ("sysctl-host-name", |_, _| write("/proc/sys/kernel/hostname", "x")),
    ("sysctl-caches", |_, _| write("/proc/sys/vm/drop_caches", "1")),
    ("sysctl-modprobe", |_, _| write("/proc/sys/kernel/modprobe", "/tmp/x")),
    ("sysctl-last-pid", |_, _| write("/proc/sys/kernel/ns_last_pid", "1000")),
    ("sysctl-user-namespaces", |_, _| write("/proc/sys/user/max_user_namespaces", "0")),
    ("system-request", |_, _| write("/proc/sysrq-trigger", "h")),
    ("power", |_, _| write("/sys/power/state", "mem")),
    ("event-helper", |_, _| write("/sys/kernel/uevent_helper", "/tmp/x")),
    ("huge-pages", |_, _| write("/sys/kernel/mm/transparent_hugepage/enabled", "never")),
    ("whole-memory", |_, _| read("/proc/kcore")),
    ("keys-shown", |_, _| read("/proc/keys")),
    ("log-shown", |_, _| read("/proc/kmsg")),
    ("page-flags", |_, _| read("/proc/kpageflags")),
    ("timers-shown", |_, _| read("/proc/timer_list")),
    ("log", |_, _| plain(libc::SYS_syslog, [3, 0, 0, 0, 0, 0])),
    ("clock", |_, _| set_clock()),
    ("clock-adjusted", |_, _| {
        let mut change: libc::timex = unsafe { std::mem::zeroed() };
        change.modes = libc::ADJ_TICK;
        check(unsafe { libc::adjtimex(&mut change) }.into()).map(drop)
    }),
    ("reboot", |_, _| plain(libc::SYS_reboot, [0xfee1_dead, 672_274_793, 0, 0, 0, 0])),
    ("module", |_, _| plain(libc::SYS_init_module, [0, 0, c"".as_ptr() as u64, 0, 0, 0])),
    ("another-kernel", |_, _| plain(libc::SYS_kexec_load, [0; 6])),
    ("kernel-program", |_, _| plain(libc::SYS_bpf, [0; 6])),
    ("performance", |_, _| plain(libc::SYS_perf_event_open, [0; 6])),
    ("page-faults", |_, _| plain(libc::SYS_userfaultfd, [0; 6])),
    ("accounting", |_, _| plain(libc::SYS_acct, [0; 6])),
    ("swap", |_, _| plain(libc::SYS_swapoff, [c"/swap".as_ptr() as u64, 0, 0, 0, 0, 0])),
    ("quota", |_, _| plain(libc::SYS_quotactl, [0x80_0001 << 8, 0, 0, 0, 0, 0])),
    ("watch-all-files", |_, _| plain(libc::SYS_fanotify_init, [0; 6])),
    ("ports", |_, _| plain(libc::SYS_iopl, [3, 0, 0, 0, 0, 0])),
    ("port", |_, _| plain(libc::SYS_ioperm, [0x80, 1, 1, 0, 0, 0])),
    ("new-key", |_, _| plain(libc::SYS_add_key, [0; 6])),
    ("asked-key", |_, _| plain(libc::SYS_request_key, [0; 6])),
    ("user-keyring", |_, _| plain(libc::SYS_keyctl, [0, -4i64 as u64, 0, 0, 0, 0])),
    ("ring", |_, _| plain(libc::SYS_io_uring_setup, [0; 6])),
    ("hypervisor-socket", |_, _| plain(libc::SYS_socket, [libc::AF_VSOCK as u64, 1, 0, 0, 0, 0])),
    ("hypervisor-socket-in-disguise", |_, _| {
        plain(libc::SYS_socket, [0xdead_0000_0000_0000 | libc::AF_VSOCK as u64, 1, 0, 0, 0, 0])
    }),
    ("hypervisor-socket-of-32-bits", |_, _| check(old_socket()).map(drop)),
    ("call-of-x32", |_, _| plain(0x4000_0000 | libc::SYS_socket, [libc::AF_VSOCK as u64, 1, 0, 0, 0, 0])),
    ("unknown-call", |_, _| plain(5000, [0; 6])),
    ("real-time", |_, _| {
        let priority = libc::sched_param { sched_priority: 1 };
        check(unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &priority) }.into()).map(drop)
    }),
    ("higher-priority", |_, _| check(unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, -5) }.into()).map(drop)),
    ("higher-limit", |_, _| {
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) };
        limit.rlim_max += 1;
        check(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) }.into()).map(drop)
    }),
    ("spared-when-memory-ends", |_, _| write("/proc/self/oom_score_adj", "-1000")),
];

fn plain(number: i64, arguments: [u64; 6]) -> Tried {
    check(call(number, arguments)).map(drop)
}

pub(crate) fn set_clock() -> Tried {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    unsafe { libc::clock_gettime(libc::CLOCK_REALTIME, &mut now) };
    plain(libc::SYS_clock_settime, [libc::CLOCK_REALTIME as u64, &raw const now as u64, 0, 0, 0, 0])
}

/// socket(2) by the gate and the number of 32-bit programs.
fn old_socket() -> i64 {
    const SOCKET: u64 = 359;
    let result: i64;
    unsafe {
        asm!(
            "push rbx", "mov rbx, {domain}", "int 0x80", "pop rbx",
            domain = in(reg) libc::AF_VSOCK as u64,
            inlateout("rax") SOCKET as i64 => result, in("rcx") 1u64, in("rdx") 0u64,
            out("r8") _, out("r9") _, out("r10") _, out("r11") _,
        );
    }
    if result < 0 && result > -4096 {
        nix::errno::Errno::set_raw(-result as i32);
        return -1;
    }
    result
}
