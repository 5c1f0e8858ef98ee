//! What browser sandboxes and container programs make: namespaces of their own, roots that are nowhere, filters.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use crate::stage::*;

pub(crate) const KINDS: &[crate::stage::Kind] = &[
    ("user-namespace", user_namespace),
    ("user-namespace-unmapped", user_namespace_unmapped),
    ("user-namespace-threads", user_namespace_threads),
    ("user-namespace-nested", user_namespace_nested),
    ("network-namespace", network_namespace),
    ("network-namespace-off", network_namespace_off),
    ("host-name-namespace", host_name_namespace),
    ("ipc-namespace", ipc_namespace),
    ("cgroup-namespace", cgroup_namespace),
    ("time-namespace", time_namespace),
    ("namespace-shared", namespace_shared),
    ("namespace-handles", namespace_handles),
    ("namespace-handle-mounts", namespace_handle_mounts),
    ("sandbox", sandbox),
    ("thread-filters", thread_filters),
    ("thread-namespace", thread_namespace),
];

pub(crate) fn unshare(kinds: i32) -> Checked {
    done("unshare", unsafe { libc::unshare(kinds) }).map(drop)
}

/// Becomes an ordinary user, whose `/proc` files are its own as those of a program that it has started.
pub(crate) fn become_ordinary() -> Checked {
    done("setresgid", unsafe { libc::setresgid(1000, 1000, 1000) })?;
    done("setresuid", unsafe { libc::setresuid(1000, 1000, 1000) })?;
    done("prctl", unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 1) }).map(drop)
}

/// Goes into a user namespace, in which this user is root.
pub(crate) fn become_root(kinds: i32) -> Checked {
    let (uid, gid) = unsafe { (libc::geteuid(), libc::getegid()) };
    unshare(libc::CLONE_NEWUSER | kinds)?;
    write("/proc/self/setgroups", "deny")?;
    write("/proc/self/gid_map", format!("0 {gid} 1"))?;
    write("/proc/self/uid_map", format!("0 {uid} 1"))
}

/// A child elsewhere, which checks there that nothing has changed.
fn elsewhere(go_there: impl FnOnce() -> Checked, afterwards: impl FnOnce() -> Checked) -> Checked {
    let set_up = Gate::new()?;
    let child = fork(|| {
        go_there()?;
        set_up.open()?;
        await_go();
        afterwards()
    })?;
    set_up.pass(1)?;
    hold()?;
    tell_home()?;
    reap(child)
}

const OF_PROCESSES: [&str; 8] = ["mnt", "net", "pid", "user", "uts", "ipc", "cgroup", "time"];

fn handle(process: &str, kind: &str) -> Result<File, String> {
    File::open(format!("/proc/{process}/ns/{kind}")).map_err(|e| format!("opening a handle on {kind}: {e}"))
}

/// Each handle is on that namespace of a process.
fn are_on(handles: &[(&str, File)], process: &str) -> Checked {
    handles.iter().try_for_each(|(kind, handle)| {
        let named = std::fs::metadata(format!("/proc/{process}/ns/{kind}")).map_err(|e| e.to_string())?;
        let open = handle.metadata().map_err(|e| e.to_string())?;
        equal(&format!("the {kind} namespace behind a handle"), open.ino(), named.ino())
    })
}

/// Goes into namespaces, and looks at the host name there.
fn host_name_in(handles: &[&File]) -> Checked {
    reap(fork(|| {
        handles.iter().try_for_each(|file| done("setns", unsafe { libc::setns(file.as_raw_fd(), 0) }).map(drop))?;
        equal("the host name there", read("/proc/sys/kernel/hostname")?.trim().into(), "inside".to_string())
    })?)
}

/// Handles on namespaces: this program's own, a child's, and those of a child that has ended.
fn namespace_handles() -> Checked {
    let (set_up, looked_at) = (Gate::new()?, Gate::new()?);
    let there = |kinds: i32| {
        let name_it = move || {
            become_root(kinds)?;
            done("sethostname", unsafe { libc::sethostname(c"inside".as_ptr(), 6) })?;
            set_up.open()?;
            looked_at.pass(1)
        };
        let child = fork(name_it)?;
        set_up.pass(1)?;
        Ok::<_, String>(child)
    };
    let child = there(libc::CLONE_NEWNET | libc::CLONE_NEWUTS | libc::CLONE_NEWIPC | libc::CLONE_NEWPID)?;
    let name = child.to_string();
    let of = |process: &str, kinds: &[&'static str]| -> Result<Vec<(&'static str, File)>, String> {
        kinds.iter().map(|kind| Ok((*kind, handle(process, kind)?))).collect()
    };
    let own = of("self", &OF_PROCESSES)?;
    let theirs = of(&name, &["user", "net", "uts", "ipc", "time_for_children"])?;
    let ended = there(libc::CLONE_NEWUTS)?;
    let left = of(&ended.to_string(), &["user", "uts"])?;
    done("kill", unsafe { libc::kill(ended, libc::SIGKILL) })?;
    status_of(ended)?;
    hold_loosely()?;
    are_on(&own, "self")?;
    are_on(&theirs, &name)?;
    host_name_in(&[&theirs[0].1, &theirs[2].1])?;
    host_name_in(&[&left[0].1, &left[1].1])?;
    looked_at.open()?;
    reap(child)
}

