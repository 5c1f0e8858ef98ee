//! A workload without a pod: the other side of every comparison.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{Lab, Netns, cleanup, served_at, wait_until};
use crate::workload::Workload;

/// A workload that runs in a bare network namespace on the same bridge as the pods. It ends when this is dropped.
#[derive(Debug)]
pub struct Native {
    netns: Arc<Netns>,
    child: Child,
    address: Ipv4Addr,
    directory: PathBuf,
}

impl Native {
    /// Where it serves.
    pub fn served_at(&self) -> SocketAddr {
        served_at(self.address)
    }

    /// Its network namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        // Asked to end, a server waits for its own children; only what does not listen is killed.
        let asked = kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM);
        let ended = wait_until("a native workload to end", || match self.child.try_wait()? {
            Some(_) => Ok(()),
            None => anyhow::bail!("process {} goes on", self.child.id()),
        });
        let killed = cleanup::end_processes(&self.netns);
        for error in [asked.err().map(Into::into), ended.err(), killed.err()].into_iter().flatten() {
            eprintln!("ending a native workload: {error:#}");
        }
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

impl Lab {
    /// Starts `workload` natively and waits until it is ready. There must be a pod, and so a bridge.
    pub fn start_native(&self, workload: &dyn Workload) -> Result<Native> {
        static NEXT: AtomicU8 = AtomicU8::new(0);
        // Their numbers are free again long before they come round.
        let number = 20 + NEXT.fetch_add(1, Ordering::Relaxed) % 200;
        let address = Ipv4Addr::new(198, 18, 255, number);
        let port = format!("native{number}");
        let netns = self.another_netns()?;
        netns.connect("eth0", self.host(), &port)?;
        netns.ip(&[&format!("address add {address}/16 dev eth0")])?;
        self.attach(&port)?;
        let directory = self.directory().join(&port);
        std::fs::create_dir(&directory).with_context(|| format!("making {}", directory.display()))?;
        let recipe = workload.natively(self, &directory)?;
        let log = File::create(directory.join("output")).context("making a log")?;
        // A session of its own, as a pod's command has: the scheduler shares CPUs among sessions (autogroup), and Apache
        // ends by sending SIGTERM to its whole process group.
        let mut command = Command::new("setsid");
        command.args(&recipe.command).envs(recipe.environment).stdin(Stdio::null());
        command.stdout(log.try_clone().context("sharing a log")?).stderr(log);
        let child = netns.spawn(&mut command)?;
        let native = Native { netns, child, address, directory };
        workload.ready(self, native.served_at()).with_context(|| format!("{} natively", workload.name()))?;
        Ok(native)
    }
}
