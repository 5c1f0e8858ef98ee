//! Terminals: ptys and their window sizes.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use super::check;

/// The size of a terminal's window, in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct WindowSize {
    /// Rows.
    pub rows: u16,
    /// Columns.
    pub columns: u16,
}

/// Lets the slave of this master be opened.
pub fn unlock(master: impl AsFd) -> io::Result<()> {
    let locked: libc::c_int = 0;
    // SAFETY: the kernel reads one int, which outlives the call.
    check(unsafe { libc::ioctl(master.as_fd().as_raw_fd(), libc::TIOCSPTLCK, &raw const locked) }.into()).map(drop)
}

/// Opens the slave of this master, wherever its devpts is mounted; it does not become the controlling terminal.
pub fn slave(master: impl AsFd) -> io::Result<OwnedFd> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: numbers only; the result is a fresh descriptor that nobody else owns.
    let fd = check(unsafe { libc::ioctl(master.as_fd().as_raw_fd(), libc::TIOCGPTPEER, flags) }.into())?;
    // SAFETY: as above.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// N of `/dev/pts/N` for this master.
pub fn index(master: impl AsFd) -> io::Result<u32> {
    let mut number: libc::c_uint = 0;
    // SAFETY: the kernel writes one unsigned int, which is ours.
    check(unsafe { libc::ioctl(master.as_fd().as_raw_fd(), libc::TIOCGPTN, &raw mut number) }.into())?;
    Ok(number)
}

/// Makes descriptor `number` the controlling terminal of the calling session leader.
pub fn take_control(number: i32) -> io::Result<()> {
    // SAFETY: numbers only.
    check(unsafe { libc::ioctl(number, libc::TIOCSCTTY, 0) }.into()).map(drop)
}

/// The size of a terminal.
pub fn window_size(terminal: impl AsFd) -> io::Result<WindowSize> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the kernel writes one winsize, which is ours.
    check(unsafe { libc::ioctl(terminal.as_fd().as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) }.into())?;
    Ok(WindowSize { rows: size.ws_row, columns: size.ws_col })
}

/// Sets the size of a terminal; its foreground group gets SIGWINCH if it changes.
pub fn resize(terminal: impl AsFd, size: WindowSize) -> io::Result<()> {
    let size = libc::winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the kernel reads one winsize, which outlives the call.
    check(unsafe { libc::ioctl(terminal.as_fd().as_raw_fd(), libc::TIOCSWINSZ, &raw const size) }.into()).map(drop)
}
