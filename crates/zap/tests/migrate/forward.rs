//! Pods that move to another network: a router lies between two hosts, and whoever is connected with the pod stays so.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::process::{Child, ChildStdout, Command, Stdio};

use super::common::{Host, eventually, finish};
use super::{migrate, pods, portrait};

/// Echoes, counts, and echoes datagrams.
const SERVER: &str = "
import socket, threading, time
def echo(c):
    while data := c.recv(65536): c.sendall(data)
def count(c):
    n = 0
    while True:
        n += 1; c.sendall(b'%d\\n' % n); time.sleep(.02)
def serve(port, what):
    s = socket.create_server(('::', port), family=socket.AF_INET6, dualstack_ipv6=True)
    while True: threading.Thread(target=what, args=(s.accept()[0],), daemon=True).start()
for port, what in (80, echo), (82, count): threading.Thread(target=serve, args=(port, what), daemon=True).start()
u = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM); u.bind(('::', 81))
print('ready', flush=True)
while True:
    data, who = u.recvfrom(9000); u.sendto(data, who)
";

/// Is connected in each of these ways, over IPv4 and IPv6, and tries all of them whenever it is told to.
const CLIENT: &str = "
import os, socket, sys, threading
class Way:
    def __init__(self, host):
        self.host, self.n, self.seen = host, 0, 0
        self.echo = socket.create_connection((host, 80), 40)
        self.count = socket.create_connection((host, 82), 40)
        self.lines = self.count.makefile('rb')
        self.udp = socket.socket(self.echo.family, socket.SOCK_DGRAM); self.udp.connect((host, 81)); self.udp.settimeout(1)
    def check(self):
        block = os.urandom(400000)
        threading.Thread(target=self.echo.sendall, args=(block,)).start()
        back = b''
        while len(back) < len(block):
            more = self.echo.recv(1 << 20); assert more; back += more
        assert back == block
        for _ in range(10):
            self.seen += 1; line = self.lines.readline(); assert line == b'%d\\n' % self.seen, (line, self.seen)
        for size in 10, 1000, 5000:
            self.datagram(size)
    def datagram(self, size):
        for _ in range(20):
            self.n += 1; sent = b'%d' % self.n + bytes(size)
            try:
                self.udp.send(sent)
                while self.udp.recv(9000) != sent: pass
                return
            except (TimeoutError, ConnectionRefusedError): pass
        raise Exception('datagrams of %d bytes are lost' % size)
try:
    ways = [Way(host) for host in sys.argv[1:]]
    print('connected', flush=True)
    for _ in sys.stdin:
        for way in ways:
            try: way.check()
            except Exception as e: raise Exception(way.host) from e
        print('ok', flush=True)
except Exception as e:
    print('no:', repr(e), repr(e.__cause__), flush=True)
";

/// Two hosts, each with a network of pods of its own, and somebody else, all behind a router that lets nothing pass whose
/// sender cannot be where it comes from.
pub(super) struct World {
    pub(super) a: Host,
    pub(super) b: Host,
    pub(super) other: Host,
    _router: Host,
}

fn ip(host: &Host, line: &str) {
    let done = finish(host.command("ip").args(line.split(' ')));
    assert_eq!(done.code, 0, "ip {line}: {done:?}");
}

fn set(host: &Host, name: &str, value: &str) {
    let done = finish(host.command("sh").args(["-c", &format!("echo {value} >/proc/sys/net/{name}")]));
    assert_eq!(done.code, 0, "{name}: {done:?}");
}

