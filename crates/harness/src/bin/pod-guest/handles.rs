//! Handles on processes and threads, among them those that have ended: pidfds, files of `/proc`, root directories there.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd};

use crate::namespaces::become_ordinary;
use crate::stage::*;

pub(crate) const KINDS: &[crate::stage::Kind] = &[
    ("pidfd", pidfd),
    ("pidfd-thread", pidfd_thread),
    ("pidfd-ended", pidfd_ended),
    ("proc-files", proc_files),
    ("proc-half-read", proc_half_read),
    ("proc-ended", proc_ended),
    ("proc-ended-root", proc_ended_root),
];

fn open_pidfd(pid: i32, flags: i32) -> Result<File, String> {
    let number = call("pidfd_open", libc::SYS_pidfd_open, [pid as u64, flags as u64])?;
    Ok(unsafe { File::from_raw_fd(number as i32) })
}

fn is_ready(file: &File) -> bool {
    let mut polled = libc::pollfd { fd: file.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    unsafe { libc::poll(&raw mut polled, 1, 0) == 1 }
}

fn send(file: &File, signal: i32) -> Result<i64, String> {
    let args = [file.as_raw_fd() as u64, signal as u64, 0, 0];
    call("pidfd_send_signal", libc::SYS_pidfd_send_signal, args)
}

/// How `PIDFD_GET_INFO` says that a process ended, if the kernel tells.
fn exit_code(file: &File) -> Option<i32> {
    let mut words = [0u64; 8];
    words[0] = 1 << 3;
    let result = unsafe { libc::ioctl(file.as_raw_fd(), 0xc040_ff0b, words.as_mut_ptr()) };
    (result == 0 && words[0] & 1 << 3 != 0).then_some((words[7] >> 32) as i32)
}

/// Handles on a child, on the parent, on this process.
fn pidfd() -> Checked {
    let (set_up, this) = (Gate::new()?, std::process::id() as i32);
    let own = open_pidfd(this, libc::O_NONBLOCK)?;
    let child = fork(|| {
        let parent = open_pidfd(this, 0)?;
        set_up.open()?;
        await_go();
        check(!is_ready(&parent) && !is_ready(&own), "the parent has ended")?;
        send(&parent, 0).and(send(&own, 0)).map(drop)
    })?;
    let handle = open_pidfd(child, 0)?;
    let ending = fork(|| Ok(()))?;
    let zombie = open_pidfd(ending, 0)?;
    until("a child to end", || is_ready(&zombie))?;
    set_up.pass(1)?;
    hold()?;
    send(&own, 0)?;
    check(is_ready(&zombie), "the ended child is not ready")?;
    reap(ending)?;
    reap(child)?;
    check(is_ready(&handle), "the child has ended and is not ready")
}

/// A handle on a thread that is not its process's first.
fn pidfd_thread() -> Checked {
    let (sender, receiver) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        let _ = sender.send(unsafe { libc::gettid() });
        await_go();
    });
    let tid = receiver.recv().map_err(|e| e.to_string())?;
    let handle = open_pidfd(tid, libc::O_EXCL)?;
    hold()?;
    thread.join().map_err(|_| "the thread failed")?;
    until("the thread's end", || is_ready(&handle))
}

/// Handles on processes that have ended and were reaped.
fn pidfd_ended() -> Checked {
    let well = fork(|| Ok(()))?;
    let killed = fork(|| {
        loop {
            doze();
        }
    })?;
    let handles = [open_pidfd(well, libc::O_NONBLOCK)?, open_pidfd(killed, 0)?];
    done("kill", unsafe { libc::kill(killed, libc::SIGTERM) })?;
    status_of(well)?;
    status_of(killed)?;
    let codes = handles.each_ref().map(exit_code);
    let child = fork(|| {
        await_go();
        equal("ends as told", handles.each_ref().map(exit_code), codes)
    })?;
    hold()?;
    for handle in &handles {
        check(is_ready(handle), "an ended process is not ready")?;
        let error = send(handle, 0).err().unwrap_or_default();
        check(error.contains("os error 3"), format!("a signal to nobody: {error:?}"))?;
    }
    equal("ends as told", handles.each_ref().map(exit_code), codes)?;
    reap(child)
}

