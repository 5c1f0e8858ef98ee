//! Message queues and semaphores.

use crate::stage::*;

pub(crate) const KINDS: &[crate::stage::Kind] = &[
    ("mqueue", mqueue),
    ("mqueue-unlinked", mqueue_unlinked),
    ("mqueue-waiting", mqueue_waiting),
    ("mqueue-notify", mqueue_notify),
    ("mqueue-notify-full", mqueue_notify_full),
    ("mqueue-notify-thread", mqueue_notify_thread),
    ("named-semaphore", named_semaphore),
    ("semaphores-threads", semaphores_threads),
    ("semaphores-undo", semaphores_undo),
    ("semaphores-undo-kinds", semaphores_undo_kinds),
    ("semaphores-waiting", semaphores_waiting),
    ("segments-protected", segments_protected),
];

fn open(name: &std::ffi::CStr, flags: i32, most: i64, size: i64) -> Result<i32, String> {
    let mut attributes: libc::mq_attr = unsafe { std::mem::zeroed() };
    (attributes.mq_maxmsg, attributes.mq_msgsize) = (most, size);
    let queue = unsafe { libc::mq_open(name.as_ptr(), flags | libc::O_CREAT, 0o640, &raw mut attributes) };
    done("mq_open", queue).map(|queue| queue as i32)
}

fn send(queue: i32, text: &str, priority: u32) -> Checked {
    done("mq_send", unsafe { libc::mq_send(queue, text.as_ptr().cast(), text.len(), priority) }).map(drop)
}

fn receive(queue: i32) -> Result<(String, u32), String> {
    let (mut buffer, mut priority) = ([0u8; 8192], 0);
    let length = unsafe { libc::mq_receive(queue, buffer.as_mut_ptr().cast(), buffer.len(), &raw mut priority) };
    let length = done("mq_receive", length as i64)? as usize;
    Ok((String::from_utf8_lossy(&buffer[..length]).into_owned(), priority))
}

/// Flags, most messages, most bytes, messages now.
fn attributes(queue: i32) -> Result<[i64; 4], String> {
    let mut found: libc::mq_attr = unsafe { std::mem::zeroed() };
    done("mq_getattr", unsafe { libc::mq_getattr(queue, &raw mut found) })?;
    Ok([found.mq_flags, found.mq_maxmsg, found.mq_msgsize, found.mq_curmsgs])
}

fn facts(path: &str) -> Result<(u32, u32, u32, i64, i64), String> {
    use std::os::unix::fs::MetadataExt;
    let found = std::fs::metadata(path).map_err(|e| format!("{path}: {e}"))?;
    Ok((found.mode(), found.uid(), found.gid(), found.mtime(), found.mtime_nsec()))
}

fn would_block(result: Result<(String, u32), String>) -> Checked {
    equal("an empty queue", result.err().unwrap_or_default().contains("os error 11"), true)
}

/// Messages, priorities, limits and permissions; descriptors with flags, one of them shared; one opened as a file.
fn mqueue() -> Checked {
    let queue = open(c"/kept", libc::O_RDWR, 7, 100)?;
    let reader = open(c"/kept", libc::O_RDONLY | libc::O_NONBLOCK, 7, 100)?;
    let empty = open(c"/empty", libc::O_RDWR | libc::O_NONBLOCK, 3, 8192)?;
    for (text, priority) in [("low", 0), ("first", 5), ("second", 5), ("", 9), ("last", 0)] {
        send(queue, text, priority)?;
    }
    done("chown", unsafe { libc::chown(c"/dev/mqueue/kept".as_ptr(), 1000, 1001) })?;
    let file = std::fs::File::open("/dev/mqueue/kept").map_err(|e| e.to_string())?;
    let (before, owner) = ([queue, reader, empty].map(attributes), facts("/dev/mqueue/kept")?);
    let child = fork(|| {
        await_go();
        equal("its limits", attributes(queue)?, [0, 7, 100, 5])
    })?;
    hold()?;
    equal("limits", [queue, reader, empty].map(attributes), before)?;
    equal("mode, owner, time", facts("/dev/mqueue/kept")?, owner)?;
    check(std::io::read_to_string(file).is_ok_and(|text| text.starts_with("QSIZE:18 ")), "the queue as a file")?;
    reap(child)?;
    for expected in [("", 9), ("first", 5), ("second", 5), ("low", 0), ("last", 0)] {
        equal("a message", receive(reader)?, (expected.0.to_owned(), expected.1))?;
    }
    would_block(receive(reader))?;
    would_block(receive(empty))?;
    send(queue, "new", 1)?;
    equal("a new message", receive(reader)?, ("new".to_owned(), 1))
}