/// A handle on mounts that nobody sees any more.
fn namespace_handle_mounts() -> Checked {
    let set_up = Gate::new()?;
    let child = fork(|| {
        become_root(libc::CLONE_NEWNS)?;
        set_up.open()?;
        await_go();
        Ok(())
    })?;
    set_up.pass(1)?;
    let left = handle(&child.to_string(), "mnt")?;
    done("kill", unsafe { libc::kill(child, libc::SIGKILL) })?;
    status_of(child)?;
    hold_loosely()?;
    left.metadata().map(drop).map_err(|e| e.to_string())
}

/// The namespace of a process, by its number. After a restart it has another one, which may be that of any namespace before.
fn namespace(process: &str, kind: &str) -> Result<String, String> {
    let link = std::fs::read_link(format!("/proc/{process}/ns/{kind}")).map_err(|e| e.to_string())?;
    Ok(link.to_string_lossy().into_owned())
}

/// Where a parent says in which namespace of a kind it is.
const HOME: &str = "/tmp/home";

/// Tells children in which namespaces this process is now: from a user namespace of their own they cannot look.
fn tell_home() -> Checked {
    ["net", "cgroup"].iter().try_for_each(|kind| write(format!("{HOME}-{kind}"), namespace("self", kind)? + "\n"))
}

/// Whether this process is elsewhere than the pod's PID 1, whose namespaces it cannot see: those of its parent.
fn is_elsewhere(kind: &str) -> Checked {
    let told = || read(format!("{HOME}-{kind}")).ok()?.strip_suffix('\n').map(str::to_owned);
    until("the parent's word", || told().is_some())?;
    let (now, parent) = (namespace("self", kind)?, told().unwrap_or_default());
    check(now != parent, format!("the {kind} namespace is that of the parent, {now}"))
}

pub(crate) fn own_status(field: &str) -> Result<String, String> {
    let text = read("/proc/self/status")?;
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    Ok(line.unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" "))
}

const ALL_CAPABILITIES: &str = "000001ffffffffff";

/// An ordinary user is root in a namespace; capabilities there are those of root.
fn user_namespace() -> Checked {
    elsewhere(
        || {
            become_ordinary()?;
            become_root(0)
        },
        || {
            equal("the user", unsafe { (libc::getuid(), libc::getgid()) }, (0, 0))?;
            equal("the map of users", numbers("/proc/self/uid_map")?, vec![0, 1000, 1])?;
            equal("setgroups", read("/proc/self/setgroups")?.trim().into(), "deny".to_string())?;
            equal("the capabilities", own_status("CapEff")?, ALL_CAPABILITIES.into())?;
            // They are worth something there, and nothing outside.
            unshare(libc::CLONE_NEWUTS)?;
            done("sethostname", unsafe { libc::sethostname(c"inside".as_ptr(), 6) })?;
            check(unsafe { libc::chown(c"/tmp".as_ptr(), 5, 5) } != 0, "a user who is not mapped was named")
        },
    )
}

fn numbers(path: &str) -> Result<Vec<u32>, String> {
    Ok(read(path)?.split_whitespace().filter_map(|n| n.parse().ok()).collect())
}

/// A namespace in which nobody has a name, without capabilities.
fn user_namespace_unmapped() -> Checked {
    elsewhere(
        || {
            done("setresuid", unsafe { libc::setresuid(1234, 1234, 1234) })?;
            unshare(libc::CLONE_NEWUSER)?;
            drop_capabilities()
        },
        || {
            equal("the user", unsafe { libc::getuid() }, 65534)?;
            equal("the capabilities", own_status("CapPrm")?, "0000000000000000".into())?;
            equal("the map of users", read("/proc/self/uid_map")?, String::new())
        },
    )
}

