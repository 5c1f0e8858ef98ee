//! Sockets that see what is meant for others as well: while a pod is rebuilt they must hear nothing of it.

use std::io;
use std::os::fd::BorrowedFd;

use serde::{Deserialize, Serialize};

use super::common::SocketOptions;
use crate::sys::socket::{self, FilterStep};

/// Return 0: nothing of the packet is kept.
const NOTHING: FilterStep = (0x06, 0, 0, 0);
/// Return all of it.
const EVERYTHING: FilterStep = (0x06, 0, 0, u32::MAX);

/// The filter of a socket that is silenced until the pod goes on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Silenced {
    /// Its classic filter: code, jump-true, jump-false, operand.
    pub filter: Vec<FilterStep>,
    /// Whether it is locked.
    pub locked: bool,
}

impl Silenced {
    /// Takes the filter out of the options of a socket.
    pub(super) fn take(options: &mut SocketOptions) -> Silenced {
        Silenced { filter: std::mem::take(&mut options.filter), locked: std::mem::take(&mut options.filter_locked) }
    }

    /// Has a socket hear nothing.
    pub(super) fn silence(fd: BorrowedFd<'_>) -> io::Result<()> {
        socket::attach_filter(fd, &[NOTHING])
    }

    /// Throws away what a socket heard between its making and its silencing, and has it hear again.
    pub(super) fn restart(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        while socket::receive(fd, &mut [0], libc::MSG_DONTWAIT).is_ok() {}
        if self.filter.is_empty() {
            // Replaced first: a packet that was let through to the old one must not come in between.
            socket::attach_filter(fd, &[EVERYTHING])?;
            socket::set_int(fd, libc::SOL_SOCKET, libc::SO_DETACH_FILTER, 0)?;
        } else {
            socket::attach_filter(fd, &self.filter)?;
        }
        if self.locked {
            socket::set_int(fd, libc::SOL_SOCKET, libc::SO_LOCK_FILTER, 1)?;
        }
        Ok(())
    }
}
