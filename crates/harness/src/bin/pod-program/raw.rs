//! Raw calls. This is a test program: it makes system calls whose results it writes down, most of which no safe wrapper
//! lets through as they are.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};

use super::board::Board;

/// The board, in memory that all processes share.
pub(crate) fn share_board() -> &'static Board {
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
    // SAFETY: a fresh mapping, zero-filled, never unmapped; zeros are a valid board, which consists of atomics only.
    unsafe {
        let at = libc::mmap(std::ptr::null_mut(), size_of::<Board>(), 3, flags, -1, 0);
        assert_ne!(at, libc::MAP_FAILED);
        &*at.cast::<Board>()
    }
}

/// Waits until somebody wakes, unless `word` is no longer `value`.
pub(crate) fn futex_wait(word: &AtomicU32, value: u32) {
    // SAFETY: the word is alive; the call reads it and keeps no reference.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, value, 0usize) };
}

/// Wakes everybody.
pub(crate) fn futex_wake(word: &AtomicU32) {
    // SAFETY: the word is alive; the call uses its address only.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
}

/// fork(2).
pub(crate) fn fork() -> i32 {
    // SAFETY: other threads of this process wait, with no lock.
    unsafe { libc::fork() }
}

/// _exit(2).
pub(crate) fn exit(code: i32) -> ! {
    // SAFETY: takes any number.
    unsafe { libc::_exit(code) }
}

/// Maps `bytes` at `address`, which must be free; whether that worked.
pub(crate) fn map(address: usize, bytes: usize, shared: bool) -> bool {
    let kind = if shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
    let flags = kind | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: nothing that is in use can be replaced.
    unsafe { libc::mmap(address as *mut _, bytes, 3, flags, -1, 0) as usize == address }
}

/// Attaches the segment of `key`; whether that was possible. Which identifier a new one gets may differ after a restart.
pub(crate) fn segment(key: i32, address: usize, bytes: usize) -> bool {
    // SAFETY: without SHM_REMAP nothing that is in use is replaced.
    unsafe {
        let id = libc::shmget(key, bytes, libc::IPC_CREAT | 0o600);
        libc::shmat(id, address as *const _, 0) as usize == address
    }
}

/// mprotect(2) of a region.
pub(crate) fn protect(address: usize, bytes: usize, protection: i32) -> i32 {
    // SAFETY: regions hold no Rust objects.
    unsafe { libc::mprotect(address as *mut _, bytes, protection) }
}

/// munmap(2) of a region.
pub(crate) fn unmap(address: usize, bytes: usize) -> i32 {
    // SAFETY: regions hold no Rust objects.
    unsafe { libc::munmap(address as *mut _, bytes) }
}

/// Fills memory of a region that is writable.
pub(crate) fn fill(address: usize, bytes: &[u8]) {
    // SAFETY: the caller saw that these bytes are mapped and writable; nothing else runs meanwhile.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), address as *mut u8, bytes.len()) }
}

/// Copies memory of a region that is readable.
pub(crate) fn peek(address: usize, bytes: usize) -> Vec<u8> {
    // SAFETY: the caller saw that these bytes are mapped and readable; nothing else runs meanwhile.
    unsafe { std::slice::from_raw_parts(address as *const u8, bytes) }.to_vec()
}

/// Signals that are played with.
pub(crate) const SIGNALS: [i32; 4] = [libc::SIGUSR1, libc::SIGUSR2, 40, 41];

/// And those that go to single threads. No signalfd has them, which shows something else to each thread then.
pub(crate) const OF_THREADS: [i32; 2] = [43, 44];

/// All that can be blocked.
pub(crate) const BLOCKABLE: [i32; 6] = [SIGNALS[0], SIGNALS[1], SIGNALS[2], SIGNALS[3], OF_THREADS[0], OF_THREADS[1]];

/// What a process may ask to be told of its parent's end by; of those that others send none has the value 0.
pub(crate) const DEATH: i32 = SIGNALS[3];

/// A signal to one thread has a value of this times one more than its number, and the step.
pub(crate) const DIRECTED: i32 = 1 << 16;

