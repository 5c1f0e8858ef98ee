//! Putting right what a capture that was cut short (zap was killed) may have left on sockets.

use std::io;
use std::os::fd::BorrowedFd;

use super::tcp_repair::leave_repair;
use crate::ids::HostPid;
use crate::sys::pidfd::PidFd;
use crate::sys::socket;

/// Puts right every socket of these processes; what cannot be reached any more is left.
///
/// Nothing says what `SO_REUSEADDR` and `SO_PEEK_OFF` were: a socket that was in repair mode gets the first (as one that
/// was accepted by a server has), and one that peeks by offset ceases to, as nearly all do.
pub fn recover_all(processes: &[HostPid]) {
    for process in processes {
        let Ok(handle) = PidFd::open(*process) else { continue };
        let files = std::fs::read_dir(process.proc("fd")).into_iter().flatten().flatten();
        let sockets = files.filter(|f| {
            std::fs::read_link(f.path()).is_ok_and(|link| link.as_os_str().as_encoded_bytes().starts_with(b"socket:"))
        });
        for number in sockets.filter_map(|f| f.file_name().to_str()?.parse().ok()) {
            if let Ok(file) = handle.get(number) {
                let _ = recover(std::os::fd::AsFd::as_fd(&file));
            }
        }
    }
}

fn recover(fd: BorrowedFd<'_>) -> io::Result<()> {
    if socket::get_int(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF).is_ok_and(|offset| offset >= 0) {
        socket::set_int(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, -1)?;
    }
    if socket::get_int(fd, libc::SOL_SOCKET, libc::SO_PROTOCOL)? == libc::IPPROTO_TCP {
        leave_repair(fd, true)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn a_socket_that_was_left_in_repair_mode_writes_again() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        socket::set_int(&client, libc::IPPROTO_TCP, libc::TCP_REPAIR, 1).unwrap();
        socket::set_int(&client, libc::SOL_SOCKET, libc::SO_PEEK_OFF, 3).unwrap();
        recover(std::os::fd::AsFd::as_fd(&client)).unwrap();
        assert_eq!(socket::get_int(&client, libc::IPPROTO_TCP, libc::TCP_REPAIR).unwrap(), 0);
        assert_eq!(socket::get_int(&client, libc::SOL_SOCKET, libc::SO_PEEK_OFF).unwrap(), -1);
        let (mut client, mut server) = (client, listener.accept().unwrap().0);
        std::io::Write::write_all(&mut client, b"x").unwrap();
        std::io::Read::read_exact(&mut server, &mut [0]).unwrap();
    }
}
