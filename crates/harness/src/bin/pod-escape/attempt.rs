//! One attempt, in a process of its own.

use std::ffi::CString;
use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd};

use harness::escape::Facts;
use nix::errno::Errno;

/// What became of an attempt.
pub(crate) enum Failed {
    /// The kernel refused.
    With(Errno),
    /// It was done, and nothing came of it.
    Nothing,
    /// What it needs first did not work.
    Before(Errno),
}

pub(crate) type Tried = Result<(), Failed>;

/// An attempt and its name.
pub(crate) type Attempt = (&'static str, fn(&Facts, &Kept) -> Tried);

/// What the program has held since it began, across checkpoints.
pub(crate) struct Kept {
    pub(crate) root: File,
    pub(crate) bind: File,
    pub(crate) proc: File,
    pub(crate) namespace: File,
    pub(crate) groups: File,
}

impl Kept {
    pub(crate) fn open(facts: &Facts) -> std::io::Result<Kept> {
        Ok(Kept {
            root: File::open("/")?,
            bind: File::open(&facts.bind)?,
            proc: File::open("/proc")?,
            namespace: File::open("/proc/self/ns/net")?,
            groups: File::open("/sys/fs/cgroup")?,
        })
    }
}

/// The result of a raw call.
pub(crate) fn check(result: i64) -> Result<i64, Failed> {
    if result < 0 { Err(Failed::With(Errno::last())) } else { Ok(result) }
}

/// Likewise, of one that has to work for the attempt to mean anything.
pub(crate) fn prepare(result: i64) -> Result<i64, Failed> {
    if result < 0 { Err(Failed::Before(Errno::last())) } else { Ok(result) }
}

pub(crate) fn io(error: std::io::Error) -> Failed {
    Failed::With(Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))
}

/// A system call with up to six numbers.
pub(crate) fn call(number: i64, arguments: [u64; 6]) -> i64 {
    let [a, b, c, d, e, f] = arguments;
    unsafe { libc::syscall(number, a, b, c, d, e, f) }
}

pub(crate) fn c(text: &str) -> CString {
    CString::new(text).expect("a path without zero")
}

pub(crate) fn own(descriptor: i64) -> OwnedFd {
    unsafe { OwnedFd::from_raw_fd(descriptor as i32) }
}

/// Opens a path and reads from it: what is empty told nothing.
pub(crate) fn read(path: &str) -> Tried {
    let mut file = File::open(path).map_err(io)?;
    match std::io::Read::read(&mut file, &mut [0; 64]).map_err(io)? {
        0 => Err(Failed::Nothing),
        _ => Ok(()),
    }
}

/// Writes to a path that is there.
pub(crate) fn write(path: &str, text: &str) -> Tried {
    let mut file = File::options().write(true).open(path).map_err(io)?;
    std::io::Write::write_all(&mut file, text.as_bytes()).map_err(io)
}

const NOTHING: i32 = 200;
const NOT_TRIED: i32 = 201;
const PANICKED: i32 = 202;

/// Does it in a child, as root or as a user, and says in a word what came of it.
pub(crate) fn outcome(user: Option<u32>, attempt: impl FnOnce() -> Tried) -> String {
    let status = in_child(user, attempt);
    if !libc::WIFEXITED(status) {
        return format!("killed-by-{}", libc::WTERMSIG(status));
    }
    match libc::WEXITSTATUS(status) {
        0 => "DONE".into(),
        NOTHING => "nothing".into(),
        NOT_TRIED => "NOT-TRIED".into(),
        PANICKED => "PANICKED".into(),
        errno => format!("{:?}", Errno::from_raw(errno)),
    }
}

/// Does it in a child that is all that the calling process does from now on: the first one of a namespace, say.
pub(crate) fn delegate(attempt: impl FnOnce() -> Tried) -> Tried {
    match libc::WEXITSTATUS(in_child(None, attempt)) {
        0 => Ok(()),
        errno => Err(Failed::With(Errno::from_raw(errno))),
    }
}

/// The wait status of a child that tries it.
fn in_child(user: Option<u32>, attempt: impl FnOnce() -> Tried) -> i32 {
    let child = unsafe { libc::fork() };
    if child == 0 {
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            if let Some(user) = user {
                become_user(user)?;
            }
            attempt()
        }));
        let code = match done {
            Ok(Ok(())) => 0,
            Ok(Err(Failed::With(errno))) => errno as i32,
            Ok(Err(Failed::Nothing)) => NOTHING,
            Ok(Err(Failed::Before(errno))) => {
                println!("before: {errno}");
                NOT_TRIED
            }
            Err(_) => PANICKED,
        };
        unsafe { libc::_exit(code) }
    }
    let mut status = 0;
    unsafe { libc::waitpid(child, &mut status, 0) };
    status
}

fn become_user(user: u32) -> Tried {
    let groups = [user];
    unsafe {
        prepare(libc::setgroups(1, groups.as_ptr()).into())?;
        prepare(libc::setresgid(user, user, user).into())?;
        prepare(libc::setresuid(user, user, user).into())?;
        // Otherwise a change of user hides it from itself.
        prepare(libc::prctl(libc::PR_SET_DUMPABLE, 1).into())?;
    }
    Ok(())
}
