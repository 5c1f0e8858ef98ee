//! Packet sockets: frames as they are on the wire.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::check;

/// Sends an Ethernet frame out of the interface `index` of this thread's network namespace.
pub fn send_frame(index: u32, frame: &[u8]) -> io::Result<()> {
    // SAFETY: numbers only; on success the result is a fresh descriptor that nobody else owns. Protocol 0 receives nothing.
    let socket = check(unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) }.into())?;
    // SAFETY: as above.
    let socket = unsafe { OwnedFd::from_raw_fd(socket as i32) };
    // SAFETY: all-zero is a valid sockaddr_ll.
    let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    to.sll_family = libc::AF_PACKET as u16;
    to.sll_ifindex = index as i32;
    let (bytes, address) = (frame.as_ptr().cast(), (&raw const to).cast());
    let length = size_of::<libc::sockaddr_ll>() as u32;
    // SAFETY: the kernel reads `frame.len()` bytes of the frame and the address, both of which outlive the call.
    check(unsafe { libc::sendto(socket.as_raw_fd(), bytes, frame.len(), 0, address, length) } as libc::c_long).map(drop)
}
