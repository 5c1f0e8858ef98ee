//! Pods from the outside: run, exec, exit codes, terminals, suspending, removal, and the death of monitors.

#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::io::Write;
use std::process::Stdio;

use common::{Host, eventually, finish, kill};

#[test]
fn run_shows_output_and_ends_with_the_commands_code() {
    let host = Host::new();
    let done = host.run(["run", "--net", "private", "--", "sh", "-c", "echo out; echo err >&2; exit 7"]);
    assert_eq!((done.code, done.stdout.as_str(), done.stderr.as_str()), (7, "out\n", "err\n"));
    let done = host.run(["run", "--net", "private", "--", "sh", "-c", "kill -9 $$"]);
    assert_eq!(done.code, 137);
}

#[test]
fn a_command_that_cannot_run_leaves_nothing() {
    let host = Host::new();
    let done = host.run(["run", "--net", "private", "--", "no-such-command"]);
    assert_eq!(done.code, 127, "{done:?}");
    assert!(done.stderr.contains("no-such-command: No such file or directory"), "{done:?}");
    assert_eq!(host.run(["run", "--net", "private", "--", "/etc/passwd"]).code, 126);
    let done = host.run(["run", "--net", "private", "-w", "/no/such/place", "--", "true"]);
    assert_eq!((done.code, done.stderr.lines().count()), (125, 1), "{done:?}");
    assert_eq!(host.json(["ls", "--json"]), serde_json::json!([]));
    assert!(host.cgroups().is_empty());
}

#[test]
fn names_and_usage_have_their_codes() {
    let host = Host::new();
    assert_eq!(host.start(["-n", "one", "--", "sleep", "1000"]), "one");
    assert_eq!(host.run(["run", "-d", "--net", "private", "-n", "one", "--", "true"]).code, 6);
    assert_eq!(host.run(["exec", "two", "true"]).code, 6);
    for command in ["ps", "logs", "attach", "wait", "kill", "stop", "rm", "suspend", "resume", "inspect"] {
        assert_eq!(host.run([command, "two"]).code, 6, "{command}");
    }
    assert_eq!(host.run(["run", "--no-such-flag"]).code, 2);
    assert_eq!(host.run(["run", "-n", "../x", "--", "true"]).code, 2);
    assert_eq!(host.run(["run", "--net", "private", "-w", "relative", "--", "true"]).code, 2);
}

#[test]
fn input_reaches_the_command_and_so_does_its_end() {
    let host = Host::new();
    let mut run = host.zap(["run", "-i", "--rm", "--net", "private", "--", "wc", "-c"]);
    let mut child = run.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let text = vec![b'x'; 3_000_000];
    child.stdin.take().unwrap().write_all(&text).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "3000000");
    // Without -i there is no input at all.
    let mut run = host.zap(["run", "--rm", "--net", "private", "--", "cat"]);
    assert_eq!(finish(run.stdin(Stdio::piped())).stdout, "");
}

#[test]
fn a_terminal_is_one_inside() {
    let host = Host::new();
    let mut run = host.zap(["run", "-it", "--rm", "--net", "private", "--", "sh"]);
    let mut child = run.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"tty; echo console $(readlink /dev/console); exit 5\n").unwrap();
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("/dev/pts/0") && text.contains("console pts/0"), "{text}");
    assert_eq!(output.status.code(), Some(5));
}

#[test]
fn the_end_of_input_is_typed_into_a_terminal() {
    let host = Host::new();
    let mut run = host.zap(["run", "-it", "--rm", "--net", "private", "--", "cat"]);
    let mut child = run.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"half a line").unwrap();
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(0));
}

