//! Sockets and System V objects through checkpoint and restart, seen from inside the pod and from its clients.

#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;

use common::{Host, PATIENCE};

/// Serves connections on ports 80 (IPv4) and 81 (IPv6), each in a process of its own. `N` is answered by N bytes of a
/// pattern, `half` by closing our half.
const SERVER: &str = r#"
use Socket qw(:all);
$SIG{CHLD} = "IGNORE";
sub serve { my ($family, $address) = @_;
    socket(my $listener, $family, SOCK_STREAM, 0) or die $!;
    setsockopt($listener, SOL_SOCKET, SO_REUSEADDR, 1);
    bind($listener, $address) or die $!; listen($listener, 20) or die $!;
    while (accept(my $client, $listener)) {
        next if fork;
        close $listener;
        binmode $client;
        while (my $line = <$client>) {
            if ($line eq "half\n") { shutdown($client, 1); next }
            my $left = $line + 0; my $at = 0;
            while ($left > 0) {
                my $piece = join "", map { chr(($at + $_) % 251) } 0 .. ($left < 251 ? $left - 1 : 250);
                $piece x= 200 if $left >= 251 * 200;
                my $sent = syswrite($client, $piece); die $! unless defined $sent;
                $at = ($at + $sent) % 251; $left -= $sent;
            }
        }
        open(my $log, ">>", "/tmp/ended"); print $log "ended\n"; exit 0;
    }
}
if (fork) { serve(PF_INET, pack_sockaddr_in(80, INADDR_ANY)) } else { serve(PF_INET6, pack_sockaddr_in6(81, IN6ADDR_ANY)) }
"#;

