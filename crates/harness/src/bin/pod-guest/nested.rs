//! PID namespaces inside the pod: with a first process of their own, in each other, entered from outside, about to be made.

use std::io::Read;

use crate::namespaces::{become_ordinary, become_root, chroot_to_nowhere, drop_capabilities, own_status, unshare};
use crate::stage::*;

pub(crate) const KINDS: &[crate::stage::Kind] = &[
    ("pid-namespace", pid_namespace),
    ("pid-namespace-threads", pid_namespace_threads),
    ("pid-namespace-nested", pid_namespace_nested),
    ("pid-namespace-of-users", pid_namespace_of_users),
    ("pid-namespace-orphans", pid_namespace_orphans),
    ("pid-namespace-groups", pid_namespace_groups),
    ("pid-namespace-abandoned", pid_namespace_abandoned),
    ("pid-namespace-entered", pid_namespace_entered),
    ("pid-namespace-unborn", pid_namespace_unborn),
    ("pid-namespace-handles", pid_namespace_handles),
    ("browser-sandbox", browser_sandbox),
];

fn own() -> i32 {
    unsafe { libc::getpid() }
}

/// The first process of a new PID namespace, in which `body` runs; the parent goes on having its children there.
fn first(body: impl FnOnce() -> Checked) -> Result<i32, String> {
    unshare(libc::CLONE_NEWPID)?;
    fork(|| {
        equal("the number of a first process", own(), 1)?;
        body()
    })
}

/// A process and its first process in a PID namespace of a user namespace of their own: `inside` runs there, and says that
/// it is set up.
fn apart(inside: impl FnOnce(Gate) -> Checked) -> Checked {
    let set_up = Gate::new()?;
    let outer = fork(|| {
        become_root(0)?;
        let child = first(|| inside(set_up))?;
        await_go();
        reap(child)
    })?;
    set_up.pass(1)?;
    hold()?;
    reap(outer)
}

/// Relatives name each other by numbers of their namespace, and new ones get the next.
fn pid_namespace() -> Checked {
    apart(|set_up| {
        let ready = Gate::new()?;
        let children: Vec<i32> = (2..5)
            .map(|number| {
                fork(|| {
                    ready.open()?;
                    await_go();
                    equal("the number of a child", own(), number)?;
                    equal("its parent", unsafe { libc::getppid() }, 1)
                })
            })
            .collect::<Result<_, _>>()?;
        ready.pass(3)?;
        set_up.open()?;
        await_go();
        equal("children", &children[..], &[2, 3, 4][..])?;
        equal("the number of the first", own(), 1)?;
        equal("its parent", unsafe { libc::getppid() }, 0)?;
        equal("the user", unsafe { libc::getuid() }, 0)?;
        for child in children {
            done("kill", unsafe { libc::kill(child, 0) })?;
            reap(child)?;
        }
        let child = fork(|| Ok(()))?;
        check(child > 4, format!("a new process has the number {child}"))?;
        reap(child)
    })
}

/// Threads keep their numbers, of which they have two.
fn pid_namespace_threads() -> Checked {
    apart(|set_up| {
        drop_capabilities()?;
        let ready = Gate::new()?;
        let threads: Vec<_> = (0..5)
            .map(|index| {
                if index % 2 == 1 {
                    reap(fork(|| Ok(()))?)?;
                }
                Ok(std::thread::spawn(move || {
                    let before = unsafe { libc::gettid() };
                    ready.open()?;
                    await_go();
                    equal("the number of a thread", unsafe { libc::gettid() }, before)?;
                    let alive = unsafe { libc::syscall(libc::SYS_tgkill, 1, before, 0) };
                    done("tgkill", alive).map(drop)
                }))
            })
            .collect::<Result<_, String>>()?;
        ready.pass(5)?;
        set_up.open()?;
        await_go();
        threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| "a thread panicked".to_string())?)
    })
}

/// One in another, both of one user namespace, each with children.
fn pid_namespace_nested() -> Checked {
    apart(|set_up| {
        let ready = Gate::new()?;
        let sibling = fork(|| {
            ready.open()?;
            await_go();
            equal("a process of the outer one", own(), 2)
        })?;
        let inner = first(|| {
            let child = fork(|| {
                ready.open()?;
                await_go();
                equal("a process of the inner one", own(), 2)?;
                let numbers = own_status("NSpid")?;
                check(numbers.ends_with(" 4 2"), format!("its numbers are {numbers}"))
            })?;
            ready.open()?;
            await_go();
            equal("the first of the inner one", own(), 1)?;
            reap(child)
        })?;
        ready.pass(3)?;
        set_up.open()?;
        await_go();
        equal("relatives", (sibling, inner), (2, 3))?;
        reap(sibling)?;
        reap(inner)
    })
}

