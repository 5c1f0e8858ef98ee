//! `recvmsg(2)` and `sendmsg(2)` with descriptors, credentials and names.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use super::check;

/// Who sent a message: PID, user, group, in the reader's namespaces.
pub type Credentials = (i32, u32, u32);

/// What a read brought beside its bytes.
#[derive(Debug, Default)]
pub struct Message {
    /// How many bytes were read; with `MSG_TRUNC` among the flags, how many there were.
    pub length: usize,
    /// `MSG_TRUNC`, `MSG_CTRUNC`, `MSG_EOR` …
    pub flags: i32,
    /// Descriptors that were passed.
    pub files: Vec<OwnedFd>,
    /// Credentials, if the socket asks for them.
    pub credentials: Option<Credentials>,
    /// Where a datagram was sent to, a `sockaddr`, if the socket asks for that (`IP_RECVORIGDSTADDR`).
    pub destination: Vec<u8>,
    /// The sender's address, a `sockaddr`; empty if it has none.
    pub name: Vec<u8>,
}

/// Room for the 253 descriptors that a message may carry, credentials, and what else a socket may have asked for.
const CONTROL: usize = 2048;

/// A buffer for control messages, aligned as their headers need it.
#[repr(C, align(8))]
struct Control([u8; CONTROL]);

/// Reads one message. Descriptors are made close-on-exec.
pub fn receive(fd: impl AsFd, buffer: &mut [u8], flags: i32) -> io::Result<Message> {
    let mut control = Control([0; CONTROL]);
    let mut name = [0u8; 128];
    let mut piece = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: all-zero is a valid msghdr: no name, no buffers.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_name = name.as_mut_ptr().cast();
    header.msg_namelen = name.len() as u32;
    header.msg_iov = &mut piece;
    header.msg_iovlen = 1;
    header.msg_control = control.0.as_mut_ptr().cast();
    header.msg_controllen = CONTROL;
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: every pointer of the header leads to a live buffer of the length that is said beside it.
    let length = check(unsafe { libc::recvmsg(fd, &mut header, flags | libc::MSG_CMSG_CLOEXEC) } as libc::c_long)?;
    let mut message = Message { length: length as usize, flags: header.msg_flags, ..Message::default() };
    message.name = name[..(header.msg_namelen as usize).min(name.len())].to_vec();
    // SAFETY: the kernel filled the control buffer and said how much of it it used.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(&header) };
    while !next.is_null() {
        // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR give headers inside the buffer, aligned.
        let part = unsafe { *next };
        // SAFETY: as above; the data begins right after the header.
        let data = unsafe { libc::CMSG_DATA(next) };
        let length = part.cmsg_len - (data as usize - next as usize);
        // SAFETY: the kernel says that the header and its data are this long; they are bytes of our buffer.
        let bytes = unsafe { std::slice::from_raw_parts(data, length) };
        take_part(&mut message, part.cmsg_level, part.cmsg_type, bytes);
        // SAFETY: as for CMSG_FIRSTHDR.
        next = unsafe { libc::CMSG_NXTHDR(&header, next) };
    }
    Ok(message)
}