/// A client in the host's network namespace.
fn connect(host: &Host, address: String) -> TcpStream {
    let network = host.network();
    let client = std::thread::spawn(move || {
        nix::sched::setns(network, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        TcpStream::connect(address).unwrap()
    });
    let client = client.join().unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client
}

fn expect(client: &mut TcpStream, from: usize, length: usize) {
    let mut bytes = vec![0; length];
    client.read_exact(&mut bytes).unwrap();
    let wrong = bytes.iter().enumerate().find(|(n, b)| **b != ((from + n) % 251) as u8);
    assert_eq!(wrong, None, "at {from}");
}

fn ask(client: &mut TcpStream, length: usize) {
    client.write_all(format!("{length}\n").as_bytes()).unwrap();
}

#[test]
fn clients_notice_a_pause_and_nothing_else() {
    let host = Host::new();
    host.ok(["run", "-d", "-n", "server", "--", "perl", "-e", SERVER]);
    host.wait_for("server", "grep -q ':0050 .* 0A ' /proc/net/tcp && grep -q ':0051 .* 0A ' /proc/net/tcp6");
    let row = host.row("server");
    let address = row["address"].as_str().unwrap();
    let address6 = row["address6"].as_str().unwrap();
    let mut idle = connect(&host, format!("{address}:80"));
    let mut idle6 = connect(&host, format!("[{address6}]:81"));
    let mut busy = connect(&host, format!("{address}:80"));
    let mut half = connect(&host, format!("{address}:80"));
    let mut ended = connect(&host, format!("{address}:80"));
    for client in [&mut idle, &mut idle6, &mut ended] {
        ask(client, 1000);
        expect(client, 0, 1000);
    }
    let large = 40_000_000;
    ask(&mut busy, large);
    expect(&mut busy, 0, 1_000_000);
    half.write_all(b"half\n").unwrap();
    assert_eq!(half.read(&mut [0]).unwrap(), 0);
    ask(&mut half, 100_000_000);
    let mut at = 1_000_000;
    for round in 0..3 {
        let image = host.path(&format!("image{round}"));
        let image = image.to_str().unwrap();
        if round == 0 {
            host.ok(["checkpoint", "--leave-running", "server", "-o", image]);
        } else {
            host.ok(["checkpoint", "server", "-o", image]);
            assert_eq!(host.row("server"), serde_json::Value::Null);
            // What is sent while nobody is there comes through later.
            ask(&mut idle, 500);
            host.ok(["restart", "-d", image]);
            expect(&mut idle, 0, 500);
        }
        for client in [&mut idle, &mut idle6] {
            ask(client, 300_000);
            expect(client, 0, 300_000);
        }
        expect(&mut busy, at, 5_000_000);
        at += 5_000_000;
        let mut fresh = connect(&host, format!("{address}:80"));
        ask(&mut fresh, 10);
        expect(&mut fresh, 0, 10);
    }
    expect(&mut busy, at, large - at);
    drop(ended);
    drop(half);
    host.wait_for("server", "[ $(grep -c ended /tmp/ended) -ge 1 ]");
}

/// A restart finds no bridge: the pod was the last on it.
#[test]
fn clients_of_a_published_port_go_on_after_a_restart() {
    let host = Host::new();
    assert!(host.command("ip").args(["address", "add", "192.0.2.1/32", "dev", "lo"]).status().unwrap().success());
    host.ok(["run", "-d", "-n", "server", "-p", "8080:80", "--", "perl", "-e", SERVER]);
    host.wait_for("server", "grep -q ':0050 .* 0A ' /proc/net/tcp");
    let addresses = ["127.0.0.1:8080", "192.0.2.1:8080"];
    let mut clients = addresses.map(|address| connect(&host, address.to_owned()));
    // The first to speak after the restart is the server.
    let mut listeners = addresses.map(|address| connect(&host, address.to_owned()));
    let large = 40_000_000;
    for listener in &mut listeners {
        nix::sys::socket::setsockopt(listener, nix::sys::socket::sockopt::RcvBuf, &4096).unwrap();
        ask(listener, large);
        expect(listener, 0, 100_000);
    }
    for round in 0..2 {
        for client in &mut clients {
            ask(client, 1000);
            expect(client, 0, 1000);
        }
        // Who speaks while the pod is away is reset by the host. Nobody has anything to say once all is acknowledged (no timer
        // 01), and those who take nothing more have said so (04).
        let timers = |number: &str| format!("grep -c ' 01 [0-9A-F]*:[0-9A-F]* {number}:' /proc/net/tcp");
        host.wait_for("server", &format!("[ $({}) = 0 ] && [ $({}) = 2 ]", timers("01"), timers("04")));
        let image = host.path(&format!("image{round}"));
        let image = image.to_str().unwrap();
        host.ok(["checkpoint", "server", "-o", image]);
        host.ok(["restart", "-d", image]);
        // The first to speak are the servers, in a network that is new: they ask whether they may send.
        let asked = "awk '/TCPWinProbe/ { for (i = 1; i <= NF; i++) if ($i == \"TCPWinProbe\") at = i; getline; exit $at < 4 }'";
        host.wait_for("server", &format!("{asked} /proc/net/netstat"));
    }
    for client in &mut clients {
        ask(client, 300_000);
        expect(client, 0, 300_000);
    }
    for listener in &mut listeners {
        expect(listener, 100_000, large - 100_000);
    }
}

/// Sets things up, says so, waits for a file, and looks whether all is as it was.
const OBJECTS: &str = r#"
use Socket qw(:all); $| = 1;
sub check { my ($what, $got, $want) = @_; print "wrong $what: <$got>, not <$want>\n" if $got ne $want }
sub get { my ($from, $length) = @_; my $text = ""; while (length($text) < $length) { sysread($from, $text, $length - length($text), length($text)) or last } $text }
socketpair(my $a, my $b, AF_UNIX, SOCK_STREAM, 0) or die $!;
syswrite($a, "to b"); syswrite($b, "to a");
socketpair(my $orphan, my $gone, AF_UNIX, SOCK_STREAM, 0) or die $!;
syswrite($gone, "farewell"); close $gone;
mkdir "/tmp/sub"; chdir "/tmp/sub";
socket(my $unix, AF_UNIX, SOCK_STREAM, 0); bind($unix, sockaddr_un("name")) or die $!; listen($unix, 3) or die $!;
socket(my $caller, AF_UNIX, SOCK_STREAM, 0); connect($caller, sockaddr_un("name")) or die $!;
accept(my $called, $unix) or die $!; syswrite($caller, "called");
chmod 0777, "name"; unless (fork) { $> = 1; socket(my $s, AF_UNIX, SOCK_STREAM, 0); connect($s, sockaddr_un("name")) or die $!; sleep 1000 }
accept(my $stranger, $unix) or die $!;
sub peers { join "; ", map { join " ", unpack("i3", getsockopt($_, SOL_SOCKET, SO_PEERCRED)) } $a, $b, $unix, $caller, $called, $stranger }
my $peers = peers();
socket(my $log, AF_UNIX, SOCK_DGRAM, 0); bind($log, sockaddr_un("/tmp/log")) or die $!;
socket(my $logger, AF_UNIX, SOCK_DGRAM, 0); connect($logger, sockaddr_un("/tmp/log")) or die $!;
send($logger, "one", 0); send($logger, "two", 0);
socket(my $listener, PF_INET, SOCK_STREAM, 0); bind($listener, sockaddr_in(0, INADDR_LOOPBACK)); listen($listener, 3);
socket(my $tcp, PF_INET, SOCK_STREAM, 0); connect($tcp, getsockname($listener)) or die $!; accept(my $other, $listener);
syswrite($tcp, "hello"); syswrite($other, "welcome"); shutdown($tcp, 1);
socket(my $udp, PF_INET, SOCK_DGRAM, 0); bind($udp, sockaddr_in(0, INADDR_LOOPBACK));
socket(my $from, PF_INET, SOCK_DGRAM, 0); connect($from, getsockname($udp)); send($from, "datagram", 0);
my ($tcp_name, $from_name) = (getsockname($tcp), getsockname($from));
my $shm = shmget(0x77, 10000, 0600 | 01000); shmwrite($shm, "shared", 5000, 6);
my $sem = semget(0x77, 2, 0600 | 01000); semop($sem, pack("s!3", 1, 5, 0));
my $msg = msgget(0x77, 0600 | 01000); msgsnd($msg, pack("l! a*", 4, "message"), 0);
print "ready\n";
select(undef, undef, undef, 0.01) until -e "/tmp/go";
check("peers", peers(), $peers);
check("pair", get($a, 4), "to a"); check("pair", get($b, 4), "to b");
check("orphan", get($orphan, 100), "farewell");
check("called", get($called, 6), "called"); syswrite($called, "answer"); check("caller", get($caller, 6), "answer");
check("unix name", sockaddr_family(getsockname($unix)) . unpack_sockaddr_un(getsockname($called)), AF_UNIX . "name");
my $text; recv($log, $text, 100, 0); check("datagram", $text, "one"); recv($log, $text, 100, 0); check("datagram", $text, "two");
send($logger, "three", 0); recv($log, $text, 100, 0); check("datagram", $text, "three");
check("tcp", get($other, 100), "hello"); check("tcp", get($tcp, 7), "welcome"); check("tcp name", getsockname($tcp), $tcp_name);
check("tcp peer", getpeername($other), $tcp_name);
my $sender = recv($udp, $text, 100, 0); check("udp", $text, "datagram"); check("udp sender", $sender, $from_name);
shmread($shm, $text, 5000, 6); check("shared memory", $text, "shared"); check("id", shmget(0x77, 0, 0), $shm);
check("semaphore", semctl($sem, 1, 12, 0), 5); check("id", semget(0x77, 0, 0), $sem);
msgrcv($msg, $text, 100, 0, 0); check("message", join(":", unpack("l! a*", $text)), "4:message"); check("id", msgget(0x77, 0), $msg);
socket(my $late, AF_UNIX, SOCK_STREAM, 0); connect($late, sockaddr_un("/tmp/sub/name")) or print "wrong: no connection: $!\n";
print "done\n"; sleep 1000;
"#;

fn objects(prepare: impl Fn(&Host)) {
    let host = Host::new();
    host.start(["-n", "pod", "--", "perl", "-e", OBJECTS]);
    common::eventually("ready", || host.ok(["logs", "pod"]).contains("ready"));
    prepare(&host);
    host.ok(["exec", "pod", "touch", "/tmp/go"]);
    common::eventually("done", || host.ok(["logs", "pod"]).contains("done"));
    let log = host.ok(["logs", "pod"]);
    assert!(!log.contains("wrong"), "{log}");
}

fn image(host: &Host) -> String {
    host.path("image").to_str().unwrap().to_owned()
}

#[test]
fn objects_of_a_pod_that_is_left_alone() {
    objects(|_| ());
}

#[test]
fn objects_of_a_pod_that_is_left_running() {
    objects(|host| drop(host.ok(["checkpoint", "--leave-running", "pod", "-o", &image(host)])));
}

#[test]
fn objects_of_a_pod_that_is_restarted() {
    objects(|host| {
        host.ok(["checkpoint", "pod", "-o", &image(host)]);
        host.ok(["restart", "-d", &image(host)]);
    });
}

#[test]
fn a_connection_that_nobody_accepted_is_refused_by_name() {
    let host = Host::new();
    let lazy = r#"use Socket; socket(my $l, PF_INET, SOCK_STREAM, 0); bind($l, sockaddr_in(9, INADDR_LOOPBACK)); listen($l, 3);
        socket(my $c, PF_INET, SOCK_STREAM, 0); connect($c, sockaddr_in(9, INADDR_LOOPBACK)); $| = 1; print "ready\n"; sleep 1000"#;
    host.start(["-n", "lazy", "--", "perl", "-e", lazy]);
    common::eventually("ready", || host.ok(["logs", "lazy"]).contains("ready"));
    let done = host.run(["checkpoint", "lazy", "-o", &image(&host)]);
    assert_eq!(done.code, 3, "{done:?}");
    assert!(done.stderr.contains("(perl)") && done.stderr.contains("1 connection"), "{done:?}");
    assert!(!host.path("image").exists());
    assert_eq!(host.row("lazy")["state"], "running");
}

/// Listens on port 80 and at a unix socket, at which it knocks twice itself. Accepts nothing before there is `/tmp/go`, and
/// then one every 20 ms. Echoes lines.
const LATE: &str = r#"
use Socket qw(:all); use IO::Select; $| = 1;
socket(my $tcp, PF_INET, SOCK_STREAM, 0); setsockopt($tcp, SOL_SOCKET, SO_REUSEADDR, 1);
bind($tcp, sockaddr_in(80, INADDR_ANY)) or die $!; listen($tcp, 20);
socket(my $unix, AF_UNIX, SOCK_STREAM, 0); bind($unix, sockaddr_un("/tmp/door")) or die $!; listen($unix, 20);
for (1, 2) { next if fork; socket(my $c, AF_UNIX, SOCK_STREAM, 0); connect($c, sockaddr_un("/tmp/door")) or die $!;
    syswrite($c, "knock\n"); my $answer = <$c>; open(my $log, ">>", "/tmp/heard"); print $log $answer; close $log; sleep 1000; exit }
select(undef, undef, undef, 0.01) until -e "/tmp/go";
for (my $select = IO::Select->new($tcp, $unix);;) {
    for my $ready ($select->can_read) {
        accept(my $client, $ready); select(undef, undef, undef, 0.02);
        next if fork; while (my $line = <$client>) { syswrite($client, $line) } sleep 1000;
    }
}
"#;

fn echo(client: &mut TcpStream) {
    client.write_all(b"hello\n").unwrap();
    let mut line = [0; 6];
    client.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"hello\n");
}