/// One in another, each with a user namespace of its own, and threads.
fn pid_namespace_of_users() -> Checked {
    apart(|set_up| {
        let ready = Gate::new()?;
        let middle = fork(|| {
            become_root(0)?;
            let inner = first(|| {
                let child = fork(|| {
                    let thread = std::thread::spawn(move || {
                        let before = (own(), unsafe { libc::gettid() });
                        ready.open()?;
                        await_go();
                        equal("a thread", (own(), unsafe { libc::gettid() }), before)
                    });
                    thread.join().map_err(|_| "a thread panicked".to_string())?
                })?;
                ready.open()?;
                await_go();
                reap(child)
            })?;
            ready.open()?;
            await_go();
            reap(inner)
        })?;
        ready.pass(3)?;
        set_up.open()?;
        await_go();
        reap(middle)
    })
}

/// The first process adopts, and reaps; zombies wait for it.
fn pid_namespace_orphans() -> Checked {
    apart(|set_up| {
        let ready = Gate::new()?;
        // In the session of a leader that has left; in that of one that lives.
        for leaves in [true, false] {
            let leader = fork(|| {
                done("setsid", unsafe { libc::setsid() })?;
                let passing = fork(|| {
                    fork(|| {
                        until("adoption", || unsafe { libc::getppid() } == 1)?;
                        ready.open()?;
                        await_go();
                        equal("the parent of an orphan", unsafe { libc::getppid() }, 1)
                    })
                    .map(drop)
                })?;
                reap(passing)?;
                if !leaves {
                    ready.open()?;
                    await_go();
                }
                Ok(())
            })?;
            if leaves {
                ended(leader)?;
            }
        }
        // Ended, with another status each.
        let gone: Vec<i32> = [3, 9].into_iter().map(zombie).collect::<Result<_, _>>()?;
        ready.pass(3)?;
        set_up.open()?;
        await_go();
        equal("how one ended", status_of(gone[0])?, 3 << 8)?;
        equal("how one was killed", status_of(gone[1])?, 9)?;
        let mut left = 0;
        loop {
            let mut status = 0;
            match unsafe { libc::wait(&raw mut status) } {
                -1 => break,
                _ => equal("an orphan's end", status, 0)?,
            }
            left += 1;
        }
        // Two orphans, and two leaders.
        equal("who was left", left, 4)
    })
}

/// A child that has ended: with 3, or killed by 9.
fn zombie(how: i32) -> Result<i32, String> {
    let child = done("fork", unsafe { libc::fork() })? as i32;
    if child == 0 {
        if how == 9 {
            unsafe { libc::kill(own(), 9) };
        }
        unsafe { libc::_exit(how) };
    }
    ended(child)?;
    Ok(child)
}

/// Waits until a child has ended, and leaves it a zombie.
fn ended(child: i32) -> Checked {
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let flags = libc::WEXITED | libc::WNOWAIT;
    done("waitid", unsafe { libc::waitid(libc::P_PID, child as u32, &raw mut info, flags) }).map(drop)
}

/// A group outside is inherited and cannot be named; others are made and joined inside.
fn pid_namespace_groups() -> Checked {
    apart(|set_up| {
        let ready = Gate::new()?;
        equal("a group outside", unsafe { libc::getpgrp() }, 0)?;
        let leader = fork(|| {
            done("setpgid", unsafe { libc::setpgid(0, 0) })?;
            ready.open()?;
            await_go();
            equal("its own group", unsafe { libc::getpgrp() }, own())
        })?;
        ready.pass(1)?;
        let member = fork(|| {
            done("setpgid", unsafe { libc::setpgid(0, leader) })?;
            ready.open()?;
            await_go();
            equal("the group of a member", unsafe { libc::getpgrp() }, leader)
        })?;
        // Its leader leaves.
        let gone = fork(|| {
            done("setpgid", unsafe { libc::setpgid(0, 0) })?;
            let group = own();
            fork(|| {
                ready.open()?;
                await_go();
                equal("a group without a leader", unsafe { libc::getpgrp() }, group)
            })
            .map(drop)
        })?;
        reap(gone)?;
        ready.pass(2)?;
        set_up.open()?;
        await_go();
        equal("a group outside", unsafe { libc::getpgrp() }, 0)?;
        reap(leader)?;
        reap(member)?;
        reap(-1)
    })
}

/// Whoever made it is gone: the pod's first process has adopted its first process.
fn pid_namespace_abandoned() -> Checked {
    let (set_up, result) = (Gate::new()?, Gate::new()?);
    let maker = fork(|| {
        done("setsid", unsafe { libc::setsid() })?;
        become_root(0)?;
        first(|| {
            let child = fork(|| {
                set_up.open()?;
                await_go();
                equal("a child", own(), 2)
            })?;
            set_up.open()?;
            await_go();
            equal("the first", own(), 1)?;
            reap(child)?;
            result.open()
        })
        .map(drop)
    })?;
    reap(maker)?;
    set_up.pass(2)?;
    hold()?;
    result.pass(1)
}

