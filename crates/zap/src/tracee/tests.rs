//! Holding real processes.

use std::process::{Child, Command, Stdio};

use crate::ids::{HostPid, PodPid};
use crate::memory;
use crate::process::hold;
use crate::sys::ptrace;
use crate::tracee::{Batch, Ground, Held, Site, ThreadName, seize};

struct Victim(Child);

impl Victim {
    fn start(program: &str, args: &[&str]) -> Victim {
        Victim(Command::new(program).args(args).stdout(Stdio::piped()).spawn().unwrap())
    }

    fn name(&self) -> ThreadName {
        let pid = self.0.id() as i32;
        ThreadName { host: HostPid(pid), pod: PodPid(pid), own: (pid, pid) }
    }

    fn maps(&self) -> Vec<u8> {
        std::fs::read(self.name().host.proc("maps")).unwrap()
    }

    fn wait_until_asleep_in(&self, call: libc::c_long) {
        self.wait_until("syscall", |text| text.starts_with(&format!("{call} ")));
    }

    /// A thread can be joined a moment before the kernel lets go of its tracees.
    fn wait_until_let_go(&self) {
        self.wait_until("status", |text| text.contains("TracerPid:\t0\n"));
    }

    fn wait_until(&self, file: &str, holds: impl Fn(&str) -> bool) {
        let path = self.name().host.proc(file);
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while !holds(&std::fs::read_to_string(&path).unwrap()) {
            assert!(std::time::Instant::now() < deadline);
            std::thread::yield_now();
        }
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn prepare(held: &mut Held) -> Ground {
    let host = held.name.host;
    let layout = memory::mappings(host).unwrap();
    let site = Site::find((host, held.name.pod), hold::vdso_of(&layout).unwrap()).unwrap();
    Ground::prepare(held, site, hold::gap(&layout, 1 << 16).unwrap(), 1 << 12, libc::SIGURG).unwrap()
}

#[test]
fn a_batch_runs_and_leaves_nothing() {
    let victim = Victim::start("sleep", &["3"]);
    victim.wait_until_asleep_in(libc::SYS_clock_nanosleep);
    let before = victim.maps();
    let mut held = seize(victim.name(), ptrace::SUSPEND_SECCOMP).unwrap().wait().unwrap();
    let ground = prepare(&mut held);
    let mut batch = Batch::new();
    let pid = batch.call(libc::SYS_getpid, [], "asking for the pid");
    let again = batch.call(libc::SYS_getpgid, [crate::tracee::Arg::ResultOf(pid)], "asking for the group");
    let name = batch.output(16);
    batch.call(libc::SYS_prctl, [libc::PR_GET_NAME.into(), name.into()], "asking for the name");
    let failing = batch.attempt(libc::SYS_close, [(-1i32).into()]);
    let results = held.run(&ground, 0, &batch).unwrap();
    assert_eq!(results.get(pid), i64::from(victim.name().host.0));
    assert!(results.get(again) > 0);
    assert_eq!(&results.output(name)[..6], b"sleep\0");
    assert_eq!(results.get(failing), -i64::from(libc::EBADF));
    ground.clear(&mut held).unwrap();
    held.let_go().unwrap();
    assert_eq!(before, victim.maps());
    let mut victim = victim;
    assert!(victim.0.wait().unwrap().success());
}

#[test]
fn a_failing_call_ends_the_batch_and_is_named() {
    let victim = Victim::start("sleep", &["1000"]);
    let mut held = seize(victim.name(), 0).unwrap().wait().unwrap();
    let ground = prepare(&mut held);
    let mut batch = Batch::new();
    batch.call(libc::SYS_getpid, [], "asking for the pid");
    batch.call(libc::SYS_fchdir, [(-1i32).into()], "changing to nowhere");
    batch.call(libc::SYS_exit_group, [1i32.into()], "never reached");
    let error = held.run(&ground, 0, &batch).unwrap_err();
    assert!(error.to_string().contains("changing to nowhere"), "{error}");
    ground.clear(&mut held).unwrap();
    held.let_go().unwrap();
}

#[test]
fn an_orphan_walks_home() {
    // The shell checks itself: its loop must go on, until it is told to end it, and have the right sum then.
    let script = "trap over=1 USR1; echo ready; i=0; s=0; while [ -z $over ]; do i=$((i+1)); s=$((s+i)); done; \
                  echo $((2*s - i*(i+1)))";
    let mut victim = Victim::start("sh", &["-c", script]);
    let mut output = std::io::BufReader::new(victim.0.stdout.take().unwrap());
    let mut ready = String::new();
    std::io::BufRead::read_line(&mut output, &mut ready).unwrap();
    assert_eq!(ready, "ready\n");
    for _ in 0..20 {
        let name = victim.name();
        // The end of the tracing thread in the middle of a batch lets go of the tracee.
        std::thread::spawn(move || {
            let mut held = seize(name, 0).unwrap().wait().unwrap();
            let vdso = hold::vdso_of(&memory::mappings(name.host).unwrap()).unwrap();
            if let Some(stub) = Site::find((name.host, name.pod), vdso).unwrap().left_behind() {
                held = held.finish_way_home(&stub).unwrap();
            }
            let ground = prepare(&mut held);
            let mut batch = Batch::new();
            (0..50).for_each(|_| {
                batch.call(libc::SYS_getppid, [], "");
            });
            held.begin(&ground, 0, &batch).unwrap();
        })
        .join()
        .unwrap();
        victim.wait_until_let_go();
    }
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(victim.name().host.0), nix::sys::signal::SIGUSR1).unwrap();
    let mut difference = String::new();
    std::io::Read::read_to_string(&mut output, &mut difference).unwrap();
    assert_eq!(difference, "0\n");
    assert!(victim.0.wait().unwrap().success());
}

#[test]
fn a_sleep_goes_on_with_what_remained() {
    let begin = std::time::Instant::now();
    let mut victim = Victim::start("sleep", &["2"]);
    for _ in 0..5 {
        let mut held = seize(victim.name(), 0).unwrap().wait().unwrap();
        let ground = prepare(&mut held);
        let mut batch = Batch::new();
        batch.call(libc::SYS_getpid, [], "asking for the pid");
        held.run(&ground, 0, &batch).unwrap();
        ground.clear(&mut held).unwrap();
        held.let_go().unwrap();
    }
    assert!(victim.0.wait().unwrap().success());
    assert!(begin.elapsed() >= std::time::Duration::from_secs(2));
}

/// The program of the next test: its first thread waits for another.
#[test]
fn a_victim_with_threads() {
    if std::env::var_os("ZAP_TEST_VICTIM").is_some() {
        println!("ready");
        std::thread::sleep(std::time::Duration::from_secs(60));
    }
}

#[test]
fn the_end_of_a_process_with_threads_is_noticed_in_a_batch() {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "tracee::tests::a_victim_with_threads", "--nocapture", "--test-threads=2"]);
    let mut victim = Victim(command.env("ZAP_TEST_VICTIM", "1").stdout(Stdio::piped()).spawn().unwrap());
    let mut output = std::io::BufReader::new(victim.0.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains("ready") {
        line.clear();
        assert_ne!(std::io::BufRead::read_line(&mut output, &mut line).unwrap(), 0, "it has ended");
    }
    let name = victim.name();
    let threads: Vec<i32> = std::fs::read_dir(name.host.proc("task"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_str().unwrap().parse().unwrap())
        .collect();
    assert!(threads.len() > 1, "{threads:?}");
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let of = |tid: i32| ThreadName { host: HostPid(tid), pod: PodPid(tid), own: (name.host.0, tid) };
        let seized: Vec<_> = threads.iter().map(|tid| seize(of(*tid), 0).unwrap()).collect();
        let mut held: Vec<Held> = seized.into_iter().map(|seized| seized.wait().unwrap()).collect();
        let leader = held.iter_mut().find(|held| held.name == name).unwrap();
        let ground = prepare(leader);
        let mut batch = Batch::new();
        let second = batch.bytes(&[5u64.to_ne_bytes(), 0u64.to_ne_bytes()].concat());
        batch.call(libc::SYS_nanosleep, [second, 0u64.into()], "sleeping");
        leader.begin(&ground, 0, &batch).unwrap();
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(name.host.0), nix::sys::signal::SIGKILL).unwrap();
        let _ = sender.send(leader.finish(&ground, 0, &batch).map(drop));
    });
    let ended = receiver.recv_timeout(std::time::Duration::from_secs(120)).expect("it waits for ever");
    assert!(matches!(ended, Err(crate::tracee::TraceeError::Died(_))), "{ended:?}");
}
