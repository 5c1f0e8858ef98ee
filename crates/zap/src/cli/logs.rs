//! `zap logs`.

use std::fs::File;
use std::io::{self, Read, Write};

use super::options;
use crate::monitor::frame::{Collector, Kind};
use crate::monitor::protocol::Failure;
use crate::pod::Store;
use crate::sys::pidfd::PidFd;

/// Print what a pod has written to its console
#[derive(clap::Args)]
pub(super) struct Args {
    /// Go on until the pod ends
    #[arg(short, long)]
    follow: bool,
    /// The pod
    #[arg(value_parser = options::pod_name)]
    pod: String,
}

pub(super) fn run(store: &Store, args: &Args) -> Result<u8, Failure> {
    store.load(&args.pod)?;
    let path = store.log_file(&args.pod);
    let failed = |e: io::Error| Failure { message: format!("{}: {e}", path.display()), code: 1 };
    let mut log = match File::open(&path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(0),
        other => other.map_err(failed)?,
    };
    let follow = if args.follow { Some(Follow::new(store, args)?) } else { None };
    let mut collector = Collector::default();
    loop {
        // Asked before reading: what a monitor wrote last it wrote before it ended.
        let over = follow.as_ref().is_none_or(Follow::is_over);
        if !copy(&mut log, &mut collector).map_err(failed)? {
            return Ok(0);
        }
        match &follow {
            Some(follow) if !over => follow.wait().map_err(failed)?,
            _ => return Ok(0),
        }
    }
}

/// Prints what is new; false when nobody reads it any more.
fn copy(log: &mut File, collector: &mut Collector) -> io::Result<bool> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let length = log.read(&mut buffer)?;
        collector.add(&buffer[..length]);
        while let Some((kind, payload)) = collector.take()? {
            let written = match kind {
                Kind::ErrorOutput => io::stderr().write_all(&payload),
                _ => io::stdout().write_all(&payload).and_then(|()| io::stdout().flush()),
            };
            match written {
                Err(e) if e.kind() == io::ErrorKind::BrokenPipe => return Ok(false),
                other => other?,
            }
        }
        if length == 0 {
            return Ok(true);
        }
    }
}

/// Waits for more: a change of the log, or the end of the monitor.
struct Follow {
    changes: nix::sys::inotify::Inotify,
    monitor: Option<PidFd>,
}

impl Follow {
    fn new(store: &Store, args: &Args) -> Result<Follow, Failure> {
        use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
        let failed = |e: nix::Error| Failure { message: format!("watching the log: {e}"), code: 1 };
        let changes = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).map_err(failed)?;
        changes.add_watch(&store.log_file(&args.pod), AddWatchFlags::IN_MODIFY).map_err(failed)?;
        crate::monitor::client::revive(store, &args.pod)?;
        let monitor = store.load(&args.pod)?.monitor.filter(|m| m.lives());
        Ok(Follow { changes, monitor: monitor.and_then(|m| PidFd::open(m.pid).ok()) })
    }

    fn is_over(&self) -> bool {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        use std::os::fd::AsFd;
        let Some(monitor) = &self.monitor else { return true };
        poll(&mut [PollFd::new(monitor.as_fd(), PollFlags::POLLIN)], PollTimeout::ZERO).unwrap_or(0) > 0
    }

    fn wait(&self) -> io::Result<()> {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        use std::os::fd::AsFd;
        let mut fds = vec![PollFd::new(self.changes.as_fd(), PollFlags::POLLIN)];
        fds.extend(self.monitor.iter().map(|m| PollFd::new(m.as_fd(), PollFlags::POLLIN)));
        poll(&mut fds, PollTimeout::NONE)?;
        // They say that something changed, and that is all.
        let _ = self.changes.read_events();
        Ok(())
    }
}
