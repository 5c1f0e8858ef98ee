//! What a pod that may does to its own network, and to networks that its children have for themselves.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;

use crate::namespaces::become_root;
use crate::stage::*;

pub(crate) const KINDS: &[crate::stage::Kind] = &[
    ("network-kept", network_kept),
    ("network-interface", network_interface),
    ("network-address", network_address),
    ("network-route", network_route),
    ("network-route-order", network_route_order),
    ("network-rule", network_rule),
    ("network-mtu", network_mtu),
    ("network-off", network_off),
    ("network-queueing", network_queueing),
    ("network-neighbour", network_neighbour),
    ("network-bridge", network_bridge),
    ("network-settings", network_settings),
    ("network-settings-by-root", network_settings_by_root),
    ("network-between", network_between),
    ("network-of-others", network_of_others),
    ("network-way-out", network_way_out),
    ("network-way-out-bridged", network_way_out_bridged),
    ("network-way-out-off", network_way_out_off),
    ("network-filter", network_filter),
    ("network-filter-translates", network_filter_translates),
    ("network-filter-within-rule", network_filter_within_rule),
    ("network-tun", network_tun),
    ("network-tun-lasting", network_tun_lasting),
    ("network-mirror", network_mirror),
    ("network-tunnel", network_tunnel),
];

