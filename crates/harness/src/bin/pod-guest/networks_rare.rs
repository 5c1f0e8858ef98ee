//! What is rarely set up in a network, and not among addresses, routes and interfaces.

use std::collections::BTreeSet;

use crate::network::{changed, program, programs, settled};
use crate::stage::*;

pub(crate) const KINDS: &[crate::stage::Kind] = &[
    ("network-features", network_features),
    ("network-operation", network_operation),
    ("network-heard", network_heard),
    ("network-groups", network_groups),
    ("network-neighbours-told", network_neighbours_told),
    ("network-multipath", network_multipath),
    ("network-segments", network_segments),
    ("network-measured", network_measured),
    ("network-sets", network_sets),
];

/// Sets something up, and looks at it through these programs as well, before and after.
fn changed_as_shown_by(set_up: &[&str], shown_by: &[&str], some: &[&str]) -> Checked {
    programs(set_up)?;
    settled()?;
    // The kernel's order says nothing.
    let all = || -> Result<BTreeSet<String>, String> {
        let mut lines = BTreeSet::new();
        for command in shown_by {
            lines.extend(program(command)?.lines().map(|line| format!("{command}: {}", line.trim())));
        }
        Ok(lines)
    };
    let before = all()?;
    let missing = some.iter().find(|word| !before.iter().any(|text| text.contains(**word)));
    check(missing.is_none(), format!("{missing:?} is not in {before:#?}"))?;
    changed(&[])?;
    let now = all()?;
    let (gone, new): (Vec<_>, Vec<_>) = (before.difference(&now).collect(), now.difference(&before).collect());
    check(gone.is_empty() && new.is_empty(), format!("gone are {gone:#?}; and new {new:#?}"))
}

/// Interfaces that are not to do for the kernel what they could, and one that is to do more.
fn network_features() -> Checked {
    changed_as_shown_by(
        &[
            "ip link add over type veth peer name there",
            "ip link set over up",
            "ip link add bridge type bridge",
            "ethtool -K over tx off gro on",
            "ethtool -K there tso off rxvlan off",
            "ethtool -K bridge gso off",
            "ethtool -K lo tx-checksumming off",
        ],
        &["ethtool -k over", "ethtool -k there", "ethtool -k bridge", "ethtool -k lo"],
        &["tx-checksum-ip-generic: off", "tx-tcp-segmentation: off", "tx-checksumming: off"],
    )
}

/// Interfaces that somebody keeps from being in operation, or has to say that they are.
fn network_operation() -> Checked {
    changed_as_shown_by(
        &[
            "ip link add over type veth peer name there",
            "ip link set over up",
            "ip link set there up",
            "ip link add link over name upon type macvlan mode bridge",
            "ip link set upon up",
            "ip link set upon protodown on",
            "ip link set upon protodown_reason 3 on",
            "ip link add link over name beside type macvlan mode bridge",
            "ip link set beside protodown on",
            "ip link set there mode dormant",
        ],
        &["ip -o link"],
        &["protodown on protodown_reason <3>", "state UP mode DORMANT"],
    )
}

/// Addresses and groups that interfaces listen to because they were told.
fn network_heard() -> Checked {
    changed_as_shown_by(
        &[
            "ip link add over type veth peer name there",
            "ip link set over up",
            "ip link set there up",
            "ip maddr add 01:00:5e:01:02:03 dev over",
            "ip maddr add 33:33:00:00:07:07 dev over",
            "ip maddr add 01:00:5e:01:02:03 dev there",
            "bridge fdb add 02:00:00:00:00:55 dev there self permanent",
            "ip link add link over name upon type macvlan mode bridge",
            "ip link set upon up",
        ],
        &["ip maddr show dev over", "ip maddr show dev there", "bridge fdb show dev there", "bridge fdb show dev over"],
        &["01:00:5e:01:02:03 static", "02:00:00:00:00:55 self permanent"],
    )
}