/// The server, which accepts nobody yet, and three clients that it has not accepted.
fn late(host: &Host) -> Vec<TcpStream> {
    host.ok(["run", "-d", "-n", "late", "--", "perl", "-e", LATE]);
    host.wait_for("late", "grep -q ':0050 .* 0A ' /proc/net/tcp && [ $(grep -c door /proc/net/unix) -ge 3 ]");
    let address = host.row("late")["address"].as_str().unwrap().to_owned();
    (0..3).map(|_| connect(host, format!("{address}:80"))).collect()
}

#[test]
fn a_server_that_does_not_accept_is_refused_by_name_and_unharmed() {
    let host = Host::new();
    let mut clients = late(&host);
    for suspended in [false, true] {
        if suspended {
            host.ok(["suspend", "late"]);
        }
        let done = host.run(["checkpoint", "late", "-o", &image(&host)]);
        assert_eq!(done.code, 3, "{done:?}");
        let named = done.stderr.contains("(perl)") && done.stderr.contains("file descriptor");
        assert!(named && done.stderr.contains("that the program has not accepted"), "{done:?}");
        assert!(!host.path("image").exists());
        assert_eq!(host.row("late")["state"], if suspended { "suspended" } else { "running" });
    }
    host.ok(["resume", "late"]);
    let rules = host.command("nft").args(["list", "ruleset"]).output();
    assert!(rules.is_ok_and(|rules| rules.stdout.is_empty()), "rules are left");
    host.ok(["exec", "late", "touch", "/tmp/go"]);
    let address = host.row("late")["address"].as_str().unwrap().to_owned();
    clients.push(connect(&host, format!("{address}:80")));
    clients.iter_mut().for_each(echo);
}

