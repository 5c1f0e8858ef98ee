//! Hosts of pods with different kernels on one network: this machine's, in a namespace, and guests.

use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use super::{Guest, Kernel, Machine};
use crate::lab::{CLIENT, CLIENT_PORT, Lab, Listed, Netns, built_beside, wait_for, zap_binary};

/// The bridge that all hosts are on, and the client.
const BRIDGE: &str = "sw";
/// A guest's interface there, and its zap's registry.
const UPLINK: &str = "eth1";
const STATE: &str = "/run/zap-host";
/// How long something may take in a guest that an idle machine does at once.
const PATIENCE: Duration = Duration::from_secs(180);

/// One network, this machine as a host of pods on it, and a client. Guests come as [visitors](Visitor).
#[derive(Debug)]
pub struct World {
    /// This machine.
    pub here: Lab,
    switch: Arc<Netns>,
}

impl World {
    /// A world without guests.
    pub fn new() -> Result<Self> {
        let (switch, client) = (Arc::new(Netns::new()?), Arc::new(Netns::new()?));
        switch.ip(&[&format!("link add {BRIDGE} type bridge"), &format!("link set {BRIDGE} up")])?;
        let plug = |netns: &Netns, interface: &str, port: &str| {
            netns.connect(interface, &switch, port)?;
            switch.ip(&[&format!("link set {port} master {BRIDGE}")]).map(drop)
        };
        plug(&client, "eth0", "client")?;
        client.ip(&[&format!("address add {CLIENT}/16 dev eth0")])?;
        let here = Lab::wired(zap_binary()?, client, |host| plug(host, CLIENT_PORT, "here"))?;
        Ok(Self { here, switch })
    }

    /// Boots a guest that is a host of pods on the network.
    pub fn invite(&self, kernel: &Kernel, machine: Machine<'_>) -> Result<Visitor<'_>> {
        let guest = Guest::boot(kernel, machine, self.switch.clone(), BRIDGE)?;
        guest.run(&["mkdir", STATE])?;
        guest.run(&["sh", "-c", &format!("echo 'uplink = \"{UPLINK}\"' >{STATE}/config.toml")])?;
        Ok(Visitor { world: self, guest })
    }
}

/// A guest that is a host of pods.
#[derive(Debug)]
pub struct Visitor<'w> {
    /// The machine.
    pub guest: Guest,
    world: &'w World,
}

impl Visitor<'_> {
    /// The words of a command of zap's there.
    fn words<'a>(zap: &'a str, arguments: &[&'a str]) -> Vec<&'a str> {
        [&[zap, "--state", STATE], arguments].concat()
    }

    /// Runs `zap` there to its end: its exit code, what it said, and what it complained about.
    pub fn try_zap(&self, arguments: &[&str]) -> Result<(i32, String, String)> {
        let zap = zap_binary()?;
        self.guest.output(&Self::words(&zap.to_string_lossy(), arguments))
    }

    /// The same; what it said. Anything but exit code 0 is an error.
    pub fn zap(&self, arguments: &[&str]) -> Result<String> {
        let (code, stdout, stderr) = self.try_zap(arguments)?;
        ensure!(code == 0, "in the guest, zap {} ended with {code}: {}", arguments.join(" "), stderr.trim());
        Ok(stdout)
    }

    /// The pods there.
    pub fn pods(&self) -> Result<Vec<Listed>> {
        serde_json::from_str(&self.zap(&["ls", "--json"])?).context("reading the list of pods in the guest")
    }

    /// Waits until a pod there has printed something.
    pub fn await_log(&self, pod: &str, text: &str) -> Result<()> {
        wait_for(text, PATIENCE, || {
            let log = self.zap(&["logs", pod])?;
            ensure!(log.contains(text), "pod {pod} has printed {log:?}");
            Ok(())
        })
    }

    /// Moves a pod from this machine into the guest.
    pub fn take(&self, pod: &str, options: &[&str]) -> Result<Moved> {
        let (code, said, complaint) = self.try_to_take(pod, options)?;
        ensure!(code == 0, "zap migrate into the guest ended with {code}: {complaint}");
        Moved::told(&said)
    }

    /// The same; the exit code of `zap migrate`, what it said, and what it complained about.
    pub fn try_to_take(&self, pod: &str, options: &[&str]) -> Result<(i32, String, String)> {
        let zap = zap_binary()?;
        let receive = Self::words(&zap.to_string_lossy(), &["receive"]).join(" ");
        let way = format!("{} {receive}", self.guest.way_in()?);
        let words = [&["migrate", pod, "--stats", "--via", &way], options].concat();
        let (output, _) = self.world.here.try_zap(&words)?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok((output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr)))
    }

    /// Moves a pod from the guest to this machine.
    pub fn give(&self, pod: &str, options: &[&str]) -> Result<Moved> {
        let (code, said, complaint) = self.try_to_give(pod, options)?;
        ensure!(code == 0, "zap migrate out of the guest ended with {code}: {complaint}");
        Moved::told(&said)
    }

    /// The same; the exit code of `zap migrate`, what it said, and what it complained about.
    pub fn try_to_give(&self, pod: &str, options: &[&str]) -> Result<(i32, String, String)> {
        let listener = self.guest.netns().enter(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)))??;
        let here = self.guest.neighbour();
        let way = format!("{} pipe {here}:{}", built_beside("kernel-guest")?.display(), listener.local_addr()?.port());
        let words = [&["migrate", pod, "--stats", "--via", &way], options].concat();
        std::thread::scope(|scope| {
            let given = scope.spawn(|| self.try_zap(&words));
            self.receive(&listener, || given.is_finished())?;
            given.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Has this machine's zap receive from the first that connects, unless nobody will.
    fn receive(&self, listener: &TcpListener, over: impl Fn() -> bool) -> Result<()> {
        listener.set_nonblocking(true)?;
        let stream = wait_for("the guest to call", PATIENCE, || match listener.accept() {
            Ok((stream, _)) => Ok(Some(stream)),
            Err(_) if over() => Ok(None),
            Err(error) => Err(error).context("nobody has"),
        })?;
        let Some(stream) = stream else { return Ok(()) };
        stream.set_nonblocking(false)?;
        stream.set_nodelay(true)?;
        let [stdin, stdout] = [stream.try_clone()?, stream].map(|end| Stdio::from(OwnedFd::from(end)));
        let mut command = Command::new(zap_binary()?);
        command.arg("--state").arg(self.world.here.state()).arg("receive").stdin(stdin).stdout(stdout);
        let mut child = self.world.here.host().spawn(&mut command)?;
        // What it held of the connection must be gone before it is waited for.
        drop(command);
        child.wait().context("waiting for zap receive")?;
        Ok(())
    }
}

/// What `zap migrate --stats` says that matters here.
#[derive(Clone, Debug, Deserialize)]
pub struct Moved {
    /// Microseconds for which the pod ran nowhere.
    pub downtime_us: u64,
    /// Microseconds of all of it.
    pub total_us: u64,
    /// Times that memory was looked through.
    pub rounds: u64,
}

impl Moved {
    fn told(stdout: &str) -> Result<Self> {
        let line = stdout.lines().last().context("--stats printed nothing")?;
        serde_json::from_str(line).with_context(|| format!("--stats printed {line:?}"))
    }
}
