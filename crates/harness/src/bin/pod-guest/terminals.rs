//! Terminals that are full: of what is printed and of what is typed.

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::stage::*;

pub(crate) const KINDS: &[crate::stage::Kind] = &[
    ("terminal-full", terminal_full),
    ("terminal-typed-full", terminal_typed_full),
    ("terminal-stopped", terminal_stopped),
];

/// A pty in which bytes stay as they are: its master, and its slave.
fn plain() -> Result<(std::fs::File, std::fs::File), String> {
    let (mut master, mut slave) = (0, 0);
    let (name, size) = (std::ptr::null_mut(), std::ptr::null());
    let mut modes: libc::termios = unsafe { std::mem::zeroed() };
    unsafe { libc::cfmakeraw(&raw mut modes) };
    done("openpty", unsafe { libc::openpty(&raw mut master, &raw mut slave, name, &raw const modes, size) })?;
    let own = |fd| unsafe { std::fs::File::from(OwnedFd::from_raw_fd(fd)) };
    Ok((own(master), own(slave)))
}

fn wait_for_nobody(file: &std::fs::File, nonblocking: bool) -> Checked {
    let flags = if nonblocking { libc::O_NONBLOCK } else { 0 };
    done("fcntl", unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags) }).map(drop)
}

/// Numbers, one after the other, as many as there is room for; how many bytes those are.
fn fill(into: &mut std::fs::File, size: usize) -> Result<usize, String> {
    wait_for_nobody(into, true)?;
    let (mut written, mut misses) = (0, 0);
    while misses < 20 {
        let piece: Vec<u8> = (written..written + size).map(|at| (at % 251) as u8).collect();
        match into.write(&piece) {
            Ok(length) => (written, misses) = (written + length, 0),
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                misses += 1;
                doze();
            }
            Err(e) => return Err(e.to_string()),
        }
    }
    wait_for_nobody(into, false)?;
    Ok(written)
}

fn read_all(from: &mut std::fs::File, count: usize) -> Checked {
    let mut bytes = vec![0; count];
    from.read_exact(&mut bytes).map_err(|e| e.to_string())?;
    let wrong = bytes.iter().enumerate().find(|(at, byte)| usize::from(**byte) != at % 251);
    equal("a byte that differs", wrong, None)
}

/// Printed and not read, as much as fits, by writers of different habits, one of which waits for room.
fn terminal_full() -> Checked {
    let mut full = Vec::new();
    for size in [1, 17, 100, 1000, 1792, 4096] {
        let (master, mut slave) = plain()?;
        let printed = fill(&mut slave, size)?;
        full.push((master, slave, printed));
    }
    let (mut master, mut slave) = plain()?;
    let printed = fill(&mut slave, 512)?;
    const MORE: usize = 1 << 16;
    let more: Vec<u8> = (printed..printed + MORE).map(|at| (at % 251) as u8).collect();
    let child = fork(|| slave.write_all(&more).map_err(|e| e.to_string()))?;
    until_asleep(child)?;
    hold()?;
    for (master, _slave, printed) in &mut full {
        read_all(master, *printed)?;
    }
    read_all(&mut master, printed + MORE)?;
    reap(child)
}

/// Typed and not read.
fn terminal_typed_full() -> Checked {
    let mut full = Vec::new();
    for size in [1, 100, 1000, 4096] {
        let (mut master, slave) = plain()?;
        let typed = fill(&mut master, size)?;
        full.push((master, slave, typed));
    }
    hold()?;
    full.iter_mut().try_for_each(|(_master, slave, typed)| read_all(slave, *typed))
}

/// Stopped by ^S, with output that was not read.
fn terminal_stopped() -> Checked {
    let (mut master, mut slave) = plain()?;
    let mut modes: libc::termios = unsafe { std::mem::zeroed() };
    done("tcgetattr", unsafe { libc::tcgetattr(slave.as_raw_fd(), &raw mut modes) })?;
    modes.c_iflag |= libc::IXON;
    (modes.c_cc[libc::VSTOP], modes.c_cc[libc::VSTART]) = (0x13, 0x11);
    done("tcsetattr", unsafe { libc::tcsetattr(slave.as_raw_fd(), libc::TCSANOW, &raw const modes) })?;
    slave.write_all(b"before").map_err(|e| e.to_string())?;
    master.write_all(&[0x13]).map_err(|e| e.to_string())?;
    let writable = |slave: &std::fs::File| {
        let mut polled = libc::pollfd { fd: slave.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
        unsafe { libc::poll(&raw mut polled, 1, 0) == 1 }
    };
    until("the terminal to stop", || !writable(&slave))?;
    hold()?;
    check(!writable(&slave), "it goes on by itself")?;
    let mut read = [0; 6];
    master.read_exact(&mut read).map_err(|e| e.to_string())?;
    equal("what was printed", &read, b"before")?;
    master.write_all(&[0x11]).map_err(|e| e.to_string())?;
    until("the terminal to go on", || writable(&slave))?;
    slave.write_all(b"behind").map_err(|e| e.to_string())?;
    master.read_exact(&mut read).map_err(|e| e.to_string())?;
    equal("what is printed now", &read, b"behind")
}
