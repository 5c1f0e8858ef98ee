//! Whoever asked for a migration hears how far it is, and can take it back by going away.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::frame::{self, Kind};
use crate::migrate::progress::Track;
use crate::migrate::wire::Wire;

/// How often, in milliseconds, it is told.
const EVERY: u8 = 100;

/// Somebody who watches on behalf of a client.
pub(super) struct Watcher {
    over: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Watcher {
    /// Tells the client how far it is, if it wants to hear it, and cancels the stream when the client has no more to say.
    pub(super) fn start(client: UnixStream, wire: Arc<Wire>, track: Track, tell: bool) -> Watcher {
        let over = Arc::new(AtomicBool::new(false));
        let ended = over.clone();
        let thread = std::thread::spawn(move || {
            let mut cancelled = false;
            while !ended.load(Ordering::Relaxed) {
                let watched = if cancelled { PollFlags::empty() } else { PollFlags::POLLIN };
                match poll(&mut [PollFd::new(client.as_fd(), watched)], PollTimeout::from(EVERY)) {
                    Ok(0) | Err(Errno::EINTR) => {}
                    Ok(_) if !cancelled => {
                        wire.cancel();
                        cancelled = true;
                    }
                    // It has gone altogether.
                    Ok(_) | Err(_) => return,
                }
                // Whoever does not read misses something, and has nobody wait.
                let reads = || poll(&mut [PollFd::new(client.as_fd(), PollFlags::POLLOUT)], PollTimeout::ZERO) == Ok(1);
                if tell && !ended.load(Ordering::Relaxed) && reads() {
                    let told = serde_json::to_vec(&track.now()).unwrap_or_default();
                    let _ = frame::write(&client, Kind::Progress, &told);
                }
            }
        });
        Watcher { over, thread }
    }

    /// Nothing more is told when this returns.
    pub(super) fn end(self) {
        self.over.store(true, Ordering::Relaxed);
        let _ = self.thread.join();
    }
}
