//! Pods' networks, in network namespaces made for the purpose: nothing here touches the machine's own.

#![allow(clippy::unwrap_used, reason = "a test that fails may panic")]

#[path = "network/namespace.rs"]
mod namespace;

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use namespace::{Namespace, PATIENCE};
use zap::pod::host_config::HostConfig;
use zap::pod::network::{Network, NetworkError, Request};
use zap::pod::{AddressPlan, Publish};

/// A host, and pods on it.
struct Host {
    namespace: Namespace,
    config: HostConfig,
}

impl Host {
    fn new() -> Host {
        Host { namespace: Namespace::new(), config: HostConfig::default() }
    }

    fn attach(&self, pod: &Namespace, request: Request<'static>) -> Result<Network, NetworkError> {
        let (config, id) = (self.config.clone(), pod.id());
        self.namespace.run(move || Network::attach(&config, &request, id, &|_| Ok(())))
    }

    fn pod(&self, request: Request<'static>) -> Pod<'_> {
        let namespace = Namespace::new();
        let network = self.attach(&namespace, request).unwrap();
        self.namespace.await_own(network.outer().gateway6);
        namespace.await_own(network.inner().ipv6);
        Pod { host: self, namespace, network }
    }
}

struct Pod<'a> {
    host: &'a Host,
    namespace: Namespace,
    network: Network,
}

impl Pod<'_> {
    fn on_host<T: Send + 'static>(&self, act: impl FnOnce(&Network) -> T + Send + 'static) -> T {
        let network = copy(&self.network);
        self.host.namespace.run(move || act(&network))
    }

    fn address(&self) -> Ipv4Addr {
        self.network.outer().ipv4
    }

    fn remove(self) {
        self.on_host(|network| network.detach().unwrap());
    }
}

/// As another monitor of the pod would read it.
fn copy(network: &Network) -> Network {
    serde_json::from_str(&serde_json::to_string(network).unwrap()).unwrap()
}

fn at(address: impl Into<IpAddr>) -> Request<'static> {
    match address.into() {
        IpAddr::V4(v4) => Request { address: Some((v4, None)), ..Request::default() },
        IpAddr::V6(_) => Request::default(),
    }
}

/// A server in `namespace` that says `who` and the address of its client to whoever connects.
fn serve(namespace: &Namespace, address: &str, who: &'static str) {
    let address: SocketAddr = address.parse().unwrap();
    namespace.run(move || {
        let listener = TcpListener::bind(address).unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let peer = stream.peer_addr().unwrap().ip();
                let _ = write!(stream, "{who} {peer}");
            }
        });
    });
}

/// A connection. A kernel that has much to do takes its time to know a new address of its own (IPv6) as such, and looks for it
/// among its neighbours meanwhile, for three seconds: that is no answer.
fn connect(address: &SocketAddr) -> std::io::Result<TcpStream> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match TcpStream::connect_timeout(address, PATIENCE) {
            Err(e) if e.kind() == std::io::ErrorKind::HostUnreachable && Instant::now() < deadline => {}
            other => return other,
        }
    }
}

/// What the server at `address` says to a client in `namespace`.
fn ask(namespace: &Namespace, address: impl Into<IpAddr>, port: u16) -> std::io::Result<String> {
    let address = SocketAddr::new(address.into(), port);
    namespace.run(move || {
        let mut stream = connect(&address)?;
        let mut said = String::new();
        stream.read_to_string(&mut said)?;
        Ok(said)
    })
}

#[test]
fn a_pod_is_reached_from_the_host_and_from_another_pod() {
    let host = Host::new();
    let (a, b) = (host.pod(Request::default()), host.pod(Request::default()));
    let (a_plan, b_plan) = (a.network.outer().clone(), b.network.outer().clone());
    assert_eq!(a_plan.ipv4.to_string(), "198.18.0.2");
    assert_eq!(b_plan.ipv4.to_string(), "198.18.0.3");
    serve(&a.namespace, "0.0.0.0:80", "a");
    serve(&a.namespace, "[::]:81", "a");
    assert_eq!(ask(&host.namespace, a_plan.ipv4, 80).unwrap(), "a 198.18.0.1");
    assert_eq!(ask(&b.namespace, a_plan.ipv4, 80).unwrap(), "a 198.18.0.3");
    assert_eq!(ask(&host.namespace, a_plan.ipv6, 81).unwrap(), "a fd5a:4150::c612:1");
    assert_eq!(ask(&b.namespace, a_plan.ipv6, 81).unwrap(), format!("a {}", b_plan.ipv6));
    assert_eq!(ask(&a.namespace, [127, 0, 0, 1], 80).unwrap(), "a 127.0.0.1");
}

