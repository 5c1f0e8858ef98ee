//! File systems that show namespaces which a pod's own processes make: processes, interfaces, queues.

use std::fs::File;
use std::io::{Read, Seek};

use crate::mounts::{directory, mount};
use crate::namespaces::{become_ordinary, become_root, unshare};
use crate::nests::{elsewhere, private, text};
use crate::stage::*;

pub(crate) const KINDS: &[crate::stage::Kind] = &[
    ("mounts-proc-of-namespace", mounts_proc_of_namespace),
    ("mounts-proc-of-namespace-nested", mounts_proc_of_namespace_nested),
    ("mounts-proc-of-namespace-covered", mounts_proc_of_namespace_covered),
    ("mounts-proc-of-namespace-users", mounts_proc_of_namespace_users),
    ("mounts-proc-of-namespace-elsewhere", mounts_proc_of_namespace_elsewhere),
    ("mounts-interfaces-of-namespace", mounts_interfaces_of_namespace),
    ("queues-of-namespace", queues_of_namespace),
    ("mounts-proc-of-namespace-outside", mounts_proc_of_namespace_outside),
];

const OWN: libc::c_ulong = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;

/// The numbers of the processes that are shown.
fn processes(proc: &str) -> Result<Vec<i32>, String> {
    let entries = std::fs::read_dir(proc).map_err(text)?;
    let mut numbers: Vec<i32> =
        entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    numbers.sort();
    Ok(numbers)
}

/// Files of a proc of which this process is the first that is shown, with one child.
struct Shown {
    proc: &'static str,
    statistics: File,
    directory: File,
    uptime: File,
    child: i32,
}

impl Shown {
    fn at(proc: &'static str) -> Result<Shown, String> {
        let child = fork(|| {
            await_go();
            Ok(())
        })?;
        equal("what is shown", processes(proc)?, vec![1, child])?;
        std::env::set_current_dir(format!("{proc}/self/task")).map_err(text)?;
        let open = |path: &str| File::open(format!("{proc}/{path}")).map_err(text);
        Ok(Shown {
            proc,
            statistics: open("self/statm")?,
            directory: open(&format!("{child}"))?,
            uptime: open("uptime")?,
            child,
        })
    }

    fn check(mut self) -> Checked {
        let proc = self.proc;
        equal("who this is", std::fs::read_link(format!("{proc}/self")).map_err(text)?, "1".into())?;
        let now = processes(proc)?;
        check(now.len() <= 2 && now[0] == 1, format!("there are {now:?}"))?;
        let directory = std::env::current_dir().map_err(text)?;
        equal("the directory", directory, format!("{proc}/1/task").into())?;
        for file in [&mut self.statistics, &mut self.uptime] {
            let mut read = String::new();
            file.rewind().and_then(|()| file.read_to_string(&mut read)).map_err(text)?;
            check(!read.is_empty(), "a file that is open has nothing in it")?;
        }
        use std::os::fd::AsRawFd;
        let link = std::fs::read_link(format!("{proc}/self/fd/{}", self.directory.as_raw_fd())).map_err(text)?;
        equal("a directory that is open", link, format!("{proc}/{}", self.child).into())?;
        reap(self.child)?;
        // Those that come are shown as well.
        let new = fork(|| {
            doze();
            Ok(())
        })?;
        check(processes(proc)?.contains(&new), "a new process is not shown")?;
        reap(new)?;
        equal("those that are left", processes(proc)?, vec![1])
    }
}

/// The first process of a PID namespace, in a mount namespace of its own, mounts things there; `afterwards` checks.
fn apart<T>(
    go_there: impl FnOnce() -> Checked,
    inside: impl FnOnce() -> Result<T, String>,
    afterwards: impl FnOnce(T) -> Checked,
) -> Checked {
    let set_up = Gate::new()?;
    let outer = fork(|| {
        go_there()?;
        unshare(libc::CLONE_NEWPID)?;
        let child = fork(|| {
            private()?;
            let things = inside()?;
            let before = crate::mounts::table()?;
            set_up.open()?;
            await_go();
            crate::nests::same(&before, &crate::mounts::table()?)?;
            afterwards(things)
        })?;
        await_go();
        reap(child)
    })?;
    set_up.pass(1)?;
    hold()?;
    reap(outer)
}

fn as_a_user() -> Checked {
    become_ordinary()?;
    become_root(libc::CLONE_NEWNS)
}

