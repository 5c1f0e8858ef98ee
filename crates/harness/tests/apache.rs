//! Debian's Apache in a pod, with clients connected, through checkpoints and restarts.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use anyhow::ensure;
use harness::client::{Connection, Crowd, HttpError};
use harness::lab::{Lab, PATIENCE, Pod, PodOptions, resident, wait_until};
use harness::workload::{Apache, Mpm, Workload};

const IDLE: usize = 46;
const DOWNLOADING: usize = 4;

struct Site {
    lab: Lab,
    apache: Apache,
}

impl Site {
    fn new(mpm: Mpm) -> Self {
        Self { lab: Lab::new().unwrap(), apache: Apache { mpm } }
    }

    fn start(&self) -> Pod<'_> {
        self.lab.start_pod(&self.apache, "web", &PodOptions::default()).unwrap()
    }

    fn image(&self) -> PathBuf {
        self.lab.directory().join("image")
    }

    /// A connection over which something was asked.
    fn connection(&self, pod: &Pod<'_>) -> Connection {
        let address = pod.served_at().unwrap();
        let open = || {
            let mut connection = Connection::open(address, PATIENCE)?;
            connection.get_file("1k.bin")?;
            Ok::<_, HttpError>(connection)
        };
        self.lab.client().enter(open).unwrap().unwrap()
    }

    /// Waits until the client's kernel has asked three times more over a connection that nobody answers.
    fn await_repetitions(&self, port: u16) {
        wait_until("a client's kernel to ask again and again", || {
            let mut command = Command::new("ss");
            let output = self.lab.client().output(command.args(["-Htin", &format!("sport = :{port}")]))?;
            let shown = String::from_utf8_lossy(&output.stdout).into_owned();
            let times = shown.split_whitespace().find_map(|word| word.strip_prefix("backoff:")?.parse::<u32>().ok());
            ensure!(times >= Some(3), "ss says {shown:?}");
            Ok(())
        })
        .unwrap();
    }

    fn crowd(&self, pod: &Pod<'_>) -> Crowd {
        Crowd::open(self.lab.client(), pod.served_at().unwrap(), IDLE, DOWNLOADING, PATIENCE).unwrap()
    }

    fn restart(&self, options: &[&str]) -> Pod<'_> {
        self.lab.restart(&self.image(), options).unwrap().0
    }

    fn assert_healthy(&self, pod: &Pod<'_>) {
        self.apache.health(&self.lab, pod.served_at().unwrap()).unwrap();
    }

    /// What the server says about itself under `key`.
    fn status(&self, pod: &Pod<'_>, key: &str) -> anyhow::Result<String> {
        let address = pod.served_at()?;
        let text = self.lab.client().enter(|| Connection::open(address, PATIENCE)?.get("/server-status?auto"))??;
        let text = String::from_utf8(text)?;
        let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(": "));
        value.map(Into::into).ok_or_else(|| anyhow::anyhow!("no {key} in {text}"))
    }

    fn assert_reloads(&self, pod: &Pod<'_>) {
        let generation = || anyhow::Ok(self.status(pod, "ParentServerConfigGeneration")?.parse::<u32>()?);
        let before = generation().unwrap();
        pod.exec(&["env", "APACHE_CONFDIR=/srv/apache", "apachectl", "graceful"]).unwrap();
        wait_until("the graceful reload", || {
            let now = generation()?;
            anyhow::ensure!(now == before + 1, "generation {now}, {before} before");
            Ok(())
        })
        .unwrap();
    }

    fn assert_logs(&self, pod: &Pod<'_>) {
        // Apache logs a request after it has answered it, so those of others may come meanwhile: nobody else asks for this.
        static ASKED: AtomicU32 = AtomicU32::new(0);
        let path = format!("/1k.bin?{}", ASKED.fetch_add(1, Ordering::Relaxed));
        let address = pod.served_at().unwrap();
        self.lab.client().enter(|| Connection::open(address, PATIENCE)?.get(&path)).unwrap().unwrap();
        wait_until("a line in the access log", || {
            let log = pod.exec(&["cat", "/var/local/apache/log/access.log"])?;
            let lines = log.lines().filter(|line| line.contains(&format!("GET {path} "))).count();
            anyhow::ensure!(lines == 1, "{lines} lines of {path}");
            Ok(())
        })
        .unwrap();
    }
}