pub(crate) fn program(command: &str) -> Result<String, String> {
    let mut words = command.split(' ');
    let output = std::process::Command::new(words.next().unwrap_or_default()).args(words).output();
    let output = output.map_err(|e| format!("{command}: {e}"))?;
    check(output.status.success(), format!("{command}: {}", String::from_utf8_lossy(&output.stderr)))?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

pub(crate) fn programs(commands: &[&str]) -> Checked {
    commands.iter().try_for_each(|command| program(command).map(drop))
}

/// All that `ip`, `bridge` and `tc` show of the network of this process.
fn shown() -> Result<Vec<String>, String> {
    let all = [
        "ip -o link",
        "ip -o address",
        "ip -4 route show table all",
        "ip -6 route show table all",
        "ip -4 rule",
        "ip -6 rule",
        "ip -4 neighbour show nud permanent",
        "ip -6 neighbour show nud permanent",
        "ip neighbour show proxy",
        "ip addrlabel",
        "bridge -d link",
        "bridge fdb",
        "tc qdisc",
    ];
    let mut lines = Vec::new();
    for command in all {
        let mut some: Vec<_> =
            program(command)?.lines().map(|line| format!("{command}: {}", line.trim_end())).collect();
        // Which number the far end of `eth0` has is the host's affair; what a bridge has learnt it learns again.
        some.iter_mut().for_each(|line| *line = without_far_end(line));
        some.iter_mut().for_each(|line| *line = line.replace("stable-privacy ", ""));
        some.retain(|line| !line.starts_with("bridge fdb") || line.contains("static"));
        // Of addresses the first is the one that packets come from; else the kernel's order says nothing.
        if !command.ends_with("address") && !command.ends_with("rule") {
            some.sort();
        }
        lines.extend(some);
    }
    Ok(lines)
}

fn without_far_end(line: &str) -> String {
    match line.split_once("eth0@if") {
        Some((before, after)) => format!("{before}eth0{}", after.trim_start_matches(|c: char| c.is_ascii_digit())),
        None => line.to_owned(),
    }
}

fn same(before: &[String], now: &[String]) -> Checked {
    let differ = |a: &[String], b: &[String]| a.iter().filter(|line| !b.contains(line)).cloned().collect::<Vec<_>>();
    let (gone, new) = (differ(before, now), differ(now, before));
    check(gone.is_empty() && new.is_empty(), format!("gone are {gone:#?}; and new {new:#?}"))?;
    check(before == now, format!("the order is {now:#?}, not {before:#?}"))
}

/// What is shown once the kernel has done its part: carriers, addresses of its own.
pub(crate) fn settled() -> Result<Vec<String>, String> {
    let mut before = shown()?;
    until("the network to come to rest", || {
        let now = shown().unwrap_or_default();
        let rests = now == before && !now.iter().any(|line| line.contains("tentative"));
        before = now;
        rests
    })?;
    Ok(before)
}

pub(crate) fn changed(by: &[&str]) -> Checked {
    programs(by)?;
    let before = settled()?;
    hold()?;
    same(&before, &shown()?)
}

/// A pair of interfaces, with names, numbers and addresses of their own, one of them off.
fn network_interface() -> Checked {
    changed(&[
        "ip link add over index 40 address 02:00:00:00:07:01 mtu 1400 type veth peer name there index 30",
        "ip link set over up alias somewhere",
        "ip link set there multicast off promisc on group 7",
        "ip link property add dev over altname another-name-that-is-longer",
        "ip link add middle type veth peer name beyond",
        "ip link set middle up",
        "ip link set beyond up",
        "ip link add link middle name upon type macvlan mode bridge",
        "ip link set upon up",
        "ip link add spare type ifb",
    ])
}

/// Addresses of both kinds, several of one network, and one less than there was.
fn network_address() -> Checked {
    changed(&[
        "ip link add over type veth peer name there",
        "ip link set over up",
        "ip link set there up",
        "ip address add 10.9.9.9/24 dev lo",
        "ip address add 10.9.8.1/24 dev over",
        "ip address add 10.9.8.2/24 dev over label over:two",
        "ip address add 10.9.7.1 peer 10.9.7.2 dev there",
        "ip address add fd00:7::1/64 dev over",
        "ip address add fd00:7::2/64 dev over",
        "ip address delete ::1/128 dev lo",
        "ip addrlabel add prefix fd00:7::/64 label 77",
    ])
}

/// Routes of several tables and kinds, and one less than there was.
fn network_route() -> Checked {
    changed(&[
        "ip link add over type veth peer name there",
        "ip link set over up",
        "ip link set there up",
        "ip address add 10.9.8.1/24 dev over",
        "ip address add 10.9.7.1/24 dev over",
        "ip -6 address add fd00:7::1/64 dev over",
        "ip route add 10.8.0.0/16 dev lo",
        "ip route add default via 10.9.8.7 metric 50 mtu 1300",
        "ip route add 10.6.0.0/16 nexthop via 10.9.8.7 weight 2 nexthop via 10.9.7.7",
        "ip route add blackhole 10.5.0.0/16",
        "ip route add 10.4.0.0/16 via 10.9.8.9 table 77 src 10.9.7.1",
        "ip route add local 10.3.0.0/16 dev lo",
        "ip route delete 10.9.7.0/24 dev over",
        "ip -6 route add fd00:8::/64 via fd00:7::7",
        "ip -6 route add unreachable fd00:9::/64",
        "ip -6 route add fd00:a::/64 dev over table 77 metric 5",
    ])
}

/// Two interfaces in the same networks, of which packets take the one that was there first.
fn network_route_order() -> Checked {
    programs(&[
        "ip link add over type veth peer name there",
        "ip link set over up",
        "ip link set there up",
        "ip -6 address add fd00:6::1/64 dev there",
        "ip -6 address add fd00:6::2/64 dev over",
        "ip -6 address add fd00:7::1/64 dev over",
        "ip -6 address add fd00:7::2/64 dev there",
        "ip -6 address add fd00:7::3/64 dev there",
        "ip address add 10.9.6.1/24 dev there",
        "ip address add 10.9.6.2/24 dev over",
        "ip address add 10.9.7.1/24 dev over",
        "ip address add 10.9.7.2/24 dev there",
    ])?;
    let routes = || -> Result<Vec<_>, String> {
        let get = |to: &&str| Ok(program(&format!("ip -o route get {to}"))?.replace(" cache ", ""));
        ["fd00:6::9", "fd00:7::9", "10.9.6.9", "10.9.7.9"].iter().map(get).collect()
    };
    settled()?;
    let before = routes()?;
    let there = before.iter().map(|route| route.contains(" dev there "));
    equal("what leads to the other end", there.collect::<Vec<_>>(), vec![true, false, true, false])?;
    changed(&[])?;
    equal("the routes", routes()?, before)
}

/// Queues before interfaces.
fn network_queueing() -> Checked {
    changed(&[
        "tc qdisc add dev lo root pfifo limit 10",
        "ip link add over type veth peer name there",
        "tc qdisc add dev over root handle 7: tbf rate 1mbit burst 32kbit latency 400ms",
    ])
}

/// Neighbours given by hand.
fn network_neighbour() -> Checked {
    changed(&[
        "ip link add over type veth peer name there",
        "ip link set over up",
        "ip link set there up",
        "ip neighbour add 10.9.8.7 lladdr 02:00:00:00:00:07 dev over",
        "ip -6 neighbour add fd00:7::7 lladdr 02:00:00:00:00:07 dev over",
        "ip neighbour add proxy 10.9.8.8 dev over",
    ])
}

/// A bridge with two ports, settings of its own and theirs, and somebody known to be behind one.
fn network_bridge() -> Checked {
    changed(&[
        "ip link add bridge type bridge ageing_time 12300 mcast_snooping 0",
        "ip link add over type veth peer name there",
        "ip link add second address 02:00:00:00:07:02 type veth peer name fourth",
        "ip link set over master bridge up",
        "ip link set second master bridge up",
        "ip link set there up",
        "ip link set fourth up",
        "ip link set bridge up",
        "ip address add 10.9.8.1/24 dev bridge",
        "bridge link set dev over learning off isolated on",
        "bridge fdb add 02:00:00:00:00:09 dev over master static",
    ])?;
    equal("the ageing time", read("/sys/class/net/bridge/bridge/ageing_time")?.trim(), "12300")
}

const SETTINGS: [(&str, &str); 6] = [
    ("core/somaxconn", "777"),
    ("ipv4/ip_unprivileged_port_start", "80"),
    ("ipv4/tcp_keepalive_time", "1234"),
    ("ipv4/ip_local_port_range", "40000\t50000"),
    ("ipv4/conf/lo/arp_ignore", "1"),
    ("ipv6/conf/default/hop_limit", "33"),
];

fn are_set(settings: &[(&str, &str)]) -> Checked {
    settings.iter().try_for_each(|(name, value)| equal(name, read(format!("/proc/sys/net/{name}"))?.trim_end(), *value))
}

fn set(settings: &[(&str, &str)]) -> Checked {
    settings.iter().try_for_each(|(name, value)| write(format!("/proc/sys/net/{name}"), value))
}

/// Settings, also of an interface that was made and of all of them.
fn network_settings() -> Checked {
    const MORE: [(&str, &str); 5] = [
        ("ipv4/ip_forward", "1"),
        ("ipv4/conf/all/rp_filter", "2"),
        ("ipv4/conf/over/forwarding", "0"),
        ("ipv6/conf/over/mtu", "1300"),
        ("ipv4/neigh/over/gc_stale_time", "61"),
    ];
    programs(&["ip link add over type veth peer name there", "ip link set over up", "ip link set there up"])?;
    // The kernel sets some itself when it learns of a carrier.
    settled()?;
    set(&SETTINGS)?;
    set(&MORE)?;
    set(&[("ipv6/conf/there/disable_ipv6", "1")])?;
    changed(&[])?;
    are_set(&SETTINGS)?;
    are_set(&MORE)?;
    are_set(&[("ipv6/conf/there/disable_ipv6", "1"), ("ipv4/conf/there/forwarding", "1")])
}

/// Settings alone, which root may set in any pod.
fn network_settings_by_root() -> Checked {
    set(&SETTINGS)?;
    hold()?;
    are_set(&SETTINGS)
}

/// A child with a network of its own, to which a pair of interfaces leads, and a connection through it.
fn network_between() -> Checked {
    let text = |e: std::io::Error| e.to_string();
    let (inside, connected, set_up, compared) = (Gate::new()?, Gate::new()?, Gate::new()?, Gate::new()?);
    let child = fork(|| {
        become_root(libc::CLONE_NEWNET)?;
        inside.open()?;
        connected.pass(1)?;
        programs(&["ip link set lo up", "ip link set there up", "ip address add 10.9.8.2/24 dev there"])?;
        programs(&["ip route add default via 10.9.8.1"])?;
        let listener = TcpListener::bind("10.9.8.2:4000").map_err(text)?;
        set_up.open()?;
        let (mut server, _) = listener.accept().map_err(text)?;
        let before = settled()?;
        set_up.open()?;
        await_go();
        same(&before, &shown()?)?;
        let mut bytes = [0; 6];
        server.read_exact(&mut bytes).map_err(text)?;
        equal("what was unread", &bytes, b"unread")?;
        server.write_all(b"answer").map_err(text)?;
        // Its network ends with it.
        compared.pass(1)
    })?;
    inside.pass(1)?;
    programs(&[
        "ip link add over type veth peer name there",
        &format!("ip link set there netns {child}"),
        // The same number at both ends.
        &format!("ip link add equal index 77 type veth peer name alike index 77 netns {child}"),
        "ip link set over up",
        "ip address add 10.9.8.1/24 dev over",
    ])?;
    connected.open()?;
    set_up.pass(1)?;
    let mut client = TcpStream::connect("10.9.8.2:4000").map_err(text)?;
    client.write_all(b"unread").map_err(text)?;
    set_up.pass(1)?;
    changed(&[])?;
    compared.open()?;
    let mut bytes = [0; 6];
    client.read_exact(&mut bytes).map_err(text)?;
    equal("an answer", &bytes, b"answer")?;
    reap(child)
}

/// Children of an ordinary pod with networks of their own, one of them connected with that of a child of its own by a bridge.
fn network_of_others() -> Checked {
    let (inside, connected, set_up, compared) = (Gate::new()?, Gate::new()?, Gate::new()?, Gate::new()?);
    let child = fork(|| {
        become_root(libc::CLONE_NEWNET)?;
        let grandchild = fork(|| {
            become_root(libc::CLONE_NEWNET)?;
            inside.open()?;
            connected.pass(1)?;
            programs(&["ip link set eth0 up", "ip address add 10.9.8.2/24 dev eth0"])?;
            set(&[("ipv4/tcp_keepalive_time", "1234")])?;
            set_up.open()?;
            let before = settled()?;
            set_up.open()?;
            await_go();
            same(&before, &shown()?)?;
            are_set(&[("ipv4/tcp_keepalive_time", "1234")])?;
            // Its network ends with it.
            compared.pass(1)?;
            let socket = UdpSocket::bind("10.9.8.2:4000").map_err(|e| e.to_string())?;
            socket.send_to(b"word", "10.9.8.1:4000").map(drop).map_err(|e| e.to_string())
        })?;
        inside.pass(1)?;
        programs(&[
            "ip link add bridge type bridge",
            &format!("ip link add over type veth peer name eth0 netns {grandchild}"),
            "ip link set over master bridge up",
            "ip link set bridge up",
            "ip address add 10.9.8.1/24 dev bridge",
        ])?;
        connected.open()?;
        let socket = UdpSocket::bind("10.9.8.1:4000").map_err(|e| e.to_string())?;
        let before = settled()?;
        set_up.open()?;
        await_go();
        same(&before, &shown()?)?;
        compared.open()?;
        equal("a word", socket.recv(&mut [0; 20]).map_err(|e| e.to_string())?, 4)?;
        reap(grandchild)
    })?;
    set_up.pass(3)?;
    hold()?;
    reap(child)
}

/// Has the packet filter be this as well.
fn filter(rules: &str) -> Checked {
    write("/tmp/rules", rules)?;
    programs(&["nft -f /tmp/rules"])
}

/// Packet filters of every family, with sets, maps, counters, translations.
fn network_filter() -> Checked {
    filter(
        "table inet guard {
            set known { type ipv4_addr; flags interval; elements = { 10.1.0.0/16, 10.2.3.4, 10.3.0.0-10.3.0.9 }; }
            set seen { type ipv4_addr; size 100; flags dynamic,timeout; timeout 1h; elements = { 10.77.0.1 timeout 30m }; }
            map ports { type inet_service : verdict; elements = { 80 : accept, 81 : drop, 82 : jump other }; }
            map names { typeof ip saddr . tcp dport : ip daddr; flags interval; elements = { 10.0.0.0/8 . 80-90 : 10.9.9.9 }; }
            counter hits { packets 5 bytes 500; }
            quota much { over 100 mbytes used 10 bytes; }
            chain other {
                counter packets 3 bytes 300 return
            }
            chain input {
                type filter hook input priority 0; policy accept;
                ct state established,related accept
                iifname \"lo\" accept comment \"mine\"
                ip saddr @known tcp dport { 22, 80-90, 443 } counter name hits accept
                tcp dport vmap @ports
                ip saddr 10.7.0.0/16 limit rate 10/second burst 5 packets log prefix \"x: \" reject with icmp type admin-prohibited
                add @seen { ip saddr limit rate 3/minute } counter
                meta mark set ip saddr map { 10.0.0.1 : 0x1, 10.0.0.2 : 0x2 }
                tcp dport 7777 drop
            }
        }
        table ip nat {
            chain out {
                type nat hook postrouting priority srcnat; policy accept;
                ip saddr 10.9.8.0/24 masquerade
                ip protocol tcp ip daddr 10.4.4.4 snat to 10.9.9.9:1024-2048
            }
            chain in {
                type nat hook prerouting priority dstnat;
                tcp dport 8080 dnat to 10.9.8.2:80
                udp dport 99 redirect to :100
            }
        }
        table ip6 six {
            chain input {
                type filter hook input priority 0;
                ip6 saddr fd00:7::/64 tcp dport 7777 counter drop
            }
        }
        table arp resolves {
            chain input {
                type filter hook input priority 0;
                arp operation request counter
            }
        }
        table netdev frames {
            chain there {
                type filter hook ingress device \"lo\" priority 0;
                ip daddr 10.8.8.8 drop
            }
        }
        ",
    )?;
    // The time that an element has left passes.
    let rules = || program("nft -s list ruleset");
    let before = rules()?;
    check(before.lines().count() > 60, format!("there is only {before}"))?;
    changed(&[])?;
    equal("the packet filters", rules()?, before)?;
    let counters = program("nft list counters")?;
    check(counters.contains("packets 5 bytes 500"), format!("the counters are {counters}"))?;
    TcpListener::bind("127.0.0.1:7777").map_err(|e| e.to_string())?;
    Ok(())
}