#[test]
fn exec_has_its_own_files_and_code() {
    let host = Host::new();
    let pod = host.start(["-e", "A=1", "-e", "B=2", "--", "sleep", "1000"]);
    assert_eq!(host.run(["exec", &pod, "sh", "-c", "exit 9"]).code, 9);
    assert_eq!(host.run(["exec", &pod, "nonsense"]).code, 127);
    assert_eq!(host.ok(["exec", "-e", "B=3", &pod, "sh", "-c", "echo $A $B"]), "1 3");
    assert_eq!(host.ok(["exec", "-u", "nobody", "-w", "/tmp", &pod, "sh", "-c", "id -un; pwd"]), "nobody\n/tmp");
    assert!(host.ok(["exec", "-t", &pod, "tty"]).starts_with("/dev/pts/"));
    // A command that leaves children behind does not keep exec waiting for long, nor lose output.
    assert_eq!(host.ok(["exec", &pod, "sh", "-c", "sleep 1000 & echo done"]), "done");
}

#[test]
fn names_inside_are_the_pods_own() {
    let host = Host::new();
    let pod = host.start(["-n", "me", "--hostname", "inner", "--", "sleep", "1000"]);
    assert_eq!(host.ok(["exec", &pod, "cat", "/proc/2/comm"]), "sleep");
    assert_eq!(host.ok(["exec", &pod, "hostname"]), "inner");
    assert_eq!(host.ok(["exec", &pod, "ls", "/run"]), "lock");
    assert_eq!(host.ok(["exec", &pod, "cat", "/proc/self/cgroup"]).lines().last(), Some("0::/"));
    let ps = host.json(["ps", "--json", &pod]);
    assert_eq!((ps[0]["pid"].as_i64(), ps[1]["pid"].as_i64(), ps[1]["ppid"].as_i64()), (Some(1), Some(2), Some(1)));
    assert_eq!(ps[1]["command"], serde_json::json!(["sleep", "1000"]));
    let row = host.row(&pod);
    assert_eq!((row["state"].as_str(), row["processes"].as_i64()), (Some("running"), Some(1)));
    assert_eq!(row["init_pid"], ps[0]["host_pid"]);
}

#[test]
fn pid_1_cannot_be_looked_into_or_killed() {
    let host = Host::new();
    let pod = host.start(["--", "sleep", "1000"]);
    for look in [
        "readlink /proc/1/exe",
        "cat /proc/1/environ",
        "readlink /proc/1/fd/4",
        "cat </proc/1/fd/1",
        "ls /proc/1/root/",
        "cat /proc/1/maps",
    ] {
        let done = host.run(["exec", &pod, "sh", "-c", look]);
        assert_ne!(done.code, 0, "{look}: {done:?}");
    }
    assert_eq!(host.ok(["exec", &pod, "sh", "-c", "tr -d '\\0' </proc/1/cmdline"]), "zap-init");
    host.run(["exec", &pod, "sh", "-c", "kill -9 1"]);
    assert_eq!(host.row(&pod)["state"], "running");
}

#[test]
fn what_a_pod_writes_stays_in_it() {
    let host = Host::new();
    let root = host.path("root");
    std::fs::create_dir_all(root.join("etc")).unwrap();
    let shared = host.path("shared");
    std::fs::create_dir_all(&shared).unwrap();
    std::fs::write(shared.join("in"), "outside").unwrap();
    let bind = format!("{}:/mnt/shared", shared.display());
    let bind_ro = format!("{}:/mnt/fixed:ro", shared.display());
    let pod = host.start(["--bind", &bind, "--bind", &bind_ro, "--", "sleep", "1000"]);
    host.ok([
        "exec",
        &pod,
        "sh",
        "-c",
        "echo x >/zap-test-file && mkdir /zap-test-dir && mv /zap-test-dir /zap-test-2",
    ]);
    assert!(!std::path::Path::new("/zap-test-file").exists());
    assert_eq!(host.ok(["exec", &pod, "cat", "/mnt/shared/in"]), "outside");
    host.ok(["exec", &pod, "sh", "-c", "echo inside >/mnt/shared/out"]);
    assert_eq!(std::fs::read_to_string(shared.join("out")).unwrap(), "inside\n");
    assert_ne!(host.run(["exec", &pod, "sh", "-c", "echo x >/mnt/fixed/out"]).code, 0);
    assert_ne!(host.run(["exec", &pod, "sh", "-c", "echo c >/proc/sysrq-trigger"]).code, 0);
    // Neither zap's own files nor the host's other pods are to be seen.
    let state = host.state();
    let seen = host.run(["exec", &pod, "ls", state.to_str().unwrap()]);
    assert!(seen.code != 0 || seen.stdout.is_empty(), "{seen:?}");
}