/// What the handler has seen: number, sender, value, and the thread that it ran in; and how many of them.
pub(crate) static SEEN: [[AtomicI32; 4]; 256] = [const { [const { AtomicI32::new(0) }; 4] }; 256];
pub(crate) static SEEN_COUNT: AtomicU32 = AtomicU32::new(0);

extern "C" fn note(signal: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let entry = &SEEN[SEEN_COUNT.fetch_add(1, Ordering::SeqCst) as usize % SEEN.len()];
    // SAFETY: the kernel hands a valid siginfo of a queued signal, which has a sender and a value.
    let (pid, value) = unsafe { ((*info).si_pid(), (*info).si_value().sival_ptr as usize as i32) };
    for (cell, number) in entry.iter().zip([signal, pid, value, super::crew::number()]) {
        cell.store(number, Ordering::SeqCst);
    }
}

/// Catches all of [`BLOCKABLE`].
pub(crate) fn catch_signals() {
    for signal in BLOCKABLE {
        // SAFETY: the handler touches atomics only.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = note as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART | libc::SA_ONSTACK;
            libc::sigaction(signal, &action, std::ptr::null_mut());
        }
    }
    // A group of stopped processes that becomes an orphan is hung up on, and so is a session whose terminal is closed; who
    // is not in front of its terminal is stopped when it sets something there.
    for signal in [libc::SIGHUP, libc::SIGTTOU] {
        // SAFETY: no handler.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}

/// Queues a signal with a value.
pub(crate) fn send(pid: i32, signal: i32, value: i32) -> i32 {
    // SAFETY: plain numbers; the value is not a pointer to anybody.
    unsafe { libc::sigqueue(pid, signal, libc::sigval { sival_ptr: value as usize as *mut _ }) }
}

/// Queues a signal with a value to one thread.
pub(crate) fn send_to_thread(pid: i32, thread: i32, signal: i32, value: i32) -> i64 {
    // SAFETY: zeros are a valid siginfo, and what is written into it lies within; the kernel reads it.
    unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        (info.si_signo, info.si_code) = (signal, libc::SI_QUEUE);
        // After number, error and code, and padding: sender, user, value.
        let fields = (&raw mut info).cast::<i32>().add(4);
        fields.write(libc::getpid());
        fields.add(1).write(libc::getuid() as i32);
        fields.add(2).write(value);
        libc::syscall(libc::SYS_rt_tgsigqueueinfo, pid, thread, signal, &info)
    }
}

/// Blocks or unblocks a signal.
pub(crate) fn mask(how: i32, signal: i32) {
    // SAFETY: the set is initialised before it is used.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigaddset(&mut set, signal);
        libc::sigprocmask(how, &set, std::ptr::null_mut());
    }
}

/// Signals that are blocked, and those that are pending.
pub(crate) fn blocked_and_pending() -> (Vec<i32>, Vec<i32>) {
    // SAFETY: the calls fill in the sets.
    unsafe {
        let (mut blocked, mut pending): (libc::sigset_t, libc::sigset_t) = std::mem::zeroed();
        libc::sigprocmask(libc::SIG_BLOCK, std::ptr::null(), &mut blocked);
        libc::sigpending(&mut pending);
        let of = |set: &libc::sigset_t| (1..65).filter(|s| libc::sigismember(set, *s) == 1).collect();
        (of(&blocked), of(&pending))
    }
}

/// waitpid(2) without waiting: the child and its status, or 0, or -1.
pub(crate) fn bury() -> (i32, i32) {
    let mut status = 0;
    // SAFETY: the status is ours.
    let pid = unsafe { libc::waitpid(-1, &mut status, libc::WNOHANG | libc::WUNTRACED) };
    (pid, status)
}

/// kill(2).
pub(crate) fn kill(pid: i32, signal: i32) -> i32 {
    // SAFETY: plain numbers.
    unsafe { libc::kill(pid, signal) }
}

/// gettid(2).
pub(crate) fn thread_id() -> i32 {
    // SAFETY: takes nothing.
    unsafe { libc::gettid() }
}

/// Takes a descriptor that was received.
pub(crate) fn own(descriptor: i32) -> OwnedFd {
    // SAFETY: the kernel made it for us, and nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(descriptor) }
}

fn made(descriptor: i32) -> io::Result<OwnedFd> {
    if descriptor < 0 { Err(io::Error::last_os_error()) } else { Ok(own(descriptor)) }
}

