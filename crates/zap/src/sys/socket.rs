//! Sockets: the calls and options that checkpoint and restart need, on addresses as the kernel writes them.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::check;

/// `TCP_REPAIR` (on, off, off without a window probe) and its companions.
pub const TCP_REPAIR_OFF_NO_PROBE: i32 = -1;
/// `TCP_QUEUE_SEQ`.
pub const TCP_QUEUE_SEQ: i32 = 21;
/// `TCP_TIMESTAMP`.
pub const TCP_TIMESTAMP: i32 = 24;
/// `SO_BUF_LOCK`: which buffer sizes were set by hand.
pub const SO_BUF_LOCK: i32 = 72;

/// Longest address that the kernel gives (`struct sockaddr_storage`).
const ADDRESS_MAX: usize = 128;

/// `socket(2)`, close-on-exec.
pub fn socket(domain: i32, kind: i32, protocol: i32) -> io::Result<OwnedFd> {
    // SAFETY: numbers only; on success the result is a fresh descriptor that nobody else owns.
    let fd = check(unsafe { libc::socket(domain, kind | libc::SOCK_CLOEXEC, protocol) }.into())?;
    // SAFETY: as above.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// `socketpair(2)`, close-on-exec.
pub fn pair(domain: i32, kind: i32) -> io::Result<(OwnedFd, OwnedFd)> {
    let mut ends = [-1; 2];
    // SAFETY: the kernel fills the two numbers of the array.
    check(unsafe { libc::socketpair(domain, kind | libc::SOCK_CLOEXEC, 0, ends.as_mut_ptr()) }.into())?;
    // SAFETY: the call succeeded, so both are fresh descriptors that nobody else owns.
    Ok(unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) })
}

/// `getsockopt(2)` into `buffer`; how many bytes the kernel wrote.
pub fn get_bytes(fd: impl AsFd, level: i32, name: i32, buffer: &mut [u8]) -> io::Result<usize> {
    let mut length = buffer.len() as libc::socklen_t;
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: the kernel writes at most `length` bytes into the buffer, which is that long.
    check(unsafe { libc::getsockopt(fd, level, name, buffer.as_mut_ptr().cast(), &mut length) }.into())?;
    Ok((length as usize).min(buffer.len()))
}

/// An option that is an `int`.
pub fn get_int(fd: impl AsFd, level: i32, name: i32) -> io::Result<i32> {
    let mut bytes = [0; 4];
    // Some options answer with one byte when asked for fewer than four; four is what we give, and zero is the rest.
    get_bytes(fd, level, name, &mut bytes)?;
    Ok(i32::from_ne_bytes(bytes))
}

/// `setsockopt(2)`.
pub fn set_bytes(fd: impl AsFd, level: i32, name: i32, value: &[u8]) -> io::Result<()> {
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: the kernel reads `value.len()` bytes of the value. Options whose value holds a pointer are not set this way.
    check(unsafe { libc::setsockopt(fd, level, name, value.as_ptr().cast(), value.len() as u32) }.into()).map(drop)
}

/// Sets an option that is an `int`.
pub fn set_int(fd: impl AsFd, level: i32, name: i32, value: i32) -> io::Result<()> {
    set_bytes(fd, level, name, &value.to_ne_bytes())
}

/// One instruction of a classic BPF program: code, jump-true, jump-false, operand.
pub type FilterStep = (u16, u8, u8, u32);

/// The classic filter of a socket; empty if it has none.
pub fn filter(fd: impl AsFd) -> io::Result<Vec<FilterStep>> {
    let fd = fd.as_fd().as_raw_fd();
    // The length of this option counts instructions, and zero asks how many there are.
    let mut count: libc::socklen_t = 0;
    let null = std::ptr::null_mut();
    // SAFETY: with a length of zero nothing is written but the count.
    check(unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_GET_FILTER, null, &mut count) }.into())?;
    if count == 0 {
        return Ok(Vec::new());
    }
    let mut steps = vec![libc::sock_filter { code: 0, jt: 0, jf: 0, k: 0 }; count as usize];
    let room = steps.as_mut_ptr().cast();
    // SAFETY: the kernel writes `count` instructions, for which there is room, or fails if there are more by now.
    check(unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_GET_FILTER, room, &mut count) }.into())?;
    steps.truncate(count as usize);
    Ok(steps.iter().map(|s| (s.code, s.jt, s.jf, s.k)).collect())
}

/// Attaches a classic filter.
pub fn attach_filter(fd: impl AsFd, steps: &[FilterStep]) -> io::Result<()> {
    let mut steps: Vec<_> = steps.iter().map(|&(code, jt, jf, k)| libc::sock_filter { code, jt, jf, k }).collect();
    let program = libc::sock_fprog { len: steps.len() as u16, filter: steps.as_mut_ptr() };
    let (fd, size) = (fd.as_fd().as_raw_fd(), size_of::<libc::sock_fprog>() as u32);
    let program = (&raw const program).cast();
    // SAFETY: the kernel copies the program that the struct points to; both outlive the call.
    check(unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, program, size) }.into()).map(drop)
}

/// An `ioctl(2)` that fills one `int`.
pub fn ioctl_int(fd: impl AsFd, request: libc::c_ulong) -> io::Result<i32> {
    let mut value: libc::c_int = 0;
    // SAFETY: callers pass requests whose argument is a pointer to an int that the kernel fills (SIOCINQ, SIOCOUTQ …).
    check(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request, &mut value) }.into())?;
    Ok(value)
}

