//! Sessions and process groups, and those whose leader has left.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::stage::*;

pub(crate) const KINDS: &[crate::stage::Kind] = &[
    ("groups", groups),
    ("daemon", daemon),
    ("daemon-family", daemon_family),
    ("background-job", background_job),
    ("session-late", session_late),
    ("stopped-and-continued", stopped_and_continued),
];

/// Session and group of the calling process.
fn place() -> (i32, i32) {
    unsafe { (libc::getsid(0), libc::getpgid(0)) }
}

fn stays(set_up: Gate, go_on: impl FnOnce() -> Checked) -> Checked {
    let before = place();
    set_up.open()?;
    await_go();
    equal("session and group", place(), before)?;
    go_on()
}

/// Children that are stopped and continued all the time: a stop that was asked for comes, and lasts until it is ended.
fn stopped_and_continued() -> Checked {
    let idle = fork(|| {
        loop {
            unsafe { libc::pause() };
        }
    })?;
    let busy = fork(|| {
        loop {
            std::hint::spin_loop();
        }
    })?;
    let stop = AtomicBool::new(false);
    let state = |child: i32| -> Result<char, String> {
        let stat = read(format!("/proc/{child}/stat"))?;
        stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next()).ok_or_else(|| "no state".into())
    };
    let toggle = || -> Checked {
        while !stop.load(Ordering::Relaxed) {
            for child in [idle, busy] {
                done("stopping", unsafe { libc::kill(child, libc::SIGSTOP) })?;
                until("a stop", || state(child) == Ok('T'))?;
                for _ in 0..20 {
                    equal("the state of a stopped child", state(child)?, 'T')?;
                    std::thread::sleep(Duration::from_micros(200));
                }
                done("continuing", unsafe { libc::kill(child, libc::SIGCONT) })?;
                until("its end", || state(child).is_ok_and(|state| state != 'T'))?;
            }
        }
        Ok(())
    };
    let result = std::thread::scope(|scope| {
        let toggling = scope.spawn(toggle);
        let held = hold_loosely();
        stop.store(true, Ordering::Relaxed);
        toggling.join().map_err(|_| "the thread panicked")?.and(held)
    });
    for child in [idle, busy] {
        done("ending a child", unsafe { libc::kill(child, libc::SIGKILL) })?;
        status_of(child)?;
    }
    result
}

/// A session with two groups, as a shell with jobs: a signal to a group reaches its members alone.
fn groups() -> Checked {
    let set_up = Gate::new()?;
    let shell = fork(|| {
        done("setsid", unsafe { libc::setsid() })?;
        let lead = fork(|| {
            crate::signals::block(&[libc::SIGUSR1]);
            done("setpgid", unsafe { libc::setpgid(0, 0) })?;
            let second = fork(|| stays(set_up, || gets_signal(true)))?;
            stays(set_up, || gets_signal(true))?;
            reap(second)
        })?;
        let other = fork(|| {
            crate::signals::block(&[libc::SIGUSR1]);
            done("setpgid", unsafe { libc::setpgid(0, 0) })?;
            stays(set_up, || gets_signal(false))
        })?;
        stays(set_up, || done("kill", unsafe { libc::kill(-lead, libc::SIGUSR1) }).map(drop))?;
        [lead, other].into_iter().try_for_each(reap)
    })?;
    set_up.pass(4)?;
    hold()?;
    reap(shell)
}

fn gets_signal(expected: bool) -> Checked {
    let signal = libc::SIGUSR1;
    if expected {
        return equal("the group's signal", crate::signals::wait_for(&[signal]), signal);
    }
    equal("a signal for another group", crate::signals::poll_for(&[signal]), None)
}

/// A daemon: its session's leader has left.
fn daemon() -> Checked {
    let (set_up, well) = (Gate::new()?, Gate::new()?);
    let middle = fork(|| {
        done("setsid", unsafe { libc::setsid() })?;
        fork(|| {
            until("adoption", || unsafe { libc::getppid() } == 1)?;
            check(place().0 != unsafe { libc::getpid() }, "the daemon leads its session")?;
            stays(set_up, || well.open())
        })
        .map(drop)
    })?;
    reap(middle)?;
    set_up.pass(1)?;
    hold()?;
    well.pass(1)
}

/// A daemon with children in groups of their own, and a sibling in its session.
fn daemon_family() -> Checked {
    let (set_up, well) = (Gate::new()?, Gate::new()?);
    let middle = fork(|| {
        done("setsid", unsafe { libc::setsid() })?;
        fork(|| {
            until("adoption", || unsafe { libc::getppid() } == 1)?;
            let worker = fork(|| {
                done("setpgid", unsafe { libc::setpgid(0, 0) })?;
                stays(set_up, || Ok(()))
            })?;
            stays(set_up, || reap(worker))?;
            well.open()
        })?;
        fork(|| {
            until("adoption", || unsafe { libc::getppid() } == 1)?;
            stays(set_up, || well.open())
        })
        .map(drop)
    })?;
    reap(middle)?;
    set_up.pass(3)?;
    hold()?;
    well.pass(2)
}

/// A job in the background whose group's leader has left.
fn background_job() -> Checked {
    let (set_up, formed) = (Gate::new()?, Gate::new()?);
    let leader = fork(|| {
        done("setpgid", unsafe { libc::setpgid(0, 0) })?;
        formed.open()
    })?;
    formed.pass(1)?;
    let member = fork(|| {
        done("setpgid", unsafe { libc::setpgid(0, leader) })?;
        stays(set_up, || equal("the group", place().1, leader))
    })?;
    set_up.pass(1)?;
    reap(leader)?;
    hold()?;
    reap(member)
}

/// A process that made its session when it had a child already, which has memory in common with it.
fn session_late() -> Checked {
    let (born, set_up) = (Gate::new()?, Gate::new()?);
    let region = crate::memory::anonymous(1 << 20)?;
    crate::memory::fill(region, 1 << 20, 7);
    let first = unsafe { region.read() };
    let parent = fork(|| {
        let child = fork(|| {
            unsafe { region.write(1) };
            stays(born, || {
                equal("its own page", unsafe { region.read() }, 1)?;
                unsafe { region.write(first) };
                crate::memory::check_filled("what it inherited", region, 1 << 20, 7)
            })
        })?;
        born.pass(1)?;
        done("setsid", unsafe { libc::setsid() })?;
        let sibling = fork(|| stays(set_up, || Ok(())))?;
        stays(set_up, || crate::memory::check_filled("its memory", region, 1 << 20, 7))?;
        [child, sibling].into_iter().try_for_each(reap)
    })?;
    set_up.pass(2)?;
    hold()?;
    reap(parent)
}