/// A timerfd.
pub(crate) fn timer() -> io::Result<OwnedFd> {
    // SAFETY: plain numbers.
    made(unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_NONBLOCK) })
}

fn in_seconds(value: i64, interval: i64) -> libc::itimerspec {
    let seconds = |tv_sec| libc::timespec { tv_sec, tv_nsec: 0 };
    libc::itimerspec { it_interval: seconds(interval), it_value: seconds(value) }
}

/// Arms a timerfd far in the future, or not at all for 0; or it has expired when this returns.
pub(crate) fn arm(descriptor: i32, seconds: i64) -> i32 {
    if seconds % 4 == 3 {
        let mut soon = in_seconds(0, 0);
        soon.it_value.tv_nsec = 1;
        // SAFETY: the value is ours.
        let armed = unsafe { libc::timerfd_settime(descriptor, 0, &soon, std::ptr::null_mut()) };
        await_event(descriptor, libc::POLLIN);
        return armed;
    }
    let value = if seconds == 0 { 0 } else { 5_000 + seconds };
    // SAFETY: the value is ours.
    unsafe { libc::timerfd_settime(descriptor, 0, &in_seconds(value, seconds % 7), std::ptr::null_mut()) }
}

/// Whether it is armed and for about when, and its interval.
fn roughly(value: &libc::itimerspec) -> String {
    let left = value.it_value.tv_sec;
    // tests take minutes at most
    format!("{} every {}", left.saturating_add(600) / 10_000 + i64::from(left > 0), value.it_interval.tv_sec)
}

/// The same of a timerfd.
pub(crate) fn armed(descriptor: i32) -> String {
    let mut value = in_seconds(0, 0);
    // SAFETY: the value is ours.
    let got = unsafe { libc::timerfd_gettime(descriptor, &mut value) };
    format!("{got} {}", roughly(&value))
}

/// A signalfd for [`SIGNALS`].
pub(crate) fn signals_file() -> io::Result<OwnedFd> {
    // SAFETY: the set is initialised before it is used.
    made(unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        for signal in SIGNALS {
            libc::sigaddset(&mut set, signal);
        }
        libc::signalfd(-1, &set, libc::SFD_NONBLOCK)
    })
}

/// Takes a signal out of a signalfd: its number and value.
pub(crate) fn take_signal(descriptor: i32) -> String {
    // SAFETY: zeros are valid, and the kernel fills in as many bytes as there are.
    unsafe {
        let mut info: libc::signalfd_siginfo = std::mem::zeroed();
        let length = libc::read(descriptor, (&raw mut info).cast(), size_of_val(&info));
        format!("{length} {} {}", info.ssi_signo, info.ssi_int)
    }
}

/// A message queue that does not block.
pub(crate) fn open_queue(number: usize) -> io::Result<OwnedFd> {
    let name = std::ffi::CString::new(format!("/pod-program-{number}")).unwrap_or_default();
    let flags = libc::O_CREAT | libc::O_RDWR | libc::O_NONBLOCK;
    // SAFETY: the name ends with zero; zeros are valid, and the kernel reads the rest.
    made(unsafe {
        let mut size: libc::mq_attr = std::mem::zeroed();
        // All queues of a user, in whichever pod, share one limit (RLIMIT_MSGQUEUE): few bytes.
        (size.mq_maxmsg, size.mq_msgsize) = (4, 1024);
        libc::mq_open(name.as_ptr(), flags, 0o600, &size)
    })
}

/// Sends to a message queue.
pub(crate) fn queue(descriptor: i32, message: &[u8], priority: u32) -> i32 {
    // SAFETY: the message is as long as it says.
    unsafe { libc::mq_send(descriptor, message.as_ptr().cast(), message.len(), priority) }
}

/// Takes from a message queue.
pub(crate) fn unqueue(descriptor: i32) -> String {
    let (mut message, mut priority) = (vec![0u8; 16 << 10], 0);
    // SAFETY: the buffer is as long as it says.
    let length = unsafe { libc::mq_receive(descriptor, message.as_mut_ptr().cast(), message.len(), &mut priority) };
    message.truncate(length.max(0) as usize);
    format!("{length} {priority} {:x}", super::channel::hash(&message))
}