/// A connection with a child in a network of its own, both of whose addresses the packet filter translates, and which it lets
/// pass because it knows it; the other end speaks first.
fn network_filter_translates() -> Checked {
    let text = |e: std::io::Error| e.to_string();
    let (inside, connected, set_up) = (Gate::new()?, Gate::new()?, Gate::new()?);
    let child = fork(|| {
        become_root(libc::CLONE_NEWNET)?;
        inside.open()?;
        connected.pass(1)?;
        programs(&["ip link set lo up", "ip link set there up", "ip address add 10.9.8.2/24 dev there"])?;
        let listener = TcpListener::bind("10.9.8.2:4000").map_err(text)?;
        set_up.open()?;
        let (mut server, client) = listener.accept().map_err(text)?;
        equal("the client", client.ip().to_string(), "10.9.8.3".into())?;
        set_up.open()?;
        await_go();
        server.write_all(b"news").map_err(text)?;
        let mut bytes = [0; 6];
        server.read_exact(&mut bytes).map_err(text)?;
        equal("an answer", &bytes, b"answer")
    })?;
    inside.pass(1)?;
    programs(&[
        "ip link add over type veth peer name there",
        &format!("ip link set there netns {child}"),
        "ip link set over up",
        "ip address add 10.9.8.1/24 dev over",
        "ip address add 10.9.8.3/24 dev over",
        "ip route add default via 10.9.8.2",
    ])?;
    filter(
        "table ip between {
            chain out {
                type nat hook postrouting priority srcnat;
                ip daddr 10.9.8.2 tcp dport 4000 snat to 10.9.8.3:5000-6000
            }
            chain made {
                type nat hook output priority -100;
                ip daddr 10.1.1.1 tcp dport 9 dnat to 10.9.8.2:4000
            }
            chain in {
                type filter hook input priority 0; policy drop;
                ct state established,related accept
            }
        }
        ",
    )?;
    connected.open()?;
    set_up.pass(1)?;
    let mut client = TcpStream::connect("10.1.1.1:9").map_err(text)?;
    client.set_read_timeout(Some(std::time::Duration::from_secs(120))).map_err(text)?;
    set_up.pass(1)?;
    hold()?;
    let mut bytes = [0; 4];
    client.read_exact(&mut bytes).map_err(text)?;
    equal("news", &bytes, b"news")?;
    client.write_all(b"answer").map_err(text)?;
    reap(child)
}