#[test]
fn nothing_is_left_after_the_last_pod() {
    let host = Host::new();
    let before = host.namespace.links();
    let (a, b) = (host.pod(Request::default()), host.pod(Request::default()));
    a.remove();
    assert!(host.namespace.links().contains(&"zap0".to_owned()));
    b.remove();
    assert_eq!(host.namespace.links(), before);
}

#[test]
fn a_pod_that_died_by_itself_frees_its_address() {
    let host = Host::new();
    let before = host.namespace.links();
    let first = host.pod(at([198, 18, 3, 3]));
    assert_eq!(host.attach(&Namespace::new(), at([198, 18, 3, 3])).unwrap_err().exit_code(), 6);
    let network = copy(&first.network);
    drop(first);
    // The kernel takes the namespace down behind the scenes.
    host.namespace.await_links(|links| !links.iter().any(|l| l.starts_with("zv")));
    host.namespace.run(move || network.detach().unwrap());
    assert_eq!(host.namespace.links(), before);
    host.pod(at([198, 18, 3, 3])).remove();
}

#[test]
fn a_blocked_pod_neither_hears_nor_is_heard() {
    let host = Host::new();
    let (a, b) = (host.pod(Request::default()), host.pod(Request::default()));
    let (address, gateway) = (a.address(), a.network.outer().gateway4);
    let listen = |namespace: &Namespace| {
        namespace.run(|| {
            let socket = UdpSocket::bind("0.0.0.0:9").unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            socket
        })
    };
    let (in_host, in_a, in_b) = (listen(&host.namespace), listen(&a.namespace), listen(&b.namespace));
    let number = std::cell::Cell::new(0u8);
    let passes = |from: &UdpSocket, to: &UdpSocket, address: Ipv4Addr, open: bool| {
        number.set(number.get() + 1);
        // Only what does not come is waited for by the clock.
        to.set_read_timeout(Some(if open { PATIENCE } else { Duration::from_millis(200) })).unwrap();
        from.send_to(&[number.get()], (address, 9)).unwrap();
        // What was sent to a pod that was blocked may come once it is not.
        let mut heard = [0];
        while to.recv(&mut heard).is_ok() {
            if heard[0] == number.get() {
                return true;
            }
        }
        false
    };
    let check = |open: bool| {
        assert_eq!(passes(&in_host, &in_a, address, open), open, "host to pod");
        assert_eq!(passes(&in_b, &in_a, address, open), open, "pod to pod");
        assert_eq!(passes(&in_a, &in_host, gateway, open), open, "pod to host");
    };
    check(true);
    a.on_host(|network| network.block().unwrap());
    check(false);
    assert!(a.namespace.addresses("eth0").contains(&IpAddr::from(address)));
    a.on_host(|network| network.unblock().unwrap());
    check(true);
}

#[test]
fn blocking_the_only_pod_leaves_the_bridge_its_carrier() {
    let host = Host::new();
    let pod = host.pod(Request::default());
    host.namespace.await_running("zap0");
    pod.on_host(|network| network.block().unwrap());
    assert!(host.namespace.has_carrier("zap0"));
}

#[test]
fn a_pod_can_be_born_blocked() {
    let host = Host::new();
    let pod = host.pod(Request { blocked: true, ..Request::default() });
    serve(&pod.namespace, "0.0.0.0:80", "pod");
    let address = SocketAddr::new(pod.address().into(), 80);
    let connects = move || TcpStream::connect_timeout(&address, Duration::from_millis(200)).is_ok();
    assert!(!host.namespace.run(connects));
    pod.on_host(|network| {
        network.unblock().unwrap();
        network.announce();
    });
    assert_eq!(ask(&host.namespace, address.ip(), 80).unwrap(), "pod 198.18.0.1");
}

#[test]
fn an_announcement_reaches_the_neighbours_tables() {
    let host = Host::new();
    let other = host.pod(at([198, 18, 9, 9]));
    let first = host.pod(Request::default());
    let address = first.address();
    serve(&first.namespace, "0.0.0.0:80", "first");
    for neighbour in [&host.namespace, &other.namespace] {
        ask(neighbour, address, 80).unwrap();
    }
    first.remove();
    let second = host.pod(Request { mac: Some([2, 9, 9, 9, 9, 9]), ..at(address) });
    serve(&second.namespace, "0.0.0.0:80", "second");
    second.on_host(|network| network.announce());
    for neighbour in [&host.namespace, &other.namespace] {
        assert!(ask(neighbour, address, 80).unwrap().starts_with("second"));
    }
}