/// How many messages a queue has.
pub(crate) fn queued(descriptor: i32) -> String {
    // SAFETY: zeros are valid, and the kernel fills it in.
    unsafe {
        let mut attributes: libc::mq_attr = std::mem::zeroed();
        let got = libc::mq_getattr(descriptor, &mut attributes);
        format!("{got} {} of {} x {}", attributes.mq_curmsgs, attributes.mq_maxmsg, attributes.mq_msgsize)
    }
}

/// An inotify instance that is given.
pub(crate) fn as_inotify(descriptor: OwnedFd) -> nix::sys::inotify::Inotify {
    // SAFETY: it is one, and nobody else has this descriptor.
    unsafe { nix::sys::inotify::Inotify::from_raw_fd(descriptor.into_raw_fd()) }
}

/// An epoll instance.
pub(crate) fn epoll() -> io::Result<OwnedFd> {
    // SAFETY: plain numbers.
    made(unsafe { libc::epoll_create1(0) })
}

/// Has it watch a file.
pub(crate) fn watch(epoll: i32, descriptor: i32, events: i32, data: u64) -> i32 {
    let mut event = libc::epoll_event { events: events as u32, u64: data };
    // SAFETY: the event is ours.
    unsafe { libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, descriptor, &mut event) }
}

/// What is ready: data and events, in the order of the data.
pub(crate) fn ready(epoll: i32) -> Vec<(u64, u32)> {
    let mut events = [libc::epoll_event { events: 0, u64: 0 }; 64];
    // SAFETY: there is room for as many as it says.
    let count = unsafe { libc::epoll_wait(epoll, events.as_mut_ptr(), events.len() as i32, 0) };
    let mut found: Vec<(u64, u32)> = events.iter().take(count.max(0) as usize).map(|e| (e.u64, e.events)).collect();
    found.sort_unstable();
    found
}

/// Waits until a file is ready for this, 5 s at most.
pub(crate) fn await_event(descriptor: i32, event: i16) {
    poll(descriptor, event, 5_000);
}

/// Whether there is something to read, or the end.
pub(crate) fn is_readable(descriptor: i32) -> bool {
    poll(descriptor, libc::POLLIN, 0) & libc::POLLIN != 0
}

fn poll(descriptor: i32, events: i16, milliseconds: i32) -> i16 {
    let mut wanted = libc::pollfd { fd: descriptor, events, revents: 0 };
    // SAFETY: one entry, which is ours.
    unsafe { libc::poll(&mut wanted, 1, milliseconds) };
    wanted.revents
}

/// Makes a terminal that of the session that this process leads, and its group the one in front.
pub(crate) fn control(terminal: i32) -> String {
    // SAFETY: plain numbers.
    let (controls, in_front) =
        unsafe { (libc::ioctl(terminal, libc::TIOCSCTTY, 0), libc::tcsetpgrp(terminal, libc::getpgrp())) };
    format!("{controls} {in_front}")
}

/// fcntl(2): a write lock of ten bytes.
pub(crate) fn lock_range(descriptor: i32, start: i64, open_file: bool) -> i32 {
    // SAFETY: zeros are valid; the kernel reads it.
    unsafe {
        let mut range: libc::flock = std::mem::zeroed();
        (range.l_type, range.l_whence) = (libc::F_WRLCK as i16, libc::SEEK_SET as i16);
        (range.l_start, range.l_len) = (start, 10);
        libc::fcntl(descriptor, if open_file { libc::F_OFD_SETLK } else { libc::F_SETLK }, &range)
    }
}

/// Maps the first bytes of a file at `address`, which must be free; whether that worked.
pub(crate) fn map_file(address: usize, bytes: usize, shared: bool, file: i32) -> bool {
    let flags = libc::MAP_FIXED_NOREPLACE | if shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
    // SAFETY: nothing that is in use can be replaced; the file does not become shorter.
    unsafe { libc::mmap(address as *mut _, bytes, 3, flags, file, 0) as usize == address }
}

/// mremap(2) at its place; whether that worked.
pub(crate) fn resize(address: usize, from: usize, to: usize) -> bool {
    // SAFETY: regions hold no Rust objects, and have room behind them.
    unsafe { libc::mremap(address as *mut _, from, to, 0) as usize == address }
}

