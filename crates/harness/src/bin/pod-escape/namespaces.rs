//! Mounts and namespaces; and the same from a user namespace of the pod's own, in which it has every capability.

use std::fs;
use std::os::fd::AsRawFd;

use nix::errno::Errno;

use super::attempt::{Attempt, Failed, Tried, c, call, check, delegate, io, prepare, write};

pub(crate) const ATTEMPTS: &[Attempt] = &[
    ("mount-tmpfs", |_, _| mount("tmpfs", "/mnt", 0)),
    ("mount-proc", |_, _| mount("proc", "/mnt", 0)),
    ("mount-bind", |_, _| bind("/proc", "/mnt")),
    ("unmount-cover", |_, _| unmount("/proc/keys")),
    ("remount-read-only-bind", |f, _| remount(&f.read_only_bind)),
    ("pivot-root", |_, _| {
        check(call(libc::SYS_pivot_root, [c"/tmp".as_ptr() as u64, c"/tmp".as_ptr() as u64, 0, 0, 0, 0])).map(drop)
    }),
    ("own-namespace-again", |_, _| enter(network()?.as_raw_fd())),
    ("kept-namespace-again", |_, kept| enter(kept.namespace.as_raw_fd())),
    ("mount-anew", |_, _| check(call(libc::SYS_fsopen, [c"tmpfs".as_ptr() as u64, 0, 0, 0, 0, 0])).map(drop)),
    ("parent-of-namespace", |_, _| {
        let own = fs::File::open("/proc/self/ns/pid").map_err(io)?;
        check(unsafe { libc::ioctl(own.as_raw_fd(), NS_GET_PARENT) }.into()).map(drop)
    }),
    ("host-name", |_, _| host_name()),
    ("sub-group", |_, _| fs::create_dir("/sys/fs/cgroup/inner").map_err(io)),
    ("sub-group-by-kept-group", |_, kept| {
        check(unsafe { libc::mkdirat(kept.groups.as_raw_fd(), c"inner".as_ptr(), 0o700) }.into()).map(drop)
    }),
    ("leave-group", |_, _| write("/sys/fs/cgroup/cgroup.procs", "0")),
    ("thaw-group", |_, _| write("/sys/fs/cgroup/cgroup.freeze", "0")),
    ("inner-mount-proc", |_, _| inner(0, || mount("proc", "/mnt", 0))),
    ("inner-mount-proc-of-inner", |_, _| inner(libc::CLONE_NEWPID, || delegate(|| mount("proc", "/mnt", 0)))),
    ("inner-mount-sys", |_, _| inner(libc::CLONE_NEWNET, || mount("sysfs", "/mnt", 0))),
    ("inner-mount-disk", |_, _| inner(0, || mount("ext4", "/mnt", 0))),
    ("inner-mount-debug", |_, _| inner(0, || mount("debugfs", "/mnt", 0))),
    ("inner-unmount-cover", |_, _| inner(0, || unmount("/proc/keys"))),
    ("inner-clone-below-cover", |_, _| inner(0, clone_below)),
    ("inner-bind-below-cover", |_, _| inner(0, || bind("/proc", "/mnt"))),
    ("inner-remount-sysctls", |_, _| inner(0, || remount("/proc/sys"))),
    ("inner-remount-sys", |_, _| inner(0, || remount("/sys"))),
    ("inner-remount-group", |_, _| inner(0, || remount("/sys/fs/cgroup"))),
    ("inner-remount-read-only-bind", |f, _| {
        let path = f.read_only_bind.clone();
        inner(0, move || remount(&path))
    }),
    ("inner-node", |_, _| {
        inner(0, || {
            mount("tmpfs", "/mnt", 0).map_err(before)?;
            check(unsafe { libc::mknod(c"/mnt/null".as_ptr(), libc::S_IFCHR | 0o666, libc::makedev(1, 3)) }.into())
                .map(drop)
        })
    }),
    ("inner-sub-group", |_, _| {
        inner(libc::CLONE_NEWCGROUP, || {
            mount("cgroup2", "/mnt", 0).map_err(before)?;
            fs::create_dir("/mnt/inner").map_err(io)
        })
    }),
    ("inner-threaded-group", |_, _| {
        inner(libc::CLONE_NEWCGROUP, || {
            mount("cgroup2", "/mnt", 0).map_err(before)?;
            write("/mnt/cgroup.type", "threaded")
        })
    }),
    ("inner-deeper-groups", |_, _| {
        inner(libc::CLONE_NEWCGROUP, || {
            mount("cgroup2", "/mnt", 0).map_err(before)?;
            write("/mnt/cgroup.max.depth", "9")?;
            fs::create_dir("/mnt/inner").map_err(io)
        })
    }),
    // Only the root of a hierarchy has it.
    ("inner-old-root-group", |_, _| old(|| fs::metadata("/mnt/release_agent").map(drop).map_err(io))),
    ("inner-old-other-group", |_, _| {
        old(|| {
            let mut groups = fs::read_dir("/mnt").map_err(io)?.flatten().filter(|entry| entry.path().is_dir());
            groups.next().map(drop).ok_or(Failed::With(Errno::ENOENT))
        })
    }),
    ("inner-host-name", |_, _| inner(0, host_name)),
    ("inner-outer-namespace", |_, _| {
        let network = network()?;
        inner(libc::CLONE_NEWNET, move || enter(network.as_raw_fd()))
    }),
    ("inner-kept-namespace", |_, kept| inner(libc::CLONE_NEWNET, || enter(kept.namespace.as_raw_fd()))),
    ("inner-interface", |_, _| inner(0, interface)),
    ("inner-handle-of-namespace", |_, _| inner(0, handle_of_namespace)),
    ("inner-trace-init", |_, _| inner(0, || check(unsafe { libc::ptrace(libc::PTRACE_SEIZE, 1, 0, 0) }).map(drop))),
    ("inner-root-of-init", |f, _| {
        let path = format!("/proc/1/root{}", f.marker);
        inner(0, move || super::attempt::read(&path))
    }),
    ("inner-sysctl", |_, _| inner(0, || write("/proc/sys/kernel/core_pattern", "x"))),
    ("inner-clock", |_, _| inner(0, super::kernel::set_clock)),
];

