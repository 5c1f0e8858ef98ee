//! What a pod that may does to its own network.

use crate::stage::*;

pub(crate) const KINDS: &[crate::stage::Kind] = &[
    ("network-kept", network_kept),
    ("network-interface", || changed("link add over type veth peer name there")),
    ("network-address", || changed("address add 10.9.9.9/24 dev lo")),
    ("network-route", || changed("route add 10.8.0.0/16 dev lo")),
    ("network-rule", || changed("rule add from 10.7.0.0/16 lookup 77")),
];

fn ip(arguments: &str) -> Checked {
    let status = std::process::Command::new("ip").args(arguments.split(' ')).status().map_err(|e| e.to_string())?;
    check(status.success(), format!("ip {arguments}: {status}"))
}

fn changed(by: &str) -> Checked {
    ip(by)?;
    hold()
}

/// One that may change it, and has put everything back.
fn network_kept() -> Checked {
    ip("link add over type veth peer name there")?;
    ip("link delete over")?;
    ip("address add 10.9.9.9/24 dev lo")?;
    ip("address delete 10.9.9.9/24 dev lo")?;
    hold()
}
