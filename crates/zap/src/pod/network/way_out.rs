//! The way from the pods' network to the rest of the world: through the host, if the host itself has one.

use std::fs;

use super::filter::{self, Base, Family, Hook, Rule, Ruleset};
use super::lease::ipv6_of;
use super::{NetworkError, kernel};
use crate::pod::host_config::HostConfig;

const FORWARD4: &str = "/proc/sys/net/ipv4/ip_forward";
const FORWARD6: &str = "/proc/sys/net/ipv6/conf/all/forwarding";
/// The route was learned from a router (RTF_ADDRCONF).
const LEARNED: u32 = 0x0004_0000;

/// Which ways there are, and what has to be switched on for them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct WayOut {
    ipv4: bool,
    ipv6: bool,
    forwards4: bool,
    forwards6: bool,
}

impl WayOut {
    /// What the network namespace of this thread has: a default route makes a way.
    pub(super) fn of_this_host(config: &HostConfig) -> WayOut {
        let routes = |file: &str| fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap_or_default();
        WayOut {
            ipv4: leads_out4(&routes("route"), &config.bridge),
            ipv6: leads_out6(&routes("ipv6_route"), &config.bridge),
            forwards4: is_on(FORWARD4),
            forwards6: is_on(FORWARD6),
        }
    }

    /// Whether [`WayOut::open`] switches IPv4 forwarding on.
    pub(super) fn switches_on_ipv4(&self) -> bool {
        self.ipv4 && !self.forwards4
    }

    /// Whether [`WayOut::open`] switches IPv6 forwarding on.
    pub(super) fn switches_on_ipv6(&self) -> bool {
        self.ipv6 && !self.forwards6
    }

    /// Whether the host forwards IPv6, or does once it is open.
    pub(super) fn forwards_ipv6(&self) -> bool {
        self.ipv6 || self.forwards6
    }

    /// Opens the ways: forwarding, and the host's address in place of the pod's.
    pub(super) fn open(&self, config: &HostConfig) -> Result<(), NetworkError> {
        forward(self.switches_on_ipv4(), self.switches_on_ipv6())?;
        if !self.ipv4 && !self.ipv6 {
            return Ok(());
        }
        let mut rules = Ruleset::new(Family::Inet, &config.bridge);
        rules.chain("out", "nat", Hook::Postrouting, 100, None);
        let gateway = config.address;
        if self.ipv4 {
            let (network, mask) = (gateway.first().octets(), gateway.mask().to_be_bytes());
            let ours = Rule::default().family_of(gateway.address.into()).has_masked(Base::Network, 12, &network, &mask);
            rules.rule("out", ours.not_out_by(&config.bridge).masquerade());
        }
        if self.ipv6 {
            let gateway = ipv6_of(gateway.address);
            let ours = Rule::default().family_of(gateway.into()).has(Base::Network, 8, &gateway.octets()[..8]);
            rules.rule("out", ours.not_out_by(&config.bridge).masquerade());
        }
        rules.make()
    }
}

/// Switches forwarding on.
pub(super) fn forward(ipv4: bool, ipv6: bool) -> Result<(), NetworkError> {
    set_forwarding(ipv4, ipv6, "1")
}

fn set_forwarding(ipv4: bool, ipv6: bool, to: &str) -> Result<(), NetworkError> {
    for (_, path) in [(ipv4, FORWARD4), (ipv6, FORWARD6)].iter().filter(|(wanted, _)| *wanted) {
        fs::write(path, to).map_err(kernel("setting", path))?;
    }
    Ok(())
}

/// Which kinds of forwarding could be switched on (IPv4, IPv6) and are not. IPv6 is left alone on a host that learned its
/// way out from a router: it would lose it.
pub(super) fn forwarding_is_off(config: &HostConfig) -> (bool, bool) {
    let routes = fs::read_to_string("/proc/thread-self/net/ipv6_route").unwrap_or_default();
    let off = |path: &str| fs::read_to_string(path).is_ok_and(|text| text.trim() == "0");
    (off(FORWARD4), off(FORWARD6) && !learned_its_way_out(&routes, &config.bridge))
}

