//! What a thread waits for in a call of the kernel's, over other steps, until somebody rings.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use super::board::state_of_task;
use super::{masks, raw};

/// In which call.
#[derive(Clone, Copy, Debug)]
enum Call {
    ReadPipe,
    ReadEvents,
    Receive,
    Poll,
    Epoll,
    Futex,
    Signal,
}

const CALLS: [Call; 7] =
    [Call::ReadPipe, Call::ReadEvents, Call::Receive, Call::Poll, Call::Epoll, Call::Futex, Call::Signal];

/// A signal that nobody handles.
const SIGNAL: i32 = 45;

pub(super) struct Bell {
    call: Call,
    /// The ends to wait at and to ring at, which may be one.
    here: OwnedFd,
    there: Option<OwnedFd>,
    word: AtomicU32,
}

impl Bell {
    pub(super) fn new(which: u8) -> io::Result<Bell> {
        let call = CALLS[usize::from(which) % CALLS.len()];
        let (here, there) = match call {
            Call::ReadEvents => (EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?.into(), None),
            Call::Receive => {
                let (here, there) = socketpair(AddressFamily::Unix, SockType::Datagram, None, SockFlag::SOCK_CLOEXEC)?;
                (here, Some(there))
            }
            Call::Epoll => {
                let (here, epoll) = (EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?, raw::epoll()?);
                raw::watch(epoll.as_raw_fd(), here.as_raw_fd(), libc::EPOLLIN, 7);
                (epoll, Some(here.into()))
            }
            Call::ReadPipe | Call::Poll | Call::Futex | Call::Signal => {
                let (here, there) = nix::unistd::pipe()?;
                (here, Some(there))
            }
        };
        Ok(Bell { call, here, there, word: AtomicU32::new(0) })
    }

    /// Waits, with all signals blocked; what came.
    pub(super) fn wait(&self) -> String {
        let before = block_all();
        let came = loop {
            match self.wait_once() {
                Err(error) if masks::is_of_a_stop(&error) => {}
                other => break other,
            }
        };
        // SAFETY: the set is one that the kernel gave.
        unsafe { libc::sigprocmask(libc::SIG_SETMASK, &before, null_mut()) };
        format!("{:?} {came:?}", self.call)
    }

    fn wait_once(&self) -> io::Result<(i64, [u8; 8])> {
        let (file, mut bytes) = (self.here.as_raw_fd(), [0u8; 8]);
        let (buffer, room) = (bytes.as_mut_ptr(), bytes.len());
        // SAFETY: what the kernel fills in is ours, and as long as it says; zeros are valid.
        let came = unsafe {
            match self.call {
                Call::ReadPipe | Call::ReadEvents => libc::read(file, buffer.cast(), room) as i64,
                Call::Receive => libc::recv(file, buffer.cast(), room, 0) as i64,
                Call::Poll => {
                    let mut wanted = libc::pollfd { fd: file, events: libc::POLLIN, revents: 0 };
                    let ready = i64::from(libc::poll(&mut wanted, 1, -1));
                    if ready < 0 { ready } else { i64::from(wanted.revents) }
                }
                Call::Epoll => {
                    let mut event: libc::epoll_event = std::mem::zeroed();
                    let ready = i64::from(libc::epoll_wait(file, &mut event, 1, -1));
                    if ready < 0 { ready } else { event.u64 as i64 }
                }
                Call::Futex => libc::syscall(libc::SYS_futex, self.word.as_ptr(), libc::FUTEX_WAIT, 0, 0usize),
                Call::Signal => {
                    let (mut set, mut info): (libc::sigset_t, libc::siginfo_t) = std::mem::zeroed();
                    libc::sigaddset(&mut set, SIGNAL);
                    let signal = i64::from(libc::sigwaitinfo(&set, &mut info));
                    if signal < 0 { signal } else { info.si_value().sival_ptr as i64 }
                }
            }
        };
        if came < 0 { Err(io::Error::last_os_error()) } else { Ok((came, bytes)) }
    }

    /// Waits until a thread of this process waits. In which call is not shown to everybody.
    pub(super) fn await_waiter(thread: i32) {
        let stat = format!("/proc/self/task/{thread}/stat");
        while state_of_task(stat.as_ref()) != Some('S') {
            std::thread::sleep(std::time::Duration::from_micros(100));
        }
    }

    pub(super) fn ring(&self, thread: i32) {
        match self.call {
            Call::Futex => {
                self.word.store(1, SeqCst);
                raw::futex_wake(&self.word);
            }
            Call::Signal => {
                raw::send_to_thread(nix::unistd::getpid().as_raw(), thread, SIGNAL, 7);
            }
            _ => {
                let _ = nix::unistd::write(self.there.as_ref().unwrap_or(&self.here), &7u64.to_ne_bytes());
            }
        }
    }

    /// In which call it is waited.
    pub(super) fn describe(&self) -> String {
        format!("{:?}", self.call)
    }
}

fn block_all() -> libc::sigset_t {
    // SAFETY: the sets are initialised before they are used.
    unsafe {
        let (mut all, mut before): (libc::sigset_t, libc::sigset_t) = std::mem::zeroed();
        libc::sigfillset(&mut all);
        libc::sigprocmask(libc::SIG_SETMASK, &all, &mut before);
        before
    }
}
