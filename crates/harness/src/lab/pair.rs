//! Two hosts that share the network of their pods, and a client on it: what a pod can move between.

use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::zap::{self, MigrateStats, built_beside, zap_binary};
use super::{CLIENT, CLIENT_PORT, Lab, Netns, Pod};

/// The hosts' ends of the link over which pods move.
const LINK: &str = "mig0";
const ENDS: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 99, 0, 1), Ipv4Addr::new(10, 99, 0, 2)];

/// Two hosts, each a [`Lab`], with one network for their pods and one client on it; and a link of their own.
#[derive(Debug)]
pub struct Pair {
    /// Where pods start.
    pub first: Lab,
    /// Where they move.
    pub second: Lab,
    _switch: Netns,
}

impl Pair {
    /// Two hosts with the `zap` that [`zap_binary`] finds.
    pub fn new() -> Result<Self> {
        let (switch, client) = (Netns::new()?, Netns::new()?);
        switch.ip(&["link add sw type bridge", "link set sw up"])?;
        let plug = |netns: &Netns, interface: &str, port: &str| {
            netns.connect(interface, &switch, port)?;
            switch.ip(&[&format!("link set {port} master sw")])
        };
        plug(&client, "eth0", "client")?;
        client.ip(&[&format!("address add {CLIENT}/16 dev eth0")])?;
        let client = Arc::new(client);
        let first = Lab::wired(zap_binary()?, client.clone(), |host| plug(host, CLIENT_PORT, "first").map(drop))?;
        let second = Lab::wired(zap_binary()?, client, |host| plug(host, CLIENT_PORT, "second").map(drop))?;
        first.host().connect(LINK, second.host(), LINK)?;
        for (lab, address) in [(&first, ENDS[0]), (&second, ENDS[1])] {
            lab.host().ip(&[&format!("address add {address}/30 dev {LINK}")])?;
        }
        Ok(Self { first, second, _switch: switch })
    }

    /// Has the link carry no more than so many megabits a second each way; all that it can if `None`.
    pub fn shape(&self, megabits: Option<u64>) -> Result<()> {
        for lab in [&self.first, &self.second] {
            let tc = |words: &str| lab.host().output(Command::new("tc").args(words.split(' ')));
            // There may be nothing to remove.
            tc(&format!("qdisc del dev {LINK} root"))?;
            if let Some(rate) = megabits {
                let burst = (rate * 1_000_000 / 8 / 250).max(64 << 10);
                let done = tc(&format!("qdisc add dev {LINK} root tbf rate {rate}mbit burst {burst} latency 20ms"))?;
                ensure!(done.status.success(), "tc: {}", String::from_utf8_lossy(&done.stderr).trim());
            }
        }
        Ok(())
    }

    /// The way from one host to the other, for `--via`: over the link if there is a program for it, else a pipe.
    fn way(&self, to: &Lab, over: Way) -> String {
        match over {
            Way::Pipe => to.way_in(),
            Way::Link => {
                let program = built_beside("slow-pipe").unwrap_or_default();
                let end = if std::ptr::eq(to, &self.second) { ENDS[1] } else { ENDS[0] };
                // The other end listens, and this one calls.
                format!("{} link {end} {}", program.display(), to.way_in())
            }
        }
    }

    /// Moves a pod to the other host with these options: `--stats` is among them.
    pub fn migrate(&self, from_first: bool, pod: &str, over: Way, options: &[&str]) -> Result<(Pod<'_>, MigrateStats)> {
        let (from, to) = if from_first { (&self.first, &self.second) } else { (&self.second, &self.first) };
        let way = self.way(to, over);
        let (text, _) = from.zap(&[&["migrate", pod, "--via", &way], options].concat())?;
        Ok((to.pod(pod).context("at the destination")?, zap::stats(&text)?))
    }

    /// How long it takes to carry so many bytes over the same way, with nothing else to do.
    pub fn carry(&self, bytes: u64, over: Way) -> Result<Duration> {
        let way = self.way(&self.second, over);
        let sink = way
            .replace(&self.second.way_in(), &format!("{} sh -c 'cat >/dev/null; echo'", self.second.host().way_in()));
        let begun = std::time::Instant::now();
        let script = format!("head -c {bytes} /dev/zero | {sink}");
        let done = self.first.host().output(Command::new("sh").args(["-c", &script]))?;
        ensure!(
            done.status.success() && !done.stdout.is_empty(),
            "{script}: {}",
            String::from_utf8_lossy(&done.stderr)
        );
        Ok(begun.elapsed())
    }
}

/// The options of a migration by a strategy that says how it was; one that needs a store has it in a directory of both hosts.
pub fn options_of<'a>(strategy: &'a str, store: &'a Path) -> Vec<&'a str> {
    let mut options = vec!["--strategy", strategy, "--stats"];
    if let ("flush", Some(store)) = (strategy, store.to_str()) {
        options.extend(["--store", store]);
    }
    options
}

/// How the bytes of a migration go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Through a pipe.
    Pipe,
    /// Over the link, by TCP.
    Link,
}
