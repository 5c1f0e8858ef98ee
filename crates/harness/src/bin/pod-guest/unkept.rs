//! What the kernel lets nobody read back, or lets nobody have twice: each is refused by its name, and works on.

use crate::stage::*;

pub(crate) const KINDS: &[crate::stage::Kind] = &[
    ("userfaultfd", userfaultfd),
    ("performance-counter", performance_counter),
    ("bpf-map", bpf_map),
    ("seccomp-listener", seccomp_listener),
    ("pressure-trigger", pressure_trigger),
    ("flow-label", flow_label),
    ("mounts-limit-of-messages", mounts_limit_of_messages),
];

/// A program that sees to its own page faults.
fn userfaultfd() -> Checked {
    let watcher = call("userfaultfd", libc::SYS_userfaultfd, [libc::O_CLOEXEC as u64])? as i32;
    let mut api = [0xaau64, 0, 0];
    done("UFFDIO_API", unsafe { libc::ioctl(watcher, 0xc018_aa3f, api.as_mut_ptr()) })?;
    hold_loosely()?;
    done("fcntl", unsafe { libc::fcntl(watcher, libc::F_GETFD) }).map(drop)
}

/// The kernel counts something for this program.
fn performance_counter() -> Checked {
    // struct perf_event_attr: a software event, the time on the processor.
    let mut attributes = [0u64; 16];
    attributes[0] = 1 | (128 << 32);
    let args = [attributes.as_ptr() as u64, 0, u64::MAX, u64::MAX, 0];
    let counter = call("perf_event_open", libc::SYS_perf_event_open, args)? as i32;
    hold_loosely()?;
    let mut count = 0u64;
    let read = unsafe { libc::read(counter, (&raw mut count).cast(), 8) };
    equal("bytes of a counter", done("read", read as i64)?, 8)
}

/// An array of the kernel's programs.
fn bpf_map() -> Checked {
    // union bpf_attr: an array, its keys of 4 bytes, its values of 8, one of them.
    let mut attributes = [0u32; 32];
    attributes[..4].copy_from_slice(&[2, 4, 8, 1]);
    let map = call("bpf", libc::SYS_bpf, [0, attributes.as_ptr() as u64, 128])? as i32;
    hold_loosely()?;
    done("fcntl", unsafe { libc::fcntl(map, libc::F_GETFD) }).map(drop)
}

/// A child whose calls this program answers.
fn seccomp_listener() -> Checked {
    // Everything is allowed: the listener has nothing to answer.
    let allow = [libc::sock_filter { code: 6, jt: 0, jf: 0, k: 0x7fff_0000 }];
    let program = libc::sock_fprog { len: 1, filter: allow.as_ptr().cast_mut() };
    done("prctl", unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1u64, 0u64, 0u64, 0u64) })?;
    const NEW_LISTENER: u64 = 1 << 3;
    let listener = call("seccomp", libc::SYS_seccomp, [1, NEW_LISTENER, (&raw const program) as u64])? as i32;
    hold_loosely()?;
    done("fcntl", unsafe { libc::fcntl(listener, libc::F_GETFD) }).map(drop)
}

/// A program that is told when memory is short.
fn pressure_trigger() -> Checked {
    let mut file = std::fs::File::options().read(true).write(true).open("/proc/pressure/memory");
    let file = file.as_mut().map_err(|e| e.to_string())?;
    let trigger = b"some 150000 2000000\0";
    std::io::Write::write_all(file, trigger).map_err(|e| e.to_string())?;
    // Another, that only looks.
    let mut beside =
        std::fs::File::options().read(true).write(true).open("/proc/pressure/io").map_err(|e| e.to_string())?;
    hold_loosely()?;
    std::io::Write::write_all(&mut beside, trigger).map_err(|e| e.to_string())?;
    let again = std::io::Write::write(file, trigger).map_err(|e| e.raw_os_error());
    equal("a second trigger", again, Err(Some(libc::EBUSY)))
}

/// A socket that may label what it sends.
fn flow_label() -> Checked {
    const MANAGE: i32 = 32;
    const LABEL: u32 = 0x12345;
    // struct in6_flowlabel_req: to whom, which, get, exclusively, create it, how long.
    let mut request = [0u8; 32];
    request[15] = 1;
    request[16..20].copy_from_slice(&LABEL.to_be_bytes());
    (request[21], request[22]) = (1, 1);
    request[24..28].copy_from_slice(&[100, 0, 100, 0]);
    let socket = std::net::UdpSocket::bind("[::1]:0").map_err(|e| e.to_string())?;
    let number = std::os::fd::AsRawFd::as_raw_fd(&socket);
    let made = unsafe { libc::setsockopt(number, libc::IPPROTO_IPV6, MANAGE, request.as_ptr().cast(), 32) };
    done("IPV6_FLOWLABEL_MGR", made)?;
    let to = std::net::SocketAddrV6::new(std::net::Ipv6Addr::LOCALHOST, 9, LABEL.to_be(), 0);
    let send = unsafe { libc::setsockopt(number, libc::IPPROTO_IPV6, 33, (&raw const number).cast(), 4) };
    done("IPV6_FLOWINFO_SEND", send)?;
    hold_loosely()?;
    socket.send_to(b"labelled", to).map(drop).map_err(|e| e.to_string())
}

/// A limit that was set through a proc of the program's own.
fn mounts_limit_of_messages() -> Checked {
    crate::mounts::directory("/mnt/proc")?;
    crate::mounts::mount("proc", "/mnt/proc", "proc", 0, "")?;
    write("/mnt/proc/sys/kernel/msgmax", "5000")?;
    done("umount", unsafe { libc::umount(c"/mnt/proc".as_ptr()) })?;
    hold_loosely()?;
    equal("the limit", read("/proc/sys/kernel/msgmax")?.trim(), "5000")
}
