//! A program that tries to get out of its pod, or to look out: `pod-escape FACTS`, where FACTS is what it would have to guess
//! ([`harness::escape::Facts`], as JSON). Every time that `/tmp/round-N` appears it tries everything, as root and as a user,
//! and prints a line for each attempt. `pod-escape FACTS once` tries at once, and ends.

#![allow(unsafe_code, reason = "a test program: it makes the raw calls that must fail")]
#![allow(clippy::undocumented_unsafe_blocks, reason = "likewise; each call is on memory of the function around it")]

mod attempt;
mod files;
mod kernel;
mod namespaces;
mod processes;

use std::path::Path;

use attempt::{Attempt, Kept, outcome};
use harness::escape::Facts;

/// Every attempt, by topic.
const TOPICS: &[&[Attempt]] = &[processes::ATTEMPTS, files::ATTEMPTS, namespaces::ATTEMPTS, kernel::ATTEMPTS];

fn main() {
    let facts = std::env::args().nth(1).unwrap_or_default();
    let facts: Facts = serde_json::from_str(&facts).expect("the facts as JSON");
    let kept = Kept::open(&facts).expect("opening what is kept");
    let once = std::env::args().nth(2).is_some();
    for round in 0..if once { 1 } else { u32::MAX } {
        let wait = format!("/tmp/round-{round}");
        while !once && !Path::new(&wait).exists() {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        for (name, attempt) in TOPICS.iter().copied().flatten() {
            let [root, user] = [None, Some(1000)].map(|user| outcome(user, || attempt(&facts, &kept)));
            println!("{round} {name} {root} {user}");
        }
        println!("end of round {round}");
    }
}
