//! Whoever asked for a migration hears how far it is, and can take it back by going away.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::frame::{self, Kind};
use crate::migrate::progress::Track;
use crate::migrate::wire::Wire;

/// How often, in milliseconds, it is told.
const EVERY: u8 = 100;

/// Somebody who watches on behalf of a client.
pub(super) struct Watcher {
    over: Arc<EventFd>,
    thread: JoinHandle<()>,
}

impl Watcher {
    /// Tells the client how far it is, if it wants to hear it, and cancels the stream when the client has no more to say.
    pub(super) fn start(client: UnixStream, wire: Arc<Wire>, track: Track, tell: bool) -> io::Result<Watcher> {
        let over = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
        let ended = over.clone();
        let thread = std::thread::spawn(move || {
            let mut cancelled = false;
            loop {
                let watched = if cancelled { PollFlags::empty() } else { PollFlags::POLLIN };
                let mut fds = [PollFd::new(client.as_fd(), watched), PollFd::new(ended.as_fd(), PollFlags::POLLIN)];
                let heard = poll(&mut fds, PollTimeout::from(EVERY));
                let [spoke, over] = fds.map(|fd| fd.any().unwrap_or(false));
                match heard {
                    Ok(_) if over => return,
                    Ok(0) | Err(Errno::EINTR) => {}
                    Ok(_) if spoke && !cancelled => {
                        wire.cancel();
                        cancelled = true;
                    }
                    // It has gone altogether.
                    Ok(_) | Err(_) => return,
                }
                // Whoever does not read misses something, and has nobody wait.
                let reads = || poll(&mut [PollFd::new(client.as_fd(), PollFlags::POLLOUT)], PollTimeout::ZERO) == Ok(1);
                if tell && reads() {
                    let told = serde_json::to_vec(&track.now()).unwrap_or_default();
                    let _ = frame::write(&client, Kind::Progress, &told);
                }
            }
        });
        Ok(Watcher { over, thread })
    }

    /// Nothing more is told when this returns.
    pub(super) fn end(self) {
        let _ = self.over.write(1);
        let _ = self.thread.join();
    }
}
