//! `clone3(2)`.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

use super::check;
use crate::ids::PodPid;

/// `struct clone_args` of the kernel, as far as it is used.
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// Clones a seed: a sibling of the caller (`CLONE_PARENT`) with that PID, which only waits for its tracer.
///
/// The caller must have one thread.
pub fn spawn_seed(pid: PodPid) -> io::Result<()> {
    let number = pid.0;
    let args = CloneArgs {
        flags: libc::CLONE_PARENT as u64,
        set_tid: &raw const number as u64,
        set_tid_size: 1,
        ..CloneArgs::default()
    };
    // SAFETY: without CLONE_VM the child has memory of its own, and this process has no other thread that could hold a
    // lock; the structure and the number outlive the call.
    let result =
        when_free(pid, || check(unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()) }))?;
    if result == 0 {
        loop {
            // SAFETY: touches no memory.
            unsafe { libc::syscall(libc::SYS_pause) };
        }
    }
    Ok(())
}

/// Runs `work` in a process of its own with that PID, which shares the caller's descriptors but not its memory, and
/// waits for its end. `EEXIST`: there is such a process.
///
/// What `work` does must not allocate, as another thread of the caller may have been doing so.
pub fn in_process(pid: PodPid, work: &dyn Fn() -> io::Result<()>) -> io::Result<()> {
    let number = pid.0;
    let args = CloneArgs {
        flags: libc::CLONE_FILES as u64,
        exit_signal: libc::SIGCHLD as u64,
        set_tid: &raw const number as u64,
        set_tid_size: 1,
        ..CloneArgs::default()
    };
    // SAFETY: without CLONE_VM the child has memory of its own, and it only does what the caller promises to be harmless
    // in the child of a process with several threads; the structure and the number outlive the call.
    let child =
        when_free(pid, || check(unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()) }))?;
    if child == 0 {
        let code = work().err().map_or(0, |e| e.raw_os_error().unwrap_or(libc::EIO));
        // SAFETY: ends the child without running anything of the parent's.
        unsafe { libc::_exit(code) };
    }
    ended_well(child as i32)
}

/// Waits for the end of a helper.
fn ended_well(child: i32) -> io::Result<()> {
    let mut status = 0;
    // SAFETY: the kernel writes one int.
    check(unsafe { libc::waitpid(child, &mut status, libc::__WALL) }.into())?;
    match (libc::WIFEXITED(status), libc::WEXITSTATUS(status)) {
        (true, 0) => Ok(()),
        (true, code) => Err(io::Error::from_raw_os_error(code)),
        (false, _) => Err(io::Error::other("a helper process was killed")),
    }
}

/// Runs `work` in a process of its own, which shares the caller's descriptors but not its memory, and waits for its end;
/// the error number that it ended with is the error.
///
/// Where the caller is not its process's only thread, what `work` does must not allocate.
pub fn in_child(work: &dyn Fn() -> io::Result<()>) -> io::Result<()> {
    let args = CloneArgs { flags: libc::CLONE_FILES as u64, exit_signal: libc::SIGCHLD as u64, ..CloneArgs::default() };
    // SAFETY: without CLONE_VM the child has memory of its own, and the caller promises that it only does what is harmless
    // there; the structure outlives the call.
    let child = check(unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()) })?;
    if child == 0 {
        let code = work().err().map_or(0, |e| e.raw_os_error().unwrap_or(libc::EIO));
        // SAFETY: ends the child without running anything of the parent's.
        unsafe { libc::_exit(code) };
    }
    ended_well(child as i32)
}

/// Runs `act` while there is a child in a new user namespace, which does nothing; with its PID.
pub fn beside_new_user_namespace<T>(act: impl FnOnce(i32) -> io::Result<T>) -> io::Result<T> {
    let args = CloneArgs {
        flags: (libc::CLONE_FILES | libc::CLONE_NEWUSER) as u64,
        exit_signal: libc::SIGCHLD as u64,
        ..CloneArgs::default()
    };
    // SAFETY: without CLONE_VM the child has memory of its own; the structure outlives the call.
    let child = check(unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()) })?;
    if child == 0 {
        loop {
            // SAFETY: touches no memory.
            unsafe { libc::syscall(libc::SYS_pause) };
        }
    }
    let result = act(child as i32);
    // SAFETY: numbers, and an int that the kernel writes; the child is ours and has not been reaped.
    unsafe {
        let mut status = 0;
        libc::kill(child as i32, libc::SIGKILL);
        libc::waitpid(child as i32, &mut status, libc::__WALL);
    }
    result
}

/// A handle on a process that has ended, with the status that `wait` would have given.
pub fn ended(status: i32) -> io::Result<OwnedFd> {
    let mut handle: i32 = -1;
    let args = CloneArgs {
        flags: libc::CLONE_PIDFD as u64,
        pidfd: &raw mut handle as u64,
        exit_signal: libc::SIGCHLD as u64,
        ..CloneArgs::default()
    };
    // SAFETY: without CLONE_VM the child has memory of its own, and it only makes system calls; the kernel writes one int.
    let child = check(unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()) })?;
    if child == 0 {
        end(status)
    }
    // SAFETY: a new descriptor, which nobody else owns.
    let handle = unsafe { OwnedFd::from_raw_fd(handle) };
    // SAFETY: the child is ours; no status is wanted.
    check(unsafe { libc::waitpid(child as i32, std::ptr::null_mut(), libc::__WALL) }.into())?;
    Ok(handle)
}

/// Ends the calling process, a child that has only just been made, with that status.
fn end(status: i32) -> ! {
    let signal = status & 0x7f;
    let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: system calls on memory of this function, in a process that nobody else runs in.
    unsafe {
        if signal != 0 {
            let mut all = std::mem::zeroed::<libc::sigset_t>();
            libc::setrlimit(libc::RLIMIT_CORE, &raw const none);
            libc::signal(signal, libc::SIG_DFL);
            libc::sigemptyset(&raw mut all);
            libc::sigprocmask(libc::SIG_SETMASK, &raw const all, std::ptr::null_mut());
            libc::kill(libc::getpid(), signal);
        }
        libc::_exit(status >> 8 & 0xff)
    }
}

/// Clones again while the number is one that nobody has any more: a thread that was joined, or a child that was reaped,
/// is gone a moment before the kernel gives its number back.
fn when_free(pid: PodPid, clone: impl Fn() -> io::Result<u64>) -> io::Result<u64> {
    let taken = || {
        // SAFETY: signal zero only asks whether there is such a process or thread.
        unsafe { libc::kill(pid.0, 0) == 0 || *libc::__errno_location() != libc::ESRCH }
    };
    loop {
        match clone() {
            Err(e) if e.raw_os_error() == Some(libc::EEXIST) && !taken() => std::thread::yield_now(),
            result => return result,
        }
    }
}

/// Runs `work` in a thread, which may take another namespace, directory or user for itself, and waits until it is gone:
/// a process of a pod that is being rebuilt may need its number.
pub fn in_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    let numbered = || (nix::unistd::gettid(), work());
    let joined = std::thread::scope(|scope| scope.spawn(numbered).join());
    let (number, result) = joined.map_err(|_| io::Error::other("a thread panicked"))?;
    // A thread is joined when it says so on its way out.
    let task = format!("/proc/self/task/{number}");
    while std::fs::exists(&task)? {
        std::thread::yield_now();
    }
    result
}
