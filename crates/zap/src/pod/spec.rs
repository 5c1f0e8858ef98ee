//! A pod as it was asked for and born. Travels in every image.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Whether a pod may be called so: up to 64 letters, digits, `.`, `_` and `-`, the first a letter or digit. Names become
/// those of files.
pub fn is_name(text: &str) -> bool {
    let fine = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
    text.starts_with(|first: char| first.is_ascii_alphanumeric()) && text.len() <= 64 && text.chars().all(fine)
}

/// Everything that makes a pod what it is, apart from its processes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodSpec {
    /// Its name in the registry.
    pub name: String,
    /// Host name inside.
    pub hostname: String,
    /// The directory under the overlay, `/` for the host's own.
    pub root: PathBuf,
    /// External files and directories.
    pub binds: Vec<Bind>,
    /// How it is connected.
    pub network: NetworkMode,
    /// The address it was born with and keeps inside for life; `None` unless the network is a bridge.
    pub address: Option<AddressPlan>,
    /// Ports of the host that lead into it.
    pub publish: Vec<Publish>,
    /// Its first command: program and arguments.
    pub command: Vec<String>,
    /// Environment of the first command, `KEY=VALUE`.
    pub environment: Vec<String>,
    /// `USER[:GROUP]` of the first command, names or numbers, looked up in the pod's root.
    pub user: Option<String>,
    /// Working directory of the first command.
    pub workdir: PathBuf,
    /// Whether the console is a pty (`-t`); pipes otherwise.
    pub tty: bool,
    /// Whether stdin stays open (`-i`).
    pub interactive: bool,
    /// Resource limits.
    pub limits: Limits,
    /// Capabilities of its processes (bounding set), by number.
    pub capabilities: Vec<u32>,
    /// System call filter.
    pub seccomp: Seccomp,
    /// Remove it when its command ends.
    pub remove: bool,
}

impl PodSpec {
    /// A pod called `name` that runs `command` as `zap run -d` does without further options.
    pub fn new(name: &str, command: &[&str]) -> PodSpec {
        PodSpec {
            name: name.to_owned(),
            hostname: name.to_owned(),
            root: "/".into(),
            binds: Vec::new(),
            network: NetworkMode::Bridge,
            address: None,
            publish: Vec::new(),
            command: command.iter().map(|word| (*word).to_owned()).collect(),
            environment: Vec::new(),
            user: None,
            workdir: "/".into(),
            tty: false,
            interactive: false,
            limits: Limits::default(),
            capabilities: super::capabilities::resolve(&[], &[]).unwrap_or_default(),
            seccomp: Seccomp::Default,
            remove: false,
        }
    }
}

/// A bind mount.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bind {
    /// Path on the host.
    pub source: PathBuf,
    /// Path in the pod.
    pub target: PathBuf,
    /// Whether it is read-only.
    pub read_only: bool,
}

/// How a pod is connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NetworkMode {
    /// A veth on the host's bridge, with an address of its own.
    Bridge,
    /// Loopback only.
    Private,
    /// The host's own network namespace. Such a pod's sockets cannot be moved.
    Host,
}

/// The addresses of a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressPlan {
    /// IPv4 address.
    pub ipv4: Ipv4Addr,
    /// Prefix length of the IPv4 network.
    pub prefix4: u8,
    /// IPv4 gateway: the bridge.
    pub gateway4: Ipv4Addr,
    /// IPv6 address.
    pub ipv6: Ipv6Addr,
    /// Prefix length of the IPv6 network.
    pub prefix6: u8,
    /// IPv6 gateway: the bridge.
    pub gateway6: Ipv6Addr,
    /// MAC address.
    pub mac: [u8; 6],
}

/// A published port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Publish {
    /// Address on the host; all if absent.
    pub address: Option<std::net::IpAddr>,
    /// Port on the host.
    pub host_port: u16,
    /// Port in the pod.
    pub pod_port: u16,
    /// UDP rather than TCP.
    pub udp: bool,
}

/// Resource limits, where the host's cgroups allow them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Bytes of memory.
    pub memory: Option<u64>,
    /// Thousandths of a CPU.
    pub cpus: Option<u64>,
    /// Processes and threads.
    pub pids: Option<u64>,
}

/// Which system call filter the pod's processes get.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Seccomp {
    /// The built-in profile.
    Default,
    /// None.
    Unconfined,
    /// A profile in JSON, its text.
    Profile(String),
}

/// Whether somebody in the pod may change its host name.
pub(crate) fn may_name_itself(spec: &PodSpec) -> bool {
    super::capabilities::includes(&spec.capabilities, "SYS_ADMIN")
}
