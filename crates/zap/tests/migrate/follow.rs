//! Pods that move to another network and are followed there: programs of hosts that run zap, and their pods, stay connected
//! without anybody's help at the host that the pod has left.

use super::common::{Host, eventually, finish};
use super::forward::{Client, World, addresses, must_be_as_before, quiet_portrait, residual};
use super::{migrate, pods};

/// Moves the server; these hosts are told.
fn move_on(from: &Host, to: &Host, tell: &[&Host]) {
    let ways: Vec<String> = tell.iter().map(|host| host.leads_to("follow")).collect();
    let told = ways.iter().flat_map(|way| ["--tell", way]);
    let options: Vec<&str> = ["--any-address", "--follow"].into_iter().chain(told).collect();
    let done = migrate(from, to, "server", &[], &options);
    assert_eq!(done.code, 0, "{done:?}");
}

/// Whether somebody who connects only now is answered at that address.
fn is_answered(by: &Host, address: &str) -> bool {
    const CALL: &str = "import socket, sys; socket.create_connection((sys.argv[1], 80), 2)";
    finish(by.command("python3").args(["-c", CALL, address])).code == 0
}

/// The server, with whom programs of a third host, of the server's own, and of a pod beside it are connected.
fn with_clients(world: &World) -> ([String; 2], [Client; 3]) {
    let address = world.serve();
    world.a.ok(["run", "-d", "-n", "neighbour", "--", "sleep", "1000"]);
    let mut clients = [
        Client::start("a third host", world.other.command("env"), &address),
        Client::start("the host", world.a.command("env"), &address),
        Client::start("a pod beside it", world.a.zap(["exec", "-i", "neighbour", "env"]), &address),
    ];
    clients.iter_mut().for_each(Client::goes_on);
    (address, clients)
}

fn follows(address: &[String; 2]) -> Vec<(String, String)> {
    vec![("server".to_owned(), address[0].clone())]
}

#[test]
fn whoever_is_connected_follows_a_pod_to_another_network() {
    let world = World::new();
    let World { a, b, other, .. } = &world;
    let [before, there_before, elsewhere_before] = [a, b, other].map(|host| {
        host.ok(["ls"]);
        quiet_portrait(host)
    });
    let (address, clients) = with_clients(&world);
    let mut clients = Vec::from(clients);
    // Under the address of its host. Its own IPv6 network has no room for other hosts.
    other.ok(["run", "-d", "-n", "far", "--", "sleep", "1000"]);
    let ipv4 = [address[0].clone(), address[0].clone()];
    clients.push(Client::start("a pod of the third host", other.zap(["exec", "-i", "far", "env"]), &ipv4));
    move_on(a, b, &[other]);
    clients.iter_mut().for_each(Client::goes_on);
    for host in [a, other] {
        assert_eq!(residual(host), follows(&address));
    }
    assert_eq!(residual(b), []);
    // Others find it at its new address, and nobody at the old one.
    let there = addresses(b, "server");
    assert!(there[0].starts_with("198.19."), "{there:?}");
    let mut direct = Client::start("a peer at its new address", other.command("env"), &there);
    direct.goes_on();
    assert!(!is_answered(other, &address[0]) && !is_answered(a, &address[0]));
    clients.iter_mut().for_each(Client::goes_on);

    // When nobody is connected any more, nobody follows, and nothing is left.
    clients.into_iter().chain([direct]).for_each(Client::leave);
    for host in [a, other] {
        eventually("the end of all connections", || residual(host).is_empty());
    }
    other.ok(["rm", "-f", "far"]);
    must_be_as_before(other, &elsewhere_before);
    a.ok(["rm", "-f", "neighbour"]);
    must_be_as_before(a, &before);
    b.ok(["rm", "-f", "server"]);
    must_be_as_before(b, &there_before);
}

#[test]
fn a_pod_is_followed_from_host_to_host_and_home() {
    let world = World::new();
    let World { a, b, other, .. } = &world;
    let (address, clients) = with_clients(&world);
    let mut clients = Vec::from(clients);
    move_on(a, b, &[other]);
    clients.push(Client::start("the host where it is", b.command("env"), &addresses(b, "server")));
    clients.iter_mut().for_each(Client::goes_on);
    // To where one of its clients is.
    move_on(b, other, &[a]);
    clients.iter_mut().for_each(Client::goes_on);
    assert_eq!(residual(a), follows(&address));
    // Home.
    move_on(other, a, &[b]);
    assert_eq!(addresses(a, "server"), address);
    clients.iter_mut().for_each(Client::goes_on);
    assert_eq!((residual(a), residual(other)), (vec![], vec![]));
    assert_eq!(residual(b).len(), 1);
    b.ok(["rm", "--residual", "server"]);
    assert_eq!(residual(b), []);
    assert_eq!(b.run(["rm", "--residual", "server"]).code, 6);
}

#[test]
fn a_pod_that_cannot_be_followed_does_not_move() {
    let world = World::new();
    let World { a, b, other, .. } = &world;
    let before = quiet_portrait(other);
    let (_, mut clients) = with_clients(&world);
    let mut stays = |tell: &str, environment: &[(&str, &str)], says: &str| {
        let done = migrate(a, b, "server", environment, &["--any-address", "--follow", "--tell", tell]);
        assert!(done.code == 1 && done.stderr.contains(says), "{done:?}");
        assert_eq!((pods(a).len(), pods(b).len()), (2, 0));
        clients.iter_mut().for_each(Client::goes_on);
        for host in [a, b, other] {
            assert_eq!(residual(host), []);
        }
    };
    stays("exit 7", &[], "`exit 7`: it has ended");
    stays("echo hello", &[], "it is no `zap follow`");
    let way = other.leads_to("follow");
    // Whoever began to follow it does so no more, whatever becomes of those who were to say so.
    stays(&way, &[("ZAP_FAULT", "migrate-followed")], "");
    stays(&way, &[("ZAP_FAULT", "migrate-followed:error")], "could not be given up");
    drop(clients);
    must_be_as_before(other, &before);
}
