//! What the probes prepare, and what they expect to find later.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::time::Duration;

use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::unistd::{dup, pipe2, read, write};
use zap::ids::HostPid;
use zap::sys::lock;
use zap::sys::pidfd::PidFd;

type Check = Box<dyn FnOnce()>;

/// The probe of that name.
pub(crate) fn named(name: &str) -> fn() -> Check {
    match name {
        "regular_file" => regular_file,
        "appended_file" => appended_file,
        "shared_offset" => shared_offset,
        "unlinked_file" => unlinked_file,
        "big_unlinked_file_with_holes" => big_unlinked_file_with_holes,
        "replaced_file" => replaced_file,
        "file_of_the_root" => file_of_the_root,
        "directory" => directory,
        "pipe_with_contents" => pipe_with_contents,
        "packets_in_a_pipe" => packets_in_a_pipe,
        "pipe_at_its_end" => pipe_at_its_end,
        "named_pipe" => named_pipe,
        "devices" => devices,
        "eventfd" => eventfd,
        "epoll" => epoll,
        "timerfd" => timerfd,
        "signalfd" => signalfd,
        "whole_file_lock" => whole_file_lock,
        "range_lock" => range_lock,
        "posix_lock" => posix_lock,
        "pty" => pty,
        "proc_files" => proc_files,
        "pidfd" => pidfd,
        "signals_of_a_file" => signals_of_a_file,
        "close_on_exec" => close_on_exec,
        "console" => console,
        "console_terminal" => console_terminal,
        "fanotify" => fanotify,
        other => panic!("no probe {other}"),
    }
}

fn link(file: impl AsFd) -> String {
    let path = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
    fs::read_link(path).unwrap().to_str().unwrap().to_owned()
}

fn flags(file: impl AsFd) -> i32 {
    fcntl(file, FcntlArg::F_GETFL).unwrap()
}

/// Facts that must be the same before and after: the flags, and the link with its numbers left out where they are the
/// kernel's own.
fn facts(file: impl AsFd) -> (i32, String) {
    let link = link(&file);
    (flags(&file), if link.starts_with('/') { link } else { link.split('[').next().unwrap_or_default().to_owned() })
}

fn unchanged(file: impl AsFd + 'static) -> Check {
    let before = facts(&file);
    Box::new(move || assert_eq!(facts(&file), before))
}

fn regular_file() -> Check {
    // One in the upper layer, one on a tmpfs.
    let files = ["/var/tmp/probe file", "/tmp/probe"].map(|path| {
        let mut file = OpenOptions::new().create(true).truncate(true).read(true).write(true).open(path).unwrap();
        file.write_all(b"before").unwrap();
        file.seek(SeekFrom::Start(2)).unwrap();
        (facts(&file), file)
    });
    Box::new(move || {
        for (before, mut file) in files {
            assert_eq!(facts(&file), before);
            assert_eq!(file.stream_position().unwrap(), 2);
            file.write_all(b"hi").unwrap();
            assert_eq!(fs::read(&before.1).unwrap(), b"behire");
        }
    })
}

fn appended_file() -> Check {
    let mut file = OpenOptions::new().create(true).append(true).open("/var/tmp/log").unwrap();
    file.write_all(b"one\n").unwrap();
    let before = facts(&file);
    Box::new(move || {
        assert_eq!(facts(&file), before);
        OpenOptions::new().append(true).open("/var/tmp/log").unwrap().write_all(b"two\n").unwrap();
        file.write_all(b"three\n").unwrap();
        assert_eq!(fs::read("/var/tmp/log").unwrap(), b"one\ntwo\nthree\n");
    })
}

fn shared_offset() -> Check {
    fs::write("/tmp/shared", "0123456789").unwrap();
    let mut file = File::open("/tmp/shared").unwrap();
    let mut copy = file.try_clone().unwrap();
    let mut other = File::open("/tmp/shared").unwrap();
    Box::new(move || {
        file.seek(SeekFrom::Start(7)).unwrap();
        assert_eq!((copy.stream_position().unwrap(), other.stream_position().unwrap()), (7, 0));
    })
}

