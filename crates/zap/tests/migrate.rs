//! Pods move between hosts that have nothing in common but a pipe: exactly one copy lives, whatever happens to the stream
//! and to zap.

#![allow(missing_docs)]

mod common;
#[path = "bad_input/counter.rs"]
mod counter;
#[path = "migrate/follow.rs"]
mod follow;
#[path = "migrate/forward.rs"]
mod forward;
#[path = "migrate/root.rs"]
mod root;
#[path = "migrate/stall.rs"]
mod stall;
#[path = "migrate/strategies.rs"]
mod strategies;
#[path = "migrate/welcome.rs"]
mod welcome;

use std::process::Stdio;
use std::time::Instant;

use common::{Done, Host, Outcomes, PATIENCE, done, eventually, fault_points, finish};
use counter::Counter;

/// The command that leads to `zap receive` on a host.
fn via(host: &Host) -> String {
    host.leads_to("receive")
}

fn migrate(from: &Host, to: &Host, pod: &str, environment: &[(&str, &str)], options: &[&str]) -> Done {
    let way = via(to);
    let mut command = from.zap([&["migrate", pod, "--via", &way], options].concat());
    finish(command.envs(environment.iter().copied()).stdin(Stdio::null()))
}

/// All of a host that a pod could leave something in.
fn portrait(host: &Host) -> String {
    let run = |words: &[&str]| finish(host.command(words[0]).args(&words[1..])).stdout;
    let network = [
        &["ip", "-o", "link"][..],
        &["ip", "-o", "address"],
        &["ip", "-o", "route", "show", "table", "all"],
        &["ip", "-o", "rule"],
        &["ip", "neigh"],
        &["nft", "list", "ruleset"],
    ];
    let mut seen = network.map(run).concat();
    // Sockets without what is gone but for a wait of the kernel's (TIME_WAIT).
    seen += &run(&[
        "ss",
        "-H",
        "-n",
        "-a",
        "-t",
        "-u",
        "-w",
        "-0",
        "state",
        "listening",
        "state",
        "established",
        "state",
        "unconnected",
    ]);
    seen += &format!("{:?}", processes_of(host));
    seen += &format!("{:?}", host.cgroups());
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    seen += &mounts.lines().filter(|line| line.contains(host.state().to_str().unwrap())).collect::<String>();
    for place in ["pods", "storage/pods", "storage"] {
        let entries = std::fs::read_dir(host.state().join(place)).into_iter().flatten().flatten();
        seen +=
            &entries.map(|e| e.file_name().into_string().unwrap()).filter(|name| name != "pods").collect::<String>();
    }
    seen
}

/// A host that takes pods, and what there was on it before.
struct Clean<'a> {
    host: &'a Host,
    before: String,
}

impl Clean<'_> {
    /// What is made once is there: the host has been used.
    fn destination(host: &Host) -> Clean<'_> {
        host.ok(["ls"]);
        Clean { host, before: portrait(host) }
    }

    /// Waits until it is as it was before.
    fn again(&self, what: &str) {
        let deadline = Instant::now() + PATIENCE;
        while portrait(self.host) != self.before && Instant::now() < deadline {
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        assert_eq!(portrait(self.host), self.before, "{what}: the destination is not as it was");
    }
}

/// Processes that have to do with a host: in its network namespace, or of its pods and monitors.
fn processes_of(host: &Host) -> Vec<String> {
    let state = host.state().to_str().unwrap().to_owned();
    let network = std::os::unix::fs::MetadataExt::ino(&host.network().metadata().unwrap());
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let text = |file: &str| {
            String::from_utf8_lossy(&std::fs::read(entry.path().join(file)).unwrap_or_default()).replace('\0', " ")
        };
        let here = std::fs::metadata(entry.path().join("ns/net"));
        let here = here.is_ok_and(|here| std::os::unix::fs::MetadataExt::ino(&here) == network);
        if here
            || text("environ").contains(&state)
            || text("cmdline").contains(&state)
            || text("cgroup").contains(&state)
        {
            found.push(text("cmdline"));
        }
    }
    found.sort();
    found
}