impl World {
    pub(super) fn new() -> World {
        let [a, b, other, router] = [Host::new(), Host::new(), Host::new(), Host::new()];
        for host in [&a, &b, &other, &router] {
            // Addresses are there at once, or are not.
            set(host, "ipv6/conf/default/accept_dad", "0");
        }
        for name in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
            set(&router, name, "1");
        }
        for (number, host) in [&a, &b, &other].into_iter().enumerate() {
            let network = host.network();
            let there = format!("/proc/{}/fd/{}", std::process::id(), network.as_raw_fd());
            ip(&router, &format!("link add r{number} type veth peer name out netns {there}"));
            ip(&router, &format!("address add 10.0.{number}.254/24 dev r{number}"));
            ip(&router, &format!("address add fd0{number}::fe/64 dev r{number} nodad"));
            ip(&router, &format!("link set r{number} up"));
            ip(host, &format!("address add 10.0.{number}.1/24 dev out"));
            ip(host, &format!("address add fd0{number}::1/64 dev out nodad"));
            ip(host, "link set out up");
            ip(host, &format!("route add default via 10.0.{number}.254"));
            ip(host, &format!("route add default via fd0{number}::fe"));
        }
        for host in [&a, &b, &other] {
            let shown = |line: &str| finish(host.command("ip").args(line.split(' '))).stdout;
            eventually("the link to the router", || {
                shown("link show out").contains("state UP")
                    && shown("route show table local").contains("10.0.")
                    && shown("-6 address show dev out").contains("fe80")
            });
        }
        for host in [&a, &b, &router] {
            set(host, "ipv4/conf/all/rp_filter", "1");
        }
        for (number, host) in [&a, &b, &other].into_iter().enumerate() {
            ip(&router, &format!("route add 198.{}.0.0/16 via 10.0.{number}.1", 18 + number));
            ip(&router, &format!("route add fd5a:4150::c6{}:0/112 via fd0{number}::1", 12 + number));
            std::fs::create_dir_all(host.state()).unwrap();
            let address = format!("address = \"198.{}.0.1/16\"\n", 18 + number);
            std::fs::write(host.state().join("config.toml"), address).unwrap();
        }
        World { a, b, other, _router: router }
    }

    /// Starts the server on `a`, and gives its addresses.
    pub(super) fn serve(&self) -> [String; 2] {
        self.a.ok(["run", "-d", "-n", "server", "--", "python3", "-c", SERVER]);
        eventually("the server", || self.a.ok(["logs", "server"]).contains("ready"));
        addresses(&self.a, "server")
    }
}

pub(super) fn addresses(host: &Host, pod: &str) -> [String; 2] {
    let row = host.row(pod);
    ["address", "address6"].map(|key| row[key].as_str().unwrap().to_owned())
}

/// Somebody who is connected with the pod.
pub(super) struct Client {
    who: &'static str,
    child: Child,
    said: BufReader<ChildStdout>,
}

impl Client {
    pub(super) fn start(who: &'static str, mut command: Command, to: &[String; 2]) -> Client {
        command.args(["python3", "-c", CLIENT]).args(to).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let said = BufReader::new(child.stdout.take().unwrap());
        let mut client = Client { who, child, said };
        client.must_say("connected");
        client
    }

    fn must_say(&mut self, word: &str) {
        let mut line = String::new();
        self.said.read_line(&mut line).unwrap();
        assert_eq!(line.trim_end(), word, "{}", self.who);
    }

    /// Everything goes both ways.
    pub(super) fn goes_on(&mut self) {
        writeln!(self.child.stdin.as_ref().unwrap()).unwrap();
        self.must_say("ok");
    }
}

