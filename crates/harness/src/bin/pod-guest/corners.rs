//! What a careful reader of the manual pages tries: files without names that are alike, numbers that signals tell, limits.

use std::ffi::CStr;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;

use crate::files::{F_SETSIG, control};
use crate::plumbing::{said, set};
use crate::signals::block;
use crate::stage::*;

pub(crate) const KINDS: &[crate::stage::Kind] = &[
    ("same-numbers", same_numbers),
    ("told-by-number", told_by_number),
    ("root-file-removed", root_file_removed),
    ("linked-far-away", linked_far_away),
    ("attributes-nameless", attributes_nameless),
    ("executable-memfd", executable_memfd),
    ("message-senders", message_senders),
    ("data-limit", data_limit),
    ("own-host-name", own_host_name),
    ("signals-beyond-count", signals_beyond_count),
    ("mappings-all", mappings_all),
    ("path-too-long", path_too_long),
];

/// Two new paths, in two file systems, whose inode numbers are equal: each counts on its own.
fn alike(make: impl Fn(&str) -> Checked) -> Result<[String; 2], String> {
    let directories = ["/tmp", "/dev/shm"];
    let mut made = [String::new(), String::new()];
    let mut numbers = [0; 2];
    for count in 0..100_000 {
        let lower = usize::from(numbers[0] > numbers[1]);
        let path = format!("{}/alike{count}", directories[lower]);
        make(&path)?;
        numbers[lower] = said(fs::metadata(&path))?.ino();
        let earlier = std::mem::replace(&mut made[lower], path);
        if !earlier.is_empty() {
            said(fs::remove_file(earlier))?;
        }
        if numbers[0] == numbers[1] {
            return Ok(made);
        }
    }
    Err(format!("no two numbers are equal: {numbers:?}"))
}

/// Files and fifos without names that have the same inode numbers, in different file systems.
fn same_numbers() -> Checked {
    let open = |path: &String| {
        let file = said(OpenOptions::new().read(true).write(true).open(path))?;
        said(fs::remove_file(path))?;
        Ok(file)
    };
    let files = alike(|path| said(File::create(path)).map(drop))?;
    let files = files.iter().map(open).collect::<Result<Vec<File>, String>>()?;
    let fifo = |path: &str| {
        let path = std::ffi::CString::new(path).map_err(|e| e.to_string())?;
        done("mkfifo", unsafe { libc::mkfifo(path.as_ptr(), 0o600) }).map(drop)
    };
    let fifos = alike(fifo)?;
    let mut fifos = fifos.iter().map(open).collect::<Result<Vec<File>, String>>()?;
    for number in 0..2 {
        said(files[number].write_all_at(&[b'0' + number as u8], 0))?;
        said(fifos[number].write_all(&[b'2' + number as u8]))?;
    }
    hold_loosely()?;
    for number in 0..2 {
        let mut byte = [0];
        said(files[number].read_exact_at(&mut byte, 0))?;
        equal("what is in a file", byte[0], b'0' + number as u8)?;
        control(&fifos[number], libc::F_SETFL, libc::O_NONBLOCK)?;
        said(fifos[number].read_exact(&mut byte))?;
        equal("what is in a fifo", byte[0], b'2' + number as u8)?;
    }
    Ok(())
}

const SIGNAL: i32 = 40;

/// The number that a signal tells of a file, if one comes within a while.
fn told() -> Result<i32, String> {
    let mut wanted: libc::sigset_t = unsafe { std::mem::zeroed() };
    unsafe { libc::sigaddset(&raw mut wanted, SIGNAL) };
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let while_ = libc::timespec { tv_sec: 120, tv_nsec: 0 };
    done("waiting for a signal", unsafe { libc::sigtimedwait(&raw const wanted, &raw mut info, &raw const while_) })?;
    // What SI_SIGIO has behind its code: si_band, si_fd.
    Ok(unsafe { (&raw const info).cast::<i32>().add(6).read() })
}