pub(crate) fn drop_capabilities() -> Checked {
    let (header, none) = ([0x2008_0522u32, 0], [0u32; 6]);
    call("capset", libc::SYS_capset, [header.as_ptr() as u64, none.as_ptr() as u64]).map(drop)
}

/// Threads keep their numbers, though nobody there may choose one. Some of the numbers follow each other, others do not.
fn user_namespace_threads() -> Checked {
    let set_up = Gate::new()?;
    let child = fork(|| {
        become_root(0)?;
        drop_capabilities()?;
        let threads: Vec<_> = (0..6)
            .map(|index| {
                // A number is passed over before every second thread.
                if index % 2 == 1 {
                    reap(fork(|| Ok(()))?)?;
                }
                let gate = set_up;
                Ok(std::thread::spawn(move || {
                    let before = unsafe { libc::gettid() };
                    gate.open()?;
                    await_go();
                    equal("the number of a thread", unsafe { libc::gettid() }, before)?;
                    equal("a thread's user", unsafe { libc::getuid() }, 0)
                }))
            })
            .collect::<Result<_, String>>()?;
        set_up.open()?;
        await_go();
        threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| "a thread panicked".to_string())?)
    })?;
    set_up.pass(7)?;
    hold()?;
    reap(child)
}

/// A user namespace in a user namespace, each with a child.
fn user_namespace_nested() -> Checked {
    elsewhere(
        || {
            become_root(0)?;
            unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWUTS)?;
            write("/proc/self/setgroups", "deny")?;
            write("/proc/self/gid_map", "7 0 1")?;
            write("/proc/self/uid_map", "5 0 1")?;
            done("sethostname", unsafe { libc::sethostname(c"deeper".as_ptr(), 6) }).map(drop)
        },
        || {
            equal("the user", unsafe { (libc::getuid(), libc::getgid()) }, (5, 7))?;
            equal("the map of users", numbers("/proc/self/uid_map")?, vec![5, 0, 1])?;
            equal("the host name", read("/proc/sys/kernel/hostname")?.trim().into(), "deeper".to_string())
        },
    )
}

/// A network of one's own, with connections in it, and one that was made outside.
fn network_namespace() -> Checked {
    let set_up = Gate::new()?;
    let outer = TcpListener::bind("127.0.0.1:4000").map_err(|e| e.to_string())?;
    let text = |e: std::io::Error| e.to_string();
    let child = fork(|| {
        become_root(libc::CLONE_NEWNET)?;
        loopback_up()?;
        let listener = TcpListener::bind("127.0.0.1:4000").map_err(text)?;
        let mut client = TcpStream::connect("127.0.0.1:4000").map_err(text)?;
        let (mut server, _) = listener.accept().map_err(text)?;
        client.write_all(b"unread").map_err(text)?;
        let udp = UdpSocket::bind("127.0.0.1:4000").map_err(text)?;
        udp.send_to(b"datagram", "127.0.0.1:4000").map_err(text)?;
        let (mut left, mut right) = std::os::unix::net::UnixStream::pair().map_err(text)?;
        left.write_all(b"unix").map_err(text)?;
        set_up.open()?;
        await_go();
        is_elsewhere("net")?;
        let mut bytes = [0; 6];
        server.read_exact(&mut bytes).map_err(text)?;
        equal("what was unread", &bytes, b"unread")?;
        equal("a datagram", udp.recv(&mut [0; 20]).map_err(text)?, 8)?;
        right.read_exact(&mut bytes[..4]).map_err(text)?;
        server.write_all(b"answer").map_err(text)?;
        client.read_exact(&mut bytes).map_err(text)?;
        equal("an answer", &bytes, b"answer")?;
        let again = TcpStream::connect("127.0.0.1:4000").map_err(text)?;
        listener.accept().map_err(text)?;
        // The listener of the parent is the pod's own, whoever holds it.
        drop((again, outer.try_clone()));
        Ok(())
    })?;
    set_up.pass(1)?;
    hold()?;
    tell_home()?;
    TcpStream::connect("127.0.0.1:4000").map_err(text)?;
    outer.accept().map_err(text)?;
    reap(child)
}

pub(crate) fn loopback_up() -> Checked {
    let socket = UdpSocket::bind("0.0.0.0:0").map_err(|e| e.to_string())?;
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    (request.ifr_name[0], request.ifr_name[1]) = (b'l' as _, b'o' as _);
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as i16;
    let number = std::os::fd::AsRawFd::as_raw_fd(&socket);
    done("SIOCSIFFLAGS", unsafe { libc::ioctl(number, libc::SIOCSIFFLAGS, &raw const request) }).map(drop)
}

