//! `clone3(2)`.

use std::arch::asm;
use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};

use super::{check, nsfs};
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
    match fork_as(pid, libc::CLONE_PARENT as u64, 0)? {
        0 => wait_for_ever(),
        _ => Ok(()),
    }
}

/// Clones a process with that PID and memory of its own: 0 in the process itself.
///
/// The caller must have one thread.
fn fork_as(pid: PodPid, flags: u64, exit_signal: u64) -> io::Result<u64> {
    let number = pid.0;
    let args =
        CloneArgs { flags, exit_signal, set_tid: &raw const number as u64, set_tid_size: 1, ..CloneArgs::default() };
    // SAFETY: without CLONE_VM the child has memory of its own, and this process has no other thread that could hold a
    // lock; the structure and the number outlive the call.
    when_free(pid, || check(unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()) }))
}

fn wait_for_ever() -> ! {
    loop {
        // SAFETY: touches no memory.
        unsafe { libc::syscall(libc::SYS_pause) };
    }
}

/// A child that only waits: it ends, and has been waited for, when this is dropped.
#[derive(Debug)]
pub struct Helper(i32);

impl Drop for Helper {
    fn drop(&mut self) {
        let mut status = 0;
        // SAFETY: numbers, and an int that the kernel writes; the child is ours and has not been reaped.
        unsafe {
            libc::kill(self.0, libc::SIGKILL);
            libc::waitpid(self.0, &mut status, libc::__WALL);
        }
    }
}

/// Clones a child with that PID, which has copies of the caller's descriptors, whoever may trace the caller's user may fetch,
/// and waits. It ends with the caller.
///
/// The caller must have one thread.
pub fn spawn_helper(pid: PodPid) -> io::Result<Helper> {
    if fork_as(pid, 0, libc::SIGCHLD as u64)? != 0 {
        return Ok(Helper(pid.0));
    }
    // SAFETY: numbers only. (Where the security module Yama is not there, nobody has to be let.)
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0);
        libc::prctl(libc::PR_SET_PTRACER, libc::PR_SET_PTRACER_ANY, 0, 0, 0);
    }
    wait_for_ever()
}

/// Runs `work` in a process of its own with that PID, which shares the caller's descriptors and memory, and waits for its
/// end. `EEXIST`: there is such a process.
///
/// It is made as `vfork` makes one: the calling thread stands still meanwhile, and no page table is copied. What `work` does
/// to itself (user, directory, root) is its own; namespaces of users it cannot change.
pub fn in_process(pid: PodPid, work: &dyn Fn() -> io::Result<()>) -> io::Result<()> {
    let mut errand = Errand { work, result: Ok(()) };
    let child = when_free(pid, || sharing_process(pid, &mut errand))?;
    ended_well(child as i32)?;
    errand.result
}

/// Has a process with that number run an errand; it has ended when this returns, and is to be waited for.
fn sharing_process(pid: PodPid, errand: &mut Errand<'_>) -> io::Result<u64> {
    /// More than helpers need, in 16-byte words.
    const STACK: usize = 16 << 10;
    let number = pid.0;
    let mut stack: Vec<u128> = Vec::with_capacity(STACK);
    let args = CloneArgs {
        flags: (libc::CLONE_FILES | libc::CLONE_VM | libc::CLONE_VFORK) as u64,
        exit_signal: libc::SIGCHLD as u64,
        stack: stack.as_mut_ptr() as u64,
        stack_size: (STACK * size_of::<u128>()) as u64,
        set_tid: &raw const number as u64,
        set_tid_size: 1,
        ..CloneArgs::default()
    };
    // SAFETY: stack, errand and arguments outlive the child, since this thread goes on when the child has ended.
    unsafe { clone_for(&args, errand) }
}

/// What a helper with the caller's memory is to do, and how that went.
struct Errand<'a> {
    work: &'a dyn Fn() -> io::Result<()>,
    result: io::Result<()>,
}

extern "C" fn run(errand: *mut Errand<'_>) -> ! {
    // SAFETY: the caller of `clone_for` sees to it that it lives, and stands still meanwhile.
    unsafe {
        (*errand).result = ((*errand).work)();
        libc::_exit(0)
    }
}