/// Files and directories of processes that run, of the kernel, and of threads.
fn proc_files() -> Checked {
    let open = |path: String| File::open(&path).map_err(|e| format!("{path}: {e}"));
    let this = std::process::id();
    let child = fork(|| {
        await_go();
        Ok(())
    })?;
    let [status, other] = [open(format!("/proc/{this}/status"))?, open(format!("/proc/{child}/status"))?];
    let (tasks, uptime) = (open(format!("/proc/{this}/task/{this}"))?, open("/proc/uptime".into())?);
    hold()?;
    for (file, pid) in [(&status, this), (&other, child as u32)] {
        let text = std::io::read_to_string(file).map_err(|e| e.to_string())?;
        check(text.contains(&format!("Pid:\t{pid}\n")), format!("the status of {pid}: {text}"))?;
    }
    check(!std::io::read_to_string(&uptime).unwrap_or_default().is_empty(), "no uptime")?;
    let stat = fs::read_to_string(format!("/proc/self/fd/{}/stat", tasks.as_raw_fd())).map_err(|e| e.to_string())?;
    check(stat.starts_with(&format!("{this} (")), stat)?;
    reap(child)
}

/// Texts of `/proc` of which a part has been read, by another user than root.
fn proc_half_read() -> Checked {
    become_ordinary()?;
    let begin = |path: &'static str| {
        let mut file = File::open(path)?;
        file.read_exact(&mut [0; 60])?;
        Ok((path, file))
    };
    let files: Vec<_> = ["/proc/self/status", "/proc/thread-self/status"]
        .into_iter()
        .map(|path| begin(path).map_err(|e: std::io::Error| format!("{path}: {e}")))
        .collect::<Result<_, _>>()?;
    hold()?;
    let told = |text: &str| -> Vec<String> {
        let lasting = |line: &&str| ["Groups:", "Cap", "NoNewPrivs:"].iter().any(|name| line.starts_with(name));
        text.lines().filter(lasting).map(str::to_owned).collect()
    };
    for (path, file) in files {
        let rest = std::io::read_to_string(file).map_err(|e| e.to_string())?;
        let fresh = fs::read_to_string(path).map_err(|e| e.to_string())?;
        check(told(&fresh).len() > 5, &fresh)?;
        equal(path, told(&rest), told(&fresh))?;
    }
    Ok(())
}

/// Files and directories of a process that has ended.
fn proc_ended() -> Checked {
    let ends = Gate::new()?;
    let child = fork(|| ends.pass(1))?;
    let open = |name: &str| File::open(format!("/proc/{child}/{name}")).map_err(|e| format!("{name}: {e}"));
    let files = [open("status")?, open("")?, open("fdinfo")?, open("task")?];
    ends.open()?;
    reap(child)?;
    let links = || files.each_ref().map(|f| fs::read_link(format!("/proc/self/fd/{}", f.as_raw_fd())).ok());
    let before = links();
    hold()?;
    equal("links", links(), before)?;
    check(std::io::read_to_string(&files[0]).is_err(), "there is a status")?;
    let left = fs::read_dir(format!("/proc/self/fd/{}", files[1].as_raw_fd())).map_or(0, Iterator::count);
    equal("files of the ended", left, 0)
}

/// The root directory of browsers' sandboxes: in `/proc`, of a process that has ended.
fn proc_ended_root() -> Checked {
    let (set_up, go_on) = (Gate::new()?, Gate::new()?);
    let child = fork(|| {
        let flags = libc::CLONE_FS | libc::SIGCHLD;
        let helper = call("clone", libc::SYS_clone, [flags as u64, 0, 0, 0, 0])?;
        if helper == 0 {
            let moved = unsafe { libc::chroot(c"/proc/self/fdinfo".as_ptr()) | libc::chdir(c"/".as_ptr()) };
            unsafe { libc::_exit(moved) };
        }
        reap(helper as i32)?;
        set_up.open()?;
        check(fs::metadata("/etc").is_err(), "there is something in the root directory")?;
        // The driver's word is out of its reach.
        go_on.pass(1)?;
        check(fs::metadata("/etc").is_err(), "there is something in the root directory")
    })?;
    set_up.pass(1)?;
    hold()?;
    go_on.open()?;
    reap(child)
}
