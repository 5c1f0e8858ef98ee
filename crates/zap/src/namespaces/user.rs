//! User namespaces: which users and groups are whose.

use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use serde::{Deserialize, Serialize};

use crate::ids::HostPid;
use crate::sys::{capability, clone, exec, nsfs};

/// What a user namespace maps, and whose it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserState {
    /// Who made it: user, as the pod's own namespace has it.
    pub owner: u32,
    /// Lines of `uid_map`: first, first in the parent, how many.
    pub users: Vec<[u32; 3]>,
    /// Lines of `gid_map`.
    pub groups: Vec<[u32; 3]>,
    /// Whether `setgroups(2)` is denied.
    pub groups_denied: bool,
}

fn parse(text: &str) -> Vec<[u32; 3]> {
    let line = |line: &str| {
        let numbers: Vec<u32> = line.split_whitespace().filter_map(|n| n.parse().ok()).collect();
        <[u32; 3]>::try_from(numbers).ok()
    };
    text.lines().filter_map(line).collect()
}

fn lines(map: &[[u32; 3]]) -> String {
    map.iter().map(|[first, lower, count]| format!("{first} {lower} {count}\n")).collect()
}

/// What a namespace maps. A process of ours goes into it for that: what is read there is in numbers of the parent's.
pub(super) fn capture(namespace: &OwnedFd) -> io::Result<UserState> {
    let slots: Vec<OwnedFd> = (0..3).map(|_| slot()).collect::<io::Result<_>>()?;
    let numbers: Vec<i32> = slots.iter().map(AsRawFd::as_raw_fd).collect();
    clone::in_child(&|| {
        nsfs::enter(namespace, libc::CLONE_NEWUSER)?;
        let paths = [c"/proc/self/uid_map", c"/proc/self/gid_map", c"/proc/self/setgroups"];
        for (path, number) in paths.into_iter().zip(&numbers) {
            let file = open(path, OFlag::O_RDONLY, Mode::empty())?;
            exec::duplicate_to(file.as_raw_fd(), *number)?;
        }
        Ok(())
    })?;
    let mut texts = slots.into_iter().map(|slot| {
        let mut text = String::new();
        fs::File::from(slot).read_to_string(&mut text).map(|_| text)
    });
    let mut next = || texts.next().unwrap_or_else(|| Ok(String::new()));
    Ok(UserState {
        owner: nsfs::owner_uid(namespace)?,
        users: parse(&next()?),
        groups: parse(&next()?),
        groups_denied: next()?.trim() == "deny",
    })
}

/// The same for a namespace right below the pod's own, through a process in it: maps are shown in numbers of the reader's.
pub(super) fn capture_through(process: HostPid, namespace: &OwnedFd) -> io::Result<UserState> {
    let read = |name: &str| fs::read_to_string(process.proc(name));
    Ok(UserState {
        owner: nsfs::owner_uid(namespace)?,
        users: parse(&read("uid_map")?),
        groups: parse(&read("gid_map")?),
        groups_denied: read("setgroups")?.trim() == "deny",
    })
}

/// A number in our table of descriptors, for a helper that shares the table to put something at.
pub(super) fn slot() -> io::Result<OwnedFd> {
    Ok(open("/dev/null", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?)
}

/// Makes it again, below `parent`.
///
/// Its maker has the group `group`, which must have a name in `parent`.
pub(super) fn restart(parent: Option<&OwnedFd>, group: u32, state: &UserState) -> io::Result<OwnedFd> {
    let made = slot()?;
    clone::in_child(&|| {
        capability::become_user(state.owner, group)?;
        if let Some(parent) = parent {
            nsfs::enter(parent.as_fd(), libc::CLONE_NEWUSER)?;
            capability::visible()?;
        }
        clone::beside_new_user_namespace(|child| {
            let path = |name: &str| PathBuf::from(format!("/proc/{child}/{name}"));
            if state.groups_denied {
                fs::write(path("setgroups"), "deny")?;
            }
            for (name, map) in [("gid_map", &state.groups), ("uid_map", &state.users)] {
                if !map.is_empty() {
                    fs::write(path(name), lines(map))?;
                }
            }
            exec::duplicate_to(fs::File::open(path("ns/user"))?.as_raw_fd(), made.as_raw_fd())
        })
    })?;
    Ok(made)
}

/// What `id` is called in a namespace, if it has a name there. `maps` are those from the outermost inwards.
pub(super) fn inside(mut id: u32, maps: &[&[[u32; 3]]]) -> Option<u32> {
    for map in maps {
        let line = map.iter().find(|[_, lower, count]| id.checked_sub(*lower).is_some_and(|by| by < *count))?;
        id = line[0] + (id - line[1]);
    }
    Some(id)
}

/// The reverse: what an id of the innermost namespace is called in the pod's own.
pub(super) fn outside(mut id: u32, maps: &[&[[u32; 3]]]) -> Option<u32> {
    for map in maps.iter().rev() {
        let line = map.iter().find(|[first, _, count]| id.checked_sub(*first).is_some_and(|by| by < *count))?;
        id = line[1] + (id - line[0]);
    }
    Some(id)
}

/// Reads a text as the map of a user namespace.
pub(super) fn try_map(text: &str) {
    drop(parse(text));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_are_read_and_followed() {
        let outer = parse("         0       1000          1\n  1 100000 65536\n");
        assert_eq!(outer, [[0, 1000, 1], [1, 100_000, 65_536]]);
        let inner = parse("1000 0 1\n");
        assert_eq!(inside(1000, &[&outer]), Some(0));
        assert_eq!(inside(1000, &[&outer, &inner]), Some(1000));
        assert_eq!(inside(100_010, &[&outer]), Some(11));
        assert_eq!(inside(7, &[&outer]), None);
        assert_eq!(outside(1000, &[&outer, &inner]), Some(1000));
        assert_eq!(lines(&inner), "1000 0 1\n");
    }
}
