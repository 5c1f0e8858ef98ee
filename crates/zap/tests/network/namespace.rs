//! A network namespace: a thread that lives in it and does what it is told. It goes with the thread.

use std::net::{IpAddr, Ipv6Addr};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use zap::ids::HostPid;

/// How long anything may take on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

type Job = Box<dyn FnOnce() + Send>;

pub(crate) struct Namespace {
    thread: HostPid,
    jobs: Option<Sender<Job>>,
    handle: Option<JoinHandle<()>>,
}

impl Namespace {
    /// A fresh one, with its loopback interface on.
    pub(crate) fn new() -> Namespace {
        let (jobs, queue) = channel::<Job>();
        let (ready, thread) = channel();
        let handle = std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).expect("network namespaces need root");
            ready.send(HostPid(nix::unistd::gettid().as_raw())).unwrap();
            queue.iter().for_each(|job| job());
        });
        let namespace = Namespace { thread: thread.recv().unwrap(), jobs: Some(jobs), handle: Some(handle) };
        zap::pod::network::loopback(namespace.thread).unwrap();
        namespace
    }

    pub(crate) fn id(&self) -> HostPid {
        self.thread
    }

    /// Runs `act` in it.
    pub(crate) fn run<T: Send + 'static>(&self, act: impl FnOnce() -> T + Send + 'static) -> T {
        let (result, received) = channel();
        self.jobs.as_ref().unwrap().send(Box::new(move || drop(result.send(act())))).unwrap();
        received.recv().expect("the job panicked in its namespace")
    }

    pub(crate) fn links(&self) -> Vec<String> {
        let text = self.run(|| std::fs::read_to_string("/proc/thread-self/net/dev").unwrap());
        let mut names: Vec<_> = text.lines().skip(2).map(|l| l.split(':').next().unwrap().trim().to_owned()).collect();
        names.sort();
        names
    }

    pub(crate) fn await_links(&self, there: impl Fn(&[String]) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !there(&self.links()) {
            assert!(Instant::now() < deadline, "still there: {:?}", self.links());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    pub(crate) fn addresses(&self, link: &'static str) -> Vec<IpAddr> {
        self.run(move || {
            let all = nix::ifaddrs::getifaddrs().unwrap().filter(|a| a.interface_name == link);
            let ip = |a: nix::ifaddrs::InterfaceAddress| {
                let address = a.address?;
                let v4 = address.as_sockaddr_in().map(|v4| v4.ip().into());
                v4.or_else(|| address.as_sockaddr_in6().map(|v6| v6.ip().into()))
            };
            all.filter_map(ip).collect()
        })
    }

    /// Whether a link is on and has its carrier.
    pub(crate) fn is_running(&self, link: &'static str) -> bool {
        self.run(move || {
            let mut all = nix::ifaddrs::getifaddrs().unwrap();
            all.any(|a| a.interface_name == link && a.flags.contains(nix::net::if_::InterfaceFlags::IFF_RUNNING))
        })
    }
}

impl Namespace {
    pub(crate) fn await_running(&self, link: &'static str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.is_running(link) {
            assert!(Instant::now() < deadline, "{link} has no carrier");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Whether a link has its carrier now: whether it is running is told later, from a work queue.
    pub(crate) fn has_carrier(&self, link: &'static str) -> bool {
        let shown = self.run(move || std::process::Command::new("ethtool").arg(link).output().unwrap());
        String::from_utf8(shown.stdout).unwrap().contains("Link detected: yes")
    }

    /// Waits until the kernel knows an address of this namespace's as its own: it adds the route of a new one from a work
    /// queue, and looks for it among the neighbours before that.
    pub(crate) fn await_own(&self, address: Ipv6Addr) {
        let route = move || {
            let shown = std::process::Command::new("ip").args(["-6", "route", "get", &address.to_string()]).output();
            String::from_utf8(shown.unwrap().stdout).unwrap()
        };
        let deadline = Instant::now() + PATIENCE;
        while !self.run(route).starts_with("local ") {
            assert!(Instant::now() < deadline, "{address} is not known");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// The tables of the packet filter, as `nft` lists them.
    pub(crate) fn tables(&self) -> String {
        let listed = self.run(|| std::process::Command::new("nft").args(["list", "tables"]).output().unwrap());
        String::from_utf8(listed.stdout).unwrap()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        self.jobs = None;
        let _ = self.handle.take().map(JoinHandle::join);
    }
}
