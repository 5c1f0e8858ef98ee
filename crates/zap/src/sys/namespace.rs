//! Making processes in new namespaces: `fork`, `clone3`, `unshare`.

use std::convert::Infallible;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use super::check;

/// Which side of a fork one is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The new process.
    Child,
    /// The old one, with the PID of the child as the old one's PID namespace numbers it.
    Parent(i32),
}

impl Side {
    fn of(result: u64) -> Side {
        if result == 0 { Side::Child } else { Side::Parent(result as i32) }
    }
}

#[repr(C, align(8))]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// Forks. The C library makes its own locks usable in the child; the caller must have no other thread that could hold
/// a lock of ours which the child would take.
pub fn fork() -> io::Result<Side> {
    // SAFETY: fork copies the process; both sides go on with memory of their own. The C library's own state is made
    // consistent by it, and callers fork while they are the only thread (documented above).
    check(unsafe { libc::fork() }.into()).map(Side::of)
}

fn clone3(args: &CloneArgs) -> io::Result<Side> {
    // SAFETY: without CLONE_VM this is a fork; the kernel reads one CloneArgs (and the set_tid array that it points to),
    // which outlive the call. The stack is the caller's own (null asks for that).
    check(unsafe { libc::syscall(libc::SYS_clone3, &raw const *args, size_of::<CloneArgs>()) }).map(Side::of)
}

/// Clones a sibling (`CLONE_PARENT`) in new namespaces of these kinds, in that cgroup. Only for a single-threaded caller.
pub fn clone_sibling(namespaces: i32, cgroup: BorrowedFd<'_>) -> io::Result<Side> {
    let flags = namespaces as u64 | libc::CLONE_PARENT as u64 | CLONE_INTO_CGROUP;
    clone3(&CloneArgs { flags, cgroup: cgroup.as_raw_fd() as u64, ..CloneArgs::default() })
}

/// Clones a child that has this PID in the caller's PID namespace. Only for a single-threaded caller.
pub fn clone_numbered(pid: i32) -> io::Result<Side> {
    let set_tid = [pid];
    clone3(&CloneArgs {
        exit_signal: libc::SIGCHLD as u64,
        set_tid: set_tid.as_ptr() as u64,
        set_tid_size: 1,
        ..CloneArgs::default()
    })
}

const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Leaves namespaces of these kinds for new ones.
pub fn unshare(kinds: i32) -> io::Result<()> {
    // SAFETY: numbers only.
    check(unsafe { libc::unshare(kinds) }.into()).map(drop)
}

/// Ends the process at once: nothing of the parent's that was inherited is flushed or dropped.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: _exit runs no handlers and does not return.
    unsafe { libc::_exit(code) }
}

/// Runs a program in a process of its own that is nobody's child, as [`apart`] makes it.
pub fn spawn_apart(program: &CString, args: &[CString], env: &[CString], socket: &OwnedFd) -> io::Result<()> {
    apart(socket, || Ok(nix::unistd::execve(program, args, env)?))
}

/// Does `work` in a copy of this process that is nobody's child, as [`apart`] makes it. It looks as if it had been started
/// with these arguments and this environment, and ends with the work.
pub fn fork_apart(args: &[CString], env: &[CString], socket: &OwnedFd, work: impl FnOnce()) -> io::Result<()> {
    apart(socket, || {
        super::exec::ignore_failed_writes();
        super::exec::disguise(args, env)?;
        work();
        exit_now(0)
    })
}

/// Makes a process that is nobody's child, in a new session, with the default signals, `socket` as descriptor 3, the null
/// device as 0, 1 and 2, and nothing else open, and has it go on with `then`. For a single-threaded caller.
fn apart(socket: &OwnedFd, then: impl FnOnce() -> io::Result<Infallible>) -> io::Result<()> {
    let Side::Parent(child) = fork()? else {
        exit_now(match start_apart(socket).and_then(|()| then()) {
            Ok(never) => match never {},
            Err(e) => error_number(&e),
        })
    };
    await_child(child)
}

/// Waits for a child that ends with the number of its error, or 0.
fn await_child(child: i32) -> io::Result<()> {
    use nix::sys::wait::WaitStatus::Exited;
    loop {
        return match nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(child), None) {
            Err(nix::Error::EINTR) => continue,
            Ok(Exited(_, 0)) => Ok(()),
            Ok(Exited(_, code)) => Err(io::Error::from_raw_os_error(code)),
            Ok(_) => Err(io::Error::from_raw_os_error(libc::EINTR)),
            Err(error) => Err(error.into()),
        };
    }
}

