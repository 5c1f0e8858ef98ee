//! Waiting for the driver, checking, and children that check themselves.

use std::fmt::Debug;
use std::io::Write;
use std::path::Path;

use crate::portrait;

/// Nothing, or what differs.
pub(crate) type Checked = Result<(), String>;

/// A kind of thing to check: its name, and the program that sets it up and checks it.
pub(crate) type Kind = (&'static str, fn() -> Checked);

/// The driver's word.
const GO: &str = "/tmp/go";
/// This program's own word to its threads and children, once it has seen that nothing has changed.
pub(crate) const ON: &str = "/tmp/on";

pub(crate) fn equal<T: PartialEq + Debug>(what: &str, now: T, before: T) -> Checked {
    if now == before { Ok(()) } else { Err(format!("{what}: {now:?}, not {before:?}")) }
}

pub(crate) fn check(holds: bool, what: impl Into<String>) -> Checked {
    if holds { Ok(()) } else { Err(what.into()) }
}

/// The result of a call that says -1 when it fails.
pub(crate) fn done(what: &str, result: impl Into<i64>) -> Result<i64, String> {
    match result.into() {
        -1 => Err(format!("{what}: {}", std::io::Error::last_os_error())),
        result => Ok(result),
    }
}

/// A raw system call; an error names `what`.
pub(crate) fn call<const N: usize>(what: &str, number: libc::c_long, args: [u64; N]) -> Result<i64, String> {
    let mut all = [0u64; 6];
    all[..N].copy_from_slice(&args);
    let [a, b, c, d, e, f] = all;
    done(what, unsafe { libc::syscall(number, a, b, c, d, e, f) })
}

pub(crate) fn read(path: impl AsRef<Path>) -> Result<String, String> {
    let path = path.as_ref();
    let bytes = std::fs::read(path).map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

pub(crate) fn write(path: impl AsRef<Path>, text: impl AsRef<[u8]>) -> Checked {
    let path = path.as_ref();
    std::fs::write(path, text).map_err(|e| format!("{}: {e}", path.display()))
}

/// Waits until the driver says go. Everything that `/proc` shows of every process must be as it was.
pub(crate) fn hold() -> Checked {
    let before = portrait::settled()?;
    await_driver();
    let after = portrait::take()?;
    write(ON, "")?;
    portrait::compare(&before, &after)
}

/// The same for what changes by itself.
pub(crate) fn hold_loosely() -> Checked {
    hold_and(|| Ok(()))
}

/// The same, with a look at what may have changed before threads and children go on.
pub(crate) fn hold_and(look: impl FnOnce() -> Checked) -> Checked {
    await_driver();
    let result = look();
    write(ON, "")?;
    result
}

/// The same, with a child that has set something up.
pub(crate) fn hold_loosely_beside(set_up: impl FnOnce() -> Checked) -> Checked {
    let ready = Gate::new()?;
    let child = fork(|| {
        set_up()?;
        ready.open()?;
        await_go();
        Ok(())
    })?;
    ready.pass(1)?;
    hold_loosely()?;
    reap(child)
}

fn await_driver() {
    println!("ready");
    let _ = std::io::stdout().flush();
    while !Path::new(GO).exists() {
        doze();
    }
}

/// Waits, in a thread or child, until this program goes on.
pub(crate) fn await_go() {
    while !Path::new(ON).exists() {
        doze();
    }
}

/// A poll of something that cannot be waited for.
pub(crate) fn doze() {
    std::thread::sleep(std::time::Duration::from_millis(5));
}

/// Waits for `condition`, at most some minutes.
pub(crate) fn until(what: &str, mut condition: impl FnMut() -> bool) -> Checked {
    for _ in 0..24_000 {
        if condition() {
            return Ok(());
        }
        doze();
    }
    Err(format!("waited in vain for {what}"))
}

/// Forks a child that ends with 0 if all is well there.
pub(crate) fn fork(body: impl FnOnce() -> Checked) -> Result<i32, String> {
    match done("fork", unsafe { libc::fork() })? {
        0 => leave(body()),
        pid => Ok(pid as i32),
    }
}

/// The end of a child.
pub(crate) fn leave(result: Checked) -> ! {
    let code = match result {
        Ok(()) => 0,
        Err(differs) => {
            println!("process {}: {differs}", std::process::id());
            let _ = std::io::stdout().flush();
            1
        }
    };
    unsafe { libc::_exit(code) }
}

/// Waits for a child; gives its status.
pub(crate) fn status_of(pid: i32) -> Result<i32, String> {
    let mut status = 0;
    done("waitpid", unsafe { libc::waitpid(pid, &raw mut status, libc::__WALL) })?;
    Ok(status)
}

/// Waits for a child that must be well.
pub(crate) fn reap(pid: i32) -> Checked {
    equal(&format!("the status of process {pid}"), status_of(pid)?, 0)
}

/// A pipe for words between relatives.
#[derive(Clone, Copy)]
pub(crate) struct Gate {
    ends: [i32; 2],
}

impl Gate {
    pub(crate) fn new() -> Result<Gate, String> {
        let mut ends = [0; 2];
        done("pipe", unsafe { libc::pipe(ends.as_mut_ptr()) })?;
        Ok(Gate { ends })
    }

    /// Lets one who waits through.
    pub(crate) fn open(&self) -> Checked {
        done("write", unsafe { libc::write(self.ends[1], b"x".as_ptr().cast(), 1) } as i64).map(drop)
    }

    /// Waits for `count` openings.
    pub(crate) fn pass(&self, count: usize) -> Checked {
        let mut byte = 0u8;
        for _ in 0..count {
            let read = done("read", unsafe { libc::read(self.ends[0], (&raw mut byte).cast(), 1) } as i64)?;
            equal("bytes from a relative", read, 1)?;
        }
        Ok(())
    }

    pub(crate) fn read_end(&self) -> i32 {
        self.ends[0]
    }
}

/// Waits until a process sleeps in a call: what is to be interrupted has begun.
pub(crate) fn until_asleep(pid: i32) -> Checked {
    until("a process to fall asleep", || {
        let stat = read(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('S'))
    })
}