/// A network without anything, as sandboxes have.
fn network_namespace_off() -> Checked {
    elsewhere(
        || become_root(libc::CLONE_NEWNET | libc::CLONE_NEWIPC),
        || {
            check(
                TcpStream::connect("127.0.0.1:4000").is_err_and(|e| e.raw_os_error() == Some(libc::ENETUNREACH)),
                "there is a way out",
            )
        },
    )
}

fn host_name_namespace() -> Checked {
    elsewhere(
        || {
            become_root(libc::CLONE_NEWUTS)?;
            done("sethostname", unsafe { libc::sethostname(c"elsewhere".as_ptr(), 9) })?;
            done("setdomainname", unsafe { libc::setdomainname(c"domain".as_ptr(), 6) }).map(drop)
        },
        || {
            equal("the host name", read("/proc/sys/kernel/hostname")?, "elsewhere\n".into())?;
            equal("the domain", read("/proc/sys/kernel/domainname")?, "domain\n".into())
        },
    )?;
    check(read("/proc/sys/kernel/hostname")? != "elsewhere\n", "the pod's own name has changed")
}

fn ipc_namespace() -> Checked {
    let get = || unsafe { libc::shmget(0x77, 4096, libc::IPC_CREAT | 0o600) };
    let ours = get();
    elsewhere(
        || become_root(libc::CLONE_NEWIPC),
        || {
            equal("segments", read("/proc/sysvipc/shm")?.lines().count(), 1)?;
            done("shmget", get()).map(drop)
        },
    )?;
    equal("the segment of the pod", unsafe { libc::shmget(0x77, 4096, 0) }, ours)
}

fn cgroup_namespace() -> Checked {
    elsewhere(|| become_root(libc::CLONE_NEWCGROUP), || is_elsewhere("cgroup"))
}

/// A child whose clock is an hour ahead: it is so afterwards, and never goes back.
fn time_namespace() -> Checked {
    let (set_up, result) = (Gate::new()?, Gate::new()?);
    let middle = fork(|| {
        become_root(libc::CLONE_NEWTIME)?;
        write("/proc/self/timens_offsets", format!("monotonic {} 0\n", 3600 + offset()?))?;
        let child = fork(|| {
            let before = monotonic();
            set_up.open()?;
            await_go();
            let now = monotonic();
            check(now >= before && now < before + 600, format!("the clock went from {before} to {now}"))?;
            result.open()
        })?;
        // The middle one is not there itself, and would not be kept: its children are born elsewhere.
        unsafe { libc::_exit(i32::from(child < 0)) }
    })?;
    reap(middle)?;
    set_up.pass(1)?;
    let here = monotonic();
    hold_loosely()?;
    result.pass(1)?;
    check(monotonic() < here + 600, "the pod's own clock is ahead")
}

/// The offset of the pod's own clock, which is that of a new namespace.
fn offset() -> Result<i64, String> {
    let text = read("/proc/self/timens_offsets")?;
    Ok(text.split_whitespace().nth(1).and_then(|n| n.parse().ok()).unwrap_or(0))
}

fn monotonic() -> i64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec
}

/// Relatives in one namespace are in one namespace again, and others are not.
fn namespace_shared() -> Checked {
    let set_up = Gate::new()?;
    let family = || {
        let well = Gate::new()?;
        fork(|| {
            become_root(libc::CLONE_NEWUTS | libc::CLONE_NEWNET)?;
            let child = fork(|| {
                set_up.open()?;
                await_go();
                well.pass(1)?;
                equal("the host name", read("/proc/sys/kernel/hostname")?, "changed\n".into())
            })?;
            set_up.open()?;
            await_go();
            let namespaces = |pid: i32| -> Result<Vec<_>, String> {
                let link = |kind| std::fs::read_link(format!("/proc/{pid}/ns/{kind}")).map_err(|e| e.to_string());
                ["user", "uts", "net"].into_iter().map(link).collect()
            };
            equal("a child's namespaces", namespaces(child)?, namespaces(std::process::id() as i32)?)?;
            done("sethostname", unsafe { libc::sethostname(c"changed".as_ptr(), 7) })?;
            well.open()?;
            reap(child)
        })
    };
    let families = [family()?, family()?];
    set_up.pass(4)?;
    hold()?;
    families.into_iter().try_for_each(reap)
}

