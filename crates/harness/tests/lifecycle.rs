//! Sequences of commands on two hosts, some at once, some killed, some with the pod's monitor killed meanwhile, against a
//! simple model of what should be: states agree, exit codes agree, nothing hangs, and nothing is left.
//!
//! `ZAP_SEED=… PROPTEST_CASES=…` tries a set of them again; what fails is made shorter first.

#![allow(clippy::unwrap_used)]

#[path = "properties/check.rs"]
mod check;
mod lifecycle {
    pub(crate) mod model;
}
#[path = "properties/remains.rs"]
mod remains;

use std::cell::Cell;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use harness::lab::{Lab, wait_until, zap_binary};
use harness::verification::Tally;
use lifecycle::model::{
    After, BRIDGED, Command, Life, Pods, Side, State, Step, Verb, after_strike, life, may_be, predict, prelude,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use proptest::prelude::*;
use remains::Remains;

type Checked<T = ()> = Result<T, TestCaseError>;

/// Longer than this nothing takes, on a busy machine too.
const PATIENCE: Duration = Duration::from_secs(60);

/// Two hosts, the images between them, and what is known of all.
struct World<'a> {
    labs: &'a [Lab; 2],
    images: PathBuf,
    /// What pods there may be: more than one where `zap ls` does not tell.
    may_be: Vec<Pods>,
    /// Those that there are, and the pod that each is of.
    written: Vec<(PathBuf, usize)>,
    /// How many commands there were.
    count: usize,
    tally: &'a Tally,
}

/// A command on its way.
struct Started {
    words: Vec<String>,
    pid: i32,
    output: std::sync::mpsc::Receiver<std::io::Result<Output>>,
}

fn name(pod: usize) -> String {
    format!("p{pod}")
}

fn fail<T>(why: impl Into<String>) -> Checked<T> {
    Err(TestCaseError::fail(why.into()))
}