fn pods(host: &Host) -> Vec<(String, String)> {
    let rows = host.json(["ls", "--json"]);
    let text = |row: &serde_json::Value, key: &str| row[key].as_str().unwrap().to_owned();
    rows.as_array().unwrap().iter().map(|row| (text(row, "name"), text(row, "state"))).collect()
}

fn runs(host: &Host) -> bool {
    pods(host) == [("counter".to_owned(), "running".to_owned())]
}

#[test]
fn a_pod_moves_and_nothing_stays_behind() {
    for strategy in ["stop-and-copy", "pre-copy"] {
        let (a, b) = (Host::new(), Host::new());
        a.ok(["ls"]);
        let before = portrait(&a);
        Counter::start(&a, "counter", &["-p", "8080:80"]);
        a.ok(["exec", "counter", "sh", "-c", "echo kept >/root/file; echo shared >/dev/shm/file"]);
        let address = a.row("counter")["address"].clone();
        let done = migrate(&a, &b, "counter", &[], &["--strategy", strategy, "--stats"]);
        assert_eq!(done.code, 0, "{done:?}");
        let stats: serde_json::Value = serde_json::from_str(done.stdout.trim_end()).unwrap();
        for key in ["downtime_us", "total_us", "bytes", "rounds"] {
            assert!(stats[key].as_u64().unwrap() > 0, "{key}: {stats}");
        }
        assert!(stats["downtime_us"].as_u64() <= stats["total_us"].as_u64());
        eventually("nothing is left at the source", || portrait(&a) == before);
        assert_eq!(pods(&a), []);
        Counter::of(&b, "counter").goes_on();
        assert_eq!(b.row("counter")["address"], address);
        assert_eq!(b.ok(["exec", "counter", "cat", "/root/file", "/dev/shm/file"]), "kept\nshared");
        // and back again
        assert_eq!(migrate(&b, &a, "counter", &[], &["--strategy", strategy]).code, 0);
        Counter::of(&a, "counter").goes_on();
        assert_eq!(pods(&b), []);
    }
}

#[test]
fn a_pod_that_cannot_live_there_is_refused_before_it_is_touched() {
    let (a, b) = (Host::new(), Host::new());
    let counter = Counter::start(&a, "counter", &[]);
    let refused = |done: Done, code: i32, words: &str| {
        assert_eq!(done.code, code, "{done:?}");
        assert!(done.stderr.contains(words), "{done:?}");
        assert!(runs(&a));
        counter.goes_on();
    };
    b.start(["-n", "counter", "--", "sleep", "1000"]);
    refused(migrate(&a, &b, "counter", &[], &[]), 6, "the name counter is taken");
    b.ok(["rm", "-f", "counter"]);
    b.ok(["run", "-d", "-n", "other", "--", "sleep", "1000"]);
    refused(migrate(&a, &b, "counter", &[], &[]), 6, "is taken");
    let to = |way: &str| a.run(["migrate", "counter", "--via", way]);
    refused(to("true"), 1, "goes on here");
    refused(to("/nowhere/zap receive"), 1, "could not be run");
    refused(to("cat"), 1, "goes on here");
    refused(to("head -c 4 /dev/zero"), 1, "goes on here");
    refused(to("yes zap/mig1"), 1, "goes on here");
    refused(a.run(["migrate", "counter", "--via", "true", "--strategy", "magic"]), 2, "magic");
    refused(a.run(["migrate", "--resolve", "counter", "keep"]), 1, "not in doubt");
    refused(a.run(["migrate", "--resolve", "counter", "perhaps"]), 2, "keep");
    assert_eq!(a.run(["migrate", "nobody", "--via", "true"]).code, 6);
}

