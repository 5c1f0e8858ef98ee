//! `ioctl(2)` on terminals.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::check;

/// `struct termios2`: modes, control characters and speeds.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Termios {
    /// Input modes.
    pub input: u32,
    /// Output modes.
    pub output: u32,
    /// Control modes.
    pub control: u32,
    /// Local modes.
    pub local: u32,
    /// Line discipline.
    pub line: u8,
    /// Control characters.
    pub characters: [u8; 19],
    /// Input speed.
    pub input_speed: u32,
    /// Output speed.
    pub output_speed: u32,
}

const TCGETS2: libc::c_ulong = 0x802c_542a;
const TCSETS2: libc::c_ulong = 0x402c_542b;

/// Numbers that a terminal tells (all through an `int *`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Ask {
    /// N of a master's `/dev/pts/N` (`TIOCGPTN`).
    Index = 0x8004_5430,
    /// Whether a master is in packet mode (`TIOCGPKT`).
    Packets = 0x8004_5438,
    /// Whether a master's slave is locked (`TIOCGPTLCK`).
    Locked = 0x8004_5439,
    /// Whether it is in exclusive mode (`TIOCGEXCL`).
    Exclusive = 0x8004_5440,
    /// The real device behind `/dev/tty` (`TIOCGDEV`).
    Device = 0x8004_5432,
    /// Foreground process group, as the caller sees it (`TIOCGPGRP`).
    Foreground = 0x540f,
    /// Session, as the caller sees it (`TIOCGSID`).
    Session = 0x5429,
}

/// Asks a terminal for a number.
pub fn ask(terminal: impl AsFd, what: Ask) -> io::Result<i32> {
    let mut answer: libc::c_int = 0;
    let fd = terminal.as_fd().as_raw_fd();
    // SAFETY: each of these requests writes one int to the address, which is that of an int of ours.
    check(unsafe { libc::ioctl(fd, what as libc::c_ulong, &raw mut answer) } as libc::c_long)?;
    Ok(answer)
}

/// Puts a master into or out of packet mode.
pub fn set_packets(master: impl AsFd, on: bool) -> io::Result<()> {
    tell(master, libc::TIOCPKT, on.into())
}

/// Locks or unlocks a master's slave: a locked one cannot be opened.
pub fn set_locked(master: impl AsFd, on: bool) -> io::Result<()> {
    tell(master, libc::TIOCSPTLCK, on.into())
}

fn tell(terminal: impl AsFd, request: libc::c_ulong, value: libc::c_int) -> io::Result<()> {
    // SAFETY: the two requests that get here read one int at an address that outlives the call.
    check(unsafe { libc::ioctl(terminal.as_fd().as_raw_fd(), request, &raw const value) } as libc::c_long).map(drop)
}

/// Puts a terminal into exclusive mode: it cannot be opened again without privilege.
pub fn set_exclusive(terminal: impl AsFd) -> io::Result<()> {
    // SAFETY: the request takes no argument.
    check(unsafe { libc::ioctl(terminal.as_fd().as_raw_fd(), libc::TIOCEXCL) } as libc::c_long).map(drop)
}

/// Stops or starts output, as ^S and ^Q do.
pub fn set_stopped(terminal: impl AsFd, stopped: bool) -> io::Result<()> {
    let action: libc::c_int = if stopped { libc::TCOOFF } else { libc::TCOON };
    // SAFETY: the request takes a number.
    check(unsafe { libc::ioctl(terminal.as_fd().as_raw_fd(), libc::TCXONC, action) } as libc::c_long).map(drop)
}

/// The settings of a terminal; of a master's slave when asked of the master.
pub fn settings(terminal: impl AsFd) -> io::Result<Termios> {
    let mut settings = std::mem::MaybeUninit::<Termios>::zeroed();
    let fd = terminal.as_fd().as_raw_fd();
    // SAFETY: the kernel fills one struct termios2, which Termios is laid out as; all-zero is valid in any case.
    check(unsafe { libc::ioctl(fd, TCGETS2, settings.as_mut_ptr()) } as libc::c_long)?;
    // SAFETY: zeroed, then filled.
    Ok(unsafe { settings.assume_init() })
}