/// As a restart of an image asks, for a pod born with these addresses.
fn born_with(plan: &AddressPlan) -> Request<'static> {
    Request { inner: Some(Box::leak(Box::new(plan.clone()))), ..Request::default() }
}

#[test]
fn copies_keep_their_address_inside_and_are_reached_at_others() {
    let host = Host::new();
    let original = host.pod(Request::default());
    let plan = original.network.outer().clone();
    let copies = [host.pod(born_with(&plan)), host.pod(born_with(&plan))];
    let client = host.pod(Request::default());
    serve(&original.namespace, "[::]:80", "original");
    for copy in &copies {
        assert_eq!(copy.network.inner(), &plan);
        assert_ne!(copy.address(), plan.ipv4);
        assert_ne!(copy.network.outer().mac, plan.mac);
        assert!(copy.namespace.addresses("eth0").contains(&plan.ipv4.into()));
        serve(&copy.namespace, "[::]:80", "copy");
        let outer = copy.network.outer().clone();
        for neighbour in [&host.namespace, &client.namespace, &original.namespace] {
            assert!(ask(neighbour, outer.ipv4, 80).unwrap().starts_with("copy"));
            assert!(ask(neighbour, outer.ipv6, 80).unwrap().starts_with("copy"));
        }
    }
    for address in [IpAddr::from(plan.ipv4), plan.ipv6.into()] {
        assert!(ask(&host.namespace, address, 80).unwrap().starts_with("original"));
        assert!(ask(&client.namespace, address, 80).unwrap().starts_with("original"));
    }
    for pod in [&copies[0], &copies[1], &client] {
        pod.on_host(|network| network.detach().unwrap());
    }
    original.remove();
    assert_eq!(host.namespace.tables(), "");
}

#[test]
fn what_a_blocked_pod_asked_for_is_not_waited_for() {
    let host = Host::new();
    let (pod, other) = (host.pod(Request { blocked: true, ..Request::default() }), host.pod(Request::default()));
    let peers = [IpAddr::from(other.network.outer().ipv4), other.network.outer().ipv6.into()];
    let ask_for = move || {
        let socket = UdpSocket::bind("[::]:0").unwrap();
        for peer in peers {
            let mapped = match peer {
                IpAddr::V4(v4) => v4.to_ipv6_mapped(),
                IpAddr::V6(v6) => v6,
            };
            socket.send_to(b"?", (mapped, 9)).unwrap();
        }
    };
    let unanswered = || {
        pod.namespace.run(|| {
            let listed =
                std::process::Command::new("ip").args(["neigh", "show", "nud", "incomplete"]).output().unwrap();
            String::from_utf8(listed.stdout).unwrap()
        })
    };
    // As long as this test lasts: three seconds, if nobody changes that.
    for version in ["ipv4", "ipv6"] {
        let pause = format!("/proc/sys/net/{version}/neigh/eth0/retrans_time_ms");
        pod.namespace.run(|| std::fs::write(pause, "600000").unwrap());
    }
    pod.namespace.run(ask_for);
    assert_eq!(unanswered().lines().count(), 2);
    pod.on_host(|network| {
        network.unblock().unwrap();
        network.forget_unanswered().unwrap();
    });
    assert_eq!(unanswered(), "", "{:?}", pod.network.outer());
    serve(&other.namespace, "0.0.0.0:80", "other");
    assert!(ask(&pod.namespace, peers[0], 80).is_ok_and(|said| said.starts_with("other")));
}

#[test]
fn a_copy_can_talk_out_under_its_outer_address() {
    let host = Host::new();
    let original = host.pod(Request::default());
    let copy = host.pod(born_with(original.network.outer()));
    let server = host.pod(Request::default());
    serve(&server.namespace, "[::]:80", "seen from");
    serve(&host.namespace, "[::]:80", "seen from");
    let outer = copy.network.outer().clone();
    let v4 = format!("seen from ::ffff:{}", outer.ipv4);
    let v6 = format!("seen from {}", outer.ipv6);
    let hosts = server.network.outer().clone();
    for (to4, to6) in [(hosts.ipv4, hosts.ipv6), (hosts.gateway4, hosts.gateway6)] {
        assert_eq!(ask(&copy.namespace, to4, 80).unwrap(), v4);
        assert_eq!(ask(&copy.namespace, to6, 80).unwrap(), v6);
    }
}