/// A chain without a name, within a rule.
fn network_filter_within_rule() -> Checked {
    filter("table inet guard {\n chain input {\n tcp dport 22 jump { ip saddr 10.0.0.1 accept; }\n }\n }\n")?;
    hold()
}

/// A file of a device that is made if it is not there.
fn tun(name: &str, flags: i32) -> Result<File, String> {
    let file = File::options().read(true).write(true).open("/dev/net/tun").map_err(|e| e.to_string())?;
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = flags as i16;
    done("TUNSETIFF", unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
    Ok(file)
}

/// What is sent through a device is read from its file; the first packets may be the kernel's own.
fn comes_out(file: &mut File, address: &str, word: &[u8]) -> Checked {
    let socket = UdpSocket::bind("0.0.0.0:0").map_err(|e| e.to_string())?;
    socket.send_to(word, address).map_err(|e| e.to_string())?;
    let mut packet = [0; 2000];
    loop {
        let length = file.read(&mut packet).map_err(|e| e.to_string())?;
        if packet[..length].ends_with(word) {
            return Ok(());
        }
    }
}

/// A device that is there for as long as it is open, and an open file without a device.
fn network_tun() -> Checked {
    let mut file = tun("tun7", libc::IFF_TUN | libc::IFF_NO_PI)?;
    let mut idle = File::options().read(true).write(true).open("/dev/net/tun").map_err(|e| e.to_string())?;
    let buffer = 5000i32;
    done("TUNSETSNDBUF", unsafe { libc::ioctl(file.as_raw_fd(), 0x4004_54d4, &raw const buffer) })?;
    programs(&[
        "ip link set tun7 up",
        "ip address add 10.9.8.1 peer 10.9.8.2 dev tun7",
        "ip route add 10.8.0.0/16 dev tun7",
    ])?;
    comes_out(&mut file, "10.8.3.4:4000", b"before")?;
    let before = settled()?;
    // Its position says how long the last packet was.
    hold_loosely()?;
    same(&before, &shown()?)?;
    comes_out(&mut file, "10.8.3.4:4000", b"afterwards")?;
    let mut now = 0i32;
    done("TUNGETSNDBUF", unsafe { libc::ioctl(file.as_raw_fd(), 0x8004_54d3, &raw mut now) })?;
    equal("the room of the queue", now, buffer)?;
    let nothing = idle.read(&mut [0; 10]).map_err(|e| e.raw_os_error());
    equal("a file without a device", nothing, Err(Some(libc::EBADFD)))?;
    drop(file);
    check(!shown()?.iter().any(|line| line.contains("tun7")), "the device stays without its file")
}

/// Devices that stay: one with two files of which one is left out, one with none.
fn network_tun_lasting() -> Checked {
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE;
    let files = [tun("tap7", flags)?, tun("tap7", flags)?];
    for file in &files {
        done("TUNSETPERSIST", unsafe { libc::ioctl(file.as_raw_fd(), 0x4004_54cb, 1) })?;
    }
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_ifru.ifru_flags = libc::IFF_DETACH_QUEUE as i16;
    done("TUNSETQUEUE", unsafe { libc::ioctl(files[1].as_raw_fd(), libc::TUNSETQUEUE, &raw mut request) })?;
    programs(&[
        "ip tuntap add dev nobody mode tun user 7 group 8",
        "ip link set nobody up",
        "ip link set tap7 address 02:00:00:00:07:07 up",
        "ip link add bridge type bridge",
        "ip link set tap7 master bridge",
        "ip link set bridge up",
    ])?;
    let details = || {
        let files = ["tap7/tun_flags", "nobody/tun_flags", "nobody/owner", "nobody/group"];
        files.iter().map(|file| read(format!("/sys/class/net/{file}"))).collect::<Result<Vec<_>, _>>()
    };
    let before = details()?;
    equal("the owners", &before[2..], &["7\n".to_owned(), "8\n".to_owned()])?;
    changed(&[])?;
    equal("the devices", details()?, before)?;
    drop(files);
    check(shown()?.iter().any(|line| line.contains("tap7")), "the device is gone with its files")
}

/// Where the pod's way out leads, as it is born: the gateway, and its own address.
fn way_out() -> Result<(String, String), String> {
    let word_after = |text: &str, before: &str| {
        let mut words = text.split_whitespace().skip_while(|word| *word != before).skip(1);
        words.next().map(str::to_owned).ok_or(format!("{text} does not say {before}"))
    };
    let gateway = word_after(&program("ip -4 route show default")?, "via")?;
    Ok((gateway, word_after(&program("ip -4 -o address show dev eth0")?, "inet")?))
}

/// Whoever answers that nobody listens is there.
fn answers(address: &str) -> Checked {
    let address = format!("{address}:9").parse().map_err(|e| format!("{address}: {e}"))?;
    let refused = TcpStream::connect_timeout(&address, std::time::Duration::from_secs(120));
    let refused = refused.is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionRefused);
    check(refused, format!("{address} does not answer"))
}