fn unlinked_file() -> Check {
    let mut file =
        OpenOptions::new().create(true).truncate(true).read(true).write(true).mode(0o604).open("/tmp/x").unwrap();
    let reader = File::open("/tmp/x").unwrap();
    file.write_all(b"kept").unwrap();
    fs::remove_file("/tmp/x").unwrap();
    let before = facts(&file);
    Box::new(move || {
        assert_eq!(facts(&file), before);
        assert_eq!(file.stream_position().unwrap(), 4);
        file.write_all(b" on").unwrap();
        let mut bytes = [0; 9];
        assert_eq!(reader.read_at(&mut bytes, 0).unwrap(), 7);
        assert_eq!(&bytes[..7], b"kept on");
        let facts = file.metadata().unwrap();
        assert_eq!((facts.nlink(), facts.mode() & 0o777), (0, 0o604));
        assert!(!fs::exists("/tmp/x").unwrap());
    })
}

fn big_unlinked_file_with_holes() -> Check {
    let file = OpenOptions::new().create(true).truncate(true).read(true).write(true).open("/var/tmp/big").unwrap();
    let piece: Vec<u8> = (0..3 << 20).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    file.write_at(&piece, 5 << 20).unwrap();
    file.set_len(1 << 30).unwrap();
    fs::remove_file("/var/tmp/big").unwrap();
    Box::new(move || {
        let mut found = vec![0; piece.len()];
        file.read_exact_at(&mut found, 5 << 20).unwrap();
        assert!(found == piece);
        let facts = file.metadata().unwrap();
        assert_eq!(facts.len(), 1 << 30);
        assert!(facts.blocks() * 512 < 8 << 20);
    })
}

fn replaced_file() -> Check {
    fs::write("/tmp/config", "old").unwrap();
    let mut file = File::open("/tmp/config").unwrap();
    fs::write("/tmp/config.new", "new").unwrap();
    fs::rename("/tmp/config.new", "/tmp/config").unwrap();
    Box::new(move || {
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        assert_eq!((text.as_str(), fs::read("/tmp/config").unwrap().as_slice()), ("old", &b"new"[..]));
    })
}

fn file_of_the_root() -> Check {
    let mut file = File::open("/etc/passwd").unwrap();
    let whole = fs::read("/etc/passwd").unwrap();
    file.seek(SeekFrom::Start(3)).unwrap();
    let before = facts(&file);
    Box::new(move || {
        assert_eq!(facts(&file), before);
        let mut rest = Vec::new();
        file.read_to_end(&mut rest).unwrap();
        assert_eq!(rest, &whole[3..]);
    })
}

fn directory() -> Check {
    fs::create_dir("/tmp/directory").unwrap();
    unchanged(File::open("/tmp/directory").unwrap())
}

fn pipe_with_contents() -> Check {
    let (from, to) = pipe2(OFlag::O_NONBLOCK).unwrap();
    let capacity = fcntl(&to, FcntlArg::F_SETPIPE_SZ(1 << 18)).unwrap();
    let bytes: Vec<u8> = (0..200_000u32).map(|i| (i % 251) as u8).collect();
    assert_eq!(write(&to, &bytes).unwrap(), bytes.len());
    let before = (facts(&from), facts(&to));
    Box::new(move || {
        assert_eq!((facts(&from), facts(&to)), before);
        assert_eq!(fcntl(&to, FcntlArg::F_GETPIPE_SZ).unwrap(), capacity);
        let mut found = Vec::new();
        let mut buffer = [0; 65536];
        while let Ok(length @ 1..) = read(&from, &mut buffer) {
            found.extend_from_slice(&buffer[..length]);
        }
        assert!(found == bytes);
        assert_eq!(link(&from), link(&to));
        write(&to, b"more").unwrap();
        assert_eq!(read(&from, &mut buffer).unwrap(), 4);
    })
}

fn packets_in_a_pipe() -> Check {
    let (from, to) = pipe2(OFlag::O_DIRECT | OFlag::O_NONBLOCK).unwrap();
    write(&to, b"one").unwrap();
    write(&to, b"three").unwrap();
    Box::new(move || {
        let mut buffer = [0; 99];
        assert_eq!(read(&from, &mut buffer).unwrap(), 3);
        assert_eq!(read(&from, &mut buffer).unwrap(), 5);
        assert_eq!(read(&from, &mut buffer), Err(nix::Error::EAGAIN));
        drop(to);
    })
}

fn pipe_at_its_end() -> Check {
    let (from, to) = pipe2(OFlag::empty()).unwrap();
    let (lost, broken) = pipe2(OFlag::empty()).unwrap();
    write(&to, b"last words").unwrap();
    drop((to, lost));
    Box::new(move || {
        let mut buffer = [0; 99];
        assert_eq!(read(&from, &mut buffer).unwrap(), 10);
        assert_eq!(read(&from, &mut buffer).unwrap(), 0);
        assert_eq!(write(&broken, b"x"), Err(nix::Error::EPIPE));
    })
}