/// Ports of a bridge that are members of groups for good.
fn network_groups() -> Checked {
    changed_as_shown_by(
        &[
            "ip link add bridge type bridge mcast_igmp_version 3",
            "ip link add over type veth peer name there",
            "ip link set over master bridge up",
            "ip link set bridge up",
            "bridge mdb add dev bridge port over grp 239.1.1.1 permanent",
            "bridge mdb add dev bridge port over grp 239.1.1.2 src 10.9.8.7 permanent",
            "bridge mdb add dev bridge port over grp ff12::77 permanent",
            "bridge mdb add dev bridge port over grp 01:02:03:04:05:06 permanent",
        ],
        &["bridge -d mdb show"],
        &["grp 239.1.1.1 permanent", "src 10.9.8.7 permanent", "grp ff12::77", "grp 01:02:03:04:05:06"],
    )
}

/// Neighbours that are not there for good, and not found out either.
fn network_neighbours_told() -> Checked {
    changed_as_shown_by(
        &[
            "ip link add over type veth peer name there",
            "ip link set over up",
            "ip link set there up",
            "ip address add 10.9.8.1/24 dev over",
            "ip neighbour add 10.9.8.7 lladdr 02:00:00:00:00:07 nud noarp dev over",
            "ip neighbour add 10.9.8.8 managed dev over",
            "ip neighbour add 10.9.8.9 lladdr 02:00:00:00:00:09 nud stale extern_learn dev over",
            "ip -6 neighbour add fd00:7::7 lladdr 02:00:00:00:00:07 nud noarp dev over",
        ],
        &[
            "ip neighbour show dev over nud noarp to 10.9.8.7",
            "ip neighbour show dev over to 10.9.8.9",
            "ip -6 neighbour show dev over nud noarp to fd00:7::7",
        ],
        &["10.9.8.7 lladdr 02:00:00:00:00:07 NOARP", "extern_learn STALE", "fd00:7::7"],
    )?;
    let managed = program("ip neighbour show dev over to 10.9.8.8")?;
    check(managed.contains("managed"), format!("the neighbour is {managed:?}"))
}

/// Addresses that MPTCP may use, and how many.
fn network_multipath() -> Checked {
    changed_as_shown_by(
        &[
            "ip link add over type veth peer name there",
            "ip address add 10.9.8.1/24 dev over",
            "ip mptcp limits set subflows 5 add_addr_accepted 3",
            "ip mptcp endpoint add 10.9.8.1 dev over subflow backup",
            "ip mptcp endpoint add fd00:7::7 id 77 signal",
        ],
        &["ip mptcp limits", "ip mptcp endpoint"],
        &["add_addr_accepted 3 subflows 5", "10.9.8.1 id 1 subflow backup dev over", "fd00:7::7 id 77 signal"],
    )
}

/// The address from which segment routing sends, and a key.
fn network_segments() -> Checked {
    let key = std::process::Command::new("sh").args(["-c", "echo something | ip sr hmac set 7 sha256"]).output();
    check(key.is_ok_and(|output| output.status.success()), "no key could be set")?;
    changed_as_shown_by(
        &["ip sr tunsrc set fd00:7::77"],
        &["ip sr tunsrc show", "ip sr hmac show"],
        &["fd00:7::77", "hmac 7 algo sha256 secret \"something\""],
    )
}

/// Namespaces in which packets are measured, one with a schema.
fn network_measured() -> Checked {
    changed_as_shown_by(
        &[
            "ip ioam namespace add 7 data 0x77 wide 0x777",
            "ip ioam namespace add 8",
            "ip ioam schema add 5 something",
            "ip ioam namespace set 8 schema 5",
        ],
        &["ip ioam namespace show", "ip ioam schema show"],
        &["namespace 7, data 0x00000077, wide 0x0000000000000777", "namespace 8 [schema 5]", "schema 5 [namespace 8]"],
    )
}

/// A set of addresses that no rule names.
fn network_sets() -> Checked {
    changed(&["ipset create known hash:ip", "ipset add known 10.9.8.7"])
}