/// The interface by which a pod is connected, with other packets, more addresses and other routes.
fn network_way_out() -> Checked {
    let (gateway, _) = way_out()?;
    changed(&[
        "ip link set eth0 mtu 1400 txqueuelen 77",
        "ip address add 10.9.9.9/24 dev eth0",
        "ip -6 address add fd00:7::1/64 dev eth0 nodad",
        "ip route delete default",
        &format!("ip route add default via {gateway} dev eth0 metric 7 mtu 1300"),
        &format!("ip route add 10.8.0.0/16 via {gateway}"),
        "ip neighbour add 10.9.9.10 lladdr 02:00:00:00:00:07 dev eth0",
    ])?;
    answers(&gateway)
}

/// The same interface, off; it works once it is on.
fn network_way_out_off() -> Checked {
    let (gateway, _) = way_out()?;
    changed(&["ip link set eth0 down"])?;
    programs(&["ip link set eth0 up", &format!("ip route add default via {gateway}")])?;
    answers(&gateway)
}

/// The same interface as a port of a bridge, which has its address.
fn network_way_out_bridged() -> Checked {
    let (gateway, address) = way_out()?;
    changed(&[
        "ip link add bridge type bridge",
        "ip link set bridge up",
        "ip address flush dev eth0",
        "ip link set eth0 master bridge",
        &format!("ip address add {address} brd + dev bridge"),
        &format!("ip route add default via {gateway}"),
    ])?;
    answers(&gateway)
}

/// One that may change it, and has put everything back.
fn network_kept() -> Checked {
    changed(&[
        "ip link add over type veth peer name there",
        "ip link delete over",
        "ip address add 10.9.9.9/24 dev lo",
        "ip address delete 10.9.9.9/24 dev lo",
    ])
}

/// Rules for routes.
fn network_rule() -> Checked {
    changed(&["ip rule add from 10.7.0.0/16 lookup 77", "ip -6 rule add fwmark 5 prohibit"])
}

/// Packets and a queue of other sizes.
fn network_mtu() -> Checked {
    changed(&["ip link set lo mtu 60000 txqueuelen 50"])
}

/// Without a loopback interface that is on.
fn network_off() -> Checked {
    changed(&["ip link set lo down"])
}

/// An interface whose packets may be led elsewhere.
fn network_mirror() -> Checked {
    changed(&["ip link add over type veth peer name there", "tc qdisc add dev over clsact"])
}

/// An interface of a kind that is not kept.
fn network_tunnel() -> Checked {
    changed(&["ip link add tunnel type vxlan id 7 dstport 4789 local 127.0.0.1"])
}
