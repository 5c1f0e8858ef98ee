//! The host's files: by `..`, links, handles, kept directories, device nodes; and its sockets, pipes and IPC objects by name.

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{OpenOptionsExt, symlink};

use harness::escape::Facts;
use nix::errno::Errno;

use super::attempt::{Attempt, Failed, Kept, Tried, c, call, check, io, own, prepare, read, write};

pub(crate) const ATTEMPTS: &[Attempt] = &[
    ("marker", |f, _| read(&f.marker)),
    ("marker-by-dots", |f, _| read(&format!("{UP}{}", f.marker))),
    ("marker-by-own-root", |f, _| read(&format!("/proc/self/root/{UP}{}", f.marker))),
    ("marker-by-own-cwd", |f, _| read(&format!("/proc/self/cwd/{UP}{}", f.marker))),
    ("marker-by-kept-root", |f, kept| below(kept.root.as_raw_fd(), &format!("{UP}{}", f.marker))),
    ("marker-by-kept-bind", |f, kept| below(kept.bind.as_raw_fd(), &format!("{UP}{}", f.marker))),
    ("marker-by-chroot", by_chroot),
    ("marker-by-link-in-bind", by_link),
    ("marker-by-link-from-outside", |f, _| read(&format!("{}/to-marker", f.bind))),
    ("above-bind-by-link-from-outside", |f, _| read(&format!("{}/to-above", f.bind))),
    ("write-read-only-bind", |f, _| fs::File::create(format!("{}/new", f.read_only_bind)).map(drop).map_err(io)),
    ("write-below-read-only-bind", |f, _| write(&format!("{}/file", f.read_only_bind), "x")),
    ("handle", |_, kept| handle(kept)),
    ("state-of-zap", |f, _| match fs::read_dir(&f.state).map_err(io)?.next() {
        None => Err(Failed::Nothing),
        Some(_) => Ok(()),
    }),
    ("socket-by-path", |f, _| connect_path(&f.socket)),
    ("socket-by-abstract-name", |f, _| connect_path(&format!("\0{}", f.abstract_name))),
    ("socket-by-loopback", |f, _| connect(f.port)),
    ("pipe-by-path", |f, _| {
        let mut options = fs::OpenOptions::new();
        options.write(true).custom_flags(libc::O_NONBLOCK).open(&f.pipe).map(drop).map_err(io)
    }),
    ("segment-by-key", |f, _| check(unsafe { libc::shmget(f.key, 0, 0) }.into()).map(drop)),
    ("queue-by-name", |f, _| {
        let name = c(&f.queue);
        check(unsafe { libc::mq_open(name.as_ptr(), libc::O_RDONLY) }.into()).map(drop)
    }),
    ("device-disk", |f, _| node(libc::S_IFBLK, f.disk.0, f.disk.1)),
    ("device-loop", |_, _| node(libc::S_IFBLK, 7, 0)),
    ("device-loop-control", |_, _| node(libc::S_IFCHR, 10, 237)),
    ("device-memory", |_, _| node(libc::S_IFCHR, 1, 1)),
    ("device-ports", |_, _| node(libc::S_IFCHR, 1, 4)),
    ("device-log", |_, _| node(libc::S_IFCHR, 1, 11)),
    ("device-screen", |_, _| node(libc::S_IFCHR, 4, 0)),
    ("device-fuse", |_, _| node(libc::S_IFCHR, 10, 229)),
    ("device-tunnel", |_, _| node(libc::S_IFCHR, 10, 200)),
    ("device-machine", |_, _| node(libc::S_IFCHR, 10, 232)),
];

const UP: &str = "../../../../../../../../../../../..";

fn below(directory: i32, path: &str) -> Tried {
    let path = c(path);
    check(unsafe { libc::openat(directory, path.as_ptr(), libc::O_RDONLY) }.into()).map(drop)
}

/// The way out of a root directory that is not the root of its mount namespace.
fn by_chroot(facts: &Facts, kept: &Kept) -> Tried {
    let inner = format!("/tmp/inner-{}", std::process::id());
    let _ = fs::create_dir(&inner);
    check(unsafe { libc::chroot(c(&inner).as_ptr()) }.into())?;
    prepare(unsafe { libc::fchdir(kept.root.as_raw_fd()) }.into())?;
    for _ in 0..20 {
        prepare(unsafe { libc::chdir(c"..".as_ptr()) }.into())?;
    }
    prepare(unsafe { libc::chroot(c".".as_ptr()) }.into())?;
    read(&facts.marker)
}

fn by_link(facts: &Facts, _: &Kept) -> Tried {
    let link = format!("{}/link-{}", facts.bind, std::process::id());
    let made = symlink(format!("{UP}{}", facts.marker), &link);
    made.map_err(io)?;
    let found = read(&link);
    let _ = fs::remove_file(&link);
    found
}

fn handle(kept: &Kept) -> Tried {
    #[repr(C)]
    struct Handle {
        bytes: u32,
        kind: i32,
        handle: [u8; 128],
    }
    let mut handle = Handle { bytes: 128, kind: 0, handle: [0; 128] };
    let mut mount = 0i32;
    let (directory, name) = (kept.bind.as_raw_fd() as u64, c"".as_ptr() as u64);
    let (out, mount) = (&raw mut handle as u64, &raw mut mount as u64);
    prepare(call(libc::SYS_name_to_handle_at, [directory, name, out, mount, libc::AT_EMPTY_PATH as u64, 0]))?;
    check(call(libc::SYS_open_by_handle_at, [directory, out, libc::O_RDONLY as u64, 0, 0, 0])).map(drop)
}

fn connect_path(path: &str) -> Tried {
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as u16;
    if path.len() >= address.sun_path.len() {
        return Err(Failed::Before(Errno::ENAMETOOLONG));
    }
    for (to, from) in address.sun_path.iter_mut().zip(path.bytes()) {
        *to = from as libc::c_char;
    }
    let length = 2 + path.len() as u32 + u32::from(!path.starts_with('\0'));
    let socket = own(prepare(unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_STREAM, 0) }.into())?);
    check(unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), length) }.into()).map(drop)
}

fn connect(port: u16) -> Tried {
    std::net::TcpStream::connect(("127.0.0.1", port)).map(drop).map_err(io)
}

/// Makes a node, where nodes work, and opens it.
fn node(kind: u32, major: u32, minor: u32) -> Tried {
    let path = format!("/dev/node-{}", std::process::id());
    check(unsafe { libc::mknod(c(&path).as_ptr(), kind | 0o666, libc::makedev(major, minor)) }.into())?;
    let opened = fs::OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(&path).map(drop).map_err(io);
    let _ = fs::remove_file(&path);
    opened
}
