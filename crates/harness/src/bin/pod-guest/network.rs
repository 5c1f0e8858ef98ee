//! What a pod that may does to its own network.

use crate::stage::*;

pub(crate) const KINDS: &[crate::stage::Kind] = &[
    ("network-kept", network_kept),
    ("network-interface", || changed("link add over type veth peer name there")),
    ("network-address", || changed("address add 10.9.9.9/24 dev lo")),
    ("network-route", || changed("route add 10.8.0.0/16 dev lo")),
    ("network-mtu", || changed("link set lo mtu 60000")),
    ("network-queueing", network_queueing),
    ("network-rule", || changed("rule add from 10.7.0.0/16 lookup 77")),
];

fn ip(arguments: &str) -> Checked {
    program("ip", arguments)
}

fn program(name: &str, arguments: &str) -> Checked {
    let status = std::process::Command::new(name).args(arguments.split(' ')).status().map_err(|e| e.to_string())?;
    check(status.success(), format!("{name} {arguments}: {status}"))
}

fn changed(by: &str) -> Checked {
    ip(by)?;
    hold()
}

/// A queue before an interface.
fn network_queueing() -> Checked {
    program("tc", "qdisc add dev lo root pfifo limit 10")?;
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
