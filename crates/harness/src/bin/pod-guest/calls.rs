//! Calls that wait when everything is held: they go on waiting, and end as they would have.

use crate::stage::*;

pub(crate) const KINDS: &[crate::stage::Kind] =
    &[("waiting-calls", waiting_calls), ("waiting-timeouts", timeouts), ("waiting-again", waiting_again)];

const LONG: libc::timeval = libc::timeval { tv_sec: 600, tv_usec: 0 };
static LONG_SPEC: libc::timespec = libc::timespec { tv_sec: 600, tv_nsec: 0 };

/// A call that waits in a child, and what ends its waiting.
struct Waiter {
    pid: i32,
    name: &'static str,
    end: Box<dyn FnOnce(i32) -> Checked>,
}

fn waiter(
    name: &'static str,
    wait: impl FnOnce() -> Checked,
    end: impl FnOnce(i32) -> Checked + 'static,
) -> Result<Waiter, String> {
    let pid = fork(|| wait().map_err(|differs| format!("{name}: {differs}")))?;
    until_asleep(pid)?;
    Ok(Waiter { pid, name, end: Box::new(end) })
}

fn ended(waiters: Vec<Waiter>) -> Checked {
    waiters.into_iter().try_for_each(|waiter| {
        (waiter.end)(waiter.pid)?;
        reap(waiter.pid).map_err(|differs| format!("{}: {differs}", waiter.name))
    })
}

fn polled(file: i32) -> libc::pollfd {
    libc::pollfd { fd: file, events: libc::POLLIN, revents: 0 }
}

fn waiting_calls() -> Checked {
    let mut waiters = on_a_pipe(-1)?;
    waiters.extend(on_signals()?);
    waiters.extend(on_others()?);
    hold()?;
    ended(waiters)
}

/// With timeouts that are far away.
fn timeouts() -> Checked {
    let mut waiters = on_a_pipe(600_000)?;
    let word = crate::memory::shared(crate::memory::PAGE)?.cast::<u32>();
    waiters.push(futex(word, &raw const LONG_SPEC as u64)?);
    let signal = libc::SIGUSR1;
    waiters.push(waiter(
        "sigtimedwait",
        || {
            crate::signals::block(&[signal]);
            let set = crate::signals::set(&[signal]);
            equal(
                "it",
                unsafe { libc::sigtimedwait(&raw const set, std::ptr::null_mut(), &raw const LONG_SPEC) },
                signal,
            )
        },
        move |pid| done("kill", unsafe { libc::kill(pid, signal) }).map(drop),
    )?);
    hold()?;
    ended(waiters)
}

/// Calls that were stopped once and go on: the kernel knows them by another number then.
fn waiting_again() -> Checked {
    let word = crate::memory::shared(crate::memory::PAGE)?.cast::<u32>();
    let long = &raw const LONG_SPEC as u64;
    let mut waiters = vec![futex(word, long)?];
    for timeout in [600_000, -1] {
        let pipe = Gate::new()?;
        let file = pipe.read_end();
        let wait =
            move || done("it", unsafe { libc::poll(&mut polled(file), 1, timeout) }).and_then(|n| equal("it", n, 1));
        waiters.push(waiter("poll", wait, move |_| pipe.open())?);
    }
    const PRIVATE: u64 = (libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG) as u64;
    let short = Box::leak(Box::new(libc::timespec { tv_sec: 4, tv_nsec: 0 })) as *mut libc::timespec as u64;
    let times = move |name, number: libc::c_long, args: [u64; 4], ends: i64| {
        let wait = move || {
            let result = unsafe { libc::syscall(number, args[0], args[1], args[2], args[3]) };
            let error = if result < 0 { std::io::Error::last_os_error().raw_os_error().unwrap_or(0) } else { 0 };
            equal("it", i64::from(error), ends)
        };
        waiter(name, wait, |_| Ok(()))
    };
    waiters.push(times("nanosleep", libc::SYS_nanosleep, [short, short, 0, 0], 0)?);
    waiters.push(times("nanosleep that tells no rest", libc::SYS_nanosleep, [short, 0, 0, 0], 0)?);
    waiters.push(times("clock_nanosleep", libc::SYS_clock_nanosleep, [1, 0, short, 0], 0)?);
    waiters.push(times("poll of nothing", libc::SYS_poll, [0, 0, 4000, 0], 0)?);
    let timeout = i64::from(libc::ETIMEDOUT);
    waiters.push(times("a private futex", libc::SYS_futex, [word as u64, PRIVATE, 0, short], timeout)?);
    for waiter in &waiters {
        for (signal, flag) in [(libc::SIGSTOP, libc::WUNTRACED), (libc::SIGCONT, libc::WCONTINUED)] {
            done("kill", unsafe { libc::kill(waiter.pid, signal) })?;
            done("waitpid", unsafe { libc::waitpid(waiter.pid, std::ptr::null_mut(), flag) })?;
        }
        until_asleep(waiter.pid)?;
    }
    // Some end by themselves meanwhile.
    hold_loosely()?;
    ended(waiters)
}