const NS_GET_PARENT: u64 = 0xb702;

fn before(failed: Failed) -> Failed {
    match failed {
        Failed::With(errno) => Failed::Before(errno),
        other => other,
    }
}

/// Begins a user namespace in which this user is root, and a mount namespace of its own; then tries.
fn inner(more: i32, attempt: impl FnOnce() -> Tried) -> Tried {
    let (user, group) = unsafe { (libc::getuid(), libc::getgid()) };
    prepare(unsafe { libc::unshare(libc::CLONE_NEWUSER) }.into())?;
    let map = |file: &str, text: String| write(&format!("/proc/self/{file}"), &text).map_err(before);
    map("setgroups", "deny".into())?;
    map("uid_map", format!("0 {user} 1"))?;
    map("gid_map", format!("0 {group} 1"))?;
    prepare(unsafe { libc::unshare(libc::CLONE_NEWNS | more) }.into())?;
    attempt()
}

/// From a user and a cgroup namespace, in each hierarchy of version 1 that the host has, mounted anew.
fn old(attempt: impl Fn() -> Tried) -> Tried {
    inner(libc::CLONE_NEWCGROUP, || {
        let groups = fs::read_to_string("/proc/self/cgroup").map_err(|error| before(io(error)))?;
        let names = groups.lines().filter_map(|line| line.split(':').nth(1)).filter(|names| !names.is_empty());
        for names in names {
            let options = c(&if names.contains('=') { format!("none,{names}") } else { names.to_owned() });
            let (source, target, kind) = (c("cgroup"), c("/mnt"), c("cgroup"));
            let options = options.as_ptr().cast();
            let mounted = unsafe { libc::mount(source.as_ptr(), target.as_ptr(), kind.as_ptr(), 0, options) };
            prepare(mounted.into())?;
            match attempt() {
                Err(Failed::With(Errno::ENOENT)) => unmount("/mnt").map_err(before)?,
                other => return other,
            }
        }
        Err(Failed::With(Errno::ENOENT))
    })
}

fn mount(kind: &str, target: &str, flags: u64) -> Tried {
    let (source, kind, target) = (c(kind), c(kind), c(target));
    let none = std::ptr::null();
    check(unsafe { libc::mount(source.as_ptr(), target.as_ptr(), kind.as_ptr(), flags, none) }.into()).map(drop)
}

fn bind(source: &str, target: &str) -> Tried {
    let (source, target, none) = (c(source), c(target), std::ptr::null());
    check(unsafe { libc::mount(source.as_ptr(), target.as_ptr(), none, libc::MS_BIND, none.cast()) }.into()).map(drop)
}

fn remount(path: &str) -> Tried {
    let (path, none) = (c(path), std::ptr::null());
    let flags = libc::MS_REMOUNT | libc::MS_BIND;
    check(unsafe { libc::mount(none, path.as_ptr(), none, flags, none.cast()) }.into()).map(drop)
}

fn unmount(path: &str) -> Tried {
    check(unsafe { libc::umount2(c(path).as_ptr(), libc::MNT_DETACH) }.into()).map(drop)
}

fn enter(namespace: i32) -> Tried {
    check(unsafe { libc::setns(namespace, 0) }.into()).map(drop)
}

fn network() -> Result<fs::File, Failed> {
    fs::File::open("/proc/self/ns/net").map_err(|error| before(io(error)))
}

fn host_name() -> Tried {
    check(unsafe { libc::sethostname(c"other".as_ptr(), 5) }.into()).map(drop)
}

/// A copy of one mount, without what covers parts of it.
fn clone_below() -> Tried {
    const OPEN_TREE_CLONE: u64 = 1;
    let here = libc::AT_FDCWD as u64;
    check(call(libc::SYS_open_tree, [here, c"/proc".as_ptr() as u64, OPEN_TREE_CLONE, 0, 0, 0])).map(drop)
}

/// Takes the loopback interface down.
fn interface() -> Tried {
    let socket = prepare(unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM, 0) }.into())?;
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    check(unsafe { libc::ioctl(socket as i32, libc::SIOCSIFFLAGS, &request) }.into()).map(drop)
}

/// Namespaces have handles from 6.18 on; nobody but whoever sees all may open one by a guess.
fn handle_of_namespace() -> Tried {
    let handle = [24u32, 0xf1, 0, 0, 0, 0, 0, 0];
    const FD_NSFS_ROOT: i64 = -10003;
    let arguments = [FD_NSFS_ROOT as u64, handle.as_ptr() as u64, 0, 0, 0, 0];
    check(call(libc::SYS_open_by_handle_at, arguments)).map(drop)
}