/// Lets packets with the host's loopback addresses be routed by the bridge, but none that a pod has sent.
pub(super) fn guard(config: &HostConfig) -> Result<(), NetworkError> {
    let table = guard_table(config);
    filter::delete_table(Family::Inet, &table)?;
    let mut rules = Ruleset::new(Family::Inet, &table);
    rules.chain("in", "filter", Hook::Prerouting, -300, None);
    let any4 = Rule::default().family_of(config.address.address.into()).in_by(&config.bridge);
    rules.rule("in", any4.has(Base::Network, 16, &[127]).drop());
    rules.make()?;
    let path = format!("/proc/sys/net/ipv4/conf/{}/route_localnet", config.bridge);
    fs::write(&path, "1").map_err(kernel("setting", &path))
}

fn guard_table(config: &HostConfig) -> String {
    format!("{}-guard", config.bridge)
}

/// Closes the ways of a bridge that is about to go, and switches off again what was off.
pub(super) fn close(config: &HostConfig, forward4: bool, forward6: bool, guard: bool) -> Result<(), NetworkError> {
    set_forwarding(forward4, forward6, "0")?;
    if guard {
        let path = format!("/proc/sys/net/ipv4/conf/{}/route_localnet", config.bridge);
        fs::write(&path, "0").map_err(kernel("setting", &path))?;
        filter::delete_table(Family::Inet, &guard_table(config))?;
    }
    filter::delete_table(Family::Inet, &config.bridge)
}

fn is_on(path: &str) -> bool {
    fs::read_to_string(path).is_ok_and(|text| text.trim() != "0")
}

/// Whether `/proc/net/route` has a default route that is not over `bridge`.
fn leads_out4(routes: &str, bridge: &str) -> bool {
    routes.lines().skip(1).map(|line| line.split_ascii_whitespace().collect::<Vec<_>>()).any(|fields| {
        fields.first().is_some_and(|name| *name != bridge)
            && fields.get(1) == Some(&"00000000")
            && fields.get(7) == Some(&"00000000")
    })
}

/// Whether `/proc/net/ipv6_route` has a default route that is neither over `bridge` nor learned from a router: a host that
/// forwards stops listening to routers and would lose its own.
fn leads_out6(routes: &str, bridge: &str) -> bool {
    default_routes6(routes, bridge).any(|flags| flags & LEARNED == 0)
}

fn learned_its_way_out(routes: &str, bridge: &str) -> bool {
    default_routes6(routes, bridge).any(|flags| flags & LEARNED != 0)
}

/// The flags of default routes over neither `bridge` nor `lo` (where the kernel keeps a refusal).
fn default_routes6(routes: &str, bridge: &str) -> impl Iterator<Item = u32> {
    routes.lines().filter_map(move |line| {
        let fields: Vec<_> = line.split_ascii_whitespace().collect();
        let [to, length, .., flags, name] = fields[..] else { return None };
        let is_default = to.bytes().all(|b| b == b'0') && length == "00" && name != bridge && name != "lo";
        u32::from_str_radix(flags, 16).ok().filter(|_| is_default)
    })
}

/// Reads a text as tables of routes.
pub(super) fn try_table(text: &str) {
    let _ = (leads_out4(text, "zap0"), leads_out6(text, "zap0"), learned_its_way_out(text, "zap0"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_default_route_leads_out_unless_it_is_the_bridge() {
        let table = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n\
                     eth0\t00000000\t010011AC\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
                     eth0\t000011AC\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n";
        assert!(leads_out4(table, "zap0"));
        assert!(!leads_out4(table, "eth0"));
        assert!(!leads_out4("Iface\n", "zap0"));
    }

    #[test]
    fn a_route_learned_from_a_router_is_left_alone() {
        let route = |flags: &str, name: &str| {
            let zeros = "0".repeat(32);
            format!(
                "{zeros} 00 {zeros} 00 fe800000000000000000000000000001 00000400 00000001 00000000 {flags} {name}\n"
            )
        };
        assert!(leads_out6(&route("00000003", "eth0"), "zap0"));
        assert!(!leads_out6(&route("00450003", "eth0"), "zap0"));
        assert!(!leads_out6(&route("00000003", "lo"), "zap0"));
    }
}
