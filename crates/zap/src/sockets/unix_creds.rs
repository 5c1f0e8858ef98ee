//! Credentials on unix sockets, as the pod sees them.

use std::os::fd::BorrowedFd;

use crate::look::Look;
use crate::sys::message::Credentials;
use crate::sys::socket;

/// `SO_PEERCRED` of a connected socket.
pub(super) fn of_peer(look: &Look<'_>, fd: BorrowedFd<'_>) -> Option<Credentials> {
    let mut bytes = [0; 12];
    let length = socket::get_bytes(fd, libc::SOL_SOCKET, libc::SO_PEERCRED, &mut bytes).ok()?;
    let word = |i: usize| i32::from_ne_bytes([bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]]);
    (length == 12 && word(0) > 0).then(|| in_pod(look, (word(0), word(4) as u32, word(8) as u32)))
}

/// Credentials that were read here, with the PID that the pod knows. A process that is gone has none any more.
pub(super) fn in_pod(_look: &Look<'_>, (pid, user, group): Credentials) -> Credentials {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("NSpid:"));
    let inner = line.and_then(|l| l.split_whitespace().last()).and_then(|p| p.parse().ok());
    (inner.unwrap_or(0), user, group)
}
