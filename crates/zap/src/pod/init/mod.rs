//! PID 1 of a pod: reaps, forwards signals, starts commands on the monitor's orders, and keeps what a new monitor would
//! need. It is zap's own code, forked and not executed, so there is nothing of it in the pod's file system; and a pod's
//! process can no more look into it than into the host.

mod message;
mod spawn;
mod users;

pub(crate) use message::{
    CONTROL, Command, HOARD, KEPT, KEPT_COUNT, MESSAGE_LENGTH, MONITOR_END, Order, Report, SpawnFailure,
};

use message::SIGNALS;

use std::collections::{HashSet, VecDeque};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::pod::rootfs::{self, Plan};
use crate::sys::namespace::{self, Side};
use crate::sys::{channel, exec};

/// What PID 1 needs to begin.
pub(crate) struct Setup<'a> {
    /// Its end of the control socket.
    pub(crate) control: &'a OwnedFd,
    /// The monitor's.
    pub(crate) monitor_end: &'a OwnedFd,
    /// The file system.
    pub(crate) plan: &'a Plan,
    /// The host name.
    pub(crate) hostname: &'a str,
}

/// Signals that are passed on to the main command.
const FORWARDED: [Signal; 7] = [
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGTERM,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGWINCH,
];

/// Is PID 1, from its first instruction to its last.
pub(crate) fn run(setup: &Setup<'_>) -> ! {
    if let Err((step, error)) = prepare(setup) {
        let report = Report::Failed { step, errno: error.raw_os_error().unwrap_or(libc::EIO) };
        let _ = channel::send(setup.control, &crate::image::encode(&report), &[], true);
        namespace::exit_now(1);
    }
    let Ok(mut init) = Init::new() else { namespace::exit_now(1) };
    init.report(Report::Ready);
    loop {
        // Nothing that goes wrong with one event may end PID 1, for the pod would end with it.
        let _ = init.turn();
    }
}

fn prepare(setup: &Setup<'_>) -> Result<(), (String, io::Error)> {
    let at = |step: &str| {
        let step = step.to_owned();
        move |e: io::Error| (step, e)
    };
    // Before anything of the pod's exists that could look.
    nix::sys::prctl::set_dumpable(false).map_err(io::Error::from).map_err(at("hiding PID 1"))?;
    hide_command_line();
    namespace::unshare(libc::CLONE_NEWCGROUP).map_err(at("making a cgroup namespace"))?;
    nix::unistd::setsid().map_err(io::Error::from).map_err(at("making a session"))?;
    // Not every kernel has keyrings.
    let _ = exec::new_session_keyring();
    nix::unistd::sethostname(setup.hostname).map_err(io::Error::from).map_err(at("setting the host name"))?;
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    rootfs::build(setup.plan).map_err(|e| (format!("mounting {}", e.what), e.source))?;
    keep_only(setup.control, setup.monitor_end).map_err(at("arranging descriptors"))
}

/// The command line shows the monitor's, which is none of the pod's business.
fn hide_command_line() {
    let _ = nix::sys::prctl::set_name(c"zap-init");
    exec::rename_command_line(b"zap-init");
}

/// Puts the two ends of the control socket at their agreed numbers and closes all else but stdio (the null device).
fn keep_only(control: &OwnedFd, monitor_end: &OwnedFd) -> io::Result<()> {
    let up = |fd: &OwnedFd| nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_DUPFD(KEPT + KEPT_COUNT));
    let (control, monitor_end) = (up(control)?, up(monitor_end)?);
    exec::duplicate_to(control, CONTROL)?;
    exec::duplicate_to(monitor_end, MONITOR_END)?;
    exec::close_from(MONITOR_END as u32 + 1)
}

struct Init {
    control: OwnedFd,
    signals: OwnedFd,
    /// Reports that did not fit into the socket: there may be no monitor for a while.
    unsent: VecDeque<Report>,
    /// Children whose end is reported.
    expected: HashSet<i32>,
    main: Option<i32>,
    main_status: Option<i32>,
    /// Kept for the sake of others: whoever waits for a page goes on waiting while somebody has its userfaultfd.
    hoard: Vec<OwnedFd>,
}

impl Init {
    fn new() -> io::Result<Init> {
        let mut set = SigSet::empty();
        set.add(Signal::SIGCHLD);
        FORWARDED.iter().for_each(|s| set.add(*s));
        set.thread_set_mask()?;
        let flags = nix::sys::signalfd::SfdFlags::SFD_NONBLOCK | nix::sys::signalfd::SfdFlags::SFD_CLOEXEC;
        let signals: OwnedFd = nix::sys::signalfd::SignalFd::with_flags(&set, flags)?.into();
        if signals.as_raw_fd() != SIGNALS {
            return Err(io::ErrorKind::Other.into());
        }
        // Occupied, so that no other descriptor ever gets such a number.
        for slot in KEPT..KEPT + KEPT_COUNT {
            exec::duplicate_to(0, slot)?;
        }
        Ok(Init {
            control: exec::inherited(CONTROL)?,
            signals,
            unsent: VecDeque::new(),
            expected: HashSet::new(),
            main: None,
            main_status: None,
            hoard: Vec::new(),
        })
    }