impl Client {
    /// Ends by itself, so that it ends wherever it runs.
    pub(super) fn leave(mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(super) fn residual(host: &Host) -> Vec<(String, String)> {
    let kept = host.json(["ls", "--residual", "--json"]);
    let text = |row: &serde_json::Value, key: &str| row[key].as_str().unwrap().to_owned();
    kept.as_array().unwrap().iter().map(|row| (text(row, "pod"), text(row, "address"))).collect()
}

const FORWARD: &[&str] = &["--any-address", "--forward", "--stats"];

/// A portrait without counters and what only time removes.
pub(super) fn quiet_portrait(host: &Host) -> String {
    let done = finish(host.command("ip").args(["neigh", "flush", "all"]));
    assert_eq!(done.code, 0, "{done:?}");
    portrait(host)
}

/// Waits until a host looks as it did before.
pub(super) fn must_be_as_before(host: &Host, before: &str) {
    let news = || {
        let now = quiet_portrait(host);
        let lines =
            now.lines().filter(|line| !before.contains(line)).chain(before.lines().filter(|l| !now.contains(l)));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    let deadline = std::time::Instant::now() + super::common::PATIENCE;
    while quiet_portrait(host) != before {
        assert!(std::time::Instant::now() < deadline, "something is left: {:#?}", news());
    }
}

#[test]
fn whoever_is_connected_stays_so_by_a_forwarder() {
    let world = World::new();
    let (a, b) = (&world.a, &world.b);
    let [before, there_before] = [a, b].map(|host| {
        host.ok(["ls"]);
        quiet_portrait(host)
    });
    let address = world.serve();
    a.ok(["run", "-d", "-n", "neighbour", "--", "sleep", "1000"]);
    let mut clients = [
        Client::start("a peer elsewhere", world.other.command("env"), &address),
        Client::start("the host", a.command("env"), &address),
        Client::start("a pod beside it", a.zap(["exec", "-i", "neighbour", "env"]), &address),
    ];
    clients.iter_mut().for_each(Client::goes_on);

    let done = migrate(a, b, "server", &[], FORWARD);
    assert!(done.code == 0 && !done.stderr.contains("no forwarder"), "{done:?}");
    clients.iter_mut().for_each(Client::goes_on);
    assert_eq!(residual(a), [("server".to_owned(), address[0].clone())]);
    assert_eq!(residual(b), []);
    // Its address there is as good as any, for the same hosts too.
    let there = addresses(b, "server");
    assert!(there[0].starts_with("198.19."), "{there:?}");
    let mut direct = Client::start("a peer at its new address", world.other.command("env"), &there);
    let mut late = Client::start("a peer that comes later", world.other.command("env"), &address);
    direct.goes_on();
    late.goes_on();
    clients.iter_mut().for_each(Client::goes_on);

    // Home again, nothing is forwarded, and nothing is left.
    let done = migrate(b, a, "server", &[], &["--any-address"]);
    assert_eq!(done.code, 0, "{done:?}");
    assert_eq!(addresses(a, "server"), address);
    clients.iter_mut().chain([&mut late]).for_each(Client::goes_on);
    assert_eq!(residual(a), []);
    drop((clients, late, direct));
    must_be_as_before(b, &there_before);
    a.ok(["rm", "-f", "server", "neighbour"]);
    must_be_as_before(a, &before);
}

#[test]
fn a_forwarder_is_removed_by_whoever_wants_that_or_its_address() {
    let world = World::new();
    let (a, b) = (&world.a, &world.b);
    a.ok(["ls"]);
    let before = quiet_portrait(a);
    let address = world.serve();
    let moved = |from, to, options: &[&str]| {
        let done = migrate(from, to, "server", &[], options);
        assert_eq!(done.code, 0, "{done:?}");
    };
    moved(a, b, FORWARD);
    assert_eq!((pods(a), residual(a).len()), (vec![], 1));
    // Not for anybody who has no wish for it …
    a.ok(["run", "-d", "-n", "next", "--", "sleep", "1000"]);
    assert_ne!(addresses(a, "next"), address);
    assert_eq!(residual(a).len(), 1);
    // … but for whoever has.
    a.ok(["run", "-d", "-n", "heir", "--ip", &address[0], "--", "sleep", "1000"]);
    assert_eq!(residual(a), []);
    assert_eq!(a.run(["rm", "--residual", "server"]).code, 6);
    a.ok(["rm", "-f", "heir"]);

    // The pod goes on without it.
    moved(b, a, &["--any-address"]);
    moved(a, b, FORWARD);
    a.ok(["rm", "-f", "next"]);
    a.ok(["rm", "--residual", "server"]);
    assert_eq!(residual(a), []);
    must_be_as_before(a, &before);
    // Who knows it by that address stays connected, too, when it goes home.
    let mut late = Client::start("a peer at its new address", world.other.command("env"), &addresses(b, "server"));
    moved(b, a, FORWARD);
    late.goes_on();
    assert_eq!(residual(b).len(), 1);
    b.ok(["rm", "--residual", "server"]);
}