/// Queues whose names are gone, of which another has taken one.
fn mqueue_unlinked() -> Checked {
    let flags = libc::O_RDWR | libc::O_NONBLOCK;
    let unlink = || done("mq_unlink", unsafe { libc::mq_unlink(c"/gone".as_ptr()) }).map(drop);
    let (queue, again) = (open(c"/gone", flags, 4, 16)?, open(c"/gone", flags, 4, 16)?);
    send(queue, "first queue", 1)?;
    unlink()?;
    let other = open(c"/gone", flags, 4, 16)?;
    send(other, "second queue", 1)?;
    unlink()?;
    let named = open(c"/gone", flags, 4, 16)?;
    send(named, "third queue", 1)?;
    hold()?;
    send(again, "and more", 0)?;
    equal("a message", receive(queue)?.0, "first queue".to_owned())?;
    equal("a message", receive(queue)?.0, "and more".to_owned())?;
    equal("a message", receive(other)?.0, "second queue".to_owned())?;
    equal("a message", receive(open(c"/gone", flags, 4, 16)?)?.0, "third queue".to_owned())?;
    would_block(receive(named))
}

/// One waits for a message, one for room.
fn mqueue_waiting() -> Checked {
    let (empty, full) = (open(c"/empty", libc::O_RDWR, 2, 16)?, open(c"/full", libc::O_RDWR, 2, 16)?);
    send(full, "one", 0)?;
    send(full, "two", 0)?;
    let receiver = fork(|| equal("the message", receive(empty)?, ("come".to_owned(), 3)))?;
    let sender = fork(|| send(full, "three", 0))?;
    until_asleep(receiver)?;
    until_asleep(sender)?;
    hold()?;
    send(empty, "come", 3)?;
    for text in ["one", "two", "three"] {
        equal("a message", receive(full)?.0, text.to_owned())?;
    }
    reap(receiver)?;
    reap(sender)
}

/// Who is told of a message by a signal, with a value; and that one is told of another, by nothing at all.
fn mqueue_notify() -> Checked {
    let queue = open(c"/told", libc::O_RDWR, 2, 16)?;
    crate::signals::block(&[libc::SIGUSR1]);
    let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
    (event.sigev_notify, event.sigev_signo) = (libc::SIGEV_SIGNAL, libc::SIGUSR1);
    event.sigev_value.sival_ptr = std::ptr::without_provenance_mut(77);
    done("mq_notify", unsafe { libc::mq_notify(queue, &raw const event) })?;
    // Held by a child as well, through a description of its own, that is to be told of another.
    let other = open(c"/told-too", libc::O_RDWR, 2, 16)?;
    let set_up = Gate::new()?;
    let child = fork(|| {
        open(c"/told", libc::O_RDWR, 2, 16)?;
        event.sigev_notify = libc::SIGEV_NONE;
        done("mq_notify", unsafe { libc::mq_notify(other, &raw const event) })?;
        set_up.open()?;
        await_go();
        Ok(())
    })?;
    set_up.pass(1)?;
    hold_and(|| {
        event.sigev_notify = libc::SIGEV_SIGNAL;
        check(unsafe { libc::mq_notify(other, &raw const event) } == -1, "nobody else is told")
    })?;
    reap(child)?;
    send(queue, "news", 0)?;
    let mut told: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    unsafe { libc::sigaddset(&raw mut set, libc::SIGUSR1) };
    equal("the signal", unsafe { libc::sigwaitinfo(&raw const set, &raw mut told) }, libc::SIGUSR1)?;
    equal("its value", unsafe { told.si_value() }.sival_ptr.addr(), 77)
}

