//! Every kind of file through a checkpoint: a probe in a pod prepares it; the pod is checkpointed and left running, and
//! restarted from the image; the original and the copy look at what they have.

#![allow(missing_docs, clippy::unwrap_used)]

#[path = "files/host.rs"]
mod host;
#[path = "files/probes.rs"]
mod probes;

use host::Host;

/// Not a test of its own: what the tests below run in their pods is this very program, with `ZAP_PROBE` set.
#[test]
fn probe_in_pod() {
    if let Ok(name) = std::env::var("ZAP_PROBE") {
        host::probe(probes::named(&name));
    }
}

/// The probe is content after a checkpoint that leaves it running, and after two restarts, one beside the original.
fn survives_with(probe: &str, options: &[&str]) {
    let host = Host::new();
    host.start_probe(probe, options);
    let image = host.image();
    let image = image.to_str().unwrap();
    host.must(&["checkpoint", "probe", "-o", image, "--leave-running"]);
    host.must(&["restart", image, "-d", "-n", "copy"]);
    host.must_be_content("probe");
    host.must_be_content("copy");
    host.must(&["restart", image, "-d", "-n", "second"]);
    host.must_be_content("second");
}

fn survives(probe: &str) {
    survives_with(probe, &[]);
}

macro_rules! survive {
    ($($name:ident),* $(,)?) => {
        $(#[test]
        fn $name() {
            survives(stringify!($name));
        })*
    };
}

survive!(
    regular_file,
    appended_file,
    shared_offset,
    unlinked_file,
    big_unlinked_file_with_holes,
    replaced_file,
    file_of_the_root,
    directory,
    pipe_with_contents,
    packets_in_a_pipe,
    pipe_at_its_end,
    named_pipe,
    devices,
    eventfd,
    epoll,
    timerfd,
    signalfd,
    whole_file_lock,
    range_lock,
    posix_lock,
    pty,
    proc_files,
    pidfd,
    signals_of_a_file,
    close_on_exec,
);

#[test]
fn console_of_pipes() {
    let host = Host::new();
    host.start_probe("console", &[]);
    let image = host.image();
    host.must(&["checkpoint", "probe", "-o", image.to_str().unwrap()]);
    host.must(&["restart", image.to_str().unwrap(), "-d", "-n", "copy"]);
    host.must_be_content("copy");
    assert!(host.must(&["logs", "copy"]).contains("after the checkpoint"));
}

#[test]
fn console_that_is_a_terminal() {
    survives_with("console_terminal", &["-t"]);
}

/// What cannot be checkpointed is refused by its name, with exit code 3, and the pod runs on.
fn refuses(probe: &str, word: &str) {
    let host = Host::new();
    host.start_probe(probe, &["--seccomp", "unconfined", "--cap-add", "all"]);
    let image = host.image();
    let refused = host.run(&["checkpoint", "probe", "-o", image.to_str().unwrap()]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(3), "{said}");
    assert!(said.contains(word) && said.contains("file descriptor"), "{said}");
    assert!(!image.exists());
    host.must_be_content("probe");
}

#[test]
fn a_fanotify_group_that_is_asked_is_refused() {
    refuses("fanotify", "is asked before files are opened");
}