fn error_number(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EINVAL)
}

/// Sends `bytes` through `socket` in a process of its own, which is nobody's child, has nothing but that socket and `until` open,
/// and ends with the call: for requests that the kernel is long about. Other threads may run beside the caller.
pub fn send_apart(socket: BorrowedFd<'_>, bytes: &[u8], until: BorrowedFd<'_>) -> io::Result<()> {
    // A copy of one thread of several has locks that nobody lets go of: nothing from here on takes any, or memory.
    let Side::Parent(child) = fork()? else {
        exit_now(match fork() {
            Ok(Side::Child) => send_alone(socket, bytes, until).map_or_else(|e| error_number(&e), |()| 0),
            Ok(Side::Parent(_)) => 0,
            Err(e) => error_number(&e),
        })
    };
    await_child(child)
}

fn send_alone(socket: BorrowedFd<'_>, bytes: &[u8], until: BorrowedFd<'_>) -> io::Result<()> {
    const ROOM: i32 = 10;
    let keep = |file: BorrowedFd<'_>| nix::fcntl::fcntl(file, nix::fcntl::FcntlArg::F_DUPFD(ROOM));
    let (socket, until) = (keep(socket)?, keep(until)?);
    super::exec::duplicate_to(socket, 0)?;
    super::exec::duplicate_to(until, 1)?;
    super::exec::close_from(2)?;
    nix::sys::socket::send(0, bytes, nix::sys::socket::MsgFlags::empty())?;
    Ok(())
}

fn start_apart(socket: &OwnedFd) -> io::Result<()> {
    nix::unistd::setsid()?;
    if let Side::Parent(_) = fork()? {
        exit_now(0);
    }
    super::exec::reset_signals()?;
    let socket = nix::fcntl::fcntl(socket, nix::fcntl::FcntlArg::F_DUPFD(10))?;
    let null = std::fs::File::options().read(true).write(true).open("/dev/null");
    // Closed here: nobody may own what is closed below.
    let null = null.and_then(|null| Ok(nix::fcntl::fcntl(null, nix::fcntl::FcntlArg::F_DUPFD(10))?))?;
    for to in 0..3 {
        super::exec::duplicate_to(null, to)?;
    }
    super::exec::duplicate_to(socket, 3)?;
    super::exec::close_from(4)
}

/// Switches the loopback interface of the caller's network namespace on.
pub fn loopback_up() -> io::Result<()> {
    tell_interface("lo", libc::SIOCSIFFLAGS, |told| told.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as i16)
}

/// Has an interface of the caller's network namespace listen to a group, by its hardware address, until it is told otherwise.
pub fn listen_to(interface: &str, group: &[u8]) -> io::Result<()> {
    let mut address = libc::sockaddr { sa_family: libc::AF_UNSPEC as u16, sa_data: [0; 14] };
    for (to, from) in address.sa_data.iter_mut().zip(group) {
        *to = *from as libc::c_char;
    }
    tell_interface(interface, libc::SIOCADDMULTI, |told| told.ifru_hwaddr = address)
}

/// A request to an interface of the caller's network namespace (netdevice(7)) with which nothing comes back.
fn tell_interface(
    interface: &str,
    request: libc::c_ulong,
    fill: impl FnOnce(&mut libc::__c_anonymous_ifr_ifru),
) -> io::Result<()> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: an all-zero ifreq is a valid one.
    let mut told: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in told.ifr_name.iter_mut().take(libc::IFNAMSIZ - 1).zip(interface.bytes()) {
        *to = from as libc::c_char;
    }
    fill(&mut told.ifr_ifru);
    // SAFETY: the kernel reads one ifreq, which outlives the call.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), request, &raw const told) }.into()).map(drop)
}

/// Names the domain of the caller's host name namespace.
pub fn set_domain(name: &[u8]) -> io::Result<()> {
    // SAFETY: the kernel reads the bytes of the name, which outlive the call.
    check(unsafe { libc::setdomainname(name.as_ptr().cast(), name.len()) }.into()).map(drop)
}