/// Signals that tell of a file say by which number it was known to who asked: of a socket, a pipe and a lease.
fn told_by_number() -> Checked {
    block(&[SIGNAL]);
    let place = |file: OwnedFd, number: i32| {
        done("dup2", unsafe { libc::dup2(file.as_raw_fd(), number) })?;
        let file = unsafe { File::from_raw_fd(number) };
        control(&file, F_SETSIG, SIGNAL)?;
        Ok::<File, String>(file)
    };
    let (socket, mut peer) = said(UnixStream::pair())?;
    let (pipe, end) = said(nix::unistd::pipe().map_err(Into::into))?;
    write("/tmp/leased", "text")?;
    let socket = place(socket.into(), 100)?;
    let pipe = place(pipe, 200)?;
    for file in [&socket, &pipe] {
        control(file, libc::F_SETOWN, std::process::id() as i32)?;
        control(file, libc::F_SETFL, libc::O_ASYNC | libc::O_NONBLOCK)?;
    }
    let leased = place(said(File::open("/tmp/leased"))?.into(), 300)?;
    control(&leased, libc::F_SETLEASE, libc::F_RDLCK)?;
    hold()?;
    said(peer.write_all(b"x"))?;
    equal("the number of the socket", told()?, 100)?;
    // The end stays open: that it is closed would be told, too.
    let mut end = File::from(end);
    said(end.write_all(b"x"))?;
    equal("the number of the pipe", told()?, 200)?;
    let other = OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open("/tmp/leased");
    check(other.is_err(), "a leased file was opened")?;
    equal("the number of the leased file", told()?, 300)
}

/// A file that the pod was born with, open and removed, and one in whose place there is another.
fn root_file_removed() -> Checked {
    let paths = ["/usr/bin/true", "/usr/bin/false"];
    let before = said(fs::read(paths[0]))?;
    let mut files = paths.map(File::open).into_iter().map(said).collect::<Result<Vec<File>, String>>()?;
    said(fs::remove_file(paths[0]))?;
    write("/usr/bin/new", "another")?;
    said(fs::rename("/usr/bin/new", paths[1]))?;
    hold_loosely()?;
    let mut bytes = Vec::new();
    said(files[0].read_to_end(&mut bytes))?;
    check(bytes == before, "the removed file has other contents")?;
    bytes.clear();
    said(files[1].read_to_end(&mut bytes))?;
    check(bytes.starts_with(b"\x7fELF"), "the replaced file has other contents")?;
    check(!fs::exists(paths[0]).unwrap_or(true), "the removed file is there again")?;
    equal("what is in its place", read(paths[1])?.as_str(), "another")
}

/// A file that has lost the name by which it was opened, and has another in another directory of the root.
fn linked_far_away() -> Checked {
    said(fs::create_dir_all("/var/far/away"))?;
    write("/var/first", "contents")?;
    let mut file = said(OpenOptions::new().read(true).append(true).open("/var/first"))?;
    said(fs::hard_link("/var/first", "/var/far/away/second"))?;
    said(fs::remove_file("/var/first"))?;
    hold_loosely()?;
    said(file.write_all(b" and more"))?;
    equal("by its other name", read("/var/far/away/second")?.as_str(), "contents and more")
}

const ATTRIBUTE: &CStr = c"user.guest";

fn mark(file: &File) -> Checked {
    let (name, value) = (ATTRIBUTE.as_ptr(), b"kept".as_ptr().cast());
    done("fsetxattr", unsafe { libc::fsetxattr(file.as_raw_fd(), name, value, 4, 0) }).map(drop)
}

fn marked(file: &File) -> Checked {
    let mut value = [0u8; 8];
    let (name, at) = (ATTRIBUTE.as_ptr(), value.as_mut_ptr().cast());
    let length = done("fgetxattr", unsafe { libc::fgetxattr(file.as_raw_fd(), name, at, 8) } as i64)?;
    equal("an attribute", value.get(..length as usize), Some(&b"kept"[..]))
}

fn memfd() -> Result<File, String> {
    let made = done("memfd_create", unsafe { libc::memfd_create(c"memory".as_ptr(), libc::MFD_CLOEXEC) })?;
    Ok(unsafe { File::from_raw_fd(made as i32) })
}

/// Attributes and times of files without names: of one that was removed, and of memory.
fn attributes_nameless() -> Checked {
    let file = said(OpenOptions::new().read(true).write(true).create_new(true).open("/var/marked"))?;
    said(fs::remove_file("/var/marked"))?;
    let memory = memfd()?;
    let times = [libc::timespec { tv_sec: 1_000_000_000, tv_nsec: 7 }; 2];
    for file in [&file, &memory] {
        mark(file)?;
        done("futimens", unsafe { libc::futimens(file.as_raw_fd(), times.as_ptr()) })?;
    }
    hold_loosely()?;
    for file in [&file, &memory] {
        marked(file)?;
        let facts = said(file.metadata())?;
        equal("the last change", (facts.mtime(), facts.mtime_nsec()), (1_000_000_000, 7))?;
    }
    Ok(())
}

