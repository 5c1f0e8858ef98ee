//! Files that are opened in unusual ways.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};

use crate::plumbing::said;
use crate::stage::*;

pub(crate) const KINDS: &[crate::stage::Kind] = &[
    ("fifo-one-sided", fifo_one_sided),
    ("fifo-deleted", fifo_deleted),
    ("pipe-resized", pipe_resized),
    ("nameless-file", nameless_file),
    ("path-only", path_only),
    ("directory-half-read", directory_half_read),
    ("linked-elsewhere", linked_elsewhere),
    ("file-replaced", file_replaced),
    ("behind-a-root", behind_a_root),
    ("many-descriptors", many_descriptors),
];

fn make_fifo(path: &std::ffi::CStr) -> Checked {
    done("mkfifo", unsafe { libc::mkfifo(path.as_ptr(), 0o600) }).map(drop)
}

/// A fifo whose other side nobody has opened, and one at which a process waits for somebody who will.
fn fifo_one_sided() -> Checked {
    make_fifo(c"/tmp/fifo")?;
    make_fifo(c"/tmp/awaited")?;
    let mut reader = said(OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open("/tmp/fifo"))?;
    let child = fork(|| {
        let mut text = String::new();
        said(File::open("/tmp/awaited"))?.read_to_string(&mut text).map_err(|e| e.to_string())?;
        equal("what came", text.as_str(), "hello")
    })?;
    until_asleep(child)?;
    hold()?;
    let mut byte = [0; 1];
    equal("a read with no writer", said(reader.read(&mut byte))?, 0)?;
    let mut writer = said(OpenOptions::new().write(true).open("/tmp/fifo"))?;
    said(writer.write_all(b"x"))?;
    equal("a read", said(reader.read(&mut byte))?, 1)?;
    said(fs::write("/tmp/awaited", "hello"))?;
    reap(child)
}

/// A fifo without a name, with something in it.
fn fifo_deleted() -> Checked {
    make_fifo(c"/tmp/fifo")?;
    let mut both = said(OpenOptions::new().read(true).write(true).open("/tmp/fifo"))?;
    let mut writer = said(OpenOptions::new().write(true).open("/tmp/fifo"))?;
    said(fs::remove_file("/tmp/fifo"))?;
    said(writer.write_all(b"before"))?;
    hold()?;
    said(writer.write_all(b" and after"))?;
    let mut text = [0; 16];
    said(both.read_exact(&mut text))?;
    equal("what was in it", &text, b"before and after")
}

/// A pipe of another size, full, and one of packets.
fn pipe_resized() -> Checked {
    let mut ends = [0; 2];
    done("pipe", unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_NONBLOCK) })?;
    let size = done("F_SETPIPE_SZ", unsafe { libc::fcntl(ends[1], libc::F_SETPIPE_SZ, 1 << 20) })?;
    let [mut from, mut to] = ends.map(|end| unsafe { File::from_raw_fd(end) });
    let mut written = 0;
    while let Ok(length) = to.write(&[7; 4096]) {
        written += length;
    }
    let mut packets = [0; 2];
    done("pipe", unsafe { libc::pipe2(packets.as_mut_ptr(), libc::O_DIRECT) })?;
    let [mut packet_from, mut packet_to] = packets.map(|end| unsafe { File::from_raw_fd(end) });
    said(packet_to.write_all(b"one"))?;
    said(packet_to.write_all(b"another"))?;
    hold()?;
    equal("its size", done("F_GETPIPE_SZ", unsafe { libc::fcntl(from.as_raw_fd(), libc::F_GETPIPE_SZ) })?, size)?;
    check(to.write(&[7; 4096]).is_err(), "there is room in it")?;
    let mut all = vec![0; written];
    said(from.read_exact(&mut all))?;
    check(all.iter().all(|byte| *byte == 7), "other bytes")?;
    let mut text = [0; 32];
    equal("a packet", said(packet_from.read(&mut text))?, 3)?;
    equal("a packet", said(packet_from.read(&mut text))?, 7)?;
    said(packet_to.write_all(b"a"))?;
    said(packet_to.write_all(b"b"))?;
    equal("a packet", said(packet_from.read(&mut text))?, 1)
}

/// A file that never had a name gets one afterwards.
fn nameless_file() -> Checked {
    let mut file =
        said(OpenOptions::new().read(true).write(true).custom_flags(libc::O_TMPFILE).mode(0o640).open("/tmp"))?;
    said(file.write_all(b"contents"))?;
    hold()?;
    equal("its permissions", said(file.metadata())?.mode() & 0o777, 0o640)?;
    let from = format!("/proc/self/fd/{}\0", file.as_raw_fd());
    let flags = libc::AT_SYMLINK_FOLLOW;
    done("linkat", unsafe {
        libc::linkat(libc::AT_FDCWD, from.as_ptr().cast(), libc::AT_FDCWD, c"/tmp/named".as_ptr(), flags)
    })?;
    equal("what is in it", read("/tmp/named")?.as_str(), "contents")
}

/// Handles on a file, a directory, a link and a socket's name.
fn path_only() -> Checked {
    said(fs::write("/tmp/file", "contents"))?;
    said(std::os::unix::fs::symlink("/tmp/file", "/tmp/link"))?;
    let _listener = said(std::os::unix::net::UnixListener::bind("/tmp/socket"))?;
    let open =
        |path: &str, flags: i32| said(OpenOptions::new().read(true).custom_flags(libc::O_PATH | flags).open(path));
    let all = [open("/tmp/file", 0)?, open("/tmp", 0)?, open("/tmp/link", libc::O_NOFOLLOW)?, open("/tmp/socket", 0)?];
    hold()?;
    let own = |file: &File| format!("/proc/self/fd/{}", file.as_raw_fd());
    equal("the file", read(own(&all[0]))?.as_str(), "contents")?;
    equal("by the directory", read(format!("{}/file", own(&all[1])))?.as_str(), "contents")?;
    check(said(all[2].metadata())?.file_type().is_symlink(), "the link is none")?;
    said(std::os::unix::net::UnixStream::connect(own(&all[3]))).map(drop)
}