/// Tries something that depends on others' being in time for a checkpoint, which gives them 200 ms: on a machine so busy that
/// they are not it is refused, which is as it should be, and tried again from the beginning.
fn when_all_are_in_time(attempt: impl Fn() -> common::Done) {
    let deadline = std::time::Instant::now() + PATIENCE;
    loop {
        let done = attempt();
        if done.code == 0 {
            return;
        }
        assert!(done.code == 3 && std::time::Instant::now() < deadline, "{done:?}");
    }
}

#[test]
fn a_server_that_accepts_late_is_waited_for() {
    for gone in [false, true] {
        when_all_are_in_time(|| {
            let host = Host::new();
            let mut clients = late(&host);
            // The checkpoint begins while most of them wait: the server is told to begin by a process of its own.
            host.ok(["exec", "late", "sh", "-c", "(sleep 0.03; touch /tmp/go) >/dev/null 2>&1 &"]);
            let leave: &[&str] = if gone { &[] } else { &["--leave-running"] };
            let done = host.run([&["checkpoint", "late", "-o", &image(&host)], leave].concat());
            if gone && done.code == 0 {
                host.ok(["restart", "-d", &image(&host)]);
            }
            clients.iter_mut().for_each(echo);
            host.wait_for("late", "[ $(grep -c knock /tmp/heard) = 2 ]");
            done
        });
    }
}