impl World<'_> {
    /// The words of a command, and the image that it writes; nothing if there is no image for it.
    fn words(&mut self, command: Command) -> Option<(Vec<String>, Option<PathBuf>)> {
        self.count += 1;
        let image = self.images.join(format!("image-{}", self.count));
        let path = image.to_str().unwrap().to_owned();
        let pod = name(command.pod);
        let published = format!("808{}:80", command.pod);
        let mut words: Vec<&str> = Vec::new();
        let restarted;
        let way;
        let mut writes = None;
        match command.verb {
            Verb::Run if command.pod == BRIDGED => words.extend(["run", "-d", "-n", &pod, "-p", &published]),
            Verb::Run => words.extend(["run", "-d", "-n", &pod, "--net", "private"]),
            Verb::Exec => words.extend(["exec", &pod, "true"]),
            Verb::Suspend => words.extend(["suspend", &pod]),
            Verb::Resume => words.extend(["resume", &pod]),
            Verb::Checkpoint(after) => {
                words.extend(["checkpoint", &pod, "-o", &path]);
                words.extend(match after {
                    After::Gone => None,
                    After::Running => Some("--leave-running"),
                    After::Suspended => Some("--leave-suspended"),
                });
                writes = Some(image);
            }
            Verb::Restart(which) => {
                // A pod with an address remains one.
                let fits = |image: &&(PathBuf, usize)| (image.1 == BRIDGED) == (command.pod == BRIDGED);
                let fitting: Vec<_> = self.written.iter().filter(fits).collect();
                restarted = fitting.get(which % fitting.len().max(1))?.0.to_str().unwrap().to_owned();
                words.extend(["restart", &restarted, "-d", "-n", &pod]);
            }
            Verb::Migrate { pre_copy } => {
                way = self.labs[1 - command.host].way_in();
                let strategy = if pre_copy { "pre-copy" } else { "stop-and-copy" };
                words.extend(["migrate", &pod, "--via", &way, "--strategy", strategy]);
            }
            Verb::Terminate => words.extend(["kill", "-s", "TERM", &pod]),
            Verb::Kill => words.extend(["kill", "-s", "KILL", &pod]),
            // On a busy machine a second passes before a process has heard of its signal.
            Verb::Stop => words.extend(["stop", "-t", "10", &pod]),
            Verb::Remove { force: true } => words.extend(["rm", "-f", &pod]),
            Verb::Remove { force: false } => words.extend(["rm", &pod]),
        }
        if matches!(command.verb, Verb::Run) {
            words.extend(["--", "sh", "-c", "sleep 1000 & exec sleep 1000"]);
        }
        Some((words.into_iter().map(str::to_owned).collect(), writes))
    }

    fn start(&self, host: usize, words: Vec<String>) -> Started {
        let lab = &self.labs[host];
        let mut command = std::process::Command::new(zap_binary().unwrap());
        command.arg("--state").arg(lab.state()).args(&words);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = lab.host().spawn(&mut command).unwrap();
        let pid = child.id() as i32;
        let (sender, output) = std::sync::mpsc::channel();
        std::thread::spawn(move || sender.send(child.wait_with_output()));
        Started { words, pid, output }
    }

    /// The exit code; −1 if it was killed.
    fn ended(&self, started: Started) -> Checked<i32> {
        let Started { words, output, .. } = started;
        let Ok(output) = output.recv_timeout(PATIENCE) else { return fail(format!("{words:?} hangs")) };
        let output = output.unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        let code = output.status.code();
        // What `zap receive` says over there is shown as well.
        let most = if words[0] == "migrate" { 2 } else { 1 };
        // A program that is killed with its pod has nothing to say.
        let killed = words[0] == "exec" && matches!(code, Some(137 | 143));
        let silent = code.is_some_and(|code| code != 0) && said.is_empty() && !killed;
        if said.contains("panicked") || said.lines().count() > most || silent {
            return fail(format!("{words:?} ended with {code:?} and said {said:?}"));
        }
        self.tally.count(format!("command {}", words[0]));
        Ok(code.unwrap_or(-1))
    }

    /// What `zap ls` says of every pod.
    fn listed(&self) -> BTreeListed {
        let of = |host: usize| {
            let (text, _) = self.labs[host].zap(&["ls", "--json"]).unwrap();
            let rows: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap();
            rows.into_iter().map(move |row| {
                let pod = row["name"].as_str().unwrap()[1..].parse().unwrap();
                ((host, pod), (row["state"].as_str().unwrap().to_owned(), row["exit_code"].as_i64()))
            })
        };
        (0..2).flat_map(of).collect()
    }

    /// Waits until what there is agrees with some of these, and goes on from those.
    fn settle(&mut self, worlds: &[Pods], done: &str) -> Checked {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let listed = self.listed();
            let agree = |world: &&Pods| {
                let same = |(place, state): (&(usize, usize), &State)| {
                    listed.get(place).is_some_and(|(name, code)| state.agrees(name, *code))
                };
                world.len() == listed.len() && world.iter().all(same)
            };
            let agreeing: BTreeSet<&Pods> = worlds.iter().filter(agree).collect();
            // Whoever was told to end is listed as running until it has: one that may have been is looked at.
            let may_end =
                |place: &(usize, usize)| worlds.iter().any(|w| matches!(w.get(place), Some(State::Stopped(_))));
            let runs = |(place, (state, _)): (&(usize, usize), &(String, Option<i64>))| {
                state != "running" || !may_end(place) || self.is_at_rest(*place)
            };
            if !agreeing.is_empty() && listed.iter().all(runs) {
                self.may_be = agreeing.into_iter().cloned().collect();
                return Ok(());
            }
            if Instant::now() > deadline {
                return fail(format!("after {done} there is {listed:?}, not one of {worlds:?}"));
            }
            std::thread::sleep(Duration::from_millis(3));
        }
    }

    /// Whether the first command of a pod lives, and no signal is on its way to it.
    fn is_at_rest(&self, (host, pod): (usize, usize)) -> bool {
        const MAIN: u64 = 2;
        let (output, _) = self.labs[host].try_zap(&["ps", "--json", &name(pod)]).unwrap();
        let rows: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let Some(main) = rows.iter().find(|row| row["pid"] == MAIN).and_then(|row| row["host_pid"].as_i64()) else {
            return false;
        };
        let status = std::fs::read_to_string(format!("/proc/{main}/status")).unwrap_or_default();
        let has_none = |set: &str| status.contains(&format!("\n{set}:\t0000000000000000\n"));
        let is_ending = status.contains("\nState:\tZ") || status.contains("\nState:\tX");
        has_none("SigPnd") && has_none("ShdPnd") && !is_ending
    }

    /// An image that is there is whole.
    fn note(&mut self, image: Option<PathBuf>, pod: usize) -> Checked {
        let Some(image) = image.filter(|image| image.exists()) else { return Ok(()) };
        self.labs[0]
            .zap(&["verify", image.to_str().unwrap()])
            .map_err(|error| TestCaseError::fail(format!("{error:#}")))?;
        self.written.push((image, pod));
        Ok(())
    }

    fn take(&mut self, step: Step) -> Checked {
        match step {
            Step::One(command) => self.one(command),
            Step::Both(one, other) => self.both(one, other),
            Step::Cut(command, delay) => self.cut(command, delay),
            Step::Orphan(command) => {
                let orphaned = self.kill_monitor(command.host, command.pod);
                self.settle(&orphaned, "the death of a monitor")
            }
            Step::Crash(command, delay) => self.crash(command, delay),
            Step::Strike(command, side, delay) => self.strike(command, side, delay),
        }
    }

    fn one(&mut self, command: Command) -> Checked {
        let Some((words, image)) = self.words(command) else { return Ok(()) };
        let shown = format!("{words:?} on host {}", command.host);
        let ended = self.ended(self.start(command.host, words))?;
        let predicted = self.may_be.iter().map(|pods| predict(pods, command));
        let (right, wrong): (Vec<_>, Vec<_>) = predicted.partition(|(code, _)| *code == ended);
        if right.is_empty() {
            let codes: BTreeSet<i32> = wrong.into_iter().map(|(code, _)| code).collect();
            return fail(format!("{shown} with {:?} ended with {ended}, none of {codes:?}", self.may_be));
        }
        let after: Vec<Pods> = right.into_iter().map(|(_, after)| after).collect();
        self.settle(&after, &shown)?;
        self.note(image, command.pod)
    }

    /// Whatever comes first: what is there is what one order or the other makes.
    fn both(&mut self, one: Command, other: Command) -> Checked {
        let suspends = |c: &Command| matches!(c.verb, Verb::Suspend | Verb::Checkpoint(After::Suspended));
        let runs = |c: &Command| matches!(c.verb, Verb::Exec);
        if (suspends(&one) && runs(&other)) || (runs(&one) && suspends(&other)) {
            // A program in a pod that is suspended ends when it is resumed, and not before.
            return Ok(());
        }
        let (Some((words, image)), Some((more, other_image))) = (self.words(one), self.words(other)) else {
            return Ok(());
        };
        let shown = format!("{words:?} on host {} beside {more:?} on host {}", one.host, other.host);
        let (first, second) = (self.start(one.host, words), self.start(other.host, more));
        let codes = (self.ended(first)?, self.ended(second)?);
        let may_be: Vec<Vec<Pods>> =
            self.may_be.iter().filter_map(|pods| after_both(pods, (one, other), codes)).collect();
        if may_be.is_empty() {
            return fail(format!("{shown} with {:?} ended with {codes:?}", self.may_be));
        }
        let worlds = may_be.concat();
        self.settle(&worlds, &shown)?;
        self.quiet(&worlds, &shown)?;
        self.note(image, one.pod)?;
        self.note(other_image, other.pod)
    }

    /// A command that is killed: what it asked for is done, or not.
    fn cut(&mut self, command: Command, delay: u32) -> Checked {
        let Some((words, image)) = self.words(command) else { return Ok(()) };
        let shown = format!("{words:?} on host {}, killed after {delay} µs", command.host);
        let worlds = self.after_some_of(command, false);
        let started = self.start(command.host, words);
        std::thread::sleep(Duration::from_micros(delay.into()));
        // Not waited for yet, so the number is still its own; it may have ended.
        let _ = kill(Pid::from_raw(started.pid), Signal::SIGKILL);
        self.ended(started)?;
        self.quiet(&worlds, &shown)?;
        self.note(image, command.pod)
    }

    /// What there may be after a command that was cut off.
    fn after_some_of(&self, command: Command, monitor_died: bool) -> Vec<Pods> {
        self.may_be.iter().flat_map(|pods| may_be(pods, command, monitor_died)).collect()
    }

    /// A monitor that is killed while it does something. (In a migration it can leave a pod in doubt: [`World::strike`].)
    fn crash(&mut self, command: Command, delay: u32) -> Checked {
        if matches!(command.verb, Verb::Migrate { .. }) {
            return Ok(());
        }
        let begins = matches!(command.verb, Verb::Run | Verb::Restart(_));
        let Some((words, image)) = self.words(command) else { return Ok(()) };
        let shown = format!("{words:?} on host {}, its monitor killed after {delay} µs", command.host);
        let monitor = self.monitor(command.host, command.pod);
        let worlds = self.after_some_of(command, begins || monitor.is_some());
        let started = self.start(command.host, words);
        std::thread::sleep(Duration::from_micros(delay.into()));
        let monitor = if begins { self.registered(command.host, command.pod) } else { monitor };
        if let Some(monitor) = monitor {
            end(monitor);
        }
        self.ended(started)?;
        self.quiet(&worlds, &shown)?;
        self.note(image, command.pod)
    }

    /// A migration, and somebody who does it is killed: the pod lives at one of both, or is in doubt, which can be decided then.
    fn strike(&mut self, command: Command, side: Side, delay: u32) -> Checked {
        let Some((words, _)) = self.words(command) else { return Ok(()) };
        let shown = format!("{words:?} on host {}, {side:?} killed after {delay} µs", command.host);
        let there = 1 - command.host;
        let monitor = self.monitor(command.host, command.pod);
        let idle = self.workers(there);
        let started = self.start(command.host, words);
        std::thread::sleep(Duration::from_micros(delay.into()));
        let victim = match side {
            Side::Source => monitor,
            Side::Destination => {
                let at_work: Vec<i32> = self.workers(there).into_iter().filter(|pid| !idle.contains(pid)).collect();
                at_work.get(delay as usize % at_work.len().max(1)).copied()
            }
        };
        if let Some(victim) = victim {
            end(victim);
            self.tally.count(format!("{side:?} of a migration killed"));
        }
        self.ended(started)?;
        self.await_workers().map_err(|error| TestCaseError::fail(format!("after {shown}: {error:#}")))?;
        let kept = self.decide(command)?;
        let worlds: Vec<Pods> = self.may_be.iter().flat_map(|pods| after_strike(pods, command, kept)).collect();
        self.quiet(&worlds, &shown)
    }

    /// Decides where a pod lives, if it is in doubt; whether it is the source.
    fn decide(&self, migration: Command) -> Checked<bool> {
        let lives =
            self.listed().get(&(1 - migration.host, migration.pod)).is_some_and(|(state, _)| state == "running");
        let word = if lives { "drop" } else { "keep" };
        let words = ["migrate", "--resolve", &name(migration.pod), word].map(str::to_owned);
        let code = self.ended(self.start(migration.host, words.into()))?;
        if code == 0 {
            self.tally.count(format!("doubt that was decided: {word}"));
        }
        Ok(code == 0 && !lives)
    }

    /// Whoever runs `zap` on a host.
    fn workers(&self, host: usize) -> Vec<i32> {
        let program = zap_binary().unwrap();
        let runs = |pid: &i32| std::fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == program);
        self.labs[host].host().processes().unwrap().into_iter().filter(runs).collect()
    }

    /// The monitor of a pod, if it has one that lives.
    fn monitor(&self, host: usize, pod: usize) -> Option<i32> {
        let (output, _) = self.labs[host].try_zap(&["inspect", "--json", &name(pod)]).unwrap();
        living_monitor(&output.stdout)
    }

    /// The monitor that is written down for a pod, which may be at its beginning: nobody is asked, who would wait for it.
    fn registered(&self, host: usize, pod: usize) -> Option<i32> {
        let record = self.labs[host].state().join("pods").join(name(pod)).join("pod.json");
        living_monitor(&std::fs::read(record).ok()?)
    }

    fn kill_monitor(&self, host: usize, pod: usize) -> Vec<Pods> {
        let Some(monitor) = self.monitor(host, pod) else { return self.may_be.clone() };
        end(monitor);
        let ended = |pods: &Pods| {
            let mut pods = pods.clone();
            if let Some(state @ State::Suspended { ended: true }) = pods.get_mut(&(host, pod)) {
                *state = State::Stopped(None);
            }
            pods
        };
        self.may_be.iter().flat_map(|pods| [pods.clone(), ended(pods)]).collect()
    }

    /// Waits until nobody is at work any more, and goes on from what there is then.
    fn quiet(&mut self, worlds: &[Pods], done: &str) -> Checked {
        for _ in 0..2 {
            self.await_workers().map_err(|error| TestCaseError::fail(format!("after {done}: {error:#}")))?;
            // Monitors take requests in their order: when this one is answered, those before it have been taken.
            for ((host, pod), (state, _)) in self.listed() {
                let word = match &*state {
                    "running" => "resume",
                    "suspended" => "suspend",
                    _ => continue,
                };
                let code = self.ended(self.start(host, vec![word.to_owned(), name(pod)]))?;
                if code == 0 {
                    // It came in between: as before.
                    let back = if word == "resume" { "suspend" } else { "resume" };
                    self.ended(self.start(host, vec![back.to_owned(), name(pod)]))?;
                }
                self.await_requests(host, pod)
                    .map_err(|error| TestCaseError::fail(format!("after {done}: {error:#}")))?;
            }
        }
        self.settle(worlds, done)
    }

    /// Waits until a monitor is at no request, also of commands that were killed: it has a thread for each.
    fn await_requests(&self, host: usize, pod: usize) -> anyhow::Result<()> {
        wait_until("the end of a monitor's requests", || {
            let Some(monitor) = self.monitor(host, pod) else { return Ok(()) };
            let threads = std::fs::read_dir(format!("/proc/{monitor}/task")).into_iter().flatten().flatten();
            let name = |thread: std::fs::DirEntry| std::fs::read_to_string(thread.path().join("comm"));
            let busy = threads.filter_map(|thread| name(thread).ok()).filter(|name| name == "client\n").count();
            anyhow::ensure!(busy == 0, "monitor {monitor} is at {busy} requests");
            Ok(())
        })
    }

    /// Whoever runs `zap` on the hosts is the monitor of a pod that is listed.
    fn await_workers(&self) -> anyhow::Result<()> {
        wait_until("the last worker to end", || {
            for host in 0..2 {
                let working = self.workers(host);
                let pods: Vec<usize> =
                    self.listed().keys().filter(|place| place.0 == host).map(|place| place.1).collect();
                let monitors: Vec<i32> = pods.iter().filter_map(|pod| self.monitor(host, *pod)).collect();
                let others: Vec<_> = working.into_iter().filter(|pid| !monitors.contains(pid)).collect();
                anyhow::ensure!(others.is_empty(), "{others:?} are no monitors: {monitors:?}");
            }
            Ok(())
        })
    }
}

