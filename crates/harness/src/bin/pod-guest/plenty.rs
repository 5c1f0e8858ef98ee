//! More open files in a pod than one process may have.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;

use crate::plumbing::said;
use crate::stage::*;

pub(crate) const KINDS: &[crate::stage::Kind] = &[("files-beyond-limit", files_beyond_limit)];

/// How many each of the processes has, at most, if that is less than its limit.
const MOST: u64 = 13_400;

/// Three processes that have together more files than the limit of one, of many kinds, of which some are shared.
fn files_beyond_limit() -> Checked {
    let each = raise_limit()?.min(MOST * 10 / 7) * 7 / 10;
    said(std::fs::create_dir_all("/tmp/plenty"))?;
    for number in 0..10 {
        write(format!("/tmp/plenty/{number}"), vec![b'x'; 100_000])?;
    }
    let mut shared = said(File::open("/tmp/plenty/0"))?;
    said(shared.seek(SeekFrom::Start(77)))?;
    let set_up = Gate::new()?;
    let children: Vec<i32> = (0..3u64).map(|_| fork(|| holder(each, set_up, &shared))).collect::<Result<_, _>>()?;
    set_up.pass(3)?;
    hold_loosely()?;
    children.into_iter().try_for_each(reap)?;
    // Each has read a byte of it.
    equal("where a shared file is", said(shared.stream_position())?, 80)
}

/// As many files as this process may have at all.
fn raise_limit() -> Result<u64, String> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    done("getrlimit", unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) })?;
    limit.rlim_cur = limit.rlim_max;
    done("setrlimit", unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) })?;
    Ok(limit.rlim_cur)
}

enum Held {
    Regular(File, u64),
    Pipe(File, File, u8),
    Event(File, u64),
    Pair(UnixStream, UnixStream, u8),
    Null(File),
}

impl Held {
    fn make(number: u64) -> Result<Held, String> {
        let event = |count: u64| done("eventfd", unsafe { libc::eventfd(count as u32, libc::EFD_CLOEXEC) });
        let byte = number as u8;
        Ok(match number % 5 {
            0 => {
                let mut file = said(File::open(format!("/tmp/plenty/{}", number / 5 % 10)))?;
                said(file.seek(SeekFrom::Start(number)))?;
                Held::Regular(file, number)
            }
            1 => {
                let mut ends = [0; 2];
                done("pipe", unsafe { libc::pipe(ends.as_mut_ptr()) })?;
                let [from, mut to] = ends.map(|end| unsafe { File::from_raw_fd(end) });
                said(to.write_all(&[byte]))?;
                Held::Pipe(from, to, byte)
            }
            2 => Held::Event(unsafe { File::from_raw_fd(event(number + 1)? as i32) }, number + 1),
            3 => {
                let (from, mut to) = said(UnixStream::pair())?;
                said(to.write_all(&[byte]))?;
                Held::Pair(from, to, byte)
            }
            _ => Held::Null(said(File::options().write(true).open("/dev/null"))?),
        })
    }

    fn check(self) -> Checked {
        let mut one = [0];
        match self {
            Held::Regular(mut file, place) => equal("where a file is", said(file.stream_position())?, place),
            Held::Pipe(mut from, to, byte) => {
                said(from.read_exact(&mut one))?;
                equal("what is in a pipe", one[0], byte)?;
                drop(to);
                equal("what comes then", said(from.read(&mut one))?, 0)
            }
            Held::Event(mut file, count) => {
                let mut now = [0; 8];
                said(file.read_exact(&mut now))?;
                equal("a count", u64::from_ne_bytes(now), count)
            }
            Held::Pair(mut from, mut to, byte) => {
                said(from.read_exact(&mut one))?;
                equal("what a socket has", one[0], byte)?;
                said(from.write_all(b"b"))?;
                said(to.read_exact(&mut one))?;
                equal("what comes back", one[0], b'b')
            }
            Held::Null(file) => check(said(file.metadata())?.rdev() == libc::makedev(1, 3), "it is not /dev/null"),
        }
    }
}

/// A process that has `each` files. Those of numbers that one would not be given come last.
fn holder(each: u64, set_up: Gate, shared: &File) -> Checked {
    let mut all = Vec::new();
    let mut open = 0;
    while open + 30 < each {
        let held = Held::make(all.len() as u64)?;
        open += if matches!(held, Held::Pipe(..) | Held::Pair(..)) { 2 } else { 1 };
        all.push(held);
    }
    let epoll = done("epoll_create1", unsafe { libc::epoll_create1(0) })? as i32;
    for held in &all {
        if let Held::Event(file, count) = held
            && *count < 1000
        {
            let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: *count };
            let number = file.as_raw_fd();
            done("epoll_ctl", unsafe { libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, number, &raw mut event) })?;
        }
    }
    let far = each as i32 + 25;
    done("dup2", unsafe { libc::dup2(shared.as_raw_fd(), far) })?;
    let (first, second) = (all[0].number(), all[1].number());
    // A hole, and one that is in the place of another.
    let swapped = done("dup2", unsafe { libc::dup2(first, far + 3) })? as i32;
    set_up.open()?;
    await_go();
    let mut ready = vec![libc::epoll_event { events: 0, u64: 0 }; 4096];
    let found = done("epoll_wait", unsafe { libc::epoll_wait(epoll, ready.as_mut_ptr(), 4096, 0) })? as usize;
    let watched = all.iter().filter(|held| matches!(held, Held::Event(_, count) if *count < 1000)).count();
    equal("what an epoll tells", found, watched)?;
    check(second != first, "two files have one number")?;
    let mut far = unsafe { File::from_raw_fd(far) };
    said(far.read_exact(&mut [0]))?;
    let at = |number: i32| done("lseek", unsafe { libc::lseek(number, 0, libc::SEEK_CUR) });
    equal("a copy of a file", at(swapped)?, at(first)?)?;
    all.into_iter().try_for_each(Held::check)
}

impl Held {
    fn number(&self) -> i32 {
        match self {
            Held::Regular(file, _) | Held::Event(file, _) | Held::Null(file) | Held::Pipe(file, ..) => file.as_raw_fd(),
            Held::Pair(from, ..) => from.as_raw_fd(),
        }
    }
}
