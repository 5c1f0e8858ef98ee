//! Who is told of files by a signal, and locks that are waited for.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd};

use crate::signals::{block, poll_for, wait_for};
use crate::stage::*;

pub(crate) const KINDS: &[crate::stage::Kind] = &[
    ("owner-thread", owner_thread),
    ("owner-group", owner_group),
    ("lease", lease),
    ("locks-waiting", locks_waiting),
    ("range-locks-waiting", range_locks_waiting),
    ("directory-notify", directory_notify),
    ("directory-notify-others", directory_notify_others),
];

const SIGNAL: i32 = libc::SIGUSR1;
pub(crate) const F_SETSIG: i32 = 10;

pub(crate) fn control(file: &File, command: i32, value: i32) -> Result<i64, String> {
    done("fcntl", unsafe { libc::fcntl(file.as_raw_fd(), command, value) })
}

/// A pipe whose reading end tells `owner` (kind and number) of data.
fn telling(owner: (i32, i32)) -> Result<(File, File), String> {
    const F_SETOWN_EX: i32 = 15;
    let mut ends = [0; 2];
    done("pipe", unsafe { libc::pipe(ends.as_mut_ptr()) })?;
    let [from, to] = ends.map(|end| unsafe { File::from_raw_fd(end) });
    let owner = [owner.0, owner.1];
    done("F_SETOWN_EX", unsafe { libc::fcntl(from.as_raw_fd(), F_SETOWN_EX, owner.as_ptr()) })?;
    control(&from, F_SETSIG, SIGNAL)?;
    control(&from, libc::F_SETFL, libc::O_ASYNC)?;
    Ok((from, to))
}

fn owner_of(file: &File) -> Result<[i32; 2], String> {
    const F_GETOWN_EX: i32 = 16;
    let mut owner = [0; 2];
    done("F_GETOWN_EX", unsafe { libc::fcntl(file.as_raw_fd(), F_GETOWN_EX, owner.as_mut_ptr()) })?;
    Ok(owner)
}

/// A thread is told.
fn owner_thread() -> Checked {
    block(&[SIGNAL]);
    let (sender, receiver) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        let _ = sender.send(unsafe { libc::gettid() });
        wait_for(&[SIGNAL])
    });
    let tid = receiver.recv().map_err(|e| e.to_string())?;
    let (from, mut to) = telling((0, tid))?;
    let before = owner_of(&from)?;
    hold_loosely()?;
    equal("the owner", owner_of(&from)?, before)?;
    to.write_all(b"x").map_err(|e| e.to_string())?;
    equal("what the thread is told", thread.join().map_err(|_| "it failed")?, SIGNAL)?;
    equal("what others are told", poll_for(&[SIGNAL]), None)
}

/// A group whose leader has left is told.
fn owner_group() -> Checked {
    block(&[SIGNAL]);
    let (set_up, formed) = (Gate::new()?, Gate::new()?);
    let leader = fork(|| {
        done("setpgid", unsafe { libc::setpgid(0, 0) })?;
        formed.open()
    })?;
    formed.pass(1)?;
    let member = fork(|| {
        done("setpgid", unsafe { libc::setpgid(0, leader) })?;
        set_up.open()?;
        equal("what a member is told", wait_for(&[SIGNAL]), SIGNAL)
    })?;
    set_up.pass(1)?;
    reap(leader)?;
    let (from, mut to) = telling((2, leader))?;
    hold_loosely()?;
    equal("the owner", owner_of(&from)?, [2, leader])?;
    to.write_all(b"x").map_err(|e| e.to_string())?;
    reap(member)?;
    equal("what others are told", poll_for(&[SIGNAL]), None)
}