/// A process whose parent is outside: it went in by way of a child that the parent had there.
fn pid_namespace_entered() -> Checked {
    let set_up = Gate::new()?;
    let last = Gate::new()?;
    let outer = fork(|| {
        become_root(0)?;
        let inner = first(|| {
            set_up.open()?;
            await_go();
            equal("the first", own(), 1)?;
            last.pass(1)
        })?;
        let second = fork(|| {
            set_up.open()?;
            await_go();
            equal("one who entered", own(), 2)?;
            equal("its parent", unsafe { libc::getppid() }, 0)
        })?;
        set_up.open()?;
        await_go();
        let third = fork(|| check(own() > 2 && own() < 100, format!("another has the number {}", own())))?;
        reap(third)?;
        reap(second)?;
        last.open()?;
        reap(inner)
    })?;
    set_up.pass(3)?;
    hold()?;
    reap(outer)
}

/// A namespace for children of which there are none yet: the next is its first process.
fn pid_namespace_unborn() -> Checked {
    let set_up = Gate::new()?;
    let child = fork(|| {
        become_root(libc::CLONE_NEWPID)?;
        set_up.open()?;
        await_go();
        reap(fork(|| equal("the first", own(), 1))?)
    })?;
    set_up.pass(1)?;
    hold()?;
    reap(child)
}

/// Handles on processes, and who is told by signals, by numbers of a namespace.
fn pid_namespace_handles() -> Checked {
    apart(|set_up| {
        let child = fork(|| {
            await_go();
            Ok(())
        })?;
        let handle = call("pidfd_open", libc::SYS_pidfd_open, [child as u64, 0])?;
        let gate = Gate::new()?;
        done("F_SETOWN", unsafe { libc::fcntl(gate.read_end(), libc::F_SETOWN, child) })?;
        set_up.open()?;
        await_go();
        equal("whom a pipe tells", unsafe { libc::fcntl(gate.read_end(), libc::F_GETOWN) }, child)?;
        call("pidfd_send_signal", libc::SYS_pidfd_send_signal, [handle as u64, 0, 0, 0])?;
        reap(child)
    })
}

/// As Chromium does it: an ordinary user's helper, first in a PID namespace, without a network, and workers each first in
/// a PID namespace of its own, without capabilities.
fn browser_sandbox() -> Checked {
    let set_up = Gate::new()?;
    let browser = fork(|| {
        become_ordinary()?;
        let map = Gate::new()?;
        let flags = (libc::CLONE_NEWUSER | libc::CLONE_NEWPID | libc::CLONE_NEWNET | libc::SIGCHLD) as u64;
        let helper = call("clone", libc::SYS_clone, [flags, 0, 0, 0, 0])? as i32;
        if helper == 0 {
            leave(map.pass(1).and_then(|()| sandboxed(set_up)));
        }
        write(format!("/proc/{helper}/setgroups"), "deny")?;
        write(format!("/proc/{helper}/gid_map"), "1000 1000 1")?;
        write(format!("/proc/{helper}/uid_map"), "1000 1000 1")?;
        map.open()?;
        set_up.open()?;
        await_go();
        reap(helper)
    })?;
    set_up.pass(4)?;
    hold()?;
    reap(browser)
}

fn sandboxed(set_up: Gate) -> Checked {
    let go = Gate::new()?;
    let worker = || -> Result<i32, String> {
        let flags = (libc::CLONE_NEWPID | libc::SIGCHLD) as u64;
        let child = call("clone", libc::SYS_clone, [flags, 0, 0, 0, 0])? as i32;
        if child != 0 {
            return Ok(child);
        }
        leave((|| {
            let memory = std::fs::File::open("/proc/self/statm").map_err(|e| e.to_string())?;
            chroot_to_nowhere()?;
            drop_capabilities()?;
            let thread = std::thread::spawn(move || {
                let before = unsafe { libc::gettid() };
                go.pass(1)?;
                equal("a thread", unsafe { libc::gettid() }, before)
            });
            set_up.open()?;
            go.pass(1)?;
            let mut text = String::new();
            (&memory).read_to_string(&mut text).map_err(|e| e.to_string())?;
            check(!text.is_empty(), "its own statistics are gone")?;
            equal("a worker", (own(), unsafe { libc::getuid() }), (1, 1000))?;
            thread.join().map_err(|_| "a thread panicked".to_string())?
        })())
    };
    let workers = [worker()?, worker()?];
    set_up.open()?;
    await_go();
    (0..4).try_for_each(|_| go.open())?;
    equal("the helper", (own(), unsafe { libc::getuid() }), (1, 1000))?;
    // It can make more.
    let flags = (libc::CLONE_NEWPID | libc::SIGCHLD) as u64;
    let child = call("clone", libc::SYS_clone, [flags, 0, 0, 0, 0])? as i32;
    if child == 0 {
        leave(equal("a new worker", own(), 1));
    }
    reap(child)?;
    workers.into_iter().try_for_each(reap)
}