#[test]
fn where_its_address_cannot_be_had_another_will_do_if_one_says_so() {
    let (a, b) = (Host::new(), Host::new());
    b.ok(["ls"]);
    std::fs::create_dir_all(b.state()).unwrap();
    std::fs::write(b.state().join("config.toml"), "address = \"198.19.0.1/16\"\n").unwrap();
    let counter = Counter::start(&a, "counter", &[]);
    let born = a.row("counter")["address"].as_str().unwrap().to_owned();
    let done = migrate(&a, &b, "counter", &[], &[]);
    assert!(done.code != 0 && done.stderr.contains("is not an address of the pods' network"), "{done:?}");
    counter.goes_on();
    assert_eq!(migrate(&a, &b, "counter", &[], &["--any-address"]).code, 0);
    let there = b.row("counter")["address"].as_str().unwrap().to_owned();
    assert!(there.starts_with("198.19."), "{there}");
    assert!(b.ok(["exec", "counter", "ip", "-o", "address"]).contains(&format!("{born}/")), "it has another inside");
    // Nobody listens, and that is what it answers from there.
    let call = finish(b.command("bash").args(["-c", &format!("exec 3<>/dev/tcp/{there}/9")]));
    assert!(call.stderr.contains("refused"), "{call:?}");
    Counter::of(&b, "counter").goes_on();
    // Back, it is reached where it was.
    assert_eq!(migrate(&b, &a, "counter", &[], &["--any-address"]).code, 0);
    assert_eq!(a.row("counter")["address"], born);
    Counter::of(&a, "counter").goes_on();
}

/// After a stream that was cut: exactly one copy lives, or the source's is held and says how to resolve it.
fn one_lives(a: &Host, b: &Host, done: &Done, point: &str) {
    let doubt = pods(a) == [("counter".to_owned(), "suspended".to_owned())];
    eventually("the destination knows how it ended", || pods(b).is_empty() || runs(b));
    match (doubt, runs(b)) {
        (true, there) => {
            assert_eq!(a.run(["resume", "counter"]).code, 1, "{point}: a pod in doubt is not to be resumed by the way");
            assert!(a.run(["resume", "counter"]).stderr.contains("--resolve"), "{point}");
            let word = if there { "drop" } else { "keep" };
            a.ok(["migrate", "--resolve", "counter", word]);
        }
        (false, there) => assert!(runs(a) != there, "{point}: {:?} {:?} {done:?}", pods(a), pods(b)),
    }
    eprintln!("{point}: doubt {doubt}, there {}", runs(b));
    assert!(runs(a) != runs(b), "{point}: {:?} {:?}", pods(a), pods(b));
    Counter::of(if runs(a) { a } else { b }, "counter").goes_on();
}

fn where_it_lives(source: &Host) -> &'static str {
    if runs(source) { "it lives at the source alone" } else { "it lives at the destination alone" }
}

fn bring_back(a: &Host, b: &Host) {
    if runs(b) {
        let back = migrate(b, a, "counter", &[], &[]);
        assert_eq!(back.code, 0, "{back:?}");
    }
    // What was left of a pod that was taken away while its monitor died.
    for (name, state) in pods(b) {
        assert_eq!(state, "stopped");
        b.ok(["rm", &name]);
    }
}

/// Options of a pod that is reached at a port of its host.
const PUBLISHED: [&str; 2] = ["-p", "8080:80"];

/// More than either side sends.
const FRAMES: u32 = 100;