/// Changes the settings at once; nothing that waits to be read or written is dropped.
pub fn set_settings(terminal: impl AsFd, settings: &Termios) -> io::Result<()> {
    let fd = terminal.as_fd().as_raw_fd();
    // SAFETY: the kernel reads one struct termios2 that outlives the call.
    check(unsafe { libc::ioctl(fd, TCSETS2, std::ptr::from_ref(settings)) } as libc::c_long).map(drop)
}

/// The window: rows, columns, pixels across, pixels down.
pub fn window(terminal: impl AsFd) -> io::Result<[u16; 4]> {
    let mut window = [0u16; 4];
    let fd = terminal.as_fd().as_raw_fd();
    // SAFETY: struct winsize is four unsigned shorts, which the kernel fills.
    check(unsafe { libc::ioctl(fd, libc::TIOCGWINSZ, window.as_mut_ptr()) } as libc::c_long)?;
    Ok(window)
}

/// Sets the window.
pub fn set_window(terminal: impl AsFd, window: [u16; 4]) -> io::Result<()> {
    let fd = terminal.as_fd().as_raw_fd();
    // SAFETY: struct winsize is four unsigned shorts, which the kernel reads.
    check(unsafe { libc::ioctl(fd, libc::TIOCSWINSZ, window.as_ptr()) } as libc::c_long).map(drop)
}

/// Opens a master's slave by the master alone (`TIOCGPTPEER`). Of this call alone the kernel keeps even `O_CLOEXEC` among
/// the status flags, so it is set afterwards, on the number.
pub fn peer(master: impl AsFd, flags: i32) -> io::Result<OwnedFd> {
    let (master, flags) = (master.as_fd().as_raw_fd(), flags & !libc::O_ASYNC | libc::O_NOCTTY);
    // SAFETY: the request takes a number; on success the result is a fresh descriptor that nobody else owns.
    let fd = check(unsafe { libc::ioctl(master, libc::TIOCGPTPEER, flags) } as libc::c_long)?;
    // SAFETY: as above.
    let slave = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    // SAFETY: numbers only.
    check(unsafe { libc::fcntl(slave.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) } as libc::c_long)?;
    Ok(slave)
}

/// Opens `/dev/tty` so that it means `slave`: what that name means is a matter of the opener's session, so a child that
/// shares our descriptor table starts a session, opens it for us, and gives the terminal up again.
pub fn open_as_controlling(slave: BorrowedFd<'_>, flags: i32) -> io::Result<OwnedFd> {
    let mut result: libc::c_int = -libc::EIO;
    let (mut pipe, slave) = ([0; 2], slave.as_raw_fd());
    let flags = flags & !libc::O_ASYNC | libc::O_CLOEXEC;
    // SAFETY: the kernel fills the array of two.
    check(unsafe { libc::pipe2(pipe.as_mut_ptr(), libc::O_CLOEXEC) } as libc::c_long)?;
    // SAFETY: without CLONE_VM the child has its own copy of memory, as after fork; it makes system calls only.
    let child = check(unsafe { libc::syscall(libc::SYS_clone, libc::CLONE_FILES | libc::SIGCHLD, 0, 0, 0, 0) })?;
    if child == 0 {
        // SAFETY: plain system calls on numbers and on memory of the child's own; `_exit` ends it.
        unsafe {
            libc::signal(libc::SIGHUP, libc::SIG_IGN);
            let got = if libc::setsid() < 0 || libc::ioctl(slave, libc::TIOCSCTTY, 0) < 0 {
                -*libc::__errno_location()
            } else {
                let tty = libc::open(c"/dev/tty".as_ptr(), flags);
                let got = if tty < 0 { -*libc::__errno_location() } else { tty };
                // Given up before the end: the end of a session leader hangs up its terminal.
                libc::ioctl(slave, libc::TIOCNOTTY);
                got
            };
            libc::write(pipe[1], (&raw const got).cast(), size_of::<libc::c_int>());
            libc::_exit(0);
        }
    }
    // SAFETY: the pipe is ours alone, `result` takes one int, and the child is our own.
    unsafe {
        libc::waitpid(child as i32, std::ptr::null_mut(), 0);
        libc::close(pipe[1]);
        libc::read(pipe[0], (&raw mut result).cast(), size_of::<libc::c_int>());
        libc::close(pipe[0]);
    }
    if result < 0 {
        return Err(io::Error::from_raw_os_error(-result));
    }
    // SAFETY: the child opened it in the table that it shared with us, and told nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(result) })
}