/// Answers every connection to port 80 with as many bytes as it asks for (a line), and closes it at once.
const CLOSER: &str = r#"
use Socket qw(:all); $SIG{CHLD} = "IGNORE";
socket(my $listener, PF_INET, SOCK_STREAM, 0); setsockopt($listener, SOL_SOCKET, SO_REUSEADDR, 1);
bind($listener, sockaddr_in(80, INADDR_ANY)) or die $!; listen($listener, 20);
while (accept(my $client, $listener)) {
    next if fork;
    my $length = <$client> + 0;
    setsockopt($client, SOL_SOCKET, SO_SNDBUF, 4_000_000);
    my $text = join "", map { chr($_ % 251) } 0 .. 250; $text x= 1 + $length / 251;
    syswrite($client, $text, $length) == $length or die $!;
    exit 0;
}
"#;

fn closer(host: &Host) -> String {
    host.ok(["run", "-d", "-n", "closer", "--", "perl", "-e", CLOSER]);
    host.wait_for("closer", "grep -q ':0050 .* 0A ' /proc/net/tcp");
    format!("{}:80", host.row("closer")["address"].as_str().unwrap())
}

/// A client whose answer of that many bytes does not fit into its buffers, and has been closed by the server.
fn closed_early(host: &Host, address: &str, length: usize) -> TcpStream {
    let mut client = connect(host, address.to_owned());
    nix::sys::socket::setsockopt(&client, nix::sys::socket::sockopt::RcvBuf, &65536).unwrap();
    ask(&mut client, length);
    host.wait_for("closer", "grep -q ':0050 .* 04 ' /proc/net/tcp");
    client
}

fn expect_all(client: &mut TcpStream, length: usize) {
    expect(client, 0, length);
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
}

const LARGE: usize = 300_000;