/// A program in memory that is open for writing, and can be executed all the same.
fn executable_memfd() -> Checked {
    let mut memory = memfd()?;
    said(memory.write_all(&said(fs::read("/bin/true"))?))?;
    hold()?;
    let child = fork(|| {
        let path = format!("/proc/self/fd/{}\0", memory.as_raw_fd());
        let arguments = [path.as_ptr().cast(), std::ptr::null()];
        done("execv", unsafe { libc::execv(path.as_ptr().cast(), arguments.as_ptr()) }).map(drop)
    })?;
    reap(child)
}

/// Messages tell who sent them: a process of another user and group than root.
fn message_senders() -> Checked {
    let (near, far) = said(UnixStream::pair())?;
    set(&far, libc::SOL_SOCKET, libc::SO_PASSCRED, &1i32)?;
    hold_loosely_beside(|| {
        done("setgid", unsafe { libc::setgid(7) })?;
        done("setuid", unsafe { libc::setuid(8) })?;
        said((&near).write_all(b"mine"))
    })?;
    let mut bytes = [0u8; 8];
    let mut piece = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: 8 };
    let mut control = [0u64; 8];
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    (header.msg_iov, header.msg_iovlen) = (&raw mut piece, 1);
    (header.msg_control, header.msg_controllen) = (control.as_mut_ptr().cast(), 64);
    let length = done("recvmsg", unsafe { libc::recvmsg(far.as_raw_fd(), &raw mut header, 0) } as i64)?;
    equal("bytes of the message", length, 4)?;
    let part = unsafe { libc::CMSG_FIRSTHDR(&raw const header) };
    check(!part.is_null(), "nobody has sent it")?;
    let who = unsafe { libc::CMSG_DATA(part).cast::<libc::ucred>().read_unaligned() };
    equal("user and group of the sender", (who.uid, who.gid), (8, 7))
}

/// A process that may have no more data than it has.
fn data_limit() -> Checked {
    let child = fork(|| {
        let limit = libc::rlimit { rlim_cur: 1 << 16, rlim_max: 1 << 16 };
        done("setrlimit", unsafe { libc::setrlimit(libc::RLIMIT_DATA, &raw const limit) })?;
        await_go();
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        let mapped = unsafe { libc::mmap(std::ptr::null_mut(), 1 << 20, protection, flags, -1, 0) };
        check(mapped == libc::MAP_FAILED, "it has more than it may")
    })?;
    until_asleep(child)?;
    hold()?;
    reap(child)
}

/// A pod that has given itself another name, and a domain.
fn own_host_name() -> Checked {
    done("sethostname", unsafe { libc::sethostname(c"another".as_ptr(), 7) })?;
    done("setdomainname", unsafe { libc::setdomainname(c"somewhere".as_ptr(), 9) })?;
    hold()?;
    equal("the host name", read("/proc/sys/kernel/hostname")?.as_str(), "another\n")?;
    equal("the domain", read("/proc/sys/kernel/domainname")?.as_str(), "somewhere\n")
}

/// More signals that wait than can be looked at in time.
fn signals_beyond_count() -> Checked {
    const MANY: usize = 17_000;
    block(&[SIGNAL]);
    for _ in 0..MANY {
        let value = libc::sigval { sival_ptr: std::ptr::null_mut() };
        done("sigqueue", unsafe { libc::sigqueue(libc::getpid(), SIGNAL, value) })?;
    }
    hold_loosely()?;
    for _ in 0..MANY {
        told()?;
    }
    Ok(())
}

/// As many mappings as a process may have.
fn mappings_all() -> Checked {
    let most: usize = read("/proc/sys/vm/max_map_count")?.trim().parse().map_err(|_| "max_map_count")?;
    const PAGE: usize = 4096;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let start = unsafe { libc::mmap(std::ptr::null_mut(), 2 * most * PAGE, libc::PROT_NONE, flags, -1, 0) };
    check(start != libc::MAP_FAILED, "no address space")?;
    let is_cut = |number: usize| {
        let at = unsafe { start.cast::<u8>().add((2 * number + 1) * PAGE) };
        unsafe { libc::mprotect(at.cast(), PAGE, libc::PROT_READ) == 0 }
    };
    let cut = (0..most).take_while(|number| is_cut(*number)).count();
    check(2 * cut + 200 > most, format!("only {cut} cuts"))?;
    // This program itself needs room to go on.
    let result = hold_loosely();
    unsafe { libc::munmap(start, 2 * most * PAGE) };
    result
}

/// An open file so deep that no path can name it.
fn path_too_long() -> Checked {
    let name = "d".repeat(200);
    for _ in 0..25 {
        said(fs::create_dir(&name))?;
        said(std::env::set_current_dir(&name))?;
    }
    let file = said(File::create("deep"))?;
    said(std::env::set_current_dir("/"))?;
    hold_loosely()?;
    said((&file).write_all(b"x"))
}