#[test]
fn a_pod_from_a_host_with_another_gateway_talks_out() {
    let elsewhere: HostConfig = toml::from_str("address = '198.18.7.1/16'").unwrap();
    let there = Host { namespace: Namespace::new(), config: elsewhere };
    let born = there.pod(at([198, 18, 7, 9]));
    let host = Host::new();
    let moved = host.pod(born_with(born.network.outer()));
    assert_eq!(moved.address(), born.address());
    serve(&host.namespace, "[::]:80", "seen from");
    for gateway in [IpAddr::from([198, 18, 7, 1]), "fd5a:4150::c612:701".parse().unwrap()] {
        assert!(ask(&moved.namespace, gateway, 80).unwrap().starts_with("seen from"), "{gateway}");
    }
}

#[test]
fn a_published_port_leads_into_the_pod() {
    let host = Host::new();
    let ports = vec![
        Publish { address: None, host_port: 8080, pod_port: 80, udp: false },
        Publish { address: None, host_port: 5353, pod_port: 53, udp: true },
    ];
    let publish: &'static [Publish] = Box::leak(ports.into_boxed_slice());
    let pod = host.pod(Request { publish, ..Request::default() });
    let other = host.pod(Request::default());
    serve(&pod.namespace, "[::]:80", "pod");
    for here in ["127.0.0.1", "198.18.0.1", "fd5a:4150::c612:1"] {
        let address: IpAddr = here.parse().unwrap();
        let said = ask(&host.namespace, address, 8080);
        assert!(said.as_ref().is_ok_and(|said| said.starts_with("pod")), "from the host, {here}: {said:?}");
    }
    // The kernel routes nothing from ::1: refused at once, so that clients go on to the next address of `localhost`.
    let refused = ask(&host.namespace, std::net::Ipv6Addr::LOCALHOST, 8080).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    for gateway in [IpAddr::from([198, 18, 0, 1]), "fd5a:4150::c612:1".parse().unwrap()] {
        assert!(ask(&other.namespace, gateway, 8080).unwrap().starts_with("pod"), "from a pod, {gateway}");
    }
    pod.namespace.run(|| {
        let socket = UdpSocket::bind("0.0.0.0:53").unwrap();
        std::thread::spawn(move || {
            let (_, from) = socket.recv_from(&mut [0; 8]).unwrap();
            socket.send_to(b"answer", from).unwrap();
        });
    });
    let answer = host.namespace.run(|| {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.send_to(b"?", "127.0.0.1:5353").unwrap();
        socket.recv(&mut [0; 8])
    });
    assert_eq!(answer.unwrap(), 6);
    other.remove();
    pod.remove();
    assert_eq!(host.namespace.tables(), "");
}

#[test]
fn a_port_that_is_taken_is_an_error_and_leaves_nothing() {
    let host = Host::new();
    let before = host.namespace.links();
    let _listener = host.namespace.run(|| TcpListener::bind("127.0.0.1:8080").unwrap());
    let publish: &'static [Publish] = &[Publish { address: None, host_port: 8080, pod_port: 80, udp: false }];
    let request = Request { publish, ..Request::default() };
    assert_eq!(host.attach(&Namespace::new(), request).unwrap_err().exit_code(), 6);
    assert_eq!(host.namespace.links(), before);
    let publish: &'static [Publish] = &[Publish { address: None, host_port: 8081, pod_port: 80, udp: false }];
    let request = Request { publish, ..Request::default() };
    let first = host.pod(request.clone());
    assert_eq!(host.attach(&Namespace::new(), request).unwrap_err().exit_code(), 6);
    first.remove();
    assert_eq!(host.namespace.links(), before);
}