/// Of a message after those that are there.
fn mqueue_notify_full() -> Checked {
    let queue = open(c"/told", libc::O_RDWR, 2, 16)?;
    send(queue, "old", 0)?;
    crate::signals::block(&[libc::SIGUSR1]);
    let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
    (event.sigev_notify, event.sigev_signo) = (libc::SIGEV_SIGNAL, libc::SIGUSR1);
    done("mq_notify", unsafe { libc::mq_notify(queue, &raw const event) })?;
    hold_loosely()?;
    let mut pending: libc::sigset_t = unsafe { std::mem::zeroed() };
    done("sigpending", unsafe { libc::sigpending(&raw mut pending) })?;
    check(unsafe { libc::sigismember(&raw const pending, libc::SIGUSR1) } == 0, "nothing was told")?;
    check(unsafe { libc::mq_notify(queue, &raw const event) } == -1, "it is to be told still")
}

/// By a thread that is to be made.
fn mqueue_notify_thread() -> Checked {
    extern "C" fn told(_: libc::sigval) {}
    let queue = open(c"/told", libc::O_RDWR, 2, 16)?;
    let mut event: [u64; 8] = [0; 8];
    event[1] = (libc::SIGEV_THREAD as u64) << 32;
    event[2] = told as extern "C" fn(libc::sigval) as usize as u64;
    done("mq_notify", unsafe { libc::mq_notify(queue, event.as_ptr().cast()) })?;
    hold_loosely()
}

fn named_semaphore() -> Checked {
    let semaphore = unsafe { libc::sem_open(c"/kept".as_ptr(), libc::O_CREAT, 0o600, 2) };
    check(!semaphore.is_null(), "sem_open")?;
    let down = || unsafe { libc::sem_wait(semaphore) };
    down();
    let child = fork(|| {
        down();
        down();
        await_go();
        Ok(())
    })?;
    until_asleep(child)?;
    hold()?;
    let again = unsafe { libc::sem_open(c"/kept".as_ptr(), 0) };
    check(!again.is_null(), "sem_open")?;
    done("sem_post", unsafe { libc::sem_post(again) })?;
    reap(child)
}

fn semaphores(values: &[u16]) -> Result<i32, String> {
    let set = done("semget", unsafe { libc::semget(libc::IPC_PRIVATE, values.len() as i32, 0o600) })? as i32;
    for (number, value) in values.iter().enumerate() {
        done("semctl", unsafe { libc::semctl(set, number as i32, libc::SETVAL, i32::from(*value)) })?;
    }
    Ok(set)
}

fn operate(set: i32, number: u16, change: i16, flags: i32) -> Checked {
    let mut operation = libc::sembuf { sem_num: number, sem_op: change, sem_flg: flags as i16 };
    done("semop", unsafe { libc::semop(set, &raw mut operation, 1) }).map(drop)
}

fn values(set: i32, count: usize) -> Vec<i32> {
    (0..count).map(|number| unsafe { libc::semctl(set, number as i32, libc::GETVAL) }).collect()
}

/// Threads share an undo list from birth; it is empty.
fn semaphores_threads() -> Checked {
    let set = semaphores(&[3, 0])?;
    operate(set, 1, 2, 0)?;
    // A thread that comes later brings memory of its own.
    let set_up = Gate::new()?;
    let thread = std::thread::spawn(move || {
        set_up.open()?;
        await_go();
        operate(set, 0, -1, 0)
    });
    set_up.pass(1)?;
    hold()?;
    thread.join().map_err(|_| "the thread failed")??;
    equal("values", values(set, 2), vec![2, 2])
}

/// What a process took with SEM_UNDO comes back when it ends, and what it gave goes.
fn semaphores_undo() -> Checked {
    let (set_up, set) = (Gate::new()?, semaphores(&[1, 5, 0])?);
    let child = fork(|| {
        operate(set, 0, -1, libc::SEM_UNDO)?;
        operate(set, 1, -2, libc::SEM_UNDO)?;
        operate(set, 2, 4, libc::SEM_UNDO)?;
        set_up.open()?;
        await_go();
        operate(set, 1, -1, libc::SEM_UNDO)
    })?;
    operate(set, 2, 1, libc::SEM_UNDO)?;
    set_up.pass(1)?;
    equal("values", values(set, 3), vec![0, 3, 5])?;
    hold()?;
    reap(child)?;
    equal("values", values(set, 3), vec![1, 5, 1])
}

