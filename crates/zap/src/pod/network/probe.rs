//! Trying what the network needs, in a namespace that the calling thread has to itself.

use std::io;
use std::net::Ipv4Addr;

use super::links::{self, FarEnd};
use super::netlink::{Batch, Channel};
use super::{NetworkError, lease, translate};
use crate::pod::host_config::HostConfig;

const BRIDGE: &str = "bridge";
const LINK: &str = "link";

/// Makes a bridge with a veth on it, both of which the next probe uses.
pub(super) fn bridge() -> io::Result<()> {
    let channel = Channel::route()?;
    let mut batch = Batch::default();
    links::add_bridge(&mut batch, BRIDGE, lease::mac_of(Ipv4Addr::UNSPECIFIED));
    channel.run(&batch)?;
    let bridge = links::list(&channel)?.iter().find(|l| l.name == BRIDGE).map_or(0, |l| l.index);
    let mut batch = Batch::default();
    links::add_veth(&mut batch, LINK, 0, Some(bridge), &FarEnd { name: "far", index: 0, mac: None, namespace: None });
    Ok(channel.run(&batch)?)
}

/// Installs the rules that a copy of a pod needs.
pub(super) fn exchange() -> io::Result<()> {
    let config = HostConfig::default();
    let plan = |last| {
        let address = Ipv4Addr::new(198, 18, 0, last);
        lease::plan(&config, address, None, lease::mac_of(address))
    };
    translate::install(LINK, &plan(2), &plan(3), None, None).map_err(what_the_kernel_said)
}

/// Why something could not be had.
pub(super) fn what_the_kernel_said(error: NetworkError) -> io::Error {
    match error {
        NetworkError::Kernel { source, .. } => source,
        other => io::Error::other(other.to_string()),
    }
}