/// As Firefox does it: users, network and IPC of one's own, the root a directory of a process that has ended, no
/// capabilities, filters for all threads, connections with the parent.
fn sandbox() -> Checked {
    let set_up = Gate::new()?;
    let go = Gate::new()?;
    let child = fork(|| {
        become_root(libc::CLONE_NEWNET | libc::CLONE_NEWIPC)?;
        chroot_to_nowhere()?;
        drop_capabilities()?;
        done("prctl", unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })?;
        let threads: Vec<_> = (0..4)
            .map(|_| {
                std::thread::spawn(move || {
                    set_up.open()?;
                    go.pass(1)?;
                    equal("a call that is filtered", unsafe { libc::syscall(libc::SYS_getppid) }, -1)
                })
            })
            .collect();
        set_up.open()?;
        set_up.pass(5)?;
        deny(libc::SYS_getppid, libc::SECCOMP_FILTER_FLAG_TSYNC)?;
        set_up.open()?;
        go.pass(1)?;
        threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| "a thread panicked".to_string())?)?;
        equal("a call that is filtered", unsafe { libc::syscall(libc::SYS_getppid) }, -1)?;
        check(std::fs::read_dir("/").is_err(), "the root is somewhere")
    })?;
    until("filters", || read(format!("/proc/{child}/status")).is_ok_and(|s| s.contains("Seccomp_filters:\t2")))?;
    set_up.pass(1)?;
    hold()?;
    (0..5).try_for_each(|_| go.open())?;
    reap(child)
}

/// A helper that shares root and working directory makes its own directory in `/proc` the root, and ends.
pub(crate) fn chroot_to_nowhere() -> Checked {
    let flags = (libc::CLONE_FS | libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD) as u64;
    extern "C" fn helper(_: *mut libc::c_void) -> i32 {
        unsafe { libc::chroot(c"/proc/self/fdinfo".as_ptr()) | libc::chdir(c"/".as_ptr()) }
    }
    let mut stack = vec![0u64; 1 << 13];
    let top = unsafe { stack.as_mut_ptr().add(stack.len()) };
    let child = done("clone", unsafe { libc::clone(helper, top.cast(), flags as i32, std::ptr::null_mut()) })?;
    reap(child as i32)
}

/// A filter that answers one call with EPERM.
fn deny(call_number: libc::c_long, flags: libc::c_ulong) -> Checked {
    let step = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
    let (load, equal, answer) = (0x20, 0x15, 0x06);
    let mut steps = [
        step(load, 0, 0, 0),
        step(equal, 0, 1, call_number as u32),
        step(answer, 0, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
        step(answer, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: 4, filter: steps.as_mut_ptr() };
    let set = u64::from(libc::SECCOMP_SET_MODE_FILTER);
    call("seccomp", libc::SYS_seccomp, [set, flags, &raw const program as u64]).map(drop)
}

/// Threads with filters of their own, more and fewer than the first has.
fn thread_filters() -> Checked {
    let set_up = Gate::new()?;
    let child = fork(|| {
        done("prctl", unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })?;
        let calls = [libc::SYS_getppid, libc::SYS_getpgid, libc::SYS_getsid];
        let denied = move |expected: [bool; 3]| -> Checked {
            let now = calls.map(|number| unsafe { libc::syscall(number, 0) } == -1);
            equal("calls that are denied", now, expected)
        };
        let thread = |own: Option<libc::c_long>, expected| {
            std::thread::spawn(move || {
                own.map_or(Ok(()), |number| deny(number, 0))?;
                set_up.open()?;
                await_go();
                denied(expected)
            })
        };
        let none = thread(None, [false, false, false]);
        deny(libc::SYS_getppid, 0)?;
        let others = [
            thread(None, [true, false, false]),
            thread(Some(libc::SYS_getpgid), [true, true, false]),
            thread(Some(libc::SYS_getsid), [true, false, true]),
        ];
        set_up.open()?;
        await_go();
        denied([true, false, false])?;
        let mut all = others.into_iter().chain([none]);
        all.try_for_each(|thread| thread.join().map_err(|_| "a thread panicked".to_string())?)
    })?;
    set_up.pass(5)?;
    hold()?;
    reap(child)
}

/// A thread that is elsewhere than its process.
fn thread_namespace() -> Checked {
    let set_up = Gate::new()?;
    let child = fork(|| {
        become_root(0)?;
        let thread = std::thread::spawn(move || {
            unshare(libc::CLONE_NEWUTS)?;
            set_up.open()?;
            await_go();
            Ok(())
        });
        thread.join().map_err(|_| "a thread panicked".to_string())?
    })?;
    set_up.pass(1)?;
    hold_loosely()?;
    reap(child)
}
