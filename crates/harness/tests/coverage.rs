//! The tables of `docs/coverage.md` that say what is tested by what: made from the guests, their tests and the table of
//! kinds of open files (`just coverage-table`), and stale if they differ from those.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const BEGIN: &str = "<!-- made by `just coverage-table`: from here -->\n";
const END: &str = "<!-- to here -->\n";

/// The guests that open each kind of file, and the tests of `checkpoint_files.rs`: every one of `zap::files::KINDS` has some.
const FILES: &[(&str, &[&str])] = &[
    ("proc", &["proc-files", "proc-ended"]),
    ("removed-directory", &["cwd-deleted"]),
    ("name-only", &["path-only"]),
    ("mqueue", &["mqueue", "mqueue-notify", "mqueue-unlinked"]),
    (
        "regular",
        &["regular_file", "unlinked_file", "linked-elsewhere", "file-replaced", "nameless-file", "behind-a-root"],
    ),
    ("memfd", &["memfd", "huge-memfd", "sealed-memory"]),
    ("shared-memory", &["shared-anonymous"]),
    ("huge-memory", &["huge-pages"]),
    ("directory", &["directory-half-read"]),
    ("pipe", &["pipe_with_contents", "packets_in_a_pipe", "pipe-resized"]),
    ("fifo", &["fifo-one-sided", "fifo-deleted"]),
    ("device", &["devices"]),
    ("tun", &["network-tun", "network-tun-lasting"]),
    (
        "tcp",
        &[
            "connecting",
            "corked-stream",
            "fast-open",
            "mapped-address",
            "port-shared",
            "rare-options",
            "closed-and-told",
        ],
    ),
    (
        "udp",
        &[
            "multicast-groups",
            "filtered-socket",
            "corked-idle",
            "udp-lite",
            "udp-lite-unread",
            "echo-unread",
            "datagrams-shut",
        ],
    ),
    ("raw", &["raw-socket"]),
    ("packet", &["packet-socket", "packet-ring"]),
    ("netlink", &["netlink-groups"]),
    ("eventfd", &["eventfd"]),
    ("io-uring", &["io-uring", "io-uring-fresh", "io-uring-shared", "io-uring-unordered", "io-uring-going-on"]),
    ("epoll", &["epoll", "waiting-calls"]),
    ("timerfd", &["timerfd"]),
    ("signalfd", &["signalfd", "signal-files"]),
    ("pty", &["pty", "console_that_is_a_terminal"]),
    (
        "unix",
        &[
            "unix-names",
            "unix-links",
            "rights-cycle",
            "handles-on-their-way",
            "unix-credentials",
            "unix-backlog-silent",
            "unix-backlog",
            "unix-backlog-messages",
            "unix-urgent",
        ],
    ),
    ("pidfd", &["pidfd", "pidfd-thread", "pidfd-ended"]),
    ("fanotify", &["fanotify", "fanotify-handles", "fanotify-unread"]),
    ("inotify", &["inotify", "inotify-renamed", "inotify-unread", "inotify-many"]),
    ("namespace-file", &["namespace-handles"]),
];

fn here() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).into()
}

/// What is between `start` and `end` in a text.
fn between<'t>(text: &'t str, start: &str, end: &str) -> Option<&'t str> {
    let from = text.find(start)? + start.len();
    let length = text[from..].find(end)?;
    Some(&text[from..from + length])
}

/// Comment lines that begin with `mark`, as one line.
fn joined<'l>(lines: impl Iterator<Item = &'l str>, mark: &str) -> String {
    let words = lines.map_while(|line| line.trim_start().strip_prefix(mark)).map(str::trim);
    words.collect::<Vec<_>>().join(" ").replace('|', "\\|")
}

/// A source of guests: its topic, and the guests with what is said of them.
struct Topic {
    title: String,
    guests: Vec<(String, String)>,
}