#[test]
fn a_suspended_pod_stands_still() {
    let host = Host::new();
    // It counts in a file of the host's: what it prints passes through hands that do not stand still.
    let shared = host.path("shared");
    std::fs::create_dir(&shared).unwrap();
    let bind = format!("{}:/mnt", shared.display());
    let count = "i=0; while :; do i=$((i+1)); echo $i >>/mnt/counted; echo $i; sleep 0.01; done";
    let pod = host.start(["--bind", &bind, "--", "sh", "-c", count]);
    let counted = || std::fs::read_to_string(shared.join("counted")).unwrap_or_default().len();
    eventually("it counts", || counted() > 0);
    host.ok(["suspend", &pod]);
    let before = counted();
    assert_eq!(host.row(&pod)["state"], "suspended");
    assert_eq!(host.run(["exec", &pod, "true"]).code, 125);
    assert_eq!(host.run(["suspend", &pod]).code, 1);
    assert_eq!(counted(), before);
    host.ok(["resume", &pod]);
    eventually("it counts on", || counted() > before);
    let printed = host.ok(["logs", &pod]).len();
    eventually("output goes on", || host.ok(["logs", &pod]).len() > printed);
    host.ok(["suspend", &pod]);
    host.ok(["kill", &pod]);
    assert_eq!(host.run(["wait", &pod]).code, 137);
}

#[test]
fn ends_are_remembered() {
    let host = Host::new();
    let pod = host.start(["--", "sh", "-c", "trap 'echo bye; exit 3' TERM; echo up; while :; do sleep 0.05; done"]);
    eventually("it is up", || host.ok(["logs", &pod]) == "up");
    host.ok(["stop", &pod]);
    assert_eq!(host.run(["wait", &pod]).code, 3);
    assert_eq!(host.ok(["logs", "-f", &pod]), "up\nbye");
    let row = host.row(&pod);
    assert_eq!((row["state"].as_str(), row["exit_code"].as_i64()), (Some("stopped"), Some(3)));
    assert_eq!(host.run(["exec", &pod, "true"]).code, 125);
    host.ok(["rm", &pod]);
    let stubborn = host.start(["--", "sh", "-c", "trap '' TERM; while :; do sleep 0.05; done"]);
    host.ok(["stop", "-t", "0", &stubborn]);
    assert_eq!(host.run(["wait", &stubborn]).code, 137);
}

#[test]
fn following_the_log_ends_with_the_pod() {
    let host = Host::new();
    let pod = host.start(["-i", "--", "sh", "-c", "echo one; read line; echo $line"]);
    let follow = host.zap(["logs", "-f", &pod]).stdout(Stdio::piped()).spawn().unwrap();
    let mut attach = host.zap(["attach", &pod]);
    let mut attach = attach.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    attach.stdin.take().unwrap().write_all(b"two\n").unwrap();
    assert_eq!(follow.wait_with_output().unwrap().stdout, b"one\ntwo\n");
    assert_eq!(attach.wait_with_output().unwrap().status.code(), Some(0));
}