/// As `unshare -fpm --mount-proc` does it.
fn mounts_proc_of_namespace() -> Checked {
    let inside = || {
        mount("proc", "/proc", "proc", OWN, "")?;
        Shown::at("/proc")
    };
    apart(|| unshare(libc::CLONE_NEWNS), inside, Shown::check)
}

/// What a user who is root in a namespace sees of it, whose mounts are copies.
fn mounts_proc_of_namespace_users() -> Checked {
    let inside = || {
        mount("proc", "/proc", "proc", OWN, "hidepid=invisible")?;
        mount("/dev/null", "/proc/meminfo", "", libc::MS_BIND, "")?;
        let (set_up, go) = (Gate::new()?, Gate::new()?);
        let child = fork(|| {
            as_a_user()?;
            private()?;
            mount("/proc", "/mnt", "", libc::MS_BIND | libc::MS_REC, "")?;
            let own = File::open("/mnt/self/statm").map_err(text)?;
            let before = crate::mounts::table()?;
            set_up.open()?;
            go.pass(1)?;
            crate::nests::same(&before, &crate::mounts::table()?)?;
            let mut statistics = String::new();
            (&own).read_to_string(&mut statistics).map_err(text)?;
            check(!statistics.is_empty(), "a file that is open has nothing in it")?;
            equal("what is covered", read("/mnt/meminfo")?, String::new())?;
            let umount = unsafe { libc::umount(c"/proc/meminfo".as_ptr()) };
            check(umount != 0, "what is below was revealed")?;
            let own = format!("/mnt/{}/status", unsafe { libc::getpid() });
            check(read(own)?.contains("pod-guest"), "it is not shown itself")
        })?;
        set_up.pass(1)?;
        Ok((child, go))
    };
    apart(
        || unshare(libc::CLONE_NEWNS),
        inside,
        |(child, go)| {
            equal("what is shown", processes("/proc")?, vec![1, child])?;
            go.open()?;
            reap(child)
        },
    )
}

/// One in another: what the outer one had is covered in the inner one.
fn mounts_proc_of_namespace_nested() -> Checked {
    let inside = || {
        mount("proc", "/proc", "proc", OWN, "")?;
        let (set_up, go) = (Gate::new()?, Gate::new()?);
        let middle = fork(|| {
            unshare(libc::CLONE_NEWNS | libc::CLONE_NEWPID)?;
            let child = fork(|| {
                private()?;
                mount("proc", "/proc", "proc", OWN, "")?;
                let shown = Shown::at("/proc")?;
                let before = crate::mounts::table()?;
                set_up.open()?;
                go.pass(1)?;
                crate::nests::same(&before, &crate::mounts::table()?)?;
                shown.check()
            })?;
            go.pass(1)?;
            reap(child)
        })?;
        set_up.pass(1)?;
        Ok((middle, go))
    };
    apart(
        || unshare(libc::CLONE_NEWNS),
        inside,
        |(middle, go)| {
            // Both of those inside, and the child there.
            let shown = processes("/proc")?;
            check(shown.len() >= 3 && shown[..2] == [1, middle], format!("there are {shown:?}"))?;
            go.open()?;
            go.open()?;
            reap(middle)?;
            equal("those that are left", processes("/proc")?, vec![1])
        },
    )
}