#[test]
fn what_a_closed_connection_has_left_is_refused_by_name() {
    let host = Host::new();
    let address = closer(&host);
    let mut client = closed_early(&host, &address, LARGE);
    for suspended in [false, true] {
        if suspended {
            host.ok(["suspend", "closer"]);
        }
        for leave in [&[][..], &["--leave-running"]] {
            let done = host.run([&["checkpoint", "closer", "-o", &image(&host)], leave].concat());
            assert_eq!(done.code, 3, "{done:?}");
            let named = done.stderr.contains(&format!("{address} to {}", client.local_addr().unwrap()));
            assert!(named && done.stderr.contains("was closed by its program while the other end has yet"), "{done:?}");
        }
        assert_eq!(host.row("closer")["state"], if suspended { "suspended" } else { "running" });
    }
    assert!(!host.path("image").exists());
    host.ok(["resume", "closer"]);
    expect_all(&mut client, LARGE);
    host.ok(["checkpoint", "closer", "-o", &image(&host)]);
}

#[test]
fn what_a_closed_connection_has_left_is_waited_for() {
    for (suspended, leave) in [(false, &[][..]), (true, &[]), (false, &["--leave-running"])] {
        when_all_are_in_time(|| {
            let host = Host::new();
            let address = closer(&host);
            let mut client = closed_early(&host, &address, LARGE);
            if suspended {
                host.ok(["suspend", "closer"]);
            }
            let reader = std::thread::spawn(move || {
                std::thread::sleep(std::time::Duration::from_millis(100));
                expect_all(&mut client, LARGE);
            });
            let done = host.run([&["checkpoint", "closer", "-o", &image(&host)], leave].concat());
            if leave.is_empty() && done.code == 0 {
                host.ok(["restart", "-d", &image(&host)]);
            }
            reader.join().unwrap();
            done
        });
    }
}

#[test]
fn a_server_that_closes_all_the_time_loses_nobody() {
    let host = Host::new();
    let address = closer(&host);
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..4)
            .map(|n| {
                let (host, address, stop) = (&host, &address, &stop);
                scope.spawn(move || {
                    let mut served = 0;
                    while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                        let mut client = connect(host, address.clone());
                        ask(&mut client, 1 + 20_000 * n);
                        expect_all(&mut client, 1 + 20_000 * n);
                        served += 1;
                    }
                    served
                })
            })
            .collect();
        let taken: Vec<common::Done> = (0..6)
            .map(|round| {
                let image = host.path(&format!("image{round}"));
                let image = image.to_str().unwrap();
                let leave: &[&str] = if round % 2 == 0 { &["--leave-running"] } else { &[] };
                let done = host.run([&["checkpoint", "closer", "-o", image], leave].concat());
                match (done.code, leave) {
                    (0, []) => host.run(["restart", "-d", image]),
                    _ => done,
                }
            })
            .collect();
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        // Where the machine is so busy that the server does not accept in time, it may be refused, and goes on.
        assert!(taken.iter().all(|done| matches!(done.code, 0 | 3)), "{taken:?}");
        assert!(taken.iter().any(|done| done.code == 0), "{taken:?}");
        let served: Vec<i32> = clients.into_iter().map(|client| client.join().unwrap()).collect();
        assert!(served.iter().all(|served| *served > 0), "{served:?}");
    });
}

/// Listens on ports 80 (IPv4) and 81 (IPv6), and accepts nobody who has not said something (Apache does so). Answers every
/// line with itself, and writes down what its listeners are like in between.
const DEFERRING: &str = r#"
use Socket qw(:all); use IO::Select; use constant TCP_DEFER_ACCEPT => 9;
sub listener { my ($family, $address) = @_;
    socket(my $listener, $family, SOCK_STREAM, 0) or die $!; setsockopt($listener, SOL_SOCKET, SO_REUSEADDR, 1);
    setsockopt($listener, IPPROTO_TCP, TCP_DEFER_ACCEPT, 30) or die $!;
    bind($listener, $address) or die $!; listen($listener, 20) or die $!; $listener }