/// The monitor that a record names, if it lives.
fn living_monitor(record: &[u8]) -> Option<i32> {
    let record: serde_json::Value = serde_json::from_slice(record).ok()?;
    let pid = record["monitor"]["pid"].as_i64()? as i32;
    let program = std::fs::read_link(format!("/proc/{pid}/exe")).ok()?;
    (program == zap_binary().unwrap()).then_some(pid)
}

/// What there may be after two commands at once that ended with these codes; nothing if they cannot have.
fn after_both(pods: &Pods, (one, other): (Command, Command), codes: (i32, i32)) -> Option<Vec<Pods>> {
    let orders = [(one, other), (other, one)].map(|(first, second)| {
        let (code, between) = predict(pods, first);
        let (next, after) = predict(&between, second);
        (code, next, after)
    });
    let fine = [orders[0].0, orders[1].1].contains(&codes.0) || codes.0 != 0;
    let other_fine = [orders[0].1, orders[1].0].contains(&codes.1) || codes.1 != 0;
    let mut worlds: Vec<Pods> = orders.map(|order| order.2).into();
    // One may be refused because of the other, which it would not be before or after it.
    worlds.extend([one, other].map(|command| predict(pods, command).1));
    // A pod that is suspended or held while `stop` waits for it is killed when its time is over.
    for command in [one, other].into_iter().filter(|command| matches!(command.verb, Verb::Stop)) {
        for world in &mut worlds {
            if let Some(State::Stopped(code)) = world.get_mut(&(command.host, command.pod)) {
                *code = None;
            }
        }
    }
    (fine && other_fine).then_some(worlds)
}

