//! Peers that say nothing more, and read nothing, but are there: whoever waits for them loses patience, and exactly one copy
//! lives.

use std::process::Stdio;
use std::thread::scope;

use super::{
    Clean, Counter, FRAMES, Host, Outcomes, PUBLISHED, bring_back, counter, done, eventually, migrate, one_lives, pods,
    runs, via, where_it_lives,
};

/// How long the other side may be silent here: long enough for what takes time on a busy machine.
const PATIENCE: (&str, &str) = ("ZAP_PATIENCE", "2000");

/// Nearly all of the time is waited.
pub(super) const AT_ONCE: u32 = 11;

/// A migration of which one side stalls before a frame that it sends: where the pod lives then. Nothing if there is no such
/// frame.
fn stalled_before(side: &str, frame: u32) -> Option<&'static str> {
    let (a, b) = (Host::new(), Host::new());
    Counter::start(&a, "counter", &PUBLISHED);
    let clean = Clean::destination(&b);
    let cut = format!("{side}:{frame}:stalls");
    let done = migrate(&a, &b, "counter", &[("ZAP_CUT", &cut), PATIENCE], &[]);
    if done.code == 0 {
        assert!(frame > 2 && runs(&b) && pods(&a).is_empty());
        return None;
    }
    assert!((done.code, done.stderr.contains("counter")) == (1, true), "{cut}: {done:?}");
    one_lives(&a, &b, &done, &cut);
    let lives = where_it_lives(&a);
    bring_back(&a, &b);
    clean.again(&cut);
    Some(lives)
}

fn stalled_everywhere(side: &'static str, name: &'static str) {
    let mut outcomes = Outcomes::of(name);
    for first in (0..FRAMES).step_by(AT_ONCE as usize) {
        let some = scope(|scope| {
            let frames = first..first + AT_ONCE;
            let tried: Vec<_> = frames.map(|frame| (frame, scope.spawn(move || stalled_before(side, frame)))).collect();
            tried.into_iter().map(|(frame, tried)| (frame, tried.join().unwrap())).collect::<Vec<_>>()
        });
        for (frame, lives) in &some {
            if let Some(lives) = lives {
                outcomes.note(format!("{side} stalls before frame {frame}"), lives);
            }
        }
        if some.iter().any(|(_, lives)| lives.is_none()) {
            return outcomes.write();
        }
    }
    panic!("it has not arrived after {FRAMES} attempts");
}

#[test]
fn the_source_stalls_before_every_frame() {
    stalled_everywhere("source", "stalled-source");
}

#[test]
fn the_destination_stalls_before_every_frame() {
    stalled_everywhere("destination", "stalled-destination");
}

/// Nothing passes any more in the middle of its memory: the source cannot send, and the destination hears nothing.
fn stalled_within_pages(limit: u64) {
    let (a, b) = (Host::new(), Host::new());
    let script = format!("x=$(head -c 2000000 /dev/urandom | base64); {}", counter::COUNT);
    Counter::start_command(&a, "counter", &["--net", "private"], &["sh", "-c", &script]);
    let over = a.path("over");
    let valve = format!("(stdbuf -o0 head -c {limit}; until [ -e '{}' ]; do sleep 0.1; done)", over.display());
    let mut command = a.zap(["migrate", "counter", "--via", &format!("{valve} | {}", via(&b))]);
    command.env(PATIENCE.0, PATIENCE.1).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    // Said to the monitor, this waits for the end of the migration.
    std::thread::sleep(std::time::Duration::from_millis(500));
    a.ok(["suspend", "counter"]);
    a.ok(["resume", "counter"]);
    eventually("nothing is there", || pods(&b).is_empty());
    assert!(!over.exists() && runs(&a));
    Counter::of(&a, "counter").goes_on();
    std::fs::write(over, "").unwrap();
    let done = done(child.wait_with_output().unwrap());
    assert!((done.code, done.stderr.contains("goes on here")) == (1, true), "{limit}: {done:?}");
}

#[test]
fn the_stream_stalls_in_the_middle_of_pages() {
    let mut outcomes = Outcomes::of("stalled-in-pages");
    let tenths = [1, 3, 5, 7, 9];
    scope(|scope| {
        let tried = tenths.map(|tenths| scope.spawn(move || stalled_within_pages(270_000 * tenths)));
        tried.into_iter().for_each(|tried| tried.join().unwrap());
    });
    for tenths in tenths {
        let outcome = "it lives at the source alone";
        outcomes.note(format!("wire stalls after {tenths}0 % of its memory"), outcome);
    }
    outcomes.write();
}