/// mremap(2) to another place, which must be free; whether that worked.
pub(crate) fn move_to(address: usize, bytes: usize, place: usize) -> bool {
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    // SAFETY: regions hold no Rust objects, and no two have the same place.
    unsafe { libc::mremap(address as *mut _, bytes, bytes, flags, place as *mut libc::c_void) as usize == place }
}

/// Advice that is not madvise(2)'s.
pub(crate) const LOCK: i32 = 1000;
pub(crate) const UNLOCK: i32 = 1001;

/// madvise(2), mlock(2) or munlock(2) of a region.
pub(crate) fn advise(address: usize, bytes: usize, advice: i32) -> i32 {
    // SAFETY: regions hold no Rust objects.
    unsafe {
        match advice {
            LOCK => libc::mlock(address as *const _, bytes),
            UNLOCK => libc::munlock(address as *const _, bytes),
            _ => libc::madvise(address as *mut _, bytes, advice),
        }
    }
}

/// Removes the segment of `key`.
pub(crate) fn remove_segment(key: i32) -> i32 {
    // SAFETY: no buffer is given, none is needed.
    unsafe { libc::shmctl(libc::shmget(key, 0, 0), libc::IPC_RMID, std::ptr::null_mut()) }
}

/// Removes the semaphores of `key`.
pub(crate) fn remove_semaphores(key: i32) -> i32 {
    // SAFETY: plain numbers.
    unsafe { libc::semctl(libc::semget(key, 0, 0), 0, libc::IPC_RMID) }
}

/// Removes the queue of `key`.
pub(crate) fn remove_messages(key: i32) -> i32 {
    // SAFETY: no buffer is given, none is needed.
    unsafe { libc::msgctl(libc::msgget(key, 0), libc::IPC_RMID, std::ptr::null_mut()) }
}

/// How many have attached the segment of `key`, its mode; -1 if there is none.
pub(crate) fn attached(key: i32) -> (i64, u32) {
    // SAFETY: the kernel fills it in.
    unsafe {
        let mut facts: libc::shmid_ds = std::mem::zeroed();
        match libc::shmctl(libc::shmget(key, 0, 0), libc::IPC_STAT, &mut facts) {
            0 => (facts.shm_nattch as i64, u32::from(facts.shm_perm.mode)),
            _ => (-1, 0),
        }
    }
}

/// semop(2) on the first of the two semaphores of `key`, without waiting.
pub(crate) fn semaphore(key: i32, change: i16, undo: bool) -> i32 {
    let flags = libc::IPC_NOWAIT as i16 | if undo { libc::SEM_UNDO as i16 } else { 0 };
    let mut operation = libc::sembuf { sem_num: 0, sem_op: change, sem_flg: flags };
    // SAFETY: one operation, which is ours.
    unsafe { libc::semop(libc::semget(key, 2, libc::IPC_CREAT | 0o666), &mut operation, 1) }
}

/// The value of the first semaphore of `key`.
pub(crate) fn semaphore_value(key: i32) -> i32 {
    // SAFETY: plain numbers.
    unsafe { libc::semctl(libc::semget(key, 0, 0), 0, libc::GETVAL) }
}

/// Sends a System V message, without waiting.
pub(crate) fn message(key: i32, kind: i64, bytes: &[u8]) -> i32 {
    let mut message = kind.to_ne_bytes().to_vec();
    message.extend_from_slice(bytes);
    // SAFETY: a type and as many bytes as it says.
    unsafe {
        let queue = libc::msgget(key, libc::IPC_CREAT | 0o600);
        libc::msgsnd(queue, message.as_ptr().cast(), bytes.len(), libc::IPC_NOWAIT)
    }
}

/// Takes a System V message.
pub(crate) fn receive(key: i32) -> String {
    let mut message = vec![0u8; 8 + 8192];
    // SAFETY: room for a type and as many bytes as it says.
    let length = unsafe { libc::msgrcv(libc::msgget(key, 0), message.as_mut_ptr().cast(), 8192, 0, libc::IPC_NOWAIT) };
    format!("{length} {:x}", super::channel::hash(&message[..(8 + length.max(0)) as usize]))
}