/// A lease: who opens the file waits until it is given up.
fn lease() -> Checked {
    block(&[SIGNAL]);
    write("/tmp/leased", "text")?;
    let file = File::open("/tmp/leased").map_err(|e| e.to_string())?;
    control(&file, F_SETSIG, SIGNAL)?;
    control(&file, libc::F_SETLEASE, libc::F_RDLCK)?;
    hold()?;
    equal("the lease", control(&file, libc::F_GETLEASE, 0)?, libc::F_RDLCK.into())?;
    let other = fork(|| OpenOptions::new().write(true).open("/tmp/leased").map(drop).map_err(|e| e.to_string()))?;
    equal("what the holder is told", wait_for(&[SIGNAL]), SIGNAL)?;
    control(&file, libc::F_SETLEASE, libc::F_UNLCK)?;
    reap(other)
}

/// Who waits for a lock gets it, once it is given up.
fn waiting(take: fn(&File, bool) -> Result<i64, String>) -> Checked {
    write("/tmp/locked", "text")?;
    let open = || OpenOptions::new().read(true).write(true).open("/tmp/locked").map_err(|e| e.to_string());
    let (set_up, got) = (Gate::new()?, Gate::new()?);
    let file = open()?;
    take(&file, true)?;
    let waiters = [0; 2].map(|_| {
        fork(|| {
            let file = open()?;
            set_up.open()?;
            take(&file, true)?;
            take(&file, false)?;
            got.open()
        })
    });
    set_up.pass(2)?;
    for waiter in &waiters {
        until_asleep(*waiter.as_ref().map_err(Clone::clone)?)?;
    }
    hold_and(|| {
        let mut ready = libc::pollfd { fd: got.read_end(), events: libc::POLLIN, revents: 0 };
        equal("locks taken", unsafe { libc::poll(&raw mut ready, 1, 100) }, 0)
    })?;
    take(&file, false)?;
    got.pass(2)?;
    waiters.into_iter().try_for_each(|waiter| reap(waiter?))
}

fn locks_waiting() -> Checked {
    waiting(|file, take| {
        let operation = if take { libc::LOCK_EX } else { libc::LOCK_UN };
        done("flock", unsafe { libc::flock(file.as_raw_fd(), operation) })
    })
}

fn range_locks_waiting() -> Checked {
    waiting(|file, take| {
        let mut range: libc::flock = unsafe { std::mem::zeroed() };
        (range.l_type, range.l_len) = (if take { libc::F_WRLCK } else { libc::F_UNLCK } as i16, 10);
        done("F_SETLKW", unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLKW, &raw mut range) })
    })
}

/// A directory whose changes are told by a signal.
fn directory_notify() -> Checked {
    block(&[SIGNAL]);
    std::fs::create_dir("/tmp/told").map_err(|e| e.to_string())?;
    let directory = File::open("/tmp/told").map_err(|e| e.to_string())?;
    control(&directory, F_SETSIG, SIGNAL)?;
    const DN_CREATE: i32 = 4;
    const DN_MULTISHOT: i32 = 0x8000_0000u32 as i32;
    control(&directory, libc::F_NOTIFY, DN_CREATE | DN_MULTISHOT)?;
    // A watch of another kind, which is told of something else.
    let watch = done("inotify_init1", unsafe { libc::inotify_init1(libc::IN_NONBLOCK) })? as i32;
    done("inotify_add_watch", unsafe { libc::inotify_add_watch(watch, c"/tmp/told".as_ptr(), libc::IN_DELETE) })?;
    hold_loosely()?;
    for name in ["/tmp/told/new", "/tmp/told/newer"] {
        write(name, "")?;
        equal("what is told", wait_for(&[SIGNAL]), SIGNAL)?;
    }
    std::fs::remove_file("/tmp/told/new").map_err(|e| e.to_string())?;
    equal("more than was asked for", crate::signals::poll_for(&[SIGNAL]), None)
}

/// The same, of two processes.
fn directory_notify_others() -> Checked {
    block(&[SIGNAL]);
    let directory = File::open("/tmp").map_err(|e| e.to_string())?;
    control(&directory, F_SETSIG, SIGNAL)?;
    const DN_DELETE: i32 = 8;
    control(&directory, libc::F_NOTIFY, DN_DELETE)?;
    hold_loosely_beside(|| control(&directory, libc::F_NOTIFY, DN_DELETE).map(drop))
}
