//! Files without a file system: eventfd, timerfd, signalfd, epoll.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

use super::check;

fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    let number = check(result)? as i32;
    // SAFETY: every caller passes the result of a call that makes a new descriptor, which nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// `eventfd2(2)` with a count of zero.
pub fn eventfd(semaphore: bool) -> io::Result<OwnedFd> {
    let flags = libc::EFD_CLOEXEC | if semaphore { libc::EFD_SEMAPHORE } else { 0 };
    // SAFETY: numbers only.
    owned(unsafe { libc::eventfd(0, flags) } as libc::c_long)
}

/// `signalfd4(2)` for the signals whose bits are set (bit 0 is signal 1).
pub fn signalfd(mask: u64) -> io::Result<OwnedFd> {
    let length = size_of::<u64>();
    // SAFETY: the kernel reads eight bytes, the size of its own signal set, at an address that outlives the call.
    owned(unsafe { libc::syscall(libc::SYS_signalfd4, -1, &raw const mask, length, libc::SFD_CLOEXEC) })
}

/// `timerfd_create(2)`.
pub fn timerfd(clock: i32) -> io::Result<OwnedFd> {
    // SAFETY: numbers only.
    owned(unsafe { libc::timerfd_create(clock, libc::TFD_CLOEXEC) } as libc::c_long)
}

fn timespec(time: Duration) -> libc::timespec {
    libc::timespec { tv_sec: time.as_secs() as i64, tv_nsec: i64::from(time.subsec_nanos()) }
}

fn duration(time: libc::timespec) -> Duration {
    Duration::new(time.tv_sec.max(0) as u64, time.tv_nsec.max(0) as u32)
}

/// `timerfd_settime(2)`: flags (`TFD_TIMER_ABSTIME` …), first expiry, interval.
pub fn set_timer(timer: impl AsFd, flags: i32, value: Duration, interval: Duration) -> io::Result<()> {
    let new = libc::itimerspec { it_interval: timespec(interval), it_value: timespec(value) };
    let fd = timer.as_fd().as_raw_fd();
    // SAFETY: the kernel reads one itimerspec that outlives the call; a null old value is allowed.
    check(unsafe { libc::timerfd_settime(fd, flags, &raw const new, std::ptr::null_mut()) } as libc::c_long).map(drop)
}

/// `timerfd_gettime(2)`: what remains until the next expiry, and the interval.
pub fn timer(timer: impl AsFd) -> io::Result<(Duration, Duration)> {
    let zero = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    let mut now = libc::itimerspec { it_interval: zero, it_value: zero };
    // SAFETY: the kernel fills one itimerspec of ours.
    check(unsafe { libc::timerfd_gettime(timer.as_fd().as_raw_fd(), &raw mut now) } as libc::c_long)?;
    Ok((duration(now.it_value), duration(now.it_interval)))
}

/// Sets the number of expirations that have not been read (`TFD_IOC_SET_TICKS`).
pub fn set_ticks(timer: impl AsFd, ticks: u64) -> io::Result<()> {
    /// `_IOW('T', 0, u64)`.
    const TFD_IOC_SET_TICKS: libc::c_ulong = 0x4008_5400;
    let fd = timer.as_fd().as_raw_fd();
    // SAFETY: the kernel reads eight bytes at an address that outlives the call.
    check(unsafe { libc::ioctl(fd, TFD_IOC_SET_TICKS, &raw const ticks) } as libc::c_long).map(drop)
}

/// The time of a clock now.
pub fn now(clock: i32) -> io::Result<Duration> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel fills one timespec of ours.
    check(unsafe { libc::clock_gettime(clock, &raw mut time) } as libc::c_long)?;
    Ok(duration(time))
}

/// `epoll_create1(2)`.
pub fn epoll() -> io::Result<OwnedFd> {
    // SAFETY: numbers only.
    owned(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) } as libc::c_long)
}

