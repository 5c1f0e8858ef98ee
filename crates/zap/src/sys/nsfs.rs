//! Namespaces by descriptor: which one it is, whose it is, and going into it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use super::check;

const NS_GET_USERNS: libc::c_ulong = 0xb701;
const NS_GET_PARENT: libc::c_ulong = 0xb702;
const NS_GET_OWNER_UID: libc::c_ulong = 0xb704;
const SIOCGSKNS: libc::c_ulong = 0x894c;

fn related(namespace: impl AsFd, request: libc::c_ulong) -> io::Result<OwnedFd> {
    // SAFETY: these requests take no argument; on success the result is a fresh descriptor that nobody else owns.
    let fd = check(unsafe { libc::ioctl(namespace.as_fd().as_raw_fd(), request) }.into())?;
    // SAFETY: as above.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// The user namespace that a namespace belongs to; of a user namespace, its parent.
pub fn owner(namespace: impl AsFd) -> io::Result<OwnedFd> {
    related(namespace, NS_GET_USERNS)
}

/// The parent of a user or PID namespace.
pub fn parent(namespace: impl AsFd) -> io::Result<OwnedFd> {
    related(namespace, NS_GET_PARENT)
}

/// The network namespace of a socket.
pub fn of_socket(socket: impl AsFd) -> io::Result<OwnedFd> {
    related(socket, SIOCGSKNS)
}

/// The user that made a user namespace.
pub fn owner_uid(namespace: impl AsFd) -> io::Result<u32> {
    let mut uid = 0u32;
    // SAFETY: the kernel writes one uid_t.
    check(unsafe { libc::ioctl(namespace.as_fd().as_raw_fd(), NS_GET_OWNER_UID, &raw mut uid) }.into())?;
    Ok(uid)
}

/// Takes the calling thread into a namespace of this kind (`CLONE_NEW…`).
pub fn enter(namespace: impl AsFd, kind: i32) -> io::Result<()> {
    // SAFETY: numbers only.
    check(unsafe { libc::setns(namespace.as_fd().as_raw_fd(), kind) }.into()).map(drop)
}