my @listeners = (listener(PF_INET, pack_sockaddr_in(80, INADDR_ANY)), listener(PF_INET6, pack_sockaddr_in6(81, IN6ADDR_ANY)));
my $select = IO::Select->new(@listeners);
while (1) {
    for my $ready ($select->can_read(0.01)) {
        if (grep { $_ == $ready } @listeners) { accept(my $client, $ready) or die $!; $select->add($client); next }
        my $length = sysread($ready, my $text, 1000);
        if ($length) { syswrite($ready, $text) } else { $select->remove($ready); close $ready }
    }
    open(my $log, ">", "/tmp/defer"); print $log join(" ", map { unpack "i", getsockopt($_, IPPROTO_TCP, TCP_DEFER_ACCEPT) } @listeners); close $log;
}
"#;

fn deferring(host: &Host, more: &[&str]) -> [String; 2] {
    host.ok([&["run", "-d", "-n", "defer"], more, &["--", "perl", "-e", DEFERRING]].concat());
    host.wait_for("defer", "grep -q ':0050 .* 0A ' /proc/net/tcp && grep -q ':0051 .* 0A ' /proc/net/tcp6");
    let row = host.row("defer");
    [format!("{}:80", row["address"].as_str().unwrap()), format!("[{}]:81", row["address6"].as_str().unwrap())]
}

fn defers(host: &Host) {
    host.wait_for("defer", "[ \"$(cat /tmp/defer)\" = '31 31' ]");
}

#[test]
fn who_has_said_nothing_yet_is_connected_afterwards() {
    for leave in [&[][..], &["--leave-running"]] {
        when_all_are_in_time(|| connected_afterwards(leave));
    }
}

/// What became of the checkpoint; all is as it should be also when it was refused.
fn connected_afterwards(leave: &[&str]) -> common::Done {
    let host = Host::new();
    let [address, address6] = deferring(&host, &["-p", "8080:80"]);
    let (host_address, _) = address.rsplit_once('.').unwrap();
    let mut addresses = vec![address.clone(), address6, format!("{host_address}.1:8080")];
    if !leave.is_empty() {
        // What the host translates for its own loopback it forgets when the last pod leaves the bridge.
        addresses.push("127.0.0.1:8080".to_owned());
    }
    let mut clients: Vec<TcpStream> = addresses.iter().map(|address| connect(&host, address.clone())).collect();
    let all = clients.len();
    host.wait_for("defer", &format!("[ $(cat /proc/net/tcp /proc/net/tcp6 | grep -c ' 03 ') = {all} ]"));
    let done = host.run([&["checkpoint", "defer", "-o", &image(&host)], leave].concat());
    if leave.is_empty() && done.code == 0 {
        host.ok(["restart", "-d", &image(&host)]);
    }
    defers(&host);
    clients.iter_mut().for_each(echo);
    let rules = host.command("nft").args(["list", "ruleset"]).output().unwrap();
    assert!(!String::from_utf8_lossy(&rules.stdout).contains("newcomers"), "rules are left");
    done
}

#[test]
fn a_suspended_pod_with_somebody_who_has_said_nothing_is_refused() {
    let host = Host::new();
    let [address, _] = deferring(&host, &[]);
    let mut client = connect(&host, address.clone());
    host.wait_for("defer", "grep -q ' 03 ' /proc/net/tcp");
    host.ok(["suspend", "defer"]);
    let done = host.run(["checkpoint", "defer", "-o", &image(&host)]);
    assert_eq!(done.code, 3, "{done:?}");
    assert!(!host.path("image").exists());
    host.ok(["resume", "defer"]);
    defers(&host);
    echo(&mut client);
}