/// A directory of which half has been read: the rest comes, each once.
fn directory_half_read() -> Checked {
    said(fs::create_dir("/tmp/many"))?;
    for number in 0..500 {
        said(fs::write(format!("/tmp/many/{number}"), ""))?;
    }
    let directory = said(File::open("/tmp/many"))?;
    let mut names = Vec::new();
    entries(&directory, 4096, &mut names)?;
    let half = names.len();
    check((2..500).contains(&half), format!("{half} at once"))?;
    hold()?;
    while entries(&directory, 4096, &mut names)? {}
    let read = names.len();
    names.sort();
    names.dedup();
    equal("names", (names.len(), read), (502, 502))
}

fn entries(directory: &File, room: usize, names: &mut Vec<Vec<u8>>) -> Result<bool, String> {
    let mut buffer = vec![0u8; room];
    let args = [directory.as_raw_fd() as u64, buffer.as_mut_ptr() as u64, room as u64];
    let length = call("getdents64", libc::SYS_getdents64, args)? as usize;
    let mut rest = &buffer[..length];
    while rest.len() > 19 {
        let size = usize::from(u16::from_ne_bytes([rest[16], rest[17]]));
        names.push(rest[19..size].split(|byte| *byte == 0).next().unwrap_or_default().to_vec());
        rest = &rest[size..];
    }
    Ok(length > 0)
}

/// A file that was opened by a name that is gone, and has another.
fn linked_elsewhere() -> Checked {
    said(fs::write("/tmp/first", "contents"))?;
    let mut file = said(OpenOptions::new().read(true).append(true).open("/tmp/first"))?;
    said(fs::hard_link("/tmp/first", "/tmp/second"))?;
    said(fs::remove_file("/tmp/first"))?;
    hold_loosely()?;
    said(file.write_all(b" and more"))?;
    equal("by its other name", read("/tmp/second")?.as_str(), "contents and more")?;
    equal("links", said(file.metadata())?.nlink(), 1)
}

/// A file in whose place there is another now.
fn file_replaced() -> Checked {
    said(fs::write("/tmp/name", "old"))?;
    let mut old = said(File::open("/tmp/name"))?;
    said(fs::write("/tmp/new", "new"))?;
    said(fs::rename("/tmp/new", "/tmp/name"))?;
    hold()?;
    let mut text = String::new();
    said(old.read_to_string(&mut text))?;
    equal("what it was", text.as_str(), "old")?;
    equal("what it is", read("/tmp/name")?.as_str(), "new")
}

/// Files that were opened before the root directory was changed.
fn behind_a_root() -> Checked {
    said(fs::create_dir_all("/tmp/jail/inner"))?;
    said(fs::write("/tmp/outside", "contents"))?;
    let mut outside = said(File::open("/tmp/outside"))?;
    let directory = said(File::open("/tmp"))?;
    let go = Gate::new()?;
    let child = fork(|| {
        done("chroot", unsafe { libc::chroot(c"/tmp/jail".as_ptr()) })?;
        said(std::env::set_current_dir("/"))?;
        said(fs::write("/inner/file", "in the jail"))?;
        let inside = said(File::open("/inner/file"))?;
        go.pass(1)?;
        let mut text = String::new();
        said(outside.read_to_string(&mut text))?;
        equal("from outside", text.as_str(), "contents")?;
        let mut stat: libc::stat = unsafe { std::mem::zeroed() };
        done("fstatat", unsafe { libc::fstatat(directory.as_raw_fd(), c"outside".as_ptr(), &raw mut stat, 0) })?;
        equal("size of the file inside", said(inside.metadata())?.len(), 11)
    })?;
    until_asleep(child)?;
    hold()?;
    go.open()?;
    reap(child)
}

/// More descriptors than a few batches take: files, pipes and sockets, some closed by `execve`, some twice.
fn many_descriptors() -> Checked {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    done("getrlimit", unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) })?;
    limit.rlim_cur = limit.rlim_max;
    done("setrlimit", unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) })?;
    let rounds = (limit.rlim_max / 16).clamp(100, 700);
    let mut files: Vec<File> = Vec::new();
    let mut pairs = Vec::new();
    for round in 0..rounds {
        let mut file =
            said(OpenOptions::new().read(true).append(true).create(true).open(format!("/tmp/{}", round % 50)))?;
        said(file.write_all(b"x"))?;
        done("dup", unsafe { libc::dup(file.as_raw_fd()) })?;
        files.push(file);
        let (mut one, other) = said(std::os::unix::net::UnixStream::pair())?;
        said(one.write_all(&round.to_ne_bytes()))?;
        pairs.push((one, other));
    }
    hold()?;
    for (round, (one, other)) in (0..rounds).zip(&mut pairs) {
        let mut word = [0; 8];
        said(other.read_exact(&mut word))?;
        equal("what was on its way", u64::from_ne_bytes(word), round)?;
        drop(said(one.try_clone())?);
    }
    files.iter_mut().try_for_each(|file| said(file.write_all(b"y")))
}