/// Calls that a byte in a pipe ends. The timeout is in milliseconds.
fn on_a_pipe(timeout: i32) -> Result<Vec<Waiter>, String> {
    let mut waiters = Vec::new();
    let mut add = |name, wait: fn(i32, i32) -> i32| -> Checked {
        let pipe = Gate::new()?;
        let file = pipe.read_end();
        waiters.push(waiter(
            name,
            || done("it", wait(file, timeout)).and_then(|n| equal("it", n, 1)),
            move |_| pipe.open(),
        )?);
        Ok(())
    };
    add("poll", |file, timeout| unsafe { libc::poll(&mut polled(file), 1, timeout) })?;
    add("ppoll", |file, timeout| {
        let set = crate::signals::set(&[libc::SIGUSR1]);
        let time = if timeout < 0 { std::ptr::null() } else { &raw const LONG_SPEC };
        unsafe { libc::ppoll(&mut polled(file), 1, time, &raw const set) }
    })?;
    add("select", |file, timeout| unsafe {
        let mut set: libc::fd_set = std::mem::zeroed();
        libc::FD_SET(file, &mut set);
        let none = std::ptr::null_mut();
        let mut long = LONG;
        libc::select(file + 1, &raw mut set, none, none, if timeout < 0 { std::ptr::null_mut() } else { &raw mut long })
    })?;
    add("pselect", |file, timeout| unsafe {
        let mut set: libc::fd_set = std::mem::zeroed();
        libc::FD_SET(file, &mut set);
        let (none, mask) = (std::ptr::null_mut(), crate::signals::set(&[libc::SIGUSR1]));
        let time = if timeout < 0 { std::ptr::null() } else { &raw const LONG_SPEC };
        libc::pselect(file + 1, &raw mut set, none, none, time, &raw const mask)
    })?;
    add("epoll_wait", |file, timeout| unsafe {
        let (poll, mut event) = (libc::epoll_create1(0), libc::epoll_event { events: libc::EPOLLIN as u32, u64: 1 });
        libc::epoll_ctl(poll, libc::EPOLL_CTL_ADD, file, &raw mut event);
        libc::epoll_wait(poll, &raw mut event, 1, timeout)
    })?;
    if timeout < 0 {
        add("read", |file, _| unsafe { libc::read(file, [0u8; 4].as_mut_ptr().cast(), 4) as i32 })?;
    }
    Ok(waiters)
}

/// Calls that a signal ends; a handler makes them end with EINTR, as it should.
fn on_signals() -> Result<Vec<Waiter>, String> {
    let kill = |signal: i32| move |pid: i32| done("kill", unsafe { libc::kill(pid, signal) }).map(drop);
    let interrupted =
        |result: i32| equal("it", (result, std::io::Error::last_os_error().raw_os_error()), (-1, Some(libc::EINTR)));
    extern "C" fn nothing(_: i32) {}
    let handle = || unsafe { libc::signal(libc::SIGUSR2, nothing as *const () as usize) };
    Ok(vec![
        waiter(
            "pause",
            || {
                handle();
                interrupted(unsafe { libc::pause() })
            },
            kill(libc::SIGUSR2),
        )?,
        waiter(
            "sigwaitinfo",
            || {
                crate::signals::block(&[libc::SIGUSR1]);
                equal("it", crate::signals::wait_for(&[libc::SIGUSR1]), libc::SIGUSR1)
            },
            kill(libc::SIGUSR1),
        )?,
        waiter(
            "epoll_wait with a handler",
            || {
                handle();
                let mut event = libc::epoll_event { events: 0, u64: 0 };
                interrupted(unsafe { libc::epoll_wait(libc::epoll_create1(0), &raw mut event, 1, -1) })
            },
            kill(libc::SIGUSR2),
        )?,
    ])
}

fn futex(word: *mut u32, timeout: u64) -> Result<Waiter, String> {
    let address = word as u64;
    waiter(
        "futex",
        || call("it", libc::SYS_futex, [address, libc::FUTEX_WAIT as u64, 0, timeout]).map(drop),
        move |_| {
            let woken = call("FUTEX_WAKE", libc::SYS_futex, [address, libc::FUTEX_WAKE as u64, 1])?;
            equal("how many were woken", woken, 1)
        },
    )
}

/// Futexes, children, locks, connections, semaphores.
fn on_others() -> Result<Vec<Waiter>, String> {
    let word = crate::memory::shared(crate::memory::PAGE)?.cast::<u32>();
    let child = Gate::new()?;
    let mut waiters = vec![futex(word, 0)?];
    waiters.push(waiter("wait4", || reap(fork(|| child.pass(1))?), move |_| child.open())?);
    waiters.push(lock()?);
    waiters.push(accept()?);
    waiters.push(semaphore()?);
    Ok(waiters)
}

fn lock() -> Result<Waiter, String> {
    let file = std::fs::File::create("/tmp/locked").map_err(|e| e.to_string())?;
    use std::os::fd::AsRawFd;
    done("flock", unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX) })?;
    waiter(
        "flock",
        || {
            let own = std::fs::File::open("/tmp/locked").map_err(|e| e.to_string())?;
            done("it", unsafe { libc::flock(own.as_raw_fd(), libc::LOCK_EX) }).map(drop)
        },
        move |_| done("flock", unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_UN) }).map(drop),
    )
}

fn accept() -> Result<Waiter, String> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").map_err(|e| e.to_string())?;
    let address = listener.local_addr().map_err(|e| e.to_string())?;
    waiter(
        "accept",
        || listener.accept().map(drop).map_err(|e| e.to_string()),
        move |_| std::net::TcpStream::connect(address).map(drop).map_err(|e| e.to_string()),
    )
}

fn semaphore() -> Result<Waiter, String> {
    let id = done("semget", unsafe { libc::semget(libc::IPC_PRIVATE, 1, 0o600) })? as i32;
    let change = move |by: i16| {
        let mut operation = libc::sembuf { sem_num: 0, sem_op: by, sem_flg: 0 };
        done("semop", unsafe { libc::semop(id, &raw mut operation, 1) }).map(drop)
    };
    waiter("semop", move || change(-1), move |_| change(1))
}