fn named_pipe() -> Check {
    nix::unistd::mkfifo("/tmp/fifo", nix::sys::stat::Mode::S_IRWXU).unwrap();
    let from = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open("/tmp/fifo").unwrap();
    let to = OpenOptions::new().write(true).open("/tmp/fifo").unwrap();
    write(&to, b"in the fifo").unwrap();
    let before = (facts(&from), facts(&to));
    Box::new(move || {
        assert_eq!((facts(&from), facts(&to)), before);
        let mut buffer = [0; 99];
        assert_eq!(read(&from, &mut buffer).unwrap(), 11);
        drop(to);
        assert_eq!(read(&from, &mut buffer).unwrap(), 0);
    })
}

fn devices() -> Check {
    let names = ["null", "zero", "full", "random", "urandom"];
    let checks = names.map(|n| unchanged(OpenOptions::new().read(true).write(true).open(format!("/dev/{n}")).unwrap()));
    Box::new(move || checks.into_iter().for_each(|check| check()))
}

fn eventfd() -> Check {
    use nix::sys::eventfd::{EfdFlags, EventFd};
    let counter = EventFd::from_value_and_flags(7, EfdFlags::empty()).unwrap();
    let semaphore = EventFd::from_value_and_flags(3, EfdFlags::EFD_SEMAPHORE | EfdFlags::EFD_NONBLOCK).unwrap();
    let before = facts(semaphore.as_fd());
    Box::new(move || {
        assert_eq!(facts(semaphore.as_fd()), before);
        assert_eq!((counter.read().unwrap(), semaphore.read().unwrap()), (7, 1));
    })
}

fn epoll() -> Check {
    let (from, to) = pipe2(OFlag::O_NONBLOCK).unwrap();
    let (idle, its_end) = pipe2(OFlag::O_NONBLOCK).unwrap();
    let epoll = Epoll::new(EpollCreateFlags::empty()).unwrap();
    let outer = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
    epoll.add(&from, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 41)).unwrap();
    epoll.add(&to, EpollEvent::new(EpollFlags::EPOLLOUT | EpollFlags::EPOLLONESHOT, 42)).unwrap();
    // Registered under a number that is closed afterwards: it stays, as the file does.
    let lent = dup(&idle).unwrap();
    epoll.add(&lent, EpollEvent::new(EpollFlags::EPOLLIN, 43)).unwrap();
    let number = lent.as_raw_fd();
    drop(lent);
    outer.add(&epoll.0, EpollEvent::new(EpollFlags::EPOLLIN, 44)).unwrap();
    let mut events = [EpollEvent::empty(); 8];
    let mut ready = move |epoll: &Epoll| {
        let count = epoll.wait(&mut events, EpollTimeout::ZERO).unwrap();
        events[..count].iter().map(EpollEvent::data).collect::<Vec<_>>()
    };
    assert_eq!(ready(&epoll), [42]);
    let watched = |epoll: &Epoll| {
        let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", epoll.0.as_raw_fd())).unwrap();
        let words = |l: &str| l.split_whitespace().take(6).collect::<Vec<_>>().join(" ");
        let mut lines: Vec<_> = text.lines().filter(|l| l.starts_with("tfd:")).map(words).collect();
        lines.sort();
        lines
    };
    let before = watched(&epoll);
    assert!(before.iter().any(|l| l.contains(&format!("tfd: {number} "))));
    Box::new(move || {
        let _open = (&from, &idle, &its_end);
        assert_eq!(watched(&epoll), before);
        assert_eq!(ready(&epoll), [] as [u64; 0]);
        write(&to, b"x").unwrap();
        assert_eq!(ready(&outer), [44]);
        assert_eq!(ready(&epoll), [41]);
        assert_eq!(ready(&epoll), [] as [u64; 0]);
    })
}

fn timerfd() -> Check {
    use nix::sys::time::TimeSpec;
    use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
    let hour = TimeSpec::from_duration(Duration::from_secs(3600));
    let long = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK).unwrap();
    long.set(Expiration::OneShot(hour), TimerSetTimeFlags::empty()).unwrap();
    let spent = TimerFd::new(ClockId::CLOCK_BOOTTIME, TimerFlags::empty()).unwrap();
    let first = TimeSpec::from_duration(Duration::from_millis(1));
    spent.set(Expiration::IntervalDelayed(first, hour), TimerSetTimeFlags::empty()).unwrap();
    let mut poll = [nix::poll::PollFd::new(spent.as_fd(), nix::poll::PollFlags::POLLIN)];
    assert_eq!(nix::poll::poll(&mut poll, 60_000u16).unwrap(), 1);
    Box::new(move || {
        let Some(Expiration::OneShot(left)) = long.get().unwrap() else { panic!("not armed") };
        assert!((3400..=3600).contains(&Duration::from(left).as_secs()));
        let mut ticks = [0; 8];
        assert_eq!(read(&spent, &mut ticks).unwrap(), 8);
        assert_eq!(u64::from_ne_bytes(ticks), 1);
        assert!(matches!(spent.get().unwrap(), Some(Expiration::IntervalDelayed(..))));
    })
}

