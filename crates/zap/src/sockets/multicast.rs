//! Multicast groups that a socket has joined. The kernel lists them for interfaces only; a socket is asked for each.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::BorrowedFd;

use serde::{Deserialize, Serialize};

use super::address;
use crate::ids::HostPid;
use crate::sys::socket;

const JOIN: i32 = 42;
const FILTER: i32 = 48;
/// `struct group_filter` before its sources: interface, group, mode, how many sources.
const HEAD: usize = 144;
/// `struct sockaddr_storage`.
const STORAGE: usize = 128;
/// More sources than the kernel allows by default.
const SOURCES: usize = 128;

/// A group that a socket has joined.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Membership {
    /// Index of the interface, in the pod.
    pub interface: u32,
    /// The group.
    pub group: IpAddr,
    /// Whether the sources are those that are listened to (rather than those that are not).
    pub include: bool,
    /// Sources.
    pub sources: Vec<IpAddr>,
}

/// The groups that interfaces of the network namespace of `init` are in, without those that every interface is in.
pub(super) fn groups(init: HostPid) -> io::Result<Vec<(u32, IpAddr)>> {
    let read = |name| match std::fs::read_to_string(init.proc(name)) {
        // No IPv6 here.
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        other => other,
    };
    let mut groups = parse_igmp(&read("net/igmp")?);
    groups.extend(parse_igmp6(&read("net/igmp6")?));
    Ok(groups)
}

/// An interface's line begins with its index; a group's with white space.
fn parse_igmp(table: &str) -> Vec<(u32, IpAddr)> {
    let mut interface = 0;
    let mut groups = Vec::new();
    for line in table.lines().skip(1) {
        let Some(first) = line.split_whitespace().next() else { continue };
        if !line.starts_with(char::is_whitespace) {
            interface = first.parse().unwrap_or(0);
        } else if let Ok(group) = u32::from_str_radix(first, 16) {
            groups.push((interface, Ipv4Addr::from(group.to_ne_bytes())));
        }
    }
    let everyones = Ipv4Addr::new(224, 0, 0, 1);
    groups.into_iter().filter(|(_, g)| *g != everyones).map(|(i, g)| (i, g.into())).collect()
}

fn parse_igmp6(table: &str) -> Vec<(u32, IpAddr)> {
    let group = |line: &str| {
        let mut words = line.split_whitespace();
        let interface = words.next()?.parse().ok()?;
        let group = Ipv6Addr::from(u128::from_str_radix(words.nth(1)?, 16).ok()?);
        let kernels = group.segments()[1..] == [0, 0, 0, 0, 0, 0, 1]
            || (group.segments()[..7] == [0xff02, 0, 0, 0, 0, 1, group.segments()[6]] && group.octets()[12] == 0xff);
        (!kernels).then_some((interface, group.into()))
    };
    table.lines().filter_map(group).collect()
}

/// Which of `groups` the socket has joined.
pub(super) fn memberships(fd: BorrowedFd<'_>, family: i32, groups: &[(u32, IpAddr)]) -> Vec<Membership> {
    let of_family = |group: &IpAddr| family == libc::AF_INET6 || group.is_ipv4();
    let asked = groups.iter().filter(|(_, g)| of_family(g));
    asked.filter_map(|&(interface, group)| membership(fd, interface, group)).collect()
}

fn membership(fd: BorrowedFd<'_>, interface: u32, group: IpAddr) -> Option<Membership> {
    let mut filter = head(interface, group);
    filter[140..144].copy_from_slice(&(SOURCES as u32).to_ne_bytes());
    filter.resize(HEAD + SOURCES * STORAGE, 0);
    // An error says that it has not joined.
    let length = socket::get_bytes(fd, level(group), FILTER, &mut filter).ok()?;
    let word = |at: usize| filter.get(at..at + 4).and_then(|w| w.first_chunk()).map(|w| u32::from_ne_bytes(*w));
    let count = (word(140)? as usize).min(SOURCES);
    let sources = filter.get(HEAD..length)?.chunks_exact(STORAGE).take(count);
    let sources = sources.filter_map(address::from_kernel).map(|a| a.ip()).collect();
    Some(Membership { interface, group, include: word(136)? == 1, sources })
}

/// Joins groups. The latest is the first of the kernel's list, and some of what it shows depends on which is.
pub(super) fn join_all(fd: BorrowedFd<'_>, memberships: &[Membership]) -> io::Result<()> {
    memberships.iter().rev().try_for_each(|membership| join(fd, membership))
}

fn join(fd: BorrowedFd<'_>, membership: &Membership) -> io::Result<()> {
    let mut filter = head(membership.interface, membership.group);
    socket::set_bytes(fd, level(membership.group), JOIN, &filter[..HEAD - 8])?;
    if !membership.include && membership.sources.is_empty() {
        return Ok(());
    }
    filter[136..140].copy_from_slice(&u32::from(membership.include).to_ne_bytes());
    filter[140..144].copy_from_slice(&(membership.sources.len() as u32).to_ne_bytes());
    filter.extend(membership.sources.iter().flat_map(|s| storage(*s)));
    socket::set_bytes(fd, level(membership.group), FILTER, &filter)
}

fn level(group: IpAddr) -> i32 {
    if group.is_ipv4() { libc::IPPROTO_IP } else { libc::IPPROTO_IPV6 }
}

fn head(interface: u32, group: IpAddr) -> Vec<u8> {
    let mut filter = interface.to_ne_bytes().to_vec();
    filter.resize(8, 0);
    filter.extend(storage(group));
    filter.resize(HEAD, 0);
    filter
}

fn storage(ip: IpAddr) -> Vec<u8> {
    let family = if ip.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let mut bytes = address::to_kernel(SocketAddr::new(ip, 0), family);
    bytes.resize(STORAGE, 0);
    bytes
}

/// Reads a text as the tables of groups.
pub(super) fn try_table(text: &str) {
    drop((parse_igmp(text), parse_igmp6(text)));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_groups_of_interfaces_are_understood() {
        let table = "Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter\n\
            2\teth0      :     2      V3\n\t\t\t\tFB0000E0     1 0:00000000\t\t0\n\t\t\t\t010000E0     1 0:00000000\t\t0\n";
        assert_eq!(parse_igmp(table), [(2, IpAddr::from([224, 0, 0, 251]))]);
        let table = "2    eth0            ff0200000000000000000000000000fb     1 0000000C 0\n\
            2    eth0            ff0200000000000000000001ff000003     1 00000004 0\n\
            2    eth0            ff020000000000000000000000000001     1 0000000C 0\n";
        assert_eq!(parse_igmp6(table), [(2, "ff02::fb".parse().unwrap())]);
    }
}