fn connections_survive_being_left_running(mpm: Mpm) {
    let site = Site::new(mpm);
    let pod = site.start();
    let mut crowd = site.crowd(&pod);
    let (stats, _) = pod.checkpoint(&site.image(), &["--leave-running"]).unwrap();
    assert!(stats.processes > 8 && stats.pages > 0, "{stats:?}");
    crowd.use_once().unwrap();
    crowd.finish().unwrap();
    site.assert_healthy(&pod);
}

fn connections_survive_a_restart(mpm: Mpm) {
    let site = Site::new(mpm);
    let pod = site.start();
    let mut crowd = site.crowd(&pod);
    let mut early = site.connection(&pod);
    let memory = resident(&pod.processes().unwrap()).unwrap();
    pod.checkpoint(&site.image(), &[]).unwrap();
    assert!(site.lab.pods().unwrap().is_empty(), "a checkpoint that stops a pod leaves none");
    // The server lies on a disk; a client that asks meanwhile must not notice more than that it takes a while.
    let port = early.local_port().unwrap();
    let asked = std::thread::spawn(move || early.get_file("1k.bin"));
    site.await_repetitions(port);
    let pod = site.restart(&[]);
    if mpm == Mpm::Prefork {
        // Before the server works: what it has mapped of the files that it sends changes with every part of them.
        // Pages of files are mapped in again beside its first steps.
        let weighed = wait_until("the pod to weigh what it weighed", || {
            let after = resident(&pod.processes()?)?;
            assert_alike(after.total, memory.total)?;
            assert_alike(after.anonymous, memory.anonymous)
        });
        weighed.unwrap();
    }
    asked.join().unwrap().unwrap();
    crowd.use_once().unwrap();
    if mpm == Mpm::Prefork {
        assert_alike(resident(&pod.processes().unwrap()).unwrap().anonymous, memory.anonymous).unwrap();
    }
    crowd.finish().unwrap();

    site.assert_healthy(&pod);
    site.assert_logs(&pod);
    site.assert_reloads(&pod);
    site.assert_healthy(&pod);

    let mut crowd = site.crowd(&pod);
    let again = site.lab.directory().join("again");
    pod.checkpoint(&again, &[]).unwrap();
    let (pod, _, _) = site.lab.restart(&again, &[]).unwrap();
    crowd.use_once().unwrap();
    crowd.finish().unwrap();
    site.assert_healthy(&pod);
}

fn assert_alike(after: u64, before: u64) -> anyhow::Result<()> {
    let share = after as f64 / before as f64;
    ensure!((0.9..=1.1).contains(&share), "{after} bytes, {before} before: {share:.2}");
    Ok(())
}

fn copies_live_side_by_side(mpm: Mpm) {
    let site = Site::new(mpm);
    let pod = site.start();
    let crowd = site.crowd(&pod);
    pod.checkpoint(&site.image(), &["--leave-running"]).unwrap();
    let copies: Vec<_> = ["one", "two", "three"].iter().map(|name| site.restart(&["-n", name])).collect();
    let all: Vec<_> = copies.iter().chain([&pod]).collect();
    let addresses: BTreeSet<_> = all.iter().map(|pod| pod.served_at().unwrap()).collect();
    assert_eq!(addresses.len(), 4, "each has an address of its own: {addresses:?}");
    for pod in &all {
        site.assert_healthy(pod);
        site.assert_logs(pod);
    }
    // The original's connections are its own.
    crowd.finish().unwrap();
    for copy in copies {
        site.assert_reloads(&copy);
        copy.remove().unwrap();
        site.assert_healthy(&pod);
    }
}

macro_rules! on_each_mpm {
    ($($module:ident: $mpm:expr),*) => {$(
        mod $module {
            use super::*;

            #[test]
            fn connections_survive_being_left_running() {
                super::connections_survive_being_left_running($mpm);
            }

            #[test]
            fn connections_survive_a_restart() {
                super::connections_survive_a_restart($mpm);
            }

            #[test]
            fn copies_live_side_by_side() {
                super::copies_live_side_by_side($mpm);
            }
        }
    )*};
}

on_each_mpm!(event: Mpm::Event, worker: Mpm::Worker, prefork: Mpm::Prefork);