/// Clones a child that runs an errand on a stack of its own and ends. `libc::syscall` cannot: it would return there.
///
/// # Safety
///
/// `args` must ask for `CLONE_VM` and `CLONE_VFORK`, with a stack whose end is a multiple of 16.
unsafe fn clone_for(args: &CloneArgs, errand: *mut Errand<'_>) -> io::Result<u64> {
    let result: i64;
    // SAFETY: the child leaves this function by `run` alone, which does not return; the parent comes back with its own
    // stack and registers, but for those that a system call may change.
    unsafe {
        asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, r12",
            "call r13",
            "ud2",
            "2:",
            inlateout("rax") libc::SYS_clone3 => result,
            in("rdi") args,
            in("rsi") size_of::<CloneArgs>(),
            in("r12") errand,
            in("r13") run as extern "C" fn(*mut Errand<'_>) -> !,
            out("rcx") _,
            out("r11") _,
        );
    }
    if result < 0 { Err(io::Error::from_raw_os_error(-result as i32)) } else { Ok(result as u64) }
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

/// Runs `work` in a process that has one of the highest numbers of the PID namespace of `namespace`, as [`in_process`] does:
/// what the kernel tells of processes it tells in numbers of that namespace. The caller is in another from now on, as
/// far as its children are concerned.
pub fn in_pid_namespace(namespace: impl AsFd, work: &dyn Fn() -> io::Result<()>) -> io::Result<()> {
    const HIGHEST: i32 = 32_767;
    const TRIED: i32 = 64;
    nsfs::enter(namespace, libc::CLONE_NEWPID)?;
    let mut errand = Errand { work, result: Ok(()) };
    let made = (HIGHEST - TRIED..=HIGHEST).rev().map(PodPid).map(|number| sharing_process(number, &mut errand));
    // The number that comes next there stays the same, whichever is taken here.
    let free = made.into_iter().find(|made| !made.as_ref().is_err_and(|e| e.raw_os_error() == Some(libc::EEXIST)));
    ended_well(free.unwrap_or_else(|| Err(io::Error::from_raw_os_error(libc::EEXIST)))? as i32)?;
    errand.result
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
fn when_free(pid: PodPid, mut clone: impl FnMut() -> io::Result<u64>) -> io::Result<u64> {
    loop {
        match clone() {
            Err(e) if e.raw_os_error() == Some(libc::EEXIST) && !is_taken(pid) => std::thread::yield_now(),
            result => return result,
        }
    }
}

/// Whether there is a process or thread with that number.
pub fn is_taken(pid: PodPid) -> bool {
    // SAFETY: signal zero only asks.
    unsafe { libc::kill(pid.0, 0) == 0 || *libc::__errno_location() != libc::ESRCH }
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

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;
    use std::sync::Mutex;

    use super::*;

    /// The number of a process that has ended.
    fn free_number() -> PodPid {
        let mut child = Command::new("true").spawn().unwrap();
        let number = child.id() as i32;
        assert_eq!(child.wait().unwrap().into_raw(), 0);
        PodPid(number)
    }

    #[test]
    fn a_helper_has_the_number_that_was_asked_for_and_the_callers_memory() {
        let number = free_number();
        let seen = Mutex::new(Vec::new());
        let note = || {
            // SAFETY: asks for a number; the library's own notion is the parent's.
            seen.lock().unwrap().push(unsafe { libc::syscall(libc::SYS_getpid) });
            Ok(())
        };
        in_process(number, &note).unwrap();
        in_process(number, &note).unwrap();
        assert_eq!(seen.into_inner().unwrap(), [i64::from(number.0); 2]);
    }

    #[test]
    fn the_error_of_a_helper_is_the_callers_and_its_changes_are_not() {
        let user = || nix::unistd::geteuid().as_raw();
        let before = user();
        let act = || {
            super::super::ipc::act_as(65534, 65534)?;
            std::fs::read("/etc/shadow").map(drop).map_err(|e| io::Error::other(format!("said {e}")))
        };
        let error = in_process(free_number(), &act).unwrap_err();
        assert!(error.to_string().starts_with("said "), "{error}");
        assert_eq!(user(), before);
        let taken = in_process(PodPid(1), &|| Ok(())).unwrap_err();
        assert_eq!(taken.raw_os_error(), Some(libc::EEXIST));
    }
}