type NameCall = unsafe extern "C" fn(libc::c_int, *mut libc::sockaddr, *mut libc::socklen_t) -> libc::c_int;

fn name_of(fd: BorrowedFd<'_>, call: NameCall) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; ADDRESS_MAX];
    let mut length = ADDRESS_MAX as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes into the buffer and says how many there were.
    check(unsafe { call(fd.as_raw_fd(), bytes.as_mut_ptr().cast(), &mut length) }.into())?;
    bytes.truncate(length as usize);
    Ok(bytes)
}

/// `getsockname(2)`: a `sockaddr`, as long as the kernel says.
pub fn local_name(fd: impl AsFd) -> io::Result<Vec<u8>> {
    name_of(fd.as_fd(), libc::getsockname)
}

/// `getpeername(2)`.
pub fn peer_name(fd: impl AsFd) -> io::Result<Vec<u8>> {
    name_of(fd.as_fd(), libc::getpeername)
}

/// `bind(2)` to the bytes of a `sockaddr`.
pub fn bind(fd: impl AsFd, address: &[u8]) -> io::Result<()> {
    // SAFETY: the kernel reads as many bytes as the slice has.
    check(unsafe { libc::bind(fd.as_fd().as_raw_fd(), address.as_ptr().cast(), address.len() as u32) }.into()).map(drop)
}

/// `connect(2)` to the bytes of a `sockaddr`.
pub fn connect(fd: impl AsFd, address: &[u8]) -> io::Result<()> {
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: the kernel reads as many bytes as the slice has.
    check(unsafe { libc::connect(fd, address.as_ptr().cast(), address.len() as u32) }.into()).map(drop)
}

/// `listen(2)`.
pub fn listen(fd: impl AsFd, backlog: i32) -> io::Result<()> {
    // SAFETY: numbers only.
    check(unsafe { libc::listen(fd.as_fd().as_raw_fd(), backlog) }.into()).map(drop)
}

/// `accept4(2)`, close-on-exec.
pub fn accept(fd: impl AsFd) -> io::Result<OwnedFd> {
    let (fd, null) = (fd.as_fd().as_raw_fd(), std::ptr::null_mut());
    // SAFETY: null asks for no address; on success the result is a fresh descriptor that nobody else owns.
    let fd = check(unsafe { libc::accept4(fd, null, null.cast(), libc::SOCK_CLOEXEC) }.into())?;
    // SAFETY: as above.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// `shutdown(2)`.
pub fn shutdown(fd: impl AsFd, how: i32) -> io::Result<()> {
    // SAFETY: numbers only.
    check(unsafe { libc::shutdown(fd.as_fd().as_raw_fd(), how) }.into()).map(drop)
}

/// `recv(2)`: how many bytes came (with `MSG_TRUNC`, how many there were).
pub fn receive(fd: impl AsFd, buffer: &mut [u8], flags: i32) -> io::Result<usize> {
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: the kernel writes at most as many bytes as the buffer has.
    let length = check(unsafe { libc::recv(fd, buffer.as_mut_ptr().cast(), buffer.len(), flags) } as libc::c_long)?;
    Ok(length as usize)
}

/// `recv(2)` of up to `most` bytes into memory that was not touched for it.
pub fn receive_fresh(fd: impl AsFd, most: usize, flags: i32) -> io::Result<Vec<u8>> {
    let (fd, mut bytes) = (fd.as_fd().as_raw_fd(), Vec::<u8>::with_capacity(most));
    // SAFETY: the kernel writes at most as many bytes as there is room for.
    let length = check(unsafe { libc::recv(fd, bytes.as_mut_ptr().cast(), most, flags) } as libc::c_long)?;
    // SAFETY: so many were written; with `MSG_TRUNC` there may have been more than that.
    unsafe { bytes.set_len((length as usize).min(most)) };
    Ok(bytes)
}

/// `send(2)`.
pub fn send(fd: impl AsFd, bytes: &[u8], flags: i32) -> io::Result<usize> {
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: the kernel reads as many bytes as the slice has.
    let sent = check(unsafe { libc::send(fd, bytes.as_ptr().cast(), bytes.len(), flags) } as libc::c_long)?;
    Ok(sent as usize)
}

/// `sendto(2)`.
pub fn send_to(fd: impl AsFd, bytes: &[u8], flags: i32, address: &[u8]) -> io::Result<usize> {
    let fd = fd.as_fd().as_raw_fd();
    let (to, to_length) = (address.as_ptr().cast(), address.len() as u32);
    // SAFETY: the kernel reads as many bytes as each slice has.
    let sent =
        check(unsafe { libc::sendto(fd, bytes.as_ptr().cast(), bytes.len(), flags, to, to_length) } as libc::c_long)?;
    Ok(sent as usize)
}

/// What `poll(2)` says of a file right now, errors and hang-ups included.
pub fn readiness(fd: impl AsFd, events: i16) -> io::Result<i16> {
    let mut slot = libc::pollfd { fd: fd.as_fd().as_raw_fd(), events, revents: 0 };
    // SAFETY: one pollfd, which outlives the call.
    check(unsafe { libc::poll(&mut slot, 1, 0) }.into())?;
    Ok(slot.revents)
}

/// Gives a socket the owner that its maker had (`sk_uid` follows).
pub fn change_owner(fd: impl AsFd, user: u32, group: u32) -> io::Result<()> {
    // SAFETY: numbers only.
    check(unsafe { libc::fchown(fd.as_fd().as_raw_fd(), user, group) }.into()).map(drop)
}
