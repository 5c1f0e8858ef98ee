//! Pods on a real terminal: a pty of the test's own, which zap has as its controlling terminal.

#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command};
use std::time::Instant;

use common::{Host, PATIENCE, eventually};
use nix::poll::{PollFd, PollFlags, poll};

/// A terminal with a command of zap's on it.
struct Terminal {
    master: File,
    slave: OwnedFd,
    child: Child,
    shown: String,
}

impl Terminal {
    /// Runs a command of zap's on a new terminal of 24 rows and 80 columns.
    fn run(host: &Host, arguments: &[&str]) -> Terminal {
        let pty = nix::pty::openpty(None, None).unwrap();
        resize(&pty.slave, 24, 80);
        // The terminal is to send it signals, so it has to be the terminal of a session of its own.
        let mut command = host.command("setsid");
        command.args(["--ctty", env!("CARGO_BIN_EXE_zap")]).args(arguments);
        // Whoever runs tests may ask for no bars, as CI does; these are of what people see.
        command.env_remove("CI").env_remove("NO_COLOR").env("TERM", "xterm");
        let end = || pty.slave.try_clone().unwrap();
        let child = command.stdin(end()).stdout(end()).stderr(end()).spawn().unwrap();
        Terminal { master: pty.master.into(), slave: pty.slave, child, shown: String::new() }
    }

    fn types(&mut self, keys: &str) {
        self.master.write_all(keys.as_bytes()).unwrap();
    }

    /// Waits until something is shown that was not expected before.
    fn shows(&mut self, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.shown.contains(text) {
            let mut fds = [PollFd::new(self.master.as_fd(), PollFlags::POLLIN)];
            let ready = poll(&mut fds, 100u16).unwrap();
            assert!(Instant::now() < deadline, "{text} is not shown, but at last {:?}", self.last());
            if ready > 0 {
                let mut bytes = [0; 4096];
                let length = self.master.read(&mut bytes).unwrap();
                self.shown.push_str(&String::from_utf8_lossy(&bytes[..length]));
            }
        }
        let after = self.shown.find(text).unwrap() + text.len();
        self.shown.drain(..after);
    }

    /// The end of what is shown: bars are drawn ten times a second.
    fn last(&self) -> String {
        let from = self.shown.chars().count().saturating_sub(400);
        self.shown.chars().skip(from).collect()
    }

    /// Types the keys that leave the pod running, and waits until zap has ended.
    fn detach(mut self) {
        self.types("\u{10}\u{11}");
        self.shows("left it running");
        let before = mode(&self.slave);
        assert_eq!(self.child.wait().unwrap().code(), Some(0));
        assert!(before.contains(" icanon") && before.contains(" echo "), "the terminal was left raw: {before}");
    }
}

fn stty(terminal: &OwnedFd) -> Command {
    let mut command = Command::new("stty");
    command.stdin(terminal.try_clone().unwrap());
    command
}

fn resize(terminal: &OwnedFd, rows: u32, columns: u32) {
    let size = [rows, columns].map(|n| n.to_string());
    assert!(stty(terminal).args(["rows", &size[0], "cols", &size[1]]).status().unwrap().success());
}

fn mode(terminal: &OwnedFd) -> String {
    String::from_utf8(stty(terminal).arg("-a").output().unwrap().stdout).unwrap()
}

#[test]
fn a_pod_follows_the_size_of_its_terminal_and_is_left_and_come_back_to() {
    let host = Host::new();
    let shell = "trap 'echo resized to $(stty size)' WINCH; echo started with $(stty size); while :; do read line && echo got $line; done";
    let mut terminal =
        Terminal::run(&host, &["run", "-it", "-n", "shell", "--net", "private", "--", "sh", "-c", shell]);
    terminal.shows("started with 24 80");
    resize(&terminal.slave, 40, 100);
    terminal.types("one\n");
    terminal.shows("resized to 40 100");
    // One of the two keys alone is the pod's.
    terminal.types("two\n");
    terminal.shows("got two");
    terminal.detach();
    assert_eq!(host.row("shell")["state"], "running");

    let mut terminal = Terminal::run(&host, &["attach", "shell"]);
    terminal.types("three\n");
    terminal.shows("got three");
    terminal.detach();

    let image = host.path("image");
    let image = image.to_str().unwrap();
    host.ok(["checkpoint", "shell", "-o", image]);
    host.ok(["restart", "-d", image]);
    let mut terminal = Terminal::run(&host, &["attach", "shell"]);
    terminal.types("four\n");
    terminal.shows("got four");
    resize(&terminal.slave, 50, 120);
    terminal.types("five\n");
    terminal.shows("resized to 50 120");
    terminal.detach();
    host.ok(["rm", "-f", "shell"]);
    eventually("the pod is gone", || host.row("shell").is_null());
}

/// Memory of a shell, enough for a migration to be seen.
const MUCH: &str = "x=$(head -c 3000000 /dev/urandom | base64); echo ready; sleep 1000; echo $x";

#[test]
fn a_migration_shows_how_far_it_is_and_ends_by_a_key() {
    let (here, there) = (Host::new(), Host::new());
    here.start(["-n", "much", "--", "sh", "-c", MUCH]);
    eventually("it is ready", || here.ok(["logs", "much"]) == "ready");
    // Nothing passes for a while once some has.
    let gate = here.path("gate");
    let valve = format!("(stdbuf -o0 head -c 1000000; until [ -e '{}' ]; do sleep 0.02; done; cat)", gate.display());
    let way = format!("{valve} | {}", there.leads_to("receive"));
    let mut terminal = Terminal::run(&here, &["migrate", "much", "--via", &way]);
    terminal.shows("much: runs, round 1: ");
    terminal.shows(" sent, ");
    terminal.shows("/s, ");
    terminal.shows(" to go");
    terminal.types("\u{3}");
    terminal.shows("pod much goes on here");
    // The command of --via does not hear of the key.
    std::fs::write(&gate, "").unwrap();
    assert_eq!(terminal.child.wait().unwrap().code(), Some(1));
    assert_eq!(here.row("much")["state"], "running");
    eventually("nothing is there", || there.ok(["ls", "--json"]) == "[]");
    // Through an open gate it goes.
    let mut terminal = Terminal::run(&here, &["migrate", "much", "--via", &way]);
    terminal.shows("pod much runs here now");
    assert_eq!(terminal.child.wait().unwrap().code(), Some(0));
    assert_eq!(there.row("much")["state"], "running");
}
