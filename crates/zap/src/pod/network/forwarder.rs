//! What keeps the place of a pod that has moved to another network: its address goes on answering on the bridge, and the pod,
//! wherever it is, answers it.
//!
//! It is residual state, and nothing but kernel state that describes itself: a link on the bridge (`zf` and the address in
//! hexadecimal) whose alias says for whom it is. No process of zap's has to live for it.

use std::fs;
use std::io::Read;
use std::net::Ipv4Addr;

use super::former::FormerPlace;
use super::line::{self, Line};
use super::links::{self, Lead, Link};
use super::netlink::Behind;
use super::{Network, NetworkError, bridge, follow, kernel, namespace, open};
use crate::pod::host_config::HostConfig;

const MARK: &str = "zap forwards";

/// A forwarder of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forwarder {
    /// The name of the pod, as it was called here.
    pub pod: String,
    /// The address that is kept for it.
    pub address: Ipv4Addr,
    /// The host where it is, by its address on the network of its pods.
    pub to: Ipv4Addr,
    /// Bytes that it has passed on, both ways.
    pub bytes: u64,
}

fn link_name(address: Ipv4Addr) -> String {
    format!("zf{:08x}", address.to_bits())
}

fn link_alias(pod: &str, to: Ipv4Addr) -> String {
    format!("{MARK} {pod} to {to}")
}

/// The address that a link keeps for a pod that is elsewhere, if it does.
pub(super) fn kept(link: &Link) -> Option<Ipv4Addr> {
    let digits = link.name.strip_prefix("zf").filter(|d| d.len() == 8)?;
    u32::from_str_radix(digits, 16).ok().map(Ipv4Addr::from_bits)
}

impl Network {
    /// The place that the pod would leave here, for [`Network::forward`] to keep.
    pub fn place_to_keep(&self) -> Result<FormerPlace, NetworkError> {
        can_have_lines()?;
        let mut number = [0; 4];
        let random = fs::File::open("/dev/urandom").and_then(|mut random| random.read_exact(&mut number));
        random.map_err(kernel("choosing", "the number of a line"))?;
        let id = u32::from_ne_bytes(number) & 0xff_ffff;
        let gateway_mac = bridge::hardware_address(&self.config, &open()?)?;
        Ok(FormerPlace { id, host: self.config.address.address, gateway_mac, plan: self.outer.clone() })
    }

    /// The pod, which is blocked here, runs on the host whose end of the line is `to`: what comes for it goes there from now on,
    /// what has waited for it first.
    pub fn forward(&self, pod: &str, place: &FormerPlace, to: Ipv4Addr) -> Result<(), NetworkError> {
        let channel = open()?;
        let name = link_name(self.outer.ipv4);
        let line =
            Line { name: &name, id: place.id, here: place.host, there: to, plan: &place.plan, leads_to_pod: true };
        {
            let _lock = namespace::lock().map_err(kernel("locking", "the network namespace"))?;
            line::remove(&name)?;
            let bridge = bridge::ensure(&self.config, &channel)?;
            let made = line.make(&channel, bridge, &link_alias(pod, to)).and_then(|()| line::open_end(&channel, &name));
            made.inspect_err(|_| drop(line::remove(&name)))?;
        }
        let index = nix::net::if_::if_nametoindex(name.as_str()).map_err(|e| kernel("looking for", &name)(e.into()))?;
        self.send_after_by(|batch| links::lead_to(batch, self.outer.mac, index, Lead::Learnt))
    }

    /// The pod has come home, or has the address that was kept for another: a forwarder that kept it goes, and nobody here
    /// follows whoever had it.
    pub fn supersede_forwarder(&self) -> Result<(), NetworkError> {
        follow::supersede(self.outer.ipv4)?;
        let name = link_name(self.outer.ipv4);
        // Most hosts have none, and need nothing to find that out.
        if nix::net::if_::if_nametoindex(name.as_str()).is_err() { Ok(()) } else { line::remove(&name) }
    }
}

/// The forwarders on the bridge of `config`.
pub fn forwarders(config: &HostConfig) -> Result<Vec<Forwarder>, NetworkError> {
    let links = bridge::list(&open()?)?;
    let master = links.iter().find(|link| link.name == config.bridge).map(|bridge| bridge.index);
    let passed = fs::read_to_string("/proc/thread-self/net/dev").unwrap_or_default();
    let ours = links.iter().filter(|link| master.is_some() && link.master == master);
    Ok(ours.filter_map(|link| describe(link, &passed)).collect())
}

fn describe(link: &Link, passed: &str) -> Option<Forwarder> {
    let address = kept(link)?;
    let (pod, to) = link.alias.strip_prefix(MARK)?.trim_start().rsplit_once(" to ")?;
    Some(Forwarder { pod: pod.to_owned(), address, to: to.parse().ok()?, bytes: bytes_of(&link.name, passed) })
}

/// Bytes that a link has received and sent, by `/proc/net/dev`.
fn bytes_of(link: &str, passed: &str) -> u64 {
    let numbers = passed.lines().find_map(|line| line.trim_start().strip_prefix(link)?.strip_prefix(':'));
    let fields: Vec<u64> = numbers.unwrap_or("").split_ascii_whitespace().filter_map(|n| n.parse().ok()).collect();
    fields.first().unwrap_or(&0).saturating_add(*fields.get(8).unwrap_or(&0))
}

/// Reads a text as what has passed by links.
pub(super) fn try_table(text: &str) {
    let _ = bytes_of("eth0", text);
}

/// Removes the forwarders of a pod, and the bridge if that was the last that it was needed for. Whether there were any.
pub fn remove_forwarders(config: &HostConfig, pod: &str) -> Result<bool, NetworkError> {
    let _lock = namespace::lock().map_err(kernel("locking", "the network namespace"))?;
    let all = forwarders(config)?;
    let its: Vec<_> = all.into_iter().filter(|forwarder| forwarder.pod == pod).collect();
    its.iter().try_for_each(|forwarder| line::remove(&link_name(forwarder.address)))?;
    bridge::remove_if_idle(config, &open()?, None, Behind::Thread)?;
    Ok(!its.is_empty())
}

/// Whether this host can have lines to others.
pub fn can_have_lines() -> Result<(), NetworkError> {
    super::in_fresh_namespace(line::try_one).map_err(|e| NetworkError::Lacks(format!("{}: {e}", line::LACKS)))
}

#[cfg(test)]
mod tests {
    use super::super::lease;
    use super::*;

    #[test]
    fn a_forwarder_is_told_by_its_link() {
        let to = Ipv4Addr::new(198, 19, 0, 1);
        let link =
            Link { name: link_name([198, 18, 0, 2].into()), alias: link_alias("a pod to go", to), ..Link::default() };
        let passed = "Inter-|\n face |bytes\nzfc6120002: 100 1 0 0 0 0 0 0 20 1 0 0 0 0 0 0\n";
        let found = describe(&link, passed).unwrap();
        assert_eq!((found.address, found.to, found.bytes), ([198, 18, 0, 2].into(), to, 120));
        assert_eq!(lease::leased(&link), None);
    }
}
