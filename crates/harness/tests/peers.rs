//! Peers beside zap: what they do is measured, and what they say when they cannot is kept in their own words.

#![allow(clippy::unwrap_used)]

use std::os::unix::fs::PermissionsExt;

use harness::experiment::{self, Settings};
use harness::peer::PeerSpec;
use harness::{progress, report, samples};

/// Measures a pod that sleeps beside a peer; gives the arms that there are samples of, and what was said of the peer.
fn beside(peer: PeerSpec) -> (Vec<String>, Vec<String>, String) {
    let out = tempfile::tempdir().unwrap();
    let settings = Settings { workloads: vec!["sleep".into()], peers: vec![peer], ..Settings::fast(out.path().into()) };
    experiment::find("checkpoint-restart").unwrap().run(&settings).unwrap();
    report::make(out.path()).unwrap();
    let page = std::fs::read_to_string(out.path().join("report.html")).unwrap();
    let mut arms: Vec<String> = samples::read_all(out.path()).unwrap().into_iter().map(|sample| sample.arm).collect();
    arms.sort();
    arms.dedup();
    let notes = progress::notes(out.path(), ["checkpoint-restart"].into_iter()).unwrap();
    (arms, notes.into_iter().map(|(_, note)| format!("{}: {}", note.who, note.words)).collect(), page)
}

#[test]
fn the_workload_by_itself_is_a_peer() {
    let (arms, said, _) = beside(PeerSpec::Native);
    assert!(["native-start", "native-end", "restart"].iter().all(|arm| arms.iter().any(|a| a == arm)), "{arms:?}");
    assert_eq!(said, Vec::<String>::new());
}

#[test]
fn a_peer_that_is_not_there_is_a_result() {
    let (arms, said, page) = beside(PeerSpec::Criu("/nowhere/criu".into()));
    assert!(arms.iter().any(|arm| arm == "restart") && !arms.iter().any(|arm| arm.starts_with("criu")), "{arms:?}");
    assert!(said.iter().any(|words| words.contains("/nowhere/criu")), "{said:?}");
    assert!(page.contains("/nowhere/criu") && page.contains("not compared"));
}

#[test]
fn a_peer_that_fails_is_quoted() {
    let directory = tempfile::tempdir().unwrap();
    let program = directory.path().join("criu");
    let script =
        "#!/bin/sh\ncase $1 in --version) echo Version: 0.0;; *) echo 'Error: no such luck' >&2; exit 1;; esac\n";
    std::fs::write(&program, script).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    let (arms, said, page) = beside(PeerSpec::Criu(program));
    assert!(!arms.iter().any(|arm| arm.starts_with("criu")), "{arms:?}");
    assert!(said.iter().any(|words| words.contains("left running") && words.contains("no such luck")), "{said:?}");
    assert!(page.contains("no such luck"));
}
