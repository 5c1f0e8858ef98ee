//! Holding processes, looking into them, and making them again.

use std::io;
use std::path::Path;

use super::{Feature, holds, required, useful, works};
use crate::ids::HostPid;
use crate::pod::capabilities;
use crate::sys::kcmp::{self, Shared};
use crate::sys::namespace::{self, Side};
use crate::sys::pidfd::PidFd;
use crate::sys::{capability, probe, ptrace, socket};

const NEEDED: [u32; 4] = [12, 19, 21, 40];
const SYS_RESOURCE: u32 = 24;
const STATMOUNT: libc::c_long = 457;

pub(super) fn features() -> Vec<Feature> {
    let own = HostPid(std::process::id() as i32);
    vec![
        required("namespaces", "pods: names of their own", namespaces()),
        required("capabilities", "making and rebuilding pods", has_capabilities(&NEEDED)),
        useful(
            "CAP_SYS_RESOURCE",
            "raising resource limits above zap's own in a restarted pod",
            has_capabilities(&[SYS_RESOURCE]),
        ),
        required("clone3 set_tid", "restarting processes under their PIDs", works(numbered_child())),
        required("pidfd_getfd", "looking into open files from outside", works(PidFd::open(own).and_then(|p| p.get(2)))),
        required(
            "kcmp",
            "telling shared files and memory from equal ones",
            works(kcmp::shares(own.0, own.0, Shared::Memory)),
        ),
        required("ptrace seize", "holding processes still", works(tracing(0))),
        required(
            "PTRACE_O_SUSPEND_SECCOMP",
            "acting inside processes that have a system call filter",
            works(tracing(libc::PTRACE_O_SUSPEND_SECCOMP)),
        ),
        required("PR_SET_MM_MAP", "restarting the layout of memory", works(probe::set_memory_map())),
        required("ARCH_MAP_VDSO_64", "putting the vDSO where it was", works(probe::map_vdso())),
        required("TCP_REPAIR", "saving and restarting TCP connections", works(tcp_repair())),
        useful("POSIX timer numbers", "restarting timers under large numbers at once", works(probe::timer_numbers())),
        useful("statmount", "reading mounts one by one", works(probe::has_call(STATMOUNT))),
    ]
}

fn namespaces() -> io::Result<String> {
    let kinds = ["pid", "mnt", "ipc", "uts", "net", "cgroup", "time"];
    let missing: Vec<_> = kinds.into_iter().filter(|kind| !Path::new("/proc/self/ns").join(kind).exists()).collect();
    holds(missing.is_empty(), &format!("the kernel has none of: {}", missing.join(", ")))
}

fn has_capabilities(wanted: &[u32]) -> io::Result<String> {
    let had = capability::permitted()?;
    let missing: Vec<_> = wanted.iter().filter(|n| had & (1 << **n) == 0).map(|n| capabilities::name(*n)).collect();
    holds(missing.is_empty(), &format!("without {}", missing.join(" and ")))
}

/// Makes a child under a PID that was free a moment ago: that of one that has just ended.
fn numbered_child() -> io::Result<()> {
    let earlier = end(namespace::fork()?)?;
    match namespace::clone_numbered(earlier) {
        // Somebody else has it by now, which the kernel only notices if it can choose.
        Err(e) if e.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        other => end(other?).map(drop),
    }
}

/// Ends at once in the child, and reaps it in the parent.
fn end(side: Side) -> io::Result<i32> {
    match side {
        Side::Child => namespace::exit_now(0),
        Side::Parent(child) => {
            nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(child), None).map(|_| child).map_err(Into::into)
        }
    }
}

/// Seizes a child of ours with these options.
fn tracing(options: i32) -> io::Result<()> {
    let (held, release) = io::pipe()?;
    match namespace::fork()? {
        Side::Child => {
            drop(release);
            // Ends when the parent closes its end.
            let _ = io::Read::read(&mut &held, &mut [0]);
            namespace::exit_now(0)
        }
        Side::Parent(child) => {
            let seized = ptrace::seize(HostPid(child), options);
            drop(release);
            nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(child), None)?;
            seized
        }
    }
}

fn tcp_repair() -> io::Result<()> {
    let socket = socket::socket(libc::AF_INET, libc::SOCK_STREAM, 0)?;
    socket::set_int(&socket, libc::IPPROTO_TCP, libc::TCP_REPAIR, 1)
}