/// How many messages the queue of `key` has; -1 if there is none.
pub(crate) fn messages(key: i32) -> i64 {
    // SAFETY: the kernel fills it in.
    unsafe {
        let mut facts: libc::msqid_ds = std::mem::zeroed();
        match libc::msgctl(libc::msgget(key, 0), libc::IPC_STAT, &mut facts) {
            0 => facts.msg_qnum as i64,
            _ => -1,
        }
    }
}

/// Gives all privileges of this thread up, for good.
pub(crate) fn become_user(user: u32) -> i64 {
    let groups = [user, user + 10];
    // SAFETY: plain numbers, and a list as long as it says.
    unsafe {
        libc::syscall(libc::SYS_setgroups, 2, groups.as_ptr())
            + libc::syscall(libc::SYS_setresgid, user, user, user)
            + libc::syscall(libc::SYS_setresuid, user, user, user)
    }
}

/// Which signal it is to get when its parent ends, or 0.
pub(crate) fn set_death_signal(signal: i32) -> i32 {
    // SAFETY: plain numbers.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, signal) }
}

pub(crate) fn death_signal() -> i32 {
    let mut signal = -1i32;
    // SAFETY: the kernel writes a number.
    unsafe { libc::prctl(libc::PR_GET_PDEATHSIG, &mut signal) };
    signal
}

/// Arms one of four timers, far in the future; or one at once, whose signal has come or waits when this returns.
pub(crate) fn alarm(number: u8) -> String {
    let soon = number % 8 == 7;
    let seconds = 5_000 + i64::from(number);
    let value = |tv_sec| libc::timeval { tv_sec, tv_usec: 0 };
    let interval = libc::itimerval { it_interval: value(i64::from(number % 5)), it_value: value(seconds) };
    // SAFETY: the values are ours; zeros are a valid sigevent.
    unsafe {
        if number.is_multiple_of(2) {
            let which = [libc::ITIMER_REAL, libc::ITIMER_VIRTUAL, libc::ITIMER_PROF][usize::from(number / 2 % 3)];
            return libc::setitimer(which, &interval, std::ptr::null_mut()).to_string();
        }
        let mut event: libc::sigevent = std::mem::zeroed();
        event.sigev_notify = if number % 4 == 1 || soon { libc::SIGEV_SIGNAL } else { libc::SIGEV_NONE };
        event.sigev_signo = SIGNALS[usize::from(number / 4) % SIGNALS.len()];
        event.sigev_value.sival_ptr = usize::from(number) as *mut _;
        let mut id = 0i32;
        let clock = if number.is_multiple_of(3) { libc::CLOCK_BOOTTIME } else { libc::CLOCK_MONOTONIC };
        let made = libc::syscall(libc::SYS_timer_create, clock, &event, &mut id);
        let mut spec = in_seconds(seconds, i64::from(number % 5));
        if soon {
            spec = in_seconds(0, 0);
            spec.it_value.tv_nsec = 1;
        }
        let armed = libc::syscall(libc::SYS_timer_settime, id, 0, &spec, std::ptr::null::<libc::itimerspec>());
        while soon && armed == 0 && (spec.it_value.tv_sec, spec.it_value.tv_nsec) != (0, 0) {
            libc::syscall(libc::SYS_timer_gettime, id, &mut spec);
        }
        format!("{made} {armed} id {id}")
    }
}

/// Its timers.
pub(crate) fn timers() -> String {
    let mut text = String::new();
    for which in [libc::ITIMER_REAL, libc::ITIMER_VIRTUAL, libc::ITIMER_PROF] {
        // SAFETY: zeros are valid, and the kernel fills it in.
        let value = unsafe {
            let mut value: libc::itimerval = std::mem::zeroed();
            libc::getitimer(which, &mut value);
            value
        };
        text += &roughly(&in_seconds(value.it_value.tv_sec, value.it_interval.tv_sec));
        text += ", ";
    }
    let shown = super::masks::shown("/proc/self/timers");
    for line in shown.lines() {
        if let Some(id) = line.strip_prefix("ID: ").and_then(|id| id.trim().parse::<i32>().ok()) {
            let mut value = in_seconds(0, 0);
            // SAFETY: the value is ours.
            unsafe { libc::syscall(libc::SYS_timer_gettime, id, &mut value) };
            text += &format!("{id}: {}", roughly(&value));
        } else {
            // "notify: signal/pid.N"
            text += line.split('.').next().unwrap_or_default();
        }
        text += "; ";
    }
    text
}

