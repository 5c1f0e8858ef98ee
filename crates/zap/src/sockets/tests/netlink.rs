//! Netlink and multicast.

use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::OwnedFd;

use super::*;
use crate::sys::socket;

#[test]
fn a_route_socket_keeps_its_port_and_groups() {
    in_private_network(|| {
        let netlink = socket::socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE).unwrap();
        let mut address = (libc::AF_NETLINK as u32).to_ne_bytes().to_vec();
        address.extend(4711u32.to_ne_bytes());
        address.extend(libc::RTMGRP_LINK.to_ne_bytes());
        socket::bind(&netlink, &address).unwrap();
        socket::set_int(&netlink, libc::SOL_NETLINK, 12, 1).unwrap();
        let again = move_all(vec![netlink]).remove(0);
        assert_eq!(socket::local_name(&again).unwrap(), address);
        assert_eq!(socket::get_int(&again, libc::SOL_NETLINK, 12).unwrap(), 1);
        ip("link set lo mtu 60000");
        assert_ne!(socket::readiness(&again, libc::POLLIN).unwrap(), 0);
    });
}

#[test]
fn multicast_groups_are_joined_again() {
    in_private_network(|| {
        let member = UdpSocket::bind("0.0.0.0:6000").unwrap();
        let stranger = UdpSocket::bind("0.0.0.0:6001").unwrap();
        member.join_multicast_v4(&Ipv4Addr::new(239, 1, 2, 3), &Ipv4Addr::LOCALHOST).unwrap();
        let six = UdpSocket::bind("[::]:6002").unwrap();
        six.join_multicast_v6(&"ff05::99".parse().unwrap(), 1).unwrap();
        let fds: Vec<OwnedFd> = vec![member.into(), stranger.into(), six.into()];
        let groups = |fds: &[OwnedFd]| -> Vec<Vec<crate::sockets::Membership>> {
            let captured = capture(&fds.iter().collect::<Vec<_>>());
            let state = |s: &FileState| crate::image::decode::<crate::sockets::UdpState>(&s.state).unwrap().memberships;
            captured.states.iter().map(state).collect()
        };
        let before = groups(&fds);
        assert_eq!(before.iter().map(Vec::len).collect::<Vec<_>>(), [1, 0, 1]);
        assert_eq!(groups(&move_all(fds)), before);
    });
}