/// A command hears that nobody reads its output any more, as it would without a pod.
#[test]
fn an_exec_whose_output_nobody_reads_ends() {
    let host = Host::new();
    let pod = host.start(["--", "sleep", "1000"]);
    let mut exec = host.zap(["exec", &pod, "yes"]);
    let mut exec = exec.stdout(Stdio::piped()).spawn().unwrap();
    let mut first = [0; 2];
    let mut output = exec.stdout.take().unwrap();
    std::io::Read::read_exact(&mut output, &mut first).unwrap();
    drop(output);
    assert_eq!((&first, exec.wait().unwrap().code()), (b"y\n", Some(128 + 13)));
    assert_eq!(host.json(["ls", "--json"])[0]["processes"], 1);
}

#[test]
fn removal_leaves_nothing() {
    let host = Host::new();
    let state = host.state().to_str().unwrap().to_owned();
    let mounts = || {
        let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        table.lines().filter(|line| line.contains(&state)).count()
    };
    let before = mounts();
    let pod = host.start(["--", "sh", "-c", "echo x >/var/zap-test; sleep 1000 & sleep 1000"]);
    let (monitor, init) = (host.monitor(&pod), host.row(&pod)["init_pid"].as_i64().unwrap());
    assert_eq!(host.run(["rm", &pod]).code, 1);
    // One that is not there does not keep others from being removed.
    let removed = host.run(["rm", "-f", "nobody", &pod, "nobody-else"]);
    assert_eq!((removed.code, removed.stderr.lines().count()), (6, 2), "{removed:?}");
    assert_eq!(host.json(["ls", "--json"]), serde_json::json!([]));
    for pid in [i64::from(monitor), init] {
        // Whoever adopts orphans on this machine may take a moment to bury them.
        eventually("it is buried", || !std::path::Path::new(&format!("/proc/{pid}")).exists());
    }
    assert!(host.cgroups().is_empty());
    assert_eq!(mounts(), before);
    assert_eq!(std::fs::read_dir(host.state().join("pods")).unwrap().count(), 0);
    assert_eq!(std::fs::read_dir(host.state().join("storage/pods")).unwrap().count(), 0);
    // The same by itself.
    assert_eq!(host.run(["run", "--rm", "--net", "private", "--", "true"]).code, 0);
    assert_eq!(std::fs::read_dir(host.state().join("pods")).unwrap().count(), 0);
}

#[test]
fn a_pod_outlives_its_monitor() {
    let host = Host::new();
    let pod = host.start(["-i", "--", "sh", "-c", "echo before; read line; echo $line; exit 4"]);
    eventually("it has begun", || host.ok(["logs", &pod]) == "before");
    kill(host.monitor(&pod));
    assert_eq!(host.row(&pod)["state"], "running");
    kill(host.monitor(&pod));
    assert_eq!(host.ok(["exec", &pod, "echo", "alive"]), "alive");
    kill(host.monitor(&pod));
    let mut attach = host.zap(["attach", &pod]);
    let mut attach = attach.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    attach.stdin.take().unwrap().write_all(b"after\n").unwrap();
    let output = attach.wait_with_output().unwrap();
    assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(4), &b"after\n"[..]));
    assert_eq!(host.ok(["logs", &pod]), "before\nafter");
}

#[test]
fn an_end_without_a_monitor_is_noticed_later() {
    let host = Host::new();
    let pod = host.start(["--", "sh", "-c", "echo up; while :; do sleep 0.05; done"]);
    let monitor = host.monitor(&pod);
    let main = host.json(["ps", "--json", &pod])[1]["host_pid"].as_i64().unwrap() as i32;
    kill(monitor);
    kill(main);
    assert_eq!(host.run(["wait", &pod]).code, 137);
    // The same when PID 1 is killed as well.
    let pod = host.start(["--", "sleep", "1000"]);
    let (monitor, init) = (host.monitor(&pod), host.row(&pod)["init_pid"].as_i64().unwrap() as i32);
    kill(monitor);
    kill(init);
    eventually("it is known to have stopped", || host.row(&pod)["state"] == "stopped");
    host.ok(["rm", &pod]);
    assert!(host.cgroups().iter().all(|g| !g.join(&pod).exists()));
}