/// Large and extreme values, many semaphores, a child and a thread with the same list.
fn semaphores_undo_kinds() -> Checked {
    let (set_up, looked) = (Gate::new()?, Gate::new()?);
    let (extreme, many) = (semaphores(&[32767, 0, 32767, 1])?, semaphores(&[7; 200])?);
    let child = fork(|| {
        operate(extreme, 0, -32767, libc::SEM_UNDO)?;
        operate(extreme, 1, 32767, libc::SEM_UNDO)?;
        operate(extreme, 2, -12345, libc::SEM_UNDO)?;
        operate(extreme, 2, 12345, 0)?;
        operate(extreme, 3, -1, libc::SEM_UNDO)?;
        for number in (0..200).filter(|number| number % 8 != 0) {
            operate(many, number, -((number % 8) as i16), libc::SEM_UNDO)?;
        }
        let thread = std::thread::spawn(move || {
            set_up.open()?;
            looked.pass(1)?;
            operate(extreme, 3, 1, libc::SEM_UNDO)
        });
        thread.join().map_err(|_| "the thread failed")?
    })?;
    set_up.pass(1)?;
    let before = (values(extreme, 4), values(many, 200));
    hold()?;
    equal("values", values(extreme, 3), before.0[..3].to_vec())?;
    equal("values", values(many, 200), before.1)?;
    // What cannot be given back whole, as one at its limit, stays.
    operate(extreme, 2, -12345, 0)?;
    looked.open()?;
    reap(child)?;
    equal("values", values(extreme, 4), vec![32767, 0, 32767, 1])?;
    equal("values", values(many, 200), vec![7; 200])
}

/// One waits to take with SEM_UNDO, one for zero.
fn semaphores_waiting() -> Checked {
    let set = semaphores(&[0, 1])?;
    let taker = fork(|| operate(set, 0, -1, libc::SEM_UNDO))?;
    let waiter = fork(|| operate(set, 1, 0, 0))?;
    until_asleep(taker)?;
    until_asleep(waiter)?;
    hold()?;
    operate(set, 0, 1, 0)?;
    operate(set, 1, -1, 0)?;
    reap(taker)?;
    reap(waiter)?;
    equal("values", values(set, 2), vec![1, 0])
}

const PAGE: usize = 4096;

fn attach(segment: i32, flags: i32) -> Result<*mut u8, String> {
    let at = unsafe { libc::shmat(segment, std::ptr::null(), flags) };
    done("shmat", at as i64).map(|_| at.cast())
}

fn protect(at: *mut u8, protection: i32) -> Checked {
    done("mprotect", unsafe { libc::mprotect(at.cast(), PAGE, protection) } as i64).map(drop)
}

/// A segment that a parent may only read just now, and its child may write; one that nobody can ever write.
fn segments_protected() -> Checked {
    let segment = done("shmget", unsafe { libc::shmget(libc::IPC_PRIVATE, PAGE, 0o600) } as i64)? as i32;
    let (both, never) = (attach(segment, 0)?, attach(segment, libc::SHM_RDONLY)?);
    let (set_up, looked) = (Gate::new()?, Gate::new()?);
    let child = fork(|| {
        set_up.open()?;
        looked.pass(1)?;
        unsafe { both.write_volatile(7) };
        Ok(())
    })?;
    set_up.pass(1)?;
    protect(both, libc::PROT_READ)?;
    hold()?;
    looked.open()?;
    reap(child)?;
    equal("what the child wrote", unsafe { [both.read_volatile(), never.read_volatile()] }, [7, 7])?;
    protect(both, libc::PROT_READ | libc::PROT_WRITE)?;
    unsafe { both.write_volatile(8) };
    equal("what the parent wrote", unsafe { never.read_volatile() }, 8)?;
    let denied = protect(never, libc::PROT_READ | libc::PROT_WRITE);
    check(denied.is_err_and(|why| why.contains("os error 13")), "a segment that is only for reading stays so")?;
    done("shmctl", unsafe { libc::shmctl(segment, libc::IPC_RMID, std::ptr::null_mut()) } as i64).map(drop)
}