#[test]
fn a_storm_of_short_connections_loses_no_request_to_a_checkpoint() {
    let site = Site::new(Mpm::Event);
    let pod = site.start();
    let to = pod.served_at().unwrap();
    let over = AtomicBool::new(false);
    let storm = || {
        let mut served = 0;
        // Each leaves a port behind for a minute: together fewer than a host has.
        while !over.load(Ordering::Relaxed) && served < 6000 {
            Connection::open(to, PATIENCE)?.get_file("1k.bin")?;
            served += 1;
        }
        Ok::<usize, HttpError>(served)
    };
    let (checkpoints, served) = std::thread::scope(|scope| {
        let storms: Vec<_> = (0..4).map(|_| scope.spawn(|| site.lab.client().enter(storm).unwrap())).collect();
        let checkpoints: anyhow::Result<()> = (0..10).try_for_each(|_| {
            pod.checkpoint(&site.image(), &["--leave-running"])?;
            Ok(std::fs::remove_dir_all(site.image())?)
        });
        over.store(true, Ordering::Relaxed);
        let served: Result<Vec<_>, _> = storms.into_iter().map(|storm| storm.join().unwrap()).collect();
        (checkpoints, served)
    });
    checkpoints.unwrap();
    let served: usize = served.unwrap().iter().sum();
    assert!(served > 40, "{served} requests");
    site.assert_healthy(&pod);
}

/// What a host has that a pod could leave behind.
#[derive(Debug, PartialEq)]
struct Residue {
    mounts: BTreeSet<String>,
    links: String,
    addresses: String,
    rules: String,
    processes: BTreeSet<String>,
}

impl Residue {
    fn of(lab: &Lab) -> Self {
        let state = lab.directory().to_str().unwrap();
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        let rules = lab.host().output(std::process::Command::new("nft").args(["list", "ruleset"])).unwrap();
        Self {
            mounts: mounts.lines().filter(|line| line.contains(state)).map(Into::into).collect(),
            links: lab.host().ip(&["-brief link show"]).unwrap(),
            addresses: lab.host().ip(&["-brief address show"]).unwrap(),
            rules: String::from_utf8(rules.stdout).unwrap(),
            processes: std::fs::read_dir("/proc")
                .unwrap()
                .flatten()
                .filter_map(|e| speaks_of(&e.path(), state))
                .collect(),
        }
    }
}

/// The command line of `process` if the lab's directory is in it.
fn speaks_of(process: &Path, state: &str) -> Option<String> {
    let arguments = std::fs::read(process.join("cmdline")).ok()?;
    let arguments = String::from_utf8_lossy(&arguments).replace('\0', " ");
    arguments.contains(state).then_some(arguments)
}

/// The directories of the pod's own control groups.
fn cgroups(lab: &Lab, pod: &Pod<'_>) -> Vec<PathBuf> {
    let init = lab.pods().unwrap().into_iter().find(|p| p.name == pod.name()).unwrap().init_pid.unwrap();
    let groups = std::fs::read_to_string(format!("/proc/{init}/cgroup")).unwrap();
    let ours = std::fs::read_to_string("/proc/self/cgroup").unwrap();
    let new = groups.lines().filter(|line| !ours.contains(line)).filter_map(|line| line.splitn(3, ':').nth(2));
    let below = |path: &str| {
        ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(|root| Path::new(root).join(path.trim_start_matches('/')))
    };
    new.flat_map(below).filter(|directory| directory.is_dir()).collect()
}

#[test]
fn nothing_is_left_on_a_host_that_a_pod_has_left() {
    let site = Site::new(Mpm::Event);
    // Everything that the lab makes on first use, it makes before the look.
    site.apache.in_pod(&site.lab).unwrap();
    let before = Residue::of(&site.lab);
    let assert_clean = |when: &str, groups: &[PathBuf]| {
        assert!(!groups.is_empty(), "a pod has a control group");
        assert!(groups.iter().all(|group| !group.exists()), "{when}: {groups:?}");
        // A monitor ends after it has said that all is done.
        let clean = wait_until(when, || {
            let now = Residue::of(&site.lab);
            ensure!(now == before, "{now:#?}, not {before:#?}");
            Ok(())
        });
        clean.unwrap();
    };

    let pod = site.start();
    let groups = cgroups(&site.lab, &pod);
    pod.remove().unwrap();
    assert_clean("after rm", &groups);

    let pod = site.start();
    let groups = cgroups(&site.lab, &pod);
    pod.checkpoint(&site.image(), &[]).unwrap();
    assert_clean("after a checkpoint that stops the pod", &groups);

    let pod = site.restart(&[]);
    let groups = cgroups(&site.lab, &pod);
    pod.remove().unwrap();
    assert_clean("after a restart and rm", &groups);
}