fn take_part(message: &mut Message, level: i32, kind: i32, bytes: &[u8]) {
    let words = || bytes.as_chunks::<4>().0.iter().map(|w| i32::from_ne_bytes(*w));
    match (level, kind) {
        (libc::SOL_SOCKET, libc::SCM_RIGHTS) => {
            // SAFETY: the kernel has just installed these descriptors for us; nobody else knows them.
            message.files.extend(words().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
        (libc::IPPROTO_IP, libc::IP_ORIGDSTADDR) | (libc::IPPROTO_IPV6, libc::IPV6_ORIGDSTADDR) => {
            message.destination = bytes.to_vec();
        }
        (libc::SOL_SOCKET, libc::SCM_CREDENTIALS) => {
            if let [pid, user, group] = words().collect::<Vec<_>>()[..] {
                message.credentials = Some((pid, user as u32, group as u32));
            }
        }
        _ => {}
    }
}

/// Of the `length` bytes that a peek at a unix stream gives, those that lie before the last of the kernel's buffers.
///
/// A peek looks ahead for descriptors whatever its size, so it does not tell where the buffer that carries them begins.
/// But the kernel copies buffer by buffer, and one that cannot be copied whole does not count: here the last byte has
/// nowhere to go.
pub fn peek_all_but_last_buffer(fd: impl AsFd, length: usize) -> io::Result<usize> {
    let mut room = vec![0u8; length - 1];
    let mut pieces = [
        libc::iovec { iov_base: room.as_mut_ptr().cast(), iov_len: room.len() },
        libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 1 },
    ];
    // SAFETY: all-zero is a valid msghdr: no name, no buffers.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = pieces.as_mut_ptr();
    header.msg_iovlen = pieces.len();
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    // SAFETY: the first piece is a live buffer of its length; at the second, null, the kernel writes nothing and stops.
    match check(unsafe { libc::recvmsg(fd.as_fd().as_raw_fd(), &mut header, flags) } as libc::c_long) {
        Err(e) if e.raw_os_error() == Some(libc::EFAULT) => Ok(0),
        other => Ok(other? as usize),
    }
}

/// Sends one message. `name` may be empty (the socket is connected then).
pub fn send(
    fd: impl AsFd,
    bytes: &[u8],
    files: &[BorrowedFd<'_>],
    credentials: Option<Credentials>,
    name: &[u8],
    flags: i32,
) -> io::Result<usize> {
    let mut control = Control([0; CONTROL]);
    let mut used = 0;
    if !files.is_empty() {
        let numbers = files.iter().flat_map(|f| (f.as_raw_fd() as RawFd).to_ne_bytes()).collect::<Vec<_>>();
        used += put_part(&mut control.0[used..], (libc::SOL_SOCKET, libc::SCM_RIGHTS), &numbers)?;
    }
    if let Some((pid, user, group)) = credentials {
        let words = [pid.to_ne_bytes(), user.to_ne_bytes(), group.to_ne_bytes()];
        used += put_part(&mut control.0[used..], (libc::SOL_SOCKET, libc::SCM_CREDENTIALS), words.as_flattened())?;
    }
    send_with(fd, bytes, name, (&mut control, used), flags)
}

/// Sends a datagram to a name, from one of our addresses; of an interface, where the address has a meaning there alone.
pub fn send_from(
    fd: impl AsFd,
    (from, interface): (IpAddr, u32),
    bytes: &[u8],
    name: &[u8],
    flags: i32,
) -> io::Result<usize> {
    let mut control = Control([0; CONTROL]);
    let interface = interface.to_ne_bytes();
    let used = match from {
        // struct in_pktinfo: interface, from where, nothing.
        IpAddr::V4(from) => {
            let source = [interface, from.octets(), [0; 4]];
            put_part(&mut control.0, (libc::IPPROTO_IP, libc::IP_PKTINFO), source.as_flattened())?
        }
        IpAddr::V6(from) => {
            let source = [&from.octets()[..], &interface].concat();
            put_part(&mut control.0, (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO), &source)?
        }
    };
    send_with(fd, bytes, name, (&mut control, used), flags)
}

/// Sends a message with the first so many bytes of control data. `name` may be empty.
fn send_with(
    fd: impl AsFd,
    bytes: &[u8],
    name: &[u8],
    (control, used): (&mut Control, usize),
    flags: i32,
) -> io::Result<usize> {
    let mut piece = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: all-zero is a valid msghdr: no name, no buffers.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    if !name.is_empty() {
        header.msg_name = name.as_ptr().cast_mut().cast();
        header.msg_namelen = name.len() as u32;
    }
    header.msg_iov = &mut piece;
    header.msg_iovlen = 1;
    if used > 0 {
        header.msg_control = control.0.as_mut_ptr().cast();
        header.msg_controllen = used;
    }
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: every pointer of the header leads to a live buffer of the length that is said beside it; the kernel only
    // reads them.
    Ok(check(unsafe { libc::sendmsg(fd, &header, flags) } as libc::c_long)? as usize)
}

/// Writes one control message (level, kind) at the beginning of `room`; how much of it that took.
fn put_part(room: &mut [u8], (level, kind): (i32, i32), data: &[u8]) -> io::Result<usize> {
    // SAFETY: these two only compute.
    let (space, length) = unsafe { (libc::CMSG_SPACE(data.len() as u32), libc::CMSG_LEN(data.len() as u32)) };
    let (space, length) = (space as usize, length as usize);
    if space > room.len() {
        return Err(io::Error::from_raw_os_error(libc::E2BIG));
    }
    // struct cmsghdr: its length, a level, a kind.
    room[..8].copy_from_slice(&length.to_ne_bytes());
    room[8..12].copy_from_slice(&level.to_ne_bytes());
    room[12..16].copy_from_slice(&kind.to_ne_bytes());
    room[16..16 + data.len()].copy_from_slice(data);
    Ok(space)
}

/// The file that a unix socket is bound to (`SIOCUNIXFILE`), opened with `O_PATH`; an error if it is bound to none.
pub fn bound_file(fd: impl AsFd) -> io::Result<OwnedFd> {
    const SIOCUNIXFILE: libc::c_ulong = 0x89E0;
    // SAFETY: the request takes no argument; the result is a fresh descriptor (close-on-exec) that nobody else owns.
    let fd = check(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), SIOCUNIXFILE, 0) }.into())?;
    // SAFETY: as above.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}