#[test]
fn a_pod_cannot_reach_the_hosts_loopback_through_a_published_port() {
    let host = Host::new();
    serve(&host.namespace, "127.0.0.1:99", "secret");
    let publish: &'static [Publish] = &[Publish { address: None, host_port: 8080, pod_port: 80, udp: false }];
    let pod = host.pod(Request { publish, ..Request::default() });
    let route = |args: &'static [&'static str]| {
        pod.namespace.run(move || std::process::Command::new("ip").args(args).status().unwrap().success())
    };
    pod.namespace.run(|| std::fs::write("/proc/sys/net/ipv4/conf/all/route_localnet", "1").unwrap());
    assert!(route(&["route", "add", "127.9.9.9/32", "via", "198.18.0.1"]));
    assert!(route(&["route", "del", "table", "local", "127.0.0.0/8", "dev", "lo"]));
    assert!(route(&["route", "add", "127.0.0.1/32", "via", "198.18.0.1", "src", "198.18.0.2"]));
    let reached = pod
        .namespace
        .run(|| TcpStream::connect_timeout(&"127.0.0.1:99".parse().unwrap(), Duration::from_millis(300)).is_ok());
    assert!(!reached);
}

#[test]
fn a_host_with_a_way_out_lends_it_and_is_restored() {
    let host = Host::new();
    let world = Namespace::new();
    let forwards = || host.namespace.run(|| std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward").unwrap());
    let command = |namespace: &Namespace, line: String| {
        let words: Vec<_> = line.split(' ').map(str::to_owned).collect();
        assert!(namespace.run(move || std::process::Command::new("ip").args(words).status().unwrap().success()));
    };
    command(&host.namespace, format!("link add out0 type veth peer name in0 netns {}", world.id()));
    command(&host.namespace, "addr add 192.0.2.1/24 dev out0".to_owned());
    command(&host.namespace, "link set out0 up".to_owned());
    command(&world, "addr add 192.0.2.2/24 dev in0".to_owned());
    command(&world, "link set in0 up".to_owned());
    command(&host.namespace, "route add default via 192.0.2.2".to_owned());
    let (before, off) = (host.namespace.links(), forwards());
    let pod = host.pod(Request::default());
    serve(&world, "0.0.0.0:80", "seen from");
    assert_eq!(ask(&pod.namespace, [192, 0, 2, 2], 80).unwrap(), "seen from 192.0.2.1");
    assert_eq!(forwards(), "1\n");
    pod.remove();
    assert_eq!((host.namespace.links(), forwards()), (before, off));
    assert_eq!(host.namespace.tables(), "");
}

#[test]
fn two_hosts_share_a_network_by_their_uplinks() {
    let (mut a, mut b) = (Host::new(), Host::new());
    let other = b.namespace.id();
    a.namespace.run(move || {
        let line = format!("link add up0 type veth peer name up0 netns {other}");
        assert!(std::process::Command::new("ip").args(line.split(' ')).status().unwrap().success());
    });
    a.config = toml::from_str("uplink = 'up0'\npool = '198.18.1.0/24'").unwrap();
    b.config = toml::from_str("uplink = 'up0'\naddress = '198.18.0.254/16'\npool = '198.18.2.0/24'").unwrap();
    let (on_a, on_b) = (a.pod(Request::default()), b.pod(Request::default()));
    a.namespace.await_running("up0");
    b.namespace.await_running("up0");
    serve(&on_a.namespace, "0.0.0.0:80", "a");
    assert_eq!(ask(&on_b.namespace, on_a.address(), 80).unwrap(), "a 198.18.2.1");
    on_a.remove();
    assert!(!a.namespace.is_running("up0"));
}

/// Not a judgement but a record: printed, with limits that only something broken passes.
#[test]
fn connecting_and_blocking_take_no_time_to_speak_of() {
    let host = Host::new();
    fn time(act: impl FnOnce()) -> Duration {
        let started = Instant::now();
        act();
        started.elapsed()
    }
    let kept = host.pod(Request::default());
    // The least of many: whatever else the machine does disturbs some.
    let (mut attach, mut block, mut unblock, mut detach) = (Duration::MAX, Duration::MAX, Duration::MAX, Duration::MAX);
    for _ in 0..10 {
        let namespace = Namespace::new();
        let started = Instant::now();
        let network = host.attach(&namespace, Request::default()).unwrap();
        attach = attach.min(started.elapsed());
        let took = host.namespace.run(move || {
            let (block, unblock) = (time(|| network.block().unwrap()), time(|| network.unblock().unwrap()));
            [block, unblock, time(|| network.detach().unwrap())]
        });
        (block, unblock, detach) = (block.min(took[0]), unblock.min(took[1]), detach.min(took[2]));
    }
    let last = time(|| kept.on_host(|network| network.detach().unwrap()));
    println!("attach {attach:?}, block {block:?}, unblock {unblock:?}, detach {detach:?}, last {last:?}");
    assert!(attach < Duration::from_secs(1) && block < Duration::from_millis(100));
}