/// Has the stream break before each of the frames that a side sends: by itself, or with the monitor of that side.
fn cut_everywhere(side: &str, name: &'static str, dies: bool) {
    let (a, b) = (Host::new(), Host::new());
    Counter::start(&a, "counter", &PUBLISHED);
    let mut outcomes = Outcomes::of(name);
    for frame in 0..FRAMES {
        let cut = format!("{side}:{frame}{}", if dies { ":dies" } else { "" });
        let clean = Clean::destination(&b);
        let done = migrate(&a, &b, "counter", &[("ZAP_CUT", &cut)], &[]);
        if done.code == 0 {
            assert!(frame > 2 && runs(&b) && pods(&a).is_empty());
            return outcomes.write();
        }
        assert!(dies || (done.code, done.stderr.contains("counter")) == (1, true), "{cut}: {done:?}");
        one_lives(&a, &b, &done, &cut);
        let fault = if dies { format!("{side} killed") } else { format!("wire cut by the {side}") };
        outcomes.note(format!("{fault} before frame {frame}"), where_it_lives(&a));
        bring_back(&a, &b);
        clean.again(&cut);
    }
    panic!("it has not arrived after {FRAMES} attempts");
}

#[test]
fn the_source_is_cut_off_before_every_frame() {
    cut_everywhere("source", "cut-source", false);
}

#[test]
fn the_destination_is_cut_off_before_every_frame() {
    cut_everywhere("destination", "cut-destination", false);
}

#[test]
fn the_source_is_killed_before_every_frame() {
    cut_everywhere("source", "killed-source", true);
}

#[test]
fn the_destination_is_killed_before_every_frame() {
    cut_everywhere("destination", "killed-destination", true);
}

#[test]
fn the_stream_is_cut_in_the_middle_of_pages() {
    let (a, b) = (Host::new(), Host::new());
    // Most of what is sent is its memory, of which this much is certain: how often pages are sent anew depends on the machine.
    const CERTAIN: u64 = 2_700_000;
    let script = format!("{} x=$(head -c 2000000 /dev/urandom | base64); {}", counter::SERVE, counter::COUNT);
    Counter::start_command(&a, "counter", &[], &["sh", "-c", &script]);
    let done = migrate(&a, &b, "counter", &[], &["--stats"]);
    assert_eq!(done.code, 0, "{done:?}");
    let stats: serde_json::Value = serde_json::from_str(done.stdout.trim_end()).unwrap();
    assert!(stats["bytes"].as_u64().unwrap() > CERTAIN, "{stats}");
    bring_back(&a, &b);
    let mut outcomes = Outcomes::of("cut-in-pages");
    for tenths in 1..10 {
        let limit = CERTAIN * tenths / 10;
        // Nobody but `head` has the end that is read from, so that the source sees it go.
        let head = format!("stdbuf -o0 head -c {limit} <&3 3<&-");
        let way = format!("exec 3<&0 </dev/null; {head} | {} 3<&- & exec 3<&-; wait", via(&b));
        let done = finish(a.zap(["migrate", "counter", "--via", &way]).stdin(Stdio::null()));
        assert_eq!(done.code, 1, "{limit}: {done:?}");
        assert!(runs(&a) && pods(&b).is_empty(), "{limit} of {CERTAIN}");
        Counter::of(&a, "counter").goes_on();
        outcomes.note(format!("wire cut after {tenths}0 % of its memory"), where_it_lives(&a));
    }
    outcomes.write();
}

fn killed_everywhere(table: &str, points: impl Iterator<Item = String>) {
    let mut outcomes = Outcomes::of(table);
    for point in points {
        let point = &*point;
        let (a, b) = (Host::new(), Host::new());
        Counter::start(&a, "counter", &PUBLISHED);
        let clean = Clean::destination(&b);
        let done = migrate(&a, &b, "counter", &[("ZAP_FAULT", point)], &[]);
        // What is left of the source's copy when its monitor dies after all was done is an ended pod.
        if point == "migrate-away" {
            eventually("the source's copy is known to have ended", || {
                pods(&a) == [("counter".to_owned(), "stopped".to_owned())]
            });
            a.ok(["rm", "counter"]);
        }
        one_lives(&a, &b, &done, point);
        outcomes.note_at(point, where_it_lives(&a));
        bring_back(&a, &b);
        clean.again(point);
    }
    outcomes.write();
}

