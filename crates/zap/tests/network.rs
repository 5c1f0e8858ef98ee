//! Pods' networks, in network namespaces made for the purpose: nothing here touches the machine's own.

#[path = "network/namespace.rs"]
mod namespace;

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use namespace::Namespace;
use zap::pod::host_config::HostConfig;
use zap::pod::network::{Network, NetworkError, Request};

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
        self.namespace.run(move || Network::attach(&config, &request, id))
    }

    fn pod(&self, request: Request<'static>) -> Pod<'_> {
        let namespace = Namespace::new();
        let network = self.attach(&namespace, request).unwrap();
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

/// What the server at `address` says to a client in `namespace`.
fn ask(namespace: &Namespace, address: impl Into<IpAddr>, port: u16) -> std::io::Result<String> {
    let address = SocketAddr::new(address.into(), port);
    namespace.run(move || {
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(3))?;
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
            socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
            socket
        })
    };
    let (in_host, in_a, in_b) = (listen(&host.namespace), listen(&a.namespace), listen(&b.namespace));
    let passes = |from: &UdpSocket, to: &UdpSocket, address: Ipv4Addr| {
        from.send_to(b"x", (address, 9)).unwrap();
        to.recv(&mut [0; 8]).is_ok()
    };
    let check = |open: bool| {
        assert_eq!(passes(&in_host, &in_a, address), open, "host to pod");
        assert_eq!(passes(&in_b, &in_a, address), open, "pod to pod");
        assert_eq!(passes(&in_a, &in_host, gateway), open, "pod to host");
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
    pod.on_host(|network| network.block().unwrap());
    assert!(host.namespace.is_running("zap0"));
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
        network.announce().unwrap();
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
    second.on_host(|network| network.announce().unwrap());
    for neighbour in [&host.namespace, &other.namespace] {
        assert!(ask(neighbour, address, 80).unwrap().starts_with("second"));
    }
}

/// Not a judgement but a record: printed, with limits that only something broken passes.
#[test]
fn connecting_and_blocking_take_no_time_to_speak_of() {
    let host = Host::new();
    let namespace = Namespace::new();
    let started = Instant::now();
    let network = host.attach(&namespace, Request::default()).unwrap();
    let first = started.elapsed();
    let kept = host.pod(Request::default());
    let more = Namespace::new();
    let started = Instant::now();
    let another = host.attach(&more, Request::default()).unwrap();
    let attach = started.elapsed();
    fn time(act: impl Fn()) -> Duration {
        let started = Instant::now();
        act();
        started.elapsed()
    }
    let (block, unblock, detach) = host.namespace.run(move || {
        another.detach().unwrap();
        (time(|| network.block().unwrap()), time(|| network.unblock().unwrap()), time(|| network.detach().unwrap()))
    });
    let last = time(|| kept.on_host(|network| network.detach().unwrap()));
    println!(
        "first {first:?}, attach {attach:?}, block {block:?}, unblock {unblock:?}, detach {detach:?}, last {last:?}"
    );
    assert!(attach < Duration::from_secs(1) && block < Duration::from_millis(100));
}