/// Takes a capability from those that it could ever have.
pub(crate) fn drop_capability(number: u8) -> i32 {
    // SAFETY: plain numbers.
    unsafe { libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(number)) }
}

/// personality(2): whether addresses are chosen anew, and one of the oddities of old programs.
pub(crate) fn set_personality(odd: bool) -> i32 {
    let persona = if odd { libc::ADDR_NO_RANDOMIZE | libc::UNAME26 } else { 0 };
    // SAFETY: plain numbers.
    unsafe { libc::personality(persona as libc::c_ulong) }
}

/// A Unix stream socket of this name, connected.
pub(crate) fn connect_from(
    own: &std::os::unix::net::SocketAddr,
    to: &std::os::unix::net::SocketAddr,
) -> io::Result<OwnedFd> {
    use std::os::fd::AsRawFd;
    use std::os::linux::net::SocketAddrExt;

    let name = |address: &std::os::unix::net::SocketAddr| {
        nix::sys::socket::UnixAddr::new_abstract(address.as_abstract_name().unwrap_or_default())
    };
    let (family, kind) = (nix::sys::socket::AddressFamily::Unix, nix::sys::socket::SockType::Stream);
    let end = nix::sys::socket::socket(family, kind, nix::sys::socket::SockFlag::SOCK_CLOEXEC, None)?;
    nix::sys::socket::bind(end.as_raw_fd(), &name(own)?)?;
    nix::sys::socket::connect(end.as_raw_fd(), &name(to)?)?;
    Ok(end)
}

/// setpriority(2).
pub(crate) fn set_nice(value: i32) -> i32 {
    // SAFETY: plain numbers.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, value) }
}

/// sched_setaffinity(2) for the first 64 processors.
pub(crate) fn set_affinity(mask: u64) -> i64 {
    // SAFETY: the mask is as long as it says.
    unsafe { libc::syscall(libc::SYS_sched_setaffinity, 0, size_of_val(&mask), &mask) }
}

const BEST_EFFORT: i32 = 2 << 13;

/// ioprio_set(2): a level of the class best-effort.
pub(crate) fn set_io_priority(level: i32) -> i64 {
    // SAFETY: plain numbers.
    unsafe { libc::syscall(libc::SYS_ioprio_set, 1, 0, BEST_EFFORT | level) }
}

/// sched_setscheduler(2).
pub(crate) fn set_policy(policy: i32) -> i32 {
    let parameter = libc::sched_param { sched_priority: 0 };
    // SAFETY: the parameter is ours.
    unsafe { libc::sched_setscheduler(0, policy, &parameter) }
}

/// Sets an alternate signal stack, or none.
pub(crate) fn alternate_stack(there: bool) -> i32 {
    let memory: &'static mut [u8] = if there { Box::leak(vec![0; 512 << 10].into_boxed_slice()) } else { &mut [] };
    let ss_flags = if there { 0 } else { libc::SS_DISABLE };
    let stack = libc::stack_t { ss_sp: memory.as_mut_ptr().cast(), ss_flags, ss_size: memory.len() };
    // SAFETY: the memory is never given back.
    unsafe { libc::sigaltstack(&stack, std::ptr::null_mut()) }
}

/// Priority, processors, I/O priority, policy, personality, alternate stack.
pub(crate) fn scheduling() -> String {
    // SAFETY: the kernel fills in what it is given.
    unsafe {
        let (mut mask, mut stack): (u64, libc::stack_t) = std::mem::zeroed();
        libc::syscall(libc::SYS_sched_getaffinity, 0, size_of_val(&mask), &mut mask);
        libc::sigaltstack(std::ptr::null(), &mut stack);
        format!(
            "nice {} processors {mask:x} io {} policy {} personality {:x} stack {}/{}",
            libc::getpriority(libc::PRIO_PROCESS, 0),
            libc::syscall(libc::SYS_ioprio_get, 1, 0),
            libc::sched_getscheduler(0),
            libc::personality(0xffff_ffff),
            stack.ss_size,
            stack.ss_flags,
        )
    }
}