impl Topic {
    fn read(path: &Path) -> Option<Topic> {
        let text = std::fs::read_to_string(path).unwrap();
        let kinds = between(&text, "const KINDS: &[crate::stage::Kind] =", "];")?;
        let guest = |entry: &str| {
            let (name, program) = entry.split_once("\",")?;
            let program = program.split([')', '(']).next()?.trim();
            let said = text.find(&format!("\nfn {program}(")).map(|at| said_before(&text[..at]));
            let said = said.filter(|said| !said.is_empty()).unwrap_or_else(|| name.replace('-', " "));
            Some((name.to_owned(), said))
        };
        let guests = kinds.split("(\"").skip(1).filter_map(guest).collect();
        Some(Topic { title: joined(text.lines(), "//!"), guests })
    }
}

/// The comment at the end of a text.
fn said_before(text: &str) -> String {
    let lines: Vec<&str> = text.lines().rev().take_while(|line| line.starts_with("///")).collect();
    joined(lines.into_iter().rev(), "///")
}

/// What becomes of each guest, by name: kept, or refused with which words.
fn outcomes() -> BTreeMap<String, String> {
    let text = std::fs::read_to_string(here().join("tests/guests.rs")).unwrap();
    let named = |name: &str| name.replace('_', "-");
    let kept = between(&text, "\nguests! {", "\n}").unwrap();
    let kept = kept.split_whitespace().map(|name| (named(name), "kept".to_owned()));
    let refused = between(&text, "\nrefused! {", "\n}").unwrap().lines();
    let refused = refused.filter_map(|line| {
        let (name, words) = line.trim().split_once(' ')?;
        Some((named(name), format!("refused: {}", words.trim_matches('"'))))
    });
    kept.chain(refused).collect()
}

fn tables() -> String {
    let mut sources: Vec<PathBuf> =
        std::fs::read_dir(here().join("src/bin/pod-guest")).unwrap().map(|entry| entry.unwrap().path()).collect();
    sources.sort();
    let outcomes = outcomes();
    let probes = std::fs::read_to_string(here().join("../zap/tests/checkpoint_files.rs")).unwrap();
    let probes: Vec<&str> = probes.split(|c: char| c != '_' && !c.is_alphanumeric()).collect();
    let mut made = String::new();
    let mut all = Vec::new();
    for topic in sources.iter().filter_map(|path| Topic::read(path)) {
        made += &format!("\n**{}**\n\n| guest | what | outcome |\n| --- | --- | --- |\n", topic.title);
        for (name, said) in topic.guests {
            let outcome = outcomes.get(&name).unwrap_or_else(|| panic!("no test of guests.rs runs {name}"));
            made += &format!("| `{name}` | {said} | {outcome} |\n");
            all.push(name);
        }
    }
    made += "\n**Kinds of open files**\n\n| kind | guests and tests |\n| --- | --- |\n";
    for kind in zap::files::KINDS {
        let (_, guests) = FILES
            .iter()
            .find(|(name, _)| *name == kind.name())
            .unwrap_or_else(|| panic!("no guest has a {}", kind.name()));
        let is_there = |guest: &str| all.iter().any(|name| name == guest) || probes.contains(&guest);
        guests.iter().for_each(|guest| assert!(is_there(guest), "there is no test {guest}"));
        let guests: Vec<String> = guests.iter().map(|guest| format!("`{guest}`")).collect();
        made += &format!("| {} | {} |\n", kind.name(), guests.join(", "));
    }
    made + "\n"
}

#[test]
fn the_tables_are_those_of_the_tests() {
    let path = here().join("../../docs/coverage.md");
    let text = std::fs::read_to_string(&path).unwrap();
    let made = tables();
    if std::env::var_os("ZAP_COVERAGE_TABLE").is_some() {
        let (front, rest) = text.split_once(BEGIN).unwrap();
        let (_, back) = rest.split_once(END).unwrap();
        std::fs::write(&path, format!("{front}{BEGIN}{made}{END}{back}")).unwrap();
        return;
    }
    assert!(between(&text, BEGIN, END) == Some(&made), "docs/coverage.md is stale: run `just coverage-table`");
}