/// Kills a process, and waits until it is gone.
fn end(pid: i32) {
    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    let gone = wait_until("a process to be gone", || {
        anyhow::ensure!(std::fs::read_link(format!("/proc/{pid}/exe")).is_err(), "{pid} is there");
        Ok(())
    });
    gone.unwrap();
}

type BTreeListed = std::collections::BTreeMap<(usize, usize), (String, Option<i64>)>;

/// A whole life of two hosts.
fn live(labs: &[Lab; 2], steps: &[Step], tally: &Tally) -> Checked {
    let before = [0, 1].map(|host| Remains::of(&labs[host]));
    let images = labs[0].directory().join("images");
    std::fs::create_dir_all(&images).unwrap();
    let mut world =
        World { labs, images: images.clone(), may_be: vec![Pods::new()], written: Vec::new(), count: 0, tally };
    let lived = prelude().iter().chain(steps).try_for_each(|step| {
        tally.count(format!("step {}", format!("{step:?}").split('(').next().unwrap_or_default()));
        world.take(*step)
    });
    for lab in labs {
        for pod in lab.pods().unwrap() {
            let removed = lab.zap(&["rm", "-f", &pod.name]);
            lived.as_ref().map_err(Clone::clone)?;
            removed.map_err(|error| TestCaseError::fail(format!("{error:#}")))?;
        }
    }
    std::fs::remove_dir_all(&images).unwrap();
    lived?;
    for (lab, before) in labs.iter().zip(&before) {
        Remains::await_equal(lab, before).map_err(TestCaseError::fail)?;
    }
    tally.count("lifecycles");
    Ok(())
}

/// Directories of the registry, of the storage, and the cache of hashes are made once.
fn used(lab: &Lab) {
    let first = lab.directory().join("first");
    lab.zap(&["run", "-d", "-n", "p9", "--", "sleep", "1000"]).unwrap();
    lab.zap(&["checkpoint", "p9", "-o", first.to_str().unwrap()]).unwrap();
    std::fs::remove_dir_all(first).unwrap();
}

#[test]
fn states_and_exit_codes_are_what_they_should_be() {
    let tally = Tally::of("lifecycle").unwrap();
    let worker = || {
        let labs = Cell::new(None);
        let tally = &tally;
        move |life: Life| {
            let fresh = || {
                let labs = [Lab::new().unwrap(), Lab::new().unwrap()];
                labs.iter().for_each(used);
                labs
            };
            // After a failure another pair: what is left of it is nobody else's.
            let pair = labs.take().unwrap_or_else(fresh);
            live(&pair, &life.0, tally)?;
            labs.set(Some(pair));
            Ok(())
        }
    };
    check::side_by_side(&tally, 50, life, worker);
    tally.write().unwrap();
}
