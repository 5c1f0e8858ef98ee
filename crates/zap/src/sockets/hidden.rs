//! Datagrams that are in a queue and that no look at it shows: empty ones that were looked at already (`MSG_PEEK`), which
//! the kernel shows only to who takes them, and what is behind an empty one that looks like the end. Where the kernel's
//! memory can be read they are found there.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::BorrowedFd;

use crate::ids::Address;
use crate::kernel::{self, Kernel};
use crate::sys::socket;

/// Has what takes time done ahead of the hold, if a socket has received anything.
pub(super) fn prepare(fd: BorrowedFd<'_>) {
    if has_received(fd) {
        drop(kernel::reader());
    }
}

/// Whether anything is in its queue: nearly always nothing is, and nobody has to open the kernel's memory in a hold.
fn has_received(fd: BorrowedFd<'_>) -> bool {
    socket::readiness(fd, libc::POLLIN).is_ok_and(|ready| ready & libc::POLLIN != 0)
}

/// A datagram that is not shown.
pub(super) struct Hidden<T> {
    /// Before which of those that are shown it is.
    pub(super) before: usize,
    /// It.
    pub(super) found: T,
}

/// Finds what a look at a queue has not shown: `shown` are the lengths of what it has, and `read` reads a buffer of the kernel's.
/// Nothing, where the kernel's memory cannot be read, or has it otherwise.
pub(super) fn find<T>(
    fd: BorrowedFd<'_>,
    is_udp: bool,
    shown: &[usize],
    read: impl FnMut(&mut Kernel, Address) -> io::Result<T>,
) -> Vec<Hidden<T>> {
    if !has_received(fd) {
        return Vec::new();
    }
    let Ok(mut kernel) = kernel::reader() else { return Vec::new() };
    look_into(&mut kernel, fd, is_udp, shown, read).unwrap_or_else(|error| {
        tracing::info!(%error, "datagrams that are not shown stay unknown");
        Vec::new()
    })
}

fn look_into<T>(
    kernel: &mut Kernel,
    fd: BorrowedFd<'_>,
    is_udp: bool,
    shown: &[usize],
    mut read: impl FnMut(&mut Kernel, Address) -> io::Result<T>,
) -> io::Result<Vec<Hidden<T>>> {
    let socket = kernel.socket(fd)?;
    let mut buffers = Vec::new();
    if is_udp {
        // What whoever reads has taken over already.
        buffers = kernel.queue(kernel.at(socket, "udp_sock.reader_queue"))?;
    }
    buffers.extend(kernel.queue(kernel.at(socket, "sock.sk_receive_queue"))?);
    if buffers.len() == shown.len() {
        return Ok(Vec::new());
    }
    let length = |buffer: &Address| kernel.word(*buffer, "sk_buff.len").map(|length| length as usize);
    let lengths = buffers.iter().map(length).collect::<io::Result<Vec<_>>>()?;
    let places = places(&lengths, shown).ok_or_else(|| io::Error::other("the queue is not the one that was read"))?;
    let hidden = |(before, place): (usize, usize)| Ok(Hidden { before, found: read(kernel, buffers[place])? });
    places.into_iter().map(hidden).collect()
}

/// Which of the datagrams of these lengths are not among those that are shown, each with the place of the shown one that
/// follows it. Of empty ones in a row those that came first are hidden: they were there when somebody looked. `None` if
/// the shown ones are others.
fn places(lengths: &[usize], shown: &[usize]) -> Option<Vec<(usize, usize)>> {
    let empty = |from: &[usize]| from.iter().take_while(|length| **length == 0).count();
    let (mut hidden, mut place, mut next) = (Vec::new(), 0, 0);
    while place < lengths.len() {
        let (there, seen) = (empty(&lengths[place..]), empty(&shown[next..]));
        hidden.extend((0..there.checked_sub(seen)?).map(|n| (next, place + n)));
        (place, next) = (place + there, next + seen);
        if place < lengths.len() {
            if next < shown.len() {
                (lengths[place] == shown[next]).then_some(())?;
                next += 1;
            } else {
                hidden.push((next, place));
            }
            place += 1;
        }
    }
    (next == shown.len()).then_some(hidden)
}

/// From where to where an empty UDP datagram came.
pub(super) fn udp_ends(kernel: &mut Kernel, buffer: Address) -> io::Result<(SocketAddr, SocketAddr)> {
    let head = kernel.pointer(buffer, "sk_buff.head")?;
    let network = head.plus(kernel.half(buffer, "sk_buff.network_header")?.into());
    let transport = head.plus(kernel.half(buffer, "sk_buff.transport_header")?.into());
    let [version] = kernel.array(network)?;
    let (from, to): (IpAddr, IpAddr) = match version >> 4 {
        4 => {
            let [a, b] = [12, 16].map(|at| kernel.array::<4>(network.plus(at)).map(Ipv4Addr::from));
            (a?.into(), b?.into())
        }
        6 => {
            let [a, b] = [8, 24].map(|at| kernel.array::<16>(network.plus(at)).map(Ipv6Addr::from));
            (a?.into(), b?.into())
        }
        _ => return Err(io::Error::other("a datagram has no header")),
    };
    let [a, b, c, d] = kernel.array(transport)?;
    Ok((SocketAddr::new(from, u16::from_be_bytes([a, b])), SocketAddr::new(to, u16::from_be_bytes([c, d]))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_that_came_first_are_hidden() {
        assert_eq!(places(&[0, 3, 0, 0, 5], &[3, 0, 5]), Some(vec![(0, 0), (1, 2)]));
        assert_eq!(places(&[0, 0], &[]), Some(vec![(0, 0), (0, 1)]));
        assert_eq!(places(&[1, 0, 2, 0], &[1]), Some(vec![(1, 1), (1, 2), (1, 3)]));
        assert_eq!(places(&[1, 2], &[2]), None);
        assert_eq!(places(&[1], &[1, 0]), None);
    }
}
