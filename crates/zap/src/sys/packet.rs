//! Packet sockets: frames as they are on the wire.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::check;

/// Sends Ethernet frames out of the interface `index` of this thread's network namespace. Closing the socket, which is
/// returned, takes the kernel tens of milliseconds.
pub fn send_frames(index: u32, frames: &[Vec<u8>]) -> io::Result<OwnedFd> {
    // SAFETY: numbers only; on success the result is a fresh descriptor that nobody else owns. Protocol 0 receives nothing.
    let socket = check(unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) }.into())?;
    // SAFETY: as above.
    let socket = unsafe { OwnedFd::from_raw_fd(socket as i32) };
    // SAFETY: all-zero is a valid sockaddr_ll.
    let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    to.sll_family = libc::AF_PACKET as u16;
    to.sll_ifindex = index as i32;
    let (address, length) = ((&raw const to).cast(), size_of::<libc::sockaddr_ll>() as u32);
    for frame in frames {
        let bytes = frame.as_ptr().cast();
        // SAFETY: the kernel reads `frame.len()` bytes of the frame and the address, both of which outlive the call.
        check(unsafe { libc::sendto(socket.as_raw_fd(), bytes, frame.len(), 0, address, length) } as libc::c_long)?;
    }
    Ok(socket)
}
