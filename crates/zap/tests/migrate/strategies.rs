//! Streams that break, peers that stall and monitors that die where memory is not simply sent: it is left behind
//! (copy-on-reference), or goes through a store (flush). Each kind of frame that either side sends is tried.

use std::thread::scope;

use super::stall::AT_ONCE;
use super::{Counter, Host, Outcomes, bring_back, eventually, migrate, one_lives, pods, portrait, where_it_lives};

/// Where a pod is to be found afterwards.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Lives {
    /// At the source; the destination is clean.
    Here,
    /// At the destination, for good.
    There,
    /// What ran at the destination had only half of its memory, and was killed; the source's copy goes on.
    HereForThatIsLost,
}

use Lives::{Here, HereForThatIsLost, There};

/// A side, a frame that it is about to send, and where the pod lives if nothing comes any more.
type Break = (&'static str, &'static str, Lives);

const REFERENCED: [Break; 15] = [
    ("source", "hello", Here),
    ("source", "uses", Here),
    ("source", "begin", Here),
    ("source", "bytes", Here),
    ("source", "manifest", Here),
    ("source", "go", Here),
    ("source", "pages", HereForThatIsLost),
    ("source", "pages+3", HereForThatIsLost),
    ("destination", "welcome", Here),
    ("destination", "alike", Here),
    ("destination", "ready", Here),
    ("destination", "running", HereForThatIsLost),
    ("destination", "fetch", HereForThatIsLost),
    ("destination", "fetch+3", HereForThatIsLost),
    ("destination", "complete", There),
];

const FLUSHED: [Break; 11] = [
    ("source", "hello", Here),
    ("source", "uses", Here),
    ("source", "begin", Here),
    ("source", "bytes", Here),
    ("source", "stored", Here),
    ("source", "manifest", Here),
    ("source", "go", Here),
    ("destination", "welcome", Here),
    ("destination", "alike", Here),
    ("destination", "ready", Here),
    ("destination", "running", There),
];

/// How long the other side may be silent where one stalls: much longer than anything takes, for another outcome would come of it.
const PATIENCE: (&str, &str) = ("ZAP_PATIENCE", "4000");

/// Counts for as long as its memory is what it was, all of which it reads each time (and compares now and then, which takes long).
/// It has no children whose memory is the same as its own.
const REMEMBERS: &str = "{ x=$(head -c 300000 /dev/urandom | base64 -w0); y=$x; exec 3<> <(:); i=0
    while [ ${#x} = 400000 ] && { ((i % 16)) || [ \"$x\" = \"$y\" ]; }; do
        i=$((i+1)); echo $i; read -t 0.05 -u 3
    done; } | cat";

/// One migration that something befalls.
struct Trial {
    strategy: &'static str,
    at: Break,
    /// As `ZAP_CUT` says it: nothing, `dies`, `stalls`.
    how: &'static str,
}

impl Trial {
    fn name(&self) -> String {
        let (side, frame, _) = self.at;
        let what = match self.how {
            "dies" => format!("{side} killed"),
            "stalls" => format!("{side} stalls"),
            _ => format!("wire cut by the {side}"),
        };
        format!("{what} before {frame} by {}", self.strategy)
    }

    /// What killed the pod there was the next monitor, which knows no more than that the first one is dead.
    fn kills_who_knows_why(&self) -> bool {
        (self.at.0, self.how) == ("destination", "dies")
    }

    /// Where the pod lives.
    fn lives(&self) -> Lives {
        match self.at {
            // Nobody knows any more that all had come.
            (_, "complete", There) if self.how == "dies" => HereForThatIsLost,
            (.., lives) => lives,
        }
    }

    fn run(&self) -> &'static str {
        let name = self.name();
        let (a, b) = (Host::new(), Host::new());
        for host in [&a, &b] {
            host.ok(["ls"]);
        }
        let left = if self.lives() == There { &a } else { &b };
        let before = portrait(left);
        Counter::start_command(&a, "counter", &["--net", "private"], &["bash", "-c", REMEMBERS]);
        let store = a.path("store");
        std::fs::create_dir(&store).unwrap();
        let mut options = vec!["--strategy", self.strategy];
        if self.strategy == "flush" {
            options.extend(["--store", store.to_str().unwrap()]);
        }
        let (side, frame, _) = self.at;
        let cut = format!("{side}:{frame}:{}", self.how);
        let stalls = (self.how == "stalls").then_some(PATIENCE);
        let environment: Vec<_> = [("ZAP_CUT", cut.trim_end_matches(':'))].into_iter().chain(stalls).collect();
        let done = migrate(&a, &b, "counter", &environment, &options);
        assert!(done.code == 1 && (self.how == "dies" || done.stderr.contains("counter")), "{name}: {done:?}");
        if self.lives() == HereForThatIsLost {
            self.is_lost(&b);
        }
        one_lives(&a, &b, &done, &name);
        let outcome = where_it_lives(&a);
        assert!(pods(left).is_empty(), "{name}");
        eventually(&format!("{name}: nothing is left where it does not live"), || portrait(left) == before);
        // That waits until all of its memory has come.
        bring_back(&a, &b);
        Counter::of(&a, "counter").goes_on();
        assert_eq!(std::fs::read_dir(&store).unwrap().count(), 0, "{name}: something is left in the store");
        assert_eq!([&a, &b].map(|host| host.ok(["ls", "--residual", "--json"])), ["[]", "[]"], "{name}");
        outcome
    }

    /// What had come is killed, says why if it knows, and leaves nothing when it is removed.
    fn is_lost(&self, there: &Host) {
        let name = self.name();
        eventually(&format!("{name}: what is there to be killed"), || {
            pods(there) == [("counter".to_owned(), "stopped".to_owned())]
        });
        assert_eq!(there.run(["wait", "counter"]).code, 137, "{name}");
        let log = there.run(["logs", "counter"]);
        assert!(
            self.kills_who_knows_why() || log.stderr.contains("is lost: the rest of its memory"),
            "{name}: {log:?}"
        );
        there.ok(["rm", "counter"]);
    }
}

/// Where monitors are killed, too: elsewhere it is as by other strategies.
const DEADLY: [&str; 5] = ["stored", "pages", "ready", "running", "complete"];

/// Each of these, in each of the ways; some at once, for much of the time is waited.
fn breaks_everywhere(name: &'static str, strategy: &'static str, breaks: &[Break]) {
    let deadly = breaks.iter().filter(|(_, frame, _)| DEADLY.contains(frame)).map(|at| ("dies", *at));
    let others = ["", "stalls"].into_iter().flat_map(|how| breaks.iter().map(move |at| (how, *at)));
    let trials: Vec<Trial> = others.chain(deadly).map(|(how, at)| Trial { strategy, at, how }).collect();
    let mut outcomes = Outcomes::of(name);
    for some in trials.chunks(AT_ONCE as usize) {
        scope(|scope| {
            let tried: Vec<_> = some.iter().map(|trial| (trial, scope.spawn(|| trial.run()))).collect();
            for (trial, tried) in tried {
                outcomes.note(trial.name(), tried.join().unwrap());
            }
        });
    }
    outcomes.write();
}

#[test]
fn memory_that_was_left_behind_comes_or_the_pod_is_lost() {
    breaks_everywhere("left-behind", "copy-on-reference", &REFERENCED);
}

#[test]
fn a_store_is_left_clean_whatever_breaks() {
    breaks_everywhere("flushed", "flush", &FLUSHED);
}