    /// Waits for something to do, and does it.
    fn turn(&mut self) -> io::Result<()> {
        let send = if self.unsent.is_empty() { PollFlags::empty() } else { PollFlags::POLLOUT };
        let mut fds = [
            PollFd::new(self.control.as_fd(), PollFlags::POLLIN | send),
            PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
        ];
        poll(&mut fds, PollTimeout::NONE)?;
        let ready = |fd: &PollFd<'_>, flag| fd.revents().is_some_and(|r| r.contains(flag));
        let (order, room, signal) =
            (ready(&fds[0], PollFlags::POLLIN), ready(&fds[0], PollFlags::POLLOUT), ready(&fds[1], PollFlags::POLLIN));
        if room {
            self.flush();
        }
        if signal {
            self.signals()?;
        }
        if order {
            self.order()?;
        }
        Ok(())
    }

    fn report(&mut self, report: Report) {
        self.unsent.push_back(report);
        self.flush();
    }

    fn flush(&mut self) {
        while let Some(report) = self.unsent.front() {
            match channel::send(&self.control, &crate::image::encode(report), &[], false) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                _ => self.unsent.pop_front(),
            };
        }
    }

    fn signals(&mut self) -> io::Result<()> {
        let mut info = [0u8; size_of::<libc::signalfd_siginfo>()];
        loop {
            match nix::unistd::read(&self.signals, &mut info) {
                Ok(_) => {}
                Err(Errno::EAGAIN) => return Ok(()),
                Err(e) => return Err(e.into()),
            }
            let number = i32::from_ne_bytes([info[0], info[1], info[2], info[3]]);
            match (Signal::try_from(number), self.main) {
                (Ok(Signal::SIGCHLD), _) => self.reap(),
                (Ok(signal), Some(main)) => drop(nix::sys::signal::kill(Pid::from_raw(main), signal)),
                _ => {}
            }
        }
    }

    fn reap(&mut self) {
        loop {
            // Clones with another exit signal than SIGCHLD are children too.
            let flags = WaitPidFlag::WNOHANG | WaitPidFlag::__WALL;
            let (pid, status) = match waitpid(Pid::from_raw(-1), Some(flags)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid.as_raw(), (code & 0xff) << 8),
                Ok(WaitStatus::Signaled(pid, signal, core)) => {
                    (pid.as_raw(), signal as i32 | if core { 0x80 } else { 0 })
                }
                Ok(WaitStatus::StillAlive) | Err(_) => return,
                Ok(_) => continue,
            };
            if self.main == Some(pid) {
                self.main_status = Some(status);
                self.main = None;
            }
            if self.expected.remove(&pid) {
                self.report(Report::Exit { pid, status });
            }
        }
    }

    fn order(&mut self) -> io::Result<()> {
        let mut buffer = [0; MESSAGE_LENGTH];
        let (length, files) = channel::receive(&self.control, &mut buffer)?;
        let Ok(order) = crate::image::decode::<Order>(&buffer[..length]) else { return Ok(()) };
        match order {
            Order::Spawn { id, terminal, main } => {
                let result = spawn::spawn(files, terminal);
                self.started(id, result, main);
            }
            Order::Build { id, pid } => {
                let result = build(pid, files);
                self.report(Report::Started { id, result });
            }
            Order::Keep { slot } => {
                for (file, number) in files.iter().zip(KEPT + slot..KEPT + KEPT_COUNT) {
                    exec::duplicate_to(file.as_raw_fd(), number)?;
                }
            }
            Order::Hoard => self.hoard(files),
            Order::DropHoard => self.hoard.clear(),
            Order::Drop { slot } if (0..KEPT_COUNT).contains(&slot) => exec::duplicate_to(0, KEPT + slot)?,
            Order::Drop { .. } => {}
            Order::Watch { pid } => {
                self.expected.insert(pid);
                self.main = Some(pid);
            }
            Order::Status { id } => {
                let (main, status) = (self.main, self.main_status);
                self.report(Report::Status { id, main, status });
            }
        }
        Ok(())
    }

    /// Keeps files, one behind the other where a new monitor looks for them; wherever they are if that cannot be.
    fn hoard(&mut self, files: Vec<OwnedFd>) {
        for file in files {
            let number = HOARD + self.hoard.len() as i32;
            let kept = exec::duplicate_to(file.as_raw_fd(), number).and_then(|()| exec::inherited(number));
            self.hoard.push(kept.unwrap_or(file));
        }
    }

    fn started(&mut self, id: u32, result: Result<i32, i32>, main: bool) {
        if let Ok(pid) = result {
            self.expected.insert(pid);
            if main {
                self.main = Some(pid);
            }
        }
        self.report(Report::Started { id, result });
    }
}

/// Clones the builder of a restart.
fn build(pid: i32, files: Vec<OwnedFd>) -> Result<i32, i32> {
    match namespace::clone_numbered(pid) {
        Ok(Side::Parent(pid)) => Ok(pid),
        Ok(Side::Child) => {
            let Ok(files) = spawn::keep_files(files) else { namespace::exit_now(125) };
            let _ = exec::reset_signals();
            let _ = nix::sys::prctl::set_dumpable(true);
            let _ = nix::sys::prctl::set_name(c"zap-builder");
            crate::restart::builder(files)
        }
        Err(e) => Err(e.raw_os_error().unwrap_or(libc::EIO)),
    }
}