/// Somebody who asks for a connection and is not there, or does not hear.
#[test]
fn who_never_answers_keeps_nobody_waiting_for_long() {
    let host = Host::new();
    let [address, _] = deferring(&host, &[]);
    // The answers to this address of the bridge's network go nowhere.
    let (network, _) = address.rsplit_once('.').unwrap();
    let ghost = format!("{network}.200");
    let image_of = |number: u16| host.path(&format!("image{number}")).to_str().unwrap().to_owned();
    for arguments in [
        &["neigh", "replace", &ghost, "lladdr", "02:00:00:00:00:99", "dev", "zap0"][..],
        &["route", "replace", "local", &ghost, "dev", "lo", "table", "200"],
    ] {
        let done = common::finish(host.command("ip").args(arguments));
        assert_eq!(done.code, 0, "{done:?}");
    }
    let ask = |port: u16| {
        let script = format!(
            "import socket, struct\n\
             s = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)\n\
             def total(b): return sum(struct.unpack('!%dH' % (len(b) // 2), b))\n\
             def fold(n):\n    while n >> 16: n = (n & 0xffff) + (n >> 16)\n    return ~n & 0xffff\n\
             ends = socket.inet_aton('{ghost}') + socket.inet_aton('{}')\n\
             tcp = struct.pack('!HHIIBBHHH', {port}, 80, 77, 0, 80, 2, 1000, 0, 0)\n\
             tcp = tcp[:16] + struct.pack('!H', fold(total(ends + struct.pack('!BBH', 0, 6, 20) + tcp))) + tcp[18:]\n\
             s.sendto(struct.pack('!BBHHHBBH', 69, 0, 40, 0, 0, 64, 6, 0) + ends + tcp, ('{0}', 0))\n",
            address.trim_end_matches(":80"),
        );
        let asked = common::finish(host.command("python3").args(["-c", &script]));
        assert_eq!(asked.code, 0, "{asked:?}");
    };
    // It has a second from its question on, in which the checkpoint has to come: on a busy machine there may be some of which
    // that is not so.
    let mut ports = 4444..;
    common::eventually("a refusal that names who has just asked", || {
        let port = ports.next().unwrap();
        ask(port);
        let done = host.run(["checkpoint", "--leave-running", "defer", "-o", &image_of(port)]);
        let named = done.stderr.contains(&format!("{address} to {ghost}:{port}"));
        let refused = done.code == 3 && named && done.stderr.contains("may take itself for connected");
        assert!(done.code == 0 || refused, "{done:?}");
        refused
    });
    // When it has not answered for a second it is not connected, and will ask again if it is there at all.
    common::eventually("the answer to be repeated", || {
        host.ok(["exec", "defer", "cat", "/proc/net/tcp"]).lines().any(|line| line.contains(" 03 ")) && {
            let done = host.run(["checkpoint", "--leave-running", "defer", "-o", &image(&host)]);
            assert!(done.code == 0 || done.code == 3, "{done:?}");
            done.code == 0
        }
    });
    defers(&host);
}

/// What root sets below `/proc/sys/net` is kept whenever it was set, and whoever set it: also by a restart, and when
/// another monitor takes over.
#[test]
fn settings_of_the_network_are_kept_whenever_they_are_set() {
    let host = Host::new();
    let path = |name: &str| host.path(name).display().to_string();
    let get = |pod: &str, name: &str| host.ok(["exec", pod, "cat", &format!("/proc/sys/net/{name}")]).trim().to_owned();
    let set = |pod: &str, name: &str, value: &str| {
        host.ok(["exec", pod, "sh", "-c", &format!("echo {value} >/proc/sys/net/{name}")]);
    };
    let take = |pod: &str, image: &str| drop(host.ok(["checkpoint", "--leave-running", pod, "-o", image]));
    host.start(["-n", "first", "--", "sleep", "1000"]);
    let usual = get("first", "core/somaxconn");
    let images: Vec<String> = ["a", "b", "c", "d"].into_iter().map(path).collect();
    take("first", &images[0]);
    set("first", "core/somaxconn", "777");
    take("first", &images[1]);
    host.ok(["restart", &images[0], "-d", "-n", "before"]);
    assert_eq!(get("before", "core/somaxconn"), usual);
    host.ok(["restart", &images[1], "-d", "-n", "second"]);
    assert_eq!(get("second", "core/somaxconn"), "777");
    take("second", &images[2]);
    host.ok(["restart", &images[2], "-d", "-n", "third"]);
    assert_eq!(get("third", "core/somaxconn"), "777");
    common::kill(host.monitor("before"));
    set("before", "ipv4/ping_group_range", "0 7");
    take("before", &images[3]);
    host.ok(["restart", &images[3], "-d", "-n", "fourth"]);
    assert_eq!(get("fourth", "ipv4/ping_group_range"), "0\t7");
}