#[test]
fn the_source_is_killed_at_every_point() {
    killed_everywhere("migrate", fault_points("migrate-"));
}

#[test]
fn the_destination_is_killed_at_every_point() {
    killed_everywhere("receive", fault_points("receive-").chain(fault_points("birth-")));
}

/// A line that a child prints on stderr, by what is in it.
fn heard(lines: &mut impl Iterator<Item = std::io::Result<String>>, words: &str) -> String {
    lines.map(Result::unwrap).find(|line| line.contains(words)).unwrap()
}

#[test]
fn over_a_network_both_sides_must_know_each_other() {
    let a = Host::new();
    let other = a.path("other");
    let there = |words: &[&str]| {
        let mut command = a.zap(words);
        command.env("ZAP_STATE", &other);
        command
    };
    let key = |keys: Done| keys.stdout.split(' ').next().unwrap().to_owned();
    let own = key(finish(&mut a.zap(["keys"])));
    let mut listening = there(&["receive", "--listen", "127.0.0.1:0"]).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(listening.stderr.take().unwrap()));
    let line = heard(&mut lines, "listening at");
    let address = line.split(&[' ', ';'][..]).find(|word| word.starts_with("127.")).unwrap().to_owned();
    let theirs = line.rsplit(' ').next().unwrap().to_owned();
    assert_eq!(key(finish(&mut there(&["keys"]))), theirs);

    let counter = Counter::start(&a, "counter", &["--net", "private"]);
    let migrate = || a.run(["migrate", "counter", "--to", &address]);
    let refused = |done: Done| {
        assert_eq!(done.code, 1, "{done:?}");
        assert!(done.stderr.contains("goes on here"), "{done:?}");
        counter.goes_on();
        done.stderr
    };
    let words = refused(migrate());
    assert!(words.contains(&format!("zap keys --add {theirs}")), "{words}");
    heard(&mut lines, "127.0.0.1");
    a.ok(["keys", "--add", &theirs, "--name", "there"]);
    refused(migrate());
    assert!(heard(&mut lines, "127.0.0.1").contains(&own));
    assert_eq!(finish(there(&["keys", "--add", &own]).stdin(Stdio::null())).code, 0);
    let done = migrate();
    assert_eq!(done.code, 0, "{done:?}");
    assert_eq!(pods(&a), []);
    let rows = finish(&mut there(&["ls", "--json"])).stdout;
    assert!(rows.contains("\"counter\"") && rows.contains("running"), "{rows}");
    assert_eq!(finish(&mut there(&["rm", "-f", "counter"])).code, 0);
    listening.kill().unwrap();
    listening.wait().unwrap();
    assert_eq!(a.run(["migrate", "counter", "--to", &address]).code, 6);
    assert_eq!(a.run(["keys", "--add", "short"]).code, 2);
    assert_eq!(a.run(["keys", "--remove", "there"]).code, 0);
    assert_eq!(a.run(["keys", "--remove", "there"]).code, 6);
}

#[test]
fn an_interrupted_command_leaves_the_pod_where_it_is() {
    let (a, b) = (Host::new(), Host::new());
    let counter = Counter::start(&a, "counter", &[]);
    // A way that stalls: the greeting comes, and nothing after it.
    let greeted = a.path("greeted");
    let way = format!("printf zap/mig1; touch '{}'; exec sleep 60", greeted.display());
    let mut command = a.zap(["migrate", "counter", "--via", &way]);
    let mut child = command.stdin(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    eventually("the greeting", || greeted.exists());
    std::thread::sleep(std::time::Duration::from_millis(300));
    child.kill().unwrap();
    child.wait().unwrap();
    counter.goes_on();
    let done = migrate(&a, &b, "counter", &[], &[]);
    assert_eq!(done.code, 0, "{done:?}");
    Counter::of(&b, "counter").goes_on();
}