/// As container programs do it: with a root of its own, and parts of it covered.
fn mounts_proc_of_namespace_covered() -> Checked {
    let inside = || {
        mount("root", "/mnt", "tmpfs", libc::MS_NOSUID | libc::MS_NODEV, "mode=755")?;
        for path in ["usr", "tmp", "proc", "dev", "old"] {
            directory(&format!("/mnt/{path}"))?;
        }
        for path in ["/usr", "/tmp", "/dev"] {
            mount(path, &format!("/mnt{path}"), "", libc::MS_BIND | libc::MS_REC, "")?;
        }
        for link in ["lib", "lib64", "bin"] {
            std::os::unix::fs::symlink(format!("usr/{link}"), format!("/mnt/{link}")).map_err(text)?;
        }
        mount("proc", "/mnt/proc", "proc", OWN, "")?;
        mount("/mnt/proc/sys", "/mnt/proc/sys", "", libc::MS_BIND, "")?;
        mount("", "/mnt/proc/sys", "", libc::MS_BIND | libc::MS_REMOUNT | libc::MS_RDONLY | OWN, "")?;
        mount("/dev/null", "/mnt/proc/keys", "", libc::MS_BIND, "")?;
        mount("nothing", "/mnt/proc/tty", "tmpfs", 0, "size=4k")?;
        std::env::set_current_dir("/mnt").map_err(text)?;
        call("pivot_root", libc::SYS_pivot_root, [c".".as_ptr() as u64, c"old".as_ptr() as u64])?;
        std::env::set_current_dir("/").map_err(text)?;
        done("umount", unsafe { libc::umount2(c"/old".as_ptr(), libc::MNT_DETACH) })?;
        let shown = Shown::at("/proc")?;
        let host_name = File::open("/proc/sys/kernel/hostname").map_err(text)?;
        write("/proc/tty/file", "on top")?;
        Ok((shown, host_name))
    };
    apart(
        || unshare(libc::CLONE_NEWNS),
        inside,
        |(shown, mut host_name)| {
            equal("what is on top", read("/proc/tty/file")?, "on top".into())?;
            equal("what is covered", read("/proc/keys")?, String::new())?;
            let mut name = String::new();
            host_name.read_to_string(&mut name).map_err(text)?;
            equal("a file of a part", name, read("/proc/sys/kernel/hostname")?)?;
            shown.check()
        },
    )
}

/// Not where such a file system usually is, and the pod's own beside it.
fn mounts_proc_of_namespace_elsewhere() -> Checked {
    directory("/mnt/processes")?;
    let inside = || {
        mount("proc", "/mnt/processes", "proc", 0, "")?;
        let shown = Shown::at("/mnt/processes")?;
        let home = File::open("/proc/uptime").map_err(text)?;
        Ok((shown, home))
    };
    apart(
        || unshare(libc::CLONE_NEWNS),
        inside,
        |(shown, mut home)| {
            let mut uptime = String::new();
            home.read_to_string(&mut uptime).map_err(text)?;
            check(!uptime.is_empty(), "a file of the pod's own is gone")?;
            shown.check()
        },
    )
}

/// The interfaces of a network namespace, which has but one.
fn mounts_interfaces_of_namespace() -> Checked {
    let interfaces = || -> Result<Vec<String>, String> {
        let entries = std::fs::read_dir("/sys/class/net").map_err(text)?;
        Ok(entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
    };
    elsewhere(
        || {
            unshare(libc::CLONE_NEWNET | libc::CLONE_NEWNS)?;
            private()?;
            mount("sysfs", "/sys", "sysfs", OWN | libc::MS_RDONLY, "")?;
            check(interfaces()?.contains(&"lo".into()), "there is no lo")?;
            Ok((interfaces()?, File::open("/sys/class/net/lo/mtu").map_err(text)?))
        },
        |(before, mut file)| {
            equal("interfaces", interfaces()?, before)?;
            let mut mtu = String::new();
            file.read_to_string(&mut mtu).map_err(text)?;
            equal("a file that is open", mtu.trim().into(), "65536".to_string())
        },
    )
}

/// The queues of an IPC namespace.
fn queues_of_namespace() -> Checked {
    directory("/mnt/queues")?;
    elsewhere(
        || {
            as_a_user()?;
            unshare(libc::CLONE_NEWIPC)?;
            private()?;
            mount("mqueue", "/mnt/queues", "mqueue", OWN, "")?;
            File::open("/mnt/queues").map_err(text)
        },
        |_directory| {
            let open = libc::O_CREAT | libc::O_RDWR;
            let queue = unsafe { libc::mq_open(c"/own".as_ptr(), open, 0o600, std::ptr::null::<libc::mq_attr>()) };
            done("mq_open", queue)?;
            check(std::path::Path::new("/mnt/queues/own").exists(), "a queue is not shown")
        },
    )
}

/// In the pod's own mount namespace.
fn mounts_proc_of_namespace_outside() -> Checked {
    directory("/mnt/processes")?;
    let set_up = Gate::new()?;
    let outer = fork(|| {
        unshare(libc::CLONE_NEWPID)?;
        let child = fork(|| {
            mount("proc", "/mnt/processes", "proc", 0, "")?;
            set_up.open()?;
            await_go();
            Ok(())
        })?;
        reap(child)
    })?;
    set_up.pass(1)?;
    hold_loosely()?;
    reap(outer)
}