/// Whoever lists pods hears of its end, and of nothing else.
#[test]
fn a_pod_that_ends_while_it_is_taken_over_has_ended() {
    let host = Host::new();
    for moment in 0..20 {
        let pod = host.start(["--", "sleep", "1000"]);
        kill(host.monitor(&pod));
        let mut list = host.zap(["ls", "--json"]);
        let list = list.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(moment));
        for group in host.cgroups() {
            let _ = std::fs::write(group.join(&pod).join("cgroup.kill"), "1");
        }
        let listed = common::done(list.wait_with_output().unwrap());
        assert_eq!(listed.code, 0, "after {moment} ms: {listed:?}");
        assert_eq!(host.run(["wait", &pod]).code, 137);
        host.ok(["rm", &pod]);
    }
}

#[test]
fn a_monitor_that_dies_while_suspended_is_replaced() {
    let host = Host::new();
    let pod = host.start(["--", "sleep", "1000"]);
    host.ok(["suspend", &pod]);
    kill(host.monitor(&pod));
    assert_eq!(host.row(&pod)["state"], "suspended");
    host.ok(["resume", &pod]);
    assert_eq!(host.ok(["exec", &pod, "echo", "awake"]), "awake");
}

/// Whoever dies may let go of its socket last: that somebody can connect to it does not make it a monitor.
#[test]
fn a_monitor_of_which_the_socket_alone_is_left_is_replaced() {
    let host = Host::new();
    let pod = host.start(["--", "sleep", "1000"]);
    let before = host.monitor(&pod);
    kill(before);
    let socket = host.state().join("pods").join(&pod).join("monitor.sock");
    std::fs::remove_file(&socket).unwrap();
    let _left = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    assert_eq!(host.row(&pod)["state"], "running");
    assert_ne!(host.monitor(&pod), before);
    assert_eq!(host.ok(["exec", &pod, "echo", "alive"]), "alive");
}

#[test]
fn signals_of_the_caller_are_passed_on() {
    let host = Host::new();
    let mut run = host.zap(["run", "-n", "s", "--net", "private", "--", "sh", "-c"]);
    run.arg("trap 'exit 6' INT; echo up; while :; do sleep 0.05; done");
    let mut child = run.stdout(Stdio::piped()).spawn().unwrap();
    let mut up = [0; 3];
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut up).unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.id() as i32), nix::sys::signal::Signal::SIGINT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(6));
}

#[test]
fn a_seccomp_profile_of_ones_own_is_obeyed_and_survives_a_restart() {
    let host = Host::new();
    let profile = host.path("profile.json");
    let rule = r#"{"defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}]}"#;
    std::fs::write(&profile, rule).unwrap();
    let profile = profile.to_str().unwrap();
    host.start(["-n", "pod", "--seccomp", profile, "--", "sh", "-c", "while sleep 0.05; do mkdir /tmp/no 2>&1; done"]);
    let denied = || host.ok(["logs", "pod"]).matches("No space left on device").count();
    eventually("a denial", || denied() > 0);
    let done = host.run(["exec", "pod", "mkdir", "/tmp/no"]);
    assert!(done.code == 1 && done.stderr.contains("No space left"), "{done:?}");
    let image = host.path("image");
    let image = image.to_str().unwrap();
    host.ok(["checkpoint", "pod", "-o", image]);
    host.ok(["restart", "-d", image]);
    eventually("a denial after the restart", || denied() > 0);
    assert_eq!(host.run(["exec", "pod", "mkdir", "/tmp/no"]).code, 1);

    for (text, words) in [("{", "the seccomp profile"), (r#"{"defaultAction": "SCMP_ACT_WHAT"}"#, "SCMP_ACT_WHAT")] {
        std::fs::write(profile, text).unwrap();
        let done = host.run(["run", "-d", "--net", "private", "--seccomp", profile, "true"]);
        assert!(done.code == 2 && done.stderr.contains(words), "{done:?}");
    }
}