fn signalfd() -> Check {
    use nix::sys::signal::{SigSet, Signal, raise};
    use nix::sys::signalfd::{SfdFlags, SignalFd};
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGUSR1);
    mask.thread_block().unwrap();
    let file = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK).unwrap();
    raise(Signal::SIGUSR1).unwrap();
    Box::new(move || {
        assert_eq!(file.read_signal().unwrap().unwrap().ssi_signo, Signal::SIGUSR1 as u32);
        assert!(file.read_signal().unwrap().is_none());
    })
}

fn whole_file_lock() -> Check {
    let file = File::create("/tmp/locked").unwrap();
    lock::flock(&file, true).unwrap();
    Box::new(move || {
        let other = File::open("/tmp/locked").unwrap();
        assert!(lock::flock(&other, false).is_err());
        drop(file);
        lock::flock(&other, false).unwrap();
    })
}

fn range(kind: i32, start: i64, length: i64) -> libc::flock {
    libc::flock { l_type: kind as i16, l_whence: 0, l_start: start, l_len: length, l_pid: 0 }
}

fn range_lock() -> Check {
    let open = || OpenOptions::new().create(true).truncate(false).read(true).write(true).open("/tmp/ranges").unwrap();
    let file = open();
    fcntl(&file, FcntlArg::F_OFD_SETLK(&range(libc::F_WRLCK, 10, 10))).unwrap();
    Box::new(move || {
        let other = open();
        let try_lock = |start, length| fcntl(&other, FcntlArg::F_OFD_SETLK(&range(libc::F_RDLCK, start, length)));
        assert!(try_lock(0, 10).is_ok() && try_lock(20, 0).is_ok());
        assert_eq!(try_lock(19, 1), Err(nix::Error::EAGAIN));
        drop(file);
        assert!(try_lock(19, 1).is_ok());
    })
}

fn posix_lock() -> Check {
    let open = || OpenOptions::new().create(true).truncate(false).read(true).write(true).open("/tmp/posix").unwrap();
    let file = open();
    fcntl(&file, FcntlArg::F_SETLK(&range(libc::F_WRLCK, 0, 100))).unwrap();
    Box::new(move || {
        // As another owner sees it.
        let mut found = range(libc::F_WRLCK, 50, 1);
        let other = open();
        fcntl(&other, FcntlArg::F_OFD_GETLK(&mut found)).unwrap();
        assert_eq!((i32::from(found.l_type), found.l_start, found.l_len), (libc::F_WRLCK, 0, 100));
        assert_eq!(found.l_pid, std::process::id() as i32);
        drop(file);
    })
}

fn pty() -> Check {
    let _lower = nix::pty::openpty(None, None).unwrap();
    let ends = nix::pty::openpty(None, None).unwrap();
    let name = link(&ends.slave);
    let mut settings = nix::sys::termios::tcgetattr(&ends.slave).unwrap();
    nix::sys::termios::cfmakeraw(&mut settings);
    nix::sys::termios::tcsetattr(&ends.slave, nix::sys::termios::SetArg::TCSANOW, &settings).unwrap();
    drop(_lower);
    let before = (facts(&ends.master), facts(&ends.slave));
    Box::new(move || {
        assert_eq!((facts(&ends.master), facts(&ends.slave)), before);
        assert_eq!(link(&ends.slave), name);
        assert_eq!(nix::sys::termios::tcgetattr(&ends.slave).unwrap(), settings);
        let mut buffer = [0; 99];
        write(&ends.master, b"typed").unwrap();
        assert_eq!(read(&ends.slave, &mut buffer).unwrap(), 5);
        write(&ends.slave, b"printed").unwrap();
        assert_eq!(read(&ends.master, &mut buffer).unwrap(), 7);
        fs::metadata(&name).unwrap();
    })
}