/// A file as an epoll watches it.
#[derive(Clone, Copy, Debug)]
pub struct Watch<'f> {
    /// The file.
    pub file: BorrowedFd<'f>,
    /// The number under which it was registered: with the file, the key of the registration.
    pub number: i32,
    /// Events and flags.
    pub events: u32,
    /// The program's own.
    pub data: u64,
}

/// Adds watches to an epoll, each under its own number whatever that number is here: it is done by a child that has a
/// copy of our descriptor table. (A child, not a thread: of a child it is known when its ID is free again.)
pub fn watch(epoll: BorrowedFd<'_>, watches: &[Watch<'_>]) -> io::Result<()> {
    if watches.is_empty() {
        return Ok(());
    }
    let mut lifted = vec![0; watches.len()];
    let work = || match watch_by_number(epoll, watches, &mut lifted) {
        Ok(()) => 0,
        Err(error) => error.raw_os_error().unwrap_or(libc::EIO) as isize,
    };
    // A stack of its own, and the caller's memory: copying that would be most of the work.
    let mut stack = vec![0; 64 << 10];
    let shared = nix::sched::CloneFlags::CLONE_VM | nix::sched::CloneFlags::CLONE_VFORK;
    // SAFETY: with CLONE_VFORK this thread stands still until the child has ended, so that nobody else touches what the
    // child uses; it makes system calls only, on a stack that outlives it.
    let child = unsafe { nix::sched::clone(Box::new(work), &mut stack, shared, Some(libc::SIGCHLD)) }?.as_raw();
    let mut status = 0;
    // SAFETY: the child is ours, and nobody else waits for it; the kernel fills one int.
    while unsafe { libc::waitpid(child, &raw mut status, 0) } < 0 {
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    match libc::WEXITSTATUS(status) {
        0 if libc::WIFEXITED(status) => Ok(()),
        errno if libc::WIFEXITED(status) => Err(io::Error::from_raw_os_error(errno)),
        _ => Err(io::Error::other("the child that registers watches died")),
    }
}

/// The work of the child of [`watch`]: system calls only, no memory is allocated.
fn watch_by_number(epoll: BorrowedFd<'_>, watches: &[Watch<'_>], lifted: &mut [i32]) -> io::Result<()> {
    let above = watches.iter().map(|w| w.number).max().unwrap_or(0) + 1;
    let lift = |fd: BorrowedFd<'_>| {
        // SAFETY: numbers only; the copy goes with the child.
        check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, above) } as libc::c_long)
    };
    let epoll = lift(epoll)? as i32;
    for (file, watch) in lifted.iter_mut().zip(watches) {
        *file = lift(watch.file)? as i32;
    }
    for (watch, file) in watches.iter().zip(lifted) {
        let mut event = libc::epoll_event { events: watch.events, u64: watch.data };
        // SAFETY: the number that is replaced is one of the child's own table, which no owner of a descriptor sees.
        check(unsafe { libc::dup3(*file, watch.number, libc::O_CLOEXEC) } as libc::c_long)?;
        // SAFETY: the kernel reads one epoll_event that outlives the call.
        let added = unsafe { libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, watch.number, &raw mut event) };
        check(added as libc::c_long)?;
    }
    Ok(())
}

/// Takes up to `most` events that are ready out of an epoll, without waiting.
pub fn ready(epoll: BorrowedFd<'_>, most: usize) -> io::Result<Vec<(u32, u64)>> {
    let mut events = vec![libc::epoll_event { events: 0, u64: 0 }; most.max(1)];
    let fd = epoll.as_raw_fd();
    // SAFETY: the kernel fills at most as many events as the buffer has.
    let count = check(unsafe { libc::epoll_wait(fd, events.as_mut_ptr(), events.len() as i32, 0) } as libc::c_long)?;
    Ok(events.iter().take(count as usize).map(|e| (e.events, e.u64)).collect())
}