fn proc_files() -> Check {
    let mut status = File::open("/proc/self/status").unwrap();
    let memory = File::open("/proc/meminfo").unwrap();
    let directory = File::open("/proc/self/task").unwrap();
    let before = [facts(&status), facts(&memory), facts(&directory)];
    Box::new(move || {
        assert_eq!([facts(&status), facts(&memory), facts(&directory)], before);
        let mut text = String::new();
        status.read_to_string(&mut text).unwrap();
        assert!(text.contains(&format!("\nPid:\t{}\n", std::process::id())));
    })
}

fn pidfd() -> Check {
    let file = PidFd::open(HostPid(std::process::id() as i32)).unwrap();
    let epoll = Epoll::new(EpollCreateFlags::empty()).unwrap();
    epoll.add(&file, EpollEvent::new(EpollFlags::EPOLLIN, 1)).unwrap();
    Box::new(move || {
        file.signal(0).unwrap();
        let watched = fs::read_to_string(format!("/proc/self/fdinfo/{}", epoll.0.as_raw_fd())).unwrap();
        assert!(watched.contains(&format!("tfd: {:>8} ", file.as_fd().as_raw_fd())), "{watched}");
    })
}

fn signals_of_a_file() -> Check {
    let (from, to) = pipe2(OFlag::empty()).unwrap();
    let me = std::process::id() as i32;
    lock::set_owner(&from, 1, me).unwrap();
    // One that is ignored by default.
    lock::set_signal(&from, libc::SIGURG).unwrap();
    fcntl(&from, FcntlArg::F_SETFL(OFlag::O_ASYNC)).unwrap();
    let before = facts(&from);
    Box::new(move || {
        assert_eq!(facts(&from), before);
        assert_eq!((lock::owner(&from).unwrap(), lock::signal(&from).unwrap()), ((1, me), libc::SIGURG));
        write(&to, b"x").unwrap();
    })
}

fn close_on_exec() -> Check {
    let file = File::open("/dev/null").unwrap();
    let kept = dup(&file).unwrap();
    let closed = |number: i32| {
        let text = fs::read_to_string(format!("/proc/self/fdinfo/{number}")).unwrap();
        let flags = text.lines().find_map(|l| l.strip_prefix("flags:")).unwrap().trim().to_owned();
        i32::from_str_radix(&flags, 8).unwrap() & libc::O_CLOEXEC != 0
    };
    fcntl(&kept, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
    let high = fcntl(&kept, FcntlArg::F_DUPFD(700)).unwrap();
    Box::new(move || {
        assert!(closed(file.as_raw_fd()) && !closed(kept.as_raw_fd()) && !closed(high));
    })
}

fn console() -> Check {
    println!("before the checkpoint");
    let before = [facts(std::io::stdin()), facts(std::io::stdout()), facts(std::io::stderr())];
    Box::new(move || {
        assert_eq!([facts(std::io::stdin()), facts(std::io::stdout()), facts(std::io::stderr())], before);
        println!("after the checkpoint");
    })
}

fn console_terminal() -> Check {
    use nix::sys::termios::{LocalFlags, SetArg, tcgetattr, tcsetattr};
    let terminal = OpenOptions::new().read(true).write(true).open("/dev/tty").unwrap();
    let mut settings = tcgetattr(&terminal).unwrap();
    settings.local_flags.remove(LocalFlags::ECHO);
    tcsetattr(&terminal, SetArg::TCSANOW, &settings).unwrap();
    let all = |terminal: &File| {
        let ends = [facts(std::io::stdin()), facts(std::io::stdout()), facts(terminal)];
        let group = nix::unistd::tcgetpgrp(terminal).unwrap();
        (ends, tcgetattr(terminal).unwrap(), group, nix::unistd::getsid(None).unwrap())
    };
    let before = all(&terminal);
    assert_eq!(before.2, nix::unistd::getpgrp());
    Box::new(move || assert_eq!(all(&terminal), before))
}

fn fanotify() -> Check {
    // A group that is asked before a file is opened, which nobody opens.
    use nix::sys::fanotify::{EventFFlags, Fanotify, InitFlags, MarkFlags, MaskFlags};
    let group = Fanotify::init(InitFlags::FAN_CLASS_CONTENT, EventFFlags::O_RDONLY).unwrap();
    std::fs::write("/var/tmp/guarded", "").unwrap();
    group
        .mark(MarkFlags::FAN_MARK_ADD, MaskFlags::FAN_OPEN_PERM, nix::fcntl::AT_FDCWD, Some("/var/tmp/guarded"))
        .unwrap();
    Box::new(move || drop(group))
}
